"""Activity: how many events of each kind happened in a campaign, minute by minute, added up while they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import SLOT_SHIFT, slot_of
from aftertouch.store.engine import driver


async def read_activity(
    conn: AsyncConnection, campaign_id: int, start: datetime, end: datetime, bucket: timedelta
) -> list[tuple[datetime, int, int]]:
    """The beginning, kind and count of each bucket from ``start`` that has events, by time."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT date_bin(%(bucket)s::interval, minute, %(start)s) AS bucket, kind, sum(events)::bigint FROM activity"
        " WHERE slot = %(slot)s AND minute >= %(start)s AND minute < %(end)s GROUP BY bucket, kind ORDER BY bucket, kind",
        {"bucket": bucket, "start": start, "end": end, "slot": slot_of(campaign_id, 0)},
    )
    return await rows.fetchall()


async def read_minutes(
    conn: AsyncConnection, campaign_ids: Sequence[int], kinds: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """How many events of these kinds happened: campaign, minute since 1970, kind and number each, by time."""
    pg = await driver(conn)
    rows = await pg.execute(
        f"SELECT slot >> {SLOT_SHIFT}, (extract(epoch FROM minute) / 60)::bigint, kind, events FROM activity"
        " WHERE slot = ANY(%b) AND kind = ANY(%b) ORDER BY slot, minute, kind",
        ([campaign_id << SLOT_SHIFT for campaign_id in campaign_ids], list(kinds)),
    )
    return await rows.fetchall()
