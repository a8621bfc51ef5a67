"""The arithmetic of chunks: contact numbers, positions, slots and packed bits; pure numpy.

A *roll* is a campaign's recipients as sorted contact numbers, cut into chunks of 8,192 positions. A *slot* names one
chunk of one campaign, a *block* 8,192 contact numbers of one app; both are single integers, so that either can be a
distribution key, and all chunks of a campaign are one range of slots. Bits are packed most significant first, as
PostgreSQL's ``bit varying`` is, and always whole bytes long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

CHUNK_BITS = 13
CHUNK = 1 << CHUNK_BITS
"""Positions in a chunk. 8,192 bits are 1 kB a row: PostgreSQL compresses a row only above about 2 kB, and upserts then
become ten times slower."""
CHUNK_BYTES = CHUNK // 8
SLOT_SHIFT = 20
"""Room for 2^20 chunks, so 8.6 billion people, in a campaign or an app."""

Numbers = NDArray[np.int64]
Bits = NDArray[np.uint8]
"""Packed bits, one byte for eight positions."""


def slot_of(campaign_id: int, chunk: int) -> int:
    """The slot of a campaign's chunk."""
    return campaign_id << SLOT_SHIFT | chunk


def slot_range(campaign_id: int) -> tuple[int, int]:
    """The first slot of a campaign, and the first that is no longer its own."""
    return campaign_id << SLOT_SHIFT, (campaign_id + 1) << SLOT_SHIFT


def holdout_of(campaign_id: int) -> int:
    """The number under which a campaign's holdout has a roll, cut and keyed like any other: below zero, where no campaign is.

    A contact set would do, but erasing somebody clears their bits there, and a report's totals have to stay.
    """
    return -campaign_id


def chunk_of(slot: int) -> int:
    """Which chunk of its campaign a slot is."""
    return slot & ((1 << SLOT_SHIFT) - 1)


def block_of(app_id: int, number: int) -> int:
    """The block in which a contact number lives."""
    return app_id << SLOT_SHIFT | number >> CHUNK_BITS


def blocks_of(app_id: int, numbers: Numbers) -> Numbers:
    """The block of each contact number."""
    return (numbers >> CHUNK_BITS) | (app_id << SLOT_SHIFT)


def byte_length(members: int) -> int:
    """How many bytes the bits of a chunk with so many members take."""
    return (members + 7) // 8


def count_chunks(members: int) -> int:
    """How many chunks so many positions, or contact numbers, take."""
    return -(-members // CHUNK)


def members_of(recipients: Numbers | int, chunks: Numbers) -> NDArray[np.int32]:
    """How many people each chunk of a roll with so many recipients holds."""
    return np.clip(recipients - (chunks << CHUNK_BITS), 0, CHUNK).astype(np.int32)


@dataclass(frozen=True)
class RollChunk:
    """One chunk of a roll: its contact numbers, sorted."""

    slot: int
    numbers: Numbers

    def encode_numbers(self) -> bytes:
        """The numbers less the first, in the shorter of two ways: 32-bit little-endian integers, or a bit for each in the span.

        A campaign to most of an app's contacts takes 1 to 4 bits a person instead of 32, and is written and read as much faster.
        """
        shifted = self.numbers - self.numbers[0]
        if int(shifted[-1]) // 8 + 1 < 4 * len(shifted):
            return bytes(pack_positions(shifted, int(shifted[-1]) + 1).tobytes())
        return bytes(shifted.astype("<u4").tobytes())


def decode_numbers(first: int, members: int, encoded: bytes) -> Numbers:
    """The inverse of ``encode_numbers``."""
    if len(encoded) == 4 * members:
        return np.frombuffer(encoded, "<u4").astype(np.int64) + first
    return unpack_positions(np.frombuffer(encoded, np.uint8)) + first


def cut_roll(campaign_id: int, numbers: Numbers) -> Iterator[RollChunk]:
    """Cut sorted, distinct contact numbers into the chunks of a roll."""
    for chunk, start in enumerate(range(0, len(numbers), CHUNK)):
        yield RollChunk(slot_of(campaign_id, chunk), numbers[start : start + CHUNK])


class Roll:
    """A whole roll: the contact number at each position, and the position of each contact number."""

    def __init__(self, numbers: Numbers) -> None:
        self.numbers = numbers
        """Sorted and distinct."""
        self._first = int(numbers[0]) & ~63 if len(numbers) else 0
        words = (int(numbers[-1]) - self._first >> 6) + 1 if len(numbers) else 0
        self._is_marked = words * 64 <= _SPARSEST_MARKS * len(numbers)
        if self._is_marked:
            marks = np.zeros(words * 64, np.bool_)
            marks[numbers - self._first] = True
            self._marks = np.packbits(marks, bitorder="little").view("<u8")
            counts = np.bitwise_count(self._marks)
            self._before = (np.cumsum(counts, dtype=np.int64) - counts).astype(np.int32)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        marks = self._marks.nbytes + self._before.nbytes if self._is_marked else 0
        return self.numbers.nbytes + marks + _OBJECT_BYTES

    def find(self, wanted: Numbers) -> Numbers:
        """The position of each contact number; -1 where it is not on the roll.

        A bit for each contact, and how many are set before each 64 of them: 60 ns a look-up in a million people, where a binary
        search takes 400 in batches of 1,000.
        """
        if not len(self.numbers):
            return np.full(len(wanted), -1, np.int64)
        if not self._is_marked:
            # Searching in ascending order walks the roll once: 45 ns a look-up in 10 M people, in random order 1,000.
            order = np.argsort(wanted)
            positions = np.empty(len(wanted), np.int64)
            positions[order] = np.searchsorted(self.numbers, wanted[order])
            positions = np.minimum(positions, len(self.numbers) - 1)
            return np.where(self.numbers[positions] == wanted, positions, -1)
        offsets = wanted - self._first
        is_within = (offsets >= 0) & (offsets < len(self._marks) * 64)
        at = np.where(is_within, offsets >> 6, 0)
        bits = np.left_shift(np.uint64(1), (offsets & 63).astype(np.uint64))
        marks = self._marks[at]
        positions = self._before[at] + np.bitwise_count(marks & (bits - np.uint64(1))).astype(np.int64)
        return np.where(is_within & (marks & bits != 0), positions, -1)


_OBJECT_BYTES = 1_000
"""That a roll takes beside its numbers, though nobody be on it."""
_SPARSEST_MARKS = 32
"""Contacts for each one on a roll: up to there its marks are smaller than its numbers."""


def pack_positions(positions: NDArray[np.integer], members: int) -> Bits:
    """Bits of a chunk with ``members`` people in which these positions are set."""
    flags = np.zeros(byte_length(members) * 8, np.bool_)
    flags[positions] = True
    return np.packbits(flags)


def unpack_positions(bits: Bits) -> NDArray[np.int64]:
    """The positions that are set, ascending."""
    return np.flatnonzero(np.unpackbits(bits))


def count_bits(bits: Bits) -> int:
    """How many are set, of bits that fill whole chunks."""
    return int(np.bitwise_count(bits.view(np.uint64)).sum(dtype=np.int64))


def pack_chunks(flags: NDArray[np.bool_ | np.uint8]) -> Bits:
    """Flags as bits that fill whole chunks, the last one with zeros."""
    packed = np.zeros(count_chunks(len(flags)) * CHUNK_BYTES, np.uint8)
    packed[: byte_length(len(flags))] = np.packbits(flags)
    return packed


_SPARSE = 64
"""From so many contact numbers for each person on, single bits are set and read: unpacking all would cost more."""


def spread(bits: Bits, roll: Numbers, blocks: int) -> Bits:
    """Bits by position as bits by contact number.

    Args:
        bits: over a roll, in whole chunks.
        roll: its contact numbers.
        blocks: how many blocks of contact numbers the answer spans; no contact on the roll is beyond.
    """
    flags = np.unpackbits(bits)[: len(roll)].view(np.bool_)
    if len(roll) * _SPARSE < blocks * CHUNK:
        return set_numbers(roll[flags], blocks)
    # A third of the time of picking the numbers first, and indifferent to how many match.
    members = np.zeros(blocks * CHUNK, np.bool_)
    members[roll] = flags
    return np.packbits(members)


def gather(bits: Bits, roll: Numbers) -> Bits:
    """Bits by contact number as bits by position: the inverse of ``spread``, for whoever is on the roll."""
    return pack_chunks(find_members(bits, roll))


def set_numbers(numbers: Numbers, blocks: int) -> Bits:
    """Contact numbers as bits; contacts beyond the blocks, made since these were counted, are left out."""
    numbers = numbers[numbers < blocks * CHUNK]
    if len(numbers) * _SPARSE < blocks * CHUNK:
        bits = np.zeros(blocks * CHUNK_BYTES, np.uint8)
        np.bitwise_or.at(bits, numbers >> 3, (0x80 >> (numbers & 7)).astype(np.uint8))
        return bits
    members = np.zeros(blocks * CHUNK, np.bool_)
    members[numbers] = True
    return np.packbits(members)


def list_numbers(bits: Bits) -> Numbers:
    """The contact numbers whose bits are set, ascending."""
    return unpack_positions(bits)


def page_bits(bits: Bits, first: int, size: int) -> Iterator[Numbers]:
    """What is set from ``first`` on, ascending, at most ``size`` at a time: all ten million of them at once would take 80 MB."""
    page = np.empty(0, np.int64)
    for place in np.flatnonzero(bits.reshape(-1, CHUNK_BYTES).any(axis=1)).tolist():
        if (place + 1) * CHUNK <= first:
            continue
        found = unpack_positions(bits[place * CHUNK_BYTES : (place + 1) * CHUNK_BYTES]) + place * CHUNK
        page = np.concatenate([page, found[found >= first]])
        while len(page) >= size:
            yield page[:size]
            page = page[size:]
    if len(page):
        yield page


def find_members(bits: Bits, numbers: Numbers) -> NDArray[np.bool_]:
    """For each contact number whether its bit is set; what is beyond the bits is not."""
    if len(numbers) and int(numbers.max()) >> 3 >= len(bits):
        bits = np.concatenate([bits, np.zeros((int(numbers.max()) >> 3) + 1 - len(bits), np.uint8)])
    if len(numbers) * _SPARSE < len(bits) * 8:
        found: NDArray[np.bool_] = (bits[numbers >> 3] >> (7 - (numbers & 7)).astype(np.uint8) & 1).astype(np.bool_)
        return found
    return np.unpackbits(bits).view(np.bool_).take(numbers)


@dataclass(frozen=True)
class BitRows:
    """Packed bits for distinct (slot, kind) pairs, sorted by them: what one upsert of receipts writes."""

    slots: list[int]
    kinds: list[int]
    bits: list[bytes]


def rank(values: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct values, ascending, and for each value its place among them.

    Where the values span little, as slots of one campaign do, marking and counting replaces the sort: 10 ns a value, not 80.
    """
    low, high = int(values.min()), int(values.max())
    if high - low >= _MOST_MARKS:
        distinct, places = np.unique(values, return_inverse=True)
        return distinct.astype(np.int64), places.astype(np.int64)
    marks = np.zeros(high - low + 1, np.bool_)
    shifted = values - low
    marks[shifted] = True
    return np.flatnonzero(marks) + low, (np.cumsum(marks) - 1)[shifted]


_MOST_MARKS = 4_000_000
"""Values further apart are sorted: marking them would take more memory than time it saves."""


def group_bits(slots: Numbers, kinds: NDArray[np.integer], offsets: NDArray[np.integer], members: NDArray[np.integer]) -> BitRows:
    """Turn events into the rows of an upsert.

    Args:
        slots, kinds: of each event.
        offsets: the position of each event within its slot.
        members: how many people the slot of each event has.
    """
    if not len(slots):
        return BitRows([], [], [])
    # Slots of several campaigns lie far apart: the campaigns are ranked first, which brings the slots together.
    campaigns, campaign_places = rank(slots >> SLOT_SHIFT)
    chunks = slots & ((1 << SLOT_SHIFT) - 1)
    width = int(chunks.max()) + 1
    near, slot_places = rank(campaign_places * width + chunks)
    kind_values, kind_places = rank(kinds)
    pairs, group = rank(slot_places * len(kind_values) + kind_places)
    near_of_group = near[pairs // len(kind_values)]
    lengths = np.zeros(len(pairs), np.int64)
    lengths[group] = (members + 7) // 8
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    packed = np.zeros(int(bounds[-1]), np.uint8)
    np.bitwise_or.at(packed, bounds[group] + (offsets >> 3), (0x80 >> (offsets & 7)).astype(np.uint8))
    whole = packed.tobytes()
    return BitRows(
        (campaigns[near_of_group // width] << SLOT_SHIFT | near_of_group % width).tolist(),
        kind_values[pairs % len(kind_values)].tolist(),
        [whole[start:end] for start, end in pairwise(bounds.tolist())],
    )
