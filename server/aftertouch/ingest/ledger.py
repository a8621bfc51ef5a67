"""The way of every event into the receipts: who is meant, what it says, whether it can be, and then group commit.

Provider webhooks, callers' events and the outcomes of our own sends all come through here.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import structlog
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.channels import ReasonClass, Receipt
from aftertouch.declarations import ChannelType
from aftertouch.ingest.batcher import Batcher, EventBatch, store_events
from aftertouch.ingest.tokens import TokenCodec
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, SLOT_SHIFT
from aftertouch.rolls.sql import read_roll, read_roll_chunk
from aftertouch.store.campaigns import Campaign, find_campaigns, read_campaigns
from aftertouch.store.contacts import find_numbers, read_active_addresses, set_states
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind, intern_kinds
from aftertouch.store.tables import unrecognized_receipts

log = structlog.get_logger()

LATEST = timedelta(minutes=5)
"""How far ahead of our clock an event's time may be."""
MOST_KINDS = 10_000
"""Distinct signals with reasons; a code beyond them is stored as "other", so that nobody can flood the table."""
CACHED_CAMPAIGNS = 10_000
SERVER_SIGNALS = frozenset({"attempted", "skipped"})
"""Signals that only the server itself sets."""


@dataclass(frozen=True)
class ReportedEvent:
    """An event as a caller names it: by token, or by campaign id and external_id."""

    signal: str
    token: str | None = None
    campaign: str = ""
    external_id: str = ""
    reason_code: str = ""
    time: datetime | None = None


@dataclass(frozen=True)
class Rejection:
    """Why an event was left out: a name of ``IngestEventsResponse.Reason``."""

    index: int
    reason: str
    description: str


Reject = Callable[[int, str, str], None]
"""Notes an event's index, reason and description."""


@dataclass(frozen=True)
class Fact:
    """Something that became true of a position in a campaign."""

    campaign: Campaign
    position: int
    kind: Kind
    time: datetime


class TokenInvalid(Exception):
    """News whose only proof would have been its token, which is not one of ours."""


def clean_text(text: str) -> str:
    """Text that PostgreSQL can store: a provider's JSON may hold U+0000 and lone surrogates, and would be sent for days."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


class Ledger:
    """Takes events from everywhere in the process."""

    def __init__(self, engine: AsyncEngine, channels: Mapping[str, ChannelType], tokens: TokenCodec) -> None:
        self._engine = engine
        self._channels = channels
        self.tokens = tokens
        self._batcher = Batcher(engine)
        self._kinds: dict[Kind, int] = {}
        # A launched campaign's roll, channel and times never change.
        self._launched: OrderedDict[int, Campaign] = OrderedDict()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Ledger:
        self._task = asyncio.create_task(self._batcher.run(), name="commit events")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Commit what was taken, then stop."""
        await self._batcher.close()
        if self._task:
            await self._task

    async def record(self, facts: Sequence[Fact]) -> None:
        """Return when the facts are durable.

        Raises:
            DatabaseUnavailable: they may or may not be; record them again.
        """
        if facts:
            await self._batcher.submit(await self._encode(facts))

    async def record_within(self, conn: AsyncConnection, facts: Sequence[Fact]) -> None:
        """Write facts in the caller's transaction, where they must hold together with something else."""
        if facts:
            await store_events(conn, await self._encode(facts))

    async def _encode(self, facts: Sequence[Fact]) -> EventBatch:
        numbers = await self._number_kinds({fact.kind for fact in facts})
        positions = np.array([fact.position for fact in facts], np.int64)
        campaigns = np.array([fact.campaign.campaign_id for fact in facts], np.int64)
        recipients = np.array([fact.campaign.recipients for fact in facts], np.int64)
        chunks = positions >> CHUNK_BITS
        return EventBatch(
            slots=campaigns << SLOT_SHIFT | chunks,
            positions=(positions & (CHUNK - 1)).astype(np.int32),
            members=np.minimum(recipients - (chunks << CHUNK_BITS), CHUNK).astype(np.int32),
            kinds=np.array([numbers[fact.kind] for fact in facts], np.int32),
            times=np.array([int(fact.time.timestamp() * 1_000_000) for fact in facts], np.int64),
        )

    async def ingest_events(self, app_id: int, events: Sequence[ReportedEvent]) -> list[Rejection]:
        """Record a caller's events, durably, and return those that cannot be."""
        now = datetime.now(UTC)
        rejections: dict[int, Rejection] = {}

        def reject(index: int, reason: str, description: str) -> None:
            rejections.setdefault(index, Rejection(index, reason, description))

        targets: dict[int, tuple[Campaign, int]] = {}
        await self._find_by_token(app_id, events, targets, reject)
        await self._find_by_external_id(app_id, events, targets, reject)
        facts = []
        for index, (campaign, position) in targets.items():
            event = events[index]
            time = event.time or now
            channel = self._channels.get(campaign.channel)
            if channel is None or event.signal not in channel.evidence or event.signal in SERVER_SIGNALS:
                reject(index, "SIGNAL_UNKNOWN", f"{campaign.channel} has no signal {event.signal!r} that can be reported")
            elif time > now + LATEST or campaign.launch_time is None or time < campaign.launch_time - LATEST:
                reject(index, "TIME_OUT_OF_RANGE", "the time is before the campaign was launched, or ahead of the clock")
            else:
                facts.append(Fact(campaign, position, self._kind_of(campaign.channel, event.signal, event.reason_code), time))
        await self.record(facts)
        return [rejections[index] for index in sorted(rejections)]

    async def ingest_receipts(self, channel: str, receipts: Sequence[Receipt], unrecognized: Sequence[str] = ()) -> None:
        """Record what a provider reported on a channel, durably, with what follows for the subscriptions.

        What names no message of this channel is kept as unrecognized, if its origin is proven: the provider would only send it
        again.

        Raises:
            TokenInvalid: the channel's webhooks prove nothing by themselves; nothing was stored.
            DatabaseUnavailable: it may or may not be durable.
        """
        now = datetime.now(UTC)
        found = self.tokens.read([receipt.token or "" for receipt in receipts])
        launched = await self._read_launched(found.campaigns[found.valid].tolist())
        facts, strange = [], list(unrecognized)
        for receipt, campaign_id, position, valid in zip(
            receipts, found.campaigns.tolist(), found.positions.tolist(), found.valid.tolist(), strict=True
        ):
            campaign = launched.get(campaign_id) if valid else None
            known = campaign is not None and campaign.channel == channel and position < campaign.recipients
            if campaign is None or not known or receipt.signal not in self._channels[channel].evidence:
                if not self._channels[channel].channel.capabilities.signed_webhooks:
                    raise TokenInvalid("the token is not one of ours")
                strange.append(f"{receipt.signal} of message {receipt.message_id or 'without id'}: no such message or signal")
                continue
            kind = self._kind_of(channel, receipt.signal, clean_text(receipt.code or ""))
            facts.append(Fact(campaign, position, kind, receipt.time or now))
        if strange:
            log.warning("receipts were not recognized", action="ingest_receipts", channel=channel, count=len(strange))
            async with transaction(self._engine) as conn:
                await conn.execute(
                    insert(unrecognized_receipts), [{"channel": channel, "item": clean_text(item)[:10_000]} for item in strange]
                )
        await self.record(facts)
        await self._follow(channel, facts)

    async def _follow(self, channel: str, facts: Iterable[Fact]) -> None:
        """Change the subscriptions of people whose failure says that they are gone or said stop."""
        standing = {ReasonClass.OPTED_OUT: "opted_out", ReasonClass.RECIPIENT_GONE: "invalid"}
        wanted = [fact for fact in facts if fact.kind.signal == "failed" and fact.kind.reason_class in standing]
        by_app: dict[int, list[Fact]] = defaultdict(list)
        for fact in wanted:
            by_app[fact.campaign.app_id].append(fact)
        for app_id, group in by_app.items():
            async with transaction(self._engine) as conn:
                changes = []
                for fact in group:
                    roll = await read_roll_chunk(conn, fact.campaign.campaign_id << SLOT_SHIFT | fact.position >> CHUNK_BITS)
                    number = int(roll[fact.position & (CHUNK - 1)])
                    addresses = await read_active_addresses(conn, app_id, channel, number)
                    # A receipt names a person, not one of their addresses. "Stop" holds for all of them; "gone" only when
                    # there is no doubt which one is meant.
                    if fact.kind.reason_class == ReasonClass.OPTED_OUT or len(addresses) == 1:
                        state = standing[ReasonClass(fact.kind.reason_class)]
                        changes += [(number, channel, address, state, fact.kind.reason) for address in addresses]
                await set_states(conn, app_id, changes)

    def _kind_of(self, channel: str, signal: str, code: str) -> Kind:
        if signal != "failed":
            return Kind(signal)
        code = code or "unknown"
        kind = Kind(signal, self._channels[channel].channel.classify(code), code[:64])
        return kind if kind in self._kinds or len(self._kinds) < MOST_KINDS else Kind(signal, kind.reason_class, "other")

    async def _number_kinds(self, wanted: set[Kind]) -> Mapping[Kind, int]:
        if not wanted <= self._kinds.keys():
            async with transaction(self._engine) as conn:
                self._kinds |= await intern_kinds(conn, wanted)
        return self._kinds

    async def _read_launched(self, campaign_ids: Iterable[int]) -> dict[int, Campaign]:
        wanted = set(campaign_ids)
        found = {key: self._launched[key] for key in wanted if key in self._launched}
        if missing := list(wanted - found.keys()):
            async with transaction(self._engine) as conn:
                read = await read_campaigns(conn, missing)
            self.remember(campaign for campaign in read.values() if campaign.launch_time)
            found |= {key: campaign for key, campaign in read.items() if campaign.launch_time}
        return found

    def remember(self, campaigns: Iterable[Campaign]) -> None:
        """Keep launched campaigns at hand."""
        for campaign in campaigns:
            self._launched[campaign.campaign_id] = campaign
        while len(self._launched) > CACHED_CAMPAIGNS:
            self._launched.popitem(last=False)

    async def _find_by_token(
        self, app_id: int, events: Sequence[ReportedEvent], targets: dict[int, tuple[Campaign, int]], reject: Reject
    ) -> None:
        indexes = [index for index, event in enumerate(events) if event.token is not None]
        found = self.tokens.read([events[index].token or "" for index in indexes])
        launched = await self._read_launched(found.campaigns[found.valid].tolist())
        for index, campaign_id, position, valid in zip(
            indexes, found.campaigns.tolist(), found.positions.tolist(), found.valid.tolist(), strict=True
        ):
            campaign = launched.get(campaign_id) if valid else None
            if campaign is None or campaign.app_id != app_id or position >= campaign.recipients:
                reject(index, "TOKEN_INVALID", "the token is not one of ours")
            else:
                targets[index] = (campaign, position)

    async def _find_by_external_id(
        self, app_id: int, events: Sequence[ReportedEvent], targets: dict[int, tuple[Campaign, int]], reject: Reject
    ) -> None:
        indexes = [index for index, event in enumerate(events) if event.token is None]
        if not indexes:
            return
        async with transaction(self._engine) as conn:
            campaigns = await find_campaigns(conn, app_id, list({events[index].campaign for index in indexes}))
            numbers = await find_numbers(conn, app_id, list({events[index].external_id for index in indexes}))
            rolls = {name: await read_roll(conn, found.campaign_id) for name, found in campaigns.items() if found.launch_time}
        for index in indexes:
            event = events[index]
            roll, number = rolls.get(event.campaign), numbers.get(event.external_id)
            if roll is None:
                reject(index, "CAMPAIGN_UNKNOWN", f"no launched campaign {event.campaign!r}")
            elif number is None:
                reject(index, "CONTACT_UNKNOWN", f"no contact {event.external_id!r}")
            else:
                position = int(np.searchsorted(roll, number))
                if position < len(roll) and roll[position] == number:
                    targets[index] = (campaigns[event.campaign], position)
                else:
                    reject(index, "NOT_A_RECIPIENT", f"{event.external_id!r} is not a recipient of {event.campaign!r}")
