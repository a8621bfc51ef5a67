"""The pace as several workers keep it: who is asked, and when a hold of one is known to another."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Limit
from aftertouch.delivery import pace
from aftertouch.delivery.pace import ASK_SECONDS, MOST_PROBED, Pacer
from aftertouch.store.engine import transaction
from aftertouch.store.paces import hold_limits, take_room


async def hold(engine: AsyncEngine, key: str) -> None:
    """As another worker does it."""
    async with transaction(engine) as conn:
        await hold_limits(conn, {key: timedelta(hours=1)})


async def test_hold_of_another_worker_is_known_a_moment_later(engine: AsyncEngine) -> None:
    pacer, people = Pacer(engine), [(Limit(key="a/account"),)] * 3
    assert (await pacer.admit(people)).rests == [None] * 3
    await hold(engine, "a/account")
    await asyncio.sleep(ASK_SECONDS)
    rests = (await pacer.admit(people)).rests
    assert all(rest is not None and rest > timedelta(minutes=50) for rest in rests)


async def test_limit_that_is_held_is_asked_for_until_it_has_room(engine: AsyncEngine) -> None:
    pacer, people = Pacer(engine), [(Limit(key="b/account"),), (Limit(key="b/other"),)]
    await hold(engine, "b/account")
    for _ in range(3):
        assert [rest is None for rest in (await pacer.admit(people)).rests] == [False, True]


async def test_limit_with_a_rate_is_taken_from_each_time(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Room comes back with time, so it comes back slowly here.
    monkeypatch.setattr(pace, "HORIZON", timedelta(hours=1))
    pacer, people = Pacer(engine), [(Limit(key="c/account", interval=timedelta(minutes=10)),)]
    waits = [(await pacer.admit(people)).delay for _ in range(3)]
    assert waits[0] < waits[1] < waits[2]


async def test_limits_that_nothing_gets_through_are_forgotten_at_last(engine: AsyncEngine) -> None:
    """Each person whom a provider held back was remembered for as long as the process ran."""
    pacer = Pacer(engine)
    keys = [f"d/to/{number}" for number in range(MOST_PROBED + 5)]
    for some in (keys[:10], keys[:1], keys[10:]):
        pacer.slow_down(dict.fromkeys(some), {}, time.monotonic())
    assert [pacer.is_probing(key) for key in keys[:8]] == [True, *[False] * 5, True, True]
    assert pacer.is_probing(keys[-1])


async def test_hold_that_is_nearly_over_delays_nobody_who_counts_against_another_limit(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "HORIZON", timedelta(hours=2))
    pacer, people = Pacer(engine), [(Limit(key="e/north"),), (Limit(key="e/south"),)]
    await hold(engine, "e/north")
    admission = await pacer.admit(people)
    assert [rest is None for rest in admission.rests] == [False, True]
    assert admission.delay == timedelta(0)


async def test_limit_that_rested_begins_with_half_of_its_own_messages(engine: AsyncEngine) -> None:
    pacer = Pacer(engine)
    pacer.slow_down(dict.fromkeys(("f/north", "f/south"), timedelta(0)), {"f/north": 10, "f/south": 2}, time.monotonic())
    people = [(Limit(key=key),) for key in ("f/north", "f/south") for _ in range(20)]
    rests = (await pacer.admit(people)).rests
    assert (rests[:20].count(None), rests[20:].count(None)) == (5, 1)


def test_provider_that_asks_for_too_short_a_rest_gets_a_longer_one(engine: AsyncEngine) -> None:
    """With "Retry-After: 1" all through an outage, a hundred tries were over in two minutes."""
    pacer, asked = Pacer(engine), timedelta(seconds=1)
    rests = [pacer.slow_down({"g": asked}, {}, time.monotonic())["g"] for _ in range(8)]
    assert rests[0] == asked
    assert rests[-1] > 20 * asked


async def test_whoever_is_held_up_takes_no_room_of_others(engine: AsyncEngine) -> None:
    """The room of a campaign with a rate went to people whose push service rested, and hardly anybody was sent to."""
    pacer = Pacer(engine)
    campaign = Limit(key="h/campaign", interval=timedelta(seconds=1))
    await hold(engine, "h/north")
    people = [(Limit(key=f"h/{wood}"), campaign) for wood in ("north", "south")]
    for _ in range(2):
        rests = (await pacer.admit(people)).rests
        assert [rest is None for rest in rests] == [False, True]
    async with transaction(engine) as conn:
        (_, until) = (await take_room(conn, {"h/campaign": timedelta(0)}, timedelta(hours=1)))["h/campaign"]
    assert until < timedelta(seconds=2.1), "room was taken for two, not for four"


def test_limit_through_which_some_get_is_not_in_trouble(engine: AsyncEngine) -> None:
    """A provider that took a part of each batch and asked for a second was left alone for minutes."""
    pacer, asked = Pacer(engine), timedelta(seconds=1)
    for _ in range(8):
        pacer.note_success({"i"}, {"i"})
        rests = pacer.slow_down({"i": asked}, {"i": 50}, time.monotonic())
        assert (rests["i"], pacer.is_in_trouble("i"), pacer.is_probing("i")) == (asked, False, True)
