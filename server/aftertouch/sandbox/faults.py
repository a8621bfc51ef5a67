"""Faults on demand: how a provider misbehaves, for what share of the requests, and how often.

A fault strikes before the provider looks at the request, unless ``taken`` is set: then the message goes out and only the
answer is bad, which is how a sender learns that a timeout is not a refusal.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import Counter, deque
from dataclasses import dataclass
from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .population import Channel

Mode = Literal["429", "429_retry_after", "500", "503", "stall", "reset", "expired_token"]

_MOST_ARRIVALS = 10_000
_LINGER_ZERO = struct.pack("ii", 1, 0)


class Fault(BaseModel):
    """How one channel's provider misbehaves; ``mode: null`` ends it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channel: Channel
    mode: Mode | None
    share: float = Field(default=1.0, ge=0, le=1)
    times: int | None = Field(default=None, ge=1)
    """Ends by itself after so many strikes."""
    retry_after: float = Field(default=1.0, ge=0)
    """Seconds, for ``429_retry_after`` and ``503``."""
    taken: bool = False
    """The message is taken all the same."""

    @property
    def retry_headers(self) -> dict[str, str]:
        """The header that says when to come back, where this fault has it."""
        return {"retry-after": f"{self.retry_after:g}"} if self.mode in ("429_retry_after", "503") else {}


@dataclass(frozen=True)
class Arrival:
    """A message's request, when it came, and the fault that it met, if any."""

    time: float
    """By ``time.monotonic``."""
    channel: Channel
    mode: Mode | None


class Faults:
    """At most one fault per channel."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._faults: dict[Channel, Fault] = {}
        self._left: dict[Channel, int] = {}
        self._released = asyncio.Event()
        self.strikes: Counter[str] = Counter()
        self.arrivals: deque[Arrival] = deque(maxlen=_MOST_ARRIVALS)
        """The latest requests, also those that met a fault: they show whether a sender keeps the pace that it was asked for."""

    def set(self, fault: Fault) -> None:
        """Let the channel's provider misbehave from now on."""
        self._faults.pop(fault.channel, None)
        self._left.pop(fault.channel, None)
        if fault.mode is not None:
            self._faults[fault.channel] = fault
        if fault.times is not None:
            self._left[fault.channel] = fault.times

    def clear(self) -> None:
        """End all faults and let go of stalled requests."""
        self._faults.clear()
        self._left.clear()
        self.strikes.clear()
        self.arrivals.clear()
        self._released.set()
        self._released = asyncio.Event()

    def strike(self, channel: Channel) -> Fault | None:
        """The fault that this request meets, if any."""
        fault = self._faults.get(channel)
        if fault is not None and self._random.random() >= fault.share:
            fault = None
        self.arrivals.append(Arrival(time.monotonic(), channel, fault.mode if fault else None))
        if fault is None:
            return None
        if channel in self._left:
            self._left[channel] -= 1
            if not self._left[channel]:
                del self._faults[channel], self._left[channel]
        self.strikes[f"{channel} {fault.mode}"] += 1
        return fault

    def keep_silent(self, fault: Fault) -> Response:
        """The non-answer of ``stall`` and ``reset``."""
        return _Silence(self._released if fault.mode == "stall" else None)


class _Silence(Response):
    """Ends in a reset, after the release if there is one to wait for."""

    def __init__(self, released: asyncio.Event | None) -> None:
        super().__init__()
        self._released = released

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        transport: asyncio.Transport = scope["state"]["transport"]
        if self._released:
            gone = asyncio.ensure_future(_wait_disconnect(receive))
            release = asyncio.ensure_future(self._released.wait())
            await asyncio.wait((gone, release), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            release.cancel()
        if transport.is_closing():
            return  # the client was not that patient
        # Without SO_LINGER 0 the client sees an orderly end, which some clients take for an answer.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        transport.abort()
        await _wait_disconnect(receive)


async def _wait_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
