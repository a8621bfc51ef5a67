"""The logs: what is written by COPY reads back, days come and go, and counts outlive them."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pytest
from psycopg.errors import CheckViolation
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.server import keep_house
from aftertouch.store.apps import create_app
from aftertouch.store.campaigns import create_campaign
from aftertouch.store.clusters import read_commit_id
from aftertouch.store.engine import driver, transaction
from aftertouch.store.logs import Attempt, EventBatch, find_messages, join_batches, store_attempts, store_events
from aftertouch.store.partitions import DAYS_AHEAD, LOGS, create_partitions, drop_partitions, list_days, read_last_dropped
from tests.receipts import count_by_kind

MINUTE = 60_000_000
NOON = int(datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()) * 1_000_000


def make_batch(campaign_id: int, positions: list[int], *, kind: int = 1, times: list[int] | None = None) -> EventBatch:
    """Events of the first chunk of a campaign to 1,000 people."""
    count = len(positions)
    return EventBatch(
        slots=np.full(count, campaign_id << 20, np.int64),
        positions=np.array(positions, np.int32),
        members=np.full(count, 1_000, np.int32),
        kinds=np.full(count, kind, np.int32),
        times=np.array(times if times is not None else [NOON] * count, np.int64),
    )


async def test_events_read_back_as_they_were_copied(engine: AsyncEngine) -> None:
    times = [NOON, 0, 1, -1, 946_684_800_000_000, 4_102_444_800_123_456]
    batch = join_batches([make_batch(5, [0, 999, 7, 7, 8, 9], kind=3, times=times), EventBatch.empty()])
    async with transaction(engine) as conn:
        await store_events(conn, batch)
        number = await read_commit_id(conn)
    async with transaction(engine) as conn:
        rows = (await conn.execute(text("SELECT *, arrive_time > now() - interval '1 minute' AS is_new FROM events"))).all()
    found = sorted((row.slot, row.position, row.kind, round(row.time.timestamp() * 1e6)) for row in rows)
    assert found == sorted((5 << 20, position, 3, time) for position, time in zip(batch.positions.tolist(), times, strict=True))
    assert {row.commit_id for row in rows} == {number}
    assert all(row.is_new for row in rows)


async def test_no_events_write_nothing(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        await store_events(conn, EventBatch.empty())
        assert (await conn.execute(text("SELECT count(*) FROM events"))).scalar_one() == 0


async def test_activity_counts_events_by_campaign_minute_and_kind_and_by_hour(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        times = [NOON, NOON + MINUTE - 1, NOON + MINUTE, NOON + 60 * MINUTE, NOON - 1]
        await store_events(conn, join_batches([make_batch(5, [1, 2, 3, 4, 5], times=times), make_batch(6, [1], kind=2)]))
        await store_events(conn, make_batch(5, [1, 1], times=[NOON + 1] * 2))
        rows = await conn.execute(text("SELECT slot >> 20, kind, minutes, start_time, events FROM activity ORDER BY 1, 2, 3, 4"))
        found = [tuple(row) for row in rows]
    noon = datetime(2026, 3, 1, 12, tzinfo=UTC)
    minute, hour = timedelta(minutes=1), timedelta(hours=1)
    by_minute = [(noon - minute, 1), (noon, 4), (noon + minute, 1), (noon + hour, 1)]
    by_hour = [(noon - hour, 1), (noon, 5), (noon + hour, 1)]
    assert found == [
        *((5, 1, 1, *counted) for counted in by_minute),
        *((5, 1, 60, *counted) for counted in by_hour),
        *((6, 2, minutes, noon, 1) for minutes in (1, 60)),
    ]


async def test_partitions_are_made_ahead_and_making_them_again_changes_nothing(engine: AsyncEngine) -> None:
    today = datetime.now(UTC).date() + timedelta(days=2)
    async with transaction(engine) as conn:
        before = {log: await list_days(conn, log) for log in LOGS}
        await create_partitions(conn, today)
        await create_partitions(conn, today)
        for log in LOGS:
            days = await list_days(conn, log)
            assert days == sorted({*before[log], *(today + timedelta(days=offset) for offset in range(-1, DAYS_AHEAD + 1))})


async def test_event_of_a_day_without_a_partition_is_refused(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        pg = await driver(conn)
        with pytest.raises(CheckViolation):
            await pg.execute("INSERT INTO events VALUES ('2020-01-01', 1, 1, 1, 1, now())")
        await conn.rollback()


async def test_only_days_before_the_given_one_are_dropped(engine: AsyncEngine) -> None:
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    async with transaction(engine) as conn:
        kept = [day for day in await list_days(conn, "events") if day >= tomorrow]
        dropped = await drop_partitions(conn, tomorrow)
        assert dropped
        assert max(dropped) < tomorrow
        for log in LOGS:
            assert await list_days(conn, log) == kept
        assert await drop_partitions(conn, tomorrow) == []


async def test_last_dropped_event_is_remembered_by_its_transaction(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        assert await read_last_dropped(conn) is None
        await store_events(conn, make_batch(5, [1]))
        number = (await conn.execute(text("SELECT commit_id FROM events"))).scalar_one()
    today = datetime.now(UTC).date()
    async with transaction(engine) as conn:
        await drop_partitions(conn, today + timedelta(days=1))
        assert await read_last_dropped(conn) == (number, today + timedelta(days=1))


async def test_events_are_stored_while_housekeeping_looks_for_what_came_late(engine: AsyncEngine) -> None:
    """It had locked the logs to make and drop days: after many were erased, every commit of a server waited after midnight."""
    async with transaction(engine) as conn:
        await create_partitions(conn, date(2020, 1, 1))
    async with asyncio.timeout(60), asyncio.TaskGroup() as group, transaction(engine) as blocking:
        await blocking.execute(text("LOCK TABLE erasures"))
        group.create_task(keep_house(engine))
        waiting = text("SELECT count(*) FROM pg_locks WHERE relation = 'erasures'::regclass AND NOT granted")
        while not (await blocking.execute(waiting)).scalar_one():  # noqa: ASYNC110 - nothing else tells of it
            await asyncio.sleep(0.01)
        async with transaction(engine) as conn:
            await store_events(conn, make_batch(5, [1]))


async def test_counts_survive_the_drop_of_the_log(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        await store_events(conn, make_batch(5, [1, 2, 2, 900]))
    async with transaction(engine) as conn:
        await drop_partitions(conn, datetime.now(UTC).date() + timedelta(days=1))
        assert (await conn.execute(text("SELECT count(*) FROM events"))).scalar_one() == 0
        assert await count_by_kind(conn, 5) == {1: 3}
        assert (await conn.execute(text("SELECT sum(events) FROM activity WHERE minutes = 60"))).scalar_one() == 4


async def test_attempt_is_found_by_its_channels_message_id_only(engine: AsyncEngine) -> None:
    attempt = Attempt(5 << 20, 7, 1, b"hash", "sms", "SM1")
    async with transaction(engine) as conn:
        await store_attempts(conn, [attempt, Attempt(5 << 20, 8, 1, b"hash", "sms", "")])
        assert await find_messages(conn, "sms", ["SM1", "SM2", ""]) == {"SM1": attempt}
        assert await find_messages(conn, "whatsapp", ["SM1"]) == {}
        assert await find_messages(conn, "sms", []) == {}


async def test_message_id_that_two_accounts_gave_names_each_apps_own_message(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        attempts = {}
        for name in ("north", "south"):
            app = await create_app(conn, name, name)
            campaign = await create_campaign(conn, app.app_id, "sale", {"display_name": "Sale", "channel": "sms"})
            attempts[app.app_id] = Attempt(campaign.campaign_id << 20, 7, 1, b"hash", "sms", "17")
        await store_attempts(conn, list(attempts.values()))
        for app_id, attempt in attempts.items():
            assert await find_messages(conn, "sms", ["17"], app_id) == {"17": attempt}
        assert await find_messages(conn, "sms", ["17"], max(attempts) + 1) == {}


async def test_partition_holds_exactly_its_day(engine: AsyncEngine) -> None:
    day = date(2020, 1, 1)
    async with transaction(engine) as conn:
        await create_partitions(conn, day)
        for second in ("2020-01-01 00:00:00+00", "2020-01-01 23:59:59.999999+00"):
            await (await driver(conn)).execute("INSERT INTO events VALUES (%s, 1, 1, 1, 1, now())", (second,))
        assert (await conn.execute(text("SELECT count(*) FROM events_20200101"))).scalar_one() == 2
