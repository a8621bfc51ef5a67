"""The database goes away in the middle: the server stays, messages nobody twice, and loses no receipt."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import psycopg
import pytest

from aftertouch.sandbox import SandboxSettings
from aftertouch.store.embedded import EmbeddedPostgres
from aftertouch.store.migrate import migrate
from aftertouch.v1 import campaigns_pb2
from tests.e2e.spools import count_rows
from tests.fix_database import CUT_CONNECTIONS, name_database
from tests.fix_world import OpenWorld, World, run_world

CHANNELS = ("sms", "whatsapp", "push")
SENT = campaigns_pb2.Campaign.State.SENT
HEARD = {"sms": ("delivered", "failed"), "whatsapp": ("delivered", "read", "failed"), "push": ("clicked", "dismissed", "failed")}
"""Signals that mean the same here and in the sandbox, implied ones left out on both sides where the sandbox has none."""


async def launch_everywhere(world: World) -> dict[str, str]:
    names = {}
    for channel in CHANNELS:
        names[channel] = (await world.create_campaign(channel)).name
    for name in names.values():
        await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
    return names


async def check_world(world: World, names: dict[str, str]) -> None:
    """Everybody was messaged once, and everything that the sandbox told is known."""
    for channel, name in names.items():
        assert (await world.wait_until_sent(name, seconds=240)).state == SENT
        await world.hear_all()
        entries = [entry for entry in world.sandbox.truth.entries if entry.channel == channel and entry.person]
        copies = Counter(entry.person.external_id for entry in entries if entry.person)
        recipients = await world.read_recipients(name)
        assert set(copies) == set(recipients)
        if channel != "push":
            assert set(copies.values()) == {1}
        for signal in HEARD[channel]:
            told = {entry.person.external_id for entry in entries if entry.person and signal in entry.signals}
            if signal == "delivered":
                told |= {entry.person.external_id for entry in entries if entry.person and "read" in entry.signals}
            assert {person for person, found in recipients.items() if signal in found.signals} == told
        assert (await world.get_campaign(name)).counts.unclear == 0
    assert world.sandbox.outbox.counts["lost"] == 0


async def test_connections_that_are_cut_again_and_again_lose_nothing(
    open_world: OpenWorld, database_url: str, tmp_path: Path
) -> None:
    async with open_world(SandboxSettings(size=400, time_scale=0.2), data_dir=tmp_path) as world:
        await world.import_people()
        names = await launch_everywhere(world)
        name = urlsplit(database_url).path[1:]
        other = name_database(database_url, "postgres")
        async with await psycopg.AsyncConnection.connect(other, autocommit=True) as conn:
            for _ in range(12):
                await conn.execute(CUT_CONNECTIONS, [name])
                await asyncio.sleep(0.15)
        await check_world(world, names)


@pytest.mark.slow
@pytest.mark.parametrize("spool_megabytes", [0, 1])
async def test_database_that_is_gone_for_seconds_loses_nothing(tmp_path: Path, spool_megabytes: int) -> None:
    """Without a spool that takes patient providers; with one, not even those that try once."""
    settings = SandboxSettings(size=400, time_scale=0.5, strict_retries=spool_megabytes > 0)
    async with AsyncExitStack() as stack:
        postgres = EmbeddedPostgres(tmp_path)
        await stack.enter_async_context(postgres)
        await migrate(postgres.url)
        async with run_world(postgres.url, settings, spool_megabytes=spool_megabytes, data_dir=tmp_path) as world:
            await world.import_people()
            names = await launch_everywhere(world)
            while len(world.sandbox.truth.entries) < 150:  # noqa: ASYNC110 - the sandbox wakes nobody
                await asyncio.sleep(0.005)
            await stack.aclose()
            await asyncio.sleep(2)
            await stack.enter_async_context(EmbeddedPostgres(tmp_path))
            await check_world(world, names)
            assert (world.sandbox.outbox.counts["retries"] == 0) == (spool_megabytes > 0)


WRITTEN = ("receipts", "events", "send_units")
JUDGE = "CREATE OR REPLACE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; RETURN NULL; END $$"


@pytest.mark.parametrize("state", ["53100", "58030", "25006"], ids=["disk full", "disk broken", "no primary any more"])
async def test_database_that_cannot_write_for_seconds_loses_nothing_and_ends_no_server(
    open_world: OpenWorld, database_url: str, tmp_path: Path, state: str
) -> None:
    settings = SandboxSettings(size=400, time_scale=0.2, strict_retries=True)
    async with (
        await psycopg.AsyncConnection.connect(database_url, autocommit=True) as conn,
        open_world(settings, data_dir=tmp_path) as world,
    ):
        await world.import_people()
        await conn.execute(JUDGE.format(body="NULL"))
        for table in WRITTEN:
            await conn.execute(
                f"CREATE TRIGGER judge BEFORE INSERT OR UPDATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION judge()"
            )
        names = await launch_everywhere(world)
        while len(world.sandbox.truth.entries) < 100:  # noqa: ASYNC110 - the sandbox wakes nobody
            await asyncio.sleep(0.005)
        await conn.execute(JUDGE.format(body=f"RAISE EXCEPTION 'No space left on device' USING ERRCODE = '{state}'"))
        async with asyncio.timeout(60):
            while not count_rows(tmp_path):  # noqa: ASYNC110 - there is nothing to wait on but the file
                await asyncio.sleep(0.1)
        # The server meets it again and again.
        await asyncio.sleep(3)
        await conn.execute(JUDGE.format(body="NULL"))
        await check_world(world, names)
        assert world.sandbox.outbox.counts["retries"] == 0


async def post_until_taken(session: aiohttp.ClientSession, hook: str) -> int:
    """Report something as often as it takes: a crowded machine connects to the database later than a provider is kept waiting."""
    async with asyncio.timeout(60):
        while True:
            async with session.post(hook) as answer:
                if answer.status != 503:
                    return answer.status
            await asyncio.sleep(0.1)


async def test_webhook_without_a_spool_is_refused_while_the_database_is_away_and_taken_once_it_is_back(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        postgres = EmbeddedPostgres(tmp_path)
        await stack.enter_async_context(postgres)
        await migrate(postgres.url)
        async with run_world(postgres.url, spool_megabytes=0) as world, aiohttp.ClientSession() as session:
            await world.import_people()
            draft = await world.create_campaign("push")
            await world.launch(draft.name)
            before = (await world.get_campaign(draft.name)).counts.signals["clicked"]
            told = (entry for entry in world.sandbox.truth.entries if entry.token and "clicked" not in entry.signals)
            hook = f"http://{world.addresses.http}/v1/webhooks/push/clicked?t={next(told).token}"
            await stack.aclose()
            async with session.post(hook) as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
            await stack.enter_async_context(EmbeddedPostgres(tmp_path))
            for _ in range(2):
                assert await post_until_taken(session, hook) == 204
            assert (await world.get_campaign(draft.name)).counts.signals["clicked"] == before + 1
