"""The arithmetic of chunks against plain Python sets."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aftertouch.rolls.chunks import (
    CHUNK,
    Roll,
    RollChunk,
    block_of,
    blocks_of,
    byte_length,
    chunk_of,
    count_bits,
    count_chunks,
    cut_roll,
    decode_numbers,
    find_members,
    gather,
    group_bits,
    list_numbers,
    members_of,
    pack_chunks,
    pack_positions,
    page_bits,
    set_numbers,
    slot_of,
    slot_range,
    spread,
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


@settings(deadline=None)
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
@pytest.mark.parametrize("spread", [1, 10, 31, 32, 33, 100])
def test_roll_is_cut_into_full_chunks_and_read_back(size: int, spread: int) -> None:
    dice = np.random.default_rng(size)
    numbers = np.sort(dice.choice(spread * size + 1, size, replace=False)).astype(np.int64)
    chunks = list(cut_roll(3, numbers))
    assert [len(chunk.numbers) for chunk in chunks] == members_of(size, np.arange(len(chunks))).tolist()
    assert [chunk.slot for chunk in chunks] == [slot_of(3, index) for index in range(len(chunks))]
    parts = [decode_numbers(int(chunk.numbers[0]), len(chunk.numbers), chunk.encode_numbers()) for chunk in chunks]
    assert np.concatenate([np.empty(0, np.int64), *parts]).tolist() == numbers.tolist()


@pytest.mark.parametrize(("last", "size"), [(0, 1), (31, 4), (32 * CHUNK - 2, CHUNK), (32 * CHUNK - 1, CHUNK), (1 << 31, 2)])
def test_roll_chunk_takes_the_shorter_encoding(last: int, size: int) -> None:
    numbers = np.array([*range(size - 1), last], np.int64) + 7
    encoded = RollChunk(1, numbers).encode_numbers()
    assert len(encoded) == min(4 * size, last // 8 + 1)
    assert decode_numbers(7, size, encoded).tolist() == numbers.tolist()


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


@settings(deadline=None)
@given(st.sets(st.integers(0, 3 * CHUNK - 1), min_size=1, max_size=60), st.sampled_from([3, 4, 200]), st.randoms(), st.booleans())
def test_bits_cross_between_positions_and_contact_numbers(people: set[int], blocks: int, dice: Random, is_crowded: bool) -> None:
    """Both ways of crossing, for few people among many contacts and for many, are the sets' way."""
    if is_crowded:
        people |= set(range(1000, 9000))
    roll = np.array(sorted(people), np.int64)
    flags = np.array([dice.random() < 0.5 for _ in roll], np.bool_)
    chosen = set(roll[flags].tolist())
    by_position = pack_chunks(flags)
    assert len(by_position) == count_chunks(len(roll)) * CHUNK // 8
    by_number = spread(by_position, roll, blocks)
    assert len(by_number) == blocks * CHUNK // 8
    assert set(list_numbers(by_number).tolist()) == chosen
    assert count_bits(by_number) == count_bits(by_position) == len(chosen)
    assert gather(by_number, roll).tolist() == by_position.tolist()
    assert set_numbers(np.append(roll[flags], [blocks * CHUNK, 10**7]), blocks).tolist() == by_number.tolist()
    asked = np.array([*sorted(people), 0, 5000, blocks * CHUNK - 1, blocks * CHUNK, 10**7], np.int64)
    assert find_members(by_number, asked).tolist() == [number in chosen for number in asked.tolist()]


@settings(deadline=None)
@given(
    st.sets(st.integers(0, 4 * CHUNK - 1), max_size=60),
    st.integers(0, 4 * CHUNK + 1) | st.just(2**63),
    st.sampled_from([1, 7, 1000]),
    st.booleans(),
)
def test_pages_hold_what_is_set_from_a_place_on(chosen: set[int], first: int, size: int, is_crowded: bool) -> None:
    if is_crowded:
        chosen |= set(range(CHUNK - 100, CHUNK + 3000))
    pages = list(page_bits(set_numbers(np.array(sorted(chosen), np.int64), 4), first, size))
    assert [number for page in pages for number in page.tolist()] == sorted(number for number in chosen if number >= first)
    assert all(len(page) == size for page in pages[:-1])
    assert all(0 < len(page) <= size for page in pages)
