"""The connections to PostgreSQL, and the check that its schema is the one this code was written for."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any

import psycopg
import structlog
from psycopg.types.json import set_json_loads
from pydantic_core import from_json
from sqlalchemy import event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry

from aftertouch.errors import DatabaseUnavailable

log = structlog.get_logger()

TELL_AGAIN_SECONDS = 10.0
SCHEMA_REVISION = "0001"
"""The newest migration: what this code needs."""


class SchemaMismatch(Exception):
    """The database's schema is not the one that this code needs; the text names the command that mends it."""

    def __init__(self, text: str, *, is_empty: bool = False) -> None:
        super().__init__(text)
        self.is_empty = is_empty
        """True when nothing has been migrated there yet."""


_CONNECTION: dict[str, Any] = {
    "connect_timeout": 5,
    # A machine that is gone without a word would be waited for by a statement for 15 minutes, and by LISTEN for ever.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}


@asynccontextmanager
async def open_engine(database_url: str, *, pool_size: int = 10) -> AsyncIterator[AsyncEngine]:
    """An engine for a libpq URL (``postgresql://user@host/name``), and the end of its connections.

    Connections that died are replaced before use.
    """
    engine = create_async_engine(
        make_url(database_url).set(drivername="postgresql+psycopg"),
        pool_size=pool_size,
        max_overflow=pool_size,
        pool_pre_ping=True,
        pool_timeout=10,
        connect_args={**_CONNECTION, "application_name": "aftertouch", "options": "-c timezone=UTC"},
        # psycopg reports a foreign URL's password in no error, and neither do we: statements' values stay out of exceptions.
        hide_parameters=True,
    )
    try:
        yield engine
    finally:
        # Whoever was cancelled just now may still be rolling back; a pool keeps what it is given back after its end.
        event.listen(engine.pool, "checkin", _close)
        await engine.dispose()


def _close(_: DBAPIConnection | None, entry: ConnectionPoolEntry) -> None:
    entry.close()


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """A transaction on a connection of the pool.

    Raises:
        DatabaseUnavailable: the server could not be reached, went away in the middle, or chose this transaction to resolve a
            deadlock. Unless it went away during the commit itself, nothing was committed.
    """
    try:
        async with engine.begin() as conn:
            yield conn
    except (DBAPIError, psycopg.Error) as error:
        if may_pass(error):
            _tell(error)
            raise DatabaseUnavailable from error
        raise
    except PoolTimeout as error:
        raise DatabaseUnavailable from error


@asynccontextmanager
async def snapshot(engine: AsyncEngine) -> AsyncIterator[tuple[AsyncConnection, datetime]]:
    """A read-only transaction of which every statement sees the database at one moment, and that moment.

    Raises:
        DatabaseUnavailable.
    """
    async with transaction(engine) as conn:
        await conn.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
        # The transaction's first query: what it sees, all others see.
        yield conn, (await conn.execute(text("SELECT statement_timestamp()"))).scalar_one()


def _tell(error: DBAPIError | psycopg.Error) -> None:
    """Log why the database cannot, but not for each of thousands that hear of it."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state, now = getattr(cause, "sqlstate", None) or "", time.monotonic()
    if now - _told.get(state, -TELL_AGAIN_SECONDS) >= TELL_AGAIN_SECONDS:
        _told[state] = now
        text = str(cause).strip().partition("\n")[0][:300]
        log.warning("the database cannot do it now", action="transaction", sqlstate=state, cause=text)


_told: dict[str, float] = {}
"""When each SQLSTATE was logged last."""


def may_pass(error: DBAPIError | psycopg.Error) -> bool:
    """True when the same transaction may succeed later: the server is away, full or going, or two transactions collided."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    if state is None:
        return isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)
    return state[:2] in _PASSING_CLASSES or state in _PASSING


_PASSING_CLASSES = frozenset({"08", "53", "58"})
"""No connection; out of disk, memory or connections; an error of the system's, as of its disk."""
_PASSING = frozenset(
    {
        "25006",  # read only: it was the primary, and is none any more
        "40001",  # serialization failure
        "40P01",  # deadlock
        "55P03",  # lock not available in time
        "57P01",  # the server is shutting down,
        "57P02",  # crashed,
        "57P03",  # or starts
    }
)


async def driver(conn: AsyncConnection) -> psycopg.AsyncConnection[Any]:
    """The psycopg connection below, inside the same transaction: for COPY, and for statements over arrays of bits."""
    raw = await conn.get_raw_connection()
    assert isinstance(raw.driver_connection, psycopg.AsyncConnection)
    return raw.driver_connection


async def connect_listener(engine: AsyncEngine) -> psycopg.AsyncConnection[Any]:
    """A connection of its own for LISTEN, in autocommit; close it."""
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return await psycopg.AsyncConnection.connect(url, autocommit=True, **_CONNECTION)


async def check_schema(engine: AsyncEngine) -> None:
    """Raise ``SchemaMismatch`` unless the schema is exactly the one that this code needs."""
    async with transaction(engine) as conn:
        try:
            found = (await conn.execute(text("select version_num from alembic_version"))).scalar()
        except ProgrammingError:
            found = None
    if found is None:
        raise SchemaMismatch("the database is empty; run `aftertouch migrate` once", is_empty=True)
    if found < SCHEMA_REVISION:
        raise SchemaMismatch(
            f"the database's schema is {found}, older than this server's {SCHEMA_REVISION}; run `aftertouch migrate`"
        )
    if found > SCHEMA_REVISION:
        raise SchemaMismatch(f"the database's schema is {found}, newer than this server's {SCHEMA_REVISION}; upgrade the server")


class BitStrings:
    """Packed bits of whole bytes as an array parameter of type ``bit varying[]``.

    In binary: 1,000 rows of 8,192 bits take 11 ms to upsert, against 60 ms as text.
    """

    def __init__(self, items: list[bytes]) -> None:
        self.items = items


class _BitStringsDumper(psycopg.adapt.Dumper):
    format = psycopg.pq.Format.BINARY
    oid = psycopg.postgres.types["varbit"].array_oid

    def dump(self, obj: BitStrings) -> bytes:
        """Write PostgreSQL's binary array: a header, then length, bit length and bytes of each element."""
        varbit = psycopg.postgres.types["varbit"].oid
        parts = [(value).to_bytes(4, "big") for value in (1, 0, varbit, len(obj.items), 1)]
        for item in obj.items:
            parts.append((len(item) + 4).to_bytes(4, "big") + (len(item) * 8).to_bytes(4, "big"))
            parts.append(item)
        return b"".join(parts)


class _BitsLoader(psycopg.adapt.Loader):
    format = psycopg.pq.Format.BINARY

    def load(self, data: psycopg.abc.Buffer) -> bytes:
        """Drop the bit length: our bit strings are whole bytes."""
        return bytes(data[4:])


# A fifth of what Python's own parser takes for an address and a contact's attributes, which every message needs.
set_json_loads(from_json)
psycopg.adapters.register_dumper(BitStrings, _BitStringsDumper)
# Aggregates and operators over varbit return the type bit.
for _type in ("bit", "varbit"):
    psycopg.adapters.register_loader(_type, _BitsLoader)
