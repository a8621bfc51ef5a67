"""Benchmarks in small: what they stand on must not rot, since nobody sends to ten million people every day."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.bench import scattered
from tests.bench.send import CONTENT, open_bench

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_bench_of_sending_finds_every_message_at_its_sink() -> None:
    async with open_bench(60) as (bench, *_):
        for channel in CONTENT:
            await bench.send(channel, 50)


async def test_each_form_of_the_upsert_writes_the_same_receipts(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scattered, "EVENTS", 50)
    monkeypatch.setattr(scattered, "ALL_SHAPES", {"few": (2, 100), "many": (3, 20_000)})
    found = await scattered.measure_upserts(engine)
    assert [set(row) for row in found] == [{"form", "few", "many"}] * 7
