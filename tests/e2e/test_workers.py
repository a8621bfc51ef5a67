"""Many workers on one database, of which one is killed again and again, and workers that are told to stop."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import psutil
import pytest
from sqlalchemy import text

from aftertouch.channels import Capabilities
from aftertouch.delivery.sender import BATCHES_AT_ONCE
from aftertouch.processes import Child, isolate
from aftertouch.sandbox import SandboxSettings
from aftertouch.sandbox.faults import Fault
from aftertouch.store.embedded import EmbeddedPostgres
from aftertouch.store.engine import transaction
from aftertouch.store.migrate import migrate
from aftertouch.v1 import campaigns_pb2
from tests.e2e.books import check_books
from tests.fix_database import clone_database
from tests.fix_world import World, run_world

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHANNELS = ("sms", "whatsapp", "push")
SENDING = campaigns_pb2.Campaign.State.SENDING
UNDER_WAY = Capabilities().batch_size * BATCHES_AT_ONCE
KILLS = 6
PACE = 15
"""Of a campaign, a second: a worker that dies leaves no more of its people unclear."""
READY = "sending"


@pytest.fixture
async def world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world whose server only listens."""
    settings = SandboxSettings(size=150, time_scale=0.02)
    async with clone_database(postgres_url, template) as url, run_world(url, settings, send_units=0) as world:
        await world.import_people()
        yield world


async def launch(world: World, channel: str, pace: int = 0) -> str:
    name = str((await world.create_campaign(channel, messages_per_second=pace)).name)
    await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
    return name


@pytest.mark.timeout(600)  # eight processes start at once, and six of them again
@pytest.mark.parametrize("count", [2, 8])
async def test_workers_of_which_one_dies_every_second_miss_nobody_and_text_nobody_twice(
    world: World, tmp_path: Path, count: int
) -> None:
    chance = random.Random(count)
    environment = world.make_worker_environment(tmp_path)
    logs = [tmp_path / f"worker-{index}.log" for index in range(count)]
    workers = [Child("worker", environment=environment, ready=READY, log=log) for log in logs]
    async with AsyncExitStack() as stack:
        await asyncio.gather(*(stack.enter_async_context(worker) for worker in workers))
        # Slow enough that sending goes on while workers die.
        names = [await launch(world, channel, pace=PACE) for channel in CHANNELS for _ in range(2)]
        alive = list(workers)

        async def replace(dead: Child) -> None:
            await dead.start()
            alive.append(dead)

        async with asyncio.TaskGroup() as group:
            for _ in range(KILLS):
                await asyncio.sleep(1)
                if alive:
                    victim = alive.pop(chance.randrange(len(alive)))
                    await victim.kill()
                    # What the others hold is taken from them as well, as if they had been cut off for a while.
                    await world.expire_leases()
                    group.create_task(replace(victim))
        for name in names:
            await world.wait_until_sent(name, seconds=240)
        await check_books(world, names, most_unclear=KILLS * PACE)


async def test_worker_that_is_told_to_stop_hands_its_units_back_and_leaves_nobody_unclear(world: World, tmp_path: Path) -> None:
    hung = 5
    world.sandbox.faults.set(Fault(channel="sms", mode="stall", times=hung))
    environment = world.make_worker_environment(tmp_path) | {"AFTERTOUCH_SMS_TIMEOUT_SECONDS": "10"}
    async with Child("worker", environment=environment, ready=READY, log=tmp_path / "worker.log") as worker:
        # Slow enough that all are still being sent then.
        names = [await launch(world, channel, pace=5) for channel in CHANNELS]
        async with asyncio.timeout(120):
            while len(world.sandbox.truth.entries) < 10 or world.sandbox.faults.strikes["sms stall"] < hung:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with asyncio.timeout(120):
            assert await worker.stop() == 0
    async with transaction(world.core.engine) as conn:
        held = await conn.execute(text("SELECT count(*), count(lease_until) FROM send_units"))
        assert held.one() == (len(names), 0), "stopped too late to prove anything, or a unit was not handed back"
        # The rest need not take as long.
        await conn.execute(text("UPDATE campaigns SET messages_per_second = 0"))
    for name in names:
        campaign = await world.get_campaign(name)
        assert campaign.state == SENDING
        assert campaign.counts.unclear == (hung if campaign.channel == "sms" else 0)
    world.sandbox.faults.clear()
    async with Child("worker", environment=environment, ready=READY, log=tmp_path / "worker.log"):
        for name in names:
            await world.wait_until_sent(name)
    await check_books(world, names, most_unclear=hung)


async def test_worker_whose_database_hangs_stops_all_the_same(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path) as postgres:
        await migrate(postgres.url)
        postmaster = psutil.Process(int((tmp_path / "pg/postmaster.pid").read_text().split("\n")[0]))
        async with run_world(postgres.url, SandboxSettings(size=100, time_scale=0.02), send_units=0) as world:
            await world.import_people()
            names = [await launch(world, channel, pace=20) for channel in CHANNELS]
            # The real limit leaves room for the slowest provider call.
            arguments = [sys.executable, "-c", "from aftertouch import cli; cli.STOP_SECONDS = 3; cli.main()", "worker"]
            environment = isolate(world.make_worker_environment(tmp_path))
            worker = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=asyncio.subprocess.DEVNULL)
            async with asyncio.timeout(120):
                while len(world.sandbox.truth.entries) < 20:  # noqa: ASYNC110 - the sandbox wakes nobody
                    await asyncio.sleep(0.01)
            stopped = [postmaster, *postmaster.children()]
            for process in stopped:
                process.suspend()
            try:
                worker.send_signal(signal.SIGTERM)
                async with asyncio.timeout(120):
                    await worker.wait()
            finally:
                for process in stopped:
                    process.resume()
            await world.expire_leases()
            async with Child(
                "worker", environment=world.make_worker_environment(tmp_path), ready=READY, log=tmp_path / "worker.log"
            ):
                for name in names:
                    await world.wait_until_sent(name)
            await check_books(world, names, most_unclear=UNDER_WAY)
