"""Processes that are killed in the middle of sending: nobody is missed, and nobody is texted twice."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Capabilities
from aftertouch.delivery.sender import BATCHES_AT_ONCE
from aftertouch.demo import SERVER_READY
from aftertouch.plugins import discover_channels
from aftertouch.processes import Child
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.report import count_campaign
from aftertouch.rpc.values import to_timestamp
from aftertouch.store.campaigns import find_campaign
from aftertouch.store.engine import open_engine, transaction
from aftertouch.v1 import campaigns_pb2
from tests.e2e.site import (
    Site,
    is_running,
    kill,
    launch_campaigns,
    open_site,
    read_postgres_pid,
    read_recipients,
    wait_until_sent,
)
from tests.fix_database import clone_database

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CHANNELS = ("sms", "whatsapp", "push")
UNDER_WAY = Capabilities().batch_size * BATCHES_AT_ONCE
"""People whose messages are under way at once in one unit, at most."""
SENT = campaigns_pb2.Campaign.State.SENT


def count_copies(entries: list[dict[str, Any]]) -> Counter[str]:
    """How often each address was handed over."""
    return Counter(entry["address"] for entry in entries)


async def check_outcome(site: Site, names: dict[str, str], crashes: int) -> None:
    """Hold what the server says of each campaign against what the sandbox was handed."""
    async with site.connect() as client:
        for name in names.values():
            assert (await wait_until_sent(client, name)).state == SENT
        entries = await site.read_entries()
        for channel, name in names.items():
            recipients = await read_recipients(client, name)
            handed = {entry["external_id"] for entry in entries[channel]}
            taken = {entry["external_id"] for entry in entries[channel] if entry["refused"] is None}
            unclear = {person for person, signals in recipients.items() if not signals & {"sent", "failed", "skipped"}}
            assert set(recipients) == {person.external_id for person in site.population if channel in person.channels}
            assert all("attempted" in signals for signals in recipients.values())
            assert handed | unclear == set(recipients)
            if channel == "sms":
                # Twilio says what it took; whoever it refused may be refused twice.
                assert not unclear
                assert handed == set(recipients)
                copies = count_copies([entry for entry in entries[channel] if entry["refused"] is None])
                assert copies.most_common(1)[0][1] == 1
            elif channel == "push":
                tokens = defaultdict(set)
                for entry in entries[channel]:
                    if entry["refused"] is None:
                        tokens[entry["address"]].add(entry["token"])
                assert not unclear
                assert all(len(own) == 1 for own in tokens.values())
            else:
                assert count_copies(entries[channel]).most_common(1)[0][1] == 1
                assert len(unclear) <= crashes * UNDER_WAY
                assert not unclear & taken


@pytest.mark.timeout(600)  # a crowded machine takes a minute for each start
async def test_killed_server_misses_nobody_and_texts_nobody_twice(tmp_path: Path) -> None:
    chance = random.Random(4)
    async with open_site(tmp_path, people=700) as site:
        async with site.connect() as client:
            # Slow enough that something is left for the last crash, however late each of them comes.
            names = await launch_campaigns(client, *CHANNELS, pace=30)
        crashes = 5
        for _ in range(crashes):
            await site.wait_for_messages(await site.count_messages() + chance.randrange(1, 150))
            await site.crash()
        await check_outcome(site, names, crashes)


async def test_stopped_server_leaves_nobody_unclear(tmp_path: Path, engine: AsyncEngine, database_url: str) -> None:
    async with open_site(tmp_path, people=900, database_url=database_url) as site:
        async with site.connect() as client:
            names = await launch_campaigns(client, *CHANNELS, pace=15)
        await site.wait_for_messages(100)
        assert await site.server.stop() == 0
        types = discover_channels().types
        async with transaction(engine) as conn:
            for channel, name in names.items():
                campaign = await find_campaign(conn, 1, name.rpartition("/")[2])
                assert campaign is not None
                assert campaign.state == "SENDING", "stopped too late to prove anything"
                counts = await count_campaign(conn, Copies(), campaign, types[channel])
                assert counts.unclear == 0
                assert counts.signals.get("attempted", 0) < campaign.recipients
            # The rest need not take as long.
            await conn.execute(text("UPDATE campaigns SET messages_per_second = 0"))
        await site.server.start()
        await check_outcome(site, names, crashes=0)


async def test_server_restored_from_three_hours_ago_sends_nothing_that_is_past_its_deadline(
    tmp_path: Path, postgres_url: str, template: str
) -> None:
    now, hour = datetime.now(UTC), timedelta(hours=1)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(clone_database(postgres_url, template))
        site = await stack.enter_async_context(open_site(tmp_path, people=150, database_url=url))
        async with site.connect() as client:
            names = await launch_campaigns(client, *CHANNELS, pace=5, send_by_time=to_timestamp(now + 2 * hour))
            times = {"schedule_time": to_timestamp(now + hour), "send_by_time": to_timestamp(now + 2 * hour)}
            (later,) = (await launch_campaigns(client, "sms", **times)).values()
        await site.wait_for_messages(30)
        await site.server.kill()
        backup = await stack.enter_async_context(clone_database(postgres_url, urlsplit(url).path[1:]))
        # What is sent from here on the backup does not know.
        await site.crash()
        await site.wait_for_messages(await site.count_messages() + 60)
        assert await site.server.stop() == 0
        sent = await site.count_messages()
        engine = await stack.enter_async_context(open_engine(backup, pool_size=1))
        async with transaction(engine) as conn:
            moved = ", ".join(f"{column} = {column} - interval '3 hours'" for column in ("schedule_time", "send_by_time"))
            await conn.exec_driver_sql(f"UPDATE campaigns SET {moved}, launch_time = launch_time - interval '3 hours'")
            await conn.exec_driver_sql("UPDATE send_units SET lease_until = lease_until - interval '3 hours'")
        environment = site.environment | {"AFTERTOUCH_DATABASE_URL": backup}
        site.server = Child("serve", environment=environment, ready=SERVER_READY, log=tmp_path / "restored.log")
        await stack.enter_async_context(site.server)
        async with site.connect() as client:
            for name in names.values():
                campaign = await wait_until_sent(client, name)
                counts = campaign.counts
                assert campaign.state == SENT
                assert ("policy", "send_by_time") in {(r.reason_class, r.reason_code) for r in counts.reasons}
                known = {"sent", "failed", "skipped"}
                people = await read_recipients(client, name)
                assert counts.unclear == sum(not signals & known for signals in people.values()) < counts.recipients
            async with asyncio.timeout(120):
                watch = client.campaigns.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=later))
                last = [campaign async for campaign in watch][-1]
            assert (last.state, last.counts.recipients) == (campaigns_pb2.Campaign.State.FAILED, 0)
        assert await site.count_messages() == sent


async def test_stopped_server_stops_its_postgres(tmp_path: Path) -> None:
    async with open_site(tmp_path, people=10) as site:
        postgres = read_postgres_pid(tmp_path)
        assert is_running(postgres)
        assert await site.server.stop() == 0
        assert not is_running(postgres)


async def test_server_stops_loudly_when_its_postgres_dies(tmp_path: Path) -> None:
    async with open_site(tmp_path, people=400) as site:
        async with site.connect() as client:
            names = await launch_campaigns(client, "sms")
            await site.wait_for_messages(50)
            kill(read_postgres_pid(tmp_path))
        assert await site.server.process.wait() == 1
        assert "the embedded PostgreSQL ended by itself" in site.log
        await site.crash()
        await check_outcome(site, names, crashes=1)


async def test_workers_beside_a_server_message_everybody_once(tmp_path: Path, database_url: str) -> None:
    async with open_site(tmp_path, people=120, database_url=database_url) as site:
        logs = [tmp_path / "server.log", tmp_path / "worker-1.log", tmp_path / "worker-2.log"]
        one, two = (Child("worker", environment=site.environment, ready="sending", log=log) for log in logs[1:])
        async with one, two, site.connect() as client:
            campaigns = [await launch_campaigns(client, *CHANNELS) for _ in range(6)]
            for names in campaigns:
                for name in names.values():
                    assert (await wait_until_sent(client, name)).state == SENT
                    recipients = await read_recipients(client, name)
                    assert all(signals & {"sent", "failed", "skipped"} for signals in recipients.values())
            entries = await site.read_entries()
            for channel in CHANNELS:
                people = [person for person in site.population if channel in person.channels]
                copies = Counter(entry["token"] for entry in entries[channel] if entry["token"])
                assert set(copies.values()) == {1}
                # A browser that is gone is asked once: the first campaign's answer ends the subscription.
                assert len({entry["address"] for entry in entries[channel]}) == len(people)
        assert one.process.returncode == two.process.returncode == 0
    assert sum('"action": "finish_campaign"' in log.read_text() for log in logs) >= 2, "only one process sent"
