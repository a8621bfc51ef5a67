"""Watching events over gRPC: all of them, each once, whenever their transactions commit."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.client import Client, read_reason
from aftertouch.ingest import watch
from aftertouch.ingest.tokens import TokenCodec
from aftertouch.processes import Child, run_command
from aftertouch.retargeting import report
from aftertouch.store.clusters import read_horizon
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind, load_kinds
from aftertouch.store.partitions import drop_partitions
from aftertouch.v1 import events_pb2
from tests.api.test_streams import delivered, launch_on, launch_quietly, make_tokens
from tests.fix_world import SECRET_KEY, World
from tests.ports import find_free_port
from tests.refusals import refuse


@pytest.fixture
async def campaign(world: World) -> str:
    """A campaign to everybody."""
    await world.import_people()
    return await launch_quietly(world, "sale", 60)


class Watcher:
    """The answers of one watch, one after the other."""

    def __init__(self, answers: AsyncIterator[events_pb2.WatchEventsResponse]) -> None:
        self._answers = answers
        self.resume_token = ""

    async def read(self) -> list[events_pb2.WatchedEvent]:
        """The next answer's events."""
        async with asyncio.timeout(60):
            answer = await anext(self._answers)
        self.resume_token = answer.resume_token
        return list(answer.events)

    async def read_people(self, count: int) -> list[str]:
        """The people of the next events, by external_id."""
        found: list[events_pb2.WatchedEvent] = []
        while len(found) < count:
            found += await self.read()
        assert len(found) == count
        return [event.contact.rpartition("/")[2] for event in found]


@asynccontextmanager
async def watching(client: Client, **fields: Any) -> AsyncIterator[Watcher]:
    """A watch; without a token it has begun."""
    async with aclosing(client.watch_events(**fields)) as answers:
        watcher = Watcher(answers)
        if not fields.get("resume_token"):
            assert await watcher.read() == []
        yield watcher


async def ingest(world: World, tokens: list[str], signal: str = "delivered", client: Client | None = None) -> None:
    client = client or world.client
    request = events_pb2.IngestEventsRequest(parent=client.parent, events=delivered(tokens, signal))
    answer = await client.events.IngestEvents(request)
    assert not answer.rejections


async def read_ids(world: World) -> list[str]:
    """external_ids by contact number, which is the position in a campaign to everybody."""
    async with transaction(world.core.engine) as conn:
        return [row.external_id for row in await conn.execute(text("SELECT external_id FROM contact_ids ORDER BY number"))]


async def pass_by(world: World) -> None:
    """Wait until nothing runs that began before what is in the log, as an autovacuum may: a watch would begin before it."""
    async with asyncio.timeout(120):
        while True:
            async with transaction(world.core.engine) as conn:
                last = (await conn.execute(text("SELECT max(commit_id) FROM events"))).scalar_one()
                if last < await read_horizon(conn):
                    return
            await asyncio.sleep(0.01)


async def test_watch_names_people_signal_reason_and_times(world: World, campaign: str) -> None:
    tokens = await make_tokens(world, campaign, 3)
    ids = await read_ids(world)
    time = datetime.now(UTC).replace(microsecond=120_000)
    failed = events_pb2.Event(token=tokens[2], signal="failed", reason_code="30005")
    failed.time.FromDatetime(time)
    async with watching(world.client) as watcher:
        await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=[failed]))
        while not (found := await watcher.read()):
            pass
    (event,) = found
    assert (event.campaign, event.contact) == (campaign, f"apps/acme/contacts/{ids[2]}")
    assert (event.signal, event.reason) == ("failed", "recipient_gone/30005")
    assert event.time.ToDatetime(UTC) == time
    assert abs(event.arrive_time.ToDatetime(UTC) - time) < timedelta(minutes=1)


async def test_watch_without_a_token_begins_now(world: World, campaign: str) -> None:
    tokens = await make_tokens(world, campaign, 4)
    ids = await read_ids(world)
    await ingest(world, tokens[:2])
    await pass_by(world)
    async with watching(world.client) as watcher:
        await ingest(world, tokens[2:])
        assert await watcher.read_people(2) == ids[2:4]


async def test_watch_can_be_narrowed_to_a_campaign_and_signals(world: World, campaign: str) -> None:
    other = await launch_quietly(world, "other", 60)
    tokens, others = await make_tokens(world, campaign, 4), await make_tokens(world, other, 4)
    ids = await read_ids(world)
    async with watching(world.client, campaign=campaign, signals=["failed", "sent"]) as watcher:
        await ingest(world, others, "sent")
        await ingest(world, tokens[:2], "delivered")
        await ingest(world, tokens[2:3], "sent")
        await ingest(world, tokens[3:4], "failed")
        assert await watcher.read_people(2) == ids[2:4]


async def test_watch_goes_on_after_its_token_with_each_event_once(world: World, campaign: str) -> None:
    tokens = await make_tokens(world, campaign, 60)
    ids = await read_ids(world)
    async with watching(world.client) as watcher:
        token = watcher.resume_token
    seen: list[str] = []
    for start in range(0, 60, 10):
        await ingest(world, tokens[start : start + 10])
        async with watching(world.client, resume_token=token) as watcher:
            seen += await watcher.read_people(10)
            token = watcher.resume_token
    assert seen == ids[:60]


async def test_token_in_the_middle_of_a_transaction_goes_on_there(
    world: World, campaign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PAGE", 7)
    tokens = await make_tokens(world, campaign, 60)
    ids = await read_ids(world)
    async with watching(world.client) as watcher:
        token = watcher.resume_token
    await ingest(world, tokens)
    seen: list[str] = []
    while len(seen) < 60:
        async with watching(world.client, resume_token=token) as watcher:
            seen += [event.contact.rpartition("/")[2] for event in await watcher.read()]
            token = watcher.resume_token
    assert seen == ids[:60]


@pytest.mark.parametrize("span", [1, 3, 1 << 20])
async def test_watch_that_is_far_behind_reads_on_in_parts(
    world: World, campaign: str, monkeypatch: pytest.MonkeyPatch, span: int
) -> None:
    """Every answer looked through all that had happened since."""
    monkeypatch.setattr(watch, "LARGEST_SPAN", span)
    monkeypatch.setattr(watch, "READ", 8)
    monkeypatch.setattr(watch, "PAGE", 5)
    tokens = await make_tokens(world, campaign, 60)
    ids = await read_ids(world)
    async with watching(world.client) as watcher:
        token = watcher.resume_token
    for start, end in ((0, 1), (1, 25), (25, 26), (26, 34), (34, 60)):
        await ingest(world, tokens[start:end])
        async with transaction(world.core.engine) as conn:
            # Transactions of which there is nothing to tell.
            for _ in range(5):
                async with conn.begin_nested():
                    await conn.execute(text("SELECT pg_current_xact_id()"))
    async with watching(world.client, resume_token=token) as watcher:
        assert await watcher.read_people(60) == ids[:60]
        token = watcher.resume_token
    await ingest(world, tokens[:1])
    async with watching(world.client, resume_token=token) as watcher:
        assert await watcher.read_people(1) == ids[:1]


async def test_token_of_another_database_is_refused(world: World) -> None:
    """It waited until this one had as many transactions."""
    async with watching(world.client) as watcher:
        _, _, digest = watch._TOKEN.unpack(urlsafe_b64decode(watcher.resume_token))
    token = urlsafe_b64encode(watch._TOKEN.pack(1 << 62, 0, digest)).decode()
    refusal = await refuse(anext(world.client.watch_events(resume_token=token)))
    assert "is not of this database" in refusal.fields["resume_token"]


@pytest.mark.parametrize("is_narrowed_later", [True, False])
async def test_token_of_another_watch_is_refused(world: World, campaign: str, is_narrowed_later: bool) -> None:
    """Its place was taken for one among other events: some were left out, or came twice."""
    narrowed: dict[str, Any] = {"campaign": campaign, "signals": ["read", "delivered"]}
    first, then = ({}, narrowed) if is_narrowed_later else (narrowed, {})
    async with watching(world.client, **first) as watcher:
        token = watcher.resume_token
    refusal = await refuse(anext(world.client.watch_events(**then, resume_token=token)))
    assert "belongs to another watch" in refusal.fields["resume_token"]


async def test_token_goes_with_the_same_signals_in_any_order(world: World, campaign: str) -> None:
    async with watching(world.client, signals=["read", "delivered"]) as watcher:
        token = watcher.resume_token
    (first, *_) = await read_ids(world)
    await ingest(world, await make_tokens(world, campaign, 1))
    async with watching(world.client, signals=["delivered", "read", "read"], resume_token=token) as watcher:
        assert await watcher.read_people(1) == [first]


async def test_transaction_that_commits_late_is_not_skipped(world: World, campaign: str) -> None:
    """An older transaction is still open while a newer one is durable: the token must not pass it."""
    tokens = await make_tokens(world, campaign, 3)
    ids = await read_ids(world)
    await ingest(world, tokens[:1])
    insert = text(
        "INSERT INTO events SELECT now(), pg_current_xact_id()::text::bigint + commit_offset, slot, 2, kind, now()"
        " FROM events, clusters WHERE position = 0"
    )
    await pass_by(world)
    async with watching(world.client) as watcher:
        async with transaction(world.core.engine) as late:
            await late.execute(insert)
            await ingest(world, tokens[1:2])
            # Long enough for the watcher to have looked some times.
            await asyncio.sleep(4 * watch.POLL_SECONDS)
        assert await watcher.read_people(2) == [ids[2], ids[1]]


async def test_event_of_a_kind_that_is_new_just_now_is_not_skipped(
    world: World, campaign: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stored between a watch's look at the kinds and its look at the horizon, and stayed out for ever."""
    tokens = await make_tokens(world, campaign, 1)
    ids = await read_ids(world)
    poured = asyncio.Event()

    async def load_then_pour(conn: AsyncConnection) -> dict[int, Kind]:
        known = await load_kinds(conn)
        if not poured.is_set():
            poured.set()
            await ingest(world, tokens)
        return known

    async with watching(world.client) as watcher:
        monkeypatch.setattr(watch, "load_kinds", load_then_pour)
        await poured.wait()
        assert await watcher.read_people(1) == ids[:1]


async def test_counts_are_read_while_a_kind_is_made(world: World, campaign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller who looked at a campaign just when its first read came in was told of a defect of the server."""
    tokens = await make_tokens(world, campaign, 1)
    pour = [partial(ingest, world, tokens)]

    async def load_then_pour(conn: AsyncConnection) -> dict[int, Kind]:
        known = await load_kinds(conn)
        while pour:
            await pour.pop()()
        return known

    monkeypatch.setattr(report, "load_kinds", load_then_pour)
    await world.get_campaign(campaign)
    await world.read_recipients(campaign)
    assert not pour


async def test_events_of_another_app_never_appear(world: World, campaign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything else that says that there were some: no answer comes before its time."""
    monkeypatch.setattr(watch, "CHECKPOINT_SECONDS", 1_000.0)
    secret = await world.create_key("other", "admin")
    tokens = await make_tokens(world, campaign, 2)
    async with world.connect("other", secret) as other, watching(other) as watcher:
        await ingest(world, tokens)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5 * watch.POLL_SECONDS):
                await anext(watcher._answers)


async def test_campaign_of_another_app_cannot_be_watched(world: World, campaign: str) -> None:
    secret = await world.create_key("other", "read")
    async with world.connect("other", secret) as other:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(other.watch_events(campaign=campaign))
        assert read_reason(caught.value)[0] == "RESOURCE_NOT_FOUND"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anext(other.events.WatchEvents(events_pb2.WatchEventsRequest(parent="apps/acme")).__aiter__())
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_silent_watch_is_told_how_far_it_is(world: World, campaign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHECKPOINT_SECONDS", 0.3)
    tokens = await make_tokens(world, campaign, 2)
    ids = await read_ids(world)
    async with watching(world.client, signals=["failed"]) as watcher:
        first = watcher.resume_token
        await ingest(world, tokens[:1])
        while watcher.resume_token == first:
            assert await watcher.read() == []
        token = watcher.resume_token
    await ingest(world, tokens[1:], "failed")
    async with watching(world.client, signals=["failed"], resume_token=token) as watcher:
        assert await watcher.read_people(1) == ids[1:2]


async def test_token_whose_events_are_dropped_is_too_old(world: World, campaign: str) -> None:
    tokens = await make_tokens(world, campaign, 2)
    async with watching(world.client) as watcher:
        await ingest(world, tokens)
        await watcher.read_people(2)
        token = watcher.resume_token
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)
    async with transaction(world.core.engine) as conn:
        await drop_partitions(conn, tomorrow)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(world.client.watch_events(resume_token=token))
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert read_reason(caught.value) == ("RESUME_TOKEN_TOO_OLD", {"kept_since": f"{tomorrow}T00:00:00Z"})


@pytest.mark.parametrize("token", ["x", "é", "[1, 2]", "bm90IGEgdG9rZW4=", "A" * 10_000, "WzFlOTk5LCAwXQ=="])
async def test_token_that_is_none_is_refused(world: World, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(world.client.watch_events(resume_token=token))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert read_reason(caught.value)[0] == "FIELDS_INVALID"


async def test_streams_and_watches_of_the_client_outlive_the_server(
    engine: AsyncEngine, database_url: str, tmp_path: Path
) -> None:
    """The server is killed twice, and once stopped in an orderly way, while a stream pours and a watch looks on."""
    grpc_address, people = f"127.0.0.1:{find_free_port()}", 1_000
    environment = {
        "AFTERTOUCH_DATABASE_URL": database_url,
        "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
        "AFTERTOUCH_DATA_DIR": str(tmp_path),
        "AFTERTOUCH_GRPC_ADDRESS": grpc_address,
        "AFTERTOUCH_HTTP_ADDRESS": f"127.0.0.1:{find_free_port()}",
    }
    await run_command("apps", "create", "acme", environment=environment)
    secret = (await run_command("keys", "create", "acme", environment=environment)).strip()
    async with transaction(engine) as conn:
        await conn.execute(
            text("INSERT INTO contact_ids SELECT app_id, 'person-' || n, n FROM apps, generate_series(0, 999) AS n")
        )
    await launch_on(engine, people)
    async with transaction(engine) as conn:
        campaign_id = (await conn.execute(text("SELECT campaign_id FROM campaigns"))).scalar_one()
    tokens = TokenCodec(SECRET_KEY.encode()).make(campaign_id, np.arange(people))
    seen: list[int] = []

    async def look_on(client: Client) -> None:
        async for answer in client.watch_events():
            seen.extend(event.time.seconds for event in answer.events)
            begun.set()

    begun = asyncio.Event()
    ready = r"gRPC on (\S+)"
    async with (
        Child("serve", environment=environment, ready=ready, log=tmp_path / "log") as server,
        Client(grpc_address, api_key=secret, app="acme") as client,
    ):
        looking = asyncio.create_task(look_on(client))
        await begun.wait()
        now = int(datetime.now(UTC).timestamp())
        async with asyncio.timeout(400), client.stream_events("importer") as stream:
            for number in range(300):
                events = delivered(tokens[number : number + 5])
                for event in events:
                    event.time.seconds = now - number
                await stream.send(events)
                if number in (60, 180):
                    await server.kill()
                    await server.start()
                if number == 240:
                    await server.stop()
                    await server.start()
        async with asyncio.timeout(120):
            while len(seen) < 1_500:  # noqa: ASYNC110 - there is nothing to wait on but the watcher's list
                await asyncio.sleep(0.1)
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)
    async with transaction(engine) as conn:
        assert (await conn.execute(text("SELECT count(*) FROM events"))).scalar_one() == 1_500
    assert stream.committed == 300
    assert sorted(seen) == sorted(now - number for number in range(300) for _ in range(5))
