"""A running sandbox and a real HTTP receiver for what it reports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from multidict import CIMultiDict

from aftertouch.sandbox import Sandbox, SandboxSettings, Shares

CERTAIN = Shares(
    all_channels=1.0,
    no_first_name=0,
    sms_opted_out=0,
    sms_gone=0,
    sms_unreachable=0,
    sms_no_report=0,
    sms_replied=0,
    whatsapp_gone=0,
    whatsapp_opted_out=0,
    whatsapp_capped=0,
    whatsapp_switched_off=0,
    whatsapp_read=1.0,
    whatsapp_read_only=0,
    whatsapp_failed_first=0,
    whatsapp_replied=0,
    push_gone=0,
    push_silent=0,
    push_offline=0,
    push_beacon_lost=0,
    push_clicked=1.0,
)
"""Everybody has everything, gets everything and reacts to everything."""


@dataclass(frozen=True)
class Received:
    method: str
    url: str
    headers: CIMultiDict[str]
    body: bytes


@dataclass
class Receiver:
    """Where receipts go: answers what it is told to, and keeps everything."""

    verify_token: str
    url: str = ""
    status: int = 200
    requests: list[Received] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        if request.query.get("hub.mode") == "subscribe":
            if request.query["hub.verify_token"] != self.verify_token:
                return web.Response(status=403)
            return web.Response(text=request.query["hub.challenge"])
        self.requests.append(Received(request.method, self.url + request.raw_path, request.headers.copy(), await request.read()))
        return web.Response(status=self.status)

    def bind(self) -> socket.socket:
        """Take a port that nobody else can have; whoever calls is refused until ``start``."""
        bound = socket.socket()
        bound.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        return bound

    async def start(self, bound: socket.socket) -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self.handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.SockSite(runner, bound).start()
        return runner


async def wait_for_retries(sandbox: Sandbox, retries: int) -> None:
    """Until so many attempts have failed; the outbox tells nobody, so this looks."""
    while sandbox.outbox.counts["retries"] < retries:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    """On a port of the test's own: what an earlier test left on its way does not arrive here."""
    receiver = Receiver(SandboxSettings().verify_token)
    runner = await receiver.start(receiver.bind())
    yield receiver
    await runner.cleanup()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


DEFAULTS: dict[str, Any] = {"size": 100, "shares": CERTAIN, "time_scale": 0.05, "duplicate_share": 0}


@pytest.fixture
def make_settings(receiver: Receiver) -> Callable[..., SandboxSettings]:
    def make(**changes: Any) -> SandboxSettings:
        return SandboxSettings(**{**DEFAULTS, "whatsapp_webhook_url": f"{receiver.url}/whatsapp", **changes})

    return make


@pytest.fixture(scope="session")
async def running_sandbox() -> AsyncIterator[Sandbox]:
    async with Sandbox(SandboxSettings(**DEFAULTS)) as sandbox:
        yield sandbox


@pytest.fixture
async def sandbox(running_sandbox: Sandbox, receiver: Receiver) -> AsyncIterator[Sandbox]:
    running_sandbox.meta.webhooks.url = f"{receiver.url}/whatsapp"
    yield running_sandbox
    await running_sandbox.control.reset()
