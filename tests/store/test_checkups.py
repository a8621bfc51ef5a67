"""Checkups: one holder at a time, nothing twice, and only messages that nobody told of."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.store.checkups import Checkup, claim_checkup, note_checked, read_unheard
from aftertouch.store.engine import transaction
from aftertouch.store.logs import TEST_ROW, Attempt, EventBatch, store_attempts, store_events

AGE, LEASE, OLDEST = timedelta(minutes=10), timedelta(minutes=2), timedelta(days=2)


async def claim(engine: AsyncEngine, channel: str = "sms") -> Checkup | None:
    async with transaction(engine) as conn:
        return await claim_checkup(conn, channel, AGE, LEASE, OLDEST)


async def pass_time(engine: AsyncEngine, duration: timedelta) -> None:
    async with transaction(engine) as conn:
        await conn.execute(
            text("UPDATE checkups SET checked_until = checked_until - :d, lease_until = lease_until - :d"), {"d": duration}
        )


async def test_checkup_begins_when_it_is_first_asked_for(engine: AsyncEngine) -> None:
    assert await claim(engine) is None
    await pass_time(engine, timedelta(seconds=30))
    checkup = await claim(engine)
    assert checkup is not None
    assert timedelta(seconds=30) <= checkup.end - checkup.start < timedelta(minutes=2)


async def test_checkup_has_one_holder_until_its_lease_is_over(engine: AsyncEngine) -> None:
    await claim(engine)
    await pass_time(engine, timedelta(seconds=30))
    first = await claim(engine)
    assert first is not None
    assert await claim(engine) is None
    assert await claim(engine, "whatsapp") is None
    await pass_time(engine, LEASE)
    second = await claim(engine)
    assert second is not None
    async with transaction(engine) as conn:
        await note_checked(conn, second, second.end, timedelta(0))
        # Whoever comes late takes nothing back.
        await note_checked(conn, first, first.start, timedelta(0))
    await pass_time(engine, timedelta(seconds=1))
    third = await claim(engine)
    assert third is not None
    assert third.start == second.end - timedelta(seconds=1)


async def test_checkup_leaves_out_what_is_too_old(engine: AsyncEngine) -> None:
    await claim(engine)
    await pass_time(engine, timedelta(days=30))
    checkup = await claim(engine)
    assert checkup is not None
    assert checkup.end - checkup.start < OLDEST


async def test_unheard_are_messages_that_were_taken_and_never_told_of(engine: AsyncEngine) -> None:
    sent, refused, delivered = 1, 2, 3
    slot = 5 << 20
    attempts = [
        Attempt(slot, position, sent if position != 3 else refused, b"h", "sms", f"SM{position}") for position in range(8)
    ]
    attempts += [
        Attempt(slot, 8, sent, b"h", "sms", ""),
        Attempt(slot, 9, sent, b"h", "whatsapp", "wamid"),
        Attempt(slot, TEST_ROW, sent, b"h", "sms", "SMtest"),
        Attempt(slot + 1, 0, sent, b"h", "sms", "SMother"),
    ]
    heard = EventBatch(
        slots=np.full(2, slot, np.int64),
        positions=np.array([0, 5], np.int32),
        members=np.full(2, 100, np.int32),
        kinds=np.full(2, delivered, np.int32),
        times=np.zeros(2, np.int64),
    )
    now = datetime.now(UTC)
    span = now - timedelta(minutes=1), now + timedelta(minutes=1)
    found: list[str] = []
    async with transaction(engine) as conn:
        await store_attempts(conn, attempts)
        await store_events(conn, heard)
        after = (0, 0, "")
        while page := await read_unheard(conn, "sms", [sent], [delivered], span, after, 2):
            after = page[-1]
            found += [message_id for *_, message_id in page]
        assert await read_unheard(conn, "sms", [sent], [delivered], (span[1], span[1] + AGE), (0, 0, ""), 9) == []
    assert found == ["SM1", "SM2", "SM4", "SM6", "SM7", "SMother"]
