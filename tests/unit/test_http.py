"""The client of the channels: what an answer of any shape becomes, and whether a request that failed may have arrived."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from ipaddress import ip_address

import pytest

from aftertouch import http
from aftertouch.http import Answer, HttpClient, NoAnswer, NotAllowed, NotSent, Origin, encode_headers, split_url

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def run_server(serve: Serve) -> AsyncIterator[Origin]:
    """A server that does with each connection what the test says."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield Origin("http", "127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return head + await reader.readexactly(int(length or 0))


def answer_with(*parts: bytes, keep: bool = True) -> Serve:
    """Write these parts after each request, with a pause between them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                await read_request(reader)
            except asyncio.IncompleteReadError:
                return
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01 if len(parts) > 1 else 0)
            if not keep:
                return

    return serve


async def post(serve: Serve, *, body: bytes = b"hello", **headers: str) -> Answer:
    async with run_server(serve) as origin, HttpClient(timeout=60) as client:
        return await client.post(origin, "/x", encode_headers(headers), body)


@pytest.mark.parametrize(
    ("parts", "answer"),
    [
        ([b"HTTP/1.1 201 Created\r\nLocation: /a\r\nContent-Length: 0\r\n\r\n"], (201, b"")),
        ([b"HTTP/1.1 200 OK\r\nContent-Len", b"gth: 4\r\n\r\nab", b"cd"], (200, b"abcd")),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", b"1\r\nc\r\n0\r\n\r\n"], (200, b"abc")),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], (204, b"")),
        ([b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na"], (200, b"a")),
        ([b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"], (429, b"")),
        ([b"HTTP/1.1 307 Elsewhere\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n"], (307, b"")),
    ],
)
async def test_answer_of_any_shape_is_read(parts: list[bytes], answer: tuple[int, bytes]) -> None:
    found = await post(answer_with(*parts))
    assert (found.status, found.body) == answer


async def test_answer_that_ends_with_the_connection_is_whole() -> None:
    found = await post(answer_with(b"HTTP/1.1 200 OK\r\n\r\n", b"abc", keep=False))
    assert (found.status, found.body) == (200, b"abc")


@pytest.mark.parametrize(
    ("parts", "detail"),
    [
        ([b""], "closed"),
        ([b"HTTP/1.1 200 OK\r\nContent-Len"], "closed"),
        ([b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc"], "closed"),
        ([b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"], "closed"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n"], "closed"),
        ([b"SSH-2.0-OpenSSH\r\n"], "malformed answer"),
        ([b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"], "malformed answer"),
        ([b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * http.MOST_BYTES], "endless headers"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n" * 4_000], "endless headers"),
    ],
)
async def test_answer_that_is_none_leaves_it_open_what_happened(parts: list[bytes], detail: str) -> None:
    with pytest.raises(NoAnswer, match=detail):
        await post(answer_with(*parts, keep=False))


@pytest.mark.parametrize("size", [http.MOST_BYTES, 10 * http.MOST_BYTES])
async def test_answer_without_an_end_is_cut_off(size: int) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    found = await post(answer_with(head + b"x" * size))
    assert (found.status, found.body) == (200, None)


async def test_get_takes_longer_answers_where_it_says_so() -> None:
    body = b"x" * (http.MOST_BYTES + 1)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with run_server(answer_with(answer + body)) as origin, HttpClient(timeout=60) as client:
        assert (await client.get(origin, "/x?a=1", b"")).body is None
        assert (await client.get(origin, "/x?a=1", b"", most_bytes=2 * len(body))).body == body
        assert (await client.get(origin, "/x?a=1", b"")).body is None


async def test_get_has_no_body() -> None:
    requests = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await read_request(reader))
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")

    async with run_server(serve) as origin, HttpClient(timeout=60) as client:
        await client.get(origin, "/x?a=1", encode_headers({"Accept": "a/b"}))
    assert requests == [f"GET /x?a=1 HTTP/1.1\r\nHost: {origin.authority}\r\nAccept: a/b\r\n\r\n".encode()]


@pytest.mark.parametrize("target", ["", "x", "/a b", "/a\r\nX: y", "/é"])
async def test_get_of_a_target_that_is_none_is_an_error(target: str) -> None:
    async with HttpClient(timeout=60) as client:
        with pytest.raises(ValueError, match="visible"):
            await client.get(Origin("http", "127.0.0.1", 1), target, b"")


async def test_silence_ends_in_time_and_leaves_it_open_what_happened() -> None:
    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        await reader.read()

    async with run_server(answer_once) as origin, HttpClient(timeout=60) as client:
        await client.post(origin, "/", b"", b"")
        # By now there is a connection, which on a busy machine takes longer than this.
        client._timeout = 0.1
        with pytest.raises(NoAnswer, match="timeout"):
            await client.post(origin, "/", b"", b"")


async def test_reset_leaves_it_open_what_happened() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.transport.abort()

    with pytest.raises(NoAnswer):
        await post(reset)


async def test_cancelled_request_gives_its_connection_up() -> None:
    read, closed = asyncio.Event(), asyncio.Event()

    async def stall(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await read_request(reader)
        read.set()
        await reader.read()
        closed.set()

    async with run_server(stall) as origin, HttpClient(timeout=60) as client:
        sending = asyncio.create_task(client.post(origin, "/", b"", b""))
        await read.wait()
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        async with asyncio.timeout(60):
            await closed.wait()
        assert not client._pools


async def count_connections(serve: Serve, requests: int, *, is_closed: bool = True) -> int:
    """How many connections so many requests take; where each is closed after its answer, the next waits for that."""
    opened = 0

    async def counted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        await serve(reader, writer)

    async with run_server(counted) as origin, HttpClient(timeout=60) as client:
        for _ in range(requests):
            assert (await client.post(origin, "/", b"", b"")).status == 200
            async with asyncio.timeout(60):
                while is_closed and client._pools:  # noqa: ASYNC110 - the client tells nobody
                    await asyncio.sleep(0.001)
    return opened


async def test_connection_is_used_again_unless_the_server_closes_it() -> None:
    ok = answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert await count_connections(ok, 5, is_closed=False) == 1
    assert await count_connections(answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", keep=False), 5) == 5
    closing = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
    assert await count_connections(answer_with(closing), 5) == 5


async def test_connection_that_is_old_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.0)
    ok = answer_with(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert await count_connections(ok, 3, is_closed=False) == 3


async def test_connection_with_words_that_nobody_asked_for_is_not_used_again() -> None:
    """An answer too many would otherwise be taken for the next person's."""
    ok = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert await count_connections(answer_with(ok * 2), 3) == 3
    assert await count_connections(answer_with(ok + b"HTTP/1.1 500 Wr"), 3) == 3


async def test_requests_beyond_the_connections_wait_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 3)
    under_way = most = 0
    full = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal under_way, most
        while not reader.at_eof():
            try:
                request = await read_request(reader)
            except asyncio.IncompleteReadError:
                return
            under_way += 1
            most = max(most, under_way)
            if under_way == 3:
                full.set()
            await full.wait()
            await asyncio.sleep(0.005)
            under_way -= 1
            body = request.rpartition(b"\r\n\r\n")[2]
            if body.endswith(b"7"):
                return
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))

    async with run_server(serve) as origin, HttpClient(timeout=60) as client:
        sent = [client.post(origin, "/", b"", b"%d" % number) for number in range(40)]
        answers = await asyncio.gather(*sent, return_exceptions=True)
        assert most == 3
        for number, answer in enumerate(answers):
            if number % 10 == 7:
                assert isinstance(answer, NoAnswer)
            else:
                assert isinstance(answer, Answer)
                assert answer.body == b"%d" % number


async def test_waiting_for_a_connection_ends_in_time_with_nothing_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MOST_CONNECTIONS", 1)
    requests = 0
    read, closed = asyncio.Event(), asyncio.Event()

    async def stall(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        nonlocal requests
        await read_request(reader)
        requests += 1
        read.set()
        await reader.read()
        closed.set()

    async with run_server(stall) as origin, HttpClient(timeout=60) as client:
        holding = asyncio.create_task(client.post(origin, "/", b"", b""))
        await read.wait()
        # By now the one connection is taken, which on a busy machine takes longer than this.
        client._timeout = 0.1
        outcomes = await asyncio.gather(*(client.post(origin, "/", b"", b"") for _ in range(19)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [NotSent] * 19
        holding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await holding
        async with asyncio.timeout(60):
            await closed.wait()
        assert not client._pools
    assert requests == 1


async def test_nobody_who_listens_means_nothing_sent() -> None:
    # A port that is bound and not listened on: one that is only free may be taken by somebody meanwhile.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with HttpClient(timeout=60) as client:
            with pytest.raises(NotSent):
                await client.post(Origin("http", "127.0.0.1", bound.getsockname()[1]), "/", b"", b"")
            assert not client._pools


@pytest.mark.parametrize("host", ["a..b", "x" * 64 + ".example"])
async def test_name_that_cannot_be_one_means_nothing_sent(host: str) -> None:
    async with HttpClient(timeout=60) as client:
        with pytest.raises(NotSent):
            await client.post(Origin("https", host, 443), "/", b"", b"")


async def test_certificate_that_nobody_vouches_for_means_nothing_sent() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0, ssl=ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    port = server.sockets[0].getsockname()[1]
    async with HttpClient(timeout=60) as client:
        with pytest.raises(NotSent):
            await client.post(Origin("https", "127.0.0.1", port), "/", b"", b"")
    server.close()


async def test_address_that_may_not_be_spoken_to_is_not_connected_to() -> None:
    connected = 0

    async def count(*_: object) -> None:
        nonlocal connected
        connected += 1

    async with run_server(count) as origin, HttpClient(timeout=60, may_connect=lambda ip: ip.is_global) as client:
        with pytest.raises(NotAllowed):
            await client.post(origin, "/", b"", b"")
        with pytest.raises(NotAllowed):
            await client.post(Origin("http", "localhost", origin.port), "/", b"", b"")
    assert not connected
    assert not ip_address("127.0.0.1").is_global


@pytest.mark.parametrize("value", ["a\r\nX: b", "a\nb", "a\rb"])
def test_header_of_two_lines_is_an_error(value: str) -> None:
    with pytest.raises(ValueError, match="one line"):
        encode_headers({"Topic": value})


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://a.example", ("https://a.example", "/")),
        ("https://A.example:443/x?y=z", ("https://a.example", "/x?y=z")),
        ("http://a.example:443/", ("http://a.example:443", "/")),
        ("http://127.0.0.1:80?q", ("http://127.0.0.1", "/?q")),
        ("http://[::1]:8080/%0d%0a@", ("http://[::1]:8080", "/%0d%0a@")),
    ],
)
def test_url_is_split_into_origin_and_target(url: str, found: tuple[str, str]) -> None:
    origin, target = split_url(url)
    assert (str(origin), target) == found


@pytest.mark.parametrize(
    "url",
    [
        *("", "a.example/x", "//a.example/x", "ftp://a.example/", "https://", "https:///x", "https://a.example:0/"),
        *("https://a.example:65536/", "https://user@a.example/", "https://a.example#x", "https://a.example/x#y"),
        *("https://a.example\\@b.example/", "https://a.example/ x", "https://a.example/\r\nX: y", "https://a.example/é"),
        *("https://ä.example/", "https://a%2eexample/", "https://a.example /", "https://a.example:+1/", "https://a.example/x\n"),
    ],
)
def test_url_of_another_shape_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must"):
        split_url(url)
