"""The intake: providers' receipts on their way into the ledger, by way of the spool while the database is away.

Whoever comes back without an exception may answer 2xx: the receipts are durable, in the database or on this machine's disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import structlog

from aftertouch.channels import Receipt
from aftertouch.declarations import ChannelType
from aftertouch.errors import AftertouchError, DatabaseUnavailable
from aftertouch.ingest.batcher import RETRY_SECONDS
from aftertouch.ingest.ledger import Ledger, TokenInvalid
from aftertouch.ingest.spool import Spool, Spooled

log = structlog.get_logger()

ANSWER_SECONDS = 3.0
"""For the database. Twilio gives up after 15 seconds (Twilio: webhook connection overrides) and a browser ends a service worker
when it likes; a commit takes milliseconds."""
LOOK_SECONDS = 60.0
"""Between two looks at an empty spool, for what another server on the same directory left; and between two lines in the log."""
STOP_SECONDS = 2.0
"""For calls into a database that does not answer to end, once they are told to."""


class Intake:
    """Takes what providers report. Run ``replay`` beside it, and close it before the spool."""

    def __init__(self, ledger: Ledger, channels: Mapping[str, ChannelType], spool: Spool | None) -> None:
        self._ledger = ledger
        self._channels = channels
        self._spool = spool
        self._calls: set[asyncio.Task[None]] = set()
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

    async def take(self, channel: str, receipts: Sequence[Receipt], unrecognized: Sequence[str]) -> None:
        """Return when they are durable, within seconds whatever the database does.

        Raises:
            TokenInvalid: the channel's webhooks prove nothing by themselves; nothing was stored.
            DatabaseUnavailable: the database is away, and there is no spool or nothing that proves the receipts without it.
            SpoolFull: the database is away, and there is no room.
            sqlite3.Error: the database is away, and the disk is full or broken.
        """
        if not receipts and not unrecognized:
            return
        arrive_time = datetime.now(UTC)
        if not self._is_away:
            call = self._call(channel, receipts, unrecognized)
            # Not cancelled when its time is up: psycopg would wait for the server's word on that, which may never come.
            await asyncio.wait({call}, timeout=ANSWER_SECONDS)
            if call.done() and not isinstance(call.exception(), DatabaseUnavailable):
                call.result()
                return
        self._check_origin(channel, receipts, unrecognized)
        if self._spool is None:
            raise DatabaseUnavailable
        self._has_failed = True
        await self._spool.add(channel, receipts, unrecognized, arrive_time)
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
                by_channel: dict[str, list[Spooled]] = defaultdict(list)
                for row in rows:
                    by_channel[row.channel].append(row)
                for channel, group in by_channel.items():
                    await self._replay(spool, channel, group)
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

    def _call(self, channel: str, receipts: Sequence[Receipt], unrecognized: Sequence[str]) -> asyncio.Task[None]:
        call = asyncio.create_task(self._ledger.ingest_receipts(channel, receipts, unrecognized), name="ingest receipts")
        self._calls.add(call)
        call.add_done_callback(self._forget)
        return call

    def _forget(self, call: asyncio.Task[None]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            # Whoever waits gets it; of a call that was answered from the spool, the replay meets the same.
            call.exception()

    def _check_origin(self, channel: str, receipts: Sequence[Receipt], unrecognized: Sequence[str]) -> None:
        """Let no stranger write to the disk: of webhooks that are not signed, only tokens prove anything without the database."""
        if self._channels[channel].channel.capabilities.signed_webhooks:
            return
        if not self._ledger.are_tokens_ours(receipts):
            raise TokenInvalid("the token is not one of ours")
        if unrecognized or not all(receipt.token for receipt in receipts):
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

    async def _replay(self, spool: Spool, channel: str, rows: list[Spooled], *, is_last_try: bool = False) -> None:
        """Store rows of one channel at once, and delete them; where that fails, halves, down to the one that is set aside.

        Raises:
            AftertouchError: the database is away, or the ledger closed.
        """
        try:
            receipts = [receipt for row in rows for receipt in row.read_receipts()]
            unrecognized = [item for row in rows for item in row.read_unrecognized()]
            call = self._call(channel, receipts, unrecognized)
            await asyncio.wait({call})
            call.result()
        except AftertouchError:
            raise
        except Exception as error:
            half = len(rows) // 2
            if half:
                await self._replay(spool, channel, rows[:half])
                await self._replay(spool, channel, rows[half:])
            elif not is_last_try:
                # It may have shared its transaction with something else that could not be stored.
                await asyncio.sleep(RETRY_SECONDS)
                await self._replay(spool, channel, rows, is_last_try=True)
            else:
                await spool.set_aside(rows[0], f"{type(error).__name__}: {error}")
                log.exception(
                    "a webhook in the spool cannot be stored and was set aside",
                    action="replay_spool",
                    channel=channel,
                    row=rows[0].number,
                    aside=spool.aside,
                )
        else:
            self._has_failed = False
            await spool.delete(rows)
