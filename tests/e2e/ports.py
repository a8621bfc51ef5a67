"""Ports that stay a test's own while nobody listens there."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keep_port() -> Iterator[str]:
    """An address where a server may listen meanwhile, and again after it was killed; until it does, connections are refused.

    A port that is merely known to be free is given to the next who asks for one, as another test may at the same moment.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as placeholder:
        # Never listening itself, it lets another socket with this option do so, and keeps the kernel from dealing the port.
        placeholder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        placeholder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{placeholder.getsockname()[1]}"
