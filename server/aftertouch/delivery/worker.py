"""The worker: claims work units, sends them, and goes on after whatever happens to it or to the database.

Every channel has as many units under way as it is given, whatever the others do: a provider that hangs holds up nobody
else's messages.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial

import psycopg
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.delivery.breaker import Breaker, BreakerSettings
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.control import stop_sending
from aftertouch.delivery.launch import launch_due
from aftertouch.delivery.leases import HEARTBEAT_SECONDS, LEASE, Lease
from aftertouch.delivery.leftovers import close_leftover
from aftertouch.delivery.pace import Pacer
from aftertouch.delivery.sender import Sender
from aftertouch.errors import ChannelNotReady, DatabaseUnavailable
from aftertouch.ingest.accounts import Account
from aftertouch.ingest.ledger import Ledger
from aftertouch.plugins import Registry
from aftertouch.store.apps import read_app
from aftertouch.store.campaigns import read_campaign
from aftertouch.store.engine import connect_listener, transaction
from aftertouch.store.units import CHANNEL, LeaseLost, claim_unit, prolong_leases, release_unit

log = structlog.get_logger()

POLL_SECONDS = 1.0
"""How long a free worker waits before it looks again. NOTIFY wakes it sooner, but polling is what guarantees it."""

DEFECT_DELAY = timedelta(minutes=1)
"""How long a unit rests that failed for no reason that is known."""


class Worker:
    """Sends the units of every campaign whose channel is ready, and launches what is due."""

    def __init__(
        self,
        engine: AsyncEngine,
        ledger: Ledger,
        registry: Registry,
        context: MessageContext,
        *,
        units: int,
        breaker: BreakerSettings | None = None,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._context = context
        self._registry = registry
        self._units = units
        self._pacer = Pacer(engine)
        self._breaker_settings = breaker or BreakerSettings()
        self._breakers: dict[int, tuple[int, Breaker]] = {}
        """By campaign, with the campaign's version: it changes when the campaign is resumed."""
        self._news = asyncio.Condition()
        self._is_stopping = False
        self._senders: dict[Lease, Sender] = {}
        self._used: dict[Lease, tuple[int, Account]] = {}
        """Which app's unit is sent by which account."""

    async def run(self, stopping: asyncio.Event) -> None:
        """Work until ``stopping`` is set. Units under way end between two batches and are handed back at once."""
        working = [
            asyncio.create_task(self._repeat(partial(self._send_one, name)), name=f"send {name} {index}")
            for name in sorted(self._registry.types)
            for index in range(self._units)
        ]
        if self._units:
            working.append(asyncio.create_task(self._repeat(self._launch_one), name="launch"))
            working.append(asyncio.create_task(self._repeat(self._close_one), name="close leftovers"))
        beside = [
            asyncio.create_task(self._listen(), name="listen for units"),
            asyncio.create_task(self._beat(), name="prolong leases"),
        ]
        waiting = asyncio.create_task(stopping.wait(), name="wait for the stop")
        try:
            await asyncio.wait([*working, *beside, waiting], return_when=asyncio.FIRST_COMPLETED)
        finally:
            # Nothing is cancelled that may have sent, or may have claimed: nobody is left attempted without outcome, and no
            # unit waits out its lease. Meanwhile the leases go on.
            self._is_stopping = True
            for sender in self._senders.values():
                sender.stop()
            await self._wake()
            done: list[object] = await asyncio.gather(*working, return_exceptions=True)
            for task in (*beside, waiting):
                task.cancel()
            done += await asyncio.gather(*beside, waiting, return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, Exception):
                raise outcome

    async def _repeat(self, work: Callable[[], Awaitable[bool]]) -> None:
        """Do it over and over; after it found nothing to do, when there may be news."""
        while not self._is_stopping:
            try:
                if await work():
                    continue
            except DatabaseUnavailable as error:
                log.warning("sending waits for the database", action="claim_unit", reason=error.reason)
            except Exception:
                # One defect must not end the others' work, nor a server's.
                log.exception("work failed", action="claim_unit")
            await self._rest()

    async def _rest(self) -> None:
        """Wait for news, or until it is time to look again; not at all when stopping."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_SECONDS), self._news:
                if not self._is_stopping:
                    await self._news.wait()

    async def _wake(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _launch_one(self) -> bool:
        async with transaction(self._engine) as conn:
            return await launch_due(conn, self._registry)

    async def _close_one(self) -> bool:
        return await close_leftover(self._engine, self._ledger, self._registry.types)

    async def _send_one(self, channel: str) -> bool:
        asked_at = time.monotonic()
        async with transaction(self._engine) as conn:
            # On a channel that the server cannot use itself, apps may have settings of their own.
            unit = await claim_unit(conn, channel, LEASE, of_owners=channel not in self._registry.channels)
        if unit is None:
            return False
        lease = Lease(unit, asked_at)
        # Also when the database goes away in the middle: the unit is still ours unless somebody took it meanwhile, which the
        # sender then finds.
        while True:
            try:
                await self._send(channel, lease)
                return True
            except DatabaseUnavailable as error:
                log.warning("sending waits for the database", action="send_unit", reason=error.reason)
            if self._is_stopping:
                return True
            await self._rest()

    async def _send(self, channel: str, lease: Lease) -> None:
        unit = lease.unit
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, unit.campaign_id)
        assert campaign is not None, "a launched campaign is never deleted"
        breaker = self._find_breaker(campaign.campaign_id, campaign.version)
        accounts = self._context.accounts
        with ExitStack() as held:
            try:
                async with transaction(self._engine) as conn:
                    choice = await accounts.choose(conn, await read_app(conn, campaign.app_id), channel)
                account = await accounts.open(choice)
                held.enter_context(accounts.hold(account))
            except ChannelNotReady as error:
                # The app's own settings: without any, nobody claims what the server's channel cannot send.
                await stop_sending(self._engine, campaign, f"{error}; mend it, then resume")
                async with transaction(self._engine) as conn:
                    await release_unit(conn, unit, unclear_since=lease.unclear_since)
                return
            await self._send_by(account, campaign.app_id, breaker, lease)

    async def _send_by(self, account: Account, app_id: int, breaker: Breaker, lease: Lease) -> None:
        unit, delay, types = lease.unit, timedelta(0), self._registry.types
        sender = Sender(
            *(self._engine, self._ledger, self._context, self._pacer, breaker, types, account.channel, lease, account.scope)
        )
        if self._is_stopping:
            sender.stop()
        self._senders[lease], self._used[lease] = sender, (app_id, account)
        try:
            await sender.run()
            return
        except LeaseLost:
            log.info("a unit was given up", action="send_unit", slot=unit.slot)
        except DatabaseUnavailable:
            raise
        except Exception:
            # A defect must not spin: the unit rests while the others go on.
            log.exception("a unit failed", action="send_unit", slot=unit.slot, channel=account.channel.name)
            delay = DEFECT_DELAY
        finally:
            del self._senders[lease], self._used[lease]
        # Whoever pauses or cancels the campaign waits for this.
        async with transaction(self._engine) as conn:
            await release_unit(conn, unit, delay, unclear_since=lease.unclear_since)

    def _find_breaker(self, campaign_id: int, version: int) -> Breaker:
        known, breaker = self._breakers.get(campaign_id, (None, None))
        if breaker is None or known != version:
            breaker = Breaker(self._breaker_settings)
            self._breakers = {key: value for key, value in list(self._breakers.items())[-100:] if key != campaign_id}
            self._breakers[campaign_id] = version, breaker
        return breaker

    async def _beat(self) -> None:
        """Prolong the leases of all units under way, and stop those that were lost, or whose campaign is not sent any more.

        One whose app has come to another account is handed back as well, and goes on by that.
        """
        while True:
            leases = list(self._senders)
            asked_at = time.monotonic()
            try:
                async with transaction(self._engine) as conn:
                    going_on = await prolong_leases(conn, [lease.unit for lease in leases], LEASE)
                    used = set(self._used.values())
                    outdated = await self._context.accounts.list_outdated(conn, used) if used else []
            except DatabaseUnavailable as error:
                log.warning("leases are not prolonged", action="prolong_leases", reason=error.reason)
            except Exception:
                # Who sends looks at the clock: nothing leaves after a lease has ended.
                log.exception("leases are not prolonged", action="prolong_leases")
            else:
                for lease in leases:
                    if lease.unit in going_on:
                        lease.renew(asked_at)
                    elif sender := self._senders.get(lease):
                        sender.stop()
                for lease, pair in self._used.items():
                    if pair in outdated:
                        self._senders[lease].stop()
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS), self._news:
                    await self._news.wait()

    async def _listen(self) -> None:
        """Wake everybody when a campaign is launched, paused or canceled. Without the connection they still poll."""
        while True:
            try:
                async with await connect_listener(self._engine) as pg:
                    await pg.execute(f"LISTEN {CHANNEL}")
                    async for _ in pg.notifies():
                        await self._wake()
            except (psycopg.Error, OSError) as error:
                log.warning("not listening for launches", action="listen", error=type(error).__name__)
                await asyncio.sleep(POLL_SECONDS)
