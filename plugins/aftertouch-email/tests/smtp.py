"""A provider that speaks SMTP, by aiosmtpd: what it is told to answer to a message, it answers."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Callable
from typing import Any

from aiosmtpd.smtp import SMTP, Envelope, Session

from aftertouch.testing import FakeProvider, Fault, ProviderRequest


class _Handler:
    def __init__(self, provider: SmtpProvider) -> None:
        self._provider = provider

    async def handle_RCPT(self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]) -> str:
        envelope.rcpt_tos.append(address)
        return self._provider.judge_recipient(address)

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        content = envelope.content if isinstance(envelope.content, bytes) else (envelope.content or "").encode()
        answer = await self._provider.exchange(
            ProviderRequest(method="DATA", url=f"mailto:{envelope.rcpt_tos[0]}", headers={}, body=content)
        )
        match answer:
            case Fault.STALL:
                await self._provider.closing.wait()
                return "421 4.3.2 closing"
            case Fault.RESET:
                transport: Any = server.transport
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                transport.abort()
                return "421 4.3.2 closing"
        return f"{answer.status} {' '.join(answer.body.split())[:400]}"


class SmtpProvider(FakeProvider):
    """An SMTP server on a free loopback port. ``url`` is its port alone."""

    judge_recipient: Callable[[str], str] = staticmethod(lambda address: "250 2.1.5 Ok")
    options: dict[str, Any] = {}
    """Of aiosmtpd's ``SMTP``."""

    async def start(self) -> None:
        # It logs every line that it is sent, and the channel is held to log none of them.
        logging.getLogger("mail.log").setLevel(logging.CRITICAL)
        self._handler = _Handler(self)
        self._sessions: list[SMTP] = []

        def make() -> SMTP:
            self._sessions.append(SMTP(self._handler, hostname="sandbox.example", **self.options))
            return self._sessions[-1]

        self._server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", 0)
        self.url = str(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        self._server.close()
        for session in self._sessions:
            if session.transport is not None:
                session.transport.close()
        await self._server.wait_closed()
        await asyncio.sleep(0)
