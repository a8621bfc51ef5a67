"""How fast messages may leave: the room that each limit has, shared by all workers, and how often each contact was messaged.

A limit is one time, ``free_time``: when it has room again (the generic cell rate algorithm). Taking room for n messages
moves it n intervals on, so any number of workers on any number of machines keep one pace without knowing each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import SLOT_SHIFT, Numbers, block_of, blocks_of
from aftertouch.store.engine import driver


async def take_room(
    conn: AsyncConnection, wanted: Mapping[str, timedelta], horizon: timedelta
) -> dict[str, tuple[bool, timedelta]]:
    """Take room in each of these limits that has some soon, and say whether it was taken and how long it is until then.

    Args:
        wanted: by limit, how long the messages fill it: their number by its interval; zero only asks when it has room.
        horizon: what has no room this soon is not taken.
    """
    if not wanted:
        return {}
    keys = sorted(wanted)
    pg = await driver(conn)
    # now() stands still in a transaction, so that the fill stays the same however long the row is waited for.
    rows = await pg.execute(
        "INSERT INTO paces AS p (key, free_time)"
        " SELECT key, now() + fill FROM unnest(%b::text[], %b::interval[]) AS new (key, fill)"
        " WHERE fill > interval '0' ORDER BY key"
        " ON CONFLICT (key) DO UPDATE SET"
        " free_time = greatest(p.free_time, clock_timestamp()) + (excluded.free_time - now())"
        " WHERE p.free_time <= clock_timestamp() + %b"
        " RETURNING key, free_time - clock_timestamp()",
        (keys, [wanted[key] for key in keys], horizon),
    )
    none = timedelta(0)
    room = {key: (True, max(until - wanted[key], none)) for key, until in await rows.fetchall()}
    others = [key for key in keys if key not in room]
    if others:
        rows = await pg.execute("SELECT key, free_time - clock_timestamp() FROM paces WHERE key = ANY(%b)", (others,))
        waits = dict(await rows.fetchall())
        for key in others:
            wait = max(waits.get(key, none), none)
            room[key] = (not wanted[key] and wait <= horizon, wait)
    return room


async def hold_limits(conn: AsyncConnection, holds: Mapping[str, timedelta]) -> None:
    """Give limits no room for a while, as a provider asked."""
    keys = sorted(holds)
    pg = await driver(conn)
    await pg.execute(
        "INSERT INTO paces AS p (key, free_time)"
        " SELECT key, clock_timestamp() + delay FROM unnest(%b::text[], %b::interval[]) AS new (key, delay) ORDER BY key"
        " ON CONFLICT (key) DO UPDATE SET free_time = greatest(p.free_time, excluded.free_time)",
        (keys, [holds[key] for key in keys]),
    )


async def forget_limits(conn: AsyncConnection) -> None:
    """Forget limits that have had room for long: a limit for every person would pile up."""
    pg = await driver(conn)
    await pg.execute("DELETE FROM paces WHERE free_time < now() - interval '1 minute'")


async def count_messages(conn: AsyncConnection, app_id: int, numbers: Numbers, most: int, window: timedelta) -> set[int]:
    """Count one more message to each of these contacts who had fewer than ``most`` within ``window``, and return those.

    The rows stay locked until the transaction ends, so two campaigns cannot both give somebody the last one.
    """
    if not len(numbers):
        return set()
    numbers = np.sort(numbers)
    pg = await driver(conn)
    rows = await pg.execute(
        "INSERT INTO contact_paces AS c (block, number, recent, full_until)"
        " SELECT block, number, ARRAY[now()], CASE WHEN %(most)s = 1 THEN now() + %(window)s END"
        " FROM unnest(%(blocks)s::bigint[], %(numbers)s::bigint[]) AS new (block, number) ORDER BY block, number"
        " ON CONFLICT (block, number) DO UPDATE SET (recent, full_until) ="
        " (SELECT kept || now(), CASE WHEN cardinality(kept) + 1 >= %(most)s"
        "  THEN (kept || now())[cardinality(kept) + 2 - %(most)s] + %(window)s END"
        "  FROM (SELECT ARRAY(SELECT sent FROM unnest(c.recent) AS sent WHERE sent > now() - %(window)s ORDER BY sent) AS kept)"
        "  AS recently)"
        " WHERE (SELECT count(*) FROM unnest(c.recent) AS sent WHERE sent > now() - %(window)s) < %(most)s"
        " RETURNING number",
        {
            "blocks": blocks_of(app_id, numbers).tolist(),
            "numbers": numbers.tolist(),
            "most": most,
            "window": window,
        },
    )
    return {number for (number,) in await rows.fetchall()}


_IS_FULL = "full_until IS NOT NULL AND (SELECT count(*) FROM unnest(recent) AS sent WHERE sent > now() - %(window)s) >= %(most)s"
"""Counted again, since what ``full_until`` says is by the cap of then."""


async def read_full_until(conn: AsyncConnection, app_id: int, number: int, most: int, window: timedelta) -> datetime | None:
    """Until when a contact has had ``most`` messages within ``window``; None for whom ``find_full`` does not find."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT recent[cardinality(recent) + 1 - %(most)s] + %(window)s FROM contact_paces"
        f" WHERE block = %(block)s AND number = %(number)s AND {_IS_FULL}",
        {"block": block_of(app_id, number), "number": number, "most": most, "window": window},
    )
    row = await rows.fetchone()
    return row[0] if row else None


async def find_full(
    conn: AsyncConnection, app_id: int, most: int, window: timedelta, blocks: Sequence[int] | None = None
) -> Numbers:
    """The contact numbers of those who had ``most`` messages within ``window``, by an index of those who were full when counted.

    Under a cap that was lowered since, who was not full by the old one is found with the next message.

    Args:
        blocks: only in these; in all of the app's otherwise.
    """
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT number FROM contact_paces"
        f" WHERE {'block = ANY(%(blocks)s::bigint[])' if blocks is not None else 'block >= %(first)s AND block < %(last)s'}"
        f" AND {_IS_FULL}",
        {
            "blocks": list(blocks or ()),
            "first": app_id << SLOT_SHIFT,
            "last": (app_id + 1) << SLOT_SHIFT,
            "most": most,
            "window": window,
        },
    )
    return np.array([number for (number,) in await rows.fetchall()], np.int64)
