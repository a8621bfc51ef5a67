"""What a process remembers: bounded, and what was used least recently is forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Kept(Generic[K, V]):
    """A bounded mapping that forgets what was used least recently."""

    def __init__(self, most: int, weigh: Callable[[V], int] = lambda _: 1) -> None:
        self._most = most
        self._weigh = weigh
        self.weight = 0
        """Of all together: no more than ``most``, unless a single value weighs more."""
        self._items: OrderedDict[K, tuple[V, int]] = OrderedDict()

    def get(self, key: K) -> V | None:
        """What is kept under the key."""
        if (item := self._items.get(key)) is None:
            return None
        self._items.move_to_end(key)
        return item[0]

    def put(self, key: K, value: V) -> None:
        """Keep it, and drop others for it. What weighs more than when it was put is put again."""
        weight = self._weigh(value)
        self.drop(key)
        self._items[key] = value, weight
        self.weight += weight
        while self.weight > self._most and len(self._items) > 1:
            self.drop(next(iter(self._items)))

    def drop(self, key: K) -> None:
        """Keep it no more, if it is kept."""
        _, weight = self._items.pop(key, (None, 0))
        self.weight -= weight

    def fits(self, weight: int) -> bool:
        """True when so much may come in addition without any other being dropped."""
        return self.weight + weight <= self._most
