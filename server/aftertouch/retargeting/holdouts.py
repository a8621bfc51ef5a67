"""Holdouts: who of a chain is not messaged, so that it can be said what messaging did.

Whether somebody is held out follows from the chain's root and their contact number alone. So it is one group for a whole chain,
a larger share holds out whoever a smaller one does, and previews, launches and explanations agree without anything stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import Numbers
from aftertouch.store.campaigns import read_holdouts

Shares = Mapping[int, int]
"""How many of 100 people are held out of a chain, by its root; chains that hold nobody out are left out."""

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


async def find_shares(conn: AsyncConnection, roots: Collection[int], root: int, percent: int) -> Shares:
    """What is held out of a campaign of the chain ``root`` that asks people of the chains ``roots``.

    Whoever a launched campaign of a chain held out stays so: messaged by a later one, they would be no measure any more.

    Args:
        percent: what the campaign itself holds out.
    """
    shares = await read_holdouts(conn, {root, *roots})
    shares[root] = max(percent, shares.get(root, 0))
    return {chain: share for chain, share in shares.items() if share}


def find_held_out(shares: Shares, numbers: Numbers) -> NDArray[np.bool_]:
    """For each contact number, whether it is held out."""
    held_out = np.zeros(len(numbers), np.bool_)
    for root, percent in shares.items():
        held_out |= draw_lots(root, numbers) < np.uint64(percent * (1 << 64) // 100)
    return held_out


def draw_lots(root: int, numbers: Numbers) -> NDArray[np.uint64]:
    """A lot for each contact number: element ``number`` of the stream of SplitMix64 whose seed is element ``root`` of that of 0.

    Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014): every element is a bijection of its index, its
    bits are as good as random, and neighbours have nothing in common, which a modulus of the number would not give.
    """
    (seed,) = _mix(np.array([root * _GAMMA & _MASK], np.uint64)).tolist()
    return _mix(numbers.astype(np.uint64) * np.uint64(_GAMMA) + np.uint64(seed))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
