"""The pace as several workers keep it: who is asked, and when a hold of one is known to another."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Limit
from aftertouch.delivery import pace
from aftertouch.delivery.pace import ASK_SECONDS, Pacer
from aftertouch.store.engine import transaction
from aftertouch.store.paces import hold_limits


async def hold(engine: AsyncEngine, key: str) -> None:
    """As another worker does it."""
    async with transaction(engine) as conn:
        await hold_limits(conn, {key: timedelta(hours=1)})


async def test_hold_of_another_worker_is_known_a_moment_later(engine: AsyncEngine) -> None:
    pacer, people = Pacer(engine), [(Limit(key="a/account"),)] * 3
    assert (await pacer.admit(people)).admitted == [True] * 3
    await hold(engine, "a/account")
    await asyncio.sleep(ASK_SECONDS)
    admission = await pacer.admit(people)
    assert admission.admitted == [False] * 3
    assert admission.retry_after > timedelta(minutes=50)


async def test_limit_that_is_held_is_asked_for_until_it_has_room(engine: AsyncEngine) -> None:
    pacer, people = Pacer(engine), [(Limit(key="b/account"),), (Limit(key="b/other"),)]
    await hold(engine, "b/account")
    for _ in range(3):
        assert (await pacer.admit(people)).admitted == [False, True]


async def test_limit_with_a_rate_is_taken_from_each_time(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Room comes back with time, so it comes back slowly here.
    monkeypatch.setattr(pace, "HORIZON", timedelta(hours=1))
    pacer, people = Pacer(engine), [(Limit(key="c/account", interval=timedelta(minutes=10)),)]
    waits = [(await pacer.admit(people)).wait for _ in range(3)]
    assert waits[0] < waits[1] < waits[2]
