"""`make bench-send` in small: what it stands on must not rot, since nobody sends to ten million people every day."""

from __future__ import annotations

import pytest

from tests.bench.send import CONTENT, open_bench

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


async def test_bench_of_sending_finds_every_message_at_its_sink() -> None:
    async with open_bench(60) as (bench, *_):
        for channel in CONTENT:
            await bench.send(channel, 50)
