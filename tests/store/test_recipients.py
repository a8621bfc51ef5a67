"""Finding one person: places on rolls of every shape, and what receipts and logs hold of a place."""

from __future__ import annotations

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.rolls.chunks import CHUNK, BitRows, pack_positions, slot_of
from aftertouch.rolls.sql import add_to_set, count_sets, page_set, remove_from_set, upsert_receipts, write_roll
from aftertouch.store.engine import transaction
from aftertouch.store.recipients import Place, find_places, read_true_kinds

STEP = 1 << 24
"""Numbers this far apart need every byte of their offsets."""


async def test_place_is_found_on_rolls_of_every_shape(engine: AsyncEngine) -> None:
    rng = np.random.default_rng(5)
    whole = np.arange(3 * CHUNK + 5)
    rolls = {
        1: whole,
        2: np.unique(rng.choice(1_000_000, 40_000)),
        3: np.array([7]),
        4: np.arange(200) * STEP + 3,
        # Bytes that look like another number's offset, but begin in the middle of one.
        5: np.array([0, 0x01020304, 0x05060708]),
        6: whole[::2],
        9: whole + 5_000_000_000,
    }
    async with transaction(engine) as conn:
        for campaign_id, numbers in rolls.items():
            await write_roll(conn, campaign_id, numbers.astype(np.int64))
        wanted = {0, 1, 7, CHUNK - 1, CHUNK, 3 * CHUNK + 4, 3 * CHUNK + 5, 3 + STEP, 4 + STEP, 199 * STEP + 3, 0x03040506}
        wanted |= {0x01020304, 5_000_000_000, 5_000_024_580, *rng.choice(1_000_000, 60).tolist(), *rolls[2][::1000].tolist()}
        for number in sorted(wanted):
            places = await find_places(conn, number, [9, 6, 5, 4, 3, 2, 1, 77])
            found = {place.campaign_id: place for place in places}
            expected = {key: int(np.searchsorted(roll, number)) for key, roll in rolls.items() if number in roll}
            assert {key: (place.slot, place.position) for key, place in found.items()} == {
                key: (slot_of(key, at // CHUNK), at % CHUNK) for key, at in expected.items()
            }
            assert [place.campaign_id for place in places] == sorted(expected, reverse=True)


async def test_true_kinds_are_those_of_the_place(engine: AsyncEngine) -> None:
    bits = [pack_positions(np.array(positions), 20).tobytes() for positions in ([0, 19], [3], [19])]
    slots = [slot_of(1, 0), slot_of(1, 0), slot_of(2, 1)]
    async with transaction(engine) as conn:
        await upsert_receipts(conn, BitRows(slots, [1, 2, 1], bits))
        places = [Place(slots[0], 0), Place(slots[0], 3), Place(slots[0], 4), Place(slots[0], 19), Place(slots[2], 19)]
        true = await read_true_kinds(conn, places)
    assert [true.get(place, set()) for place in places] == [{1}, {2}, set(), {1}, {1}]


# A set as Python has them, beside one of ours: numbers of a few blocks, the last of which is far away.
NUMBERS = st.sets(st.integers(0, 3 * CHUNK) | st.integers(50 * CHUNK, 50 * CHUNK + 3), max_size=30)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(st.tuples(st.booleans(), NUMBERS), max_size=6), after=st.integers(-1, 51 * CHUNK), limit=st.integers(1, 40)
)
async def test_set_counts_and_pages_as_a_set_of_python(
    engine: AsyncEngine, changes: list[tuple[bool, set[int]]], after: int, limit: int
) -> None:
    expected: set[int] = set()
    async with engine.connect() as conn:
        for is_added, numbers in changes:
            if not numbers:
                continue
            given_numbers = np.array(sorted(numbers), np.int64)
            if is_added:
                assert await add_to_set(conn, 3, "list/1", given_numbers) == len(numbers - expected)
                expected |= numbers
            else:
                assert await remove_from_set(conn, 3, "list/1", given_numbers) == len(numbers & expected)
                expected -= numbers
        assert (await count_sets(conn, 3, ["list/1", "list/2"])).get("list/1", 0) == len(expected)
        page = (await page_set(conn, 3, "list/1", after, limit)).tolist()
        assert page == sorted(number for number in expected if number > after)[:limit]
        assert (await page_set(conn, 2, "list/1", -1, limit)).tolist() == []
        await conn.rollback()
