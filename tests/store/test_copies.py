"""Copies of receipts: whatever is kept, a transaction gets what it sees itself."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.retargeting.copies import Copies
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, group_bits, list_numbers, members_of, slot_range
from aftertouch.rolls.sql import upsert_receipts, write_roll
from aftertouch.store.apps import create_app
from aftertouch.store.campaigns import Campaign, create_campaign, update_campaign
from aftertouch.store.engine import snapshot, transaction

PEOPLE = 2 * CHUNK + 13
KINDS = (1, 2)


async def make_campaign(engine: AsyncEngine, name: str = "sale") -> Campaign:
    async with transaction(engine) as conn:
        app = await create_app(conn, f"app-{name}", "App")
        made = await create_campaign(conn, app.app_id, name, {"display_name": name, "channel": "sms"})
        await write_roll(conn, made.campaign_id, np.arange(PEOPLE) * 3)
        return await update_campaign(conn, made.campaign_id, recipients=PEOPLE, launch_time=datetime.now(UTC))


async def hear(engine: AsyncEngine, campaign: Campaign, kind: int, *positions: int) -> None:
    places = np.array(positions, np.int64)
    chunks = places >> CHUNK_BITS
    slots = slot_range(campaign.campaign_id)[0] + chunks
    rows = group_bits(slots, np.full(len(places), kind), places & (CHUNK - 1), members_of(PEOPLE, chunks))
    async with transaction(engine) as conn:
        await upsert_receipts(conn, rows)


async def read(engine: AsyncEngine, copies: Copies, campaign: Campaign) -> dict[int, list[int]]:
    async with snapshot(engine) as (conn, _):
        bits = await copies.read_receipts(conn, campaign, KINDS)
    return {kind: list_numbers(found).tolist() for kind, found in bits.items()}


async def test_copies_follow_what_is_written_chunk_by_chunk(engine: AsyncEngine) -> None:
    campaign, copies = await make_campaign(engine), Copies()
    assert await read(engine, copies, campaign) == {1: [], 2: []}
    await hear(engine, campaign, 1, 0, CHUNK - 1, CHUNK, PEOPLE - 1)
    assert await read(engine, copies, campaign) == {1: [0, CHUNK - 1, CHUNK, PEOPLE - 1], 2: []}
    await hear(engine, campaign, 2, 2 * CHUNK)
    await hear(engine, campaign, 1, 2 * CHUNK, CHUNK + 5)
    expected = {1: [0, CHUNK - 1, CHUNK, CHUNK + 5, 2 * CHUNK, PEOPLE - 1], 2: [2 * CHUNK]}
    assert await read(engine, copies, campaign) == expected == await read(engine, Copies(), campaign)


async def test_older_transaction_does_not_see_what_a_newer_one_left(engine: AsyncEngine) -> None:
    campaign, copies = await make_campaign(engine), Copies()
    await hear(engine, campaign, 1, 7)
    async with snapshot(engine) as (older, _):
        await hear(engine, campaign, 1, 8)
        await hear(engine, campaign, 2, 9, CHUNK)
        assert await read(engine, copies, campaign) == {1: [7, 8], 2: [9, CHUNK]}
        bits = await copies.read_receipts(older, campaign, KINDS)
        assert {kind: list_numbers(found).tolist() for kind, found in bits.items()} == {1: [7], 2: []}
    assert await read(engine, copies, campaign) == {1: [7, 8], 2: [9, CHUNK]}


async def test_copies_that_take_too_much_are_forgotten_and_read_again(engine: AsyncEngine) -> None:
    first, second = await make_campaign(engine, "first"), await make_campaign(engine, "second")
    copies = Copies(most_bytes=PEOPLE * 8 + 1)
    await hear(engine, first, 1, 3)
    for campaign in (first, second, first):
        async with snapshot(engine) as (conn, _):
            assert (await copies.read_roll(conn, campaign)).tolist() == list(range(0, 3 * PEOPLE, 3))
    async with transaction(engine) as conn:
        await conn.execute(text("DELETE FROM rolls"))
        # The first was read last, and is still there; the second was forgotten for it.
        assert len(await copies.read_roll(conn, first)) == PEOPLE
        assert len(await copies.read_roll(conn, second)) == 0
        await conn.rollback()
    assert await read(engine, Copies(most_bytes=0), first) == {1: [3], 2: []}
