"""Calls of a channel: an outcome for each message, whatever the channel does."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import TypeVar

import structlog

from aftertouch import metrics
from aftertouch.channels import Accepted, Address, Channel, Content, Finding, Message, NotTaken, Outcome, Price, Refused, Unclear

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Defect(Unclear):
    """What became of a message is unclear because the channel itself failed; ``detail`` is how."""


LONGEST_CALL = timedelta(seconds=20)
"""Above the channels' own limits of 10 and 15 seconds, below the 30 that a process is usually given to stop."""

Messages = Sequence[Message[Address, Content]]
T = TypeVar("T")


async def send_messages(channel: Channel, messages: Messages) -> Sequence[Outcome]:
    """Have the channel send messages; those of a call that failed are a ``Defect``."""
    outcomes = await _call(channel, "send", channel.send, _is_outcome, messages)
    for name, count in Counter(map(_name_outcome, outcomes)).items():
        metrics.MESSAGES.labels(channel.name, name).inc(count)
    return outcomes


def _name_outcome(outcome: Outcome) -> str:
    """What the metric calls it; a channel may have a class of its own below ours."""
    match outcome:
        case Accepted():
            return "accepted"
        case Refused():
            return "refused"
        case Defect():
            return "defect"
        case _:
            return "unclear"


async def look_up_messages(channel: Channel, messages: Messages, since: datetime) -> Sequence[Finding]:
    """Have the channel look messages up; those of a call that failed are ``Unclear``."""
    return await _call(channel, "look_up", partial(channel.look_up, since=since), _is_finding, messages)


async def _call(
    channel: Channel,
    action: str,
    ask: Callable[[Messages], Awaitable[Sequence[T]]],
    is_sound: Callable[[object], bool],
    messages: Messages,
) -> list[T | Unclear]:
    size = channel.capabilities.batch_size

    async def ask_batch(batch: Messages) -> list[T | Unclear]:
        try:
            async with asyncio.timeout(LONGEST_CALL.total_seconds()):
                answered: list[T | Unclear] = list(await ask(batch))
            if len(answered) != len(batch) or not all(map(is_sound, answered)):
                raise TypeError(f"{action} did not return one sound answer for each of {len(batch)} messages")
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            # A cancellation that is not ours came out of the channel, like any other exception.
            log.exception("a channel failed", action=action, channel=channel.name)
            return [Defect(detail=_DEFECTS.get(type(error), type(error).__name__))] * len(batch)
        return answered

    # At once, so that all of them take no longer than one: an orderly stop waits for that, and so does a lease.
    batches = [ask_batch(messages[start : start + size]) for start in range(0, len(messages), size)]
    return [answer for answers in await asyncio.gather(*batches) for answer in answers]


_DEFECTS: dict[type[BaseException], str] = {TimeoutError: "no answer in time", TypeError: "a TypeError, or an unsound answer"}
"""In words, where the exception's name says little to somebody who does not read the log."""


def _is_outcome(answer: object) -> bool:
    """True for an outcome whose fields are what they are declared as; a dataclass does not check that itself."""
    match answer:
        case Accepted(message_id=str(), signals=tuple() as signals, price=None | Price()):
            return all(isinstance(signal, str) for signal in signals)
        case Refused(code=str(), retry_after=None | timedelta(), limit=str()) | Unclear():
            return True
        case _:
            return False


def _is_finding(answer: object) -> bool:
    return isinstance(answer, NotTaken) or (_is_outcome(answer) and not isinstance(answer, Refused))
