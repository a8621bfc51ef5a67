"""Kinds: a signal with its reason as one small number, so that events and receipts are rows of fixed size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.signals import PRICED
from aftertouch.store.tables import kinds

MOST_KINDS = 10_000
"""Those beyond are stored as the rest of their class, so that nobody can flood the table."""
_FROM_OUTSIDE = frozenset({"failed", "clicked", PRICED})
"""Signals whose reasons are somebody's to make up. Those of our own are few, and two of them are never the same."""
_MAKING = 5
"""The class of the advisory lock on making some; ``campaigns`` has 1 and 2, ``contacts`` 3, ``users`` 4."""
OTHER = "other"
"""The code of whatever has a reason that was met after too many others."""


class Kind(NamedTuple):
    """A signal and, for a failure or a skip, why; a tuple, since one is made and looked up for every message."""

    signal: str
    reason_class: str = ""
    reason_code: str = ""

    @property
    def reason(self) -> str:
        """As it is shown: ``recipient_gone/30005``; empty without a reason."""
        return f"{self.reason_class}/{self.reason_code}" if self.reason_class else ""

    @property
    def rest(self) -> Kind:
        """What it is stored as when there are too many; what does not come from outside, as itself."""
        return Kind(self.signal, self.reason_class, OTHER) if self.signal in _FROM_OUTSIDE and self.reason_class else self


async def load_kinds(conn: AsyncConnection) -> dict[int, Kind]:
    """All kinds by their number: a few hundred rows, unless somebody makes up reasons."""
    rows = await conn.execute(select(kinds.c.kind, kinds.c.signal, kinds.c.reason_class, kinds.c.reason_code))
    return {row.kind: Kind(row.signal, row.reason_class, row.reason_code) for row in rows}


async def intern_kinds(conn: AsyncConnection, wanted: Iterable[Kind]) -> dict[Kind, int]:
    """The numbers of all kinds, these among them, made where they are new, or the rest of their class where it is too many."""
    wanted = set(wanted)
    numbers = await _number_kinds(conn)
    if not numbers.keys() >= wanted:
        # One after the other, or each would fill the room that is left.
        await conn.execute(select(func.pg_advisory_xact_lock(_MAKING, 0)))
        numbers = await _number_kinds(conn)
        new = sorted(wanted - numbers.keys())
        room = max(MOST_KINDS - len(numbers), 0)
        made = {*new[:room], *(kind.rest for kind in new[room:])}
        rows = [{"signal": k.signal, "reason_class": k.reason_class, "reason_code": k.reason_code} for k in sorted(made)]
        if rows:
            await conn.execute(insert(kinds).values(rows).on_conflict_do_nothing())
            numbers = await _number_kinds(conn)
    return numbers


async def _number_kinds(conn: AsyncConnection) -> dict[Kind, int]:
    return {kind: number for number, kind in (await load_kinds(conn)).items()}
