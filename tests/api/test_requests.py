"""request_id: however often a call is made, and however many at once, one thing comes of it."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import pytest

from aftertouch.rpc.values import to_struct
from aftertouch.v1 import apps_pb2, campaigns_pb2, options_pb2, retargeting_pb2
from tests.fix_world import World
from tests.refusals import refuse

SOME_ID = "7d444840-9dc0-41d1-b245-5ffdce74fad2"
"""Of one form with all others; the same in every process, as the names of tests have to be."""


def new_id() -> str:
    return str(uuid.uuid4())


def write_create(world: World, request_id: str, display_name: str = "Once", **fields: Any) -> campaigns_pb2.CreateCampaignRequest:
    campaign = campaigns_pb2.Campaign(display_name=display_name, channel="sms")
    return campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=campaign, request_id=request_id, **fields)


async def list_named(world: World, display_name: str) -> list[str]:
    request = campaigns_pb2.ListCampaignsRequest(parent=world.client.parent, page_size=1000)
    listed = await world.client.campaigns.ListCampaigns(request)
    return [campaign.name for campaign in listed.campaigns if campaign.display_name == display_name]


async def test_create_repeated_answers_the_same(shared_world: World) -> None:
    request = write_create(shared_world, new_id(), "Repeated")
    first = await shared_world.client.campaigns.CreateCampaign(request)
    assert await shared_world.client.campaigns.CreateCampaign(request) == first
    assert await list_named(shared_world, "Repeated") == [first.name]


async def test_create_repeated_after_a_change_answers_as_it_did(shared_world: World) -> None:
    client = shared_world.client
    request = write_create(shared_world, new_id(), "Before")
    first = await client.campaigns.CreateCampaign(request)
    changed = campaigns_pb2.Campaign(name=first.name, display_name="After")
    await client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=changed))
    assert (await client.campaigns.CreateCampaign(request)).display_name == "Before"


@pytest.mark.parametrize("calls", [2, 20, 60])
async def test_create_at_once_makes_one(shared_world: World, calls: int) -> None:
    request = write_create(shared_world, new_id(), f"At once {calls}")
    answers = await asyncio.gather(*(shared_world.client.campaigns.CreateCampaign(request) for _ in range(calls)))
    assert {answer.name for answer in answers} == set(await list_named(shared_world, f"At once {calls}"))
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1


async def test_create_at_once_under_one_name_makes_one(shared_world: World) -> None:
    """Without an equal request_id one of them wins, and the others hear that the name is taken."""
    requests = [write_create(shared_world, new_id(), "Race", campaign_id="race") for _ in range(8)]
    calls = (shared_world.client.campaigns.CreateCampaign(request) for request in requests)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, campaigns_pb2.Campaign) for answer in answers) == 1
    loser = next(request for request, answer in zip(requests, answers, strict=True) if isinstance(answer, Exception))
    refusal = await refuse(shared_world.client.campaigns.CreateCampaign(loser))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "RESOURCE_ALREADY_EXISTS")
    assert refusal.metadata == {"resource": "apps/acme/campaigns/race"}


async def test_launch_at_once_sends_once(shared_world: World) -> None:
    draft = await shared_world.create_campaign("sms")
    before = len(shared_world.sandbox.truth.entries)
    request = campaigns_pb2.LaunchCampaignRequest(name=draft.name, request_id=new_id())
    answers = await asyncio.gather(*(shared_world.client.campaigns.LaunchCampaign(request) for _ in range(20)))
    assert {answer.state for answer in answers} == {campaigns_pb2.Campaign.State.SENDING}
    sent = await shared_world.wait_until_sent(draft.name)
    assert len(shared_world.sandbox.truth.entries) - before == sent.counts.recipients
    assert (await shared_world.client.campaigns.LaunchCampaign(request)).state == campaigns_pb2.Campaign.State.SENDING


async def test_launch_at_once_without_an_id_sends_once(shared_world: World) -> None:
    draft = await shared_world.create_campaign("sms")
    calls = (
        shared_world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=draft.name)) for _ in range(10)
    )
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert sum(isinstance(answer, campaigns_pb2.Campaign) for answer in answers) == 1
    await shared_world.wait_until_sent(draft.name)


async def test_retarget_repeated_and_at_once_makes_one(shared_world: World) -> None:
    source = await shared_world.create_campaign("sms")
    await shared_world.launch(source.name)
    request = retargeting_pb2.CreateRetargetRequest(
        selection=campaigns_pb2.RetargetSelection(source=source.name, action="delivered"),
        channel="sms",
        display_name="One wave",
        request_id=new_id(),
    )
    answers = await asyncio.gather(*(shared_world.client.retargeting.CreateRetarget(request) for _ in range(20)))
    assert {answer.name for answer in answers} == set(await list_named(shared_world, "One wave"))


async def test_more_calls_at_once_than_connections_that_freeze_people_wait_for_each_other(shared_world: World) -> None:
    """What they read first is on another connection than what they write."""
    source = await shared_world.create_campaign("sms")
    await shared_world.launch(source.name)
    requests = [
        retargeting_pb2.CreateRetargetRequest(
            selection=campaigns_pb2.RetargetSelection(source=source.name, action="sent"),
            channel="sms",
            evaluation=campaigns_pb2.Audience.AT_CREATION,
            allow_duplicate=True,
            request_id=new_id(),
        )
        for _ in range(50)
    ]
    create = shared_world.client.retargeting.CreateRetarget
    drafts = await asyncio.gather(*(create(request, timeout=60) for request in requests))
    assert len({draft.name for draft in drafts}) == 50
    everybody = campaigns_pb2.Audience(
        all_subscribers=campaigns_pb2.AllSubscribers(), evaluation=campaigns_pb2.Audience.AT_CREATION
    )
    changes = [campaigns_pb2.Campaign(name=draft.name, audience=everybody) for draft in drafts]
    update = shared_world.client.campaigns.UpdateCampaign
    updates = [update(campaigns_pb2.UpdateCampaignRequest(campaign=change), timeout=60) for change in changes]
    (count,) = {draft.audience.frozen.count for draft in await asyncio.gather(*updates)}
    assert count > 1


async def test_api_key_repeated_is_the_same_without_its_secret(shared_world: World) -> None:
    key = apps_pb2.ApiKey(display_name="checkout", scopes=[options_pb2.SCOPE_READ])
    request = apps_pb2.CreateApiKeyRequest(parent="apps/acme", api_key=key, request_id=new_id())
    answers = await asyncio.gather(*(shared_world.client.apps.CreateApiKey(request) for _ in range(10)))
    assert len({answer.name for answer in answers}) == 1
    assert sum(bool(answer.secret) for answer in answers) == 1
    assert (await shared_world.client.apps.CreateApiKey(request)).secret == ""


async def test_id_with_another_request_is_refused(shared_world: World) -> None:
    client, request_id = shared_world.client, new_id()
    draft = await client.campaigns.CreateCampaign(write_create(shared_world, request_id))
    launch = campaigns_pb2.LaunchCampaignRequest(name=draft.name, request_id=request_id)
    other = client.campaigns.CreateCampaign(write_create(shared_world, request_id, "Another"))
    for call in (other, client.campaigns.LaunchCampaign(launch)):
        refusal = await refuse(call)
        assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")
        assert refusal.metadata == {"request_id": request_id}


async def test_id_of_a_check_is_not_the_id_of_the_launch(shared_world: World) -> None:
    draft, request_id = await shared_world.create_campaign("sms"), new_id()
    request = campaigns_pb2.LaunchCampaignRequest(name=draft.name, request_id=request_id, validate_only=True)
    await shared_world.client.campaigns.LaunchCampaign(request)
    request.validate_only = False
    assert (await refuse(shared_world.client.campaigns.LaunchCampaign(request))).reason == "REQUEST_ID_REUSED"


async def test_id_whose_call_failed_can_be_used_again(shared_world: World) -> None:
    client, request_id = shared_world.client, new_id()
    bad = write_create(shared_world, request_id, "Second try")
    bad.campaign.content.CopyFrom(to_struct({"body": "{{ unclosed"}))
    assert (await refuse(client.campaigns.CreateCampaign(bad))).reason == "FIELDS_INVALID"
    draft = await client.campaigns.CreateCampaign(write_create(shared_world, request_id, "Second try"))
    assert await list_named(shared_world, "Second try") == [draft.name]


async def test_id_whose_calls_fail_at_once_can_be_used_again(shared_world: World) -> None:
    await shared_world.client.campaigns.CreateCampaign(write_create(shared_world, "", "Taken", campaign_id="taken"))
    request = write_create(shared_world, new_id(), "Taken too", campaign_id="taken")
    calls = (refuse(shared_world.client.campaigns.CreateCampaign(request)) for _ in range(10))
    assert {refusal.reason for refusal in await asyncio.gather(*calls)} == {"RESOURCE_ALREADY_EXISTS"}
    request.campaign_id = "free"
    assert (await shared_world.client.campaigns.CreateCampaign(request)).name == "apps/acme/campaigns/free"


async def test_ids_are_of_one_app(shared_world: World) -> None:
    request = write_create(shared_world, new_id(), "Of acme")
    ours = await shared_world.client.campaigns.CreateCampaign(request)
    async with shared_world.connect("neighbour", await shared_world.create_key("neighbour", "manage")) as neighbour:
        request.parent = neighbour.parent
        theirs = await neighbour.campaigns.CreateCampaign(request)
    assert theirs.name.startswith("apps/neighbour/")
    assert ours.name.startswith("apps/acme/")


@pytest.mark.parametrize("request_id", ["x", "1", "0" * 32, f"{SOME_ID}0", "' or 1=1", f"{{{SOME_ID}}}"])
async def test_id_that_is_no_uuid_is_refused(shared_world: World, request_id: str) -> None:
    refusal = await refuse(shared_world.client.campaigns.CreateCampaign(write_create(shared_world, request_id)))
    assert list(refusal.fields) == ["request_id"]
