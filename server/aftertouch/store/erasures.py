"""Erasing a contact: everything that leads to a person goes, and every count stays.

Rolls, receipts and the event log know a person by a contact number. Once nothing leads from the number to the person it is a
bare number, is never given out again, and may stay: so campaigns keep their totals, and receipts that are still to come find
their place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import block_of
from aftertouch.rolls.sql import clear_from_sets, lock_blocks
from aftertouch.store.engine import driver
from aftertouch.store.imports import forget_rejections
from aftertouch.store.lists import PREFIX
from aftertouch.store.partitions import list_days
from aftertouch.store.recipients import blank_attempts, blank_tests, find_places
from aftertouch.store.tables import campaigns, contact_ids, erasures

LATE = timedelta(days=1)
"""A message that was with its provider when the person was erased is on record within a minute, or when a database that
was away is back."""
SHORTEST_TEXT = 6
"""Characters of an address or a message id that are looked for in other texts: less is in too much."""


@dataclass(frozen=True)
class Erasure:
    """What was removed."""

    erase_time: datetime
    subscriptions: int
    lists: int
    audiences: int
    attempts: int
    unrecognized: int


async def erase_contact(conn: AsyncConnection, app_id: int, external_id: str) -> Erasure | None:
    """Erase a person; None when there is none of this external_id.

    Whoever changes the contact at the same time either commits first, and is erased with it, or finds nobody.
    """
    same = (contact_ids.c.app_id == app_id) & (contact_ids.c.external_id == external_id)
    number = (await conn.execute(select(contact_ids.c.number).where(same).with_for_update())).scalar()
    if number is None:
        return None
    block = block_of(app_id, number)
    await lock_blocks(conn, [block])
    pg = await driver(conn)
    deleted = await pg.execute(
        "DELETE FROM subscriptions WHERE block = %b AND number = %b RETURNING address, address_hash", (block, number)
    )
    held = await deleted.fetchall()
    days = await list_days(conn, "attempts")
    launched = await _list_sent_since(conn, app_id, datetime.combine(days[0], time(), UTC)) if days else []
    attempts, message_ids = await blank_attempts(conn, await find_places(conn, number, launched))
    tests, test_ids = await blank_tests(conn, app_id, [address_hash for _, address_hash in held])
    texts = {*message_ids, *test_ids, *_list_texts([address for address, _ in held])}
    sought = [text for text in texts if len(text) >= SHORTEST_TEXT]
    unrecognized = await _forget_unrecognized(conn, sought)
    await forget_rejections(conn, app_id, external_id, sought)
    await pg.execute("DELETE FROM contacts WHERE block = %b AND number = %b", (block, number))
    await pg.execute("DELETE FROM contact_paces WHERE block = %b AND number = %b", (block, number))
    sets = await clear_from_sets(conn, app_id, number)
    audiences = await pg.execute(
        "UPDATE campaigns SET audience = jsonb_set(audience, '{external_ids}', (audience->'external_ids') - %b::text),"
        " version = version + 1, update_time = now()"
        " WHERE app_id = %b AND audience->>'kind' = 'given_contacts' AND audience->'external_ids' ? %b",
        (external_id, app_id, external_id),
    )
    await pg.execute("DELETE FROM contact_ids WHERE app_id = %b AND external_id = %b", (app_id, external_id))
    row = await conn.execute(erasures.insert().values(app_id=app_id, number=number).returning(erasures.c.erase_time))
    return Erasure(
        row.scalar_one(),
        len(held),
        sum(name.startswith(PREFIX) for name in sets),
        audiences.rowcount,
        attempts + tests,
        unrecognized,
    )


async def list_erased(conn: AsyncConnection, app_id: int, within: timedelta) -> list[int]:
    """The contact numbers of those who were erased of late."""
    rows = await conn.execute(
        select(erasures.c.number).where(erasures.c.app_id == app_id, erasures.c.erase_time > func.now() - within)
    )
    return [row.number for row in rows]


async def blank_late_attempts(conn: AsyncConnection) -> int:
    """Remove what was recorded of messages that were with their provider when the person was erased; how many they were."""
    blanked = 0
    recent = select(erasures).where(erasures.c.erase_time > func.now() - LATE)
    for row in await conn.execute(recent):
        places = await find_places(conn, row.number, await _list_sent_since(conn, row.app_id, row.erase_time))
        count, _ = await blank_attempts(conn, places)
        blanked += count
    return blanked


async def _list_sent_since(conn: AsyncConnection, app_id: int, since: datetime) -> list[int]:
    """The campaigns of an app that were still being sent then, or were launched later."""
    rows = await conn.execute(
        select(campaigns.c.campaign_id).where(
            campaigns.c.app_id == app_id,
            campaigns.c.launch_time.is_not(None),
            func.coalesce(campaigns.c.finish_time, func.now()) >= since,
        )
    )
    return [row.campaign_id for row in rows]


async def _forget_unrecognized(conn: AsyncConnection, sought: Sequence[str]) -> int:
    """Delete the receipts that nobody understood and that have one of these texts in them."""
    pg = await driver(conn)
    deleted = await pg.execute(
        "DELETE FROM unrecognized_receipts AS u USING unnest(%b::text[]) AS sought (text)"
        " WHERE position(sought.text IN u.item) > 0",
        (list(sought),),
    )
    return deleted.rowcount


def _list_texts(value: Any) -> Iterator[str]:
    """Every text in an address; of a phone number its digits, since some providers leave out the plus sign or encode it."""
    match value:
        case str():
            yield value.removeprefix("+")
        case dict():
            for inner in value.values():
                yield from _list_texts(inner)
        case list():
            for inner in value:
                yield from _list_texts(inner)
