"""kill -9 of the worker and of the database at each step of a unit: nobody is missed, and nobody is texted twice."""

from __future__ import annotations

import asyncio
import itertools
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import aftertouch_sms
import psutil
import pytest
from sqlalchemy import text

from aftertouch.channels import Capabilities
from aftertouch.delivery.sender import BATCHES_AT_ONCE
from aftertouch.delivery.worker import Worker
from aftertouch.errors import DatabaseUnavailable
from aftertouch.processes import isolate
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings
from aftertouch.store.embedded import EmbeddedPostgres
from aftertouch.store.engine import transaction
from aftertouch.store.migrate import migrate
from aftertouch.v1 import campaigns_pb2
from tests.e2e.books import check_books
from tests.e2e.mortal import STEPS, strike_at
from tests.fix_world import World, run_world

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.usefixtures("_look_up_soon")]

CHANNELS = ("sms", "whatsapp", "push")
PEOPLE = 150
"""More than a batch of each channel, so that others are under way beside the one that is struck."""
_NUMBERS = itertools.count(1)
UNDER_WAY = Capabilities().batch_size * BATCHES_AT_ONCE


@pytest.fixture(scope="module")
async def place(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[World, Path]]:
    """A world in which nobody sends but the tests, on a PostgreSQL of its own that may be killed."""
    directory = tmp_path_factory.mktemp("steps")
    async with EmbeddedPostgres(directory) as postgres:
        await migrate(postgres.url)
        settings = SandboxSettings(size=PEOPLE, time_scale=0.02)
        async with run_world(postgres.url, settings, send_units=0, data_dir=directory) as world:
            await world.import_people()
            yield world, directory


@pytest.fixture(autouse=True)
def _share_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox's clock is ours, but for the fractions of a second; the messages of the step before are not this one's."""
    monkeypatch.setattr(aftertouch_sms, "CLOCK_TOLERANCE", timedelta(seconds=1))


@asynccontextmanager
async def run_worker(world: World) -> AsyncIterator[None]:
    """A worker in this process, meanwhile."""
    stopping = asyncio.Event()
    worker = Worker(world.core.engine, world.core.ledger, world.core.registry, world.core.context, units=2)
    working = asyncio.create_task(worker.run(stopping))
    try:
        yield
    finally:
        stopping.set()
        await working


async def launch_everywhere(world: World) -> dict[str, str]:
    # Twilio dates messages to the second: those of the step before have to lie before this launch.
    await asyncio.sleep(2.1)
    # A text of its own each time: Twilio is asked for messages by their text, and a campaign of a second ago is not this one.
    contents = {"sms": to_struct({"body": f"Sale number {next(_NUMBERS)}"})}
    drafts = {
        channel: await world.create_campaign(channel, **({"content": contents[channel]} if channel in contents else {}))
        for channel in CHANNELS
    }
    names = {channel: draft.name for channel, draft in drafts.items()}
    for name in names.values():
        await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
    return names


@pytest.mark.parametrize("step", STEPS)
async def test_worker_killed_at_a_step_misses_nobody_and_texts_nobody_twice(place: tuple[World, Path], step: str) -> None:
    world, directory = place
    names = await launch_everywhere(world)
    environment = isolate(world.make_worker_environment(directory))
    arguments = [sys.executable, "-m", "tests.e2e.mortal", step, "2"]
    mortal = await asyncio.create_subprocess_exec(*arguments, env=environment, stdout=asyncio.subprocess.DEVNULL)
    assert await mortal.wait() == -signal.SIGKILL
    await world.expire_leases()
    async with run_worker(world):
        for name in names.values():
            await world.wait_until_sent(name)
    await check_books(world, names.values(), most_unclear=UNDER_WAY)


def crash_database(directory: Path) -> None:
    """kill -9 a process of PostgreSQL, which ends them all and recovers, and wait until no connection is left."""
    postmaster = psutil.Process(int((directory / "pg/postmaster.pid").read_text().split("\n")[0]))
    before = postmaster.children()
    before[0].kill()
    psutil.wait_procs(before, timeout=120)


@pytest.mark.parametrize("step", STEPS)
async def test_database_killed_at_a_step_leaves_nobody_out_and_nobody_unclear(
    place: tuple[World, Path], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, directory = place
    crashed = asyncio.Event()

    async def blow() -> None:
        # In a thread: a loop that stands still would spoil what is under way with the provider.
        await asyncio.to_thread(crash_database, directory)
        crashed.set()

    strike_at(step, 2, blow, monkeypatch.setattr)
    names = await launch_everywhere(world)
    async with run_worker(world):
        async with asyncio.timeout(120):
            await crashed.wait()
        await wait_until_recovered(world)
        for name in names.values():
            await world.wait_until_sent(name)
    await check_books(world, names.values(), most_unclear=0)


async def wait_until_recovered(world: World) -> None:
    """Wait until the database answers again."""
    async with asyncio.timeout(120):
        while True:
            try:
                async with transaction(world.core.engine) as conn:
                    await conn.execute(text("SELECT 1"))
                return
            except DatabaseUnavailable:
                await asyncio.sleep(0.1)
