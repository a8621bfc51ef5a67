"""The worker: claims work units, sends them, and goes on after whatever happens to it or to the database."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import psycopg
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.delivery.sender import LEASE, Sender
from aftertouch.errors import AftertouchError, DatabaseUnavailable
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

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until ``stopping`` is set. A unit under way is cut off between two batches and handed back at once."""
        tasks = [asyncio.create_task(self._work(), name=f"send units {index}") for index in range(self._units)]
        tasks.append(asyncio.create_task(self._listen(), name="listen for units"))
        stop = asyncio.create_task(stopping.wait())
        done, _ = await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        for task in [*tasks, stop]:
            task.cancel()
        await asyncio.gather(*tasks, stop, return_exceptions=True)
        for task in done - {stop}:
            task.result()

    async def _work(self) -> None:
        while True:
            try:
                unit = await self._claim()
                if unit is not None:
                    await self._send(unit)
                    continue
            except AftertouchError as error:
                log.warning("sending waits for the database", action="send_unit", reason=error.reason)
                await asyncio.sleep(POLL_SECONDS)
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._news.wait()
            self._news.clear()

    async def _claim(self) -> Unit | None:
        async with transaction(self._engine) as conn:
            return await claim_unit(conn, sorted(self._registry.channels), LEASE)

    async def _send(self, unit: Unit) -> None:
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, unit.campaign_id)
        if campaign is None:
            return
        name = campaign.channel
        while True:
            sender = Sender(self._engine, self._ledger, self._registry.types[name], self._registry.channels[name], unit)
            try:
                await self._run(sender, unit)
                return
            except DatabaseUnavailable as error:
                # The unit is still ours unless somebody took it meanwhile, which the sender then finds.
                log.warning("sending waits for the database", action="send_unit", reason=error.reason)
                await asyncio.sleep(POLL_SECONDS)

    async def _run(self, sender: Sender, unit: Unit) -> None:
        sending = asyncio.create_task(sender.run())
        try:
            await asyncio.shield(sending)
        except LeaseLost:
            log.info("a unit was given up", action="send_unit", slot=unit.slot)
        except asyncio.CancelledError:
            # An orderly stop lets the batch under way finish and be recorded; nobody is left attempted without outcome.
            sender.stop()
            await asyncio.gather(sending, return_exceptions=True)
            raise
        except AftertouchError:
            raise
        except Exception:
            # A defect must not spin: the unit waits out its lease while the others go on.
            log.exception("a unit failed", action="send_unit", slot=unit.slot)

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
