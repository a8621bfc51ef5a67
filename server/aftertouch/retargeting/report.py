"""What is known of a campaign's recipients: counts of every signal and reason, and the people one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import UNCLEAR, ChannelType
from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.matching import find_pending, leave_out
from aftertouch.rolls.chunks import (
    CHUNK,
    CHUNK_BITS,
    CHUNK_BYTES,
    Bits,
    Numbers,
    count_bits,
    count_chunks,
    find_members,
    pack_chunks,
    slot_of,
)
from aftertouch.rolls.sql import read_numbers, read_receipts, read_roll_chunk
from aftertouch.signals import CORE_IMPLICATIONS, Expression, close_implications, parse
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import find_external_ids
from aftertouch.store.kinds import Kind, load_kinds

CORE_EVIDENCE = close_implications(CORE_IMPLICATIONS)
"""What is known of a channel whose plugin is gone."""

REASONED = ("failed", "skipped", "clicked")
"""Signals whose reasons are told: why, and for a click, on which link."""


@dataclass(frozen=True)
class Counts:
    """People of a campaign by what is true of them."""

    signals: dict[str, int]
    """Implied ones included; signals of nobody are left out."""
    unclear: int
    """Tried, and no outcome is known (yet)."""
    reasons: list[tuple[Kind, int]]
    """Of failures, skips and clicks, most frequent first."""


@dataclass(frozen=True)
class Recipient:
    """One person of a campaign."""

    external_id: str
    signals: list[str]
    reasons: list[str]


async def count_campaign(conn: AsyncConnection, copies: Copies, campaign: Campaign, channel: ChannelType | None) -> Counts:
    """Count everything that is known of a launched campaign."""
    evidence = channel.evidence if channel else CORE_EVIDENCE
    bits = await copies.read_receipts(conn, campaign)
    # Read afterwards: a kind that is new since has its number by now.
    numbered = await load_kinds(conn)
    zeros = np.zeros(count_chunks(campaign.recipients) * CHUNK_BYTES, np.uint8)
    known = {
        signal: reduce(np.bitwise_or, [found for kind, found in bits.items() if numbered[kind].signal in proofs], zeros)
        for signal, proofs in evidence.items()
    }
    counts = {signal: count_bits(found) for signal, found in sorted(known.items())}
    unclear = parse(UNCLEAR.expression, evidence).evaluate(known.__getitem__)
    reasons = [
        (numbered[kind], count_bits(found))
        for kind, found in bits.items()
        if numbered[kind].signal in REASONED and numbered[kind].reason_class
    ]
    reasons.sort(key=lambda item: (-item[1], item[0]))
    return Counts({signal: count for signal, count in counts.items() if count}, count_bits(unclear), reasons)


async def list_recipients(
    conn: AsyncConnection, campaign: Campaign, channel: ChannelType | None, start: int, end: int
) -> list[Recipient]:
    """The people at the positions from ``start`` up to ``end`` of a campaign's roll."""
    evidence = channel.evidence if channel else CORE_EVIDENCE
    people: list[Recipient] = []
    end = min(end, campaign.recipients)
    for chunk in range(start >> CHUNK_BITS, (max(end, 1) - 1 >> CHUNK_BITS) + 1 if end > start else 0):
        slot = slot_of(campaign.campaign_id, chunk)
        first, last = max(start - chunk * CHUNK, 0), min(end - chunk * CHUNK, CHUNK)
        roll = (await read_roll_chunk(conn, slot))[first:last]
        external_ids = await find_external_ids(conn, campaign.app_id, roll)
        receipts = await read_receipts(conn, slot)
        # Read afterwards, as above.
        numbered = await load_kinds(conn)
        true = [(numbered[kind], np.unpackbits(bits)[first:last].view(np.bool_)) for kind, bits in receipts.items()]
        people += _describe(evidence, true, [external_ids.get(number, "") for number in roll.tolist()])
    return people


def _describe(
    evidence: Mapping[str, frozenset[str]], true: Sequence[tuple[Kind, NDArray[np.bool_]]], external_ids: Sequence[str]
) -> list[Recipient]:
    """Recipients, from who they are and of which of them each kind is true."""
    known = {signal: np.zeros(len(external_ids), np.bool_) for signal in evidence}
    reasons: list[list[str]] = [[] for _ in external_ids]
    for kind, flags in true:
        for signal, proving in evidence.items():
            if kind.signal in proving:
                known[signal] |= flags
        if kind.signal in REASONED and kind.reason:
            for index in np.flatnonzero(flags).tolist():
                reasons[index].append(kind.reason)
    return [
        Recipient(external_id, sorted(signal for signal, flags in known.items() if flags[index]), sorted(reasons[index]))
        for index, external_id in enumerate(external_ids)
    ]


@dataclass(frozen=True)
class Wanted:
    """Which recipients are wanted: those who meet everything that is set."""

    signal: str = ""
    reason: str = ""
    """As it is shown, ``recipient_gone/30005``; with a signal, as a reason of that."""
    action: str = ""
    is_apart: bool = False
    """Whom the action counts apart, instead of those who match."""
    is_pending: bool = False
    """Of whom nothing was heard since their message was sent."""


@dataclass(frozen=True)
class Group:
    """Recipients who are wanted, and what was known of everybody when they were found."""

    campaign: Campaign
    evidence: Mapping[str, frozenset[str]]
    true: Sequence[tuple[Kind, Bits]]
    """By position, over the whole roll, like ``positions``."""
    positions: Bits

    async def read(self, conn: AsyncConnection, positions: Numbers) -> list[Recipient]:
        """The people at these positions, ascending."""
        numbers = await read_numbers(conn, self.campaign.campaign_id, positions)
        external_ids = await find_external_ids(conn, self.campaign.app_id, numbers)
        true = [(kind, find_members(bits, positions)) for kind, bits in self.true]
        return _describe(self.evidence, true, [external_ids.get(number, "") for number in numbers.tolist()])


async def find_group(
    conn: AsyncConnection, copies: Copies, campaign: Campaign, channel: ChannelType | None, wanted: Wanted, path: str
) -> Group:
    """The recipients who are wanted, as the transaction sees them.

    Args:
        path: to what is wanted, for errors.

    Raises:
        FieldsInvalid: the channel has no such signal or action.
        NotFound: the channel is no longer installed, and alone knows who is wanted.
    """
    evidence = channel.evidence if channel else CORE_EVIDENCE
    asked = _express(campaign, channel, evidence, wanted, path)
    receipts = await copies.read_receipts(conn, campaign)
    # Read afterwards, as above.
    numbered = await load_kinds(conn)
    true = [(numbered[number], bits) for number, bits in receipts.items() if numbered[number].signal in {*evidence, *REASONED}]

    def join(is_meant: Callable[[Kind], bool]) -> Bits:
        nobody = np.zeros(count_chunks(campaign.recipients) * CHUNK_BYTES, np.uint8)
        return reduce(np.bitwise_or, [bits for kind, bits in true if is_meant(kind)], nobody)

    def find() -> Group:
        found = pack_chunks(np.ones(campaign.recipients, np.bool_))
        for expression in asked:
            found &= expression.evaluate(lambda signal: join(lambda kind: kind.signal in evidence[signal]))
        if wanted.reason:
            signals = (wanted.signal,) if wanted.signal else REASONED
            found &= join(lambda kind: kind.signal in signals and kind.reason == wanted.reason)
        # Kept for as long as a caller takes: what is true of none of them is not.
        return Group(campaign, evidence, [(kind, bits) for kind, bits in true if (bits & found).any()], found)

    return await asyncio.to_thread(find)


def _express(
    campaign: Campaign, channel: ChannelType | None, evidence: Mapping[str, frozenset[str]], wanted: Wanted, path: str
) -> list[Expression]:
    """What has to be true of those who are wanted, but for their reason."""
    if wanted.signal and wanted.signal not in evidence:
        text = f"{campaign.channel} has no signal {wanted.signal!r}; it has {', '.join(sorted(evidence))}"
        raise FieldsInvalid([Violation(f"{path}.signal", text)])
    asked = [Expression("name", name=wanted.signal)] if wanted.signal else []
    if not (wanted.action or wanted.is_apart or wanted.is_pending):
        return asked
    if channel is None:
        raise NotFound(f"channels/{campaign.channel}")
    if wanted.is_pending:
        asked.append(find_pending(channel))
    if wanted.action or wanted.is_apart:
        compiled = channel.actions.get(wanted.action)
        if compiled is None:
            text = f"{campaign.channel} has no action {wanted.action!r}; it has {', '.join(channel.actions)}"
            raise FieldsInvalid([Violation(f"{path}.action", text)])
        if wanted.is_apart and compiled.apart is None:
            raise FieldsInvalid([Violation(f"{path}.apart", f"{wanted.action} counts nobody apart")])
        asked.append(compiled.apart if wanted.is_apart and compiled.apart else leave_out(compiled.expression, compiled.apart))
    return asked
