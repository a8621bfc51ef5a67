"""`make bench-ingest`: durable events per second over one gRPC stream, against a binary COPY of the same rows; webhooks; and
events scattered over many campaigns, against a table with a row for each delivery.

Client, server and database are processes of this machine. The messages are made before the clock starts, and read as rows by
the server like anybody's. Every acknowledged event is looked for in the log and in the receipts at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from sqlalchemy import insert, text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.ingest.tokens import TokenCodec
from aftertouch.processes import Child, run_command
from aftertouch.rolls.sql import write_roll
from aftertouch.store import apps as apps_store
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.engine import driver, open_engine, transaction
from aftertouch.store.logs import EventBatch, encode_events
from aftertouch.store.migrate import migrate
from aftertouch.store.tables import contact_counters
from aftertouch.v1 import events_pb2
from tests.bench.callbacks import run_apart, sign_callbacks
from tests.bench.scattered import measure_chunks, measure_scattered, measure_upserts

SECRET_KEY = "a secret key of the benchmark, long enough"
PEOPLE = 10_000_000
IDENTIFIED = 1_000_000
BATCH = 1_000
SMALL = 10_000
CALLBACKS = 20_000
AUTH_TOKEN = "a token of the benchmark"
ACCOUNT_SID = f"AC{0:032x}"
SIGNALS = ("sent", "delivered")


async def make_campaign(engine: AsyncEngine, app_id: int, name: str, people: int) -> int:
    async with transaction(engine) as conn:
        campaign = await create_campaign(conn, app_id, name, {"display_name": name, "channel": "sms"})
        await write_roll(conn, campaign.campaign_id, np.arange(people))
        await update_campaign(
            conn,
            campaign.campaign_id,
            state="SENT",
            recipients=people,
            launch_time=datetime.now(UTC),
            finish_time=datetime.now(UTC),
        )
    return campaign.campaign_id


async def make_contacts(engine: AsyncEngine, app_id: int, people: int) -> None:
    async with transaction(engine) as conn:
        await conn.execute(
            text("INSERT INTO contact_ids SELECT :app_id, 'person-' || n, n FROM generate_series(0, :people - 1) AS n"),
            {"app_id": app_id, "people": people},
        )
        await conn.execute(insert(contact_counters).values(app_id=app_id, next_number=people))
        await conn.execute(text("ANALYZE contact_ids"))


async def measure_copy(engine: AsyncEngine, campaign_id: int, count: int) -> float:
    """Rows per second of a binary COPY into the log, of the rows that the stream will bring; then they are gone again."""
    positions = np.random.default_rng(1).integers(0, PEOPLE, count)
    data = encode_events(
        EventBatch(
            slots=campaign_id << 20 | positions >> 13,
            positions=(positions & 8191).astype(np.int32),
            members=np.full(count, 8192, np.int32),
            kinds=np.ones(count, np.int32),
            times=np.full(count, int(time.time() * 1e6)),
        ),
        1,
    )
    async with engine.begin() as conn:
        cursor = (await driver(conn)).cursor()
        began = time.perf_counter()
        statement = "COPY events (arrive_time, commit_id, slot, position, kind, time) FROM STDIN (FORMAT BINARY)"
        async with cursor.copy(statement) as copy:
            await copy.write(data)
        await conn.commit()
        seconds = time.perf_counter() - began
    async with engine.begin() as conn:
        await conn.execute(text("TRUNCATE events"))
    return count / seconds


def make_messages(
    parent: str, producer: str, count: int, make_event: Callable[[int, int], events_pb2.Event], people: np.ndarray[Any, Any]
) -> list[bytes]:
    """The serialised messages of a whole stream, from the one that opens it."""
    messages = [events_pb2.StreamEventsRequest(open=events_pb2.OpenStream(parent=parent, producer=producer)).SerializeToString()]
    for number, start in enumerate(range(0, count, BATCH), 1):
        batch = events_pb2.EventsBatch(position=number)
        batch.events.extend(
            make_event(index, person) for index, person in enumerate(people[start : start + BATCH].tolist(), start)
        )
        messages.append(events_pb2.StreamEventsRequest(batch=batch).SerializeToString())
    return messages


async def pour(address: str, key: str, messages: list[bytes]) -> float:
    """Send a stream and return the seconds until its last batch is durable."""
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream("/aftertouch.v1.Events/StreamEvents")
        began = time.perf_counter()

        async def send() -> AsyncIterator[bytes]:
            for message in messages:
                yield message

        last = 0
        async for data in call(send(), metadata=(("authorization", f"Bearer {key}"),)):
            response = events_pb2.StreamEventsResponse.FromString(data)
            assert not response.rejections, response.rejections
            last = response.committed_position
            if last == len(messages) - 1:
                break
        assert last == len(messages) - 1
        return time.perf_counter() - began


async def verify(engine: AsyncEngine, campaign_id: int, people: np.ndarray[Any, Any], kinds: int) -> None:
    """Every event is in the log once, and the receipts hold exactly the people."""
    async with engine.connect() as conn:
        span = {"first": campaign_id << 20, "last": (campaign_id + 1) << 20}
        logged = (
            await conn.execute(text("SELECT count(*) FROM events WHERE slot >= :first AND slot < :last"), span)
        ).scalar_one()
        bits = (
            await conn.execute(text("SELECT sum(bit_count(bits)) FROM receipts WHERE slot >= :first AND slot < :last"), span)
        ).scalar_one()
    assert logged == len(people), (logged, len(people))
    expected = len(np.unique(people * kinds + np.arange(len(people)) % kinds))
    assert bits == expected, (bits, expected)


@dataclass
class Bench:
    """A running server, with an app to measure on."""

    engine: AsyncEngine
    app_id: int
    address: str
    url: str
    key: str
    directory: Path
    codec: TokenCodec

    async def pour_tokens(self, campaign_id: int, producer: str, count: int, people: int) -> float:
        """Events per second of a stream by token, to random people of a campaign."""
        chosen = np.random.default_rng(2).integers(0, people, count)
        tokens = self.codec.make(campaign_id, chosen)
        stamp = int(time.time())

        def make_event(index: int, _: int) -> events_pb2.Event:
            event = events_pb2.Event(token=tokens[index], signal=SIGNALS[index % 2])
            event.time.seconds = stamp
            return event

        seconds = await pour(self.address, self.key, make_messages("apps/bench", producer, count, make_event, chosen))
        await verify(self.engine, campaign_id, chosen, 2)
        return count / seconds

    async def pour_names(self, campaign_id: int, campaign: str, count: int, people: int) -> float:
        """The same by external_id."""
        chosen = np.random.default_rng(3).integers(0, people, count)
        stamp = int(time.time())

        def make_event(index: int, person: int) -> events_pb2.Event:
            event = events_pb2.Event(signal=SIGNALS[index % 2])
            event.recipient.campaign = f"apps/bench/campaigns/{campaign}"
            event.recipient.external_id = f"person-{person}"
            event.time.seconds = stamp
            return event

        seconds = await pour(self.address, self.key, make_messages("apps/bench", "names", count, make_event, chosen))
        await verify(self.engine, campaign_id, chosen, 2)
        return count / seconds

    async def call_back(self, campaign_id: int) -> float:
        """Webhooks per second: signed status callbacks, each answered when it is durable."""
        people = np.arange(CALLBACKS)
        tokens = self.codec.make(campaign_id, people)
        requests = sign_callbacks(f"{self.url}/v1/webhooks/sms", ACCOUNT_SID, AUTH_TOKEN, tokens)
        file = self.directory / "callbacks.json"
        await asyncio.to_thread(file.write_text, json.dumps(requests))
        seconds = await run_apart(file)
        await verify(self.engine, campaign_id, people, 2)
        return CALLBACKS / seconds


@asynccontextmanager
async def open_bench() -> AsyncIterator[Bench]:
    """Start a server on an embedded database, with an app."""
    with tempfile.TemporaryDirectory(prefix="aftertouch-bench-") as directory:
        data = Path(directory) / "data"
        environment = {
            "AFTERTOUCH_DATA_DIR": str(data),
            "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
            "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
            "AFTERTOUCH_HTTP_ADDRESS": "127.0.0.1:0",
            "AFTERTOUCH_LOG_LEVEL": "warning",
            "AFTERTOUCH_SMS_ACCOUNT_SID": ACCOUNT_SID,
            "AFTERTOUCH_SMS_AUTH_TOKEN": AUTH_TOKEN,
            "AFTERTOUCH_SMS_SENDER": "+15005550006",
        }
        ready = r"gRPC on (\S+), webhooks on (\S+)"
        async with Child("serve", environment=environment, ready=ready, log=Path(directory) / "log") as server:
            address, http = server.found
            await run_command("apps", "create", "bench", environment=environment)
            key = (await run_command("keys", "create", "bench", environment=environment)).strip()
            async with open_engine((data / "url").read_text()) as engine:
                async with transaction(engine) as conn:
                    app = await apps_store.find_app(conn, "bench")
                assert app is not None
                url = http if http.startswith("http") else f"http://{http}"
                yield Bench(engine, app.app_id, address, url, key, Path(directory), TokenCodec(SECRET_KEY.encode()))


@asynccontextmanager
async def open_scratch(bench: Bench) -> AsyncIterator[AsyncEngine]:
    """Another database of the same server, with the schema and nothing in it."""
    async with bench.engine.connect() as conn:
        await (await conn.execution_options(isolation_level="AUTOCOMMIT")).execute(text("CREATE DATABASE scratch"))
    url = bench.engine.url.set(drivername="postgresql", database="scratch").render_as_string(hide_password=False)
    await migrate(url)
    async with open_engine(url) as engine:
        yield engine


async def measure(events: int) -> dict[str, Any]:
    async with open_bench() as bench:
        engine, app_id = bench.engine, bench.app_id
        large = await make_campaign(engine, app_id, "large", PEOPLE)
        named = await make_campaign(engine, app_id, "named", IDENTIFIED)
        smalls = [await make_campaign(engine, app_id, f"small-{number}", SMALL) for number in range(2)]
        called = await make_campaign(engine, app_id, "called", CALLBACKS)
        await make_contacts(engine, app_id, IDENTIFIED)
        copy = max([await measure_copy(engine, large, events) for _ in range(3)])
        # The small campaign once before and once after the large one, so that warming up favours neither.
        small_rates = [await bench.pour_tokens(smalls[0], "small-0", events // 2, SMALL)]
        token = await bench.pour_tokens(large, "tokens", events, PEOPLE)
        small_rates.append(await bench.pour_tokens(smalls[1], "small-1", events // 2, SMALL))
        external = await bench.pour_names(named, "named", events, IDENTIFIED)
        webhooks = await bench.call_back(called)
        small_us = sum(1e6 / rate for rate in small_rates) / len(small_rates)
        async with open_scratch(bench) as scratch:
            scattered = await measure_scattered(scratch)
    return {
        "bench": "ingest",
        "copy_rows_per_s": round(copy),
        "token": {"events_per_s": round(token), "ratio": round(token / copy, 3)},
        "external_id": {"events_per_s": round(external), "ratio": round(external / copy, 3)},
        "webhook_per_s": round(webhooks),
        "growth": {
            "per_event_us_10k": round(small_us, 2),
            "per_event_us_10m": round(1e6 / token, 2),
            "ratio": round(1e6 / token / small_us, 2),
        },
        **scattered,
    }


async def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.ingest", description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="events in a stream")
    parser.add_argument("--chunks", action="store_true", help="only the cost of events by chunks and upserts")
    given = parser.parse_args()
    if given.chunks:
        async with open_bench() as bench, open_scratch(bench) as scratch:
            for row in await measure_chunks(scratch) + await measure_upserts(scratch):
                print(json.dumps(row))
        return
    print(json.dumps(await measure(given.events)))


if __name__ == "__main__":
    asyncio.run(main())
