"""Chance that repeats: numbers from 0 to 1 that depend on nothing but the seed and the names they are drawn for.

Stored state would make a fate depend on the order of requests; a hash does not, so two runs of a demo agree.
"""

from __future__ import annotations

from hashlib import blake2b
from struct import unpack

_SPAN = 2.0**32


def draw_bytes(seed: int, *names: str | int) -> bytes:
    """64 bytes for these names."""
    return blake2b("\x1f".join(map(str, (seed, *names))).encode()).digest()


def draw_numbers(seed: int, *names: str | int) -> tuple[float, ...]:
    """8 numbers, each at least 0 and below 1, for these names."""
    return tuple([number / _SPAN for number in unpack("<8I", draw_bytes(seed, *names)[:32])])
