"""Receipts counted in SQL, for tests to hold what the server counts against."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import slot_range


async def count_by_kind(conn: AsyncConnection, campaign_id: int) -> dict[int, int]:
    """How many people have each kind in a campaign."""
    start, end = slot_range(campaign_id)
    statement = "SELECT kind, sum(bit_count(bits))::bigint FROM receipts WHERE slot >= :start AND slot < :end GROUP BY kind"
    return {kind: count for kind, count in await conn.execute(text(statement), {"start": start, "end": end})}
