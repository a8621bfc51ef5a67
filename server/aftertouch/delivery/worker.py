"""The worker: claims work units, sends them, and goes on after whatever happens to it or to the database."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import psycopg
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.delivery.sender import LEASE, Sender
from aftertouch.errors import DatabaseUnavailable
from aftertouch.ingest.ledger import Ledger
from aftertouch.plugins import Registry
from aftertouch.store.campaigns import read_campaign
from aftertouch.store.engine import connect_listener, transaction
from aftertouch.store.units import CHANNEL, LeaseLost, Unit, claim_unit

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""How long a free worker waits before it looks again. NOTIFY wakes it sooner, but polling is what guarantees it."""


class Worker:
    """Sends the units of every campaign whose channel is ready."""

    def __init__(self, engine: AsyncEngine, ledger: Ledger, registry: Registry, *, units: int) -> None:
        self._engine = engine
        self._ledger = ledger
        self._registry = registry
        self._units = units
        self._news = asyncio.Event()
        self._is_stopping = False
        self._senders: set[Sender] = set()

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until ``stopping`` is set. Units under way end between two batches and are handed back at once."""
        working = [asyncio.create_task(self._work(), name=f"send units {index}") for index in range(self._units)]
        beside = [
            asyncio.create_task(self._listen(), name="listen for units"),
            asyncio.create_task(stopping.wait(), name="wait for the stop"),
        ]
        try:
            await asyncio.wait([*working, *beside], return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Nothing is cancelled that may have sent, or may have claimed: nobody is left attempted without outcome, and no
            # unit waits out its lease.
            self._is_stopping = True
            self._news.set()
            for sender in self._senders:
                sender.stop()
            done: list[object] = await asyncio.gather(*working, return_exceptions=True)
            for task in beside:
                task.cancel()
            done += await asyncio.gather(*beside, return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, Exception):
                raise outcome

    async def _work(self) -> None:
        while not self._is_stopping:
            try:
                unit = await self._claim()
                if unit is not None:
                    await self._send(unit)
                    continue
            except DatabaseUnavailable as error:
                log.warning("sending waits for the database", action="claim_unit", reason=error.reason)
            await self._rest()

    async def _rest(self) -> None:
        """Wait for news, or until it is time to look again; not at all when stopping."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS):
                await self._news.wait()
        if not self._is_stopping:
            self._news.clear()

    async def _claim(self) -> Unit | None:
        async with transaction(self._engine) as conn:
            return await claim_unit(conn, sorted(self._registry.channels), LEASE)

    async def _send(self, unit: Unit) -> None:
        """Send a unit to its end, also when the database goes away in the middle: what is left then is not lost."""
        while True:
            try:
                await self._try_to_send(unit)
                return
            except DatabaseUnavailable as error:
                # The unit is still ours unless somebody took it meanwhile, which the sender then finds.
                log.warning("sending waits for the database", action="send_unit", reason=error.reason)
            if self._is_stopping:
                return
            await self._rest()

    async def _try_to_send(self, unit: Unit) -> None:
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, unit.campaign_id)
        if campaign is None:
            return
        name = campaign.channel
        sender = Sender(self._engine, self._ledger, self._registry.types[name], self._registry.channels[name], unit)
        if self._is_stopping:
            sender.stop()
        self._senders.add(sender)
        try:
            await sender.run()
        except LeaseLost:
            log.info("a unit was given up", action="send_unit", slot=unit.slot)
        except DatabaseUnavailable:
            raise
        except Exception:
            # A defect must not spin: the unit waits out its lease while the others go on.
            log.exception("a unit failed", action="send_unit", slot=unit.slot)
        finally:
            self._senders.discard(sender)

    async def _listen(self) -> None:
        """Wake free workers when a campaign is launched. Without the connection they still poll."""
        while True:
            try:
                async with await connect_listener(self._engine) as pg:
                    await pg.execute(f"LISTEN {CHANNEL}")
                    async for _ in pg.notifies():
                        self._news.set()
            except (psycopg.Error, OSError) as error:
                log.warning("not listening for launches", action="listen", error=type(error).__name__)
                await asyncio.sleep(POLL_SECONDS)
