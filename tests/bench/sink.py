"""The providers' side of ``make bench-send``, as a process of its own: takes every request, and answers as each provider would.

It does as little as an HTTP/1.1 server can, so that the sender is what is measured; ``--flood`` measures the sink itself. Its
standard input is its lifeline: the process ends with it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import cast

import uvloop

KEPT = 100
"""Requests that are kept for the bench to look into."""


class Sink:
    """What came in."""

    def __init__(self) -> None:
        self.count = 0
        self.first_time = 0.0
        self.kept: list[bytes] = []

    def report(self) -> bytes:
        """As JSON, for ``GET /``; the next count begins at zero."""
        kept = [request.decode("latin-1") for request in self.kept]
        report = json.dumps({"count": self.count, "first_time": self.first_time, "kept": kept}).encode()
        self.count, self.first_time, self.kept = 0, 0.0, []
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(report), report)

    def take(self, request: bytes) -> bytes:
        """The answer to a message."""
        self.count += 1
        if self.count <= KEPT:
            self.first_time = self.first_time or time.time()
            self.kept.append(request)
        if request.startswith(b"POST /2010-04-01"):
            return _write_answer(b"201 Created", b'{"sid": "SM%032x", "status": "queued"}' % self.count)
        if request.startswith(b"POST /v"):
            return _write_answer(
                b"200 OK", b'{"messaging_product": "whatsapp", "messages": [{"id": "wamid.%016x"}]}' % self.count
            )
        return b"HTTP/1.1 201 Created\r\nLocation: /message/%016x\r\nContent-Length: 0\r\n\r\n" % self.count


def _write_answer(status: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


class Connection(asyncio.Protocol):
    """One connection of a client that waits for each answer."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET "):
            self._transport.write(self._sink.report())
        else:
            length = int(head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0])
            if len(body) < length:
                return
            self._transport.write(self._sink.take(self._received))
        self._received = b""


async def serve() -> None:
    """Serve until standard input ends; the port is the first line of output."""
    sink = Sink()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(sink), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


REQUEST = b"POST /push/flood HTTP/1.1\r\nHost: 127.0.0.1\r\nTTL: 60\r\nContent-Length: 300\r\n\r\n" + bytes(300)


class Flooder(asyncio.Protocol):
    """A client that writes the same request again as soon as it is answered, which costs far less than sending a message."""

    answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        Flooder.answers += 1
        self._transport.write(REQUEST)


async def flood(port: int, connections: int = 64, seconds: float = 2) -> None:
    """Print how many requests a second a sink takes."""
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(Flooder, "127.0.0.1", port)
    began, before = time.perf_counter(), Flooder.answers
    await asyncio.sleep(seconds)
    print(round((Flooder.answers - before) / (time.perf_counter() - began)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.sink", description=__doc__)
    parser.add_argument("--flood", type=int, metavar="PORT")
    given = parser.parse_args()
    uvloop.run(flood(given.flood) if given.flood else serve())
