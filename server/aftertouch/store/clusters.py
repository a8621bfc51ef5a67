"""The PostgreSQL cluster that the database is in, and how commits are numbered there: ever higher, in whichever cluster.

Every cluster counts its transactions from the beginning, and a dump takes the numbers of another one along. So a commit_id is
the cluster's own number moved on by an offset, which is chosen when the database is first seen there: they begin with the
microseconds since 1970 of that moment. No cluster makes a million transactions a second, so earlier ones' numbers are below.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.engine import driver


async def note_cluster(conn: AsyncConnection) -> bool:
    """Have commits numbered anew where the database is in a cluster that it was not in before; True when it is.

    One at a time: the caller holds the lock on housekeeping.
    """
    # From the first transaction that may still be running, so that no horizon is below the first number.
    noted = await conn.execute(
        text(
            "WITH here AS (SELECT system_identifier, (extract(epoch FROM now()) * 1000000)::bigint AS first_commit_id"
            "  FROM pg_control_system()),"
            " gone AS (DELETE FROM clusters USING here WHERE clusters.system_identifier <> here.system_identifier)"
            " INSERT INTO clusters SELECT *, first_commit_id - pg_snapshot_xmin(pg_current_snapshot())::text::bigint FROM here"
            " ON CONFLICT DO NOTHING"
        )
    )
    return noted.rowcount > 0


async def read_commit_id(conn: AsyncConnection) -> int:
    """The number of this transaction."""
    # Below SQLAlchemy, since every commit of events asks.
    pg = await driver(conn)
    rows = await pg.execute("SELECT pg_current_xact_id()::text::bigint + commit_offset FROM clusters")
    ((number,),) = await rows.fetchall()
    return int(number)


async def read_horizon(conn: AsyncConnection) -> int:
    """The first transaction that may still be running: all events of earlier ones are visible, and no more will come."""
    statement = "SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint + commit_offset FROM clusters"
    return int((await conn.execute(text(statement))).scalar_one())


async def read_first_commit(conn: AsyncConnection) -> tuple[int, datetime]:
    """The first number that was given out in this cluster, and since when the database is there."""
    first = int((await conn.execute(text("SELECT first_commit_id FROM clusters"))).scalar_one())
    return first, datetime.fromtimestamp(first // 1_000_000, UTC)
