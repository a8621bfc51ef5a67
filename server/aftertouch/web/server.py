"""The HTTP server: uvicorn as a task in the same event loop as gRPC."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Generator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

GRACE_SECONDS = 10


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signals to the process's own handler: one stop for gRPC, HTTP and the senders."""
        yield


def bind(address: str, *, is_shared: bool = False) -> socket.socket:
    """A listening socket for ``host:port``; port 0 takes a free one.

    Args:
        is_shared: with others that are bound so. It does not listen yet: the kernel would deal it connections already.

    Raises:
        OSError: it cannot be bound.
    """
    host, _, port = address.rpartition(":")
    # The protocol is named because asyncio turns Nagle's delay (40 ms an answer) off only where it is.
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, is_shared)
        listener.bind((host.strip("[]"), int(port)))
        if not is_shared:
            listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {address}: is another server running there? ({error.strerror})") from error
    return listener


def mount(ingress: ASGIApp, beside: ASGIApp, paths: tuple[str, str]) -> ASGIApp:
    """Serve ``beside`` at the first path and below the second, and everything else by the ingress."""
    root, below = paths

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        is_ingress = path != root and path != below and not path.startswith(f"{below}/")
        await (ingress if is_ingress else beside)(scope, receive, send)

    return serve


@asynccontextmanager
async def serve_http(app: ASGIApp, listener: socket.socket) -> AsyncIterator[None]:
    """Serve ``app``; requests under way end before this does."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        # Nothing here asks who the client is, and the address that signatures cover is configured.
        proxy_headers=False,
        http="httptools",
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve([listener]), name="serve HTTP")
    try:
        while not server.started:
            if serving.done():
                await serving
            await asyncio.sleep(0.005)
        yield
    finally:
        server.should_exit = True
        await serving
