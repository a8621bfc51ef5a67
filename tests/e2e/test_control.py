"""Pausing, resuming, canceling and scheduling against a worker that sends meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Accepted, Outcome, Receipt, Refused, Unclear, Webhook
from aftertouch.delivery import launch, leftovers, sender
from aftertouch.delivery.control import stop_sending
from aftertouch.plugins import Registry
from aftertouch.rpc.values import to_timestamp
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, read_campaign
from aftertouch.store.engine import transaction
from aftertouch.v1 import apps_pb2, campaigns_pb2, contacts_pb2
from tests.e2e.pigeons import Loft, Messages, PigeonChannel, accept_all, open_loft
from tests.fix_database import clone_database
from tests.fix_world import World, run_world
from tests.refusals import read_refusal, refuse

State = campaigns_pb2.Campaign.State
RACES = 1_000
"""Pauses and cancels that are answered while a campaign is being sent."""


@pytest.fixture(scope="module")
async def world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world with a worker."""
    async with (
        clone_database(postgres_url, template) as url,
        run_world(url, extra=[PigeonChannel], allowed=frozenset({"pigeon"}), send_units=2) as world,
    ):
        yield world


@pytest.fixture
async def loft(world: World) -> AsyncIterator[Loft]:
    async with open_loft(world, PigeonChannel) as loft:
        yield loft


async def pause(loft: Loft, name: str) -> campaigns_pb2.Campaign:
    return await loft.client.campaigns.PauseCampaign(campaigns_pb2.PauseCampaignRequest(name=name))


async def resume(loft: Loft, name: str) -> campaigns_pb2.Campaign:
    return await loft.client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=name))


async def cancel(loft: Loft, name: str) -> campaigns_pb2.Campaign:
    return await loft.client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=name))


async def wait_for(loft: Loft, name: str, *states: State) -> campaigns_pb2.Campaign:
    """Watch the campaign until it is in one of these states and nothing of it is left."""
    async for campaign in loft.client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=name)):
        if campaign.state in states and (campaign.state not in (State.SENT, State.CANCELED)):
            return campaign
    return await loft.get_campaign(name)


@pytest.mark.timeout(900)  # seconds on a machine of one's own
async def test_no_send_begins_after_a_thousand_answers_and_nobody_is_messaged_twice(loft: Loft) -> None:
    chance = random.Random(11)
    begun: Counter[str] = Counter()
    answered: Counter[str] = Counter()
    names: list[str] = []

    async def fly(messages: Messages) -> Sequence[Outcome]:
        begun.update({message.content.text for message in messages})  # type: ignore[attr-defined]
        await asyncio.sleep(chance.uniform(0, 0.004))
        return [Accepted() for _ in messages]

    loft.channel.script = fly
    people = 250
    await loft.import_people(people)

    async def hold_up(note: str, name: str) -> None:
        """Pause and resume a campaign until it is over, or canceled."""
        while True:
            await asyncio.sleep(chance.uniform(0, 0.01))
            ask = cancel if chance.random() < 0.1 else pause
            try:
                await ask(loft, name)
            except grpc.aio.AioRpcError as error:
                if read_refusal(error).reason != "CAMPAIGN_STATE_WRONG":
                    raise
                return
            calls = begun[note]
            await asyncio.sleep(chance.uniform(0, 0.01))
            assert begun[note] == calls, "a send began after the answer"
            answered[ask.__name__] += 1
            if ask is cancel:
                return
            await resume(loft, name)

    async def race(racer: int) -> None:
        for count in itertools.count():
            if answered.total() >= RACES:
                return
            note = f"c{racer}-{count}"
            names.append(await loft.relaunch(note))
            await hold_up(note, names[-1])

    await asyncio.gather(*(race(racer) for racer in range(8)))
    assert min(answered["pause"], 10 * answered["cancel"]) > RACES / 2
    for name in names:
        campaign = await wait_for(loft, name, State.SENT)
        assert campaign.counts.unclear == 0
        assert campaign.counts.signals["sent"] + campaign.counts.signals["skipped"] == people
        assert campaign.state == State.CANCELED or campaign.counts.signals["sent"] == people
    assert set(loft.channel.copies.values()) == {1}


async def test_no_send_begins_after_the_answer_to_a_cancel_and_the_rest_is_skipped(loft: Loft) -> None:
    begun = asyncio.Event()

    async def fly(messages: Messages) -> Sequence[Outcome]:
        begun.set()
        # All of them take a while, or the cancel could come too late to prove anything.
        await asyncio.sleep(0.5)
        return [Accepted() for _ in messages]

    loft.channel.script = fly
    name = await loft.launch(400)
    await begun.wait()
    canceled = await cancel(loft, name)
    copies = len(loft.channel.handed)
    assert canceled.state == State.CANCELED
    over = await wait_for(loft, name, State.CANCELED)
    assert len(loft.channel.handed) == copies
    assert over.counts.signals["sent"] == copies
    assert over.counts.signals["skipped"] == 400 - copies
    assert [(r.reason_class, r.reason_code) for r in over.counts.reasons] == [("policy", "canceled")]
    assert (await cancel(loft, name)).state == State.CANCELED
    assert (await refuse(resume(loft, name))).reason == "CAMPAIGN_STATE_WRONG"


async def test_pause_waits_for_the_call_that_had_begun(loft: Loft) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def hang(messages: Messages) -> Sequence[Outcome]:
        reached.set()
        await go_on.wait()
        return [Accepted() for _ in messages]

    loft.channel.script = hang
    name = await loft.launch(2)
    await reached.wait()
    pausing = asyncio.create_task(pause(loft, name))
    again = asyncio.create_task(pause(loft, name))
    async with asyncio.timeout(60):
        while (await loft.get_campaign(name)).state != State.PAUSED:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    _, waiting = await asyncio.wait([pausing, again], timeout=0.5)
    assert waiting == {pausing, again}
    go_on.set()
    assert {(await pausing).state, (await again).state} == {State.PAUSED}
    loft.channel.script = accept_all
    await resume(loft, name)
    campaign = await wait_for(loft, name, State.SENT)
    assert (campaign.state, set(loft.channel.copies.values())) == (State.SENT, {1})


async def test_failures_in_a_row_pause_a_campaign_but_people_who_are_gone_do_not(loft: Loft) -> None:
    async def refuse_content(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="too_heavy") for _ in messages]

    async def nobody_home(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="no_tree") for _ in messages]

    loft.channel.script = refuse_content
    name = await loft.launch(400)
    paused = await wait_for(loft, name, State.PAUSED)
    assert paused.state == State.PAUSED
    assert "messages in a row failed" in paused.state_reason
    assert len(loft.channel.handed) < 200
    await cancel(loft, name)
    loft.channel.script = nobody_home
    name = await loft.relaunch()
    assert (await wait_for(loft, name, State.SENT)).counts.signals["failed"] == 400


async def test_silent_provider_leaves_few_people_unclear(loft: Loft) -> None:
    async def stay_away(messages: Messages) -> Sequence[Outcome]:
        return [Unclear(detail="silence") for _ in messages]

    loft.channel.script = stay_away
    name = await loft.launch(400)
    async with asyncio.timeout(60):
        while not loft.channel.handed:  # noqa: ASYNC110 - the channel wakes nobody
            await asyncio.sleep(0.02)
    await asyncio.sleep(3)
    loft.channel.script = accept_all
    unclear = len(loft.channel.handed)
    assert unclear < 50
    campaign = await wait_for(loft, name, State.SENT)
    assert (campaign.counts.unclear, campaign.counts.signals["sent"]) == (unclear, 400 - unclear)
    assert "failed" not in campaign.counts.signals


async def test_campaign_keeps_to_its_own_pace(loft: Loft) -> None:
    times: list[float] = []

    async def note(messages: Messages) -> Sequence[Outcome]:
        times.extend([asyncio.get_running_loop().time()] * len(messages))
        return [Accepted() for _ in messages]

    loft.channel.script = note
    await loft.import_people(40)
    began = asyncio.get_running_loop().time()
    name = await loft.relaunch(messages_per_second=20)
    campaign = await wait_for(loft, name, State.SENT)
    assert campaign.counts.signals["sent"] == 40
    # However late a machine is, nobody leaves too early: the first four at once, and each of the others a twentieth later.
    assert all(time >= began + (count - 4) / 20 for count, time in enumerate(sorted(times)))


async def test_slow_campaigns_leave_room_for_others_of_their_channel(loft: Loft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "TURN_SECONDS", 0.5)
    slow = [await loft.launch(300, messages_per_second=1)] + [await loft.relaunch(messages_per_second=1) for _ in range(3)]
    async with asyncio.timeout(200):
        for name in slow:
            async for campaign in loft.client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=name)):
                if campaign.counts.signals["sent"]:
                    break
        # More of them than the worker has places.
        quick = await wait_for(loft, await loft.relaunch(), State.SENT)
    assert quick.counts.signals["sent"] == 300
    assert {(await loft.get_campaign(name)).state for name in slow} == {State.SENDING}
    for name in slow:
        await cancel(loft, name)
    assert set(loft.channel.copies.values()) == {1}


async def test_campaign_that_was_resumed_is_not_paused_by_what_a_call_before_tells(loft: Loft) -> None:
    await set_policy(loft, quiet_hours=make_quiet(timedelta(hours=-1), timedelta(hours=10)))
    name = await loft.launch(1)
    core = loft.world.core

    async def read() -> Campaign:
        async with transaction(core.engine) as conn:
            newest = text("SELECT campaign_id FROM campaigns ORDER BY campaign_id DESC LIMIT 1")
            found = await read_campaign(conn, (await conn.execute(newest)).scalar_one())
        assert found is not None
        return found

    before = await read()
    await pause(loft, name)
    await resume(loft, name)
    await stop_sending(core.engine, before, "the token had expired")
    assert (await loft.get_campaign(name)).state == State.SENDING
    await stop_sending(core.engine, await read(), "the token has expired")
    assert (await loft.get_campaign(name)).state == State.PAUSED
    await cancel(loft, name)


# Scheduling


async def schedule(loft: Loft, people: int, delay: timedelta, **fields: Any) -> str:
    name = await loft.draft(people)
    await loft.client.campaigns.LaunchCampaign(
        campaigns_pb2.LaunchCampaignRequest(name=name, schedule_time=to_timestamp(datetime.now(UTC) + delay), **fields)
    )
    return name


async def move(loft: Loft, delay: timedelta) -> None:
    """Bring all scheduled times forward, as if the server had been away meanwhile."""
    async with transaction(loft.world.core.engine) as conn:
        moved = "schedule_time = schedule_time - :delay, send_by_time = send_by_time - :delay"
        await conn.execute(text(f"UPDATE campaigns SET {moved} WHERE state = 'SCHEDULED'"), {"delay": delay})


async def test_scheduled_campaign_is_launched_at_its_time_to_whoever_is_there_then(loft: Loft) -> None:
    name = await schedule(loft, 3, timedelta(hours=3))
    scheduled = await loft.get_campaign(name)
    assert (scheduled.state, scheduled.HasField("counts"), scheduled.HasField("launch_time")) == (State.SCHEDULED, False, False)
    await asyncio.sleep(1.2)
    assert not loft.channel.handed
    await loft.import_people(5)
    await move(loft, timedelta(hours=3))
    campaign = await wait_for(loft, name, State.SENT)
    assert (campaign.state, campaign.counts.recipients, campaign.counts.signals["sent"]) == (State.SENT, 5, 5)


async def test_server_that_was_away_for_hours_does_not_send_what_is_past_its_deadline(loft: Loft) -> None:
    name = await schedule(loft, 3, timedelta(hours=1), send_by_time=to_timestamp(datetime.now(UTC) + timedelta(hours=2)))
    await move(loft, timedelta(hours=3))
    campaign = await wait_for(loft, name, State.FAILED)
    assert (campaign.state, campaign.counts.recipients) == (State.FAILED, 0)
    assert "was to be sent by a time" in campaign.state_reason
    assert not loft.channel.handed


async def test_deadline_in_the_middle_of_sending_skips_the_rest(loft: Loft) -> None:
    # Slow enough that the deadline comes in the middle, however late that is.
    name = await loft.draft(40, messages_per_second=1)
    send_by_time = to_timestamp(datetime.now(UTC) + timedelta(hours=1))
    await loft.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name, send_by_time=send_by_time))
    async with asyncio.timeout(120):
        async for campaign in loft.client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=name)):
            if campaign.counts.signals["sent"]:
                break
    async with transaction(loft.world.core.engine) as conn:
        await conn.execute(text("UPDATE campaigns SET send_by_time = now() WHERE send_by_time > now() AND state = 'SENDING'"))
    campaign = await wait_for(loft, name, State.SENT)
    sent, skipped = campaign.counts.signals["sent"], campaign.counts.signals["skipped"]
    assert (campaign.state, sent + skipped, sent) == (State.SENT, 40, len(loft.channel.handed))
    assert 0 < sent < 40
    assert [(r.reason_class, r.reason_code) for r in campaign.counts.reasons] == [("policy", "send_by_time")]


async def test_unscheduled_campaign_is_a_draft_again(loft: Loft) -> None:
    name = await schedule(loft, 1, timedelta(hours=1))
    unscheduled = await loft.client.campaigns.UnscheduleCampaign(campaigns_pb2.UnscheduleCampaignRequest(name=name))
    assert (unscheduled.state, unscheduled.HasField("schedule_time")) == (State.DRAFT, False)
    again = campaigns_pb2.UnscheduleCampaignRequest(name=name)
    assert (await refuse(loft.client.campaigns.UnscheduleCampaign(again))).reason == "CAMPAIGN_STATE_WRONG"


async def test_campaign_that_meets_a_defect_at_its_time_holds_up_no_other(loft: Loft, monkeypatch: pytest.MonkeyPatch) -> None:
    async def prepare(conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign, *args: Any) -> launch.People:
        if campaign.campaign == broken.rpartition("/")[2]:
            raise KeyError("a defect")
        return await prepares(conn, registry, app, campaign, *args)

    prepares = launch.prepare_launch
    broken = await schedule(loft, 2, timedelta(hours=1))
    name = await schedule(loft, 2, timedelta(hours=2))
    monkeypatch.setattr(launch, "prepare_launch", prepare)
    await move(loft, timedelta(hours=3))
    assert (await wait_for(loft, name, State.SENT)).counts.signals["sent"] == 2
    failed = await loft.get_campaign(broken)
    assert (failed.state, "a defect of ours" in failed.state_reason) == (State.FAILED, True)


async def test_canceled_before_its_time_is_never_launched(loft: Loft) -> None:
    name = await schedule(loft, 1, timedelta(hours=1))
    assert (await cancel(loft, name)).state == State.CANCELED
    await move(loft, timedelta(hours=2))
    await asyncio.sleep(1.2)
    assert (await loft.get_campaign(name)).state == State.CANCELED
    assert not loft.channel.handed


async def test_scheduled_campaign_that_cannot_be_launched_says_why(loft: Loft) -> None:
    name = await schedule(loft, 1, timedelta(hours=1))
    await loft.opt_out("p0")
    await move(loft, timedelta(hours=1))
    campaign = await wait_for(loft, name, State.FAILED)
    assert campaign.state == State.FAILED
    assert "nobody of the audience" in campaign.state_reason


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"schedule_time": timedelta(seconds=-5)}, "schedule_time"),
        ({"schedule_time": timedelta(days=400)}, "schedule_time"),
        ({"send_by_time": timedelta(seconds=-5)}, "send_by_time"),
        ({"schedule_time": timedelta(hours=2), "send_by_time": timedelta(hours=1)}, "send_by_time"),
    ],
)
async def test_launch_at_an_impossible_time_is_refused(loft: Loft, fields: dict[str, timedelta], field: str) -> None:
    name = await loft.draft(1)
    times = {key: to_timestamp(datetime.now(UTC) + delay) for key, delay in fields.items()}
    request = campaigns_pb2.LaunchCampaignRequest(name=name, **times)  # type: ignore[arg-type]
    assert list((await refuse(loft.client.campaigns.LaunchCampaign(request))).fields) == [field]
    assert (await loft.get_campaign(name)).state == State.DRAFT


async def test_pace_can_be_changed_while_paused_and_nothing_else(loft: Loft) -> None:
    name = await schedule(loft, 1, timedelta(hours=1))
    update = loft.client.campaigns.UpdateCampaign
    faster = campaigns_pb2.Campaign(name=name, messages_per_second=7, display_name="Other")
    request = campaigns_pb2.UpdateCampaignRequest(campaign=faster, update_mask=FieldMask(paths=["messages_per_second"]))
    assert (await update(request)).messages_per_second == 7
    request.update_mask.paths.append("display_name")
    assert (await refuse(update(request))).reason == "CAMPAIGN_STATE_WRONG"


# Quiet hours and the frequency cap


async def set_policy(loft: Loft, **fields: Any) -> apps_pb2.App:
    app = apps_pb2.App(name=loft.client.parent, **fields)
    mask = FieldMask(paths=["quiet_hours", "frequency_cap"])
    return await loft.client.apps.UpdateApp(apps_pb2.UpdateAppRequest(app=app, update_mask=mask))


def make_quiet(begin: timedelta, end: timedelta) -> apps_pb2.QuietHours:
    now = datetime.now(UTC)
    return apps_pb2.QuietHours(start=f"{now + begin:%H:%M}", end=f"{now + end:%H:%M}")


async def test_people_in_quiet_hours_are_left_alone_until_they_end(loft: Loft) -> None:
    await set_policy(loft, quiet_hours=make_quiet(timedelta(hours=-1), timedelta(hours=1)))
    # It is noon there when it is midnight here.
    far = "Pacific/Auckland"
    name = await loft.launch(4, time_zones={"p1": far, "p2": far})
    async with asyncio.timeout(120):
        async for campaign in loft.client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=name)):
            if campaign.counts.signals["sent"] == 2:
                break
    assert {tree.partition("-")[0] for tree, _ in loft.channel.copies} == {"p1", "p2"}
    assert (await loft.get_campaign(name)).state == State.SENDING
    await set_policy(loft)
    await pause(loft, name)
    await resume(loft, name)
    campaign = await wait_for(loft, name, State.SENT)
    assert (campaign.counts.signals["sent"], set(loft.channel.copies.values())) == (4, {1})


async def test_cancel_waits_for_no_quiet_hours(loft: Loft) -> None:
    await set_policy(loft, quiet_hours=make_quiet(timedelta(hours=-1), timedelta(hours=10)))
    name = await loft.launch(4)
    async with asyncio.timeout(120):
        # Nobody can go: the unit rests until the morning.
        while not await find_rest(loft):  # noqa: ASYNC110 - there is nothing to wait on but the next look
            await asyncio.sleep(0.02)
    await loft.client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=name))
    async with asyncio.timeout(120):
        async for campaign in loft.client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=name)):
            counts = campaign.counts
    assert [(r.reason_class, r.reason_code, r.count) for r in counts.reasons] == [("policy", "canceled", 4)]


async def find_rest(loft: Loft) -> bool:
    """True when a unit waits for more than an hour."""
    async with transaction(loft.world.core.engine) as conn:
        statement = text("SELECT count(*) FROM send_units WHERE ready_time > now() + interval '1 hour'")
        return bool((await conn.execute(statement)).scalar_one())


async def test_campaign_that_is_paused_while_its_last_unit_is_given_up_is_over(
    loft: Loft, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without units it could only be resumed into a campaign that is being sent for ever."""
    is_claimed, may_go_on = asyncio.Event(), asyncio.Event()

    async def close_later(*args: Any) -> None:
        is_claimed.set()
        await may_go_on.wait()
        await close(*args)

    close = leftovers._close
    monkeypatch.setattr(leftovers, "_close", close_later)
    await set_policy(loft, quiet_hours=make_quiet(timedelta(hours=-1), timedelta(hours=10)))
    name = await loft.launch(2)
    async with transaction(loft.world.core.engine) as conn:
        await conn.execute(text("UPDATE campaigns SET send_by_time = now()"))
    await is_claimed.wait()
    pausing = asyncio.ensure_future(pause(loft, name))
    async with asyncio.timeout(120):
        while (await loft.get_campaign(name)).state != State.PAUSED:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    may_go_on.set()
    await pausing
    campaign = await wait_for(loft, name, State.SENT)
    assert [(r.reason_class, r.reason_code, r.count) for r in campaign.counts.reasons] == [("policy", "send_by_time", 2)]


async def test_people_whose_quiet_hours_outlast_the_deadline_are_skipped(loft: Loft) -> None:
    await set_policy(loft, quiet_hours=make_quiet(timedelta(hours=-1), timedelta(hours=2)))
    name = await loft.draft(2)
    await loft.client.campaigns.LaunchCampaign(
        campaigns_pb2.LaunchCampaignRequest(name=name, send_by_time=to_timestamp(datetime.now(UTC) + timedelta(hours=1)))
    )
    campaign = await wait_for(loft, name, State.SENT)
    assert [(r.reason_class, r.reason_code, r.count) for r in campaign.counts.reasons] == [("policy", "quiet_hours", 2)]
    assert not loft.channel.handed


async def test_transactional_campaign_goes_out_in_quiet_hours_and_over_the_cap(loft: Loft) -> None:
    quiet = make_quiet(timedelta(hours=-1), timedelta(hours=1))
    await set_policy(loft, quiet_hours=quiet, frequency_cap=apps_pb2.FrequencyCap(messages=1, hours=24))
    for name in [await loft.launch(2, transactional=True), await loft.relaunch(transactional=True)]:
        assert (await wait_for(loft, name, State.SENT)).counts.signals["sent"] == 2


async def test_nobody_gets_more_than_the_cap_from_campaigns_at_once(loft: Loft) -> None:
    await set_policy(loft, frequency_cap=apps_pb2.FrequencyCap(messages=2, hours=1))
    names = [await loft.launch(50)] + [await loft.relaunch() for _ in range(4)]
    campaigns = [await wait_for(loft, name, State.SENT) for name in names]
    assert sum(campaign.counts.signals["sent"] for campaign in campaigns) == 100
    by_person = Counter(tree for tree, _ in loft.channel.copies.elements())
    assert set(by_person.values()) == {2}
    reasons = {(r.signal, r.reason_class, r.reason_code) for campaign in campaigns for r in campaign.counts.reasons}
    assert reasons == {("skipped", "policy", "frequency_cap")}
    async with transaction(loft.world.core.engine) as conn:
        await conn.execute(text("UPDATE contact_paces SET recent = ARRAY[recent[1] - interval '1 hour', recent[2]]"))
    assert (await wait_for(loft, await loft.relaunch(), State.SENT)).counts.signals["sent"] == 50
    assert (await wait_for(loft, await loft.relaunch(), State.SENT)).counts.signals["skipped"] == 50


async def test_retries_count_once_against_the_cap(loft: Loft) -> None:
    await set_policy(loft, frequency_cap=apps_pb2.FrequencyCap(messages=1, hours=1))
    refused: set[str] = set()

    async def refuse_first(messages: Messages) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        for message in messages:
            outcomes.append(Accepted() if message.token in refused else Refused(code="storm"))
            refused.add(message.token)
        return outcomes

    loft.channel.script = refuse_first
    assert (await wait_for(loft, await loft.launch(3), State.SENT)).counts.signals["sent"] == 3


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"quiet_hours": apps_pb2.QuietHours(start="22:00", end="22:00")}, "app.quiet_hours.end"),
        ({"quiet_hours": apps_pb2.QuietHours(start="24:00", end="08:00")}, "app.quiet_hours.start"),
        (
            {"quiet_hours": apps_pb2.QuietHours(start="22:00", end="08:00", default_time_zone="Mars/Base")},
            "app.quiet_hours.default_time_zone",
        ),
        ({"frequency_cap": apps_pb2.FrequencyCap(messages=0, hours=1)}, "app.frequency_cap.messages"),
        ({"frequency_cap": apps_pb2.FrequencyCap(messages=1, hours=721)}, "app.frequency_cap.hours"),
    ],
)
async def test_impossible_policy_is_refused(loft: Loft, fields: dict[str, Any], field: str) -> None:
    assert list((await refuse(set_policy(loft, **fields))).fields) == [field]


async def test_whoever_does_it_after_the_launch_is_not_sent_to(loft: Loft) -> None:
    source = await loft.launch(30)
    await wait_for(loft, source, State.SENT)
    tokens = [message.token for message in loft.channel.handed]
    selection = campaigns_pb2.RetargetSelection(source=source, action="not_delivered")
    # Slow enough that most are left when it is reported of all.
    wave = await loft.create(messages_per_second=1, audience=campaigns_pb2.Audience(retarget=selection))
    await loft.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=wave))
    async with asyncio.timeout(120):
        async for campaign in loft.client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=wave)):
            if campaign.counts.signals["sent"]:
                break
    receipts = tuple(Receipt(signal="delivered", token=token) for token in tokens)
    await loft.world.core.ledger.ingest_webhooks("pigeon", [Webhook(receipts=receipts)])
    over = await wait_for(loft, wave, State.SENT)
    sent = over.counts.signals["sent"]
    assert 0 < sent < 30
    assert [(r.reason_class, r.reason_code, r.count) for r in over.counts.reasons] == [("policy", "converted", 30 - sent)]


# Test sends


async def send_test(loft: Loft, name: str, person: str, **fields: Any) -> campaigns_pb2.SendTestResponse:
    contact = f"{loft.client.parent}/contacts/{person}"
    return await loft.client.campaigns.SendTest(campaigns_pb2.SendTestRequest(name=name, contact=contact, **fields))


def wait_before_accepting(loft: Loft, message_id: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Have the provider say when it is asked, and answer when it may."""
    is_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def answer(messages: Messages) -> Sequence[Outcome]:
        is_asked.set()
        await may_answer.wait()
        return [Accepted(message_id=message_id)]

    loft.channel.script = answer
    return is_asked, may_answer


async def test_test_send_reaches_one_contact_and_counts_nowhere(loft: Loft) -> None:
    name = await loft.draft(2, note="Hi {{ first_name | default: 'you' }}")

    async def answer(messages: Messages) -> Sequence[Outcome]:
        return [Accepted(message_id="m1")]

    loft.channel.script = answer
    response = await send_test(loft, name, "p1")
    (outcome,) = response.outcomes
    assert (outcome.result, outcome.message_id) == (campaigns_pb2.SendTestResponse.ACCEPTED, "m1")
    assert response.content["text"] == "Hi you"
    assert [message.address.tree for message in loft.channel.handed] == ["p1-0"]
    assert (await loft.get_campaign(name)).state == State.DRAFT
    loft.channel.script = accept_all
    await loft.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
    assert (await wait_for(loft, name, State.SENT)).counts.signals["sent"] == 2


async def test_test_send_says_what_the_provider_said(loft: Loft) -> None:
    name = await loft.draft(1)

    async def answer(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="no_tree")]

    loft.channel.script = answer
    (outcome,) = (await send_test(loft, name, "p0")).outcomes
    assert (outcome.result, outcome.reason_class, outcome.reason_code) == (
        campaigns_pb2.SendTestResponse.REFUSED,
        "recipient_gone",
        "no_tree",
    )


async def test_test_send_by_a_channel_with_an_outcome_of_its_own_is_answered(loft: Loft) -> None:
    class Landed(Accepted):
        """What some channel says more of."""

    async def answer(messages: Messages) -> Sequence[Outcome]:
        return [Landed(message_id="m1")]

    loft.channel.script = answer
    (outcome,) = (await send_test(loft, await loft.draft(1), "p0")).outcomes
    assert (outcome.result, outcome.message_id) == (campaigns_pb2.SendTestResponse.ACCEPTED, "m1")


async def test_test_send_holds_no_connection_while_the_provider_is_waited_for(loft: Loft) -> None:
    name = await loft.draft(1)
    is_asked, may_answer = wait_before_accepting(loft, "late")
    sending = asyncio.ensure_future(send_test(loft, name, "p0"))
    await is_asked.wait()
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'")
    async with loft.world.core.engine.connect() as conn:
        assert (await conn.execute(statement)).scalar_one() == 0
    may_answer.set()
    (outcome,) = (await sending).outcomes
    assert outcome.message_id == "late"


async def test_test_send_to_somebody_who_is_erased_meanwhile_leaves_no_trace(loft: Loft) -> None:
    """It was recorded with the hash of the address, and the provider's id, as long as the log is kept."""
    name = await loft.draft(1)

    async def answer(messages: Messages) -> Sequence[Outcome]:
        await loft.client.contacts.EraseContact(contacts_pb2.EraseContactRequest(name=loft.client.name("contacts", "p0")))
        return [Accepted(message_id="late")]

    loft.channel.script = answer
    await send_test(loft, name, "p0")
    statement = "SELECT address_hash, message_id FROM attempts JOIN campaigns ON campaign_id = slot >> 20 WHERE campaign = :id"
    async with transaction(loft.world.core.engine) as conn:
        (attempt,) = await conn.execute(text(statement), {"id": name.rpartition("/")[2]})
    assert tuple(attempt) == (b"", "")


async def test_test_send_with_an_id_is_sent_once_however_often_it_is_asked_for(loft: Loft) -> None:
    name, request_id = await loft.draft(1), str(uuid.uuid4())
    is_asked, may_answer = wait_before_accepting(loft, "once")
    calls = [asyncio.ensure_future(send_test(loft, name, "p0", request_id=request_id)) for _ in range(12)]
    await is_asked.wait()
    # Those that wait take up few of the connections.
    await asyncio.gather(*(loft.get_campaign(name) for _ in range(30)))
    may_answer.set()
    answers = [*(await asyncio.gather(*calls)), await send_test(loft, name, "p0", request_id=request_id)]
    assert {answered.outcomes[0].message_id for answered in answers} == {"once"}
    assert len(loft.channel.handed) == 1


async def test_test_send_to_nobody_is_refused(loft: Loft) -> None:
    name = await loft.draft(2, note="Hi {{ first_name }}")
    assert (await refuse(send_test(loft, name, "p9"))).reason == "RESOURCE_NOT_FOUND"
    assert "contact" in (await refuse(send_test(loft, name, "p0"))).fields
    await loft.opt_out("p1")
    assert "contact" in (await refuse(send_test(loft, name, "p1"))).fields
    assert not loft.channel.handed
