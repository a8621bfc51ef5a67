"""Databases: one server for the session, one template with the schema, a clone of it for each test."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.server import keep_house
from aftertouch.store.embedded import EmbeddedPostgres
from aftertouch.store.engine import open_engine
from aftertouch.store.migrate import migrate

_numbers = itertools.count()
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
"""Part of each name: with --dsn all of pytest's processes work in one server."""


def name_database(url: str, name: str) -> str:
    """The same server's database of another name."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


@pytest.fixture(scope="session")
async def postgres_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    """The server: the one of --dsn, or an embedded one."""
    if dsn := request.config.getoption("--dsn"):
        yield dsn
        return
    async with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as postgres:
        yield postgres.url


CUT_CONNECTIONS = """
    SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity
    WHERE datname = %s AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
"""Ends the connections to a database; its autovacuum workers, which only a superuser may end, stay."""


async def _run(url: str, statement: str) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        await conn.execute(statement)


@pytest.fixture(scope="session")
async def template(postgres_url: str) -> AsyncIterator[str]:
    """The name of a database with the schema, to be cloned: 20 ms a test where migrating takes a second."""
    name = f"aftertouch_test_template_{_WORKER}_{next(_numbers)}"
    await _run(postgres_url, f"DROP DATABASE IF EXISTS {name}")
    await _run(postgres_url, f"CREATE DATABASE {name}")
    url = name_database(postgres_url, name)
    await migrate(url)
    async with open_engine(url) as engine:
        await keep_house(engine)
    yield name
    await _run(postgres_url, f"DROP DATABASE {name}")


async def _run_unused(url: str, statement: str) -> None:
    """Run a statement once nobody uses its database: an autovacuum worker, which only a superuser may end, is waited for."""
    async with asyncio.timeout(120):
        while True:
            try:
                return await _run(url, statement)
            except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ObjectInUse):
                await asyncio.sleep(0.1)


@asynccontextmanager
async def clone_database(postgres_url: str, template: str | None = None) -> AsyncIterator[str]:
    """A database that is dropped in the end: a clone of the template, or an empty one."""
    name = f"aftertouch_test_{_WORKER}_{next(_numbers)}"
    # Of a server that was killed just now there may still be connections to what is cloned.
    await _run_unused(postgres_url, f"CREATE DATABASE {name}" + (f" TEMPLATE {template} STRATEGY file_copy" if template else ""))
    try:
        yield name_database(postgres_url, name)
    finally:
        await _run_unused(postgres_url, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def database_url(postgres_url: str, template: str) -> AsyncIterator[str]:
    """A database of the test's own, with the schema and nothing in it."""
    async with clone_database(postgres_url, template) as url:
        yield url


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    """Connections to the test's database."""
    async with open_engine(database_url) as engine:
        yield engine
