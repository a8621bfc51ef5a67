"""Reconciliation: asking providers what became of messages of which nothing was heard, since webhooks get lost.

Twilio gives a callback up after seconds, and a server may be away for longer. So every message that was taken is looked at
again at a few ages, and the provider asked about those without any news. What it says is stored like a webhook.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Channel, Receipt, Webhook
from aftertouch.delivery.calls import LONGEST_CALL
from aftertouch.errors import AftertouchError, ChannelNotReady
from aftertouch.ingest.accounts import Accounts
from aftertouch.ingest.ledger import Ledger
from aftertouch.plugins import Registry
from aftertouch.rolls.chunks import SLOT_SHIFT
from aftertouch.store.app_secrets import list_owners
from aftertouch.store.apps import read_app
from aftertouch.store.campaigns import read_campaigns
from aftertouch.store.checkups import Checkup, claim_checkup, note_checked, read_unheard
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import load_kinds

log = structlog.get_logger()

AGES = (timedelta(minutes=10), timedelta(hours=1), timedelta(hours=12))
"""Nearly all receipts come within seconds. A carrier may take a while, a phone be off; Twilio's queue holds for ten hours."""
OLDEST = timedelta(days=2)
"""Nothing is asked about messages before that, however long no server ran."""
SLICE = timedelta(minutes=1)
"""Messages are looked at minute by minute, so that a crash repeats little."""
LOOK_SECONDS = 60.0
ASKED_PER_SECOND = 20
"""Of one channel: campaigns have the provider to themselves, more or less, and there is no hurry."""
_PAGE = 1_000
_LEASE = timedelta(minutes=2)
_SILENT = frozenset({"attempted", "refused", "skipped", "sent"})
"""Signals that say nothing of what became of a message after it was taken."""


class Reconciler:
    """Asks the channels that can be asked."""

    def __init__(
        self, engine: AsyncEngine, ledger: Ledger, registry: Registry, accounts: Accounts, ages: Sequence[timedelta] = AGES
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._registry = registry
        self._accounts = accounts
        self._channels = [name for name, found in sorted(registry.types.items()) if found.channel.capabilities.fetch_receipts]
        self._ages = ages

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.check()

    async def check(self) -> None:
        """Ask every channel about what has come to one of the ages."""
        await asyncio.gather(*(self._check(channel) for channel in self._channels))

    async def _check(self, channel: str) -> None:
        try:
            async with transaction(self._engine) as conn:
                # Without either, another process may be able to ask.
                if channel not in self._registry.channels and not await list_owners(conn, channel):
                    return
            for age in self._ages:
                async with transaction(self._engine) as conn:
                    checkup = await claim_checkup(conn, channel, age, _LEASE, OLDEST)
                if checkup is not None:
                    await self._examine(channel, checkup)
        except AftertouchError as error:
            log.warning("asking for receipts waits for the database", action="reconcile", reason=error.reason)
        except Exception:
            # A defect of ours here is no reason to take no webhooks.
            log.exception("asking for receipts failed", action="reconcile", channel=channel)

    async def _examine(self, channel: str, checkup: Checkup) -> None:
        start = checkup.start
        while start < checkup.end:
            end = min(start + SLICE, checkup.end)
            after = (0, 0, "")
            while True:
                async with transaction(self._engine) as conn:
                    numbered = await load_kinds(conn)
                    sent = [number for number, kind in numbered.items() if kind.signal == "sent"]
                    heard = [number for number, kind in numbered.items() if kind.signal not in _SILENT]
                    unheard = await read_unheard(conn, channel, sent, heard, (start, end), after, _PAGE)
                if not unheard:
                    break
                after = unheard[-1]
                by_campaign: dict[int, list[str]] = defaultdict(list)
                for slot, _, message_id in unheard:
                    by_campaign[slot >> SLOT_SHIFT].append(message_id)
                for group, message_ids in (await self._group(channel, by_campaign)).items():
                    await self._ask(channel, group, checkup, message_ids)
            start = end
            async with transaction(self._engine) as conn:
                # The next claim may come at once, from here or from another process.
                await note_checked(conn, checkup, end, _LEASE if start < checkup.end else timedelta(0))

    async def _group(self, channel: str, by_campaign: Mapping[int, Sequence[str]]) -> Mapping[int | None, list[str]]:
        """Messages by the app whose own account they went through; None for the server's."""
        async with transaction(self._engine) as conn:
            owners = await list_owners(conn, channel)
            campaigns = await read_campaigns(conn, list(by_campaign)) if owners else {}
        apps = {number: campaign.app_id for number, campaign in campaigns.items() if campaign.app_id in owners}
        groups: dict[int | None, list[str]] = defaultdict(list)
        for campaign_id, message_ids in by_campaign.items():
            groups[apps.get(campaign_id)] += message_ids
        return groups

    async def _ask(self, channel: str, app_id: int | None, checkup: Checkup, message_ids: Sequence[str]) -> None:
        found = 0
        with ExitStack() as held:
            try:
                async with transaction(self._engine) as conn:
                    app = None if app_id is None else await read_app(conn, app_id)
                    choice = await self._accounts.choose(conn, app, channel)
                account = await self._accounts.open(choice)
                asked = held.enter_context(self._accounts.hold(account))
            except ChannelNotReady:
                # Whoever cannot send cannot ask either; the next age may find it mended.
                return
            size = asked.capabilities.batch_size
            for at in range(0, len(message_ids), size):
                batch = message_ids[at : at + size]
                receipts = await fetch_receipts(asked, batch)
                if receipts:
                    await self._ledger.ingest_webhooks(channel, [Webhook(receipts=tuple(receipts))], account.app_id)
                    found += len(receipts)
                await asyncio.sleep(len(batch) / ASKED_PER_SECOND)
                async with transaction(self._engine) as conn:
                    await note_checked(conn, checkup, checkup.start, _LEASE)
        log.info("a provider was asked for receipts", action="reconcile", channel=channel, asked=len(message_ids), found=found)


async def fetch_receipts(channel: Channel, message_ids: Sequence[str]) -> list[Receipt]:
    """Have the channel ask for receipts; a call that failed found none."""
    try:
        async with asyncio.timeout(LONGEST_CALL.total_seconds()):
            found = list(await channel.fetch_receipts(message_ids))
        if not all(isinstance(receipt, Receipt) and receipt.message_id in message_ids for receipt in found):
            raise TypeError("fetch_receipts returned something else than receipts of these messages")
    except Exception:
        log.exception("a channel failed", action="reconcile", channel=channel.name)
        return []
    return found
