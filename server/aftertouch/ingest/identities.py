"""Identities: contact numbers by external_id, in a hash table that looks up a whole batch at once.

A dict with a million texts takes 1.1 µs a look-up, nearly all of it waiting for memory, and 150 bytes each. Here the waits
overlap, since numpy asks for all at once: 0.3 µs, and 80 to 160 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from aftertouch.rolls.chunks import Numbers

WIDTH = 32
"""Bytes of an external_id that stand in the table itself; longer ones are rare, and go into a dict."""
SMALLEST = 1 << 10
_EMPTY, _GONE = -1, -2
"""In place of a number; whoever looks for another text goes on past one that is gone."""
_Words = NDArray[np.uint64]


class Identities:
    """Contact numbers of one app by external_id, in UTF-8."""

    def __init__(self) -> None:
        self._long: dict[bytes, int] = {}
        # Drawn anew by every process, so that nobody can choose texts that meet in one place.
        self._factors = np.array([secrets.randbits(64) | 1 for _ in range(WIDTH // 8)], np.uint64)
        self._make(SMALLEST)

    def __len__(self) -> int:
        return self._count + len(self._long)

    def find(self, external_ids: Sequence[bytes]) -> Numbers:
        """The contact number of each; -1 where it is not known."""
        words, is_short = _pack(external_ids)
        found = np.full(len(external_ids), -1, np.int64)
        left = np.flatnonzero(is_short)
        words, places = words[left], self._hash(words[left])
        while len(left):
            numbers = self._numbers[places]
            is_same = (self._words[places] == words).all(axis=1) & (numbers >= 0)
            found[left[is_same]] = numbers[is_same]
            goes_on = ~is_same & (numbers != _EMPTY)
            left, words = left[goes_on], words[goes_on]
            places = (places[goes_on] + 1) & self._mask
        for index in np.flatnonzero(~is_short).tolist():
            found[index] = self._long.get(external_ids[index], -1)
        return found

    def add(self, external_ids: Sequence[bytes], numbers: Numbers) -> None:
        """Learn some more; what is known already may be among them."""
        words, is_short = _pack(external_ids)
        for index in np.flatnonzero(~is_short).tolist():
            self._long[external_ids[index]] = int(numbers[index])
        self.reserve(self._count + int(is_short.sum()))
        self._insert(words[is_short], numbers[is_short])

    def forget(self, numbers: Numbers) -> None:
        """Know these contacts no more, nor what they were called."""
        gone = np.isin(self._numbers, numbers)
        self._numbers[gone] = _GONE
        self._words[gone] = 0
        erased = set(numbers.tolist())
        self._long = {external_id: number for external_id, number in self._long.items() if number not in erased}

    def reserve(self, count: int) -> None:
        """Make room for so many, at once instead of by and by: moving a million takes 0.3 s."""
        if self._mask < 2 * count:
            taken = self._numbers >= 0
            words, numbers = self._words[taken], self._numbers[taken]
            self._make(1 << (2 * count).bit_length())
            self._insert(words, numbers)

    def _insert(self, words: _Words, numbers: Numbers) -> None:
        self._count += len(numbers)
        places = self._hash(words)
        while len(numbers):
            free = np.flatnonzero(self._numbers[places] == _EMPTY)
            self._numbers[places[free]] = numbers[free]
            # Of several that want one place numpy lets the last have it.
            self._words[places[free]] = words[free]
            left = np.ones(len(numbers), np.bool_)
            left[free] = (self._words[places[free]] != words[free]).any(axis=1)
            words, numbers = words[left], numbers[left]
            places = (places[left] + 1) & self._mask

    def _make(self, size: int) -> None:
        self._count = 0
        self._mask = size - 1
        self._shift = np.uint64(64 - self._mask.bit_length())
        self._numbers = np.full(size, _EMPTY, np.int64)
        self._words = np.zeros((size, WIDTH // 8), np.uint64)

    def _hash(self, words: _Words) -> Numbers:
        mixed = (words * self._factors).sum(axis=1, dtype=np.uint64)
        mixed ^= mixed >> np.uint64(29)
        places: Numbers = (mixed * self._factors[0] >> self._shift).astype(np.int64)
        return places


def _pack(external_ids: Sequence[bytes]) -> tuple[_Words, NDArray[np.bool_]]:
    """Each text as four words, and whether it fits there: padded with zeros, it must neither be longer nor hold any."""
    packed = np.array(external_ids, f"S{WIDTH}")
    lengths = np.fromiter(map(len, external_ids), np.int64, len(external_ids))
    used = np.count_nonzero(packed.view(np.uint8).reshape(-1, WIDTH), axis=1)
    return packed.view(np.uint64).reshape(-1, WIDTH // 8), used == lengths
