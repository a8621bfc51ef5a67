"""Events scattered over many campaigns: bits over rolls against a table with a row for each delivery, in the same database.

Both are given what happened and left to apply it in one transaction, without the log. The row model is written as well as it can
be: one UPDATE over an array, by primary key, without foreign keys or further indexes, which is six times faster than a statement
for each event. Where a row for each of 100 million deliveries would not fit, its table has two million, which favours it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import numpy as np
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.rolls.chunks import CHUNK_BITS, SLOT_SHIFT, BitRows, group_bits
from aftertouch.rolls.sql import upsert_receipts
from aftertouch.store.engine import BitStrings, driver, transaction

EVENTS = 100_000
CONTACTS = 10_000_000
MOST_ROWS_EACH = 2_000
"""Deliveries of a campaign in the table of rows: of larger campaigns only so many, so that the table can be made in seconds."""
SHAPES = {"1000x1000": (1_000, 1_000), "1000x100000": (1_000, 100_000)}
FEW, MANY = SHAPES
ALL_SHAPES = {**SHAPES, "1x10000000": (1, CONTACTS)}
SENT, DELIVERED = 1, 2

Numbers = np.ndarray[Any, Any]
Upsert = Callable[[AsyncConnection, BitRows], Awaitable[None]]


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


async def time_events(
    engine: AsyncEngine,
    campaigns: int,
    people: int,
    chunk_bits: int = CHUNK_BITS,
    upsert: Upsert = upsert_receipts,
    times: int = 3,
) -> list[float]:
    """Milliseconds for 100,000 events, from arrays to commit, over and over: the first time nobody has the signal yet."""
    async with transaction(engine) as conn:
        await conn.execute(text("TRUNCATE receipts"))
    await fill_receipts(engine, campaigns, people, SENT, chunk_bits)
    taken = []
    events = [draw_events(seed, campaigns, people) for seed in range(times)]
    for drawn, positions in events:

        async def apply(conn: AsyncConnection, drawn: Numbers = drawn, positions: Numbers = positions) -> None:
            await upsert(conn, make_bits(drawn, positions, people, DELIVERED, chunk_bits))

        taken.append(await clock(engine, apply))
    async with engine.connect() as conn:
        counted = await conn.execute(text(f"SELECT sum(bit_count(bits)) FROM receipts WHERE kind = {DELIVERED}"))
        assert counted.scalar_one() == len(np.unique(np.concatenate([drawn * people + positions for drawn, positions in events])))
    return taken


async def measure_bits(engine: AsyncEngine, campaigns: int, people: int, chunk_bits: int = CHUNK_BITS) -> tuple[float, float]:
    """Milliseconds for 100,000 events; and bytes for a person and signal when all people have two."""
    taken = await time_events(engine, campaigns, people, chunk_bits)
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
    curve = []
    for chunk_bits in range(11, 16):
        row: dict[str, Any] = {"positions": 1 << chunk_bits}
        for name, (campaigns, people) in ALL_SHAPES.items():
            taken, size = await measure_bits(engine, campaigns, people, chunk_bits)
            row[name] = {"ms": round(taken, 1), "bytes": round(size, 2)}
        curve.append(row)
    return curve


# Other forms of the upsert


NEW = "unnest(%b::bigint[], %b::int[], %b::varbit[]) AS new (slot, kind, bits)"
OR_BITS = "ON CONFLICT (slot, kind) DO UPDATE SET bits = r.bits | excluded.bits"


async def upsert_all(conn: AsyncConnection, rows: BitRows) -> None:
    """As the server does it, in a single statement however many rows there are."""
    statement = f"INSERT INTO receipts AS r (slot, kind, bits) SELECT * FROM {NEW} ORDER BY slot, kind {OR_BITS}"
    await (await driver(conn)).execute(statement, (rows.slots, rows.kinds, BitStrings(rows.bits)))


async def upsert_each(conn: AsyncConnection, rows: BitRows) -> None:
    """A statement for each row, pipelined."""
    values = [(slot, kind, BitStrings([bits])) for slot, kind, bits in zip(rows.slots, rows.kinds, rows.bits, strict=True)]
    statement = f"INSERT INTO receipts AS r (slot, kind, bits) VALUES (%b, %b, (%b::varbit[])[1]) {OR_BITS}"
    await (await driver(conn)).cursor().executemany(statement, values)


async def update_then_insert(conn: AsyncConnection, rows: BitRows) -> None:
    """Change the rows that are there, then insert those that were not. Two that insert the same row at once would fail."""
    await (await driver(conn)).execute(
        f"WITH new AS (SELECT * FROM {NEW}), changed AS (UPDATE receipts AS r SET bits = r.bits | new.bits FROM new"
        " WHERE r.slot = new.slot AND r.kind = new.kind RETURNING r.slot, r.kind)"
        " INSERT INTO receipts SELECT * FROM new WHERE (slot, kind) NOT IN (SELECT slot, kind FROM changed)",
        (rows.slots, rows.kinds, BitStrings(rows.bits)),
    )


async def merge(conn: AsyncConnection, rows: BitRows) -> None:
    """The same in one step, with the same fault."""
    await (await driver(conn)).execute(
        f"MERGE INTO receipts AS r USING {NEW} ON r.slot = new.slot AND r.kind = new.kind"
        " WHEN MATCHED THEN UPDATE SET bits = r.bits | new.bits"
        " WHEN NOT MATCHED THEN INSERT VALUES (new.slot, new.kind, new.bits)",
        (rows.slots, rows.kinds, BitStrings(rows.bits)),
    )


async def copy_then_upsert(conn: AsyncConnection, rows: BitRows) -> None:
    """Bring the rows by a binary COPY, as events come into the log, and upsert from there."""
    pg = await driver(conn)
    await pg.execute("CREATE TEMP TABLE IF NOT EXISTS arrived (slot bigint, kind int, bits varbit) ON COMMIT DELETE ROWS")
    head = struct.Struct(">hiqiiii")
    parts = [b"PGCOPY\n\xff\r\n\0" + bytes(8)]
    for slot, kind, bits in zip(rows.slots, rows.kinds, rows.bits, strict=True):
        parts += (head.pack(3, 8, slot, 4, kind, 4 + len(bits), 8 * len(bits)), bits)
    async with pg.cursor().copy("COPY arrived FROM STDIN (FORMAT BINARY)") as copy:
        await copy.write(b"".join(parts))
    await pg.execute(f"INSERT INTO receipts AS r SELECT * FROM arrived ORDER BY slot, kind {OR_BITS}")


FORMS: dict[str, Upsert] = {
    "upsert of 2,000 rows at a time": upsert_receipts,
    "upsert of all rows at once": upsert_all,
    "upsert of each row": upsert_each,
    "update, then insert": update_then_insert,
    "merge": merge,
    "copy, then upsert": copy_then_upsert,
}


async def measure_upserts(engine: AsyncEngine) -> list[dict[str, Any]]:
    """Milliseconds for 100,000 events by the form of the upsert and by shape, of rows that are new and of rows that are there."""
    found = [await _measure_upsert(engine, form, upsert) for form, upsert in FORMS.items()]
    async with transaction(engine) as conn:
        await conn.execute(text("ALTER TABLE receipts SET (fillfactor = 100)"))
    found.append(await _measure_upsert(engine, "the first, on pages that are left full", upsert_receipts))
    async with transaction(engine) as conn:
        await conn.execute(text("ALTER TABLE receipts SET (fillfactor = 50)"))
    return found


async def _measure_upsert(engine: AsyncEngine, form: str, upsert: Upsert) -> dict[str, Any]:
    row: dict[str, Any] = {"form": form}
    for name, (campaigns, people) in ALL_SHAPES.items():
        first, *others = await time_events(engine, campaigns, people, upsert=upsert, times=6)
        row[name] = {"new_ms": round(first, 1), "again_ms": round(median(others), 1)}
    return row
