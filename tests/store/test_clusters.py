"""How commits are numbered: on from what they were, in whichever cluster the database is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.store.clusters import note_cluster, read_commit_id, read_first_commit, read_horizon
from aftertouch.store.engine import transaction


async def test_numbers_go_on_in_another_cluster_after_all_that_were_given_out(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        before = await read_commit_id(conn)
        # A dump brings the row along from where it was made.
        await conn.execute(text("UPDATE clusters SET system_identifier = 1"))
        assert await note_cluster(conn)
        first, begin_time = await read_first_commit(conn)
        assert before < first <= await read_commit_id(conn)
    assert abs(begin_time - datetime.now(UTC)) < timedelta(minutes=1)


async def test_numbers_stay_in_the_same_cluster(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        before = await read_commit_id(conn)
        assert not await note_cluster(conn)
        assert await read_commit_id(conn) == before


async def test_no_horizon_is_below_the_first_number(engine: AsyncEngine) -> None:
    """A token would be taken for one of before, while a transaction is open that began earlier."""
    async with transaction(engine) as earlier:
        await earlier.execute(text("SELECT pg_current_xact_id()"))
        async with transaction(engine) as conn:
            await conn.execute(text("UPDATE clusters SET system_identifier = 1"))
            await note_cluster(conn)
            assert await read_horizon(conn) >= (await read_first_commit(conn))[0]
