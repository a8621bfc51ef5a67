"""Identities: contact numbers by external_id, in a hash table that looks up a whole batch at once.

A dict with a million texts takes 1.1 µs a look-up, nearly all of it waiting for memory, and 150 bytes each. Here the waits
overlap, since numpy asks for all at once: 0.15 µs, and 96 to 192 bytes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from aftertouch.rolls.chunks import Numbers

WIDTH = 40
"""Bytes of an external_id that stand in the table: a UUID has 36. Of longer ones a digest does, which takes 1 µs to make."""
SMALLEST = 1 << 10
_MOVED_AT_ONCE = 1 << 14
"""Into a larger table: all at once would take as much memory again."""
_EMPTY, _GONE = -1, -2
"""In place of a number; whoever looks for another text goes on past one that is gone."""
_Words = NDArray[np.uint64]
_KEPT = np.tri(WIDTH + 1, WIDTH, -1, np.uint8) * np.uint8(0xFF)
_KEPT_WORDS: _Words = _KEPT.view(np.uint64)
"""By length, which bytes of five words are a text's own."""
_EACH_WORD = np.ones(WIDTH // 8, np.bool_)
_KEY = secrets.token_bytes(16)
"""Of the digests. Drawn anew by every process, so that nobody can write what another one's text comes to."""


class ExternalIds:
    """External_ids in UTF-8, where they stand in some bytes: of a batch they are never picked out one by one."""

    def __init__(self, data: bytes, starts: Numbers, sizes: Numbers) -> None:
        self._data = data
        self._starts = starts
        self._sizes = sizes
        self.words: _Words = (
            np.ndarray((len(data) + 1,), f"V{WIDTH}", data + bytes(WIDTH), 0, (1,))[starts]
            .view(np.uint64)
            .reshape(-1, WIDTH // 8)
        )
        """Each as five words, filled up with zeros, or its digest: nothing else is the same."""
        self.words &= _KEPT_WORDS.take(np.minimum(sizes, WIDTH), axis=0)
        is_odd = (sizes == 0) | (sizes > WIDTH)
        if b"\0" in data:
            is_odd |= np.count_nonzero(self.words.view(np.uint8).reshape(-1, WIDTH), axis=1) < sizes
        self._has_digests = bool(is_odd.any())
        if self._has_digests:
            odd = np.flatnonzero(is_odd)
            digests = b"".join(blake2b(self[index], digest_size=WIDTH, key=_KEY).digest() for index in odd.tolist())
            self.words[odd] = np.frombuffer(digests, np.uint64).reshape(-1, WIDTH // 8)

    @classmethod
    def join(cls, external_ids: Sequence[bytes]) -> ExternalIds:
        """The same of texts that are apart."""
        return cls.cut(b"".join(external_ids), np.fromiter(map(len, external_ids), np.int64, len(external_ids)))

    @classmethod
    def cut(cls, data: bytes, sizes: Numbers) -> ExternalIds:
        """The same of texts that stand one behind the other."""
        return cls(data, np.cumsum(sizes) - sizes, sizes)

    def select(self, indexes: Numbers) -> ExternalIds:
        """Some of them."""
        return ExternalIds(self._data, self._starts[indexes], self._sizes[indexes])

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> bytes:
        start = int(self._starts[index])
        return self._data[start : start + int(self._sizes[index])]

    def __iter__(self) -> Iterator[bytes]:
        return map(self.__getitem__, range(len(self)))

    def are_ascii(self) -> bool:
        """True only when all of them are; where one is longer nobody looks."""
        return not self._has_digests and not (self.words & np.uint64(0x80_80_80_80_80_80_80_80)).any()


class Identities:
    """Contact numbers of one app by external_id."""

    def __init__(self) -> None:
        # Drawn anew by every process, so that nobody can choose texts that meet in one place.
        self._factors = np.array([secrets.randbits(64) | 1 for _ in range(WIDTH // 8)], np.uint64)
        self._make(SMALLEST)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._numbers.nbytes + self._words.nbytes

    def find(self, external_ids: ExternalIds) -> Numbers:
        """The contact number of each; -1 where it is not known."""
        found = np.full(len(external_ids), -1, np.int64)
        words, left = external_ids.words, np.arange(len(external_ids))
        places = self._hash(words)
        while len(left):
            # Take, not an index in brackets, which needs eight times as long for rows.
            numbers = self._numbers.take(places)
            is_other = _differ(self._words.take(places, axis=0), words)
            found[left] = np.where(is_other, -1, numbers)
            goes_on = np.flatnonzero(is_other & (numbers != _EMPTY))
            left, words = left.take(goes_on), words.take(goes_on, axis=0)
            places = (places.take(goes_on) + 1) & self._mask
        return found

    def add(self, external_ids: ExternalIds, numbers: Numbers) -> None:
        """Learn some more; what is known already may be among them."""
        self.reserve(self._count + len(external_ids))
        self._insert(external_ids.words, numbers)

    def measure(self, count: int) -> int:
        """Bytes of memory once so many more are learned."""
        return max(self.nbytes, measure_table(self._count + count))

    def forget(self, numbers: Numbers) -> None:
        """Know these contacts no more, nor what they were called."""
        gone = np.isin(self._numbers, numbers)
        self._numbers[gone] = _GONE
        self._words[gone] = 0

    def reserve(self, count: int) -> None:
        """Make room for so many, at once instead of by and by: moving a million takes 0.3 s."""
        if self._mask < 2 * count:
            taken = self._numbers >= 0
            words, numbers = self._words[taken], self._numbers[taken]
            self._make(_size_for(count))
            for start in range(0, len(numbers), _MOVED_AT_ONCE):
                part = slice(start, start + _MOVED_AT_ONCE)
                self._insert(words[part], numbers[part])

    def _insert(self, words: _Words, numbers: Numbers) -> None:
        self._count += len(numbers)
        places = self._hash(words)
        while len(numbers):
            free = np.flatnonzero(self._numbers.take(places) == _EMPTY)
            at = places.take(free)
            self._numbers[at] = numbers.take(free)
            # Of several that want one place numpy lets the last have it.
            self._words[at] = wanted = words.take(free, axis=0)
            is_left = np.ones(len(numbers), np.bool_)
            is_left[free] = _differ(self._words.take(at, axis=0), wanted)
            left = np.flatnonzero(is_left)
            words, numbers = words.take(left, axis=0), numbers.take(left)
            places = (places.take(left) + 1) & self._mask

    def _make(self, size: int) -> None:
        self._count = 0
        self._mask = size - 1
        self._shift = np.uint64(64 - self._mask.bit_length())
        self._numbers = np.full(size, _EMPTY, np.int64)
        self._words = np.zeros((size, WIDTH // 8), np.uint64)

    def _hash(self, words: _Words) -> Numbers:
        mixed = words @ self._factors
        mixed ^= mixed >> np.uint64(29)
        places: Numbers = (mixed * self._factors[0] >> self._shift).astype(np.int64)
        return places


def measure_table(count: int) -> int:
    """Bytes of a table with room for so many."""
    return _size_for(count) * (8 + WIDTH)


def _size_for(count: int) -> int:
    return max(SMALLEST, 1 << (2 * count).bit_length())


def _differ(some: _Words, others: _Words) -> NDArray[np.bool_]:
    """For each row whether any of its words differs; a product, since ``any`` takes three times as long for five words."""
    differ: NDArray[np.bool_] = (some != others) @ _EACH_WORD
    return differ
