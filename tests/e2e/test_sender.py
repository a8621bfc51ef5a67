"""The send loop against crashes, takeovers and bad channels, one unit at a time and without a worker in the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from typing import Any, cast

import pytest

from aftertouch.channels import Accepted, Outcome, Receipt, Refused, Unclear, Webhook
from aftertouch.delivery import calls, pace
from aftertouch.delivery import sender as sending
from aftertouch.delivery.outcomes import MOST_TRIES
from aftertouch.delivery.pace import Pacer, name_limit
from aftertouch.store.engine import transaction
from aftertouch.store.paces import hold_limits
from aftertouch.store.units import LeaseLost
from aftertouch.v1 import campaigns_pb2, contacts_pb2
from tests.e2e.pigeons import HomingChannel, Loft, Messages, PigeonChannel, WoodsChannel, accept_all, open_loft
from tests.fix_database import clone_database
from tests.fix_world import World, run_world

SENT = campaigns_pb2.Campaign.State.SENT
_State = contacts_pb2.Subscription.State
_Explanation = contacts_pb2.ContactExplanation


@pytest.fixture(scope="module")
async def world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world in which nobody sends but the tests."""
    async with (
        clone_database(postgres_url, template) as url,
        run_world(url, extra=[PigeonChannel, HomingChannel, WoodsChannel], send_units=0) as world,
    ):
        yield world


@pytest.fixture(params=[PigeonChannel, HomingChannel], ids=["pigeon", "homing"])
async def loft(request: pytest.FixtureRequest, world: World) -> AsyncIterator[Loft]:
    async with open_loft(world, request.param) as loft:
        yield loft


@pytest.fixture
async def pigeons(world: World) -> AsyncIterator[Loft]:
    async with open_loft(world, PigeonChannel) as loft:
        yield loft


@pytest.fixture
async def woods(world: World) -> AsyncIterator[Loft]:
    async with open_loft(world, WoodsChannel) as loft:
        loft.channel.woods = {}
        yield loft


async def test_crash_during_a_call_sends_again_only_what_is_idempotent(loft: Loft) -> None:
    name = await loft.launch(4)
    reached = asyncio.Event()

    async def hang(messages: Messages) -> Sequence[Outcome]:
        reached.set()
        return await asyncio.get_running_loop().create_future()

    loft.channel.script = hang
    crashing = asyncio.create_task(loft.make_sender(await loft.claim()).run())
    await reached.wait()
    crashing.cancel()
    await asyncio.gather(crashing, return_exceptions=True)
    loft.channel.script = accept_all
    await loft.pass_time()
    await loft.send()
    copies = loft.channel.copies
    is_idempotent = loft.channel.capabilities.idempotent_sends
    assert list(copies.values()) == [2 if is_idempotent else 1] * 4
    campaign = await loft.get_campaign(name)
    assert campaign.state == SENT
    assert campaign.counts.unclear == (0 if is_idempotent else 4)
    assert campaign.counts.signals["sent"] == (4 if is_idempotent else 0)


async def test_try_that_was_cut_off_is_told_by_its_event(loft: Loft) -> None:
    """The log of attempts has no row of it, and the explanation spoke of the second try only."""
    name = await loft.launch(1)
    reached = asyncio.Event()

    async def hang(messages: Messages) -> Sequence[Outcome]:
        reached.set()
        return await asyncio.get_running_loop().create_future()

    async def explain() -> contacts_pb2.ContactExplanation:
        person = loft.client.name("contacts", "p0")
        return await loft.client.contacts.ExplainContact(contacts_pb2.ExplainContactRequest(name=person, campaign=name))

    loft.channel.script = hang
    crashing = asyncio.create_task(loft.make_sender(await loft.claim()).run())
    await reached.wait()
    crashing.cancel()
    await asyncio.gather(crashing, return_exceptions=True)
    said = await explain()
    (begun,) = said.events
    told = f"{begun.time.ToDatetime():%Y-%m-%d %H:%M:%S} UTC"
    assert (said.decision, begun.signal, begun.reason, len(said.attempts)) == (_Explanation.UNCLEAR, "attempted", "1", 0)
    assert f"try 1 began at {told}, and its outcome is not on record: it is under way, or was cut off" in said.text
    loft.channel.script = accept_all
    await loft.pass_time()
    await loft.send()
    said = await explain()
    if loft.channel.capabilities.idempotent_sends:
        assert (said.decision, len(said.attempts)) == (_Explanation.MESSAGED, 1)
        assert said.text.endswith(f" Try 1, begun at {told}, was cut off: its outcome is not on record.")
    else:
        assert (said.decision, len(said.attempts)) == (_Explanation.UNCLEAR, 0)


async def test_refusals_are_tried_again_and_others_are_not(loft: Loft) -> None:
    name = await loft.launch(10)
    stormy = {"p1", "p5", "p9"}

    async def refuse_some(messages: Messages) -> Sequence[Outcome]:
        return [
            Refused(code="storm") if cast("Any", message.address).tree.partition("-")[0] in stormy else Accepted()
            for message in messages
        ]

    loft.channel.script = refuse_some
    await loft.send()
    assert (await loft.get_campaign(name)).state == campaigns_pb2.Campaign.State.SENDING
    await loft.pass_time()
    await loft.send()
    stormy.clear()
    await loft.pass_time()
    await loft.send()
    by_person = {tree.partition("-")[0]: copies for (tree, _), copies in loft.channel.copies.items()}
    assert by_person == {f"p{index}": 3 if index in (1, 5, 9) else 1 for index in range(10)}
    campaign = await loft.get_campaign(name)
    assert campaign.state == SENT
    assert (campaign.counts.signals["sent"], campaign.counts.unclear) == (10, 0)
    assert "failed" not in campaign.counts.signals


async def test_crash_in_a_second_try_is_not_taken_for_the_first_refusal(pigeons: Loft) -> None:
    name = await pigeons.launch(1)
    reached = asyncio.Event()

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="storm") for _ in messages]

    async def hang(messages: Messages) -> Sequence[Outcome]:
        reached.set()
        return await asyncio.get_running_loop().create_future()

    pigeons.channel.script = refuse
    await pigeons.send()
    await pigeons.pass_time()
    pigeons.channel.script = hang
    crashing = asyncio.create_task(pigeons.make_sender(await pigeons.claim()).run())
    await reached.wait()
    crashing.cancel()
    await asyncio.gather(crashing, return_exceptions=True)
    await pigeons.pass_time()
    await pigeons.send()
    assert set(pigeons.channel.copies.values()) == {2}
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.unclear) == (SENT, 1)


async def test_refusals_end_in_a_failure_with_the_last_reason(pigeons: Loft) -> None:
    name = await pigeons.launch(1)

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="storm") for _ in messages]

    pigeons.channel.script = refuse
    for _ in range(MOST_TRIES):
        await pigeons.send()
        await pigeons.pass_time()
    assert set(pigeons.channel.copies.values()) == {MOST_TRIES}
    assert (await pigeons.read_recipients(name))["p0"].reasons == ["transient/storm"]
    assert (await pigeons.get_campaign(name)).state == SENT


async def test_taken_over_unit_is_sent_once(pigeons: Loft) -> None:
    name = await pigeons.launch(100)
    at_once = 4 * sending.BATCHES_AT_ONCE
    reached, taken_over, go_on = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def stall_at_first(messages: Messages) -> Sequence[Outcome]:
        handed = len(pigeons.channel.handed)
        if handed == at_once:
            reached.set()
        if handed > at_once:
            taken_over.set()
        if handed <= at_once:
            await go_on.wait()
        return [Accepted() for _ in messages]

    pigeons.channel.script = stall_at_first
    slow = asyncio.create_task(pigeons.make_sender(await pigeons.claim()).run())
    await reached.wait()
    await pigeons.pass_time()
    fast = asyncio.create_task(pigeons.send())
    await taken_over.wait()
    go_on.set()
    with pytest.raises(LeaseLost):
        await slow
    await fast
    assert set(pigeons.channel.copies.values()) == {1}
    assert len(pigeons.channel.copies) == 100
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], campaign.counts.unclear) == (SENT, 100, 0)


async def test_refusals_after_somebody_else_finished_the_unit_are_tried_again(pigeons: Loft) -> None:
    name = await pigeons.launch(4)
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def refuse_late(messages: Messages) -> Sequence[Outcome]:
        reached.set()
        await go_on.wait()
        return [Refused(code="storm") for _ in messages]

    pigeons.channel.script = refuse_late
    first = await pigeons.claim()
    slow = asyncio.create_task(pigeons.make_sender(first).run())
    await reached.wait()
    await pigeons.pass_time()
    # Whoever takes it over cannot know what becomes of them.
    await pigeons.send()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.unclear) == (SENT, 4)
    go_on.set()
    with pytest.raises(LeaseLost):
        await slow
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.HasField("finish_time")) == (campaigns_pb2.Campaign.State.SENDING, False)
    pigeons.channel.script = accept_all
    await pigeons.pass_time()
    again = await pigeons.claim()
    assert again.lease > first.lease + 1, "a lease that was lost fits again"
    await pigeons.make_sender(again).run()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], campaign.counts.unclear) == (SENT, 4, 0)
    assert set(pigeons.channel.copies.values()) == {2}


async def test_provider_in_trouble_is_tried_with_one_person_after_the_other(
    pigeons: Loft, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pace, sending):
        # Each hold is longer than a sender waits for, and over in a moment.
        monkeypatch.setattr(module, "back_off", lambda tries: timedelta(milliseconds=50))
        monkeypatch.setattr(module, "HORIZON", timedelta(milliseconds=1))
    people = 24
    name = await pigeons.launch(people)

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="storm") for _ in messages]

    pigeons.channel.script = refuse
    while len(pigeons.channel.handed) < 4 * people:
        await pigeons.send()
        await pigeons.pass_time()
    assert len(pigeons.channel.copies) == people
    assert max(pigeons.channel.copies.values()) < MOST_TRIES, "always the same ones are tried"
    pigeons.channel.script = accept_all
    await pigeons.send()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"]) == (SENT, people)


def answer_by_wood(loft: Loft, **answers: Outcome) -> Callable[[Messages], Awaitable[Sequence[Outcome]]]:
    """A script in which each wood has its answer, and the others take everything."""

    async def answer(messages: Messages) -> Sequence[Outcome]:
        return [answers.get(loft.channel.find_wood(message), Accepted()) for message in messages]

    return answer


def count_copies(loft: Loft, person: str) -> int:
    """How often somebody was tried."""
    return sum(copies for (tree, _), copies in loft.channel.copies.items() if tree.partition("-")[0] == person)


async def find_sent(loft: Loft, name: str) -> set[str]:
    return {person for person, found in (await loft.read_recipients(name)).items() if "sent" in found.signals}


async def test_rest_that_one_limit_asks_for_holds_up_nobody_else(woods: Loft) -> None:
    """One push service's 429 with half an hour held every browser."""
    north = {"p0", "p5", "p10", "p15"}
    woods.channel.woods = dict.fromkeys(north, "north")
    woods.channel.script = answer_by_wood(woods, north=Refused(code="hawks", retry_after=timedelta(minutes=30)))
    name = await woods.launch(40)
    await woods.send()
    assert await find_sent(woods, name) == {f"p{index}" for index in range(40)} - north
    later = await woods.relaunch()
    await woods.send()
    assert await find_sent(woods, later) == {f"p{index}" for index in range(40)} - north
    woods.channel.script = accept_all
    await woods.pass_time(timedelta(minutes=30))
    # Time does not pass for what a process remembers of its own holds, so this is another one.
    woods.pacer = Pacer(woods.world.core.engine)
    for _ in (name, later):
        await woods.send()
    for campaign in (await woods.get_campaign(name), await woods.get_campaign(later)):
        assert (campaign.state, campaign.counts.signals["sent"]) == (SENT, 40)


async def test_outage_of_one_limit_writes_nobody_off_while_the_others_go_on(woods: Loft, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a push service that was down for five minutes everybody had failed: its neighbours' successes were taken for its own."""
    for module in (pace, sending):
        # Each hold is longer than a sender waits for, and over in a moment.
        monkeypatch.setattr(module, "back_off", lambda tries: timedelta(milliseconds=50))
        monkeypatch.setattr(module, "HORIZON", timedelta(milliseconds=1))
    woods.channel.woods = {"p0": "north", "p1": "north", "p2": "alone"}
    woods.channel.script = answer_by_wood(woods, north=Refused(code="storm"), alone=Refused(code="storm"))
    name = await woods.launch(8)
    others = campaigns_pb2.GivenContacts(contacts=[f"{woods.client.parent}/contacts/p{index}" for index in range(3, 8)])
    while min(count_copies(woods, person) for person in ("p0", "p1")) <= MOST_TRIES:
        await woods.relaunch(audience=campaigns_pb2.Audience(given_contacts=others))
        for _ in range(2):
            await woods.send()
        await woods.pass_time()
    people = await woods.read_recipients(name)
    assert {person for person, found in people.items() if "failed" in found.signals} == {"p2"}, "p2 is alone with it"
    woods.channel.script = accept_all
    while (campaign := await woods.get_campaign(name)).state != SENT:
        await woods.send()
        await woods.pass_time()
    assert campaign.counts.signals["sent"] == 7


async def test_outage_that_begins_with_silence_leaves_nobody_out_whose_message_may_come_twice(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was unclear once was given up after ten refusals, although nobody else got through either."""
    for module in (pace, sending):
        monkeypatch.setattr(module, "back_off", lambda tries: timedelta(milliseconds=50))
        monkeypatch.setattr(module, "HORIZON", timedelta(milliseconds=1))

    async def keep_silent(messages: Messages) -> Sequence[Outcome]:
        return [Unclear(detail="silence") for _ in messages]

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="storm") for _ in messages]

    async with open_loft(world, HomingChannel) as loft:
        name = await loft.launch(2)
        loft.channel.script = keep_silent
        await loft.send()
        loft.channel.script = refuse
        while min(loft.channel.copies.values()) <= MOST_TRIES + 1:
            await loft.pass_time()
            await loft.send()
        loft.channel.script = accept_all
        while (campaign := await loft.get_campaign(name)).state != SENT:
            await loft.pass_time()
            await loft.send()
    assert (campaign.counts.signals["sent"], campaign.counts.unclear) == (2, 0)


async def test_whoever_stands_behind_people_who_have_to_wait_is_sent_to(woods: Loft) -> None:
    """A batch in which nobody could go ended the unit's turn for half an hour, with others behind it."""
    woods.channel.woods = {f"p{index}": "north" for index in range(60)}
    name = await woods.launch(64)
    async with transaction(woods.world.core.engine) as conn:
        await hold_limits(conn, {name_limit("woods", "north"): timedelta(minutes=30)})
    await woods.send()
    assert await find_sent(woods, name) == {f"p{index}" for index in range(60, 64)}
    assert len(woods.channel.handed) == 4


async def test_unit_is_taken_up_again_when_the_first_limit_has_room(woods: Loft) -> None:
    woods.channel.woods = {"p0": "north", "p1": "south"}
    long, short = (Refused(code="storm", retry_after=timedelta(seconds=seconds)) for seconds in (1800, 60))
    woods.channel.script = answer_by_wood(woods, north=long, south=short)
    name = await woods.launch(2)
    await woods.send()
    woods.channel.script = accept_all
    await woods.pass_time(timedelta(seconds=70))
    woods.pacer = Pacer(woods.world.core.engine)
    await woods.send()
    assert await find_sent(woods, name) == {"p1"}


async def test_short_hold_is_not_waited_for_as_long_as_another_ones(woods: Loft) -> None:
    """Whoever could go in a second was put aside with those who could go in half an hour."""
    south = {f"p{index}" for index in range(4)}
    woods.channel.woods = {f"p{index}": "south" if f"p{index}" in south else "north" for index in range(16)}
    name = await woods.launch(16)
    async with transaction(woods.world.core.engine) as conn:
        holds = {"north": timedelta(minutes=30), "south": timedelta(seconds=1.5)}
        await hold_limits(conn, {name_limit("woods", wood): delay for wood, delay in holds.items()})
    await woods.send()
    if await find_sent(woods, name) != south:
        await woods.pass_time(timedelta(seconds=10))
        await woods.send()
    assert await find_sent(woods, name) == south


async def raise_error(messages: Messages) -> Any:
    raise RuntimeError("a defect")


async def raise_cancelled(messages: Messages) -> Any:
    raise asyncio.CancelledError


async def answer_too_few(messages: Messages) -> Any:
    return [Accepted()] * (len(messages) - 1)


async def answer_too_many(messages: Messages) -> Any:
    return [Accepted()] * (len(messages) + 1)


async def answer_nothing(messages: Messages) -> Any:
    return None


async def answer_text(messages: Messages) -> Any:
    return "sent"


async def answer_with_odd_code(messages: Messages) -> Any:
    return [Refused(code=cast("str", 404)) for _ in messages]


async def answer_with_odd_signals(messages: Messages) -> Any:
    return [Accepted(signals=cast("tuple[str, ...]", None)) for _ in messages]


async def answer_with_odd_delay(messages: Messages) -> Any:
    return [Refused(code="storm", retry_after=cast("timedelta", 5)) for _ in messages]


async def never_answer(messages: Messages) -> Any:
    return await asyncio.get_running_loop().create_future()


DEFECTS = [
    raise_error,
    raise_cancelled,
    answer_too_few,
    answer_too_many,
    answer_nothing,
    answer_text,
    answer_with_odd_code,
    answer_with_odd_signals,
    answer_with_odd_delay,
    never_answer,
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
async def test_defect_of_a_channel_makes_its_batch_unclear_and_the_others_go_on(
    pigeons: Loft, defect: Callable[[Messages], Awaitable[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if defect is never_answer:
        # The others of its batches are answered at once, but a crowded machine may stand still for a second.
        monkeypatch.setattr(calls, "LONGEST_CALL", timedelta(seconds=4))
    name = await pigeons.launch(12)

    async def fail_once(messages: Messages) -> Any:
        pigeons.channel.script = accept_all
        return await defect(messages)

    pigeons.channel.script = fail_once
    await pigeons.send()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.unclear, campaign.counts.signals["sent"]) == (SENT, 4, 8)
    assert set(pigeons.channel.copies.values()) == {1}


async def test_person_with_several_addresses_is_reached_when_one_of_them_is(pigeons: Loft) -> None:
    name = await pigeons.launch(5, trees=3)
    fates = {"p0": "aaa", "p1": "arr", "p2": "ggg", "p3": "guu", "p4": "gat"}
    answers: dict[str, Outcome] = {
        "a": Accepted(),
        "r": Refused(code="storm"),
        "g": Refused(code="no_tree"),
        "u": Unclear(detail="silence"),
        "t": Refused(code="hawks", retry_after=timedelta(seconds=1)),
    }

    async def answer(messages: Messages) -> Sequence[Outcome]:
        trees = [cast("Any", message.address).tree.split("-") for message in messages]
        return [answers[fates[person][int(tree)]] for person, tree in trees]

    pigeons.channel.script = answer
    await pigeons.send()
    assert {tree for tree, _ in pigeons.channel.copies} == {f"p{p}-{t}" for p in range(5) for t in range(3)}
    assert set(pigeons.channel.copies.values()) == {1}
    assert len({token for _, token in pigeons.channel.copies}) == 5
    people = await pigeons.read_recipients(name)
    assert {person for person, found in people.items() if "sent" in found.signals} == {"p0", "p1", "p4"}
    assert {person for person, found in people.items() if "failed" in found.signals} == {"p2"}
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.unclear) == (SENT, 1)
    states = {}
    for person in fates:
        request = contacts_pb2.GetContactRequest(name=f"{pigeons.client.parent}/contacts/{person}")
        contact = await pigeons.client.contacts.GetContact(request)
        found = {subscription.address["tree"]: subscription.state for subscription in contact.subscriptions}
        states[person] = [found[f"{person}-{tree}"] == _State.INVALID for tree in range(3)]
    assert states == {person: [letter == "g" for letter in fate] for person, fate in fates.items()}


async def test_person_who_says_stop_between_launch_and_dispatch_is_skipped(pigeons: Loft) -> None:
    name = await pigeons.launch(3)
    await pigeons.opt_out("p1")
    await pigeons.send()
    assert sorted(tree for tree, _ in pigeons.channel.copies) == ["p0-0", "p2-0"]
    people = await pigeons.read_recipients(name)
    assert (list(people["p1"].signals), list(people["p1"].reasons)) == (["skipped"], ["unsubscribed/no_active_subscription"])
    assert (await pigeons.get_campaign(name)).state == SENT


async def test_person_who_says_stop_before_a_second_try_is_not_unclear(pigeons: Loft) -> None:
    name = await pigeons.launch(1)

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="storm") for _ in messages]

    pigeons.channel.script = refuse
    await pigeons.send()
    await pigeons.opt_out("p0")
    await pigeons.pass_time()
    await pigeons.send()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.unclear, len(pigeons.channel.handed)) == (SENT, 0, 1)
    assert "skipped" in campaign.counts.signals


@pytest.mark.parametrize(
    ("note", "attributes", "reason"),
    [
        ("Hi {{ first_name }}", {}, "content/missing_attribute"),
        ("Hi {{ first_name }}", {"first_name": ""}, "content/missing_attribute"),
        ("{{ points | ceil }}", {"points": "1e999"}, "content/template_error"),
        ("{{ born | date: '%Y' }}", {"born": "99999999999999"}, "content/template_error"),
    ],
)
async def test_person_whose_note_cannot_be_written_is_skipped(
    pigeons: Loft, note: str, attributes: dict[str, Any], reason: str
) -> None:
    name = await pigeons.launch(1, note=note, attributes=attributes)
    await pigeons.send()
    people = await pigeons.read_recipients(name)
    assert (list(people["p0"].signals), list(people["p0"].reasons)) == (["skipped"], [reason])
    assert not pigeons.channel.handed
    assert (await pigeons.get_campaign(name)).state == SENT


async def test_provider_that_asks_for_weeks_is_asked_again_within_the_hour(pigeons: Loft) -> None:
    await pigeons.launch(1)

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="hawks", retry_after=timedelta(days=115)) for _ in messages]

    pigeons.channel.script = refuse
    await pigeons.send()
    await pigeons.pass_time(timedelta(hours=1))
    # Time does not pass for what a process remembers of its own holds, so this is another one.
    pigeons.pacer = Pacer(pigeons.world.core.engine)
    await pigeons.send()
    assert len(pigeons.channel.handed) == 2


async def test_provider_that_asks_two_people_for_no_rest_at_all_is_no_defect(pigeons: Loft) -> None:
    name = await pigeons.launch(2)

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        pigeons.channel.script = accept_all
        return [Refused(code="storm", retry_after=timedelta(0)) for _ in messages]

    pigeons.channel.script = refuse
    await pigeons.send()
    await pigeons.pass_time()
    await pigeons.send()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], campaign.counts.unclear) == (SENT, 2, 0)


async def test_slower_provider_gets_no_further_batch_of_the_unit(pigeons: Loft) -> None:
    name = await pigeons.launch(200)

    async def refuse(messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="hawks") for _ in messages]

    pigeons.channel.script = refuse
    await pigeons.send()
    # After the first batches at most one message of each finds out whether it is over, and after a few the unit is put aside.
    assert len(pigeons.channel.handed) <= 4 * sending.BATCHES_AT_ONCE * 2
    assert (await pigeons.get_campaign(name)).state == campaigns_pb2.Campaign.State.SENDING


async def test_receipt_that_overtakes_our_own_outcome_counts(pigeons: Loft) -> None:
    name = await pigeons.launch(2)

    async def report_first(messages: Messages) -> Sequence[Outcome]:
        receipts = tuple(Receipt(signal="delivered", token=message.token) for message in messages)
        await pigeons.world.core.ledger.ingest_webhooks("pigeon", [Webhook(receipts=receipts)])
        return [Accepted(), Unclear(detail="silence")]

    pigeons.channel.script = report_first
    await pigeons.send()
    campaign = await pigeons.get_campaign(name)
    assert (campaign.counts.signals["delivered"], campaign.counts.signals["sent"], campaign.counts.unclear) == (2, 2, 0)
    assert campaign.state == SENT
