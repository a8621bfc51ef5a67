"""Rolls, receipts and contact sets in PostgreSQL: whole chunks, never a row per person."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from psycopg.rows import TupleRow
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import (
    CHUNK,
    CHUNK_BITS,
    CHUNK_BYTES,
    SLOT_SHIFT,
    BitRows,
    Bits,
    Numbers,
    block_of,
    blocks_of,
    byte_length,
    chunk_of,
    cut_roll,
    decode_numbers,
    list_numbers,
    pack_positions,
    slot_of,
    slot_range,
)
from aftertouch.store.engine import BitStrings, driver


async def _rows(conn: AsyncConnection, statement: str, parameters: Any = None) -> list[TupleRow]:
    cursor = (await driver(conn)).cursor(binary=True)
    await cursor.execute(statement, parameters)
    return await cursor.fetchall()


async def write_roll(conn: AsyncConnection, campaign_id: int, numbers: Numbers) -> None:
    """Write a campaign's recipients, sorted and distinct. Once per campaign, unless it is a draft's and was deleted."""
    cursor = (await driver(conn)).cursor()
    async with cursor.copy("COPY rolls (slot, first, last, members, numbers) FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["int8", "int8", "int8", "int4", "bytea"])
        for chunk in cut_roll(campaign_id, numbers):
            first, last = int(chunk.numbers[0]), int(chunk.numbers[-1])
            await copy.write_row((chunk.slot, first, last, len(chunk.numbers), chunk.encode_numbers()))


async def delete_roll(conn: AsyncConnection, campaign_id: int) -> None:
    """Delete what was written for a draft."""
    await (await driver(conn)).execute("DELETE FROM rolls WHERE slot >= %b AND slot < %b", slot_range(campaign_id))


async def read_roll(conn: AsyncConnection, campaign_id: int) -> Numbers:
    """All contact numbers of a roll, in the order of positions."""
    start, end = slot_range(campaign_id)
    rows = await _rows(
        conn, "SELECT first, members, numbers FROM rolls WHERE slot >= %s AND slot < %s ORDER BY slot", (start, end)
    )
    if not rows:
        return np.empty(0, np.int64)
    return np.concatenate([decode_numbers(*row) for row in rows])


async def read_roll_chunk(conn: AsyncConnection, slot: int) -> Numbers:
    """The contact numbers of one chunk."""
    (row,) = await _rows(conn, "SELECT first, members, numbers FROM rolls WHERE slot = %s", (slot,))
    return decode_numbers(*row)


async def read_numbers(conn: AsyncConnection, campaign_id: int, positions: Numbers) -> Numbers:
    """The contact numbers at these positions, ascending, of a roll. Reads the chunks concerned."""
    chunks = positions >> CHUNK_BITS
    rows = await _rows(
        conn,
        "SELECT slot, first, members, numbers FROM rolls WHERE slot = ANY(%s) ORDER BY slot",
        ([slot_of(campaign_id, chunk) for chunk in np.unique(chunks).tolist()],),
    )
    parts = [decode_numbers(*encoded)[positions[chunks == chunk_of(slot)] % CHUNK] for slot, *encoded in rows]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


async def find_positions(conn: AsyncConnection, campaign_id: int, numbers: Numbers) -> Numbers:
    """The position of each of these contact numbers, sorted, on a roll; -1 for who is not on it. Reads the chunks concerned."""
    positions = np.full(len(numbers), -1, np.int64)
    if not len(numbers):
        return positions
    start, end = slot_range(campaign_id)
    rows = await _rows(
        conn,
        "SELECT slot, first, members, numbers FROM rolls WHERE slot >= %s AND slot < %s AND last >= %s AND first <= %s",
        (start, end, int(numbers[0]), int(numbers[-1])),
    )
    for slot, *encoded in rows:
        chunk = decode_numbers(*encoded)
        places = np.minimum(np.searchsorted(chunk, numbers), len(chunk) - 1)
        found = chunk[places] == numbers
        positions[found] = places[found] + chunk_of(slot) * CHUNK
    return positions


async def read_slots(conn: AsyncConnection, slots: Sequence[int]) -> dict[int, dict[int, Bits]]:
    """The bits of some slots by kind, all as of one moment; slots without any are left out."""
    rows = await _rows(conn, "SELECT slot, kind, bits FROM receipts WHERE slot = ANY(%s)", (list(slots),))
    read: dict[int, dict[int, Bits]] = {}
    for slot, kind, bits in rows:
        read.setdefault(slot, {})[kind] = np.frombuffer(bits, np.uint8)
    return read


_UPSERTED_AT_ONCE = 2_000
"""Rows of 1 kB, so half of PostgreSQL's work_mem: beyond it they would be sorted on disk, which doubled the time of 13,000."""


async def upsert_receipts(conn: AsyncConnection, rows: BitRows) -> None:
    """OR bits into the receipts; repeating it changes nothing.

    The rows come sorted and are inserted in that order: without it, concurrent batches on the same slots only deadlock.
    """
    pg = await driver(conn)
    for start in range(0, len(rows.slots), _UPSERTED_AT_ONCE):
        part = slice(start, start + _UPSERTED_AT_ONCE)
        await pg.execute(
            "INSERT INTO receipts AS r (slot, kind, bits)"
            " SELECT * FROM unnest(%b::bigint[], %b::int[], %b::varbit[]) AS new (slot, kind, bits) ORDER BY slot, kind"
            " ON CONFLICT (slot, kind) DO UPDATE SET bits = r.bits | excluded.bits",
            (rows.slots[part], rows.kinds[part], BitStrings(rows.bits[part])),
        )


async def read_receipts(conn: AsyncConnection, slot: int) -> dict[int, Bits]:
    """The bits of one slot by kind."""
    rows = await _rows(conn, "SELECT kind, bits FROM receipts WHERE slot = %s", (slot,))
    return {kind: np.frombuffer(bits, np.uint8) for kind, bits in rows}


_VERSION = np.dtype([("chunk", ">i4"), ("version", ">u4")])
_SEND_VERSION = f"string_agg(int4send((slot & {(1 << SLOT_SHIFT) - 1})::int) || xidsend(r.xmin), ''::bytea)"


class Sight(NamedTuple):
    """What a snapshot sees: every transaction before ``first`` is over, and none from ``end`` on is visible."""

    first: int
    end: int


async def read_sight(conn: AsyncConnection) -> Sight | None:
    """What the caller's transaction sees, as long as it lasts; None where each of its statements sees something else."""
    ((first, end, isolation),) = await _rows(
        conn,
        "SELECT pg_snapshot_xmin(seen)::text::bigint, pg_snapshot_xmax(seen)::text::bigint,"
        " current_setting('transaction_isolation') FROM pg_current_snapshot() AS seen",
    )
    return Sight(first, end) if isolation == "repeatable read" else None


async def read_versions(
    conn: AsyncConnection,
    campaign_id: int,
    kinds: Collection[int] | None,
    chunks: int,
    known: Mapping[int, NDArray[np.uint32]],
    since: int | None,
) -> dict[int, NDArray[np.uint32]]:
    """For each kind, the version of its receipts in each chunk: the transaction that wrote them, 0 where there are none.

    Args:
        kinds: which to read; None reads those that there are.
        known: versions of all these kinds, of which whatever was written before the transaction ``since`` is sure to be left.
            Sending only what came later takes half the time.
    """
    start, end = slot_range(campaign_id)
    # Of a transaction PostgreSQL keeps 32 bits with a row, and compares them in a circle.
    is_later = "" if since is None else f" AND age(r.xmin) <= age('{since % (1 << 32)}'::xid)"
    rows = await _rows(
        conn,
        f"SELECT kind, {_SEND_VERSION} FROM receipts AS r WHERE slot >= %b AND slot < %b"
        f" AND (%b::int[] IS NULL OR kind = ANY(%b)){is_later} GROUP BY kind",
        (start, end, *[None if kinds is None else list(kinds)] * 2),
    )
    versions = {kind: np.zeros(chunks, np.uint32) if since is None else known[kind].copy() for kind in kinds or ()}
    for kind, sent in rows:
        found = np.frombuffer(sent, _VERSION)
        versions.setdefault(kind, np.zeros(chunks, np.uint32))[found["chunk"]] = found["version"]
    return versions


@dataclass(frozen=True)
class ReadBits:
    """The bits of one kind in some chunks of a campaign."""

    chunks: NDArray[np.int64]
    versions: NDArray[np.uint32]
    bits: NDArray[np.uint8]
    """A row for each chunk, a whole one: the last is filled up with zeros."""


async def read_bits(
    conn: AsyncConnection, campaign_id: int, recipients: int, chosen: Mapping[int, NDArray[np.int64]]
) -> dict[int, ReadBits]:
    """The receipts of these chunks of each kind; as many rows in the answer as kinds, since each row costs the driver 2 µs."""
    start, _ = slot_range(campaign_id)
    rows = await _rows(
        conn,
        f"SELECT kind, {_SEND_VERSION}, string_agg(varbit_send(bits), ''::bytea)"
        " FROM unnest(%b::bigint[], %b::int[]) AS wanted (slot, kind) JOIN receipts AS r USING (slot, kind) GROUP BY kind",
        (
            [start + chunk for chunks in chosen.values() for chunk in chunks.tolist()],
            [kind for kind, chunks in chosen.items() for _ in range(len(chunks))],
        ),
    )
    last = (recipients - 1) >> CHUNK_BITS
    missing = bytes(CHUNK_BYTES - byte_length(recipients - last * CHUNK))
    read = {}
    for kind, sent, bits in rows:
        found = np.frombuffer(sent, _VERSION)
        for at in np.flatnonzero(found["chunk"] == last).tolist() if missing else ():
            end = (at + 1) * (4 + CHUNK_BYTES) - len(missing)
            bits = bits[:end] + missing + bits[end:]
        read[kind] = ReadBits(found["chunk"].astype(np.int64), found["version"].astype(np.uint32), _split_bits(bits))
    return read


async def read_sets(
    conn: AsyncConnection, app_id: int, names: Sequence[str], blocks: int, within: Numbers | None = None
) -> dict[str, Bits]:
    """Contact sets as bits by contact number; a set in which nobody is, is all zeros.

    Args:
        blocks: how many blocks the answer spans, from the app's first.
        within: only these blocks, by their place from the first; the others are zeros.
    """
    first = app_id << SLOT_SHIFT
    chosen = "block >= %(first)s AND block < %(last)s" if within is None else "block = ANY(%(within)s)"
    rows = await _rows(
        conn,
        "SELECT name, string_agg(int8send(block), ''::bytea), string_agg(varbit_send(bits), ''::bytea) FROM contact_sets"
        f" WHERE {chosen} AND name = ANY(%(names)s) GROUP BY name",
        {
            "first": first,
            "last": first + blocks,
            "within": [] if within is None else (within + first).tolist(),
            "names": list(names),
        },
    )
    found = {name: np.zeros(blocks * CHUNK_BYTES, np.uint8) for name in names}
    for name, sent, bits in rows:
        found[name].reshape(-1, CHUNK_BYTES)[np.frombuffer(sent, ">i8") - first] = _split_bits(bits)
    return found


def _split_bits(sent: bytes) -> NDArray[np.uint8]:
    """A row for each bit string of a whole chunk, from what ``varbit_send`` wrote: the length, and the bits."""
    return np.frombuffer(sent, np.uint8).reshape(-1, 4 + CHUNK_BYTES)[:, 4:]


async def page_set(conn: AsyncConnection, app_id: int, name: str, after: int, limit: int) -> Numbers:
    """Contact numbers in a contact set that are larger than ``after``, ascending, at most ``limit``."""
    block, end = block_of(app_id, max(after, 0)), (app_id + 1) << SLOT_SHIFT
    found: list[Numbers] = []
    while sum(map(len, found)) < limit:
        rows = await _rows(
            conn,
            "SELECT block, bits FROM contact_sets WHERE block >= %s AND block < %s AND name = %s ORDER BY block LIMIT 16",
            (block, end, name),
        )
        if not rows:
            break
        parts = [
            list_numbers(np.frombuffer(bits, np.uint8)) + ((row - (app_id << SLOT_SHIFT)) << CHUNK_BITS) for row, bits in rows
        ]
        numbers = np.concatenate(parts)
        found.append(numbers[numbers > after])
        block = rows[-1][0] + 1
    return np.concatenate(found)[:limit] if found else np.empty(0, np.int64)


async def count_sets(conn: AsyncConnection, app_id: int, names: list[str]) -> dict[str, int]:
    """How many contacts are in each of these sets; one that has none is left out."""
    return dict(
        await _rows(
            conn,
            "SELECT name, sum(bit_count(bits))::bigint FROM contact_sets"
            " WHERE block >= %s AND block < %s AND name = ANY(%s) GROUP BY name",
            (app_id << SLOT_SHIFT, (app_id + 1) << SLOT_SHIFT, names),
        )
    )


async def add_to_set(conn: AsyncConnection, app_id: int, name: str, numbers: Numbers) -> int:
    """Put contact numbers, sorted and distinct, into a set, and return how many were not in it.

    The caller sees to it that nobody else adds to this set meanwhile, and that nobody of them is erased.
    """
    before = await _lock_set(conn, app_id, name, numbers)
    wanted = dict(_pack_blocks(app_id, numbers))
    pg = await driver(conn)
    await pg.execute(
        "INSERT INTO contact_sets AS s (block, name, bits)"
        " SELECT block, %b, bits FROM unnest(%b::bigint[], %b::varbit[]) AS new (block, bits) ORDER BY block"
        " ON CONFLICT (block, name) DO UPDATE SET bits = s.bits | excluded.bits",
        (name, list(wanted), BitStrings([bits.tobytes() for bits in wanted.values()])),
    )
    return len(numbers) - _count_common(wanted, before)


async def remove_from_set(conn: AsyncConnection, app_id: int, name: str, numbers: Numbers) -> int:
    """Take contact numbers, sorted and distinct, out of a set, and return how many were in it."""
    before = await _lock_set(conn, app_id, name, numbers)
    unwanted = dict(_pack_blocks(app_id, numbers))
    pg = await driver(conn)
    await pg.execute(
        "UPDATE contact_sets AS s SET bits = s.bits & ~ old.bits"
        " FROM unnest(%b::bigint[], %b::varbit[]) AS old (block, bits) WHERE s.block = old.block AND s.name = %b",
        (list(unwanted), BitStrings([bits.tobytes() for bits in unwanted.values()]), name),
    )
    return _count_common(unwanted, before)


async def drop_set(conn: AsyncConnection, app_id: int, name: str) -> None:
    """Delete a contact set."""
    pg = await driver(conn)
    await pg.execute(
        "DELETE FROM contact_sets WHERE block >= %b AND block < %b AND name = %b",
        (app_id << SLOT_SHIFT, (app_id + 1) << SLOT_SHIFT, name),
    )


async def clear_from_sets(conn: AsyncConnection, app_id: int, number: int) -> list[str]:
    """Take a contact out of all sets, and return their names. The caller holds the block's lock (``lock_blocks``)."""
    place = {"block": block_of(app_id, number), "offset": number % CHUNK}
    pg = await driver(conn)
    rows = await pg.execute(
        "WITH held AS (SELECT name FROM contact_sets WHERE block = %(block)s AND get_bit(bits, %(offset)s) = 1"
        " ORDER BY name FOR NO KEY UPDATE)"
        " UPDATE contact_sets AS s SET bits = set_bit(s.bits, %(offset)s, 0) FROM held"
        " WHERE s.block = %(block)s AND s.name = held.name RETURNING s.name",
        place,
    )
    return sorted(name for (name,) in await rows.fetchall())


async def _lock_set(conn: AsyncConnection, app_id: int, name: str, numbers: Numbers) -> dict[int, Bits]:
    """The rows of a set that these contacts are in, as they are until the transaction ends."""
    rows = await _rows(
        conn,
        "SELECT block, bits FROM contact_sets WHERE block = ANY(%s) AND name = %s ORDER BY block FOR NO KEY UPDATE",
        (np.unique(blocks_of(app_id, numbers)).tolist(), name),
    )
    return {block: np.frombuffer(bits, np.uint8) for block, bits in rows}


def _pack_blocks(app_id: int, numbers: Numbers) -> Iterable[tuple[int, Bits]]:
    blocks = blocks_of(app_id, numbers)
    for block in np.unique(blocks).tolist():
        yield block, pack_positions(numbers[blocks == block] % CHUNK, CHUNK)


def _count_common(some: Mapping[int, Bits], others: Mapping[int, Bits]) -> int:
    return sum(int(np.bitwise_count(bits & others[block]).sum()) for block, bits in some.items() if block in others)


@dataclass(frozen=True)
class SetChange:
    """New membership of some contact numbers of one block in one set."""

    block: int
    name: str
    touched: Bits
    members: Bits


async def change_sets(conn: AsyncConnection, changes: list[SetChange]) -> None:
    """Give the touched contact numbers their new membership. The caller holds the blocks' locks (``lock_blocks``)."""
    if not changes:
        return
    changes = sorted(changes, key=lambda change: (change.block, change.name))
    pg = await driver(conn)
    await pg.execute(
        "INSERT INTO contact_sets AS s (block, name, bits)"
        " SELECT block, name, members FROM unnest(%b::bigint[], %b::text[], %b::varbit[]) AS new (block, name, members)"
        " ORDER BY block, name"
        " ON CONFLICT (block, name) DO UPDATE SET bits = s.bits | excluded.bits",
        ([c.block for c in changes], [c.name for c in changes], BitStrings([c.members.tobytes() for c in changes])),
    )
    await pg.execute(
        "UPDATE contact_sets AS s SET bits = s.bits & ~ new.cleared"
        " FROM unnest(%b::bigint[], %b::text[], %b::varbit[]) AS new (block, name, cleared)"
        " WHERE s.block = new.block AND s.name = new.name",
        (
            [c.block for c in changes],
            [c.name for c in changes],
            BitStrings([(c.touched & ~c.members).tobytes() for c in changes]),
        ),
    )


async def lock_blocks(conn: AsyncConnection, blocks: Iterable[int]) -> None:
    """Serialise changes of these blocks' subscriptions until the transaction ends; in order, so that nobody deadlocks.

    Two changes of one contact's subscriptions must see each other to compute its reach.
    """
    pg = await driver(conn)
    await pg.execute("SELECT pg_advisory_xact_lock(block) FROM unnest(%b::bigint[]) AS locks (block)", (sorted(set(blocks)),))
