"""Chains: who is held out, follow-ups as a rule, and what a chain reports and explains."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import text, update

from aftertouch.retargeting import settling
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings
from aftertouch.store.engine import transaction
from aftertouch.store.tables import apps, campaigns
from aftertouch.v1 import campaigns_pb2, contacts_pb2, retargeting_pb2
from tests.api.test_retargeting import hold_back
from tests.fix_database import clone_database
from tests.fix_world import CONTENT, World, run_world
from tests.refusals import refuse

State = campaigns_pb2.Campaign.State
Reason = retargeting_pb2.PreviewRetargetResponse.Reason
Decision = contacts_pb2.ContactExplanation.Decision


@pytest.fixture(scope="module")
async def shared_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world with a WhatsApp campaign that was sent to everybody whom it reaches."""
    async with clone_database(postgres_url, template) as url, run_world(url, SandboxSettings(size=150, time_scale=0.02)) as world:
        await world.import_people()
        draft = await create(world, "whatsapp", "root")
        await world.launch(draft.name)
        yield world


async def create(world: World, channel: str, campaign_id: str = "", **fields: Any) -> Any:
    everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
    values = {"display_name": "Summer Sale", "channel": channel, "content": to_struct(CONTENT[channel]), "audience": everybody}
    request = campaigns_pb2.CreateCampaignRequest(
        parent="apps/acme", campaign=campaigns_pb2.Campaign(**{**values, **fields}), campaign_id=campaign_id
    )
    return await world.client.campaigns.CreateCampaign(request)


def select(source: str, action: str) -> campaigns_pb2.RetargetSelection:
    return campaigns_pb2.RetargetSelection(source=source, action=action)


async def draft_wave(world: World, source: str, action: str, channel: str, **fields: Any) -> Any:
    request = retargeting_pb2.CreateRetargetRequest(
        selection=select(source, action), channel=channel, allow_duplicate=True, **fields
    )
    wave = await world.client.retargeting.CreateRetarget(request)
    return await change(world, wave.name, content=to_struct(CONTENT[channel]))


async def change(world: World, name: str, *paths: str, **fields: Any) -> Any:
    mask = FieldMask(paths=paths)
    request = campaigns_pb2.UpdateCampaignRequest(campaign=campaigns_pb2.Campaign(name=name, **fields), update_mask=mask)
    return await world.client.campaigns.UpdateCampaign(request)


async def launch(world: World, name: str, **fields: Any) -> Any:
    return await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name, **fields))


async def preview(world: World, source: str, action: str, channel: str, percent: int) -> Any:
    request = retargeting_pb2.PreviewRetargetRequest(selection=select(source, action), channel=channel, holdout_percent=percent)
    return await world.client.retargeting.PreviewRetarget(request)


async def list_people(world: World, source: str, action: str, channel: str, percent: int, reason: str = "") -> set[str]:
    request = retargeting_pb2.ListRetargetContactsRequest(
        selection=select(source, action), channel=channel, holdout_percent=percent
    )
    if reason:
        request.group, request.reason = retargeting_pb2.ListRetargetContactsRequest.DROPPED, Reason.Value(reason)
    pages = [page async for page in world.client.retargeting.ListRetargetContacts(request)]
    return {contact.rpartition("/")[2] for page in pages for contact in page.contacts}


async def report(world: World, name: str) -> retargeting_pb2.ChainReport:
    return await world.client.retargeting.GetChainReport(retargeting_pb2.GetChainReportRequest(name=name))


async def explain_chain(world: World, person: str, campaign: str) -> contacts_pb2.ContactExplanation:
    request = contacts_pb2.ExplainContactRequest(name=f"apps/acme/contacts/{person}", chain=campaign)
    return await world.client.contacts.ExplainContact(request)


def count_drop(shown: Any, reason: str) -> int:
    return sum(drop.count for drop in shown.drops if drop.reason == Reason.Value(reason))


# Holdout


async def test_holdout_is_left_out_and_adds_up(shared_world: World) -> None:
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    everybody = await list_people(shared_world, root.name, "read", "whatsapp", 0)
    held_out = await list_people(shared_world, root.name, "read", "whatsapp", 30, "HELD_OUT")
    others = await list_people(shared_world, root.name, "read", "whatsapp", 30)
    assert held_out
    assert others == everybody - held_out
    shown = await preview(shared_world, root.name, "read", "whatsapp", 30)
    assert count_drop(shown, "HELD_OUT") == len(held_out)
    assert shown.matched_count - sum(drop.count for drop in shown.drops) == shown.audience_count == len(others)
    wave = await draft_wave(shared_world, root.name, "read", "whatsapp", holdout_percent=30)
    checked = await shared_world.client.campaigns.LaunchCampaign(
        campaigns_pb2.LaunchCampaignRequest(name=wave.name, validate_only=True)
    )
    assert (checked.counts.recipients, checked.holdout_count) == (len(others), len(held_out))
    await shared_world.launch(wave.name)
    assert set(await shared_world.read_recipients(wave.name)) == others
    sent = await shared_world.get_campaign(wave.name)
    assert (sent.holdout_percent, sent.holdout_count, sent.counts.recipients) == (30, len(held_out), len(others))


async def test_who_was_held_out_once_is_held_out_of_later_waves_of_the_chain(shared_world: World) -> None:
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    held_out = await list_people(shared_world, root.name, "read", "whatsapp", 30, "HELD_OUT")
    assert not await list_people(shared_world, root.name, "read", "whatsapp", 0, "HELD_OUT")
    wave = await draft_wave(shared_world, root.name, "read", "whatsapp", holdout_percent=30)
    await shared_world.launch(wave.name)
    assert await list_people(shared_world, root.name, "read", "whatsapp", 0, "HELD_OUT") == held_out
    later = await draft_wave(shared_world, root.name, "read", "whatsapp")
    await shared_world.launch(later.name)
    assert not held_out & set(await shared_world.read_recipients(later.name))
    assert (await shared_world.get_campaign(later.name)).holdout_count == len(held_out)


async def test_frozen_audience_is_held_out_of_at_the_launch(shared_world: World) -> None:
    creation = campaigns_pb2.Audience.AT_CREATION
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    wave = await draft_wave(shared_world, root.name, "read", "whatsapp", holdout_percent=30, evaluation=creation)
    frozen = set(await shared_world.read_recipients(wave.name))
    held_out = await list_people(shared_world, root.name, "read", "whatsapp", 30, "HELD_OUT")
    assert held_out < frozen
    await shared_world.launch(wave.name)
    assert set(await shared_world.read_recipients(wave.name)) == frozen - held_out
    sent = await shared_world.get_campaign(wave.name)
    assert (sent.audience.frozen.count, sent.holdout_count) == (len(frozen), len(held_out))


async def test_root_campaign_can_hold_out_too(shared_world: World) -> None:
    root = await create(shared_world, "sms", holdout_percent=40)
    await shared_world.launch(root.name)
    sent = await shared_world.get_campaign(root.name)
    people = {person.external_id for person in shared_world.sandbox.population if "sms" in person.channels}
    assert sent.holdout_count > 0
    assert sent.holdout_count + sent.counts.recipients == len(people)
    held_out = people - set(await shared_world.read_recipients(root.name))
    explained = await explain_chain(shared_world, min(held_out), root.name)
    assert explained.decision == Decision.HELD_OUT
    assert "was held out" in explained.text
    (comparison,) = (await report(shared_world, root.name)).comparisons
    assert (comparison.recipients, comparison.holdout_count) == (sent.counts.recipients, len(held_out))
    for found in comparison.differences:
        assert found.holdout_count == 0
        assert found.difference == found.recipient_count / comparison.recipients
        assert found.lower_bound < found.difference <= found.upper_bound


@pytest.mark.parametrize("percent", [-1, 91])
async def test_holdout_is_bounded(shared_world: World, percent: int) -> None:
    root = "apps/acme/campaigns/root"
    assert list((await refuse(create(shared_world, "sms", holdout_percent=percent))).fields) == ["campaign.holdout_percent"]
    refusal = await refuse(draft_wave(shared_world, root, "read", "sms", holdout_percent=percent))
    assert list(refusal.fields) == ["holdout_percent"]
    assert list((await refuse(preview(shared_world, root, "read", "sms", percent))).fields) == ["holdout_percent"]


# Follow-ups


def make_step(action: str, channel: str, seconds: int = 0, **fields: Any) -> retargeting_pb2.FollowUpStep:
    step = retargeting_pb2.FollowUpStep(
        selection=campaigns_pb2.RetargetSelection(action=action), channel=channel, content=to_struct(CONTENT[channel])
    )
    step.delay.seconds = seconds
    step.MergeFrom(retargeting_pb2.FollowUpStep(**fields))
    return step


async def follow_up(world: World, source: str, *steps: retargeting_pb2.FollowUpStep, **fields: Any) -> list[Any]:
    request = retargeting_pb2.CreateFollowUpsRequest(source=source, steps=steps, **fields)
    return list((await world.client.retargeting.CreateFollowUps(request)).campaigns)


async def wait_for(world: World, name: str, *states: int) -> Any:
    async with asyncio.timeout(240):
        while (campaign := await world.get_campaign(name)).state not in states:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return campaign


async def test_follow_ups_made_before_the_launch_go_out_one_after_the_other(shared_world: World) -> None:
    # Whoever was sent to is known when a campaign is sent, however slowly receipts come.
    root = await create(shared_world, "sms")
    first, second = await follow_up(
        shared_world, root.name, make_step("sent", "push"), make_step("sent", "sms", display_name="Last")
    )
    assert [wave.state for wave in (first, second)] == [State.SCHEDULED, State.SCHEDULED]
    assert [wave.root for wave in (first, second)] == [root.name, root.name]
    assert [wave.follow_up.source for wave in (first, second)] == [root.name, first.name]
    assert [wave.display_name for wave in (first, second)] == ["Retarget: Summer Sale (sent)", "Last"]
    assert not first.HasField("schedule_time")
    assert first.audience.retarget == select(root.name, "sent")
    await shared_world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=root.name))
    sent = await wait_for(shared_world, root.name, State.SENT)
    followed = await wait_for(shared_world, first.name, State.SENT)
    assert followed.schedule_time == sent.finish_time
    assert followed.launch_time.ToDatetime() >= sent.finish_time.ToDatetime()
    last = await wait_for(shared_world, second.name, State.SENT)
    people = set(await shared_world.read_recipients(last.name))
    assert people
    assert people <= set(await shared_world.read_recipients(first.name)) <= set(await shared_world.read_recipients(root.name))


async def test_follow_up_waits_as_long_as_was_said_and_can_be_changed_until_then(shared_world: World) -> None:
    (waiting,) = await follow_up(shared_world, "apps/acme/campaigns/root", make_step("read", "sms", 86_400))
    root = await shared_world.get_campaign("apps/acme/campaigns/root")
    assert waiting.schedule_time.ToDatetime() == root.finish_time.ToDatetime() + timedelta(days=1)
    assert waiting.follow_up.delay.seconds == 86_400
    changed = await change(shared_world, waiting.name, content=to_struct({"body": "Other"}), holdout_percent=20)
    assert (changed.content["body"], changed.holdout_percent, changed.state) == ("Other", 20, State.SCHEDULED)
    assert changed.follow_up == waiting.follow_up
    draft = await shared_world.client.campaigns.UnscheduleCampaign(campaigns_pb2.UnscheduleCampaignRequest(name=waiting.name))
    assert draft.state == State.DRAFT
    assert not draft.HasField("follow_up")
    assert not draft.HasField("schedule_time")


async def test_follow_up_with_nobody_is_skipped_and_so_is_the_one_after_it(shared_world: World) -> None:
    root = await create(shared_world, "sms")
    await shared_world.launch(root.name)
    everybody = await shared_world.read_recipients(root.name)
    person = min(everybody)
    narrow = await create(
        shared_world,
        "sms",
        audience=campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=[f"apps/acme/contacts/{person}"])),
    )
    await shared_world.launch(narrow.name)
    delivered = "delivered" in (await shared_world.read_recipients(narrow.name))[person].signals
    nobody = "not_delivered" if delivered else "delivered"
    first, second = await follow_up(shared_world, narrow.name, make_step(nobody, "sms"), make_step("sent", "sms"))
    first = await wait_for(shared_world, first.name, State.CANCELED)
    assert first.state_reason == f"skipped: nobody of the audience of {first.name} can be reached on its channel"
    second = await wait_for(shared_world, second.name, State.CANCELED)
    assert second.state_reason == f"skipped: its source {first.name.rpartition('/')[2]} is CANCELED"
    explained = await explain_chain(shared_world, person, narrow.name)
    assert [wave.campaign for wave in explained.waves] == [first.name, second.name]
    assert "skipped" in explained.waves[0].text


async def test_follow_ups_of_what_is_deleted_or_canceled_are_skipped(shared_world: World) -> None:
    deleted = await create(shared_world, "sms")
    (orphan,) = await follow_up(shared_world, deleted.name, make_step("sent", "sms"))
    await shared_world.client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=deleted.name))
    assert (await wait_for(shared_world, orphan.name, State.CANCELED)).state_reason == "skipped: its source was deleted"
    waiting = await follow_up(
        shared_world, "apps/acme/campaigns/root", make_step("read", "sms", 3600), make_step("sent", "sms", 3600)
    )
    await shared_world.client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=waiting[0].name))
    assert (await wait_for(shared_world, waiting[1].name, State.CANCELED)).state_reason.startswith("skipped: its source")
    refusal = await refuse(follow_up(shared_world, waiting[0].name, make_step("sent", "sms")))
    assert (refusal.reason, refusal.metadata["state"]) == ("CAMPAIGN_STATE_WRONG", "CANCELED")


def wait_seconds(seconds: int, nanos: int = 0) -> campaigns_pb2.FollowUp:
    return campaigns_pb2.FollowUp(delay=Duration(seconds=seconds, nanos=nanos))


async def test_follow_up_gets_another_delay_and_another_action_until_its_time(shared_world: World) -> None:
    root = await shared_world.get_campaign("apps/acme/campaigns/root")
    (waiting,) = await follow_up(shared_world, root.name, make_step("not_read", "sms", 86_400))
    changed = await change(shared_world, waiting.name, "follow_up.delay", follow_up=wait_seconds(7 * 86_400))
    assert changed.schedule_time.ToDatetime() == root.finish_time.ToDatetime() + timedelta(days=7)
    assert (changed.follow_up.delay.seconds, changed.state) == (7 * 86_400, State.SCHEDULED)
    assert changed.audience == waiting.audience
    readers = campaigns_pb2.Audience(retarget=select(root.name, "read"))
    changed = await change(shared_world, waiting.name, audience=readers)
    assert (changed.audience.retarget.action, changed.root, changed.state) == ("read", root.name, State.SCHEDULED)
    assert changed.follow_up.delay.seconds == 7 * 86_400
    etag = changed.etag
    sooner = await change(shared_world, waiting.name, etag=etag, follow_up=wait_seconds(0))
    assert sooner.schedule_time == root.finish_time
    assert (await refuse(change(shared_world, waiting.name, etag=etag, follow_up=wait_seconds(60)))).reason == "ETAG_MISMATCH"
    await wait_for(shared_world, waiting.name, State.SENT)
    people = await shared_world.read_recipients(root.name)
    assert set(await shared_world.read_recipients(waiting.name)) <= {
        name for name, person in people.items() if "read" in person.signals
    }
    for late in ({"follow_up": wait_seconds(60)}, {"audience": readers}):
        assert (await refuse(change(shared_world, waiting.name, **late))).reason == "CAMPAIGN_STATE_WRONG"


async def test_follow_up_of_what_is_not_launched_yet_can_be_changed_too(shared_world: World) -> None:
    root = await create(shared_world, "sms")
    (waiting,) = await follow_up(shared_world, root.name, make_step("delivered", "push", 86_400))
    audience = campaigns_pb2.Audience(retarget=select(root.name, "sent"))
    changed = await change(shared_world, waiting.name, audience=audience, follow_up=wait_seconds(0))
    assert (changed.audience.retarget.action, changed.follow_up.delay.seconds) == ("sent", 0)
    assert not changed.HasField("schedule_time")
    frozen = campaigns_pb2.Audience(retarget=select(root.name, "sent"), evaluation=campaigns_pb2.Audience.AT_CREATION)
    assert (await refuse(change(shared_world, waiting.name, audience=frozen))).reason == "SOURCE_NOT_SENT"
    await launch(shared_world, root.name)
    sent = await wait_for(shared_world, root.name, State.SENT)
    followed = await wait_for(shared_world, waiting.name, State.SENT)
    assert followed.schedule_time == sent.finish_time
    assert followed.counts.recipients


async def test_change_of_a_follow_up_is_refused_with_the_field_and_the_way_out(shared_world: World) -> None:
    root, other = await shared_world.get_campaign("apps/acme/campaigns/root"), await create(shared_world, "sms")
    await shared_world.launch(other.name)
    (waiting,) = await follow_up(shared_world, root.name, make_step("read", "sms", 86_400))
    both = campaigns_pb2.RetargetSelection()
    both.any_of.selections.extend([select(root.name, "read"), select(other.name, "sent")])
    for audience in (
        campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers()),
        campaigns_pb2.Audience(retarget=select(other.name, "sent")),
        campaigns_pb2.Audience(retarget=select(other.name, "sent"), evaluation=campaigns_pb2.Audience.AT_CREATION),
        campaigns_pb2.Audience(retarget=both),
        None,
    ):
        refusal = await refuse(change(shared_world, waiting.name, "audience", audience=audience))
        assert list(refusal.fields) == ["campaign.audience"]
        assert root.name in refusal.fields["campaign.audience"]
        assert "UnscheduleCampaign" in refusal.fields["campaign.audience"]
    unknown = campaigns_pb2.Audience(retarget=select(root.name, "clapped"))
    refusal = await refuse(change(shared_world, waiting.name, audience=unknown))
    assert list(refusal.fields) == ["campaign.audience.retarget.action"]
    for rule in (wait_seconds(-1), wait_seconds(1, 1), wait_seconds(31 * 86_400), wait_seconds(1 << 60), None):
        refusal = await refuse(change(shared_world, waiting.name, "follow_up", follow_up=rule))
        assert list(refusal.fields) == ["campaign.follow_up.delay"]
    assert (await refuse(change(shared_world, waiting.name, "content"))).reason == "CONTENT_MISSING"
    last = await change(shared_world, waiting.name, "follow_up.source", "content", content=to_struct({"body": "Other"}))
    assert last.follow_up == waiting.follow_up
    assert (await refuse(change(shared_world, waiting.name, follow_up=wait_seconds(30 * 86_400)))).reason == "SCHEDULE_TOO_LATE"
    draft = await draft_wave(shared_world, root.name, "read", "sms")
    refusal = await refuse(change(shared_world, draft.name, follow_up=wait_seconds(60)))
    assert list(refusal.fields) == ["campaign.follow_up.delay"]
    assert (await change(shared_world, draft.name, "*", display_name="Other", audience=draft.audience)).state == State.DRAFT


async def test_change_of_a_follow_up_meets_its_launch(shared_world: World) -> None:
    """Whoever is launching it has its lock; the change waits, and is refused as of any launched campaign."""
    (waiting,) = await follow_up(shared_world, "apps/acme/campaigns/root", make_step("read", "sms", 86_400))
    async with transaction(shared_world.core.engine) as conn:
        launched = campaigns.c.campaign == waiting.name.rpartition("/")[2]
        await conn.execute(update(campaigns).where(launched).values(state="SENDING"))
        changing = asyncio.create_task(refuse(change(shared_world, waiting.name, follow_up=wait_seconds(60))))
        await wait_until_blocked(shared_world)
    assert (await changing).reason == "CAMPAIGN_STATE_WRONG"


async def wait_until_blocked(world: World) -> None:
    """Wait until somebody waits for a lock."""
    blocked = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()")
    async with asyncio.timeout(60), world.core.engine.connect() as conn:
        while not (await conn.execute(blocked)).scalar_one():
            await conn.rollback()
            await asyncio.sleep(0.05)


async def test_draft_that_is_launched_with_a_delay_waits_until_its_source_is_sent(shared_world: World) -> None:
    root = await create(shared_world, "sms", messages_per_second=1)
    await launch(shared_world, root.name)
    await shared_world.client.campaigns.PauseCampaign(campaigns_pb2.PauseCampaignRequest(name=root.name))
    draft = await draft_wave(shared_world, root.name, "sent", "push")
    checked = await launch(shared_world, draft.name, delay=Duration(seconds=3600), validate_only=True)
    assert (checked.state, checked.HasField("follow_up")) == (State.DRAFT, False)
    waiting = await launch(shared_world, draft.name, delay=Duration(seconds=3600))
    assert (waiting.state, waiting.HasField("schedule_time")) == (State.SCHEDULED, False)
    assert waiting.follow_up == campaigns_pb2.FollowUp(source=root.name, delay=Duration(seconds=3600))
    await change(shared_world, waiting.name, follow_up=wait_seconds(0))
    await change(shared_world, root.name, "messages_per_second")
    await shared_world.client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=root.name))
    sent = await wait_for(shared_world, root.name, State.SENT)
    followed = await wait_for(shared_world, waiting.name, State.SENT)
    assert followed.schedule_time == sent.finish_time
    assert followed.counts.recipients


async def test_follow_up_that_became_a_draft_waits_again_before_its_source_is_launched(
    shared_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settling, "FEWEST_EVENTS", 1 << 30)
    root = await create(shared_world, "whatsapp")
    (waiting,) = await follow_up(shared_world, root.name, make_step("not_read", "sms", 86_400))
    await shared_world.client.campaigns.UnscheduleCampaign(campaigns_pb2.UnscheduleCampaignRequest(name=waiting.name))
    assert (await refuse(launch(shared_world, waiting.name))).reason == "SOURCE_NOT_SENT"
    checked = await launch(shared_world, waiting.name, delay=Duration(seconds=60), validate_only=True)
    assert (checked.state, checked.counts.recipients) == (State.DRAFT, 0)
    again = await launch(shared_world, waiting.name, delay=Duration(seconds=60))
    assert (again.state, again.follow_up.source, again.follow_up.delay.seconds) == (State.SCHEDULED, root.name, 60)
    assert [(found.source, found.signal) for found in again.unsettled] == [(root.name, "read")]


async def test_launch_with_a_delay_that_is_over_is_a_launch_now(shared_world: World) -> None:
    wave = await draft_wave(shared_world, "apps/acme/campaigns/root", "read", "push")
    launched = await launch(shared_world, wave.name, delay=Duration())
    assert (launched.state, launched.HasField("follow_up")) == (State.SENDING, False)


async def test_launch_with_a_delay_is_refused_at_the_delay(shared_world: World) -> None:
    root, other = "apps/acme/campaigns/root", await create(shared_world, "sms")
    wave = await draft_wave(shared_world, root, "read", "sms")
    soon, day = Timestamp(), Duration(seconds=86_400)
    soon.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    for fields, field in [
        ({"delay": day, "schedule_time": soon}, "delay"),
        ({"delay": day, "send_by_time": soon}, "send_by_time"),
        ({"delay": Duration(seconds=31 * 86_400)}, "delay"),
        ({"delay": Duration(seconds=-1)}, "delay"),
        ({"delay": Duration(seconds=1 << 60)}, "delay"),
        ({"delay": Duration(seconds=1, nanos=1)}, "delay"),
    ]:
        assert list((await refuse(launch(shared_world, wave.name, **fields))).fields) == [field]
    assert (await refuse(launch(shared_world, wave.name, delay=Duration(seconds=30 * 86_400)))).reason == "SCHEDULE_TOO_LATE"
    assert list((await refuse(launch(shared_world, other.name, delay=day))).fields) == ["delay"]
    refusal = await refuse(launch(shared_world, wave.name, delay=day, send_by_time=soon, validate_only=True))
    assert list(refusal.fields) == ["send_by_time"]
    soon.FromDatetime(datetime.now(UTC) + timedelta(days=3))
    waiting = await launch(shared_world, wave.name, delay=day, send_by_time=soon)
    refusal = await refuse(change(shared_world, waiting.name, follow_up=wait_seconds(4 * 86_400)))
    assert list(refusal.fields) == ["campaign.follow_up.delay"]
    canceled = await create(shared_world, "sms", messages_per_second=1)
    await launch(shared_world, canceled.name)
    await shared_world.client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=canceled.name))
    wave = await draft_wave(shared_world, canceled.name, "sent", "push")
    refusal = await refuse(launch(shared_world, wave.name, delay=day))
    assert (refusal.reason, refusal.metadata["campaign"]) == ("CAMPAIGN_STATE_WRONG", canceled.name)


async def test_follow_ups_are_all_made_or_none(shared_world: World) -> None:
    source = "apps/acme/campaigns/root"
    good = make_step("read", "sms", 3600, campaign_id="never-made")
    unknown = make_step("sent", "sms")
    unknown.channel = "fax"
    for bad, field in [
        (make_step("read", "sms"), "steps[1].selection.action"),
        (unknown, "steps[1].channel"),
        (make_step("sent", "sms", 31 * 86_400), "steps[1].delay"),
        (make_step("sent", "sms", -1), "steps[1].delay"),
        (make_step("sent", "sms", 1 << 60), "steps[1].delay"),
        (make_step("sent", "sms", selection=campaigns_pb2.RetargetSelection(source=source)), "steps[1].selection.source"),
        (make_step("", "sms"), "steps[1].selection.action"),
        (make_step("sent", "sms", content=to_struct({"body": "{{ x | nonsense }}"})), "steps[1].content.body"),
    ]:
        assert list((await refuse(follow_up(shared_world, source, good, bad))).fields) == [field]
    half = make_step("sent", "sms")
    half.delay.nanos = 1
    assert list((await refuse(follow_up(shared_world, source, half))).fields) == ["steps[0].delay"]
    for steps in ([], [good] * 11):
        assert list((await refuse(follow_up(shared_world, source, *steps))).fields) == ["steps"]
    assert (await refuse(shared_world.get_campaign("apps/acme/campaigns/never-made"))).reason == "RESOURCE_NOT_FOUND"


async def test_follow_ups_are_made_once_by_one_request_id(shared_world: World) -> None:
    fields = {"request_id": "5f4c2ad0-9c2b-4f7e-9d0e-5c3b1f4e2a11"}
    step = make_step("read", "push", 3600)
    answers = [await follow_up(shared_world, "apps/acme/campaigns/root", step, **fields) for _ in range(2)]
    assert answers[0] == answers[1]


async def test_follow_up_that_waits_for_less_than_its_signal_takes_is_told(
    shared_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A day is assumed, however many events other tests have brought.
    monkeypatch.setattr(settling, "FEWEST_EVENTS", 1 << 30)
    draft = await create(shared_world, "whatsapp")
    steps = [make_step("not_read", "sms", 3600), make_step("not_delivered", "sms", 86_400), make_step("delivered", "push", 60)]
    made = await follow_up(shared_world, draft.name, *steps)
    assert [[(found.source, found.signal) for found in wave.unsettled] for wave in made] == [[(draft.name, "read")], [], []]
    refusal = await refuse(follow_up(shared_world, draft.name, steps[0], require_settled=True))
    assert (refusal.reason, refusal.metadata["signal"]) == ("SELECTION_UNSETTLED", "read")
    patient = make_step("not_read", "sms", 86_400 + 60)
    (settled,) = await follow_up(shared_world, draft.name, patient, require_settled=True)
    assert not settled.unsettled


# The schedule


async def test_wave_cannot_be_scheduled_later_than_the_events_of_its_source_are_kept(shared_world: World) -> None:
    root = await shared_world.get_campaign("apps/acme/campaigns/root")
    wave = await draft_wave(shared_world, root.name, "read", "sms")
    last_time = root.launch_time.ToDatetime(tzinfo=UTC) + timedelta(days=30)
    for validate_only in (True, False):
        request = campaigns_pb2.LaunchCampaignRequest(name=wave.name, validate_only=validate_only)
        request.schedule_time.FromDatetime(last_time + timedelta(seconds=1))
        refusal = await refuse(shared_world.client.campaigns.LaunchCampaign(request))
        assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "SCHEDULE_TOO_LATE")
        assert refusal.metadata["last_time"] == f"{last_time:%Y-%m-%dT%H:%M:%SZ}"
        assert refusal.metadata["campaign"] == root.name
    request.schedule_time.FromDatetime(last_time)
    scheduled = await shared_world.client.campaigns.LaunchCampaign(request)
    assert scheduled.schedule_time.ToDatetime(tzinfo=UTC) == last_time
    refusal = await refuse(follow_up(shared_world, root.name, make_step("read", "sms", 30 * 86_400)))
    assert refusal.reason == "SCHEDULE_TOO_LATE"


# Reports


async def test_report_counts_everybody_once_and_says_what_each_wave_added(shared_world: World) -> None:
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    first = await draft_wave(shared_world, root.name, "read", "whatsapp", holdout_percent=30)
    await shared_world.launch(first.name)
    second = await draft_wave(shared_world, first.name, "not_read", "push")
    await shared_world.launch(second.name)
    draft = await draft_wave(shared_world, root.name, "failed", "sms")
    rolls = [await shared_world.read_recipients(campaign.name) for campaign in (root, first, second)]
    shown = await report(shared_world, second.name)
    assert shown.root == root.name
    assert [link.campaign for link in shown.campaigns] == [root.name, first.name, second.name, draft.name]
    assert [list(link.sources) for link in shown.campaigns] == [[], [root.name], [first.name], [root.name]]
    assert (await report(shared_world, root.name)).people == shown.people
    reached = {"delivered", "confirmed"}

    def find(roll: Any, signals: set[str]) -> set[str]:
        return {name for name, person in roll.items() if signals & set(person.signals)}

    every = {signal for roll in rolls for person in roll.values() for signal in person.signals}
    so_far: dict[str, set[str]] = {}
    for link, roll in zip(shown.campaigns, [*rolls, {}], strict=True):
        measures = {signal: find(roll, {signal}) for signal in every}
        assert dict(link.people.signals) == {signal: len(who) for signal, who in measures.items() if who}
        assert (link.people.recipients, link.people.reached) == (len(roll), len(find(roll, reached)))
        measures |= {"on a roll": set(roll), "was reached": find(roll, reached)}
        added = {measure: who - so_far.get(measure, set()) for measure, who in measures.items()}
        assert link.added.recipients == len(added.pop("on a roll"))
        assert link.added.reached == len(added.pop("was reached"))
        assert dict(link.added.signals) == {signal: len(who) for signal, who in added.items() if who}
        so_far = {measure: so_far.get(measure, set()) | who for measure, who in measures.items()}
    assert shown.people.recipients == len(so_far["on a roll"]) == len(rolls[0])
    assert shown.people.reached == len(so_far["was reached"])
    assert dict(shown.people.signals) == {signal: len(so_far[signal]) for signal in every}


async def test_report_of_a_draft_alone_is_empty_and_of_nothing_is_refused(shared_world: World) -> None:
    draft = await create(shared_world, "sms")
    shown = await report(shared_world, draft.name)
    assert [link.campaign for link in shown.campaigns] == [shown.root] == [draft.name]
    assert not shown.people.recipients
    assert not shown.comparisons
    assert (await refuse(report(shared_world, "apps/acme/campaigns/nothing"))).reason == "RESOURCE_NOT_FOUND"
    assert (await refuse(report(shared_world, "apps/other/campaigns/root"))).reason == "RESOURCE_NOT_FOUND"


async def test_report_of_a_chain_that_is_too_long_is_refused(shared_world: World) -> None:
    root = await create(shared_world, "sms")
    await shared_world.launch(root.name)
    async with transaction(shared_world.core.engine) as conn:
        found = await conn.execute(campaigns.select().where(campaigns.c.campaign == root.name.rpartition("/")[2]))
        root_id, app_id = found.one()[:2]
        await conn.execute(
            campaigns.insert(),
            [
                {"app_id": app_id, "campaign": f"many-{index}", "display_name": "x", "channel": "sms", "state": "DRAFT"}
                | {"root_id": root_id}
                for index in range(200)
            ],
        )
    refusal = await refuse(report(shared_world, root.name))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "CHAIN_TOO_LONG")
    assert refusal.metadata == {"campaign": root.name, "limit": "200"}
    assert (await refuse(explain_chain(shared_world, "person-1", root.name))).reason in ("CHAIN_TOO_LONG", "RESOURCE_NOT_FOUND")
    async with transaction(shared_world.core.engine) as conn:
        await conn.execute(campaigns.delete().where(campaigns.c.root_id == root_id))


# Explanations


async def test_person_on_another_wave_that_is_still_being_sent_is_told(shared_world: World) -> None:
    """Now, and ever after: at the launch of the one they were a recipient of the other."""
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    slow = await draft_wave(shared_world, root.name, "read", "push")
    await change(shared_world, slow.name, messages_per_second=1)
    await hold_back(shared_world, slow.name)
    wave = await draft_wave(shared_world, root.name, "not_replied", "push")
    launch = shared_world.client.campaigns.LaunchCampaign
    await launch(campaigns_pb2.LaunchCampaignRequest(name=slow.name))
    *_, person = await shared_world.read_recipients(slow.name)

    async def explain() -> tuple[int, list[str], str]:
        request = contacts_pb2.ExplainContactRequest(name=f"apps/acme/contacts/{person}", campaign=wave.name)
        told = await shared_world.client.contacts.ExplainContact(request)
        checks = contacts_pb2.ContactExplanation.Check
        return told.decision, [checks.Name(step.check) for step in told.steps if not step.passed], told.text

    other = f"a recipient of {slow.name.rpartition('/')[2]}, another wave of the chain that"
    said = f"Would not be messaged now: is {other} is still being sent."
    assert await explain() == (Decision.WOULD_NOT_BE_MESSAGED, ["NOT_IN_OPEN_WAVE"], said)
    await launch(campaigns_pb2.LaunchCampaignRequest(name=wave.name))
    await shared_world.client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=slow.name))
    decision, missed, text = await explain()
    assert (decision, missed) == (Decision.NOT_IN_AUDIENCE, ["NOT_IN_OPEN_WAVE"])
    assert text.endswith(f"was {other} was still being sent.")


async def test_explanation_of_a_chain_follows_the_person_through_every_wave(shared_world: World) -> None:
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    held_out = await list_people(shared_world, root.name, "read", "whatsapp", 30, "HELD_OUT")
    wave = await draft_wave(shared_world, root.name, "read", "whatsapp", holdout_percent=30)
    (waiting,) = await follow_up(shared_world, wave.name, make_step("not_read", "sms", 3600))
    told = await explain_chain(shared_world, min(held_out), root.name)
    assert [found.campaign for found in (told, *told.waves)] == [root.name, wave.name, waiting.name]
    assert [found.decision for found in (told, *told.waves)] == [
        Decision.MESSAGED,
        Decision.WOULD_NOT_BE_MESSAGED,
        Decision.WOULD_NOT_BE_MESSAGED,
    ]
    assert "read" in told.signals
    assert "is held out of the chain" in told.waves[0].text
    assert [step.check for step in told.waves[0].steps if not step.passed] == [contacts_pb2.ContactExplanation.Check.NOT_HELD_OUT]
    await shared_world.launch(wave.name)
    told = await explain_chain(shared_world, min(held_out), wave.name)
    assert [found.decision for found in (told, *told.waves)][:2] == [Decision.MESSAGED, Decision.HELD_OUT]
    messaged = min(await shared_world.read_recipients(wave.name))
    told = await explain_chain(shared_world, messaged, wave.name)
    assert told.waves[0].decision != Decision.HELD_OUT
    assert told.waves[0].events


@pytest.mark.parametrize(
    ("lost", "cause"), [("channel", "channels/whatsapp does not exist"), ("action", "whatsapp has no action 'read'")]
)
async def test_wave_that_can_ask_nothing_any_more_leaves_the_rest_of_the_chain_explained(
    shared_world: World, monkeypatch: pytest.MonkeyPatch, lost: str, cause: str
) -> None:
    """A draft over a plugin that was removed had the whole chain answered NOT_FOUND."""
    root = await create(shared_world, "whatsapp")
    await shared_world.launch(root.name)
    wave = await draft_wave(shared_world, root.name, "read", "sms")
    types = shared_world.core.registry.types
    if lost == "channel":
        monkeypatch.delitem(types, "whatsapp")  # type: ignore[arg-type]
    else:
        monkeypatch.delitem(types["whatsapp"].actions, "read")  # type: ignore[arg-type]
    told = await explain_chain(shared_world, min(await shared_world.read_recipients(root.name)), root.name)
    assert told.decision != Decision.WOULD_NOT_BE_MESSAGED
    (waiting,) = told.waves
    assert (waiting.campaign, waiting.decision) == (wave.name, Decision.WOULD_NOT_BE_MESSAGED)
    assert cause in waiting.text


async def test_erased_person_stays_in_the_totals_of_a_report(shared_world: World) -> None:
    root = await create(shared_world, "whatsapp", holdout_percent=50)
    await shared_world.launch(root.name)
    people = {person.external_id for person in shared_world.sandbox.population if "whatsapp" in person.channels}
    recipients = set(await shared_world.read_recipients(root.name))
    before = await report(shared_world, root.name)
    for name in (max(recipients), max(people - recipients)):
        await shared_world.client.contacts.EraseContact(contacts_pb2.EraseContactRequest(name=f"apps/acme/contacts/{name}"))
    after = await report(shared_world, root.name)
    assert (after.people, list(after.comparisons)) == (before.people, list(before.comparisons))


async def age(world: World, name: str, by: timedelta) -> None:
    """Have a campaign be sent so long ago."""
    async with transaction(world.core.engine) as conn:
        times = {"launch_time": datetime.now(UTC) - by, "finish_time": datetime.now(UTC) - by}
        await conn.execute(update(campaigns).where(campaigns.c.campaign == name.rpartition("/")[2]).values(**times))


async def test_follow_up_of_what_was_sent_long_ago_is_refused_or_goes_out_at_once(shared_world: World) -> None:
    root = await create(shared_world, "sms")
    await shared_world.launch(root.name)
    async with transaction(shared_world.core.engine) as conn:
        await conn.execute(update(apps).values(retargetable_since="2020-01-01"))
    await age(shared_world, root.name, timedelta(days=2))
    (wave,) = await follow_up(shared_world, root.name, make_step("sent", "sms", 3600))
    await wait_for(shared_world, wave.name, State.SENT)
    await age(shared_world, root.name, timedelta(days=31))
    refusal = await refuse(follow_up(shared_world, root.name, make_step("sent", "sms", 3600)))
    assert refusal.reason == "SOURCE_TOO_OLD"
