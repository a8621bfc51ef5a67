"""Copies of rolls and receipts in this process's memory, so that the next question reads only what has changed.

A roll is written once, and a row of receipts has a version that PostgreSQL keeps anyway: the transaction that wrote it. What
is answered is therefore what the caller's transaction sees, exactly, whatever was kept: the versions are read each time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.kept import Kept
from aftertouch.rolls.chunks import CHUNK_BYTES, Bits, Numbers, count_chunks
from aftertouch.rolls.sql import ReadBits, Sight, read_bits, read_roll, read_sight, read_versions
from aftertouch.store.campaigns import Campaign

_MOST_BYTES = 256 * 1024 * 1024
"""A decoded roll takes 8 bytes a person, a kind of receipts an eighth of a byte: three campaigns to ten million people."""
_OBJECT_BYTES = 500
"""That a roll, or a kind of receipts, takes beside that, though nobody be in it."""


@dataclass(frozen=True)
class _Receipts:
    """One kind of a campaign: bits over the whole roll, and the version of each chunk of them. Never changed in place."""

    versions: NDArray[np.uint32]
    bits: Bits
    sight: Sight | None = None
    """Of the snapshot by which it was last found to be true; None when it was read outside of any."""


class Copies:
    """What was read of campaigns, the least recently used forgotten first."""

    def __init__(self, most_bytes: int = _MOST_BYTES) -> None:
        self._rolls: Kept[int, Numbers] = Kept(most_bytes, lambda roll: _OBJECT_BYTES + roll.nbytes)
        self._receipts: Kept[int, dict[int, _Receipts]] = Kept(most_bytes, _weigh)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._rolls.weight + self._receipts.weight

    async def read_roll(self, conn: AsyncConnection, campaign: Campaign) -> Numbers:
        """The contact numbers of a campaign's people, in the order of positions; kept once they cannot change any more."""
        if campaign.launch_time is None:
            return await read_roll(conn, campaign.campaign_id)
        roll = self._rolls.get(campaign.campaign_id)
        if roll is None:
            roll = await read_roll(conn, campaign.campaign_id)
            self._rolls.put(campaign.campaign_id, roll)
        return roll

    async def read_receipts(
        self, conn: AsyncConnection, campaign: Campaign, kinds: Collection[int] | None = None
    ) -> dict[int, Bits]:
        """The bits of these kinds, or of all that there are, by position, in whole chunks, as the transaction sees them."""
        chunks = count_chunks(campaign.recipients)
        kept = self._receipts.get(campaign.campaign_id) or {}
        empty = _Receipts(np.zeros(chunks, np.uint32), np.zeros(chunks * CHUNK_BYTES, np.uint8))
        sight = await read_sight(conn)
        since = _find_since(sight, [kept.get(kind, empty).sight for kind in kinds]) if kinds else None
        known = {kind: copy.versions for kind, copy in kept.items()}
        versions = await read_versions(conn, campaign.campaign_id, kinds, chunks, known, since)
        stale = {kind: np.flatnonzero(seen != kept.get(kind, empty).versions) for kind, seen in versions.items()}
        # A row that is not there is not read: this transaction may have begun before another one's that left the copy.
        wanted = {kind: places[versions[kind][places] != 0] for kind, places in stale.items()}
        read = await read_bits(conn, campaign.campaign_id, campaign.recipients, wanted) if any(map(len, wanted.values())) else {}
        merged = await asyncio.to_thread(
            lambda: {kind: _merge(kept.get(kind, empty), places, read.get(kind)) for kind, places in stale.items() if len(places)}
        )
        found = {kind: kept.get(kind, empty) for kind in versions} | merged
        if sight:
            found = {kind: replace(copy, sight=sight) for kind, copy in found.items()}
        self._receipts.put(campaign.campaign_id, (self._receipts.get(campaign.campaign_id) or {}) | found)
        return {kind: receipts.bits for kind, receipts in found.items()}


def _weigh(kinds: Mapping[int, _Receipts]) -> int:
    """Bytes; kinds of which nobody has heard share theirs."""
    shared = {id(kind.bits): kind.bits.nbytes + kind.versions.nbytes for kind in kinds.values()}
    return _OBJECT_BYTES * (1 + len(kinds)) + sum(shared.values())


def _find_since(sight: Sight | None, kept: Sequence[Sight | None]) -> int | None:
    """The transaction from which on rows may differ from copies that were true by these sights; None where all may.

    Once whatever was under way at a snapshot is over, a later one sees all that it saw; a row that is new since was written by a
    transaction that the snapshot did not see, and so not before its first. No row of receipts is ever deleted.
    """
    seen = [one for one in kept if one is not None]
    if sight is None or len(seen) < len(kept) or sight.first < max(one.end for one in seen):
        return None
    since = min(one.first for one in seen)
    # Transactions further apart than half the circle cannot be told earlier from later.
    return since if sight.end - since < 1 << 31 else None


def _merge(kept: _Receipts, stale: Numbers, new: ReadBits | None) -> _Receipts:
    versions, bits = kept.versions.copy(), kept.bits.copy()
    versions[stale] = 0
    bits.reshape(-1, CHUNK_BYTES)[stale] = 0
    if new is not None:
        versions[new.chunks] = new.versions
        bits.reshape(-1, CHUNK_BYTES)[new.chunks] = new.bits
    return _Receipts(versions, bits)
