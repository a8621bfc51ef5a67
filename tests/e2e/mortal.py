"""The steps of a work unit, and a blow at one of them; as a program, a worker that kills itself there.

A kill from outside hits a step only by chance, and the steps that matter most last a millisecond.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Any, Literal

from aftertouch.cli import main
from aftertouch.delivery import sender
from aftertouch.delivery.drafts import Drafter
from aftertouch.delivery.sender import Sender
from aftertouch.delivery.worker import Worker
from aftertouch.ingest import batcher
from aftertouch.ingest.ledger import Ledger

STEPS: dict[str, tuple[object, str, Literal["before", "during", "after"]]] = {
    "claimed": (Worker, "_send", "before"),
    "drafted": (Drafter, "draft", "after"),
    "admitted": (Sender, "_admit", "after"),
    "marked, not committed": (Sender, "_mark_within", "after"),
    "marked": (Sender, "_mark", "after"),
    "handed to the provider": (sender, "send_messages", "during"),
    "taken by the provider": (sender, "send_messages", "after"),
    "outcomes not committed": (batcher, "store_attempts", "after"),
    "outcomes committed": (Ledger, "record", "after"),
    "subscriptions changed": (Sender, "_apply", "after"),
    "settling": (sender, "finish_unit", "after"),
    "settled": (Sender, "_settle", "after"),
}
"""In their order: the async function that is the step, and when it is struck."""
IN_FLIGHT_SECONDS = 0.005
"""After this a request has left, and the sandbox has seldom answered."""


Blow = Callable[[], Awaitable[None]]


def strike_at(step: str, count: int, blow: Blow, patch: Callable[[Any, str, object], None] = setattr) -> None:
    """Have ``blow`` awaited when the step comes for the ``count``-th time."""
    owner, name, when = STEPS[step]
    original = getattr(owner, name)
    times = itertools.count(1)

    async def strike(now: str) -> None:
        if now == when and next(times) == count:
            await blow()

    @wraps(original)
    async def struck(*arguments: Any, **named: Any) -> Any:
        await strike("before")
        doing = asyncio.ensure_future(original(*arguments, **named))
        if when == "during":
            await asyncio.wait([doing], timeout=IN_FLIGHT_SECONDS)
            await strike("during")
        result = await doing
        await strike("after")
        return result

    patch(owner, name, struck)


async def die() -> None:
    """kill -9 of this process."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    strike_at(sys.argv[1], int(sys.argv[2]), die)
    sys.argv[1:] = ["worker"]
    main()
