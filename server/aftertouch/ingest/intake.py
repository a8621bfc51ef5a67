"""The intake: providers' receipts on their way into the ledger, by way of the spool while the database is away.

Whoever comes back without an exception may answer 2xx: the receipts are durable, in the database or on this machine's disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict, deque
from collections.abc import Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog

from aftertouch.channels import Webhook
from aftertouch.declarations import ChannelType
from aftertouch.errors import AftertouchError, DatabaseUnavailable
from aftertouch.ingest.batcher import RETRY_SECONDS
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.spool import Spool, Spooled

log = structlog.get_logger()

ANSWER_SECONDS = 3.0
"""For the database. Twilio gives up after 15 seconds (Twilio: webhook connection overrides) and a browser ends a service worker
when it likes; a commit takes milliseconds."""
GROUP_SECONDS = 0.05
"""What comes meanwhile waits for the group before it to be durable, but no longer than this: a group that changes subscriptions,
or hangs, holds up no other."""
LARGEST_GROUP = 10_000
"""Receipts that are stored together: some 0.1 s of work in the event loop."""
LOOK_SECONDS = 60.0
"""Between two looks at an empty spool, for what another server on the same directory left; and between two lines in the log."""
STOP_SECONDS = 2.0
"""For calls into a database that does not answer to end, once they are told to."""


class TokenInvalid(Exception):
    """News whose only proof would have been its token, which is not one of ours."""

    def __init__(self) -> None:
        super().__init__("the token is not one of ours")


_Source = tuple[str, int | None]
"""A channel, and the app whose own account it is; None for the server's."""


class _Arrival(NamedTuple):
    """A webhook, and who waits for it; nobody does any more once ``done`` is done."""

    webhook: Webhook
    done: asyncio.Future[None]


class Intake:
    """Takes what providers report. Run ``replay`` beside it, and close it before the spool.

    What arrives on a channel while a group of webhooks is being stored is the next group: tokens are read, campaigns looked up
    and columns made for all of it at once, which for one at a time took half of a webhook's 360 µs.
    """

    def __init__(self, ledger: Ledger, channels: Mapping[str, ChannelType], spool: Spool | None) -> None:
        self._ledger = ledger
        self._channels = channels
        self._spool = spool
        self._arrivals: dict[_Source, deque[_Arrival]] = defaultdict(deque)
        self._storing: dict[_Source, asyncio.Task[None]] = {}
        """For each account where webhooks arrive just now."""
        self._calls: set[asyncio.Task[Any]] = set()
        self._has_failed = False
        self._spooled = asyncio.Event()
        self._told_at = 0.0

    async def __aenter__(self) -> Intake:
        return self

    async def __aexit__(self, *_: object) -> None:
        """End the calls whose providers were answered from the spool."""
        for call in self._calls:
            call.cancel()
        if self._calls:
            await asyncio.wait(self._calls, timeout=STOP_SECONDS)

    async def take(self, channel: str, webhook: Webhook, app_id: int | None = None) -> None:
        """Return when its receipts are durable, within seconds whatever the database does.

        Args:
            app_id: the app to whose own account it was reported; None for the server's.

        Raises:
            TokenInvalid: the channel's webhooks prove nothing by themselves; nothing was stored.
            DatabaseUnavailable: the database is away, and there is no spool or nothing that proves the receipts without it.
            SpoolFull: the database is away, and there is no room.
            sqlite3.Error: the database is away, and the disk is full or broken.
        """
        if not (webhook.receipts or webhook.replies or webhook.standings or webhook.unrecognized):
            return
        arrive_time = datetime.now(UTC)
        if not self._is_away and await self._store_in_time((channel, app_id), webhook):
            return
        self._check_origin(channel, webhook)
        if self._spool is None:
            raise DatabaseUnavailable
        self._has_failed = True
        await self._spool.add(channel, webhook, arrive_time, app_id)
        self._spooled.set()

    async def replay(self, spool: Spool) -> None:
        """Move what is in the spool into the database, oldest first, until cancelled."""
        while True:
            try:
                self._spooled.clear()
                rows = await spool.read_oldest()
                if not rows:
                    await self._wait_for_rows(spool)
                    continue
                self._tell(spool)
                by_source: dict[_Source, list[Spooled]] = defaultdict(list)
                for row in rows:
                    by_source[row.channel, row.app_id].append(row)
                for source, group in by_source.items():
                    await self._replay(spool, source, group)
            except AftertouchError:
                self._has_failed = True
                await asyncio.sleep(RETRY_SECONDS)
            except sqlite3.Error:
                # Nothing is lost by waiting: the rows stay, and are replayed again.
                log.exception("the spool cannot be read or written", action="replay_spool")
                await asyncio.sleep(LOOK_SECONDS)

    @property
    def _is_away(self) -> bool:
        """True while the database was last seen failing, and there is a row whose replay will show that it is back.

        Then nobody waits for it: a thousand calls a second into a database that hangs would fill the memory.
        """
        return self._has_failed and self._spool is not None and self._spool.waiting > 0

    async def _store_in_time(self, source: _Source, webhook: Webhook) -> bool:
        """Store it with whatever else arrives; False when the database is away, or takes too long."""
        loop = asyncio.get_running_loop()
        arrival = _Arrival(webhook, loop.create_future())
        self._arrivals[source].append(arrival)
        if source not in self._storing:
            self._storing[source] = self._call(self._store_arrivals(source))
        # Not asyncio.timeout, which costs 7 µs.
        timer = loop.call_later(ANSWER_SECONDS, _answer, arrival, DatabaseUnavailable())
        try:
            await arrival.done
        except DatabaseUnavailable:
            return False
        finally:
            timer.cancel()
        return True

    async def _store_arrivals(self, source: _Source) -> None:
        """Store what has arrived, group by group, until nothing more arrives."""
        try:
            while group := self._take_group(self._arrivals[source]):
                # Not cancelled when it hangs: psycopg would wait for the server's word on that, which may never come.
                await asyncio.wait({self._call(self._store(source, group))}, timeout=GROUP_SECONDS)
        finally:
            del self._storing[source]
            if not self._arrivals[source]:
                del self._arrivals[source]

    def _take_group(self, arrivals: deque[_Arrival]) -> list[_Arrival]:
        group: list[_Arrival] = []
        size = 0
        while arrivals and size < LARGEST_GROUP:
            arrival = arrivals.popleft()
            # Whoever was answered from the spool meanwhile is stored by the replay.
            if not arrival.done.done():
                group.append(arrival)
                size += len(arrival.webhook.receipts)
        return group

    async def _store(self, source: _Source, group: Sequence[_Arrival]) -> None:
        """Store webhooks at once, and tell those who wait; where that fails, halves, so that one spoils it for no other."""
        try:
            proven = await self._ledger.ingest_webhooks(source[0], [arrival.webhook for arrival in group], source[1])
        except AftertouchError as error:
            for arrival in group:
                _answer(arrival, error)
        except Exception as error:
            half = len(group) // 2
            if half:
                await self._store(source, group[:half])
                await self._store(source, group[half:])
            else:
                _answer(group[0], error)
        else:
            for arrival, is_proven in zip(group, proven, strict=True):
                _answer(arrival, None if is_proven else TokenInvalid())

    def _call(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        call = asyncio.create_task(work, name="ingest webhooks")
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return call

    def _forget(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            # Whoever waits gets it; when the replay was stopped meanwhile, the next one meets the same.
            call.exception()

    def _check_origin(self, channel: str, webhook: Webhook) -> None:
        """Let no stranger write to the disk: of webhooks that are not signed, only tokens prove anything without the database."""
        if self._channels[channel].channel.capabilities.signed_webhooks:
            return
        if webhook.replies or webhook.standings or not self._ledger.are_tokens_ours(webhook.receipts):
            raise TokenInvalid
        if webhook.unrecognized or not all(receipt.token for receipt in webhook.receipts):
            raise DatabaseUnavailable

    async def _wait_for_rows(self, spool: Spool) -> None:
        if self._told_at:
            log.info("the spool is empty again", action="replay_spool", aside=spool.aside)
            self._told_at = 0.0
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                await self._spooled.wait()
        except TimeoutError:
            return

    def _tell(self, spool: Spool) -> None:
        now = asyncio.get_running_loop().time()
        if not self._told_at or now - self._told_at >= LOOK_SECONDS:
            self._told_at = now
            log.warning(
                "webhooks wait in the spool",
                action="replay_spool",
                waiting=spool.waiting,
                aside=spool.aside,
                megabytes=round(spool.size / 1e6, 1),
            )

    async def _replay(self, spool: Spool, source: _Source, rows: list[Spooled], *, is_last_try: bool = False) -> None:
        """Store rows of one channel at once, and delete them; where that fails, halves, down to the one that is set aside.

        Raises:
            AftertouchError: the database is away, or the ledger closed.
        """
        try:
            call = self._call(self._ledger.ingest_webhooks(source[0], [row.read() for row in rows], source[1]))
            await asyncio.wait({call})
            if not all(call.result()):
                raise TokenInvalid
        except AftertouchError:
            raise
        except Exception as error:
            half = len(rows) // 2
            if half:
                await self._replay(spool, source, rows[:half])
                await self._replay(spool, source, rows[half:])
            elif not is_last_try:
                # It may have shared its transaction with something else that could not be stored.
                await asyncio.sleep(RETRY_SECONDS)
                await self._replay(spool, source, rows, is_last_try=True)
            else:
                await spool.set_aside(rows[0], f"{type(error).__name__}: {error}")
                log.exception(
                    "a webhook in the spool cannot be stored and was set aside",
                    action="replay_spool",
                    channel=source[0],
                    row=rows[0].number,
                    aside=spool.aside,
                )
        else:
            self._has_failed = False
            await spool.delete(rows)


def _answer(arrival: _Arrival, error: Exception | None) -> None:
    """Tell who waits, if anybody still does."""
    if arrival.done.done():
        return
    if error is None:
        arrival.done.set_result(None)
    else:
        arrival.done.set_exception(error)
