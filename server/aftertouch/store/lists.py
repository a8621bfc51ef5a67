"""Lists: named contact sets. The row has the name; the members are bits by contact number, as every contact set.

Changes of one list wait for each other by its row, so that what they count is exact; an erased contact leaves all lists by
itself, as it leaves all contact sets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import AlreadyExists
from aftertouch.rolls.sql import add_to_set, count_sets, drop_set, remove_from_set
from aftertouch.store.contacts import find_numbers
from aftertouch.store.tables import campaigns, lists

PREFIX = "list/"
"""Of the names of lists' contact sets; no standing is called so."""


@dataclass(frozen=True)
class ContactList:
    """A named set of contacts."""

    list_id: int
    app_id: int
    list: str
    display_name: str
    create_time: datetime
    update_time: datetime

    @property
    def set_name(self) -> str:
        """The name of its contact set: by number, so that a list of the same name that is made later begins empty."""
        return f"{PREFIX}{self.list_id}"


def _list(row: Row[Any]) -> ContactList:
    return ContactList(**row._mapping)


async def create_list(conn: AsyncConnection, app_id: int, name: str, display_name: str) -> ContactList:
    """Make an empty list.

    Raises:
        AlreadyExists: its id is taken.
    """
    values = {"app_id": app_id, "list": name, "display_name": display_name}
    try:
        async with conn.begin_nested():
            return _list((await conn.execute(insert(lists).values(values).returning(lists))).one())
    except IntegrityError as error:
        raise AlreadyExists(f"lists/{name}") from error


async def count_lists(conn: AsyncConnection, app_id: int) -> int:
    """How many lists an app has."""
    return (await conn.execute(select(func.count()).where(lists.c.app_id == app_id))).scalar_one()


async def find_list(
    conn: AsyncConnection, app_id: int, name: str, *, lock: bool = False, hold: bool = False
) -> ContactList | None:
    """The list of this id.

    Args:
        lock: nobody else changes or deletes it until the transaction ends.
        hold: nobody deletes it until the transaction ends.
    """
    statement = select(lists).where(lists.c.app_id == app_id, lists.c.list == name)
    if lock or hold:
        statement = statement.with_for_update(read=not lock)
    row = (await conn.execute(statement)).one_or_none()
    return _list(row) if row else None


async def list_lists(conn: AsyncConnection, app_id: int, before: int | None, limit: int) -> list[ContactList]:
    """Newest first, those made before the list with this number."""
    statement = select(lists).where(lists.c.app_id == app_id).order_by(lists.c.list_id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(lists.c.list_id < before)
    return [_list(row) for row in await conn.execute(statement)]


async def count_members(conn: AsyncConnection, app_id: int, found: Sequence[ContactList]) -> dict[int, int]:
    """How many contacts are in each of these lists, by its number."""
    counts = await count_sets(conn, app_id, [one.set_name for one in found])
    return {one.list_id: counts.get(one.set_name, 0) for one in found}


async def find_waiting_campaign(conn: AsyncConnection, app_id: int, name: str) -> str | None:
    """The id of a campaign that is for this list and was not launched yet."""
    row = await conn.execute(
        select(campaigns.c.campaign)
        .where(
            campaigns.c.app_id == app_id,
            campaigns.c.state.in_(("DRAFT", "SCHEDULED")),
            campaigns.c.audience["kind"].astext == "list",
            campaigns.c.audience["list"].astext == name,
        )
        .limit(1)
    )
    return row.scalar()


async def delete_list(conn: AsyncConnection, found: ContactList) -> None:
    """Delete a list with its members. The caller holds its lock."""
    await drop_set(conn, found.app_id, found.set_name)
    await conn.execute(delete(lists).where(lists.c.list_id == found.list_id))


@dataclass(frozen=True)
class Addition:
    """What became of contacts that were to be added to a list."""

    added: int
    present: int
    unknown: list[int]
    """Places of external_ids that nobody has."""


async def add_members(conn: AsyncConnection, found: ContactList, external_ids: Sequence[str]) -> Addition:
    """Add contacts to a list. The caller holds its lock."""
    numbers = await find_numbers(conn, found.app_id, external_ids, hold=True)
    unknown = [place for place, external_id in enumerate(external_ids) if external_id not in numbers]
    added = 0
    if numbers:
        added = await add_to_set(conn, found.app_id, found.set_name, np.array(sorted(numbers.values()), np.int64))
    if added:
        await _touch(conn, found)
    return Addition(added, len(external_ids) - len(unknown) - added, unknown)


async def remove_members(conn: AsyncConnection, found: ContactList, external_ids: Sequence[str]) -> int:
    """Take contacts out of a list, and return how many were in it. The caller holds its lock."""
    numbers = await find_numbers(conn, found.app_id, external_ids)
    if not numbers:
        return 0
    removed = await remove_from_set(conn, found.app_id, found.set_name, np.array(sorted(numbers.values()), np.int64))
    if removed:
        await _touch(conn, found)
    return removed


async def _touch(conn: AsyncConnection, found: ContactList) -> None:
    await conn.execute(update(lists).where(lists.c.list_id == found.list_id).values(update_time=func.now()))
