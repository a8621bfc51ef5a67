"""A provider on a free loopback port that answers, or fails to, as a test tells it.

It speaks real HTTP to the channel's own client, so nothing of the channel is patched and every timeout and reset is a real one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl

from aiohttp import web


class Fault(Enum):
    """What a provider does instead of answering, once it has read the whole request."""

    STALL = auto()
    """It says nothing until the client gives up."""
    RESET = auto()
    """It resets the connection."""


@dataclass(frozen=True, kw_only=True)
class ProviderRequest:
    """A request as it arrived at the provider."""

    method: str
    url: str
    """Path and query, as they were written."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    def read_json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    def read_form(self) -> dict[str, str]:
        """The body as a form, the last value of each name."""
        return dict(parse_qsl(self.body.decode(), keep_blank_values=True))


@dataclass(frozen=True, kw_only=True)
class Response:
    """A provider's answer."""

    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Self:
        """An answer whose body is ``value`` as JSON."""
        return cls(status=status, body=json.dumps(value), headers={"Content-Type": "application/json", **(headers or {})})


Answer = Callable[[ProviderRequest], Response | Fault]


class FakeProvider:
    """An HTTP server for the time of an ``async with``; every method and path ends in ``answer``.

    A subclass that overrides ``start`` and ``stop`` speaks another protocol: it hands each message that it reads to ``exchange``.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        """May be replaced at any time."""
        self.exchanges: list[tuple[ProviderRequest, Response | Fault]] = []
        """What was asked and what was answered, in order."""
        self.url = ""
        self._errors: list[Exception] = []
        self._arrived = asyncio.Condition()
        self.closing = asyncio.Event()
        """Set when it ends: how long a stall lasts."""

    @property
    def requests(self) -> list[ProviderRequest]:
        """What was asked, in order."""
        return [request for request, _ in self.exchanges]

    async def wait_for_requests(self, count: int) -> None:
        """Return once ``count`` requests have been read."""
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.exchanges) >= count)

    async def start(self) -> None:
        """Listen on a free loopback port, and set ``url``."""
        self._runner = web.ServerRunner(web.Server(self._handle, access_log=None), shutdown_timeout=1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def stop(self) -> None:
        """Listen no more, and end every connection."""
        await self._runner.cleanup()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.closing.set()
        await self.stop()
        if self._errors:
            raise self._errors[0]

    async def exchange(self, request: ProviderRequest) -> Response | Fault:
        """Note a request, and say how to answer it."""
        try:
            answer = self.answer(request)
        except Exception as error:
            # A mistake in the test itself: it is raised when the provider closes, since here only aiohttp would see it.
            self._errors.append(error)
            answer = Response(status=500)
        async with self._arrived:
            self.exchanges.append((request, answer))
            self._arrived.notify_all()
        return answer

    async def _handle(self, received: web.BaseRequest) -> web.StreamResponse:
        request = ProviderRequest(
            method=received.method,
            url=received.raw_path,
            headers={name.lower(): value for name, value in received.headers.items()},
            body=await received.read(),
        )
        match await self.exchange(request):
            case Fault.STALL:
                await self.closing.wait()
            case Fault.RESET if received.transport is not None:
                # SO_LINGER with 0 seconds makes close send RST instead of FIN, as a dying proxy does.
                received.transport.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                received.transport.abort()
            case Response() as answer:
                return web.Response(status=answer.status, body=answer.body.encode(), headers=answer.headers)
        return web.Response(status=503)
