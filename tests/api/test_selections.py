"""Selections against an oracle: plain Python sets, computed from the raw event log and the subscriptions as they were given.

Nothing of the oracle knows the server's expressions, implications or bits: it has the words of the actions, as people say them.
Hypothesis makes the populations, channels, waves, holdouts, opt-outs, events and their order, and the questions. What a chain
reports is held to the same oracle.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.client import Client
from aftertouch.ingest.ledger import Fact
from aftertouch.retargeting import selections
from aftertouch.retargeting.recheck import Recheck
from aftertouch.rolls.chunks import holdout_of
from aftertouch.rolls.sql import write_roll
from aftertouch.sandbox import SandboxSettings
from aftertouch.store import campaigns as campaigns_store
from aftertouch.store.apps import find_app
from aftertouch.store.contacts import Contact, Subscription, hash_address, hold_addresses, upsert_contacts
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.paces import count_messages
from aftertouch.store.tables import apps, contact_counters, events, kinds
from aftertouch.v1 import campaigns_pb2, contacts_pb2, retargeting_pb2
from tests.fix_database import clone_database
from tests.fix_world import World, run_world

CHANNELS = ("push", "sms", "whatsapp")
STATES = ("active", "opted_out", "invalid")
Selection = campaigns_pb2.RetargetSelection
Explanation = contacts_pb2.ContactExplanation
Known = frozenset[str]
"""What is known of one person in one campaign: signals, with what follows from them."""

_OURS = {"sent": "attempted", "failed": "attempted", "scanned": "sent"}
FOLLOWS = {
    "push": {**_OURS, "clicked": "confirmed", "dismissed": "confirmed", "confirmed": "sent"},
    "sms": {**_OURS, "clicked": "delivered", "replied": "sent", "delivered": "sent"},
    "whatsapp": {**_OURS, "clicked": "read", "replied": "read", "read": "delivered", "delivered": "sent"},
}
ARRIVED = {"delivered", "confirmed"}
"""Signals that say that a message reached somebody."""
HEARD = {"failed", "delivered", "read", "confirmed", "clicked", "dismissed", "unconfirmable", "replied", "scanned"}
REPORTED = {
    "push": ("attempted", "sent", "confirmed", "clicked", "dismissed", "scanned", "unconfirmable", "failed", "skipped"),
    "sms": ("attempted", "sent", "delivered", "clicked", "replied", "scanned", "failed", "skipped"),
    "whatsapp": ("attempted", "sent", "delivered", "read", "clicked", "replied", "scanned", "failed", "skipped"),
}
PRICES = (("EUR", "0.07"), ("USD", "0.0079"), ("USD", "0.0158"))
REASONS = (("transient", "500"), ("recipient_gone", "410"), ("recipient_gone", "404"))


@dataclass(frozen=True)
class Words:
    """An action in words: who is meant, and of whom it cannot be said."""

    is_meant: Callable[[Known], bool]
    is_apart: Callable[[Known], bool] = lambda known: False


ANSWERED = {
    "replied": Words(lambda known: "replied" in known),
    "not_replied": Words(lambda known: "delivered" in known and "replied" not in known),
    "clicked": Words(lambda known: "clicked" in known),
    "not_clicked": Words(lambda known: "delivered" in known and "clicked" not in known),
}
OWN_ACTIONS: dict[str, dict[str, Words]] = {
    "push": {
        "clicked": Words(lambda known: "clicked" in known),
        "not_clicked": Words(lambda known: "sent" in known and "clicked" not in known),
        "confirmed": Words(lambda known: "confirmed" in known),
        "not_confirmed": Words(
            lambda known: "sent" in known and "confirmed" not in known,
            lambda known: "sent" in known and "confirmed" not in known and "unconfirmable" in known,
        ),
        "sent": Words(lambda known: "sent" in known),
    },
    "sms": {
        "delivered": Words(lambda known: "delivered" in known),
        "not_delivered": Words(
            lambda known: "failed" in known and "delivered" not in known,
            lambda known: "sent" in known and "delivered" not in known and "failed" not in known,
        ),
        "sent": Words(lambda known: "attempted" in known),
        **ANSWERED,
    },
    "whatsapp": {
        "not_read": Words(lambda known: "delivered" in known and "read" not in known),
        "not_received": Words(lambda known: bool(known & {"failed", "sent"}) and "delivered" not in known),
        "read": Words(lambda known: "read" in known),
        "failed": Words(lambda known: "failed" in known and "delivered" not in known),
        **ANSWERED,
    },
}


OVER_FAILURES = {"push": [], "sms": ["not_delivered"], "whatsapp": ["not_received", "failed"]}
"""The actions that can be narrowed to reasons."""


FREE_FROM = datetime.now(UTC) + timedelta(days=1)
"""When the first holds of providers end."""

GAMMA, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def mix(value: int) -> int:
    """The finalizer of SplitMix64, in plain integers."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def is_held_out(root_id: int, number: int, percent: int) -> bool:
    return mix(number * GAMMA + mix(root_id * GAMMA & MASK) & MASK) < percent * 2**64 // 100


def is_pending(known: Known) -> bool:
    return "sent" in known and not known & HEARD


def is_unclear(known: Known) -> bool:
    return "attempted" in known and not known & {"sent", "failed", "skipped"}


ACTIONS = {channel: {**own, "unclear": Words(is_unclear)} for channel, own in OWN_ACTIONS.items()}


@dataclass(frozen=True)
class Drawn:
    """A campaign: its channel, its people, and whether it is a wave of the first one that is still being sent."""

    channel: str
    members: tuple[int, ...]
    wave: str
    """Empty for a campaign of its own, else the state of a wave."""
    percent: int
    """Of the people of its chain, how many of 100 are held out of it and of whatever comes after it."""
    held_out: tuple[int, ...]
    """Who was not messaged in fact, which is another matter: the percentage may have been changed in the past."""


@dataclass(frozen=True)
class Story:
    """Everything that hypothesis chose."""

    offset: int
    """The first contact number: near the edge of a block."""
    people: int
    subscriptions: dict[tuple[int, str], list[str]]
    held: dict[tuple[int, str, int], int]
    """Person, channel and place of addresses that the provider asked to leave alone, and minutes after ``FREE_FROM``."""
    full: set[int]
    """Who was messaged often lately."""
    is_capped: bool
    """Whether the app minds that."""
    campaigns: list[Drawn]
    events: list[tuple[int, int, str, tuple[str, str]]]
    """Campaign, person, signal, and its reason or its price; in the order of their arrival."""
    selections: list[tuple[Selection, int]]
    """With how many of 100 a wave of it would hold out."""


def name_campaign(index: int) -> str:
    return f"c{index}"


@st.composite
def draw_story(draw: st.DrawFn) -> Story:
    people = draw(st.integers(1, 9))
    person = st.integers(0, people - 1)
    drawn = []
    for index in range(draw(st.integers(1, 4))):
        members = draw(st.sets(person, min_size=1))
        held_out = draw(st.sets(person)) - members
        drawn.append(
            Drawn(
                draw(st.sampled_from(CHANNELS)),
                tuple(sorted(members)),
                draw(st.sampled_from(["", "", "SENT", "SENDING", "PAUSED"])) if index else "",
                draw(st.sampled_from([0, 60, 90])),
                tuple(sorted(held_out)),
            )
        )
    happened = []
    for index, campaign in enumerate(drawn):
        event = st.tuples(
            st.just(index),
            st.sampled_from(campaign.members),
            st.sampled_from(REPORTED[campaign.channel]),
            st.sampled_from(REASONS),
        )
        price = st.tuples(st.just(index), st.sampled_from(campaign.members), st.just("priced"), st.sampled_from(PRICES))
        happened += draw(st.lists(event, max_size=14)) + draw(st.lists(price, max_size=4))

    def ask(index: int) -> st.SearchStrategy[Selection]:
        question = {
            "source": st.just(f"apps/aAPPLE/campaigns/{name_campaign(index)}"),
            "include_apart": st.booleans(),
            "leave_out_pending": st.booleans(),
        }
        channel = drawn[index].channel
        narrowing = {
            "action": st.sampled_from(OVER_FAILURES[channel]),
            "reason_codes": st.lists(st.sampled_from(["500", "410", "1"]), max_size=2, unique=True),
            "reason_classes": st.lists(st.sampled_from(["transient", "recipient_gone"]), max_size=1),
        }
        asked = st.builds(Selection, **question, action=st.sampled_from(sorted(ACTIONS[channel])))
        return asked | st.builds(Selection, **question, **narrowing) if OVER_FAILURES[channel] else asked

    questions = st.one_of([ask(index) for index in range(len(drawn))])
    asked = st.recursive(
        questions,
        lambda inner: st.one_of(
            st.lists(inner, min_size=2, max_size=3).map(
                lambda parts: Selection(any_of=campaigns_pb2.RetargetSelections(selections=parts))
            ),
            st.lists(inner, min_size=2, max_size=3).map(
                lambda parts: Selection(all_of=campaigns_pb2.RetargetSelections(selections=parts))
            ),
            st.tuples(inner, inner).map(lambda pair: Selection(all_but=Selection.AllBut(all=pair[0], but=pair[1]))),
        ),
        max_leaves=6,
    ).filter(lambda selection: measure_depth(selection) <= 5)
    standings = st.dictionaries(
        st.tuples(person, st.sampled_from(CHANNELS)),
        st.lists(st.sampled_from(STATES), min_size=1, max_size=2),
        min_size=people,
        max_size=20,
    )
    return Story(
        draw(st.sampled_from([0, 8187, 8192])),
        people,
        draw(standings),
        draw(st.dictionaries(st.tuples(person, st.sampled_from(CHANNELS), st.integers(0, 1)), st.integers(0, 3), max_size=8)),
        draw(st.sets(person)),
        draw(st.booleans()),
        drawn,
        draw(st.permutations(happened)),
        draw(st.lists(st.tuples(asked, st.sampled_from([0, 0, 50])), min_size=1, max_size=3)),
    )


def list_parts(selection: Selection) -> list[Selection]:
    match selection.WhichOneof("combination"):
        case None:
            return []
        case "all_but":
            return [selection.all_but.all, selection.all_but.but]
        case operator:
            return list(getattr(selection, operator).selections)


def measure_depth(selection: Selection) -> int:
    return 1 + max((measure_depth(part) for part in list_parts(selection)), default=0)


def list_sources(selection: Selection) -> list[str]:
    """The campaigns that it asks, as they are named from left to right."""
    if parts := list_parts(selection):
        return [name for part in parts for name in list_sources(part)]
    return [selection.source.rpartition("/")[2]]


@dataclass
class Oracle:
    """Sets of people, from what was given and what is in the raw event log."""

    story: Story
    campaign_ids: list[int]
    heard: dict[tuple[int, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    """Signals by campaign and person, as the log has them."""
    reasons: dict[tuple[int, int], set[tuple[str, str]]] = field(default_factory=lambda: defaultdict(set))
    """Of failures, by campaign and person."""
    prices: dict[int, set[tuple[int, str, str]]] = field(default_factory=lambda: defaultdict(set))
    """Person, currency and amount by campaign."""

    def know(self, campaign: int, person: int) -> Known:
        known = set(self.heard[campaign, person])
        follows = FOLLOWS[self.story.campaigns[campaign].channel]
        while more := {follows[signal] for signal in known if signal in follows} - known:
            known |= more
        return frozenset(known)

    def ask(self, campaign: int, is_true: Callable[[Known], bool]) -> set[int]:
        return {person for person in self.story.campaigns[campaign].members if is_true(self.know(campaign, person))}

    def match(self, selection: Selection) -> set[int]:
        parts = [self.match(part) for part in list_parts(selection)]
        match selection.WhichOneof("combination"):
            case "any_of":
                return set().union(*parts)
            case "all_of":
                return set.intersection(*parts)
            case "all_but":
                return parts[0] - parts[1]
        campaign = int(selection.source.rpartition("/c")[2])
        words = ACTIONS[self.story.campaigns[campaign].channel][selection.action]
        apart = self.ask(campaign, words.is_apart)
        meant = self.ask(campaign, words.is_meant)
        meant = meant | apart if selection.include_apart else meant - apart
        if selection.leave_out_pending:
            meant -= self.ask(campaign, is_pending)
        if selection.reason_codes or selection.reason_classes:
            meant = {
                person
                for person in meant
                for kind, code in self.reasons[campaign, person]
                if kind in selection.reason_classes or code in selection.reason_codes
            }
        return meant

    def find_reachable(self, channel: str) -> set[int]:
        return {person for person in range(self.story.people) if "active" in self.story.subscriptions.get((person, channel), [])}

    def list_chain(self, root: int) -> list[int]:
        """A chain's campaigns: all waves of a story are of its first campaign."""
        return [root, *(index for index, campaign in enumerate(self.story.campaigns) if campaign.wave and root == 0)]

    def find_root(self, index: int) -> int:
        return 0 if self.story.campaigns[index].wave else index

    def hold_out(self, roots: list[int], percent: int) -> set[int]:
        """Who is held out of a wave that asks these chains, the first of which is its own."""
        held_out = set()
        for place, root in enumerate(roots):
            shares = [self.story.campaigns[index].percent for index in self.list_chain(root)]
            share = max(shares + [percent] * (place == 0))
            root_id = self.campaign_ids[root]
            held_out |= {p for p in range(self.story.people) if is_held_out(root_id, p + self.story.offset, share)}
        return held_out

    def drop(self, selection: Selection, channel: str, percent: int) -> dict[str, set[int]]:
        """Who drops out, by the first reason that applies; the audience last."""
        asked = list_sources(selection)
        roots = [self.find_root(int(name[1:])) for name in asked]
        chains = {name_campaign(root) for root in roots}
        held_out = self.hold_out(roots, percent)
        blocked: set[int] = set()
        for index, campaign in enumerate(self.story.campaigns):
            is_open = campaign.wave in ("SENDING", "PAUSED") and name_campaign(0) in chains
            if is_open and name_campaign(index) not in asked:
                blocked |= set(campaign.members)
        dropped = defaultdict(set)
        for person in self.match(selection):
            states = self.story.subscriptions.get((person, channel), [])
            if not states:
                reason = "NO_SUBSCRIPTION"
            elif "active" not in states:
                reason = "OPTED_OUT" if "opted_out" in states else "INVALID"
            elif all((person, channel, place) in self.story.held for place, state in enumerate(states) if state == "active"):
                reason = "HELD"
            elif self.story.is_capped and person in self.story.full:
                reason = "OVER_FREQUENCY_CAP"
            elif person in blocked:
                reason = "IN_OPEN_WAVE"
            else:
                reason = "HELD_OUT" if person in held_out else "AUDIENCE"
            dropped[reason].add(person)
        return {reason: dropped[reason] for reason in (*REASON_NAMES, "AUDIENCE")}

    def find_end(self, person: int, channel: str) -> datetime:
        """When the first of somebody's addresses, which are all held, is free again."""
        states = self.story.subscriptions[person, channel]
        active = [place for place, state in enumerate(states) if state == "active"]
        return FREE_FROM + timedelta(minutes=min(self.story.held[person, channel, place] for place in active))

    def add_up(self, campaigns: list[int]) -> dict[str, tuple[Fraction, int]]:
        """By currency: what messages cost, and of how many prices that is the sum."""
        known = [(currency, Fraction(amount)) for index in campaigns for _, currency, amount in self.prices[index]]
        return {
            currency: (sum(amounts, Fraction()), len(amounts))
            for currency in sorted({currency for currency, _ in known})
            if (amounts := [amount for other, amount in known if other == currency])
        }

    def measure(self, index: int) -> dict[str, set[int]]:
        """A campaign's people by what is true of them; "" for who was reached, and "roll" for all."""
        measures = defaultdict(set, {"roll": set(self.story.campaigns[index].members)})
        for person in self.story.campaigns[index].members:
            known = self.know(index, person)
            for signal in known:
                measures[signal].add(person)
            if known & ARRIVED:
                measures[""].add(person)
        return measures


REASON_NAMES = ("NO_SUBSCRIPTION", "OPTED_OUT", "INVALID", "HELD", "OVER_FREQUENCY_CAP", "IN_OPEN_WAVE", "HELD_OUT")
_apps = itertools.count()


@dataclass
class Played:
    """A story in an app of its own."""

    world: World
    story: Story
    client: Client
    app: str
    campaigns: list[campaigns_store.Campaign]

    async def hear(self, happened: list[tuple[int, int, str, tuple[str, str]]]) -> None:
        """Events on their usual way, each twice in a while."""
        now = datetime.now(UTC)
        facts = []
        for campaign, person, signal, (reason_class, code) in happened:
            kind = Kind(signal, reason_class, code) if signal in ("failed", "skipped", "priced") else Kind(signal)
            position = self.story.campaigns[campaign].members.index(person)
            facts.append(Fact(self.campaigns[campaign], position, kind, now))
        await self.world.core.ledger.record(facts + facts[::2])

    async def read_log(self) -> Oracle:
        """What is in the raw event log by now."""
        oracle = Oracle(self.story, [campaign.campaign_id for campaign in self.campaigns])
        by_id = {campaign.campaign_id: index for index, campaign in enumerate(self.campaigns)}
        async with transaction(self.world.core.engine) as conn:
            rows = await conn.execute(
                select(events.c.slot, events.c.position, kinds.c.signal, kinds.c.reason_class, kinds.c.reason_code)
                .join(kinds, kinds.c.kind == events.c.kind)
                .where(events.c.slot.in_([campaign_id << 20 for campaign_id in by_id]))
            )
            for slot, position, signal, *reason in rows:
                index = by_id[slot >> 20]
                person = self.story.campaigns[index].members[position]
                if signal == "priced":
                    oracle.prices[index].add((person, *reason))
                    continue
                oracle.heard[index, person].add(signal)
                if signal == "failed":
                    oracle.reasons[index, person].add(tuple(reason))
        return oracle

    def name(self, index: int) -> str:
        return f"apps/{self.app}/campaigns/{name_campaign(index)}"

    def address(self, selection: Selection) -> Selection:
        """A selection with this app's names."""
        return Selection.FromString(selection.SerializeToString().replace(b"apps/aAPPLE/", f"apps/{self.app}/".encode()))

    async def list_people(self, selection: Selection, channel: str, **fields: Any) -> set[int]:
        request = retargeting_pb2.ListRetargetContactsRequest(selection=selection, channel=channel, **fields)
        people = []
        async for page in self.client.retargeting.ListRetargetContacts(request):
            people += [int(name.rpartition("/p")[2]) for name in page.contacts]
            assert page.total_count == len(people)
        assert len(people) == len(set(people))
        return set(people)


async def hold_up(conn: AsyncConnection, app_id: int, story: Story) -> None:
    """Have some addresses held, and some people messaged as often as the app allows, if it minds."""
    holds = [
        (person + story.offset, channel, hash_address(f"{person}/{place}"), FREE_FROM + timedelta(minutes=minutes))
        for (person, channel, place), minutes in story.held.items()
    ]
    await hold_addresses(conn, app_id, holds)
    numbers = np.array(sorted(story.full), np.int64) + story.offset
    for _ in range(2):
        await count_messages(conn, app_id, numbers, 2, timedelta(hours=24))
    if story.is_capped:
        await conn.execute(update(apps).where(apps.c.app_id == app_id).values(cap_messages=2, cap_hours=24))


@asynccontextmanager
async def play(world: World, story: Story) -> AsyncIterator[Played]:
    """An app of its own in which the story's people and campaigns are."""
    app = f"a{next(_apps):05}"
    key = await world.create_key(app, "manage")
    made = []
    async with transaction(world.core.engine) as conn:
        found = await find_app(conn, app)
        assert found is not None
        await conn.execute(insert(contact_counters).values(app_id=found.app_id, next_number=story.offset))
        people = [
            Contact(
                f"p{person}",
                {},
                subscriptions=tuple(
                    Subscription(channel, {"at": f"{person}/{place}"}, f"{person}/{place}", state)
                    for channel in CHANNELS
                    for place, state in enumerate(story.subscriptions.get((person, channel), []))
                ),
            )
            for person in range(story.people)
        ]
        await upsert_contacts(conn, found.app_id, people)
        await hold_up(conn, found.app_id, story)
        for index, campaign in enumerate(story.campaigns):
            values = {"display_name": f"Campaign {index}", "channel": campaign.channel}
            if campaign.wave:
                values |= {"root_id": made[0].campaign_id}
            draft = await campaigns_store.create_campaign(conn, found.app_id, name_campaign(index), values)
            await write_roll(conn, draft.campaign_id, np.array(campaign.members, np.int64) + story.offset)
            await write_roll(conn, holdout_of(draft.campaign_id), np.array(campaign.held_out, np.int64) + story.offset)
            now = datetime.now(UTC)
            is_sent = campaign.wave in ("", "SENT")
            made.append(
                await campaigns_store.update_campaign(
                    conn,
                    draft.campaign_id,
                    state="SENT" if is_sent else campaign.wave,
                    recipients=len(campaign.members),
                    holdout_percent=campaign.percent,
                    holdout_count=len(campaign.held_out),
                    launch_time=now,
                    finish_time=now if is_sent else None,
                )
            )
    async with world.connect(app, key) as client:
        yield Played(world, story, client, app, made)


@pytest.fixture(scope="module")
async def quiet_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A server that sends nothing by itself: what happens is told to it."""
    async with clone_database(postgres_url, template) as url, run_world(url, SandboxSettings(size=2), send_units=0) as world:
        yield world


@pytest.mark.timeout(900)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(story=draw_story(), data=st.data())
async def test_selections_are_what_sets_of_the_event_log_say(quiet_world: World, story: Story, data: st.DataObject) -> None:
    half = data.draw(st.integers(0, len(story.events)))
    async with play(quiet_world, story) as played:
        for happened in (story.events[:half], story.events[half:]):
            # The second time, what was kept of the first has to be noticed as old.
            await played.hear(happened)
            await compare(played, oracle := await played.read_log())
        await compare_explanations(played, oracle, story.selections[0][0], CHANNELS[0])


async def compare(played: Played, oracle: Oracle) -> None:
    for index in range(len(played.story.campaigns)):
        await compare_actions(played, oracle, index)
        await compare_report(played, oracle, index)
    for (selection, percent), channel in zip(played.story.selections, itertools.cycle(CHANNELS), strict=False):
        await compare_recheck(played, oracle, selection)
        await compare_funnel(played, oracle, selection, channel, percent)


async def compare_actions(played: Played, oracle: Oracle, index: int) -> None:
    campaign = played.story.campaigns[index]
    listed = await played.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=played.name(index)))
    matrix = await played.client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=played.name(index)))
    assert listed.recipients == matrix.recipients == len(campaign.members)
    pending, unclear = oracle.ask(index, is_pending), oracle.ask(index, is_unclear)
    assert (listed.pending_count, listed.unclear_count) == (len(pending), len(unclear))
    assert [counted.action.action for counted in listed.actions] == list(ACTIONS[campaign.channel])
    assert [row.action_count for row in matrix.rows] == list(listed.actions)
    for row in matrix.rows:
        words = ACTIONS[campaign.channel][row.action_count.action.action]
        apart = oracle.ask(index, words.is_apart)
        meant = oracle.ask(index, words.is_meant) - apart
        counted = row.action_count
        assert (counted.count, counted.apart_count) == (len(meant), len(apart))
        assert counted.pending_count == len(meant & pending)
        reached = {cell.channel: cell.reachable_count for cell in row.cells}
        assert {channel: reached[channel] for channel in CHANNELS} == {
            channel: len(meant & oracle.find_reachable(channel)) for channel in CHANNELS
        }


async def compare_report(played: Played, oracle: Oracle, index: int) -> None:
    report = await played.client.retargeting.GetChainReport(retargeting_pb2.GetChainReportRequest(name=played.name(index)))
    root = oracle.find_root(index)
    chain = oracle.list_chain(root)
    assert report.root == played.name(root)
    assert [link.campaign for link in report.campaigns] == [played.name(member) for member in chain]
    so_far: dict[str, set[int]] = defaultdict(set)
    for link, member in zip(report.campaigns, chain, strict=True):
        measures = oracle.measure(member)
        assert count_people(link.people) == {name: len(who) for name, who in measures.items() if who}
        added = {name: len(who - so_far[name]) for name, who in measures.items()}
        assert count_people(link.added) == {name: count for name, count in added.items() if count}
        for name, who in measures.items():
            so_far[name] |= who
        assert count_costs(link.costs) == oracle.add_up([member])
    assert count_people(report.people) == {name: len(who) for name, who in so_far.items() if who}
    assert count_costs(report.costs) == oracle.add_up(chain)
    compared = [member for member in chain if played.story.campaigns[member].held_out]
    assert [comparison.campaign for comparison in report.comparisons] == [played.name(member) for member in compared]
    for comparison, member in zip(report.comparisons, compared, strict=True):
        campaign = played.story.campaigns[member]
        assert (comparison.recipients, comparison.holdout_count) == (len(campaign.members), len(campaign.held_out))
        counts = {
            name: (len(who & set(campaign.members)), len(who & set(campaign.held_out)))
            for name, who in so_far.items()
            if name != "roll" and who & {*campaign.members, *campaign.held_out}
        }
        assert {found.signal: (found.recipient_count, found.holdout_count) for found in comparison.differences} == counts
        for found in comparison.differences:
            share = found.recipient_count / comparison.recipients - found.holdout_count / comparison.holdout_count
            assert found.difference == pytest.approx(share)
            assert -1 <= found.lower_bound <= found.difference <= found.upper_bound <= 1


def count_costs(costs: Iterable[retargeting_pb2.Cost]) -> dict[str, tuple[Fraction, int]]:
    return {cost.currency: (Fraction(cost.amount), cost.recipient_count) for cost in costs}


def count_people(counts: retargeting_pb2.ChainCounts) -> dict[str, int]:
    """The counts above zero; "" for who was reached, and "roll" for all."""
    found = {**counts.signals, "": counts.reached, "roll": counts.recipients}
    return {name: count for name, count in found.items() if count}


async def compare_funnel(played: Played, oracle: Oracle, selection: Selection, channel: str, percent: int) -> None:
    Group = retargeting_pb2.ListRetargetContactsRequest.Group
    Reason = retargeting_pb2.PreviewRetargetResponse.Reason
    asked = played.address(selection)
    shown = await played.client.retargeting.PreviewRetarget(
        retargeting_pb2.PreviewRetargetRequest(selection=asked, channel=channel, holdout_percent=percent)
    )
    expected = oracle.drop(selection, channel, percent)
    assert shown.matched_count == len(oracle.match(selection))
    assert {Reason.Name(drop.reason): drop.count for drop in shown.drops} == {
        reason: len(expected[reason]) for reason in REASON_NAMES
    }
    ends = [oracle.find_end(person, channel) for person in expected["HELD"]]
    for drop in shown.drops:
        told = [drop.earliest_end_time, drop.latest_end_time] if drop.HasField("earliest_end_time") else []
        at = [min(ends), max(ends)] if ends and drop.reason == Reason.HELD else []
        assert [time.ToDatetime(UTC) for time in told] == at
    assert shown.audience_count == len(expected["AUDIENCE"]) == shown.matched_count - sum(drop.count for drop in shown.drops)
    held: Any = {"holdout_percent": percent}
    assert await played.list_people(asked, channel, **held) == expected["AUDIENCE"]
    assert await played.list_people(asked, channel, group=Group.MATCHED) == oracle.match(selection)
    for reason in REASON_NAMES:
        people = await played.list_people(asked, channel, group=Group.DROPPED, reason=Reason.Value(reason), **held)
        assert people == expected[reason]
    lasting = expected["AUDIENCE"] | expected["HELD"] | expected["OVER_FREQUENCY_CAP"] | expected["HELD_OUT"]
    if lasting:
        await compare_frozen(played, asked, channel, lasting)


CHECKS = {
    "NO_SUBSCRIPTION": {"REACHABLE"},
    "OPTED_OUT": {"REACHABLE"},
    "INVALID": {"REACHABLE"},
    "HELD": {"NOT_HELD"},
    "OVER_FREQUENCY_CAP": {"BELOW_FREQUENCY_CAP"},
    "IN_OPEN_WAVE": {"NOT_IN_OPEN_WAVE"},
    "HELD_OUT": {"NOT_HELD_OUT"},
    "AUDIENCE": set[str](),
}
"""What an explanation says is not so, of somebody who drops out of the funnel."""


async def compare_explanations(played: Played, oracle: Oracle, selection: Selection, channel: str) -> None:
    """Everybody is told what the funnel says of them."""
    question = contacts_pb2.RetargetQuestion(selection=played.address(selection), channel=channel)
    reasons = {person: reason for reason, people in oracle.drop(selection, channel, 0).items() for person in people}
    for person in range(played.story.people):
        request = contacts_pb2.ExplainContactRequest(name=f"apps/{played.app}/contacts/p{person}", retarget=question)
        told = await played.client.contacts.ExplainContact(request)
        missed = [Explanation.Check.Name(step.check) for step in told.steps if not step.passed]
        is_messaged = told.decision == Explanation.WOULD_BE_MESSAGED
        assert is_messaged == (reasons.get(person) == "AUDIENCE"), told
        assert set(missed[:1]) <= CHECKS.get(reasons.get(person, ""), {"IN_AUDIENCE", "RECIPIENT_OF_SOURCE"}), told


async def compare_recheck(played: Played, oracle: Oracle, selection: Selection) -> None:
    """Asked again before sending, in two batches, everybody of the app gets the same answer."""
    numbers = np.arange(played.story.people) + played.story.offset
    types = played.world.core.registry.types
    async with transaction(played.world.core.engine) as conn:
        recheck = await Recheck.prepare(conn, played.campaigns[0].app_id, types, understand(selection), numbers)
        matching = set()
        for batch in (numbers[::2], numbers[1::2]):
            are_matching = await recheck.find_matching(conn, batch)
            matching |= set((batch[are_matching] - played.story.offset).tolist())
    assert matching == oracle.match(selection)


def understand(selection: Selection) -> selections.Selection:
    """A selection as the server has it."""
    if parts := list_parts(selection):
        operator: Any = selection.WhichOneof("combination")
        return selections.Combination(operator, tuple(understand(part) for part in parts))
    return selections.Question(
        selection.source.rpartition("/")[2],
        selection.action,
        tuple(selection.reason_codes),
        tuple(selection.reason_classes),
        include_apart=selection.include_apart,
        leave_out_pending=selection.leave_out_pending,
    )


async def compare_frozen(played: Played, selection: Selection, channel: str, expected: set[int]) -> None:
    """A wave that is frozen now has exactly these people, and the same people have the same checksum."""
    request = retargeting_pb2.CreateRetargetRequest(
        selection=selection, channel=channel, evaluation=campaigns_pb2.Audience.AT_CREATION, allow_duplicate=True
    )
    drafts = [await played.client.retargeting.CreateRetarget(request) for _ in range(2)]
    assert drafts[0].audience.retarget == selection
    assert len({draft.audience.frozen.checksum for draft in drafts}) == 1
    for draft in drafts:
        assert draft.audience.frozen.count == len(expected)
        listed = await played.client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=draft.name))
        assert {int(recipient.contact.rpartition("/p")[2]) for recipient in listed.recipients} == expected
        await played.client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=draft.name))
