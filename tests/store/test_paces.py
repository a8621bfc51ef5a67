"""Limits that many workers keep together, and caps that many campaigns keep together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.store.engine import open_engine, transaction
from aftertouch.store.paces import count_messages, find_full, forget_limits, hold_limits, read_full_until, take_room

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
ZERO = timedelta(0)
FREE_TIME = text("SELECT free_time FROM paces")


@pytest.fixture
async def other(database_url: str) -> AsyncIterator[AsyncEngine]:
    """What another process would have: connections of its own to the same database."""
    async with open_engine(database_url) as engine:
        yield engine


async def take(engine: AsyncEngine, horizon: timedelta = SECOND, **wanted: timedelta) -> dict[str, tuple[bool, timedelta]]:
    async with transaction(engine) as conn:
        return await take_room(conn, wanted, horizon)


async def test_room_is_taken_once_by_processes_that_ask_at_once(engine: AsyncEngine, other: AsyncEngine) -> None:
    """Messages may leave an interval apart, whoever asked, and however long it waited for the row."""
    minute, takings = timedelta(minutes=1), 60
    async with transaction(engine) as conn:
        await hold_limits(conn, {"account": minute})
        before = (await conn.execute(FREE_TIME)).scalar_one()
    taken = await asyncio.gather(*(take(one, timedelta(days=1), account=minute) for one in [engine, other] * (takings // 2)))
    assert all(room["account"][0] for room in taken)
    async with transaction(engine) as conn:
        assert (await conn.execute(FREE_TIME)).scalar_one() - before == takings * minute


async def test_room_that_comes_too_late_is_not_taken(engine: AsyncEngine) -> None:
    assert (await take(engine, account=HOUR))["account"] == (True, ZERO)
    for _ in range(3):
        is_taken, wait = (await take(engine, account=HOUR))["account"]
        assert not is_taken
        assert timedelta(minutes=59) < wait <= HOUR


async def test_room_in_one_limit_is_no_room_in_another(engine: AsyncEngine) -> None:
    await take(engine, first=HOUR)
    room = await take(engine, first=SECOND, second=SECOND)
    assert (room["first"][0], room["second"]) == (False, (True, ZERO))


async def test_limit_without_a_rate_has_room_until_it_is_held(engine: AsyncEngine, other: AsyncEngine) -> None:
    assert (await take(other, account=ZERO))["account"] == (True, ZERO)
    async with transaction(engine) as conn:
        await hold_limits(conn, {"account": HOUR})
        await hold_limits(conn, {"account": SECOND})
    is_free, wait = (await take(other, account=ZERO))["account"]
    assert not is_free
    assert wait > timedelta(minutes=59), "a shorter hold ended a longer one"


async def test_held_limits_are_not_forgotten_and_old_ones_are(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        await hold_limits(conn, {"held": HOUR, "old": -HOUR})
        await forget_limits(conn)
        keys = await conn.execute(text("SELECT key FROM paces"))
    assert keys.scalars().all() == ["held"]


@pytest.mark.parametrize("most", [1, 3])
async def test_cap_is_kept_by_campaigns_that_count_at_once(engine: AsyncEngine, other: AsyncEngine, most: int) -> None:
    numbers = np.arange(50, dtype=np.int64)
    chance = np.random.default_rng(most)

    async def count(one: AsyncEngine) -> set[int]:
        async with transaction(one) as conn:
            return await count_messages(conn, 1, chance.permutation(numbers), most, HOUR)

    counted: Counter[int] = Counter()
    for got in await asyncio.gather(*(count(one) for one in [engine, other] * 10)):
        counted.update(got)
    assert counted == dict.fromkeys(numbers.tolist(), most)


async def test_cap_counts_again_when_the_oldest_message_is_out_of_the_window(engine: AsyncEngine) -> None:
    number = np.array([7], np.int64)

    async def count() -> set[int]:
        async with transaction(engine) as conn:
            return await count_messages(conn, 1, number, 2, HOUR)

    assert [await count() for _ in range(3)] == [{7}, {7}, set()]
    async with transaction(engine) as conn:
        await conn.execute(text("UPDATE contact_paces SET recent[1] = recent[1] - interval '1 hour'"))
    assert [await count() for _ in range(2)] == [{7}, set()]


@pytest.mark.parametrize(("most", "hours"), [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3), (4, 3)])
async def test_one_person_is_full_when_a_funnel_says_so_whatever_the_cap_was(engine: AsyncEngine, most: int, hours: int) -> None:
    """Messages 2 h, 30 min and 0 min ago, counted under a cap of 3 in 3 h, and asked about under another."""
    ages, window = (timedelta(hours=2), timedelta(minutes=30), ZERO), timedelta(hours=hours)
    async with transaction(engine) as conn:
        now = (await conn.execute(text("SELECT now()"))).scalar_one()
        for _ in ages:
            await count_messages(conn, 1, np.array([7], np.int64), 3, 3 * HOUR)
        await conn.execute(text("UPDATE contact_paces SET recent = :recent"), {"recent": [now - age for age in ages]})
        until = await read_full_until(conn, 1, 7, most, window)
        assert (until is not None) == (7 in await find_full(conn, 1, most, window))
    heard = [age for age in ages if age < window]
    assert until == (now - heard[-most] + window if len(heard) >= most else None)


async def test_cap_that_was_not_committed_counts_nothing(engine: AsyncEngine) -> None:
    number = np.array([7], np.int64)
    async with engine.connect() as conn:
        assert await count_messages(conn, 1, number, 1, HOUR) == {7}
        await conn.rollback()
    async with transaction(engine) as conn:
        assert await count_messages(conn, 1, number, 1, HOUR) == {7}
