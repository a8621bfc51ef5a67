"""Several server processes on the same two ports: started, watched, started again when they die, stopped together.

Each hangs on a lifeline, a socket pair whose other end is here: on it the server says that it answers, and reads the end of
this process, which no signal handler survives to tell. So nothing is left behind, even after a kill -9.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.config import Config, name_setting
from aftertouch.server import Addresses, open_database, read_secret_key
from aftertouch.store.engine import check_schema, open_engine
from aftertouch.web.server import bind

log = structlog.get_logger()

RESTART_SECONDS = 1.0
"""Between a death and the next start, so that a server that dies at once does not keep a core busy."""
STEADY_SECONDS = 60.0
"""A server that has lived this long starts its count of deaths again."""
MOST_DEATHS = 5
"""In a row, of one server; then something is wrong that another start does not mend."""
STOP_SECONDS = 30.0
"""For a server to finish its batches and calls (10 s); then it is killed, which loses nothing that was acknowledged."""
ORPHAN_SECONDS = 10
"""For a server whose supervisor is gone, and perhaps its database too."""


class ServersFailed(Exception):
    """The servers cannot be kept running; the log says why each of them ended."""


@asynccontextmanager
async def supervise(
    config: Config, environment: Mapping[str, str], stopping: asyncio.Event
) -> AsyncIterator[tuple[AsyncEngine, Addresses]]:
    """Run ``config.processes`` servers on one database; the body of the context runs while they serve.

    Args:
        environment: theirs, without what is decided here.
        stopping: set when they cannot be kept running.

    Raises:
        ServersFailed: one did not start, or died too often.
    """
    async with AsyncExitStack() as stack:
        grpc_address = stack.enter_context(_reserve(config.grpc_address))
        http_address = stack.enter_context(_reserve(config.http_address))
        database_url = await stack.enter_async_context(open_database(config, stopping=stopping))
        engine = await stack.enter_async_context(open_engine(database_url, pool_size=1))
        await check_schema(engine)
        settings = {
            # In the environment and not among the arguments, which every user of the machine can read.
            "database_url": database_url,
            "secret_key": read_secret_key(config).decode(),
            "grpc_address": grpc_address,
            "http_address": http_address,
            "processes": "1",
        }
        theirs = {**environment, **{name_setting(field): value for field, value in settings.items()}}
        own = [{name_setting("metrics_address"): address} for address in _list_metrics_addresses(config)]
        await stack.enter_async_context(_run_servers([_Server({**theirs, **each}) for each in own], stopping))
        yield engine, Addresses(grpc_address, http_address, config.public_url or f"http://{http_address}")


def _list_metrics_addresses(config: Config) -> list[str]:
    """One for each process, since each counts for itself: the configured one and the next ports; empty without any."""
    if config.metrics_address is None:
        return [""] * config.processes
    host, _, port = config.metrics_address.rpartition(":")
    return [f"{host}:{int(port) + index}" for index in range(config.processes)]


@contextmanager
def _reserve(address: str) -> Iterator[str]:
    """Keep a port for sockets of ours that share it, even while none of them listens; hands out the address with its number."""
    host = address.rpartition(":")[0]
    # Sharing would be granted to any two servers of one user: only a socket that shares nothing notices another server.
    with bind(address) as alone:
        port = alone.getsockname()[1]
    with bind(f"{host}:{port}", is_shared=True):
        yield f"{host}:{port}"


@asynccontextmanager
async def _run_servers(servers: list[_Server], stopping: asyncio.Event) -> AsyncIterator[None]:
    keepers: list[asyncio.Task[None]] = []
    try:
        if not all(await asyncio.gather(*(server.start() for server in servers))):
            raise ServersFailed("a server process ended while it started")
        for server in servers:
            keeper = asyncio.create_task(server.keep(), name="keep a server")
            keeper.add_done_callback(lambda _: stopping.set())
            keepers.append(keeper)
        yield
    finally:
        for keeper in keepers:
            keeper.cancel()
        ends = await asyncio.gather(*keepers, return_exceptions=True)
        await asyncio.gather(*(server.stop() for server in servers))
    for end in ends:
        if isinstance(end, Exception):
            raise end


class _Server:
    """One place among the servers, and the process that fills it now."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._lifeline: socket.socket | None = None

    async def start(self) -> bool:
        """Start a process, and return whether it came to answer."""
        self._cut()
        self._lifeline, theirs = socket.socketpair()
        self._lifeline.setblocking(False)
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "aftertouch", "serve", "--lifeline", str(theirs.fileno())),
                env=self._environment,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,  # a terminal's Ctrl-C is for us: a server that ends by itself counts as dead
            )
        try:
            return bool(await asyncio.get_running_loop().sock_recv(self._lifeline, 1))
        except ConnectionResetError:
            return False

    async def keep(self) -> None:
        """Start the process again whenever it dies.

        Raises:
            ServersFailed: too many died in a row.
        """
        loop = asyncio.get_running_loop()
        deaths = 0
        while True:
            assert self._process is not None
            began = loop.time()
            code = await self._process.wait()
            deaths = 1 if loop.time() - began > STEADY_SECONDS else deaths + 1
            log.error("a server process died", action="supervise", pid=self._process.pid, exit_code=code, deaths=deaths)
            if deaths > MOST_DEATHS:
                raise ServersFailed(f"a server process died {deaths} times in a row")
            await asyncio.sleep(RESTART_SECONDS)
            if await self.start():
                log.info("a server process answers again", action="supervise", pid=self._process.pid)

    async def stop(self) -> None:
        """Stop the process in an orderly way."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                log.error("a server process did not stop and is killed", action="supervise", pid=self._process.pid)
                self._process.kill()
                await self._process.wait()
        self._cut()

    def _cut(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
            self._lifeline = None


class Lifeline:
    """A server's end of its lifeline; ``watch`` it in a task from the beginning."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)

    async def report_ready(self) -> None:
        """Tell the supervisor that this server answers."""
        await asyncio.get_running_loop().sock_sendall(self._socket, b"\n")

    async def watch(self, stopping: asyncio.Event) -> None:
        """Set ``stopping`` when the supervisor is gone, and end the process when it does not stop in time."""
        with suppress(ConnectionResetError):  # it went before it had read that we answer
            await asyncio.get_running_loop().sock_recv(self._socket, 1)
        log.warning("the supervisor is gone", action="supervise")
        stopping.set()
        # Not a timer of the event loop, which may be what hangs. The signal's default action ends the process.
        signal.alarm(ORPHAN_SECONDS)
