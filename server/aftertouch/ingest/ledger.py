"""The ledger: every event's way into the receipts, from callers, from providers, and from our own sends."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.channels import ReasonClass, Receipt, Reply, Webhook
from aftertouch.declarations import ChannelType
from aftertouch.errors import DatabaseUnavailable
from aftertouch.ingest.batcher import RETRY_SECONDS, Batcher, Submission
from aftertouch.ingest.inbound import apply_standings, find_answered
from aftertouch.ingest.lookups import Lookups
from aftertouch.ingest.reports import Rejection, Reports, kind_of, place_reports
from aftertouch.ingest.tokens import TEST_POSITION, TokenCodec
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, SLOT_SHIFT, Numbers, members_of
from aftertouch.rolls.sql import read_roll_chunk
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import hold_addresses, read_active_addresses, set_states
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.logs import MICROSECONDS, TEST_ROW, Attempt, EventBatch, find_messages, keep_unrecognized, store_events
from aftertouch.store.producers import Stream

log = structlog.get_logger()


class Fact(NamedTuple):
    """Something that became true of a position in a campaign; a tuple, since there are two for every message."""

    campaign: Campaign
    position: int
    kind: Kind
    time: datetime


class Tried(NamedTuple):
    """A message that was handed to a provider, and what came of it."""

    campaign: Campaign
    position: int
    kind: Kind
    address_hash: bytes
    message_id: str


def clean_text(text: str) -> str:
    """Text that PostgreSQL can store: a provider's JSON may hold U+0000 and lone surrogates, and would be sent for days."""
    return text.encode(errors="replace").decode().replace("\0", "\ufffd")


class Ledger:
    """Takes events from everywhere in the process."""

    def __init__(self, engine: AsyncEngine, channels: Mapping[str, ChannelType], tokens: TokenCodec) -> None:
        self._engine = engine
        self._channels = channels
        self.tokens = tokens
        self.lookups = Lookups(engine)
        self._batcher = Batcher(engine)
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Ledger:
        self._task = asyncio.create_task(self._batcher.run(), name="commit events")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Commit what was taken, then stop."""
        await self._batcher.close()
        if self._task:
            await self._task

    @property
    def waiting_count(self) -> int:
        """Events that were taken and are not durable yet."""
        return self._batcher.waiting_count

    def lose_patience(self) -> None:
        """Wait for no database that is away from now on: the process stops, and must not wait for ever."""
        self._batcher.is_patient = False

    async def record(self, facts: Sequence[Fact], tried: Sequence[Tried] = ()) -> None:
        """Return when the facts, and the attempts they came from, are durable; waits while the database is away."""
        if facts or tried:
            kinds = {fact.kind for fact in facts} | {item.kind for item in tried}
            numbers = await self._number_patiently(kinds)
            attempts = [
                Attempt(
                    item.campaign.campaign_id << SLOT_SHIFT | item.position >> CHUNK_BITS,
                    item.position & (CHUNK - 1),
                    numbers[item.kind],
                    item.address_hash,
                    item.campaign.channel,
                    item.message_id,
                )
                for item in tried
            ]
            await (await self._batcher.submit(Submission(encode_facts(facts, numbers), attempts, is_patient=True)))

    async def record_within(self, conn: AsyncConnection, facts: Sequence[Fact]) -> None:
        """Write facts in the caller's transaction, where they must hold together with something else."""
        await store_events(conn, encode_facts(facts, await self.lookups.number_kinds({fact.kind for fact in facts})))

    async def ingest_reports(self, app: App, reports: Reports) -> list[Rejection]:
        """Record a caller's events, durably, and return those that cannot be.

        Raises:
            DatabaseUnavailable: they may or may not be durable.
        """
        batch, rejections = await self.place(app, reports)
        await (await self._batcher.submit(Submission(batch)))
        return rejections

    async def ingest_reports_within(
        self, begin: Callable[[], Awaitable[AsyncConnection]], app: App, reports: Reports
    ) -> list[Rejection]:
        """Record a caller's events in the transaction that the caller begins, and return those that cannot be."""
        batch, rejections = await self.place(app, reports)
        await store_events(await begin(), batch)
        return rejections

    async def place(self, app: App, reports: Reports) -> tuple[EventBatch, list[Rejection]]:
        """Whom a caller's events are about, and those that cannot be taken."""
        return await place_reports(self._engine, self.lookups, self.tokens, self._channels, app, reports)

    async def append(self, stream: Stream, position: int, batch: EventBatch, rejected: int) -> asyncio.Future[None]:
        """Take the batch of a stream; the future is done when it is durable, and waits while the database is away.

        Args:
            rejected: how many of its events were left out, to be counted with it.

        The future raises ``StreamSuperseded`` when a newer stream was opened.
        """
        return await self._batcher.submit(Submission(batch, stream=stream, position=position, rejected=rejected, is_patient=True))

    async def ingest_webhooks(self, channel: str, webhooks: Sequence[Webhook], app_id: int | None = None) -> list[bool]:
        """Record what a provider reported on a channel, durably and at once, with what follows for the subscriptions.

        Args:
            app_id: the app to whose own account it was reported, which can say nothing of other apps' people; None for the
                server's account.

        What names no message of this channel is kept as unrecognized, if its origin is proven: the provider would only send it
        again. Where it is not, because the channel's webhooks prove nothing by themselves, nothing of the webhook is stored.

        Returns:
            For each webhook whether its origin is proven.

        Raises:
            DatabaseUnavailable: they may or may not be durable.
        """
        now = datetime.now(UTC)
        declared = self._channels[channel]
        is_signed = declared.channel.capabilities.signed_webhooks
        targets = iter(
            await self._find_targets(channel, [receipt for webhook in webhooks for receipt in webhook.receipts], app_id)
        )
        facts: list[Fact] = []
        strange: list[str] = []
        proven: list[bool] = []
        taken: list[Webhook] = []
        for webhook in webhooks:
            found, odd = [], []
            # The receipts first: of an iterator that has come to its end, zip would have taken one more target.
            for receipt, (campaign, position) in zip(webhook.receipts, targets, strict=False):
                if position == TEST_POSITION:
                    # News of a test send, which nobody counts.
                    continue
                if campaign is None or receipt.signal not in declared.evidence:
                    odd.append(f"{receipt.signal} of message {receipt.message_id or 'without id'}: no such message or signal")
                    continue
                kind = kind_of(declared, receipt.signal, clean_text(receipt.code or ""))
                found.append(Fact(campaign, position, kind, receipt.time or now))
            proven.append(is_signed or not (odd or webhook.replies or webhook.standings))
            if proven[-1]:
                taken.append(webhook)
                facts += found
                strange += (*webhook.unrecognized, *odd)
        facts += await self._attribute(declared, [reply for webhook in taken for reply in webhook.replies], app_id)
        if strange:
            log.warning("receipts were not recognized", action="ingest_webhooks", channel=channel, count=len(strange))
            async with transaction(self._engine) as conn:
                await keep_unrecognized(conn, channel, [clean_text(item)[:10_000] for item in strange])
        if facts:
            numbers = await self.lookups.number_kinds({fact.kind for fact in facts})
            await (await self._batcher.submit(Submission(encode_facts(facts, numbers))))
        await self._follow(channel, facts)
        if standings := [standing for webhook in taken for standing in webhook.standings]:
            async with transaction(self._engine) as conn:
                changed = await apply_standings(conn, channel, standings, app_id)
            log.info("people said stop or start", action="ingest_webhooks", channel=channel, told=len(standings), changed=changed)
        return proven

    async def _attribute(self, declared: ChannelType, replies: Sequence[Reply], app_id: int | None) -> list[Fact]:
        """What replies say of the messages that they answer. Who writes without having been written to is no news."""
        if not replies:
            return []
        channel, now = declared.channel.name, datetime.now(UTC)
        named = [Receipt(signal=reply.signal, message_id=reply.message_id) for reply in replies]
        targets = await self._find_targets(channel, named, app_id)
        unnamed = [at for at, (campaign, position) in enumerate(targets) if campaign is None and position != TEST_POSITION]
        async with transaction(self._engine) as conn:
            for at in unnamed:
                targets[at] = await find_answered(conn, channel, replies[at], app_id) or (None, 0)
        if late := [at for at in unnamed if targets[at][0] is None and replies[at].message_id]:
            # An answer may outrun the record of what it answers, which has come between the two looks.
            for at, target in zip(late, await self._find_targets(channel, [named[at] for at in late], app_id), strict=True):
                targets[at] = target
        return [
            Fact(campaign, position, Kind(reply.signal), reply.time or now)
            for reply, (campaign, position) in zip(replies, targets, strict=True)
            if campaign is not None and reply.signal in declared.evidence
        ]

    def are_tokens_ours(self, receipts: Sequence[Receipt]) -> bool:
        """True when every token of the receipts was made by us; needs no database."""
        return bool(self.tokens.read([receipt.token for receipt in receipts if receipt.token]).valid.all())

    async def _find_targets(
        self, channel: str, receipts: Sequence[Receipt], app_id: int | None
    ) -> list[tuple[Campaign | None, int]]:
        """Campaign and position of each receipt; None for one that names no message of the channel, and of the one app."""
        found = self.tokens.read([receipt.token or "" for receipt in receipts])
        targets = [
            (number, position) if valid else (0, 0)
            for number, position, valid in zip(
                found.campaigns.tolist(), found.positions.tolist(), found.valid.tolist(), strict=True
            )
        ]
        by_message = [index for index, receipt in enumerate(receipts) if not receipt.token and receipt.message_id]
        if by_message:
            async with transaction(self._engine) as conn:
                message_ids = [receipts[index].message_id or "" for index in by_message]
                attempts = await find_messages(conn, channel, message_ids, app_id)
            for index in by_message:
                if attempt := attempts.get(receipts[index].message_id or ""):
                    chunk = attempt.slot & ((1 << SLOT_SHIFT) - 1)
                    is_test = attempt.position == TEST_ROW
                    position = TEST_POSITION if is_test else chunk * CHUNK + attempt.position
                    targets[index] = (attempt.slot >> SLOT_SHIFT, position)
        launched = await self.lookups.read_launched(number for number, _ in targets if number)
        placed: list[tuple[Campaign | None, int]] = []
        for number, position in targets:
            campaign = launched.get(number)
            is_ours = campaign is not None and campaign.channel == channel and position < campaign.recipients
            is_ours = is_ours and (app_id is None or (campaign is not None and campaign.app_id == app_id))
            placed.append((campaign if is_ours else None, position))
        return placed

    async def _follow(self, channel: str, facts: Iterable[Fact]) -> None:
        """Change the subscriptions of people whose failure says that they are gone, said stop, or are to be left alone."""
        declared = self._channels[channel].channel
        standing = {ReasonClass.OPTED_OUT: "opted_out", ReasonClass.RECIPIENT_GONE: "invalid"}
        by_app: dict[int, list[Fact]] = defaultdict(list)
        for fact in facts:
            if fact.kind.signal == "failed" and fact.kind.reason_class in (*standing, ReasonClass.CAPPED):
                by_app[fact.campaign.app_id].append(fact)
        for app_id, group in by_app.items():
            async with transaction(self._engine) as conn:
                changes = []
                holds = []
                rolls: dict[int, Numbers] = {}
                for fact in group:
                    slot = fact.campaign.campaign_id << SLOT_SHIFT | fact.position >> CHUNK_BITS
                    if slot not in rolls:
                        rolls[slot] = await read_roll_chunk(conn, slot)
                    number = int(rolls[slot][fact.position & (CHUNK - 1)])
                    addresses = await read_active_addresses(conn, app_id, channel, number)
                    if fact.kind.reason_class == ReasonClass.CAPPED:
                        until = fact.time + declared.find_cap(fact.kind.reason_code)
                        holds += [(number, channel, address, until) for address in addresses]
                    # A receipt names a person, not one of their addresses. "Stop" holds for all of them; "gone" only when
                    # there is no doubt which one is meant.
                    elif fact.kind.reason_class == ReasonClass.OPTED_OUT or len(addresses) == 1:
                        state = standing[ReasonClass(fact.kind.reason_class)]
                        changes += [(number, channel, address, state, fact.kind.reason) for address in addresses]
                await set_states(conn, app_id, changes)
                await hold_addresses(conn, app_id, holds)

    async def _number_patiently(self, kinds: set[Kind]) -> Mapping[Kind, int]:
        """The numbers of kinds, however long the database is away: what happened must not be forgotten."""
        while True:
            try:
                return await self.lookups.number_kinds(kinds)
            except DatabaseUnavailable:
                if not self._batcher.is_patient:
                    raise
                await asyncio.sleep(RETRY_SECONDS)


def encode_facts(facts: Sequence[Fact], numbers: Mapping[Kind, int]) -> EventBatch:
    """Facts as columns."""
    # Of thousands of facts there are a few campaigns, kinds and times: each is looked at once.
    stamps = {time: int(time.timestamp() * MICROSECONDS) for time in {fact.time for fact in facts}}
    positions = np.array([fact.position for fact in facts], np.int64)
    campaigns = np.array([fact.campaign.campaign_id for fact in facts], np.int64)
    recipients = np.array([fact.campaign.recipients for fact in facts], np.int64)
    chunks = positions >> CHUNK_BITS
    return EventBatch(
        slots=campaigns << SLOT_SHIFT | chunks,
        positions=(positions & (CHUNK - 1)).astype(np.int32),
        members=members_of(recipients, chunks),
        kinds=np.array([numbers[fact.kind] for fact in facts], np.int32),
        times=np.array([stamps[fact.time] for fact in facts], np.int64),
    )
