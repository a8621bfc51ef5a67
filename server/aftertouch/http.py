"""POSTs to providers over kept-alive connections, which say whether a request that failed may have arrived.

A general client costs as much as encrypting: aiohttp takes 92 to 130 µs of CPU a request, this 17 to 35, with llhttp reading
the answers in both. It can do less: a connection carries one request at a time, nothing is repeated, no redirect is followed,
and neither cookies nor proxies are known.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import NamedTuple, Self, cast

import httptools
from aiohappyeyeballs import start_connection

MOST_BYTES = 65_536
"""Of an answer, with its headers: a longer one is cut off. Providers' are below 2,000."""
MOST_CONNECTIONS = 256
"""To one origin; more requests wait, so that one slow provider does not take every file descriptor."""
IDLE_SECONDS = 15.0
"""An idle connection is not used again after this: a provider may be closing it just now, and a request that meets that is lost.
aiohttp's own limit; providers keep theirs for a minute and longer."""
ADDRESSES_SECONDS = 10.0
"""How long a name's addresses are remembered: opening many connections at once asks once."""

IpAddress = IPv4Address | IPv6Address

_URL = re.compile(r"(https?)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?([/?][!-\"$-~]*)?")

_TARGET = re.compile(r"/[!-~]*")


class NotSent(Exception):
    """Nothing of the request has left: there was no connection in time."""


class NotAllowed(NotSent):
    """The host leads only to addresses that must not be spoken to."""


class NoAnswer(Exception):
    """The request may have arrived, and no whole answer came in time."""


class Origin(NamedTuple):
    """Where a connection leads."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        """As a URL without a path; the scheme's own port is left out."""
        return f"{self.scheme}://{self.authority}"

    @property
    def authority(self) -> str:
        """What the Host header says."""
        return self.host if self.port == (443 if self.scheme == "https" else 80) else f"{self.host}:{self.port}"


def split_url(url: str) -> tuple[Origin, str]:
    """The origin and the target (path and query) of an absolute URL without user, password and fragment.

    The client finds its way by this function only, so whoever judges the origin judges where the request goes.

    Raises:
        ValueError: it is no such URL.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError("must be an absolute URL without user, password and fragment")
    scheme, host, port, target = match.groups("")
    number = int(port) if port else 443 if scheme == "https" else 80
    if not 0 < number < 65_536:
        raise ValueError("must have a port below 65536")
    return Origin(scheme, host.lower(), number), target if target.startswith("/") else f"/{target}"


def encode_headers(headers: Mapping[str, str]) -> bytes:
    """Headers as they are sent: encoded once where they are the same for many requests, and joined with others by ``+``.

    Raises:
        ValueError: a value would end its header, or is not Latin-1.
    """
    head = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if head.count("\r") != len(headers) or head.count("\n") != len(headers):
        raise ValueError("a header must be one line")
    return head.encode("latin-1")


class Answer(NamedTuple):
    """What a provider said."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case; the last of each name."""
    body: bytes | None
    """None when it was longer than what was to be taken."""


class HttpClient:
    """Connections to any number of origins. Make it in the event loop that will send, and close it there."""

    def __init__(self, *, timeout: float, may_connect: Callable[[IpAddress], bool] | None = None) -> None:
        """Open nothing yet.

        Args:
            timeout: seconds for a whole request. Getting a connection may take half of it, also where all are in use.
            may_connect: judges each address before it is connected to, after the name was looked up: there is no time left in
                which the name could come to mean something else.
        """
        self._loop = asyncio.get_running_loop()
        self._timeout = timeout
        self._may_connect = may_connect
        self._pools: dict[Origin, _Pool] = {}
        self._deadlines = _Deadlines(self._loop)
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close every connection, also those with a request under way."""
        for pool in list(self._pools.values()):
            for connection in list(pool.connections):
                connection.abort()
        self._deadlines.close()
        # A transport is closed by the loop's next round, and its socket with it.
        await asyncio.sleep(0)

    async def post(self, origin: Origin, target: str, headers: bytes, body: bytes) -> Answer:
        """Send one request, once.

        Args:
            target: as ``split_url`` found it.
            headers: as ``encode_headers`` wrote them.

        Raises:
            NotSent: nothing of it has left; NotAllowed: nor ever will.
            NoAnswer: it may have arrived.
        """
        return await self._ask(b"POST", origin, target, headers + b"Content-Length: %d\r\n" % len(body), body, MOST_BYTES)

    async def get(self, origin: Origin, target: str, headers: bytes, *, most_bytes: int = MOST_BYTES) -> Answer:
        """Ask for something, once; ``most_bytes`` of an answer with its headers, where it may be longer than what a post brings.

        Raises:
            NotSent, NoAnswer: as ``post`` does.
            ValueError: the target would end its line.
        """
        if _TARGET.fullmatch(target) is None:
            raise ValueError("a target must be visible ASCII")
        return await self._ask(b"GET", origin, target, headers, b"", most_bytes)

    async def _ask(self, method: bytes, origin: Origin, target: str, headers: bytes, body: bytes, most_bytes: int) -> Answer:
        deadline = self._loop.time() + self._timeout
        pool = self._pools.get(origin)
        connection = pool.take_idle() if pool else None
        if connection is None:
            connection = await self._wait_for_connection(origin, deadline - self._timeout / 2)
        head = b"%b %b HTTP/1.1\r\nHost: %b\r\n%b\r\n" % (method, target.encode(), connection.authority, headers)
        return await connection.exchange(head + body, deadline, most_bytes)

    async def _wait_for_connection(self, origin: Origin, until: float) -> _Connection:
        pool = self._pools.setdefault(origin, _Pool(origin, self._pools, self._deadlines))
        try:
            while (connection := pool.take_idle()) is None:
                if len(pool.connections) < MOST_CONNECTIONS:
                    async with asyncio.timeout_at(until):
                        return await self._connect(pool)
                await pool.wait(until)
        except TimeoutError as error:
            raise NotSent("no connection in time") from error
        finally:
            pool.forget_if_empty()
        return connection

    async def _connect(self, pool: _Pool) -> _Connection:
        connection = _Connection(pool)
        pool.connections.add(connection)
        origin = pool.origin
        is_tls = origin.scheme == "https"
        try:
            addresses = await self._look_up(pool)
            opened = await start_connection(addresses, happy_eyeballs_delay=0.25, interleave=1)
            try:
                opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                await self._loop.create_connection(
                    lambda: connection,
                    sock=opened,
                    ssl=self._tls if is_tls else None,
                    server_hostname=origin.host.strip("[]") if is_tls else None,
                )
            except BaseException:
                opened.close()
                raise
        except BaseException as error:
            pool.drop(connection)
            # A name that IDNA cannot encode is a UnicodeError; what TLS says is an OSError.
            if isinstance(error, OSError | UnicodeError):
                raise NotSent(type(error).__name__) from error
            raise
        return connection

    async def _look_up(self, pool: _Pool) -> list[_AddressInfo]:
        async with pool.looking_up:
            if pool.addresses_end < time.monotonic():
                host, port = pool.origin.host.strip("[]"), pool.origin.port
                found = await self._loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                pool.addresses = cast("list[_AddressInfo]", found)
                pool.addresses_end = time.monotonic() + ADDRESSES_SECONDS
        allowed = [info for info in pool.addresses if self._may_connect is None or self._may_connect(ip_address(info[4][0]))]
        if not allowed:
            raise NotAllowed("the name leads to addresses that must not be spoken to")
        return allowed


_AddressInfo = tuple[int, int, int, str, tuple[str, int] | tuple[str, int, int, int]]


class _Deadlines:
    """Until when each request has to be answered, with one timer for all: one for each takes 6 us."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._due: dict[_Connection, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._armed_for = 0.0

    def add(self, connection: _Connection, deadline: float) -> None:
        """Time the connection's request out then."""
        self._due[connection] = deadline
        if self._timer is None or deadline < self._armed_for:
            self._arm(deadline)

    def drop(self, connection: _Connection) -> None:
        """Its request is over."""
        self._due.pop(connection, None)

    def close(self) -> None:
        """Time nothing out any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self, deadline: float) -> None:
        self.close()
        self._timer, self._armed_for = self._loop.call_at(deadline, self._ring), deadline

    def _ring(self) -> None:
        self._timer = None
        now = self._loop.time()
        for connection in [connection for connection, deadline in self._due.items() if deadline <= now]:
            self.drop(connection)
            connection.time_out()
        if self._due:
            self._arm(min(self._due.values()))


@dataclass
class _Pool:
    """The connections to one origin."""

    origin: Origin
    siblings: dict[Origin, _Pool]
    deadlines: _Deadlines
    connections: set[_Connection] = field(default_factory=set)
    """With those that are being opened."""
    idle: list[_Connection] = field(default_factory=list)
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)
    looking_up: asyncio.Lock = field(default_factory=asyncio.Lock)
    addresses: list[_AddressInfo] = field(default_factory=list)
    addresses_end: float = 0.0

    def take_idle(self) -> _Connection | None:
        """The connection that was used last: so the others become old, and none is kept for nothing."""
        while self.idle:
            connection = self.idle.pop()
            if connection.is_fresh():
                return connection
            connection.abort()
        return None

    async def wait(self, until: float) -> None:
        """Return when a connection is free or there is room for one; somebody else may be faster.

        Raises:
            TimeoutError: it took too long.
        """
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        self.waiting.append(turn)
        # Not asyncio.timeout, which costs 7 us: whole batches may wait.
        timer = loop.call_at(until, _expire, turn)
        try:
            await turn
        except BaseException:
            # The turn of somebody who gave up must not be lost.
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.wake_next()
            raise
        finally:
            timer.cancel()

    def wake_next(self) -> None:
        """Give the turn to who has waited longest."""
        while self.waiting:
            turn = self.waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def keep(self, connection: _Connection) -> None:
        """Take back a connection that can be used again."""
        self.idle.append(connection)
        self.wake_next()

    def drop(self, connection: _Connection) -> None:
        """Forget a connection that is no more."""
        if connection in self.connections:
            self.connections.discard(connection)
            if connection in self.idle:
                self.idle.remove(connection)
            self.wake_next()
            self.forget_if_empty()

    def forget_if_empty(self) -> None:
        """Hosts may be a subscriber's to invent, so pools need an end."""
        if not self.connections and not self.waiting and self.siblings.get(self.origin) is self:
            del self.siblings[self.origin]


def _expire(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(TimeoutError())


class _Connection(asyncio.Protocol):
    """One connection, with at most one request under way."""

    def __init__(self, pool: _Pool) -> None:
        self._pool = pool
        self.authority = pool.origin.authority.encode()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answered: asyncio.Future[Answer] | None = None
        self._most_bytes = MOST_BYTES
        self._idle_since = 0.0
        self._begin()

    def __hash__(self) -> int:
        return id(self)

    def _begin(self) -> None:
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._taken = 0
        self._has_head = False

    def is_fresh(self) -> bool:
        """True when it can be used, as far as can be known."""
        transport = self._transport
        return transport is not None and not transport.is_closing() and self._loop.time() - self._idle_since < IDLE_SECONDS

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    async def exchange(self, request: bytes, deadline: float, most_bytes: int) -> Answer:
        """Write a request and wait for its answer."""
        if self._transport is None or self._transport.is_closing():
            raise NotSent("the connection was closed at once")
        self._begin()
        self._most_bytes = most_bytes
        answered: asyncio.Future[Answer] = self._loop.create_future()
        self._answered = answered
        self._pool.deadlines.add(self, deadline)
        self._transport.write(request)
        try:
            return await answered
        finally:
            self._pool.deadlines.drop(self)
            if not answered.done() or answered.cancelled():
                self.abort()

    def time_out(self) -> None:
        """Give up the request that is under way."""
        self._fail("timeout")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not inherit from asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._idle_since = self._loop.time()

    def data_received(self, data: bytes) -> None:
        if self._answered is None:
            # Nobody asked for it, so nobody may take it for an answer.
            self.abort()
            return
        room = self._most_bytes - self._taken
        self._taken += len(data)
        try:
            self._parser.feed_data(data if len(data) <= room else data[:room])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail("malformed answer")
        if len(data) > room:
            if self._has_head:
                self._answer(None)
            self._fail("endless headers")

    def connection_lost(self, error: Exception | None) -> None:
        has_no_length = not {"content-length", "transfer-encoding"} & self._headers.keys()
        if error is None and self._has_head and has_no_length:
            # Such a body ends with the connection (RFC 9112, section 6.3).
            self._answer(b"".join(self._parts))
        self._fail(type(error).__name__ if error else "closed")
        self._pool.drop(self)

    # What the parser calls

    def on_message_begin(self) -> None:
        if self._answered is None:
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        # After a 1xx the answer is still to come (RFC 9110, section 15.2).
        self._has_head = self._parser.get_status_code() >= 200

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if not self._has_head:
            self._headers = {}
            return
        self._answer(b"".join(self._parts))
        if self._parser.should_keep_alive():
            self._idle_since = self._loop.time()
            self._pool.keep(self)
        else:
            self.abort()

    def _answer(self, body: bytes | None) -> None:
        answered, self._answered = self._answered, None
        if answered is not None and not answered.done():
            answered.set_result(Answer(self._parser.get_status_code(), self._headers, body))

    def _fail(self, detail: str) -> None:
        """Close the connection; who still waits for an answer gets none."""
        answered, self._answered = self._answered, None
        if answered is not None and not answered.done():
            answered.set_exception(NoAnswer(detail))
        self.abort()
