"""The audit log: who changed what, written in the transaction that changed it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.tables import audit_entries


@dataclass(frozen=True)
class Entry:
    """One change."""

    entry_id: int
    time: datetime
    actor: str
    """A user of the console (``users/ana@example.com``) or a key (``apiKeys/0123456789ab``)."""
    method: str
    """As in ``Campaigns/LaunchCampaign``."""
    resource: str


async def record_entry(conn: AsyncConnection, app_id: int, actor: str, method: str, resource: str) -> None:
    """Write a change down."""
    await conn.execute(insert(audit_entries).values(app_id=app_id, actor=actor, method=method, resource=resource))


async def list_entries(conn: AsyncConnection, app_id: int, before: int | None, limit: int) -> list[Entry]:
    """Newest first, those before the entry with this number."""
    columns = audit_entries.c
    statement = (
        select(columns.entry_id, columns.time, columns.actor, columns.method, columns.resource)
        .where(columns.app_id == app_id)
        .order_by(columns.entry_id.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(columns.entry_id < before)
    return [Entry(**row._mapping) for row in await conn.execute(statement)]
