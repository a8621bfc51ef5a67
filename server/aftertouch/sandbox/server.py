"""The running sandbox: one port, one event loop, in somebody's test or as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

import uvicorn
from starlette.applications import Starlette
from uvicorn.loops.auto import auto_loop_factory
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .control import Control
from .faults import Faults
from .meta import Meta
from .population import Population
from .push import Push
from .settings import SandboxSettings
from .truth import Truth
from .twilio import Twilio
from .webhooks import Outbox

_BACKLOG = 2048


class _Protocol(HttpToolsProtocol):
    """Hands the connection to the application, which has to be able to reset it."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["transport"] = self.transport


class _Server(uvicorn.Server):
    """Leaves signals to the process that it runs in."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Sandbox:
    """Twilio, Meta and a push service on loopback; enter it as an async context manager."""

    def __init__(self, settings: SandboxSettings | None = None) -> None:
        self.settings = settings or SandboxSettings()

    async def __aenter__(self) -> Self:
        settings = self.settings
        listener = _listen(settings.host, settings.port)
        self.url = f"http://{settings.host}:{listener.getsockname()[1]}"
        self.population = Population(settings.seed, settings.size, self.url, settings.shares)
        self.truth = Truth()
        self.faults = Faults(settings.seed)
        async with AsyncExitStack() as stack:
            stack.callback(listener.close)
            self.outbox = await stack.enter_async_context(Outbox(settings))
            twilio = Twilio(settings, self.population, self.truth, self.faults, self.outbox)
            self.more_twilio = {
                account.account_sid: Twilio(
                    replace(settings, **vars(account)),
                    *(self.population, self.truth, self.faults, self.outbox),
                    account=account.account_sid,
                )
                for account in settings.more_accounts
            }
            more_routes = [route for more in self.more_twilio.values() for route in more.routes]
            self.meta = Meta(settings, self.population, self.truth, self.faults, self.outbox)
            push = Push(settings, self.url, self.population, self.truth, self.faults, self.outbox)
            self.control = Control(self.truth, self.faults, self.outbox, twilio, self.meta, push)
            # Push first: it is what most messages are, and its path would also fit Meta's.
            app = Starlette(routes=[*push.routes, *more_routes, *twilio.routes, *self.control.routes, *self.meta.routes])
            await stack.enter_async_context(_Serving(app, listener))
            stack.callback(self.faults.clear)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._stack.aclose()

    @property
    def environment(self) -> dict[str, str]:
        """The settings of a server that talks to this sandbox."""
        return self.settings.environment(self.url)


def _listen(host: str, port: int) -> socket.socket:
    # The protocol is named because asyncio turns Nagle's delay (40 ms an answer) off only where it is.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


class _Serving:
    """The time during which requests are answered."""

    def __init__(self, app: Starlette, listener: socket.socket) -> None:
        self._listener = listener
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            # As providers do. After uvicorn's own five seconds a connection may close under a request, whose fate nobody knows.
            timeout_keep_alive=60,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._server.serve([self._listener]))
        while not self._server.started:
            if self._task.done():
                await self._task
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.should_exit = True
        await self._task


def run(settings: SandboxSettings, *, started: Callable[[Sandbox], None]) -> None:
    """Run until SIGINT or SIGTERM; ``started`` is called with the sandbox once it answers."""
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.run(_run(settings, started))


async def _run(settings: SandboxSettings, started: Callable[[Sandbox], None]) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with Sandbox(settings) as sandbox:
        started(sandbox)
        await stopped.wait()
