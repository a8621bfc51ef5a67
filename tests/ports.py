"""Ports for programs that are told one instead of choosing a free one themselves."""

from __future__ import annotations

import secrets
import socket


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
