"""Ports for programs that are told one instead of choosing a free one themselves."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager


def find_free_port() -> int:
    """A port on loopback that stays free: it is below those that Linux gives to whoever connects or asks for any."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


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
