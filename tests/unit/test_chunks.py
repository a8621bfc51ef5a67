"""The arithmetic of chunks against plain Python sets."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftertouch.rolls.chunks import (
    CHUNK,
    Roll,
    block_of,
    blocks_of,
    byte_length,
    chunk_of,
    cut_roll,
    decode_offsets,
    group_bits,
    members_of,
    pack_positions,
    slot_of,
    slot_range,
    unpack_positions,
)

MEMBERS = (1, 7, 8, 9, 100, CHUNK - 1, CHUNK)


@st.composite
def draw_events(draw: st.DrawFn) -> list[tuple[int, int, int, int]]:
    """(slot, kind, position, members) each; a slot always has the same members."""
    members = draw(st.dictionaries(st.integers(0, 1 << 40), st.sampled_from(MEMBERS), min_size=1, max_size=4))
    event = st.sampled_from(sorted(members)).flatmap(
        lambda slot: st.tuples(st.just(slot), st.integers(1, 3), st.integers(0, members[slot] - 1), st.just(members[slot]))
    )
    return draw(st.lists(event, max_size=60))


@given(draw_events())
def test_group_bits_sets_exactly_the_bits_of_the_events(events: list[tuple[int, int, int, int]]) -> None:
    expected: dict[tuple[int, int], set[int]] = defaultdict(set)
    lengths = {}
    for slot, kind, position, members in events:
        expected[slot, kind].add(position)
        lengths[slot] = byte_length(members)
    columns = np.array(events, np.int64).reshape(-1, 4).T
    rows = group_bits(*columns)
    assert list(zip(rows.slots, rows.kinds, strict=True)) == sorted(expected)
    for slot, kind, bits in zip(rows.slots, rows.kinds, rows.bits, strict=True):
        assert set(unpack_positions(np.frombuffer(bits, np.uint8)).tolist()) == expected[slot, kind]
        assert len(bits) == lengths[slot]


@given(st.sampled_from(MEMBERS).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))))
def test_positions_are_unpacked_as_they_were_packed(drawn: tuple[int, set[int]]) -> None:
    members, positions = drawn
    packed = pack_positions(np.array(sorted(positions), np.int64), members)
    assert len(packed) == byte_length(members)
    assert unpack_positions(packed).tolist() == sorted(positions)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 5])
def test_roll_is_cut_into_full_chunks_and_read_back(size: int) -> None:
    dice = np.random.default_rng(size)
    numbers = np.sort(dice.choice(10 * size + 1, size, replace=False)).astype(np.int64)
    chunks = list(cut_roll(3, numbers))
    assert [len(chunk.numbers) for chunk in chunks] == members_of(size, np.arange(len(chunks))).tolist()
    assert [chunk.slot for chunk in chunks] == [slot_of(3, index) for index in range(len(chunks))]
    parts = [decode_offsets(int(chunk.numbers[0]), chunk.encode_offsets()) for chunk in chunks]
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == numbers.tolist()


@given(st.integers(0, 1 << 42), st.integers(0, (1 << 20) - 1))
def test_slots_of_a_campaign_are_its_own(campaign_id: int, chunk: int) -> None:
    start, end = slot_range(campaign_id)
    slot = slot_of(campaign_id, chunk)
    assert start <= slot < end == slot_range(campaign_id + 1)[0]
    assert chunk_of(slot) == chunk


@given(st.integers(0, 1 << 40), st.lists(st.integers(0, 1 << 33), max_size=20))
def test_blocks_of_many_are_the_blocks_of_each(app_id: int, numbers: list[int]) -> None:
    wanted = [block_of(app_id, number) for number in numbers]
    assert blocks_of(app_id, np.array(numbers, np.int64)).tolist() == wanted


@given(
    st.sets(st.integers(0, 300)) | st.sets(st.integers(0, 1 << 40), max_size=20),
    st.lists(st.integers(-2, 310) | st.integers(0, 1 << 40), max_size=20),
)
def test_roll_finds_the_position_of_each_number(members: set[int], others: list[int]) -> None:
    roll = Roll(np.array(sorted(members), np.int64))
    expected = {number: position for position, number in enumerate(sorted(members))}
    wanted = [*members, *others]
    assert roll.find(np.array(wanted, np.int64)).tolist() == [expected.get(number, -1) for number in wanted]
