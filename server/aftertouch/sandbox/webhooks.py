"""Delivery of receipts: late, out of order, some twice, and again and again while nobody takes them.

A receipt leaves this module only by being answered for or given up by its provider's rule; ``drain`` waits for that.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from random import Random
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import aiohttp
from yarl import URL

from .settings import SandboxSettings

_SENDERS = 64
# Receipts that fall due within a tick can share a request; it is far below the delays, so it reorders nothing.
_TICK = 0.02
_FIRST_BACKOFF = 0.2
_LONGEST_BACKOFF = 5.0
_LATE_FACTOR = 3.0

# Twilio's limit; Meta's is of the same order.
_TIMEOUT = aiohttp.ClientTimeout(total=15, sock_connect=10)

CONNECT_FAILED = "ct"
READ_FAILED = "rt"

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Request:
    """A POST, byte for byte as it was signed."""

    url: str
    body: bytes
    headers: dict[str, str]


class Stream(ABC, Generic[Item]):
    """One kind of receipt: how it is written, when it counts as taken and when it is given up."""

    name: ClassVar[str]
    batch_size: ClassVar[int] = 1

    def __init__(self, settings: SandboxSettings) -> None:
        self.settings = settings

    @abstractmethod
    def compose(self, items: Sequence[Item]) -> Request | None:
        """The request for these, called once when they fall due; None when nobody wants to be told."""

    @abstractmethod
    def acknowledge(self, items: Sequence[Item]) -> None:
        """Note that these were answered for."""

    async def open(self, session: aiohttp.ClientSession) -> bool:
        """Do what has to be done once before anything goes out; False when it has to be tried again."""
        return True

    def is_taken(self, status: int) -> bool:
        """Whether an answer with this status ends it."""
        return 200 <= status < 300

    def pick_backoff(self, attempts: int, elapsed: float, failure: str, item: Item) -> float | None:
        """Seconds until the next attempt; None to give up. ``failure`` is a status, or why there is none."""
        if elapsed > self.settings.patience:
            return None
        return min(_FIRST_BACKOFF * 2.0 ** (attempts - 1), _LONGEST_BACKOFF)


@dataclass(slots=True, eq=False)
class _Parcel:
    stream: Stream[Any]
    items: list[Any]
    request: Request | None = None
    attempts: int = 0
    started: float = 0.0


class Outbox:
    """Everything that is still to be told."""

    def __init__(self, settings: SandboxSettings) -> None:
        self._settings = settings
        self._random = Random(settings.seed)
        self._numbers = count()
        self._heap: list[tuple[float, int, _Parcel]] = []
        self._due: asyncio.Queue[_Parcel] = asyncio.Queue()
        self._waiting = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.pending = 0
        self.counts: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=_TIMEOUT, connector=aiohttp.TCPConnector(limit=_SENDERS), cookie_jar=aiohttp.DummyCookieJar()
        )
        self._loop = asyncio.get_running_loop()
        self._start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stop()
        await self._session.close()

    def _start(self) -> None:
        self._tasks = [self._loop.create_task(self._release())]
        self._tasks += [self._loop.create_task(self._send()) for _ in range(_SENDERS)]

    async def _stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        for result in await asyncio.gather(*self._tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    async def clear(self) -> None:
        """Forget what is pending, and the counts."""
        await self._stop()
        self._heap.clear()
        self._due = asyncio.Queue()
        self.counts.clear()
        self.pending = 0
        self._idle.set()
        self._start()

    def schedule(self, stream: Stream[Item], item: Item, earliest: float, latest: float) -> None:
        """Let ``item`` fall due between these many seconds from now (before scaling), and perhaps later, and perhaps twice."""
        self._schedule_once(stream, item, earliest, latest)
        if self._random.random() < self._settings.duplicate_share:
            self.counts["duplicates"] += 1
            self._schedule_once(stream, item, earliest, latest)

    def _schedule_once(self, stream: Stream[Item], item: Item, earliest: float, latest: float) -> None:
        if self._random.random() < self._settings.late_share:
            latest *= _LATE_FACTOR
        delay = self._random.uniform(earliest, latest) * self._settings.time_scale
        self.pending += 1
        self._idle.clear()
        self._push(_Parcel(stream, [item]), delay)

    def _push(self, parcel: _Parcel, delay: float) -> None:
        heappush(self._heap, (self._loop.time() + delay, next(self._numbers), parcel))
        self._waiting.set()

    async def drain(self) -> None:
        """Return once nothing is pending."""
        await self._idle.wait()

    async def _release(self) -> None:
        while True:
            await self._waiting.wait()
            fresh: dict[Stream[Any], _Parcel] = {}
            now = self._loop.time()
            while self._heap and self._heap[0][0] <= now:
                parcel = heappop(self._heap)[2]
                started = fresh.get(parcel.stream)
                if parcel.attempts:
                    self._due.put_nowait(parcel)
                elif started and len(started.items) < parcel.stream.batch_size:
                    started.items += parcel.items
                else:
                    fresh[parcel.stream] = parcel
                    self._due.put_nowait(parcel)
            if not self._heap:
                self._waiting.clear()
            await asyncio.sleep(_TICK)

    async def _send(self) -> None:
        while True:
            parcel = await self._due.get()
            if not parcel.attempts:
                parcel.request = parcel.stream.compose(parcel.items)
                parcel.started = self._loop.time()
            if parcel.request is None:
                self._finish(parcel)
                continue
            parcel.attempts += 1
            failure = await self._attempt(parcel.stream, parcel.request)
            if failure is None:
                self.counts["acknowledged"] += len(parcel.items)
                parcel.stream.acknowledge(parcel.items)
                self._finish(parcel)
                continue
            elapsed = self._loop.time() - parcel.started
            backoff = parcel.stream.pick_backoff(parcel.attempts, elapsed, failure, parcel.items[0])
            if backoff is None:
                self.counts["lost"] += len(parcel.items)
                self._finish(parcel)
            else:
                self.counts["retries"] += 1
                self._push(parcel, backoff)

    async def _attempt(self, stream: Stream[Any], request: Request) -> str | None:
        """Why it was not taken, or None."""
        self.counts[f"{stream.name} requests"] += 1
        try:
            if not await stream.open(self._session):
                return READ_FAILED
            # encoded=True: the signature covers the URL as it was given, so it must not be normalised on the way.
            async with self._session.post(
                URL(request.url, encoded=True), data=request.body, headers=request.headers, allow_redirects=False
            ) as response:
                return None if stream.is_taken(response.status) else str(response.status)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return CONNECT_FAILED
        except (aiohttp.ClientError, TimeoutError):
            return READ_FAILED

    def _finish(self, parcel: _Parcel) -> None:
        self.pending -= len(parcel.items)
        if not self.pending:
            self._idle.set()
