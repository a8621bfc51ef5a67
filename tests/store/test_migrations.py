"""The schema: migrations lead to the tables as they are declared, and a server says when they have not been run."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.errors import DatabaseUnavailable
from aftertouch.store.engine import SCHEMA_REVISION, SchemaMismatch, check_schema, driver, open_engine, transaction
from aftertouch.store.migrate import migrate
from aftertouch.store.tables import metadata
from tests.fix_database import clone_database

PARTITION = re.compile(r"\w+_\d{8}")
"""Housekeeping makes them, one a day."""


@pytest.fixture
async def empty_engine(postgres_url: str) -> AsyncIterator[AsyncEngine]:
    """Connections to a database with nothing in it."""
    async with clone_database(postgres_url) as url, open_engine(url) as engine:
        yield engine


def find_differences(connection: Connection) -> list[object]:
    def is_declared(found: Any, name: str | None, kind: str, *_: object) -> bool:
        table = name if kind == "table" else found.table.name
        return PARTITION.fullmatch(str(table)) is None

    options = {"include_object": is_declared, "compare_type": True, "compare_server_default": True}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata))


async def test_migrations_lead_to_the_declared_tables(engine: AsyncEngine) -> None:
    async with engine.connect() as conn:
        assert await conn.run_sync(find_differences) == []


async def test_migrations_can_be_run_again(database_url: str, engine: AsyncEngine) -> None:
    await migrate(database_url)
    await check_schema(engine)


async def test_empty_database_is_told_from_one_of_another_age(empty_engine: AsyncEngine) -> None:
    with pytest.raises(SchemaMismatch, match="is empty; run `aftertouch migrate` once") as caught:
        await check_schema(empty_engine)
    assert caught.value.is_empty


@pytest.mark.parametrize(
    ("revision", "advice"),
    [
        ("0000", f"is 0000, older than this server's {SCHEMA_REVISION}; run `aftertouch migrate`"),
        ("9999", f"is 9999, newer than this server's {SCHEMA_REVISION}; upgrade the server"),
    ],
)
async def test_database_of_another_age_is_refused_with_advice(engine: AsyncEngine, revision: str, advice: str) -> None:
    async with transaction(engine) as conn:
        await conn.execute(text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    with pytest.raises(SchemaMismatch, match=advice) as caught:
        await check_schema(engine)
    assert not caught.value.is_empty


async def test_pool_without_a_free_connection_is_an_unavailable_database(database_url: str) -> None:
    async with open_engine(database_url, pool_size=1) as engine:
        engine.pool._timeout = 0.05  # type: ignore[attr-defined]
        async with engine.connect(), engine.connect():
            with pytest.raises(DatabaseUnavailable):
                async with transaction(engine):
                    pytest.fail("there was a third connection in a pool of two")


async def test_database_that_is_away_is_unavailable() -> None:
    async with open_engine("postgresql://nobody@127.0.0.1:1/nothing") as engine:
        with pytest.raises(DatabaseUnavailable):
            await check_schema(engine)


async def test_connection_that_comes_back_after_the_end_is_closed(database_url: str) -> None:
    """A call that was cancelled with the server may still be rolling back; its connection would be left open for ever."""
    async with AsyncExitStack() as late:
        async with open_engine(database_url) as engine:
            conn = await late.enter_async_context(transaction(engine))
            below = await driver(conn)
        assert not below.closed
    assert below.closed
