"""The funnel: from those who match down to those who will be messaged, with everybody who drops out on the way.

It is a list of steps over bits by contact number. A step says to whom its reason applies, and takes only those who are left,
so each person drops out once, at the first reason, and matched less all drops is the audience however many steps there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import cached_property, reduce

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.holdouts import Shares, find_held_out
from aftertouch.rolls.chunks import CHUNK, CHUNK_BYTES, Bits, Numbers, block_of, find_members, list_numbers, set_numbers
from aftertouch.rolls.sql import read_sets
from aftertouch.store.apps import App
from aftertouch.store.campaigns import list_open_waves
from aftertouch.store.contacts import STANDINGS, Holds, find_held, standing_set
from aftertouch.store.paces import find_full


class Reason(StrEnum):
    """Why somebody who matches would not be messaged."""

    NO_SUBSCRIPTION = "NO_SUBSCRIPTION"
    OPTED_OUT = "OPTED_OUT"
    INVALID = "INVALID"
    HELD = "HELD"
    OVER_FREQUENCY_CAP = "OVER_FREQUENCY_CAP"
    IN_OPEN_WAVE = "IN_OPEN_WAVE"
    HELD_OUT = "HELD_OUT"


PASSING = frozenset({Reason.HELD, Reason.OVER_FREQUENCY_CAP})
"""Reasons that will be over: they hold for whoever is messaged now, and not for whom is chosen now to be messaged later."""


@dataclass(frozen=True)
class Target:
    """What a wave is to be sent on, and who matches."""

    app: App
    channel: str
    transactional: bool
    """Neither quiet hours nor the frequency cap hold for it."""
    roots: frozenset[int]
    """Of the chains to which its sources belong."""
    shares: Shares
    """How many are held out of each chain."""
    asked: frozenset[int]
    """Its sources and, once it is made, the wave itself: campaigns that are not in its way."""
    matched: Bits
    """By contact number, over all of the app's blocks."""

    @property
    def blocks(self) -> int:
        """How many blocks the app has."""
        return len(self.matched) // CHUNK_BYTES

    @cached_property
    def within(self) -> Numbers | None:
        """The blocks in which somebody matches; None where that is most of them."""
        filled = np.flatnonzero(self.matched.reshape(-1, CHUNK_BYTES).any(axis=1))
        return filled if len(filled) * 2 < self.blocks else None

    @cached_property
    def keys(self) -> list[int] | None:
        """The same as keys of tables."""
        return None if self.within is None else [block_of(self.app.app_id, CHUNK * place) for place in self.within.tolist()]


@dataclass(frozen=True)
class Funnel:
    """Who matches, who drops out at each step, and who is left."""

    matched: Bits
    drops: Mapping[Reason, Bits]
    """In the order of the steps."""
    ends: Mapping[Reason, tuple[datetime, datetime]]
    """Of those who drop out because they are held: when the first is free again, and when the last is."""
    audience: Bits

    @property
    def chosen(self) -> Bits:
        """Whom a campaign is for that is launched now: who would be messaged, and who is held out."""
        return self.audience | self.drops[Reason.HELD_OUT]

    @property
    def lasting(self) -> Bits:
        """The same, and who drops out only for now."""
        return reduce(np.bitwise_or, [self.drops[reason] for reason in PASSING], self.chosen)


Dropping = Mapping[Reason, Bits | Holds]
Step = Callable[[AsyncConnection, Copies, Target], Awaitable[Dropping]]


async def _judge_standings(conn: AsyncConnection, _: Copies, target: Target) -> Dropping:
    """Who has no subscription on the channel, said stop there, or has only addresses that do not work."""
    names = [standing_set(standing, target.channel) for standing in STANDINGS]
    sets = await read_sets(conn, target.app.app_id, names, target.blocks, target.within)
    active, opted_out, invalid = (sets[name] for name in names)
    return {Reason.NO_SUBSCRIPTION: ~(active | opted_out | invalid), Reason.OPTED_OUT: opted_out, Reason.INVALID: invalid}


async def _find_held(conn: AsyncConnection, _: Copies, target: Target) -> Dropping:
    """Whom the provider asked to leave alone for now, at each of their addresses."""
    return {Reason.HELD: await find_held(conn, target.app.app_id, target.channel, target.keys)}


async def _find_over_cap(conn: AsyncConnection, _: Copies, target: Target) -> Dropping:
    """Who was messaged as often as the app allows in so many hours."""
    app = target.app
    full = np.empty(0, np.int64)
    if app.cap_messages and app.cap_hours and not target.transactional:
        full = await find_full(conn, app.app_id, app.cap_messages, timedelta(hours=app.cap_hours), target.keys)
    return {Reason.OVER_FREQUENCY_CAP: set_numbers(full, target.blocks)}


async def _find_in_open_waves(conn: AsyncConnection, copies: Copies, target: Target) -> Dropping:
    """Who is on the roll of another wave of the chain that is still being sent."""
    waiting = np.zeros(len(target.matched), np.uint8)
    for wave in await list_open_waves(conn, target.roots):
        if wave.campaign_id not in target.asked:
            waiting |= set_numbers(await copies.read_roll(conn, wave), target.blocks)
    return {Reason.IN_OPEN_WAVE: waiting}


async def _hold_out(_: AsyncConnection, __: Copies, target: Target) -> Dropping:
    """Who is left alone, so that the others can be compared with them."""

    def choose() -> Bits:
        numbers = list_numbers(target.matched)
        return set_numbers(numbers[find_held_out(target.shares, numbers)], target.blocks)

    nobody = np.zeros(len(target.matched), np.uint8)
    return {Reason.HELD_OUT: await asyncio.to_thread(choose) if target.shares else nobody}


STEPS: tuple[Step, ...] = (_judge_standings, _find_held, _find_over_cap, _find_in_open_waves, _hold_out)


async def run_funnel(conn: AsyncConnection, copies: Copies, target: Target) -> Funnel:
    """Take those who match through every step."""
    dropping = [dropped for step in STEPS for dropped in (await step(conn, copies, target)).items()]

    def drop() -> Funnel:
        left, drops, ends = target.matched, {}, {}
        for reason, applies in dropping:
            bits = set_numbers(applies.numbers, target.blocks) if isinstance(applies, Holds) else applies
            drops[reason] = left & bits
            left = left & ~bits
            if isinstance(applies, Holds) and len(until := applies.until[find_members(drops[reason], applies.numbers)]):
                ends[reason] = (until.min().item().replace(tzinfo=UTC), until.max().item().replace(tzinfo=UTC))
        return Funnel(target.matched, drops, ends, left)

    return await asyncio.to_thread(drop)
