"""The daily partitions of the logs: made ahead, because an insert without a partition fails, and dropped when they are old."""

from __future__ import annotations

from datetime import date, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

LOGS = ("events", "attempts")
DAYS_AHEAD = 7
"""So the logs go on for a week in which no housekeeping runs."""


def name_partition(log: str, day: date) -> str:
    """The table of one day."""
    return f"{log}_{day:%Y%m%d}"


async def lock_housekeeping(conn: AsyncConnection) -> None:
    """Be the only one who keeps house until the transaction ends: making partitions, IF NOT EXISTS does not hold between two."""
    await conn.execute(text("SELECT pg_advisory_xact_lock(hashtext('aftertouch housekeeping'))"))


async def create_partitions(conn: AsyncConnection, today: date) -> None:
    """Make the partitions of yesterday (clocks differ) and of the days ahead, where they are missing."""
    for log in LOGS:
        for offset in range(-1, DAYS_AHEAD + 1):
            day = today + timedelta(days=offset)
            await conn.execute(
                text(
                    f"CREATE TABLE IF NOT EXISTS {name_partition(log, day)} PARTITION OF {log}"
                    f" FOR VALUES FROM ('{day} 00:00+00') TO ('{day + timedelta(days=1)} 00:00+00')"
                )
            )


async def list_days(conn: AsyncConnection, log: str) -> list[date]:
    """The days of which there is a partition, ascending."""
    rows = await conn.execute(
        text("SELECT c.relname FROM pg_inherits JOIN pg_class AS c ON c.oid = inhrelid WHERE inhparent = to_regclass(:log)"),
        {"log": log},
    )
    return sorted(date.fromisoformat(row.relname.rpartition("_")[2]) for row in rows)


async def drop_partitions(conn: AsyncConnection, before: date) -> list[date]:
    """Drop the logs of all days before this one, and return those days. What was counted stays counted."""
    old = [(log, day) for log in LOGS for day in await list_days(conn, log) if day < before]
    # Days are looked through before the first is dropped, which has everybody wait who writes into the log.
    for log, day in old:
        last = f"(SELECT max(commit_id) FROM {name_partition(log, day)})" if log == "events" else "NULL"
        await conn.execute(text(f"INSERT INTO dropped_days VALUES ('{log}', '{day}', {last})"))
    for log, day in old:
        await conn.execute(text(f"DROP TABLE {name_partition(log, day)}"))
    return sorted({day for _, day in old})


async def read_last_dropped(conn: AsyncConnection) -> tuple[int, date] | None:
    """The newest event that is kept no longer, by its transaction, and the first day that is kept."""
    row = (
        await conn.execute(
            text("SELECT max(last_commit_id) AS commit_id, max(day) AS day FROM dropped_days WHERE log = 'events'")
        )
    ).one()
    return None if row.commit_id is None else (row.commit_id, row.day + timedelta(days=1))
