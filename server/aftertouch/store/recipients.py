"""Recipients one by one: the places of a person on rolls, and what the receipts and the logs hold of each place.

Rolls are sorted and cut, so that finding somebody costs a look at each campaign's chunks and needs no row for each person;
that is why whoever asks says in which campaigns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

import numpy as np
import psycopg
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import SLOT_SHIFT, decode_numbers
from aftertouch.rolls.sql import read_roll_chunk
from aftertouch.store.contacts import find_subscribers
from aftertouch.store.engine import driver
from aftertouch.store.logs import TEST_ROW
from aftertouch.store.partitions import list_days

MOST_ROWS = 1_000
"""Of a log, for one person in one campaign."""


@dataclass(frozen=True)
class Place:
    """Where somebody stands on a roll."""

    slot: int
    position: int
    """Within the slot."""

    @property
    def campaign_id(self) -> int:
        """The campaign whose roll it is."""
        return self.slot >> SLOT_SHIFT


@dataclass(frozen=True)
class Logged:
    """An event of one person."""

    kind: int
    time: datetime
    arrive_time: datetime


@dataclass(frozen=True)
class Tried:
    """A message to one person that was handed to a provider."""

    kind: int
    message_id: str
    arrive_time: datetime


async def find_places(conn: AsyncConnection, number: int, campaign_ids: Sequence[int]) -> list[Place]:
    """The places of a contact number on the rolls of these campaigns, in their order; none where it is no recipient."""
    if not campaign_ids:
        return []
    cursor = (await driver(conn)).cursor(binary=True)
    # Nearly all chunks that merely span the number are sorted out here, instead of being sent, up to 32 kB each. Where a
    # chunk is bits, the number's is tested, which PostgreSQL counts from the low end of each byte. Where it is integers, the
    # number's offset from the first, as four bytes little-endian, is somewhere in them.
    await cursor.execute(
        "SELECT r.slot, r.first, r.members, r.numbers"
        " FROM unnest(%(campaigns)s::bigint[]) WITH ORDINALITY AS c (campaign_id, place)"
        " CROSS JOIN LATERAL (SELECT *, %(number)s::bigint - first AS d FROM rolls"
        f"  WHERE slot >= c.campaign_id << {SLOT_SHIFT} AND slot < (c.campaign_id + 1) << {SLOT_SHIFT}"
        "  AND first <= %(number)s AND last >= %(number)s) AS r"
        " WHERE CASE WHEN length(r.numbers) < 4 * r.members THEN get_bit(r.numbers, d # 7) = 1"
        " ELSE position(substring(int8send("
        "((d & 255) << 24) | (((d >> 8) & 255) << 16) | (((d >> 16) & 255) << 8) | ((d >> 24) & 255)) FROM 5) IN r.numbers) > 0"
        " END"
        " ORDER BY c.place",
        {"campaigns": list(campaign_ids), "number": number},
    )
    places = []
    for slot, *encoded in await cursor.fetchall():
        numbers = decode_numbers(*encoded)
        position = int(np.searchsorted(numbers, number))
        if position < len(numbers) and numbers[position] == number:
            places.append(Place(slot, position))
    return places


async def read_true_kinds(conn: AsyncConnection, places: Sequence[Place]) -> dict[Place, set[int]]:
    """The kinds that are true at each place."""
    true: dict[Place, set[int]] = defaultdict(set)
    if places:
        pg = await driver(conn)
        rows = await pg.execute(
            "SELECT p.slot, p.position, r.kind FROM unnest(%b::bigint[], %b::int[]) AS p (slot, position)"
            " JOIN receipts AS r ON r.slot = p.slot WHERE get_bit(r.bits, p.position) = 1",
            ([place.slot for place in places], [place.position for place in places]),
        )
        for slot, position, kind in await rows.fetchall():
            true[Place(slot, position)].add(kind)
    return true


async def read_logged(conn: AsyncConnection, place: Place, since: datetime, budget: timedelta) -> tuple[list[Logged], bool]:
    """The events of one place that arrived since a time, and whether all of the log was looked through.

    The log has no index by place, which every event would pay for; each day is looked through as a whole, the first days of a
    campaign first, until the time is spent.
    """
    pg = await driver(conn)
    found: list[Logged] = []
    now = datetime.now(UTC)
    days = [day for day in await list_days(conn, "events") if since.date() <= day <= now.date()]
    try:
        async with conn.begin_nested():
            for day in days:
                left = (now + budget - datetime.now(UTC)) // timedelta(milliseconds=1)
                await pg.execute("SELECT set_config('statement_timeout', %b, true)", (str(max(left, 1)),))
                rows = await pg.execute(
                    "SELECT kind, time, arrive_time FROM events WHERE arrive_time >= %b AND arrive_time < %b"
                    " AND slot = %b AND position = %b LIMIT %b",
                    (*_span(day), place.slot, place.position, MOST_ROWS - len(found)),
                )
                found += [Logged(*row) for row in await rows.fetchall()]
            await pg.execute("SET LOCAL statement_timeout TO DEFAULT")
        is_complete = True
    except psycopg.errors.QueryCanceled:
        is_complete = False
    return sorted(found, key=lambda event: (event.time, event.arrive_time, event.kind)), is_complete


def _span(day: date) -> tuple[datetime, datetime]:
    start = datetime.combine(day, time(), UTC)
    return start, start + timedelta(days=1)


async def find_by_message(conn: AsyncConnection, app_id: int, message_id: str) -> list[int]:
    """The contact numbers of an app's people who were sent the message that a provider gave this id, ascending.

    A test has no place on a roll; whoever has its address now is meant.
    """
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT DISTINCT slot, position, channel, address_hash FROM attempts WHERE message_id = %b AND message_id <> ''"
        " AND EXISTS (SELECT FROM campaigns WHERE app_id = %b AND campaign_id = slot >> %b) LIMIT %b",
        (message_id, app_id, SLOT_SHIFT, _MOST_OF_ONE_ID),
    )
    numbers: set[int] = set()
    for slot, position, channel, address_hash in await rows.fetchall():
        if position == TEST_ROW:
            numbers.update(s.number for s in await find_subscribers(conn, channel, address_hash, app_id))
        else:
            numbers.add(int((await read_roll_chunk(conn, slot))[position]))
    return sorted(numbers)


_MOST_OF_ONE_ID = 20
"""Messages that are looked at: a provider gives an id once, and another channel's might give the same."""


async def read_tried(conn: AsyncConnection, place: Place) -> list[Tried]:
    """The attempts of one place, by time."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT kind, message_id, arrive_time FROM attempts WHERE slot = %b AND position = %b ORDER BY arrive_time LIMIT %b",
        (place.slot, place.position, MOST_ROWS),
    )
    return [Tried(*row) for row in await rows.fetchall()]


async def read_last_tried(conn: AsyncConnection, places: Sequence[Place]) -> dict[Place, dict[bytes, datetime]]:
    """When each address of these places was messaged last, by its hash; nothing while the outcome is not on record."""
    last: dict[Place, dict[bytes, datetime]] = defaultdict(dict)
    if places:
        pg = await driver(conn)
        rows = await pg.execute(
            "SELECT a.slot, a.position, a.address_hash, max(a.arrive_time)"
            " FROM unnest(%b::bigint[], %b::int[]) AS p (slot, position)"
            " JOIN attempts AS a ON a.slot = p.slot AND a.position = p.position GROUP BY 1, 2, 3",
            ([place.slot for place in places], [place.position for place in places]),
        )
        for slot, position, address_hash, time in await rows.fetchall():
            last[Place(slot, position)][address_hash] = time
    return last


async def blank_attempts(conn: AsyncConnection, places: Sequence[Place]) -> tuple[int, list[str]]:
    """Remove addresses' hashes and message ids from the attempts of these places; how many there were, and the ids."""
    if not places:
        return 0, []
    slots, positions = [place.slot for place in places], [place.position for place in places]
    return await _blank(
        conn,
        "FROM unnest(%b::bigint[], %b::int[]) AS p (slot, position)"
        " JOIN attempts AS a ON a.slot = p.slot AND a.position = p.position WHERE a.address_hash <> '' OR a.message_id <> ''",
        (slots, positions),
    )


async def blank_tests(conn: AsyncConnection, app_id: int, hashes: Sequence[bytes]) -> tuple[int, list[str]]:
    """The same for test sends of an app, which have no place, to addresses with these hashes; of deleted drafts too."""
    return await _blank(
        conn,
        f"FROM attempts AS a WHERE a.position = {TEST_ROW} AND a.address_hash = ANY(%b)"
        " AND NOT EXISTS (SELECT FROM campaigns AS c WHERE c.campaign_id = a.slot >> %b AND c.app_id <> %b)",
        (list(hashes), SLOT_SHIFT, app_id),
    )


async def _blank(conn: AsyncConnection, wanted: str, parameters: Sequence[Any]) -> tuple[int, list[str]]:
    pg = await driver(conn)
    rows = await pg.execute(
        f"WITH held AS (SELECT a.tableoid, a.ctid, a.message_id {wanted} FOR UPDATE OF a)"
        " UPDATE attempts AS a SET address_hash = '', message_id = '' FROM held"
        " WHERE a.tableoid = held.tableoid AND a.ctid = held.ctid RETURNING held.message_id",
        parameters,
    )
    ids = [message_id for (message_id,) in await rows.fetchall()]
    return len(ids), [message_id for message_id in ids if message_id]
