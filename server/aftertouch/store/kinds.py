"""Kinds: a signal with its reason as one small number, so that events and receipts are rows of fixed size."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.tables import kinds

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


async def load_kinds(conn: AsyncConnection) -> dict[int, Kind]:
    """All kinds by their number: a few hundred rows at most."""
    rows = await conn.execute(select(kinds.c.kind, kinds.c.signal, kinds.c.reason_class, kinds.c.reason_code))
    return {row.kind: Kind(row.signal, row.reason_class, row.reason_code) for row in rows}


async def intern_kinds(conn: AsyncConnection, wanted: Iterable[Kind]) -> dict[Kind, int]:
    """The numbers of all kinds, these among them, made where they are new."""
    rows = [{"signal": k.signal, "reason_class": k.reason_class, "reason_code": k.reason_code} for k in sorted(set(wanted))]
    if rows:
        await conn.execute(insert(kinds).values(rows).on_conflict_do_nothing())
    return {kind: number for number, kind in (await load_kinds(conn)).items()}
