"""Webhooks while the database is away or hangs: a provider that was answered 2xx never has to send again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

import aiohttp
import psycopg
import pytest
from sqlalchemy import text

from aftertouch.channels import Receipt, Webhook
from aftertouch.ingest import intake
from aftertouch.ingest.intake import Intake, TokenInvalid
from aftertouch.ingest.spool import Spool
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.e2e.site import launch_campaigns, open_site, wait_until_sent
from tests.e2e.spools import count_rows, wait_until_drained
from tests.e2e.test_webhooks import post_statuses, read_unrecognized
from tests.fix_database import CUT_CONNECTIONS, name_database
from tests.fix_world import OpenWorld, World

PATIENCE = aiohttp.ClientTimeout(total=60)
"""More than Twilio's 15 seconds, for a crowded machine: whoever waits for the database here waits for ever."""


@asynccontextmanager
async def connect(url: str) -> AsyncIterator[psycopg.AsyncConnection]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as conn:
        yield conn


@asynccontextmanager
async def take_away(database_url: str) -> AsyncIterator[None]:
    """Meanwhile nobody is connected to the database, and nobody can."""
    name = urlsplit(database_url).path[1:]
    async with connect(name_database(database_url, "postgres")) as conn:
        await conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        # Whoever was let in just before is there only a moment later.
        for pause in (0.2, 0):
            await conn.execute(CUT_CONNECTIONS, [name])
            await asyncio.sleep(pause)
        try:
            yield
        finally:
            await conn.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


@asynccontextmanager
async def lock_receipts(database_url: str) -> AsyncIterator[None]:
    """Meanwhile whoever writes a receipt waits."""
    async with connect(database_url) as conn, conn.transaction():
        await conn.execute("LOCK TABLE receipts")
        yield


@asynccontextmanager
async def stop_backends(database_url: str) -> AsyncIterator[None]:
    """Meanwhile no connection of the server gets an answer, not even to being cancelled."""
    async with connect(database_url) as conn:
        if conn.info.host and not conn.info.host.startswith("/"):
            pytest.skip("only with a PostgreSQL on this machine")
        cursor = await conn.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'aftertouch'"
        )
        pids = [pid for (pid,) in await cursor.fetchall()]
        assert pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


async def click(http: str, tokens: Iterable[str]) -> list[int]:
    """Report that people clicked, all at once, and return the answers' statuses."""

    async def post(session: aiohttp.ClientSession, token: str) -> int:
        async with session.post(f"http://{http}/v1/webhooks/push/clicked?t={token}") as answer:
            return answer.status

    async with aiohttp.ClientSession(timeout=PATIENCE) as session:
        return await asyncio.gather(*(post(session, token) for token in tokens))


async def launch_push(world: World) -> tuple[str, list[str]]:
    """A campaign by push that is sent, and the tokens of those who did not click."""
    await world.import_people()
    name = (await world.create_campaign("push")).name
    await world.launch(name)
    return name, [entry.token for entry in world.sandbox.truth.entries if entry.token and "clicked" not in entry.signals]


async def count_clicks(world: World, name: str) -> int:
    return (await world.get_campaign(name)).counts.signals["clicked"]


async def test_receipts_of_an_outage_are_stored_once_the_database_is_back(
    open_world: OpenWorld, database_url: str, tmp_path: Path
) -> None:
    async with open_world(data_dir=tmp_path) as world:
        name, tokens = await launch_push(world)
        before = await count_clicks(world, name)
        async with take_away(database_url):
            assert set(await click(world.addresses.http, tokens * 3)) == {204}
            assert count_rows(tmp_path) == len(tokens) * 3
            back_at = datetime.now(UTC)
        await wait_until_drained(tmp_path)
        assert await count_clicks(world, name) == before + len(tokens)
        async with transaction(world.core.engine) as conn:
            statement = "SELECT count(*) FROM events JOIN kinds USING (kind) WHERE signal = 'clicked' AND time > :time"
            assert (await conn.execute(text(statement), {"time": back_at})).scalar() == 0


async def test_receipt_that_comes_after_an_outage_is_stored_before_it_is_answered(
    open_world: OpenWorld, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_world(data_dir=tmp_path) as world:
        name, (last, *tokens) = await launch_push(world)
        async with take_away(database_url):
            await click(world.addresses.http, tokens)
        await wait_until_drained(tmp_path)
        before = await count_clicks(world, name)
        # That a crowded machine's database is slow is no outage.
        monkeypatch.setattr(intake, "ANSWER_SECONDS", 60.0)
        assert await click(world.addresses.http, [last]) == [204]
        # Nothing is waited for, as it would be by the world.
        campaign = await world.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
        assert campaign.counts.signals["clicked"] == before + 1


async def test_signed_news_of_no_message_of_ours_is_kept_through_an_outage(
    open_world: OpenWorld, database_url: str, tmp_path: Path
) -> None:
    async with open_world(data_dir=tmp_path) as world:
        foreign = {"id": "wamid.other", "status": "read", "timestamp": "1", "biz_opaque_callback_data": "A" * 24}
        async with take_away(database_url):
            assert await post_statuses(world, foreign, {**foreign, "status": "teleported \u0000 \ud83d"}) == 200
        await wait_until_drained(tmp_path)
        assert len(await read_unrecognized(world)) == 2
        assert count_rows(tmp_path, "true") == 0


async def test_beacon_with_a_wrong_token_writes_nothing_to_disk(open_world: OpenWorld, database_url: str, tmp_path: Path) -> None:
    async with open_world(data_dir=tmp_path) as world, take_away(database_url):
        assert await click(world.addresses.http, ["A" * 24, "AQ" + "A" * 22, "x"]) == [403] * 3
        assert count_rows(tmp_path) == 0


async def test_webhooks_that_arrive_together_are_stored_together(open_world: OpenWorld) -> None:
    async with open_world() as world:
        name, tokens = await launch_push(world)
        before = await count_clicks(world, name)
        assert set(await click(world.addresses.http, tokens * 5)) == {204}
        await world.wait_until_stored()
        async with transaction(world.core.engine) as conn:
            statement = "SELECT count(*), count(DISTINCT commit_id) FROM events JOIN kinds USING (kind) WHERE signal = 'clicked'"
            events, commits = (await conn.execute(text(statement))).one()
        assert await count_clicks(world, name) == before + len(tokens)
        assert commits - before < (events - before) // 2


async def test_webhook_that_cannot_be_stored_spoils_it_for_no_other(
    open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without a spool a crowded machine's slow database would spoil it for all.
    monkeypatch.setattr(intake, "ANSWER_SECONDS", 60.0)
    async with open_world() as world:
        name, tokens = await launch_push(world)
        before = await count_clicks(world, name)
        broken = Receipt(signal="clicked", token=tokens[0], time=cast("datetime", "yesterday"))
        forged = Receipt(signal="clicked", token="A" * 24)
        receipts = [*(Receipt(signal="clicked", token=token) for token in tokens), broken, forged]
        async with Intake(world.core.ledger, world.core.registry.types, None) as one:
            takes = (one.take("push", Webhook(receipts=(receipt,))) for receipt in receipts)
            answers = await asyncio.gather(*takes, return_exceptions=True)
        assert [type(answer) for answer in answers] == [type(None)] * len(tokens) + [AttributeError, TokenInvalid]
        assert await count_clicks(world, name) == before + len(tokens)


async def test_full_spool_refuses_and_what_it_took_before_is_stored(
    open_world: OpenWorld, database_url: str, tmp_path: Path
) -> None:
    async with open_world(data_dir=tmp_path, spool_megabytes=1) as world:
        async with take_away(database_url):
            strange = {"status": "x" * 64, "id": "y" * 300}
            answers = [await post_statuses(world, *[strange] * 400) for _ in range(10)]
            taken = answers.count(200)
            assert 0 < taken < 10
            assert answers == [200] * taken + [503] * (10 - taken)
        await wait_until_drained(tmp_path)
        assert len(await read_unrecognized(world)) == taken * 400
        assert await post_statuses(world, strange) == 200


@pytest.mark.parametrize("hang", [lock_receipts, stop_backends])
async def test_database_that_hangs_keeps_no_provider_waiting(
    hang: type, open_world: OpenWorld, database_url: str, tmp_path: Path
) -> None:
    async with open_world(data_dir=tmp_path) as world:
        name, tokens = await launch_push(world)
        before = await count_clicks(world, name)
        async with hang(database_url):
            for _ in range(3):
                assert set(await click(world.addresses.http, tokens)) == {204}
            assert count_rows(tmp_path) == len(tokens) * 3
        await wait_until_drained(tmp_path)
        assert await count_clicks(world, name) == before + len(tokens)


@pytest.mark.slow
@pytest.mark.parametrize("is_killed", [True, False])
async def test_spool_outlives_its_server(is_killed: bool, database_url: str, tmp_path: Path) -> None:
    async with open_site(tmp_path, people=300, database_url=database_url) as site:
        async with site.connect() as client:
            name = (await launch_campaigns(client, "push"))["push"]
            await wait_until_sent(client, name)
            entries = (await site.read_entries())["push"]
            before = (await wait_until_sent(client, name)).counts.signals["clicked"]
        tokens = [entry["token"] for entry in entries if entry["token"] and "clicked" not in entry["signals"]]
        assert tokens
        http = site.server.found[1].removeprefix("http://")
        async with take_away(database_url):
            assert set(await click(http, tokens)) == {204}
            if is_killed:
                await site.server.kill()
            else:
                assert await site.server.stop() == 0
        assert count_rows(tmp_path / "data") == len(tokens)
        await site.server.start()
        if is_killed:
            # In the middle of the replay, or soon after it.
            await site.server.kill()
            await site.server.start()
        await wait_until_drained(tmp_path / "data")
        async with site.connect() as client:
            assert (await wait_until_sent(client, name)).counts.signals["clicked"] == before + len(tokens)


async def test_row_that_cannot_be_stored_is_set_aside_and_holds_up_no_other(open_world: OpenWorld, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    async with open_world() as world:
        name, tokens = await launch_push(world)
        before = await count_clicks(world, name)
        async with Spool(tmp_path, 10**6) as spool:
            await spool.add("push", Webhook(receipts=(Receipt(signal="clicked", token=tokens[0]),)), now)
            await spool.add("pigeon", Webhook(receipts=(Receipt(signal="delivered", message_id="1"),)), now)
            await spool.add("push", Webhook(receipts=(Receipt(signal="clicked", token="none of ours"),)), now)
            await spool.add("push", Webhook(receipts=(Receipt(signal="clicked", token=tokens[1]),)), now)
            async with Intake(world.core.ledger, world.core.registry.types, spool) as one:
                replaying = asyncio.create_task(one.replay(spool))
                async with asyncio.timeout(60):
                    # It counts after it has written.
                    while (spool.waiting, spool.aside) != (0, 2):  # noqa: ASYNC110
                        await asyncio.sleep(0.02)
                replaying.cancel()
                await asyncio.gather(replaying, return_exceptions=True)
        assert count_rows(tmp_path, "error LIKE 'TokenInvalid: %'") == 1
        assert count_rows(tmp_path, "error LIKE 'KeyError: %'") == 1
        assert await count_clicks(world, name) == before + 2
