"""Chains: what a root and its waves did together, each person counted once.

Every campaign's bits are carried over to contact numbers, where the chain so far is one more set of bits: who is new is what is
not in it. Campaigns are taken in the order of their launch, one at a time, so that memory holds one of them and the chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import reduce

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.errors import ChainTooLong
from aftertouch.retargeting.audiences import decode_audience
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.history import find_evidence
from aftertouch.retargeting.intervals import find_difference_interval
from aftertouch.retargeting.matching import count_blocks
from aftertouch.retargeting.selections import Combination, Question, list_questions, root_of
from aftertouch.rolls.chunks import CHUNK_BYTES, Bits, count_bits, holdout_of, set_numbers, spread
from aftertouch.rolls.sql import read_roll
from aftertouch.signals import PRICED
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, list_chain
from aftertouch.store.kinds import OTHER, Kind, load_kinds

MOST_CAMPAIGNS = 200
"""In one report."""
REACHED = ""
"""Stands among signals for whoever a message is known to have reached: no signal is called so."""

_ARRIVED = ("delivered", "confirmed")
"""The words in which channels say that a message arrived. That a link was followed says it of nobody: filters look at links."""

_Truths = Mapping[str, Bits]
"""Of whom each signal, and ``REACHED``, is true, by contact number."""


@dataclass(frozen=True)
class Tally:
    """How many people."""

    recipients: int = 0
    signals: Mapping[str, int] = field(default_factory=dict)
    """With ``REACHED``; those of nobody are left out."""


@dataclass(frozen=True)
class Cost:
    """What providers took for messages."""

    amount: Decimal
    recipients: int
    """Whose messages have a price; of the others it is not known."""


Costs = Mapping[str, Cost]
"""By currency, sorted."""


@dataclass(frozen=True)
class Link:
    """A campaign of a chain."""

    campaign: Campaign
    sources: tuple[str, ...]
    """Ids of the campaigns that it asks."""
    people: Tally
    added: Tally
    """Of them, those of whom the same was true in no campaign before."""
    costs: Costs


@dataclass(frozen=True)
class Difference:
    """A share of a campaign's recipients, less that of its holdout."""

    signal: str
    recipients: int
    """Of whom it is true, over the whole chain."""
    held_out: int
    difference: float
    lower: float
    upper: float


@dataclass(frozen=True)
class Comparison:
    """A campaign's recipients beside its holdout."""

    campaign: Campaign
    differences: Sequence[Difference]


@dataclass(frozen=True)
class Report:
    """What a chain did."""

    links: Sequence[Link]
    people: Tally
    costs: Costs
    """Of all campaigns; who is in several counts in each."""
    comparisons: Sequence[Comparison]


async def find_chain(conn: AsyncConnection, app: App, campaign: Campaign) -> list[Campaign]:
    """The campaigns of the chain of a campaign: the root, the launched ones by the time of their launch, then the others.

    Raises:
        ChainTooLong: they are more than a report holds.
    """
    found = await list_chain(conn, root_of(campaign), MOST_CAMPAIGNS + 1)
    if len(found) > MOST_CAMPAIGNS:
        raise ChainTooLong(f"{app.name}/campaigns/{campaign.campaign}", MOST_CAMPAIGNS)
    return found


async def report_chain(
    conn: AsyncConnection, copies: Copies, channels: Mapping[str, ChannelType], campaigns: Sequence[Campaign]
) -> Report:
    """Count a chain, whose campaigns are given in order."""
    blocks = await count_blocks(conn, campaigns[0].app_id)
    everybody = nobody = np.zeros(blocks * CHUNK_BYTES, np.uint8)
    known: dict[str, Bits] = {}
    links = []
    for campaign in campaigns:
        people = added = Tally()
        costs: Costs = {}
        if campaign.launch_time is not None:
            members, truths, costs = await _read_truths(conn, copies, channels, campaign, blocks)
            before = {name: known.get(name, nobody) for name in truths}
            people = _count(members, truths)
            added = _count(members & ~everybody, {name: bits & ~before[name] for name, bits in truths.items()})
            everybody = everybody | members
            known |= {name: bits | before[name] for name, bits in truths.items()}
        links.append(Link(campaign, _list_sources(campaign), people, added, costs))
    comparisons = [await _compare(conn, copies, campaign, known, blocks) for campaign in campaigns if campaign.holdout_count]
    costs = _add_up(item for link in links for item in link.costs.items())
    return Report(links, _count(everybody, known), costs, comparisons)


async def _read_truths(
    conn: AsyncConnection, copies: Copies, channels: Mapping[str, ChannelType], campaign: Campaign, blocks: int
) -> tuple[Bits, _Truths, Costs]:
    """A campaign's people, what is true of them, and what their messages cost."""
    evidence = find_evidence(channels, campaign)
    proving = {**evidence, REACHED: frozenset[str]().union(*(evidence.get(signal, ()) for signal in _ARRIVED))}
    wanted = frozenset((PRICED,)).union(*proving.values())
    numbered = await load_kinds(conn)
    roll = await copies.read_roll(conn, campaign)
    found = await copies.read_receipts(conn, campaign, [number for number, kind in numbered.items() if kind.signal in wanted])

    def carry_over() -> tuple[Bits, _Truths, Costs]:
        truths = {}
        for name, signals in proving.items():
            parts = [bits for number, bits in found.items() if numbered[number].signal in signals and bits.any()]
            if parts:
                truths[name] = spread(reduce(np.bitwise_or, parts), roll, blocks)
        prices = [(numbered[number], bits) for number, bits in found.items() if numbered[number].signal == PRICED and bits.any()]
        return set_numbers(roll, blocks), truths, _add_up(_price(kind, count_bits(bits)) for kind, bits in prices)

    return await asyncio.to_thread(carry_over)


def _price(kind: Kind, people: int) -> tuple[str, Cost]:
    """What so many people's messages cost together."""
    if kind.reason_code == OTHER:
        # Of more prices than are told apart.
        return kind.reason_class, Cost(Decimal(), 0)
    return kind.reason_class, Cost(Decimal(kind.reason_code) * people, people)


def _add_up(costs: Iterable[tuple[str, Cost]]) -> Costs:
    sums: dict[str, Cost] = {}
    for currency, cost in costs:
        so_far = sums.get(currency, Cost(Decimal(), 0))
        sums[currency] = Cost(so_far.amount + cost.amount, so_far.recipients + cost.recipients)
    return dict(sorted(sums.items()))


def _list_sources(campaign: Campaign) -> tuple[str, ...]:
    audience = decode_audience(campaign.audience) if campaign.audience else None
    if not isinstance(audience, Question | Combination):
        return ()
    return tuple(dict.fromkeys(question.source for question, _ in list_questions(audience)))


def _count(members: Bits, truths: _Truths) -> Tally:
    counts = {name: count_bits(bits) for name, bits in truths.items()}
    return Tally(count_bits(members), {name: count for name, count in sorted(counts.items()) if count})


async def _compare(conn: AsyncConnection, copies: Copies, campaign: Campaign, known: _Truths, blocks: int) -> Comparison:
    """A campaign's recipients beside its holdout, by what is true of each over the whole chain.

    Whoever was held out cannot do a thing in a campaign that they never got, but they may in the one that the chain began with:
    only what the others did beyond that was done by messaging them.
    """
    members = set_numbers(await copies.read_roll(conn, campaign), blocks)
    held_out = set_numbers(await read_roll(conn, holdout_of(campaign.campaign_id)), blocks)
    differences = []
    for signal, bits in sorted(known.items()):
        did, others_did = count_bits(bits & members), count_bits(bits & held_out)
        if did or others_did:
            compared = did, campaign.recipients, others_did, campaign.holdout_count
            lower, upper = find_difference_interval(*compared)
            share = did / campaign.recipients - others_did / campaign.holdout_count
            differences.append(Difference(signal, did, others_did, share, lower, upper))
    return Comparison(campaign, differences)
