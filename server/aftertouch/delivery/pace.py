"""The pace of sending: how many of a batch may leave now, and how long to wait, by the limits that they count against.

Limits with a rate of their own, the campaign's among them, are kept in the database by all workers together. What a
provider asks for ("too fast", Retry-After, errors for everybody) holds the limit for all of them as well. After a hold this
process begins with half as many messages at once and doubles them while they get through: a provider that never says how
fast is too fast is found out in a few messages, not a few thousand.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Address, Channel, Content, Limit, Message
from aftertouch.store.campaigns import Campaign
from aftertouch.store.engine import transaction
from aftertouch.store.paces import hold_limits, take_room

HORIZON = timedelta(seconds=2)
"""Room that comes later than this is not waited for: others of the unit may go meanwhile."""
LONGEST_BACK_OFF = timedelta(seconds=60)
LONGEST_RETRY_AFTER = timedelta(hours=1)
"""What a provider may ask for: a header of seven digits would hold a campaign for 115 days."""
WIDEST = 1_000
MOST_PROBED = 10_000
"""Limits that are remembered to have rested. Where they are people or hosts, some never get a message through, and whoever
subscribes may invent more."""
ASK_SECONDS = 1.0
"""How long a limit without a rate of its own that had room is not asked for again; then another worker's hold is known here."""
_ZERO = timedelta(0)


@dataclass(frozen=True)
class Admission:
    """Who of a batch may go."""

    rests: list[timedelta | None]
    """For each person how long their limits have no room: None for who may go, zero for who comes after others of the batch."""
    delay: timedelta = _ZERO
    """Until those who may go may leave."""
    is_paced: bool = False
    """A limit with a rate of its own has no room, and such a one is mostly everybody's; what a provider asked for need not be."""


@dataclass
class _Probe:
    """What a limit is found out about that had to rest."""

    width: int
    """How many messages may leave at once."""
    streak: int = 0
    """Holds in a row after which nothing got through."""
    held_at: float = 0.0
    """When the last hold was put on, by ``time.monotonic``: what had begun before tells nothing new."""


class Pacer:
    """The pace of one process, in which all of its senders take part."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._probes: dict[str, _Probe] = {}
        """From a hold until as many get through at once as before; who was held last comes last."""
        self._held_until: dict[str, float] = {}
        """The rests that this process found to be needed, by ``time.monotonic``, and only at their beginning: until the database
        knows of them, and until whoever was admitted before has had their turn."""
        self._free_at: dict[str, float] = {}
        """When a limit without a rate of its own was last found free, by the same clock."""

    async def admit(self, people: Sequence[Sequence[Limit]]) -> Admission:
        """Say who may go now.

        Args:
            people: for each person, the limits that their messages count against, as ``find_limits`` finds them.
        """
        if self._is_free(people):
            return Admission([None] * len(people))
        intervals = {limit.key: limit.interval for limits in people for limit in limits}
        blocked = self.find_held(intervals)
        asked_at = time.monotonic()
        async with transaction(self._engine) as conn:
            # Asked first: whoever one of their limits holds up takes no room in another, which is everybody's.
            asked = await take_room(conn, dict.fromkeys(intervals.keys() - blocked.keys(), _ZERO), HORIZON)
            for key, (is_free, wait) in asked.items():
                # Where there is no rate, whoever has to wait is held, and the others of the batch do not wait along.
                if not is_free or (wait and not intervals[key]):
                    blocked[key] = wait
            fits, counts = self._fit(people, blocked)
            rated = {key: n * intervals[key] for key, n in counts.items() if intervals[key]}
            taken = await take_room(conn, rated, HORIZON)
        blocked |= {key: wait for key, (is_free, wait) in taken.items() if not is_free}
        self._free_at = {key: at for key, at in self._free_at.items() if at > asked_at - ASK_SECONDS}
        free = (key for key in asked if key not in blocked and not intervals[key] and self._find_held_at(key) < asked_at)
        self._free_at.update(dict.fromkeys(free, asked_at))
        rests: list[timedelta | None] = []
        passed: set[str] = set()
        for fit, limits in zip(fits, people, strict=True):
            waits = [blocked[limit.key] for limit in limits if limit.key in blocked]
            rests.append(max(waits) if waits else None if fit else _ZERO)
            if rests[-1] is None:
                passed.update(limit.key for limit in limits)
        delay = max((taken[key][1] for key in passed & taken.keys()), default=_ZERO)
        return Admission(rests, delay, is_paced=any(intervals[key] for key in blocked))

    def _fit(self, people: Sequence[Sequence[Limit]], blocked: Mapping[str, object]) -> tuple[list[bool], Counter[str]]:
        """Who comes next by the widths of their limits, and the messages of these by limit, without those who are blocked."""
        counts: Counter[str] = Counter()
        fits = []
        for limits in people:
            wanted = Counter(limit.key for limit in limits)
            widths = {limit.key: self._find_width(limit.key, limit.interval) for limit in limits}
            # One person always fits, or somebody with more addresses than the width would never go.
            fits.append(all(not counts[key] or counts[key] + n <= widths[key] for key, n in wanted.items()))
            if fits[-1] and not wanted.keys() & blocked.keys():
                counts += wanted
        return fits, counts

    def _is_free(self, people: Sequence[Sequence[Limit]]) -> bool:
        """True when all of their limits are without a rate of their own, and had room a moment ago."""
        now = time.monotonic()
        # Most count against the same limits, which are the same tuple.
        for limits in {id(limits): limits for limits in people}.values():
            for limit in limits:
                key = limit.key
                if limit.interval or key in self._probes or self._held_until.get(key, 0) > now:
                    return False
                if self._free_at.get(key, 0) < now - ASK_SECONDS:
                    return False
        return sum(map(len, people)) <= WIDEST

    def _find_width(self, key: str, interval: timedelta) -> int:
        """How many may leave at once: a second's worth, or fewer while the limit is being probed."""
        width = self._probes[key].width if key in self._probes else WIDEST
        return min(width, max(int(timedelta(seconds=1) / interval), 1)) if interval else width

    def _find_held_at(self, key: str) -> float:
        return self._probes[key].held_at if key in self._probes else 0.0

    def is_in_trouble(self, key: str) -> bool:
        """True while nothing gets through."""
        return key in self._probes and self._probes[key].streak > 1

    def is_probing(self, key: str) -> bool:
        """True from a hold until as many get through at once as before."""
        return key in self._probes

    def note_success(self, keys: Iterable[str], held: Container[str]) -> None:
        """Messages that count against these limits got through; of those that are ``held`` others were held back."""
        for key in keys:
            if probe := self._probes.get(key):
                probe.streak = 0
                if key not in held:
                    probe.width *= 2
                if probe.width >= WIDEST:
                    del self._probes[key]

    def find_held(self, keys: Iterable[str]) -> dict[str, timedelta]:
        """Those of these limits that this process found to need a rest, and for how long still."""
        now = time.monotonic()
        return {key: timedelta(seconds=until - now) for key in keys if (until := self._held_until.get(key, 0)) > now}

    def slow_down(
        self, delays: Mapping[str, timedelta | None], sizes: Mapping[str, int], begun_at: float
    ) -> dict[str, timedelta]:
        """Have these limits rest, in this process at once, as long as the provider asked, and for a growing while where it asked
        for nothing, or nothing gets through after that either.

        Args:
            delays: by limit, what the provider asked for.
            sizes: by limit, how many messages were under way; one where it says nothing.
            begun_at: when they were handed to the channel, by ``time.monotonic``.
        """
        rests = {}
        now = time.monotonic()
        self._held_until = {key: until for key, until in self._held_until.items() if until > now}
        for key, asked in delays.items():
            self._free_at.pop(key, None)
            size = sizes.get(key, 1)
            probe = self._probes.pop(key, None) or _Probe(size)
            if begun_at >= probe.held_at:
                probe = _Probe(max(min(probe.width, size) // 2, 1), probe.streak + 1, now)
            self._probes[key] = probe
            rests[key] = min(asked or _ZERO, LONGEST_RETRY_AFTER)
            if asked is None or self.is_in_trouble(key):
                # Where a second was asked for and does not help, everybody's tries would be used up within minutes.
                rests[key] = max(rests[key], back_off(probe.streak))
            self._held_until[key] = max(self._held_until.get(key, 0), now + min(rests[key], 2 * HORIZON).total_seconds())
        while len(self._probes) > MOST_PROBED:
            del self._probes[next(iter(self._probes))]
        return rests

    async def hold(self, rests: Mapping[str, timedelta]) -> None:
        """Have limits rest in all workers."""
        async with transaction(self._engine) as conn:
            await hold_limits(conn, rests)


def find_limits(channel: Channel, scope: str, campaign: Campaign, message: Message[Address, Content]) -> tuple[Limit, ...]:
    """The limits that a message counts against: the channel's, under its account's scope, and the campaign's own.

    Raises:
        TypeError: the channel returned something else than limits.
    """
    declared = tuple(channel.limits(message))
    return _name_limits(scope, declared, campaign.campaign_id, campaign.messages_per_second)


@lru_cache(maxsize=1_000)
def _name_limits(scope: str, declared: tuple[Limit, ...], campaign_id: int, per_second: float | None) -> tuple[Limit, ...]:
    """Made, and checked, once for most messages of a campaign, and then the same tuple."""
    if not all(isinstance(limit, Limit) for limit in declared):
        raise TypeError(f"limits of {scope} returned something else than limits")
    limits = [Limit(key=name_limit(scope, limit.key), interval=limit.interval) for limit in declared]
    if not limits:
        limits.append(Limit(key=name_limit(scope, "account")))
    if per_second:
        limits.append(Limit(key=f"campaign/{campaign_id}", interval=timedelta(seconds=1 / per_second)))
    return tuple(limits)


def name_limit(scope: str, key: str) -> str:
    """A channel's limit among those of all channels and accounts."""
    return f"{scope}/{key[:200]}"


def back_off(tries: int) -> timedelta:
    """How long to wait after so many refusals in a row: doubling from a second, with jitter."""
    return min(timedelta(seconds=2 ** min(tries - 1, 10)), LONGEST_BACK_OFF) * random.uniform(0.5, 1.0)
