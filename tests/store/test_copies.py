"""Copies of receipts: whatever is kept, a transaction gets what it sees itself."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.retargeting import copies as copies_module
from aftertouch.retargeting.copies import Copies
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, group_bits, list_numbers, members_of, slot_range
from aftertouch.rolls.sql import Sight, read_sight, read_versions, upsert_receipts, write_roll
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
    async with transaction(engine) as conn:
        await hear_within(conn, campaign, kind, *positions)


async def hear_within(conn: AsyncConnection, campaign: Campaign, kind: int, *positions: int) -> None:
    places = np.array(positions, np.int64)
    chunks = places >> CHUNK_BITS
    slots = slot_range(campaign.campaign_id)[0] + chunks
    rows = group_bits(slots, np.full(len(places), kind), places & (CHUNK - 1), members_of(PEOPLE, chunks))
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


async def test_only_what_may_have_changed_is_asked_for(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what a question of a large campaign costs is to be told that nothing changed."""
    asked: list[bool] = []

    async def note(*given: Any) -> Any:
        asked.append(given[-1] is not None)
        return await read_versions(*given)

    async def see_nobody_else(conn: AsyncConnection) -> Sight | None:
        """An autovacuum that is under way is a reason to ask for everything."""
        sight = await read_sight(conn)
        return sight and sight._replace(first=sight.end)

    monkeypatch.setattr(copies_module, "read_versions", note)
    monkeypatch.setattr(copies_module, "read_sight", see_nobody_else)
    campaign, copies = await make_campaign(engine), Copies()
    await hear(engine, campaign, 1, 7)
    for _ in range(2):
        assert await read(engine, copies, campaign) == {1: [7], 2: []}
    await hear(engine, campaign, 2, 8)
    assert await read(engine, copies, campaign) == {1: [7], 2: [8]}
    assert asked == [False, True, True]
    async with transaction(engine) as conn:
        # Each of its statements sees something else, so it says nothing of a moment.
        await hear(engine, campaign, 2, 9)
        assert list_numbers((await copies.read_receipts(conn, campaign, KINDS))[2]).tolist() == [8, 9]
    assert await read(engine, copies, campaign) == {1: [7], 2: [8, 9]}
    assert await read(engine, copies, campaign) == {1: [7], 2: [8, 9]}
    assert asked[3:] == [False, False, True]


@pytest.mark.parametrize("seed", range(3))
async def test_every_snapshot_gets_what_it_sees_whatever_is_under_way(engine: AsyncEngine, seed: int) -> None:
    """Writers that are long under way, commit or give up, and snapshots that are long open, in any order."""
    campaign, copies, chance = await make_campaign(engine), Copies(), random.Random(seed)
    writers: dict[int, AsyncExitStack] = {}
    conns: dict[int, AsyncConnection] = {}
    async with AsyncExitStack() as open_snapshots:
        seers: list[AsyncConnection] = []
        for _ in range(150):
            # Each writer has a kind of its own: of one row they would wait for each other.
            kind = chance.choice(KINDS)
            match chance.choice(["write", "write", "end", "open", "read", "read", "read"]):
                case "write":
                    if kind not in writers:
                        writers[kind] = AsyncExitStack()
                        conns[kind] = await writers[kind].enter_async_context(transaction(engine))
                    await hear_within(conns[kind], campaign, kind, *chance.sample(range(PEOPLE), 2))
                case "end" if kind in writers:
                    if chance.random() < 0.3:
                        await conns[kind].rollback()
                    await writers.pop(kind).aclose()
                case "open" if len(seers) < 3:
                    seers.append((await open_snapshots.enter_async_context(snapshot(engine)))[0])
                case "read":
                    asked = chance.sample(KINDS, chance.randint(1, 2))
                    async with AsyncExitStack() as brief:
                        seer = chance.choice([*seers, None]) or (await brief.enter_async_context(snapshot(engine)))[0]
                        kept = await copies.read_receipts(seer, campaign, asked)
                        anew = await Copies().read_receipts(seer, campaign, asked)
                        assert {key: bits.tobytes() for key, bits in kept.items()} == {
                            key: bits.tobytes() for key, bits in anew.items()
                        }
    for writer in writers.values():
        await writer.aclose()


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


async def test_campaigns_to_nobody_take_no_more_than_others(engine: AsyncEngine) -> None:
    """Their rolls and receipts weighed nothing, so they were kept for as long as the process ran."""
    copies = Copies(most_bytes=10_000)
    async with transaction(engine) as conn:
        app = await create_app(conn, "acme", "App")
        for number in range(30):
            made = await create_campaign(conn, app.app_id, f"sale-{number}", {"display_name": "Sale", "channel": "sms"})
            campaign = await update_campaign(conn, made.campaign_id, recipients=0, launch_time=datetime.now(UTC))
            assert len(await copies.read_roll(conn, campaign)) == 0
            assert set(await copies.read_receipts(conn, campaign, KINDS)) == set(KINDS)
            assert 1_000 < copies.nbytes <= 20_000
