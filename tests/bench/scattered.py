"""Events scattered over many campaigns: bits over rolls against a table with a row for each delivery, in the same database.

Both are given what happened and left to apply it in one transaction, without the log. The row model is written as well as it can
be: one UPDATE over an array, by primary key, without foreign keys or further indexes, which is six times faster than a statement
for each event. Where a row for each of 100 million deliveries would not fit, its table has two million, which favours it.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import numpy as np
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.rolls.chunks import CHUNK_BITS, SLOT_SHIFT, BitRows, group_bits
from aftertouch.rolls.sql import upsert_receipts
from aftertouch.store.engine import driver, transaction

EVENTS = 100_000
CONTACTS = 10_000_000
MOST_ROWS_EACH = 2_000
"""Deliveries of a campaign in the table of rows: of larger campaigns only so many, so that the table can be made in seconds."""
SHAPES = {"1000x1000": (1_000, 1_000), "1000x100000": (1_000, 100_000)}
FEW, MANY = SHAPES
SENT, DELIVERED = 1, 2

Numbers = np.ndarray[Any, Any]


async def clock(engine: AsyncEngine, work: Callable[[AsyncConnection], Awaitable[object]]) -> float:
    """Milliseconds of a transaction with its commit."""
    began = time.perf_counter()
    async with transaction(engine) as conn:
        await work(conn)
    return (time.perf_counter() - began) * 1e3


def draw_events(seed: int, campaigns: int, people: int) -> tuple[Numbers, Numbers]:
    """Campaigns and positions of 100,000 different events, in no order."""
    random = np.random.default_rng(seed)
    drawn = np.unique(random.integers(0, campaigns * people, EVENTS * 11 // 10))
    drawn = random.permutation(drawn)[:EVENTS]
    return drawn // people + 1, drawn % people


def make_bits(campaigns: Numbers, positions: Numbers, people: int, kind: int, chunk_bits: int = CHUNK_BITS) -> BitRows:
    """The rows of the upsert that applies these events."""
    chunks = positions >> chunk_bits
    chunk = 1 << chunk_bits
    members = np.minimum(people - (chunks << chunk_bits), chunk)
    kinds = np.full(len(positions), kind)
    return group_bits(campaigns << SLOT_SHIFT | chunks, kinds, positions & (chunk - 1), members)


async def fill_receipts(engine: AsyncEngine, campaigns: int, people: int, kind: int, chunk_bits: int = CHUNK_BITS) -> None:
    """Give nearly everybody a signal: bits as they are on the way there, which compress little."""
    random = np.random.default_rng(kind)
    chunk = 1 << chunk_bits
    for first in range(1, campaigns + 1, 100):
        slots, bits = [], []
        for campaign in range(first, min(first + 100, campaigns + 1)):
            for number, start in enumerate(range(0, people, chunk)):
                slots.append(campaign << SLOT_SHIFT | number)
                length = (min(chunk, people - start) + 7) // 8
                bits.append((random.integers(0, 256, length) | random.integers(0, 256, length)).astype(np.uint8).tobytes())
        async with transaction(engine) as conn:
            await upsert_receipts(conn, BitRows(slots, [kind] * len(slots), bits))


async def measure_bits(engine: AsyncEngine, campaigns: int, people: int, chunk_bits: int = CHUNK_BITS) -> tuple[float, float]:
    """Milliseconds for 100,000 events, from arrays to commit; and bytes for a person and signal when all people have two."""
    async with transaction(engine) as conn:
        await conn.execute(text("TRUNCATE receipts"))
    await fill_receipts(engine, campaigns, people, SENT, chunk_bits)
    taken = []
    for seed in range(3):
        drawn, positions = draw_events(seed, campaigns, people)

        async def apply(conn: AsyncConnection, drawn: Numbers = drawn, positions: Numbers = positions) -> None:
            await upsert_receipts(conn, make_bits(drawn, positions, people, DELIVERED, chunk_bits))

        taken.append(await clock(engine, apply))
    await fill_receipts(engine, campaigns, people, DELIVERED, chunk_bits)
    return median(taken), await _measure_size(engine, "receipts") / (campaigns * people * 2)


async def measure_rows(engine: AsyncEngine, campaigns: int, people: int) -> tuple[float, float]:
    """The same for a table with a row for each delivery."""
    each = min(people, MOST_ROWS_EACH)
    async with transaction(engine) as conn:
        await conn.execute(text("DROP TABLE IF EXISTS deliveries"))
        await conn.execute(
            text(
                "CREATE TABLE deliveries (campaign_id bigint, contact bigint, sent timestamptz, delivered timestamptz,"
                " read timestamptz, failed timestamptz)"
            )
        )
        await conn.execute(
            text(
                f"INSERT INTO deliveries SELECT c, p * {CONTACTS // each}, now()"
                f" FROM generate_series(1, {campaigns}) AS c, generate_series(0, {each - 1}) AS p"
            )
        )
        await conn.execute(text("ALTER TABLE deliveries ADD PRIMARY KEY (campaign_id, contact)"))
    async with engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("VACUUM ANALYZE deliveries"))
    taken = []
    for seed in range(3):
        drawn, positions = draw_events(seed, campaigns, each)

        async def apply(conn: AsyncConnection, drawn: Numbers = drawn, positions: Numbers = positions) -> None:
            pg = await driver(conn)
            await pg.execute(
                "UPDATE deliveries AS d SET delivered = coalesce(d.delivered, now())"
                " FROM unnest(%b::bigint[], %b::bigint[]) AS new (campaign_id, contact)"
                " WHERE d.campaign_id = new.campaign_id AND d.contact = new.contact",
                (drawn.tolist(), (positions * (CONTACTS // each)).tolist()),
            )

        taken.append(await clock(engine, apply))
    return median(taken), await _measure_size(engine, "deliveries") / (campaigns * each * 2)


async def measure_single_updates(engine: AsyncEngine) -> float:
    """Milliseconds for 100,000 events in the table of rows, as a statement for each event, in one transaction and pipelined."""
    drawn, positions = draw_events(9, SHAPES[MANY][0], MOST_ROWS_EACH)
    pairs = list(zip(drawn.tolist(), (positions * (CONTACTS // MOST_ROWS_EACH)).tolist(), strict=True))

    async def apply(conn: AsyncConnection) -> None:
        await (
            (await driver(conn))
            .cursor()
            .executemany(
                "UPDATE deliveries SET delivered = coalesce(delivered, now()) WHERE campaign_id = %b AND contact = %b", pairs
            )
        )

    return await clock(engine, apply)


async def _measure_size(engine: AsyncEngine, table: str) -> int:
    async with engine.connect() as conn:
        return int((await conn.execute(text(f"SELECT pg_total_relation_size('{table}')"))).scalar_one())


async def measure_scattered(engine: AsyncEngine) -> dict[str, Any]:
    """Both ways for both shapes, and what the rows cost."""
    scattered: dict[str, Any] = {}
    row_bytes = {}
    for name, (campaigns, people) in SHAPES.items():
        bits_ms, size = await measure_bits(engine, campaigns, people)
        rows_ms, row_bytes[name] = await measure_rows(engine, campaigns, people)
        scattered[name] = {
            "bits_ms": round(bits_ms, 1),
            "rows_ms": round(rows_ms),
            "times_faster": round(rows_ms / bits_ms, 1),
            "bytes_per_person_and_signal": round(size, 2),
        }
    model = {
        "table_rows": {name: campaigns * min(people, MOST_ROWS_EACH) for name, (campaigns, people) in SHAPES.items()},
        "bytes_per_person_and_signal": {name: round(size, 1) for name, size in row_bytes.items()},
        "statement_for_each_event_ms": round(await measure_single_updates(engine)),
    }
    async with transaction(engine) as conn:
        await conn.execute(text("DROP TABLE deliveries"))
    return {"scattered": scattered, "row_model": model}


async def measure_chunks(engine: AsyncEngine) -> list[dict[str, Any]]:
    """Chunks of 2,048 to 32,768 positions: milliseconds for 100,000 events and bytes for a person and signal, by shape."""
    shapes = {**SHAPES, "1x10000000": (1, CONTACTS)}
    curve = []
    for chunk_bits in range(11, 16):
        row: dict[str, Any] = {"positions": 1 << chunk_bits}
        for name, (campaigns, people) in shapes.items():
            taken, size = await measure_bits(engine, campaigns, people, chunk_bits)
            row[name] = {"ms": round(taken, 1), "bytes": round(size, 2)}
        curve.append(row)
    return curve
