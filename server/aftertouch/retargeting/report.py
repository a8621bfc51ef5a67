"""What is known of a campaign's recipients: counts of every signal and reason, and the people one by one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import UNCLEAR, ChannelType
from aftertouch.retargeting.copies import Copies
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, CHUNK_BYTES, count_bits, count_chunks, slot_of
from aftertouch.rolls.sql import read_receipts, read_roll_chunk
from aftertouch.signals import CORE_IMPLICATIONS, close_implications, parse
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
        true = {signal: np.zeros(len(roll), np.bool_) for signal in evidence}
        reasons: list[list[str]] = [[] for _ in roll]
        receipts = await read_receipts(conn, slot)
        # Read afterwards, as above.
        numbered = await load_kinds(conn)
        for number, bits in receipts.items():
            kind = numbered[number]
            flags = np.unpackbits(bits)[first:last].astype(np.bool_)
            for signal, proving in evidence.items():
                if kind.signal in proving:
                    true[signal] |= flags
            if kind.signal in REASONED and kind.reason:
                for index in np.flatnonzero(flags).tolist():
                    reasons[index].append(kind.reason)
        for index, number in enumerate(roll.tolist()):
            signals = sorted(signal for signal, flags in true.items() if flags[index])
            people.append(Recipient(external_ids.get(number, ""), signals, sorted(reasons[index])))
    return people
