"""Questions over receipts and contact sets: PostgreSQL's answers against Python's sets, for any history and expression."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.rolls.chunks import (
    CHUNK,
    CHUNK_BITS,
    CHUNK_BYTES,
    SLOT_SHIFT,
    Bits,
    byte_length,
    count_bits,
    count_chunks,
    find_members,
    group_bits,
    list_numbers,
    members_of,
    slot_of,
    slot_range,
    unpack_positions,
)
from aftertouch.rolls.sql import (
    delete_roll,
    read_bits,
    read_numbers,
    read_receipts,
    read_roll,
    read_roll_chunk,
    read_sets,
    read_versions,
    upsert_receipts,
    write_roll,
)
from aftertouch.signals import CORE_IMPLICATIONS, Expression, close_implications
from aftertouch.store.contacts import Contact, Subscription, find_numbers, standing_set, upsert_contacts
from aftertouch.store.engine import open_engine, transaction
from aftertouch.store.logs import MICROSECONDS, EventBatch, store_events
from tests.fix_database import clone_database
from tests.receipts import count_by_kind

EVIDENCE = close_implications({**CORE_IMPLICATIONS, "delivered": ("sent",), "read": ("delivered",)})
KIND_SIGNALS = {1: "attempted", 2: "sent", 3: "failed", 4: "failed", 5: "delivered", 6: "read", 7: "skipped"}
"""Two kinds of failure, as two reasons make."""
KINDS = {signal: [kind for kind, of in KIND_SIGNALS.items() if of in proving] for signal, proving in EVIDENCE.items()}
SIZES = (1, 7, 8, 9, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 13)

_campaigns = itertools.count(1)


@pytest.fixture(scope="module")
async def rolls_engine(postgres_url: str, template: str) -> AsyncIterator[AsyncEngine]:
    """Connections to a database for all tests here; each example uses a campaign of its own."""
    async with clone_database(postgres_url, template) as url, open_engine(url) as engine:
        yield engine


expressions: st.SearchStrategy[Expression] = st.recursive(
    st.sampled_from(sorted(EVIDENCE)).map(lambda name: Expression("name", name=name)),
    lambda inner: st.one_of(
        inner.map(lambda operand: Expression("~", (operand,))),
        st.tuples(st.sampled_from("&|"), st.lists(inner, min_size=2, max_size=3)).map(lambda p: Expression(p[0], tuple(p[1]))),
    ),
    max_leaves=8,
).filter(lambda expression: not expression.evaluate(lambda _: 0) & 1)


@dataclass(frozen=True)
class History:
    """What became true in a campaign: the positions of each kind."""

    size: int
    positions: dict[int, set[int]]

    def match(self, expression: Expression) -> set[int]:
        """The positions of whom the expression is true, person by person."""
        true = {signal: set().union(*(self.positions[kind] for kind in kinds)) for signal, kinds in KINDS.items()}
        touched = set().union(*self.positions.values())
        return {at for at in touched if expression.evaluate(lambda name, at=at: -1 if at in true[name] else 0) & 1}


@st.composite
def draw_history(draw: st.DrawFn) -> History:
    size = draw(st.sampled_from(SIZES))
    # The edges of bytes and chunks come up by themselves only rarely.
    edges = [at for at in (0, 7, 8, CHUNK - 1, CHUNK, 2 * CHUNK - 1, size - 1) if at < size]
    position = st.integers(0, size - 1) | st.sampled_from(edges)
    return History(size, {kind: draw(st.sets(position, max_size=30)) for kind in KIND_SIGNALS})


async def store(engine: AsyncEngine, history: History) -> int:
    campaign_id = next(_campaigns)
    facts = np.array([(kind, at) for kind, found in history.positions.items() for at in found], np.int64).reshape(-1, 2)
    chunks = facts[:, 1] >> CHUNK_BITS
    slots = np.array([slot_of(campaign_id, chunk) for chunk in chunks.tolist()], np.int64)
    rows = group_bits(slots, facts[:, 0], facts[:, 1] & (CHUNK - 1), members_of(history.size, chunks))
    async with transaction(engine) as conn:
        await upsert_receipts(conn, rows)
        await upsert_receipts(conn, rows)
    return campaign_id


async def select_positions(
    conn: AsyncConnection, campaign_id: int, size: int, kinds: dict[str, list[int]], expression: Expression
) -> set[int]:
    """Of whom an expression is true, from the bits as they are read."""
    chunks = count_chunks(size)
    versions = await read_versions(conn, campaign_id, sorted({kind for of in kinds.values() for kind in of}), chunks, {}, None)
    found = await read_bits(conn, campaign_id, size, {kind: np.flatnonzero(seen) for kind, seen in versions.items()})
    whole: dict[int, Bits] = {}
    for kind, seen in versions.items():
        whole[kind] = np.zeros(chunks * CHUNK_BYTES, np.uint8)
        if kind in found:
            assert (found[kind].versions == seen[found[kind].chunks]).all()
            whole[kind].reshape(-1, CHUNK_BYTES)[found[kind].chunks] = found[kind].bits
    zeros = np.zeros(chunks * CHUNK_BYTES, np.uint8)
    matching = expression.evaluate(lambda name: np.bitwise_or.reduce([zeros, *(whole[kind] for kind in kinds[name])]))
    return set(unpack_positions(matching).tolist())


async def count_in_sql(conn: AsyncConnection, campaign_id: int, expression: Expression) -> int:
    """Of how many an expression is true, as PostgreSQL computes it from the rows."""
    columns = ", ".join(
        f"coalesce(bit_or(bits) FILTER (WHERE kind = ANY(ARRAY{kinds or [0]})), bit_or(bits) # bit_or(bits)) AS {signal}"
        for signal, kinds in KINDS.items()
    )
    start, end = slot_range(campaign_id)
    statement = (
        f"SELECT coalesce(sum(bit_count({expression.compile_sql(str)})), 0)"
        f" FROM (SELECT {columns} FROM receipts WHERE slot >= {start} AND slot < {end} GROUP BY slot) AS slots"
    )
    return int((await conn.execute(text(statement))).scalar_one())


@settings(max_examples=60, deadline=None)
@given(history=draw_history(), asked=st.lists(expressions, min_size=1, max_size=4))
async def test_expressions_are_selected_as_sets_say(rolls_engine: AsyncEngine, history: History, asked: list[Expression]) -> None:
    """By numpy from the bits that were read, and by PostgreSQL itself."""
    campaign_id = await store(rolls_engine, history)
    await store(rolls_engine, History(history.size, {kind: set(range(history.size)) for kind in KIND_SIGNALS}))
    async with transaction(rolls_engine) as conn:
        for expression in asked:
            found = await select_positions(conn, campaign_id, history.size, KINDS, expression)
            assert found == history.match(expression)
            assert await count_in_sql(conn, campaign_id, expression) == len(found)
        by_kind = await count_by_kind(conn, campaign_id)
    assert by_kind == {kind: len(positions) for kind, positions in history.positions.items() if positions}


@st.composite
def draw_deliveries(draw: st.DrawFn) -> tuple[History, list[list[list[tuple[int, int]]]]]:
    """What happened, and how it is told: in any order, some of it again, cut into batches that come in two ways at once."""
    history = draw(draw_history())
    facts = [(kind, at) for kind, found in history.positions.items() for at in found]
    told = draw(st.permutations(facts + (draw(st.lists(st.sampled_from(facts), max_size=40)) if facts else [])))
    cuts = sorted(draw(st.lists(st.integers(0, len(told)), max_size=7)))
    batches = [told[start:end] for start, end in itertools.pairwise([0, *cuts, len(told)])]
    ways: list[list[list[tuple[int, int]]]] = [[], []]
    for batch in batches:
        ways[draw(st.integers(0, 1))].append(batch)
    return history, ways


@settings(max_examples=40, deadline=None)
@given(deliveries=draw_deliveries())
async def test_any_order_repeat_and_interleaving_gives_the_same_receipts(
    rolls_engine: AsyncEngine, deliveries: tuple[History, list[list[list[tuple[int, int]]]]]
) -> None:
    history, ways = deliveries
    campaign_id, now = next(_campaigns), int(datetime.now(UTC).timestamp()) * MICROSECONDS

    async def deliver(batches: list[list[tuple[int, int]]]) -> None:
        for batch in batches:
            facts = np.array(batch, np.int64).reshape(-1, 2)
            chunks = facts[:, 1] >> CHUNK_BITS
            events = EventBatch(
                slots=campaign_id << SLOT_SHIFT | chunks,
                positions=(facts[:, 1] & (CHUNK - 1)).astype(np.int32),
                members=members_of(history.size, chunks),
                kinds=facts[:, 0].astype(np.int32),
                times=np.full(len(facts), now),
            )
            async with transaction(rolls_engine) as conn:
                await store_events(conn, events)

    await asyncio.gather(*map(deliver, ways))
    told = sum(len(batch) for way in ways for batch in way)
    start, end = slot_range(campaign_id)
    async with transaction(rolls_engine) as conn:
        found: dict[int, set[int]] = {}
        for chunk in range(count_chunks(history.size)):
            for kind, bits in (await read_receipts(conn, start + chunk)).items():
                found.setdefault(kind, set()).update((unpack_positions(bits) + chunk * CHUNK).tolist())
        assert found == {kind: positions for kind, positions in history.positions.items() if positions}
        sums = "SELECT coalesce(sum(events), 0) FROM activity WHERE minutes ="
        for statement in ("SELECT count(*) FROM events WHERE true", f"{sums} 1", f"{sums} 60"):
            counted = await conn.execute(text(f"{statement} AND slot >= {start} AND slot < {end}"))
            assert counted.scalar_one() == told


async def test_campaign_without_receipts_counts_nobody(rolls_engine: AsyncEngine) -> None:
    sent = Expression("name", name="sent")
    async with transaction(rolls_engine) as conn:
        assert await select_positions(conn, 1 << 40, 20, KINDS, sent) == set()
        assert await count_by_kind(conn, 1 << 40) == {}
        assert len(await read_roll(conn, 1 << 40)) == 0


async def test_signal_without_kinds_is_true_of_nobody(rolls_engine: AsyncEngine) -> None:
    campaign_id = await store(rolls_engine, History(20, {2: {3, 19}}))
    unread = Expression("&", (Expression("name", name="sent"), Expression("~", (Expression("name", name="read"),))))
    async with transaction(rolls_engine) as conn:
        assert await select_positions(conn, campaign_id, 20, {"sent": [2], "read": []}, unread) == {3, 19}


@settings(max_examples=20, deadline=None)
@given(first=draw_history(), second=draw_history())
async def test_receipts_are_only_ever_added_to(rolls_engine: AsyncEngine, first: History, second: History) -> None:
    size = max(first.size, second.size)
    merged = History(size, {kind: first.positions[kind] | second.positions[kind] for kind in KIND_SIGNALS})
    campaign_id = await store(rolls_engine, History(size, first.positions))
    async with transaction(rolls_engine) as conn:
        for kind, positions in second.positions.items():
            for at in positions:
                chunk = np.array([at >> CHUNK_BITS])
                slot, offset = slot_of(campaign_id, int(chunk[0])), at & (CHUNK - 1)
                one = (np.array([slot]), np.array([kind]), np.array([offset]), members_of(size, chunk))
                await upsert_receipts(conn, group_bits(*one))
        by_kind = await count_by_kind(conn, campaign_id)
        lengths = {len(bits) for bits in (await read_receipts(conn, slot_of(campaign_id, 0))).values()}
    assert by_kind == {kind: len(positions) for kind, positions in merged.positions.items() if positions}
    assert lengths <= {byte_length(min(size, CHUNK))}


@pytest.mark.parametrize("size", SIZES)
async def test_roll_is_read_as_it_was_written(rolls_engine: AsyncEngine, size: int) -> None:
    dice = np.random.default_rng(size)
    numbers = np.sort(dice.choice(20 * size, size, replace=False)).astype(np.int64)
    campaign_id = (1 << 30) + 2 * size
    async with transaction(rolls_engine) as conn:
        await write_roll(conn, campaign_id, numbers)
        await write_roll(conn, campaign_id + 1, numbers)
        assert (await read_roll(conn, campaign_id)).tolist() == numbers.tolist()
        last = (size - 1) // CHUNK
        assert (await read_roll_chunk(conn, slot_of(campaign_id, last))).tolist() == numbers[last * CHUNK :].tolist()
        for count in (0, 1, size):
            positions = np.sort(dice.choice(size, min(count, size), replace=False))
            assert (await read_numbers(conn, campaign_id, positions)).tolist() == numbers[positions].tolist()
        await delete_roll(conn, campaign_id)
        assert len(await read_roll(conn, campaign_id)) == 0
        assert len(await read_roll(conn, campaign_id + 1)) == size
        await delete_roll(conn, campaign_id + 1)


STANDINGS = ("active", "opted_out", "invalid")


async def test_contact_sets_follow_the_subscriptions(rolls_engine: AsyncEngine) -> None:
    """People on both sides of a block's edge, whose addresses come and change state; the sets say what the rows do."""
    app_id, dice = 77, np.random.default_rng(7)
    crowd = CHUNK + 40
    states: dict[str, dict[str, str]] = {}
    async with transaction(rolls_engine) as conn:
        await upsert_contacts(conn, app_id, [Contact(f"n{i}", {}) for i in range(crowd)])
        numbers = await find_numbers(conn, app_id, [f"n{i}" for i in range(crowd)])
        assert sorted(numbers.values()) == list(range(crowd))
    people = [*range(12), *range(CHUNK - 6, CHUNK + 6), crowd - 1]
    for _ in range(25):
        given = []
        for i in dice.choice(people, 8, replace=False).tolist():
            key, state = f"a{dice.integers(3)}", [None, *STANDINGS][dice.integers(4)]
            held = states.setdefault(f"n{i}", {})
            held[key] = state or held.get(key, "active")
            given.append(Contact(f"n{i}", {}, subscriptions=(Subscription("sms", {"at": key}, key, state),)))
        async with transaction(rolls_engine) as conn:
            await upsert_contacts(conn, app_id, given)
            for standing in STANDINGS:
                expected = {
                    numbers[name]
                    for name, held in states.items()
                    if standing == next(possible for possible in STANDINGS if possible in held.values())
                }
                name = standing_set(standing, "sms")
                pushed = standing_set(standing, "push")
                sets = await read_sets(conn, app_id, [name, pushed], 3)
                assert set(list_numbers(sets[name]).tolist()) == expected
                asked = np.array([*people, 5000, crowd - 2, 10 * CHUNK], np.int64)
                assert find_members(sets[name], asked).tolist() == [n in expected for n in asked.tolist()]
                assert count_bits(sets[pushed]) == 0
                assert count_bits((await read_sets(conn, app_id + 1, [name], 3))[name]) == 0
                second = (await read_sets(conn, app_id, [name], 3, within=np.array([1])))[name]
                assert set(list_numbers(second).tolist()) == {number for number in expected if number >= CHUNK}
