"""Producers that stream random events, remember every one, and resume where the server says; and what it then has to hold.

They speak through raw gRPC: what the client library would mend must be seen here.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
from numpy.typing import NDArray
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.ingest.tokens import TokenCodec
from aftertouch.rolls.sql import write_roll
from aftertouch.store import apps as apps_store
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.engine import driver, transaction
from aftertouch.v1 import events_pb2

METHOD = "/aftertouch.v1.Events/StreamEvents"
SIGNALS = ("sent", "delivered")
MOST_PRODUCERS = 16
"""The microsecond of an event modulo this says whose it is."""
BROKEN_WHILE_SENDING = "Internal error from Core"
"""What the client's own half of gRPC says, as INTERNAL, when the connection breaks under a message; no server says it."""
MOST_AHEAD = 20
"""Batches that a producer sends before the first of them is acknowledged."""
_HEADER = 19
_EVENT = np.dtype([("columns", ">i2"), *((f"{n}{i}", ">i4" if n == "l" else ">i8") for i in range(3) for n in "lv")])
"""A row of three numbers in PostgreSQL's binary COPY."""

Events = NDArray[np.int64]
"""Rows of person, place of the signal in SIGNALS, microsecond."""


@dataclass(frozen=True)
class Target:
    """A launched SMS campaign."""

    app: str
    key: str = field(repr=False)
    campaign_id: int
    tokens: Sequence[str] = field(repr=False)
    launch_time: int
    """In microseconds."""


async def launch_target(engine: AsyncEngine, app: str, name: str, people: int, secret_key: str) -> Target:
    """A campaign that went out to so many people an hour ago, of an app that is made when it is new."""
    launched = datetime.now(UTC) - timedelta(hours=1)
    async with transaction(engine) as conn:
        found = await apps_store.find_app(conn, app) or await apps_store.create_app(conn, app, app)
        _, key = await apps_store.create_api_key(conn, found.app_id, "test", ["admin"])
        campaign = await create_campaign(conn, found.app_id, name, {"display_name": name, "channel": "sms"})
        await write_roll(conn, campaign.campaign_id, np.arange(people))
        await update_campaign(
            conn, campaign.campaign_id, state="SENT", recipients=people, launch_time=launched, finish_time=launched
        )
    tokens = TokenCodec(secret_key.encode()).make(campaign.campaign_id, np.arange(people))
    return Target(app, key, campaign.campaign_id, tokens, int(launched.timestamp() * 1_000_000))


class Lost(Exception):
    """The server forgot what it had acknowledged, or knows what nobody sent."""


class Producer:
    """One producer of events about random people of a campaign.

    Args:
        number: of this producer among those of the campaign.
        pause: seconds between two batches.
    """

    def __init__(self, target: Target, number: int, *, batch: int = 100, pause: float = 0.02) -> None:
        self.name = f"producer-{number}"
        self._target = target
        self._number = number
        self._batch = batch
        self._pause = pause
        self._chance = np.random.default_rng(number)
        self._clock = target.launch_time // MOST_PRODUCERS * MOST_PRODUCERS + MOST_PRODUCERS + number
        self.batches: list[Events] = []
        self.acknowledged = 0
        self.sent = 0
        self.replays = 0
        """Batches that were sent again."""

    @property
    def events(self) -> Events:
        """All that was acknowledged."""
        return np.concatenate([np.empty((0, 3), np.int64), *self.batches[: self.acknowledged]])

    async def run(self, address: str, done: asyncio.Event) -> None:
        """Stream until ``done``, then until everything is acknowledged, whatever happens to the connection."""
        while not done.is_set() or self.acknowledged < len(self.batches):
            # A pool of its own: a connection that could not be made must not hold up the next try.
            async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
                try:
                    await self._stream(channel, done)
                except grpc.aio.AioRpcError as error:
                    if error.code() != grpc.StatusCode.UNAVAILABLE and error.details() != BROKEN_WHILE_SENDING:
                        raise
            await asyncio.sleep(random.uniform(0.01, 0.2))

    async def _stream(self, channel: grpc.aio.Channel, done: asyncio.Event) -> None:
        opened: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sending = self._send(opened, done)
        try:
            async for data in channel.stream_stream(METHOD)(sending, metadata=[("authorization", f"Bearer {self._target.key}")]):
                response = events_pb2.StreamEventsResponse.FromString(data)
                position = response.committed_position
                if response.rejections or not self.acknowledged <= position <= self.sent:
                    raise Lost(f"{self.name}: {self.acknowledged} acknowledged, {self.sent} sent, and the answer is {response}")
                self.acknowledged = position
                if not opened.done():
                    opened.set_result(position)
        finally:
            opened.cancel()
            self._over = True

    async def _send(self, opened: asyncio.Future[int], done: asyncio.Event) -> AsyncIterator[bytes]:
        self._over = False
        opening = events_pb2.OpenStream(parent=f"apps/{self._target.app}", producer=self.name)
        yield events_pb2.StreamEventsRequest(open=opening).SerializeToString()
        position = await opened
        while position < len(self.batches) or not done.is_set():
            position += 1
            if position > len(self.batches):
                self.batches.append(self._make_events())
                await asyncio.sleep(self._pause)
            self.replays += position <= self.sent
            self.sent = max(self.sent, position)
            yield self._encode(position)
            while position - self.acknowledged > MOST_AHEAD and not self._over:  # noqa: ASYNC110 - two kinds of news end it
                await asyncio.sleep(0.005)

    def _make_events(self) -> Events:
        steps = self._chance.integers(1, 50, self._batch) * MOST_PRODUCERS
        times = self._clock + np.cumsum(steps)
        self._clock = int(times[-1])
        people = self._chance.integers(0, len(self._target.tokens), self._batch)
        return np.column_stack([people, self._chance.integers(0, len(SIGNALS), self._batch), times])

    def _encode(self, position: int) -> bytes:
        batch = events_pb2.EventsBatch(position=position)
        for person, signal, time in self.batches[position - 1].tolist():
            event = batch.events.add(token=self._target.tokens[person], signal=SIGNALS[signal])
            event.time.FromMicroseconds(time)
        return events_pb2.StreamEventsRequest(batch=batch).SerializeToString()

    async def find_differences(self, engine: AsyncEngine) -> list[str]:
        """In what the log differs from exactly once each event that was acknowledged."""
        logged = await read_log(engine, self._target, self._number)
        expected = sort_events(self.events)
        if np.array_equal(logged, expected):
            return []
        known, counts = np.unique(logged, axis=0, return_counts=True)
        missing = len({*map(tuple, expected.tolist())} - {*map(tuple, known.tolist())})
        return [
            f"{self.name}: {len(expected)} events acknowledged, {len(logged)} in the log: "
            f"{missing} are missing, {int((counts > 1).sum())} are there more than once"
        ]


def sort_events(events: Events) -> Events:
    """By person, signal and time."""
    return events[np.lexsort(events.T[::-1])]


async def read_log(engine: AsyncEngine, target: Target, number: int) -> Events:
    """The events of a producer in the log, sorted."""
    statement = (
        "COPY (SELECT ((slot & 1048575) << 13) + position,"
        f" array_position(ARRAY{list(SIGNALS)!r}, (SELECT signal FROM kinds WHERE kinds.kind = e.kind))::bigint - 1,"
        " (extract(epoch FROM time) * 1000000)::bigint FROM events AS e"
        f" WHERE slot >> 20 = {target.campaign_id} AND (extract(epoch FROM time) * 1000000)::bigint % {MOST_PRODUCERS} = {number}"
        ") TO STDOUT (FORMAT BINARY)"
    )
    async with transaction(engine) as conn, (await driver(conn)).cursor().copy(statement) as copy:
        data = b"".join([bytes(part) async for part in copy])
    rows = np.frombuffer(data[_HEADER : -struct.calcsize(">h")], _EVENT)
    return sort_events(np.column_stack([rows[f"v{index}"].astype(np.int64) for index in range(3)]))


async def read_receipts(engine: AsyncEngine, target: Target) -> dict[str, set[int]]:
    """The people of each signal."""
    found: dict[str, set[int]] = {}
    async with transaction(engine) as conn:
        rows = await conn.execute(
            text(
                "SELECT signal, slot & 1048575 AS chunk, bits::text AS bits FROM receipts JOIN kinds USING (kind)"
                " WHERE slot >> 20 = :campaign"
            ),
            {"campaign": target.campaign_id},
        )
        for row in rows:
            people = np.flatnonzero(np.frombuffer(row.bits.encode(), "u1") == ord("1")) + (row.chunk << 13)
            found.setdefault(row.signal, set()).update(people.tolist())
    return found


async def read_minutes(engine: AsyncEngine, target: Target) -> Counter[tuple[str, int]]:
    """How many events were counted, by signal and minute since 1970."""
    statement = (
        "SELECT signal, (extract(epoch FROM start_time) / 60)::bigint AS minute, events FROM activity JOIN kinds USING (kind)"
        " WHERE slot = :slot AND minutes = 1"
    )
    async with transaction(engine) as conn:
        rows = await conn.execute(text(statement), {"slot": target.campaign_id << 20})
        return Counter({(row.signal, row.minute): row.events for row in rows})


def count_minutes(producers: Sequence[Producer]) -> Counter[tuple[str, int]]:
    """What the counts have to be."""
    events = np.concatenate([producer.events for producer in producers])
    return Counter((SIGNALS[place], minute) for place, minute in zip(events[:, 1], events[:, 2] // 60_000_000, strict=True))


def unite_people(producers: Sequence[Producer]) -> dict[str, set[int]]:
    """What the receipts have to be: the people of each signal, over all producers."""
    events = np.concatenate([producer.events for producer in producers])
    return {signal: set(events[events[:, 1] == place, 0].tolist()) for place, signal in enumerate(SIGNALS)}
