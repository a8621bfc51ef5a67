"""Files of contacts that came through the console: how far each is, and what became of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.engine import driver
from aftertouch.store.tables import contact_imports

KEPT_FOR = timedelta(days=7)
_BLANKS = "".join(filter(str.isspace, map(chr, range(0x3001))))
"""At the ends of an external_id each of them is refused; SQL would cut the space alone."""


@dataclass(frozen=True)
class ContactImport:
    """One file."""

    import_id: int
    file_name: str
    state: str
    problem: str
    read_count: int
    created_count: int
    updated_count: int
    rejected_count: int
    rejections: Sequence[Mapping[str, Any]]
    create_time: datetime
    update_time: datetime


_COLUMNS = [column for column in contact_imports.c if column.name != "app_id"]


async def create_import(conn: AsyncConnection, app_id: int, file_name: str) -> int:
    """Begin an import, and return its number."""
    statement = insert(contact_imports).values(app_id=app_id, file_name=file_name, state="RUNNING")
    return int((await conn.execute(statement.returning(contact_imports.c.import_id))).scalar_one())


async def update_import(conn: AsyncConnection, app_id: int, import_id: int, **values: Any) -> None:
    """Say how far an import is."""
    await conn.execute(
        update(contact_imports)
        .where(contact_imports.c.app_id == app_id, contact_imports.c.import_id == import_id)
        .values(update_time=func.now(), **values)
    )


async def find_import(conn: AsyncConnection, app_id: int, import_id: int) -> ContactImport | None:
    """The app's import of this number."""
    columns = contact_imports.c
    row = (await conn.execute(select(*_COLUMNS).where(columns.app_id == app_id, columns.import_id == import_id))).one_or_none()
    return ContactImport(**row._mapping) if row else None


async def forget_imports(conn: AsyncConnection) -> None:
    """Delete what is older than a week: rejected rows have people's ids in them."""
    await conn.execute(delete(contact_imports).where(contact_imports.c.create_time < func.now() - KEPT_FOR))


async def forget_rejections(conn: AsyncConnection, app_id: int, external_id: str, texts: Sequence[str]) -> None:
    """Delete the rejected rows of a person, and those with one of these texts in what was wrong; they stay counted."""
    is_theirs = (
        "(btrim(one->>'external_id', %(blanks)s) = %(external_id)s OR EXISTS"
        " (SELECT FROM unnest(%(texts)s::text[]) AS sought (text) WHERE position(sought.text IN one->>'description') > 0))"
    )
    pg = await driver(conn)
    await pg.execute(
        "UPDATE contact_imports SET rejections = (SELECT coalesce(jsonb_agg(one ORDER BY place), '[]')"
        f" FROM jsonb_array_elements(rejections) WITH ORDINALITY AS rejected (one, place) WHERE NOT {is_theirs})"
        " WHERE app_id = %(app_id)s AND EXISTS"
        f" (SELECT FROM jsonb_array_elements(rejections) AS rejected (one) WHERE {is_theirs})",
        {"app_id": app_id, "external_id": external_id, "texts": list(texts), "blanks": _BLANKS},
    )


async def list_imports(conn: AsyncConnection, app_id: int, limit: int) -> list[ContactImport]:
    """The newest imports."""
    columns = contact_imports.c
    statement = select(*_COLUMNS).where(columns.app_id == app_id).order_by(columns.import_id.desc()).limit(limit)
    return [ContactImport(**row._mapping) for row in await conn.execute(statement)]
