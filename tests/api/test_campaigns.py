"""Campaigns over gRPC: drafts and their changes, what a launch checks, and from a draft to everybody's signals."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from aftertouch.rpc.values import to_struct
from aftertouch.v1 import campaigns_pb2, contacts_pb2
from tests.fix_world import CONTENT, OpenWorld, World
from tests.refusals import refuse

State = campaigns_pb2.Campaign.State
EVERYBODY = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())


async def create(world: World, campaign_id: str = "", **fields: Any) -> campaigns_pb2.Campaign:
    campaign = campaigns_pb2.Campaign(**{"display_name": "Draft", "channel": "sms", **fields})
    request = campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=campaign, campaign_id=campaign_id)
    return await world.client.campaigns.CreateCampaign(request)


async def update(world: World, name: str, *paths: str, **fields: Any) -> campaigns_pb2.Campaign:
    mask = FieldMask(paths=paths) if paths else None
    campaign = campaigns_pb2.Campaign(name=name, **fields)
    return await world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=campaign, update_mask=mask))


async def launch(world: World, name: str, **fields: Any) -> campaigns_pb2.Campaign:
    return await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name, **fields))


def give(*names: str) -> campaigns_pb2.Audience:
    return campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=names))


async def test_launched_campaign_reaches_everybody_once(world: World) -> None:
    await world.import_people()
    draft = await world.create_campaign("sms")
    await world.launch(draft.name)
    sent = await world.get_campaign(draft.name)
    people = {person.external_id for person in world.sandbox.population if "sms" in person.channels}
    messaged = [entry.person.external_id for entry in world.sandbox.truth.entries if entry.person]
    assert sent.state == campaigns_pb2.Campaign.State.SENT
    assert sorted(messaged) == sorted(people)
    assert sent.counts.recipients == len(people)


# Drafts


async def test_draft_is_returned_as_it_was_given(shared_world: World) -> None:
    content = to_struct(CONTENT["whatsapp"])
    made = await create(shared_world, "summer", channel="whatsapp", content=content, audience=EVERYBODY)
    assert (made.name, made.state, made.channel) == ("apps/acme/campaigns/summer", State.DRAFT, "whatsapp")
    assert (made.content, made.audience, made.root) == (content, EVERYBODY, "")
    assert made.etag
    assert made.create_time == made.update_time
    assert not made.HasField("launch_time")
    assert not made.HasField("counts")
    assert await shared_world.get_campaign(made.name) == made


async def test_draft_may_lack_content_and_audience_and_gets_an_id(shared_world: World) -> None:
    made = await create(shared_world)
    assert not made.HasField("content")
    assert not made.HasField("audience")
    assert made.name.startswith("apps/acme/campaigns/c-")


async def test_draft_passes_over_what_only_the_server_says(shared_world: World) -> None:
    forged = campaigns_pb2.CampaignCounts(recipients=5)
    made = await create(shared_world, state=State.SENT, state_reason="x", root="apps/acme/campaigns/x", counts=forged)
    assert (made.state, made.state_reason, made.root, made.HasField("counts")) == (State.DRAFT, "", "", False)


@pytest.mark.parametrize("campaign_id", ["Summer", "1st", "-a", "a-", "a_b", "a" * 64, "é", "a/b", "a\n"])
async def test_id_of_another_form_is_refused(shared_world: World, campaign_id: str) -> None:
    assert list((await refuse(create(shared_world, campaign_id))).fields) == ["campaign_id"]


async def test_id_that_is_taken_is_refused(shared_world: World) -> None:
    await create(shared_world, "taken")
    refusal = await refuse(create(shared_world, "taken"))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "RESOURCE_ALREADY_EXISTS")
    assert refusal.metadata == {"resource": "apps/acme/campaigns/taken"}


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"display_name": ""}, "campaign.display_name"),
        ({"display_name": "x" * 201}, "campaign.display_name"),
        ({"channel": ""}, "campaign.channel"),
        ({"channel": "fax"}, "campaign.channel"),
        ({"content": to_struct({"body": "Hi {{ name"})}, "campaign.content.body"),
        ({"content": to_struct({"body": "{% if x %}"})}, "campaign.content.body"),
        ({"content": to_struct({"body": "{{ x | no_such_filter }}"})}, "campaign.content.body"),
        ({"content": to_struct({"body": "{% render 'elsewhere' %}"})}, "campaign.content.body"),
        ({"content": to_struct({})}, "campaign.content.body"),
        ({"content": to_struct({"body": 5})}, "campaign.content.body"),
        ({"content": to_struct({"body": "x", "boddy": "y"})}, "campaign.content.boddy"),
        ({"content": to_struct({"body": "x" * 70_000})}, "campaign.content"),
        ({"channel": "push", "content": to_struct({"title": "x", "url": "x", "urgency": "!"})}, "campaign.content.urgency"),
        ({"audience": campaigns_pb2.Audience()}, "campaign.audience"),
        ({"audience": campaigns_pb2.Audience(given_contacts={})}, "campaign.audience.given_contacts.contacts"),
        ({"audience": give("apps/acme/contacts/x", "x")}, "campaign.audience.given_contacts.contacts[1]"),
        ({"audience": campaigns_pb2.Audience(retarget={"action": "x"})}, "campaign.audience.retarget.source"),
        ({"audience": campaigns_pb2.Audience(retarget={"source": "apps/acme/campaigns/x"})}, "campaign.audience.retarget.action"),
    ],
)
async def test_draft_with_a_faulty_field_is_refused_with_its_path(shared_world: World, fields: Any, path: str) -> None:
    def covers(field: str) -> bool:
        return field == path or (path == "campaign.audience" and field == "campaign.audience.kind")

    created = await refuse(create(shared_world, **fields))
    assert any(map(covers, created.fields)), created
    if "channel" not in fields:
        draft = await create(shared_world)
        changed = await refuse(update(shared_world, draft.name, next(iter(fields)), **fields))
        assert any(map(covers, changed.fields)), changed
        assert await shared_world.get_campaign(draft.name) == draft


async def test_faults_of_a_draft_are_told_at_once(shared_world: World) -> None:
    content = to_struct({"title": "{{ a", "url": "{% b", "more": 1})
    refusal = await refuse(create(shared_world, channel="push", content=content))
    assert set(refusal.fields) == {"campaign.content.title", "campaign.content.url", "campaign.content.more"}


async def test_list_is_newest_first_to_the_end(shared_world: World) -> None:
    async with shared_world.connect("lister", await shared_world.create_key("lister", "manage")) as client:
        for i in range(7):
            campaign = campaigns_pb2.Campaign(display_name=f"n{i}", channel="sms")
            await client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=campaign))
        seen, token = [], ""
        while True:
            request = campaigns_pb2.ListCampaignsRequest(parent=client.parent, page_size=3, page_token=token)
            page = await client.campaigns.ListCampaigns(request)
            seen += [campaign.display_name for campaign in page.campaigns]
            token = page.next_page_token
            if not token:
                break
        assert seen == [f"n{i}" for i in range(6, -1, -1)]


async def test_list_has_what_the_filter_wants_and_pages_only_that(shared_world: World) -> None:
    async with shared_world.connect("filterer", await shared_world.create_key("filterer", "manage")) as client:

        async def find(page_token: str = "", page_size: int = 0, **wanted: Any) -> campaigns_pb2.ListCampaignsResponse:
            request = campaigns_pb2.ListCampaignsRequest(
                parent=client.parent,
                page_size=page_size,
                page_token=page_token,
                filter=campaigns_pb2.CampaignFilter(**wanted),
            )
            return await client.campaigns.ListCampaigns(request)

        for name, channel in (("Summer 100%", "sms"), ("summer_2", "push"), ("Winter", "push")):
            campaign = campaigns_pb2.Campaign(display_name=name, channel=channel)
            await client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=campaign))

        async def name_found(**wanted: Any) -> list[str]:
            return [campaign.display_name for campaign in (await find(**wanted)).campaigns]

        assert await name_found(text="SUMMER") == ["summer_2", "Summer 100%"]
        assert await name_found(text="r_") == ["summer_2"]
        assert await name_found(text="0%") == ["Summer 100%"]
        assert await name_found(text="summer", channel="push") == ["summer_2"]
        assert await name_found(state=campaigns_pb2.Campaign.SENT) == []
        assert await name_found(root=f"{client.parent}/campaigns/none") == []
        first = await find(channel="push", page_size=1)
        second = await find(first.next_page_token, channel="push")
        assert [first.campaigns[0].display_name, second.campaigns[0].display_name] == ["Winter", "summer_2"]
        refusal = await refuse(find(first.next_page_token, channel="sms"))
        assert (refusal.reason, list(refusal.fields)) == ("FIELDS_INVALID", ["page_token"])
        assert (await refuse(find(root="apps/acme/campaigns/x"))).reason == "RESOURCE_NOT_FOUND"
        assert list((await refuse(find(root="x"))).fields) == ["filter.root"]


async def test_list_has_the_waves_of_a_chain(shared_world: World) -> None:
    root = await create(shared_world, content=to_struct(CONTENT["sms"]), audience=EVERYBODY)
    await shared_world.launch(root.name)
    wave = campaigns_pb2.Audience(retarget=campaigns_pb2.RetargetSelection(source=root.name, action="sent"))
    made = await create(shared_world, content=to_struct(CONTENT["sms"]), audience=wave)
    request = campaigns_pb2.ListCampaignsRequest(parent="apps/acme", filter=campaigns_pb2.CampaignFilter(root=root.name))
    listed = await shared_world.client.campaigns.ListCampaigns(request)
    assert [campaign.name for campaign in listed.campaigns] == [made.name]


# Changes


async def test_update_without_a_mask_changes_what_is_set(shared_world: World) -> None:
    draft = await create(shared_world, content=to_struct(CONTENT["sms"]), audience=EVERYBODY)
    changed = await update(shared_world, draft.name, display_name="Renamed")
    assert (changed.display_name, changed.content, changed.audience) == ("Renamed", draft.content, EVERYBODY)
    assert changed.etag != draft.etag
    assert await shared_world.get_campaign(draft.name) == changed


async def test_update_with_a_mask_changes_what_it_names(shared_world: World) -> None:
    draft = await create(shared_world, content=to_struct(CONTENT["sms"]), audience=EVERYBODY)
    changed = await update(shared_world, draft.name, "content", "audience", display_name="Not named")
    assert (changed.display_name, changed.HasField("content"), changed.HasField("audience")) == ("Draft", False, False)


async def test_update_with_a_star_changes_all(shared_world: World) -> None:
    draft = await create(shared_world, content=to_struct(CONTENT["sms"]), audience=EVERYBODY)
    changed = await update(shared_world, draft.name, "*", display_name="All new", audience=EVERYBODY)
    assert (changed.display_name, changed.HasField("content"), changed.audience) == ("All new", False, EVERYBODY)
    assert list((await refuse(update(shared_world, draft.name, "*"))).fields) == ["campaign.display_name"]


@pytest.mark.parametrize("path", ["nonsense", "content.body", "", "campaign.display_name", "displayName"])
async def test_update_of_an_unknown_path_is_refused(shared_world: World, path: str) -> None:
    draft = await create(shared_world)
    assert list((await refuse(update(shared_world, draft.name, path, display_name="x"))).fields) == ["update_mask"]


async def test_update_passes_over_output_only_paths(shared_world: World) -> None:
    draft = await create(shared_world)
    changed = await update(shared_world, draft.name, "state", "counts", "display_name", display_name="x", state=State.SENT)
    assert (changed.display_name, changed.state) == ("x", State.DRAFT)


@pytest.mark.parametrize("paths", [(), ("channel",), ("*",), ("display_name", "channel")])
async def test_update_cannot_change_the_channel(shared_world: World, paths: tuple[str, ...]) -> None:
    draft = await create(shared_world)
    refusal = await refuse(update(shared_world, draft.name, *paths, display_name="x", channel="push"))
    assert list(refusal.fields) == ["campaign.channel"]
    assert (await update(shared_world, draft.name, *paths, display_name="x", channel="sms")).channel == "sms"


async def test_update_with_an_old_etag_is_aborted(shared_world: World) -> None:
    draft = await create(shared_world)
    changed = await update(shared_world, draft.name, display_name="First", etag=draft.etag)
    client = shared_world.client.campaigns
    for call in (
        update(shared_world, draft.name, display_name="Second", etag=draft.etag),
        client.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=draft.name, etag=draft.etag)),
        launch(shared_world, draft.name, etag=draft.etag),
        client.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=draft.name, etag=draft.etag)),
    ):
        refusal = await refuse(call)
        assert (refusal.code, refusal.reason, refusal.metadata) == ("ABORTED", "ETAG_MISMATCH", {"resource": draft.name})
    assert await shared_world.get_campaign(draft.name) == changed


async def test_update_of_the_audience_tells_the_wave_from_the_campaign(shared_world: World) -> None:
    source = await shared_world.create_campaign("sms")
    await shared_world.launch(source.name)
    draft = await create(shared_world)
    retarget = campaigns_pb2.Audience(retarget=campaigns_pb2.RetargetSelection(source=source.name, action="delivered"))
    assert (await update(shared_world, draft.name, audience=retarget)).root == source.name
    assert (await update(shared_world, draft.name, audience=EVERYBODY)).root == ""


async def test_deleted_draft_is_gone(shared_world: World) -> None:
    draft = await create(shared_world, "short-lived")
    request = campaigns_pb2.DeleteCampaignRequest(name=draft.name, etag=draft.etag)
    await shared_world.client.campaigns.DeleteCampaign(request)
    assert (await refuse(shared_world.get_campaign(draft.name))).reason == "RESOURCE_NOT_FOUND"
    assert (await refuse(shared_world.client.campaigns.DeleteCampaign(request))).reason == "RESOURCE_NOT_FOUND"
    assert (await create(shared_world, "short-lived")).name == draft.name


# Launches


async def test_launched_campaign_can_no_longer_be_changed(shared_world: World) -> None:
    draft = await shared_world.create_campaign("sms")
    await shared_world.launch(draft.name)
    client = shared_world.client.campaigns
    for call, required in (
        (update(shared_world, draft.name, display_name="x"), "DRAFT"),
        (client.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=draft.name)), "DRAFT"),
        (launch(shared_world, draft.name), "DRAFT"),
        (launch(shared_world, draft.name, validate_only=True), "DRAFT"),
        (client.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=draft.name)), "PAUSED"),
    ):
        refusal = await refuse(call)
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "CAMPAIGN_STATE_WRONG")
        assert refusal.metadata == {"campaign": draft.name, "state": "SENT", "required_state": required}


@pytest.mark.parametrize("validate_only", [False, True])
async def test_launch_needs_content_an_audience_and_somebody_in_it(shared_world: World, validate_only: bool) -> None:
    content = to_struct(CONTENT["sms"])
    for fields, code, reason in [
        ({"audience": EVERYBODY}, "FAILED_PRECONDITION", "CONTENT_MISSING"),
        ({"content": content}, "INVALID_ARGUMENT", "FIELDS_INVALID"),
        ({"content": content, "audience": give("apps/acme/contacts/nobody")}, "FAILED_PRECONDITION", "AUDIENCE_EMPTY"),
    ]:
        draft = await create(shared_world, **fields)
        refusal = await refuse(launch(shared_world, draft.name, validate_only=validate_only))
        assert (refusal.code, refusal.reason) == (code, reason)
        if code == "FAILED_PRECONDITION":
            assert refusal.metadata == {"campaign": draft.name}
        assert await shared_world.get_campaign(draft.name) == draft


async def test_launch_validated_only_counts_and_changes_nothing(shared_world: World) -> None:
    draft = await shared_world.create_campaign("push")
    sent_before = len(shared_world.sandbox.truth.entries)
    checked = await launch(shared_world, draft.name, validate_only=True)
    people = [person for person in shared_world.sandbox.population if "push" in person.channels]
    assert (checked.state, checked.counts.recipients) == (State.DRAFT, len(people))
    assert await shared_world.get_campaign(draft.name) == draft
    assert len(shared_world.sandbox.truth.entries) == sent_before


async def test_launch_goes_to_the_given_contacts_that_exist_and_can_be_reached(shared_world: World) -> None:
    people = list(shared_world.sandbox.population)
    reached = [person.external_id for person in people if "sms" in person.channels][:3]
    silent = next(person.external_id for person in people if "sms" not in person.channels)
    names = [shared_world.client.name("contacts", name) for name in [*reached, "unknown", silent, reached[0]]]
    draft = await shared_world.create_campaign("sms", give(*names))
    assert list(draft.audience.given_contacts.contacts) == names[:-1]
    await shared_world.launch(draft.name)
    assert set(await shared_world.read_recipients(draft.name)) == set(reached)
    assert (await shared_world.get_campaign(draft.name)).counts.recipients == 3


async def test_launch_on_a_channel_that_is_not_configured_is_refused(open_world: OpenWorld) -> None:
    async with open_world() as world:
        await world.import_people()
        draft = await world.create_campaign("sms")
        # What a server without the setting has: the type, and no channel of it.
        obstacle = "AFTERTOUCH_SMS_AUTH_TOKEN is missing"
        del world.core.registry.channels["sms"]  # type: ignore[attr-defined]
        world.core.registry.obstacles["sms"] = [obstacle]  # type: ignore[index]
        refusal = await refuse(launch(world, draft.name))
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "CHANNEL_NOT_READY")
        assert refusal.metadata == {"channel": "sms", "problems": obstacle}


# Recipients


async def test_recipients_are_listed_page_by_page_in_one_order(shared_world: World) -> None:
    draft = await shared_world.create_campaign("whatsapp")
    await shared_world.launch(draft.name)
    everybody = list(await shared_world.read_recipients(draft.name))
    for size in (1, 7, len(everybody), len(everybody) + 1):
        seen, token = [], ""
        while True:
            request = campaigns_pb2.ListRecipientsRequest(parent=draft.name, page_size=size, page_token=token)
            page = await shared_world.client.campaigns.ListRecipients(request)
            seen += [recipient.contact.rpartition("/")[2] for recipient in page.recipients]
            token = page.next_page_token
            if not token:
                break
        assert seen == everybody
    request = contacts_pb2.ListContactsRequest(parent="apps/acme", page_size=1000)
    listed = await shared_world.client.contacts.ListContacts(request)
    order = [contact.external_id for contact in listed.contacts]
    assert everybody == [external_id for external_id in order if external_id in set(everybody)]


async def test_recipients_of_a_draft_are_nobody(shared_world: World) -> None:
    draft = await shared_world.create_campaign("sms")
    assert await shared_world.read_recipients(draft.name) == {}


async def test_counts_are_those_of_the_recipients(shared_world: World) -> None:
    for channel in ("sms", "whatsapp", "push"):
        draft = await shared_world.create_campaign(channel)
        await shared_world.launch(draft.name)
        counts = (await shared_world.get_campaign(draft.name)).counts
        recipients = list((await shared_world.read_recipients(draft.name)).values())
        signals = {signal for recipient in recipients for signal in recipient.signals}
        assert counts.recipients == len(recipients)
        assert dict(counts.signals) == {s: sum(s in recipient.signals for recipient in recipients) for s in signals}
        reasons = [reason for recipient in recipients for reason in recipient.reasons]
        assert {f"{r.reason_class}/{r.reason_code}": r.count for r in counts.reasons} == {r: reasons.count(r) for r in reasons}
        assert [r.count for r in counts.reasons] == sorted((r.count for r in counts.reasons), reverse=True)
        tried = [set(recipient.signals) for recipient in recipients]
        assert counts.unclear == sum("attempted" in s and not s & {"sent", "failed"} for s in tried)
