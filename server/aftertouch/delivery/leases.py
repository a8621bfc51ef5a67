"""The lease of a work unit, as its holder sees it: until when this process may act on it, by its own clock."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from aftertouch.store.units import Unit

LEASE = timedelta(seconds=20)
"""After a crash a unit rests this long. Renewed by every batch and by the worker's heartbeat."""
HEARTBEAT_SECONDS = 4.0
"""A worker has to miss five before its units are taken over."""
_MARGIN = 2.0
"""Seconds at the end of a lease in which nothing is begun."""


@dataclass(eq=False)
class Lease:
    """A claimed unit, and until when it is surely ours."""

    unit: Unit
    claimed_at: float
    """By ``time.monotonic``, from before the lease was asked for: at worst it ends early here."""
    unclear_since: datetime | None = None
    """When it was found that only people of unclear outcome are left; None while somebody is still sent to."""
    unsent: list[tuple[int, int]] = field(default_factory=list)
    """Positions in the unit, and tries, that may have been marked by a commit whose answer was lost: nothing was sent to them."""
    has_refused: bool = False
    """Somebody was refused by this holder, and so is to be tried again."""

    def __post_init__(self) -> None:
        self.unclear_since = self.unit.unclear_since

    def renew(self, asked_at: float) -> None:
        """The lease was prolonged by a statement that began at this time."""
        self.claimed_at = max(self.claimed_at, asked_at)

    @property
    def is_sure(self) -> bool:
        """False when somebody else may have taken the unit over: a process that was stopped for a minute sends nothing."""
        return time.monotonic() < self.claimed_at + LEASE.total_seconds() - _MARGIN
