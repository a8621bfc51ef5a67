"""The templates that providers keep for an account: read at most once a minute, however many people look at them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import structlog

from aftertouch.channels import Channel, Template
from aftertouch.channels import TemplatesUnreadable as Unreadable
from aftertouch.delivery.calls import LONGEST_CALL
from aftertouch.errors import TemplatesUnreadable
from aftertouch.ingest.accounts import Account, Accounts
from aftertouch.kept import Kept

log = structlog.get_logger()

KEEP_SECONDS = 60.0
ASK_AGAIN_SECONDS = 5.0
"""After the provider did not say."""
MOST_ACCOUNTS = 20
"""Whose templates are kept: thousands of some hundred bytes each."""
MOST_TEMPLATES = 10_000


@dataclass
class _Reading:
    """What a provider was asked, and its answer."""

    task: asyncio.Task[Sequence[Template] | TemplatesUnreadable]
    begun_at: float

    @property
    def is_over(self) -> bool:
        """True when the provider is to be asked again."""
        if not self.task.done():
            return False
        is_good = not self.task.cancelled() and not isinstance(self.task.result(), TemplatesUnreadable)
        return time.monotonic() - self.begun_at > (KEEP_SECONDS if is_good else ASK_AGAIN_SECONDS)


class Templates:
    """The templates of all accounts of a process."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._readings: Kept[tuple[str, int], _Reading] = Kept(MOST_ACCOUNTS)

    def list(self, account: Account) -> Awaitable[Sequence[Template]]:
        """An account's templates, by name and language; none on a channel that has none. Call it without waiting after ``open``.

        Raises:
            TemplatesUnreadable: the provider does not say.
        """
        key = account.scope, account.version
        reading = self._readings.get(key)
        if reading is None or reading.is_over:
            held = ExitStack()
            channel = held.enter_context(self._accounts.hold(account))
            reading = _Reading(asyncio.create_task(_read(channel, held), name="read templates"), time.monotonic())
            self._readings.put(key, reading)
        return _await(reading.task)


async def _await(task: asyncio.Task[Sequence[Template] | TemplatesUnreadable]) -> Sequence[Template]:
    # Whoever goes away does not take the answer from the others.
    answer = await asyncio.shield(task)
    if isinstance(answer, TemplatesUnreadable):
        raise answer
    return answer


async def _read(channel: Channel, held: ExitStack) -> Sequence[Template] | TemplatesUnreadable:
    with held:
        if not channel.capabilities.templates:
            return ()
        try:
            async with asyncio.timeout(LONGEST_CALL.total_seconds()):
                found = list(await channel.list_templates())
            for template in found:
                _check(template)
        except Unreadable as error:
            return TemplatesUnreadable(channel.name, str(error)[:500])
        except Exception as error:
            log.exception("a channel failed", action="list_templates", channel=channel.name)
            cause = "it did not answer in time" if isinstance(error, TimeoutError) else "the channel failed; its log says how"
            return TemplatesUnreadable(channel.name, cause)
    return sorted(found[:MOST_TEMPLATES], key=lambda template: (template.name, template.language))


def _check(template: object) -> None:
    """Raise TypeError or ValueError unless it is what it is declared as; a dataclass does not check that itself."""
    if not isinstance(template, Template):
        raise TypeError(f"list_templates returned {template!r}, which is no Template")
    words = (template.header, template.body, template.footer, *template.buttons)
    if not all(isinstance(text, str) for text in (template.name, template.language, template.status, *words)):
        raise TypeError(f"the template {template.name!r} has texts that are none")
    json.dumps(dict(template.content), allow_nan=False)
