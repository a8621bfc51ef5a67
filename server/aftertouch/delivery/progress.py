"""Where each person of a work unit stands, from the receipts.

Bits are only ever set, so each try has its own pair: a person's tries are their ``attempted`` bits, and when as many are
``refused``, the next may begin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.delivery.outcomes import MOST_TRIES
from aftertouch.rolls.chunks import Numbers
from aftertouch.rolls.sql import read_receipts
from aftertouch.store.kinds import load_kinds


@dataclass(frozen=True)
class Progress:
    """Where each person of a unit stands, by position within the slot."""

    tries: Numbers
    refusals: Numbers
    is_done: NDArray[np.bool_]

    def find_todo(self, *, idempotent: bool) -> Numbers:
        """Who is to be sent to now."""
        may_try = self.tries == self.refusals
        if idempotent:
            # Refusals have an end of their own; what counts here is how often nobody knows, as after a crash.
            may_try |= self.tries - self.refusals < MOST_TRIES
        return np.flatnonzero(~self.is_done & may_try)

    def find_unclear(self) -> Numbers:
        """Who was attempted and nobody knows whether the message was taken."""
        return np.flatnonzero(~self.is_done & (self.tries > self.refusals))


async def read_progress(conn: AsyncConnection, channel_type: ChannelType | None, slot: int, members: int) -> Progress:
    """Where the people of a slot stand.

    Args:
        channel_type: None for a channel that is not installed any more, of which only our own signals are known.
    """
    by_kind = await read_receipts(conn, slot)
    numbered = await load_kinds(conn)
    over = {"sent", "failed", "skipped"}
    if channel_type is not None:
        over |= channel_type.evidence["sent"] | channel_type.evidence["failed"]

    def add_up(signals: set[str]) -> Numbers:
        total = np.zeros(members, np.int64)
        for number, bits in by_kind.items():
            if numbered[number].signal in signals:
                total += np.unpackbits(bits)[:members]
        return total

    return Progress(add_up({"attempted"}), add_up({"refused"}), add_up(over) > 0)
