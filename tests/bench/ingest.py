"""`make bench-ingest`: durable events per second over one gRPC stream, against a binary COPY of the same rows.

Client, server and database are processes of this machine. The messages are made before the clock starts, and read as rows by
the server like anybody's. Every acknowledged event is looked for in the log and in the receipts at the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.ingest.tokens import TokenCodec
from aftertouch.processes import Child, run_command
from aftertouch.rolls.sql import write_roll
from aftertouch.store import apps as apps_store
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.engine import create_engine, driver, transaction
from aftertouch.store.logs import EventBatch, encode_events
from aftertouch.v1 import events_pb2

SECRET_KEY = "a secret key of the benchmark, long enough"
PEOPLE = 10_000_000
IDENTIFIED = 1_000_000
BATCH = 1_000
EVENTS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000


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


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="aftertouch-bench-") as directory:
        data = Path(directory) / "data"
        environment = {
            "AFTERTOUCH_DATA_DIR": str(data),
            "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
            "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
            "AFTERTOUCH_HTTP_ADDRESS": "127.0.0.1:0",
            "AFTERTOUCH_LOG_LEVEL": "warning",
        }
        ready = r"gRPC on (\S+), webhooks on (\S+)"
        async with Child("serve", environment=environment, ready=ready, log=Path(directory) / "log") as server:
            address, _ = server.found
            await run_command("apps", "create", "bench", environment=environment)
            key = (await run_command("keys", "create", "bench", environment=environment)).strip()
            engine = create_engine((data / "url").read_text())
            async with transaction(engine) as conn:
                app = await apps_store.find_app(conn, "bench")
            assert app is not None
            large = await make_campaign(engine, app.app_id, "large", PEOPLE)
            named = await make_campaign(engine, app.app_id, "named", IDENTIFIED)
            await make_contacts(engine, app.app_id, IDENTIFIED)
            copy = max([await measure_copy(engine, large, EVENTS) for _ in range(3)])
            codec = TokenCodec(SECRET_KEY.encode())
            signals = ("sent", "delivered")
            stamp = int(time.time())

            people = np.random.default_rng(2).integers(0, PEOPLE, EVENTS)
            tokens = codec.make(large, people)

            def by_token(index: int, _: int) -> events_pb2.Event:
                event = events_pb2.Event(token=tokens[index], signal=signals[index % 2])
                event.time.seconds = stamp
                return event

            seconds = await pour(address, key, make_messages("apps/bench", "tokens", EVENTS, by_token, people))
            await verify(engine, large, people, 2)
            token = {"events_per_s": round(EVENTS / seconds), "ratio": round(EVENTS / seconds / copy, 3)}

            people = np.random.default_rng(3).integers(0, IDENTIFIED, EVENTS)

            def by_external_id(index: int, person: int) -> events_pb2.Event:
                event = events_pb2.Event(signal=signals[index % 2])
                event.recipient.campaign = "apps/bench/campaigns/named"
                event.recipient.external_id = f"person-{person}"
                event.time.seconds = stamp
                return event

            seconds = await pour(address, key, make_messages("apps/bench", "names", EVENTS, by_external_id, people))
            await verify(engine, named, people, 2)
            external = {"events_per_s": round(EVENTS / seconds), "ratio": round(EVENTS / seconds / copy, 3)}
            await engine.dispose()
            print(json.dumps({"bench": "ingest", "copy_rows_per_s": round(copy), "token": token, "external_id": external}))


if __name__ == "__main__":
    asyncio.run(main())
