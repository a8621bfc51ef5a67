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


def members_of(recipients: Numbers | int, chunks: Numbers) -> NDArray[np.int32]:
    """How many people each chunk of a roll with so many recipients holds."""
    return np.clip(recipients - (chunks << CHUNK_BITS), 0, CHUNK).astype(np.int32)


@dataclass(frozen=True)
class RollChunk:
    """One chunk of a roll: its contact numbers, sorted."""

    slot: int
    numbers: Numbers

    def encode_offsets(self) -> bytes:
        """The numbers as 32-bit little-endian offsets from the first."""
        return bytes((self.numbers - self.numbers[0]).astype("<u4").tobytes())


def decode_offsets(first: int, offsets: bytes) -> Numbers:
    """The inverse of ``encode_offsets``."""
    return np.frombuffer(offsets, "<u4").astype(np.int64) + first


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
