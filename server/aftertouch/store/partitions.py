"""The daily partitions of the event log: made ahead of time, because an insert without a partition fails."""

from __future__ import annotations

from datetime import date, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

DAYS_AHEAD = 7
"""So the log goes on for a week in which no housekeeping runs."""


async def create_partitions(conn: AsyncConnection, today: date) -> None:
    """Make the partitions of yesterday (clocks differ) and of the days ahead, where they are missing."""
    for offset in range(-1, DAYS_AHEAD + 1):
        day = today + timedelta(days=offset)
        await conn.execute(
            text(
                f"CREATE TABLE IF NOT EXISTS events_{day:%Y%m%d} PARTITION OF events"
                f" FOR VALUES FROM ('{day} 00:00+00') TO ('{day + timedelta(days=1)} 00:00+00')"
            )
        )
