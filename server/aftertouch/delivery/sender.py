"""The send loop of one work unit: who is still to be sent to, try after try, and what became of each.

Before a batch of provider calls each of its people is marked ``attempted`` in the receipts, in the transaction that
proves the unit's lease; afterwards the outcomes are recorded. So after any crash the receipts say exactly who may have
been messaged: somebody attempted without outcome is sent to again only on a channel whose sends are idempotent, and
elsewhere is left to the receipt that settles it.

A refusal that may be tried again is recorded too, as ``refused``, with the number of the try. Bits are only ever set, so
each try has its own pair: a person's tries are the ``attempted`` bits, and when as many are ``refused``, the next may
begin.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Accepted, Address, Channel, Content, Message, Outcome, ReasonClass, Refused, Unclear
from aftertouch.declarations import ChannelType
from aftertouch.delivery.render import ContentTemplate, RenderError
from aftertouch.errors import DatabaseUnavailable
from aftertouch.ingest.batcher import RETRY_SECONDS
from aftertouch.ingest.ledger import Fact, Ledger, Tried
from aftertouch.rolls.chunks import CHUNK, Numbers, chunk_of
from aftertouch.rolls.sql import read_receipts, read_roll_chunk
from aftertouch.store.campaigns import Campaign, read_campaign, update_campaign
from aftertouch.store.contacts import Addressee, read_addressees, set_states
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind, load_kinds
from aftertouch.store.units import LeaseLost, Unit, finish_unit, hold_unit, release_unit

log = structlog.get_logger()

LEASE = timedelta(seconds=60)
"""Renewed with every batch, and far longer than a batch takes: channels time out after seconds."""
MOST_TRIES = 10
"""Refusals with back-off that add up to about five minutes; then a person has failed, with the last reason."""
MOST_UNKNOWN_TRIES = 3
"""The same for a code that nobody knows: it is more likely to be final."""
BATCHES_AT_ONCE = 4
"""Of one unit: while one is with the provider, others are being rendered, marked and recorded."""
LONGEST_BACK_OFF = timedelta(seconds=60)
LONGEST_RETRY_AFTER = timedelta(hours=1)
"""What a provider may ask for: a header of seven digits would hold a campaign for 115 days."""
LONGEST_SEND = timedelta(seconds=45)
"""For one call of a channel, below the lease and above the channels' own limits of 10 and 15 seconds."""


@dataclass(frozen=True)
class Progress:
    """Where each person of a unit stands, by position within the slot."""

    tries: Numbers
    refusals: Numbers
    is_done: NDArray[np.bool_]

    def find_todo(self, *, idempotent: bool) -> Numbers:
        """Who is to be sent to now."""
        may_try = self.tries == self.refusals
        if idempotent:
            may_try |= self.tries < MOST_TRIES
        return np.flatnonzero(~self.is_done & may_try)


@dataclass
class Retry:
    """How long those who were refused have to wait."""

    after: timedelta = timedelta(0)
    """Zero while nobody waits."""
    is_urgent: bool = False
    """True when the provider asked for less speed: the whole unit waits, not just the refused."""

    def wait(self, delay: timedelta) -> None:
        """Somebody has to wait this long."""
        self.after = max(self.after, delay)


@dataclass(frozen=True)
class Draft:
    """One person of a batch, with the messages for each of their addresses."""

    position: int
    """Over the whole roll."""
    addressee: Addressee
    messages: list[Message[Address, Content]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)


class Sender:
    """Sends one claimed unit of a campaign."""

    def __init__(self, engine: AsyncEngine, ledger: Ledger, channel_type: ChannelType, channel: Channel, unit: Unit) -> None:
        self._engine = engine
        self._ledger = ledger
        self._type = channel_type
        self._channel = channel
        self._unit = unit
        self._retry = Retry()
        self._refusal_of_config = ""
        self._is_stopping = False

    def stop(self) -> None:
        """End ``run`` after the batch under way, handing the unit back."""
        self._is_stopping = True

    async def run(self) -> None:
        """Send until everybody is dealt with or has to wait, then finish the unit or hand it back.

        Raises:
            LeaseLost: somebody else has the unit, or the campaign is not being sent any more.
            DatabaseUnavailable: the lease will run out, and the unit be taken up again.
        """
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, self._unit.campaign_id)
            if campaign is None or campaign.content is None:
                raise LeaseLost
            roll = await read_roll_chunk(conn, self._unit.slot)
        self._ledger.lookups.remember(campaign)
        template = ContentTemplate(campaign.content, self._type.channel.content_model)
        progress = await self._read_progress(len(roll))
        todo = progress.find_todo(idempotent=self._channel.capabilities.idempotent_sends)
        size = self._channel.capabilities.batch_size
        batches = iter([todo[start : start + size] for start in range(0, len(todo), size)])

        async def send_batches() -> None:
            for within in batches:
                try:
                    await self._send_batch(campaign, template, within, roll[within], progress.tries[within])
                finally:
                    # Of the batches under way none is cut off: its people would be left attempted without outcome.
                    self._is_stopping |= sys.exception() is not None
                if self._retry.is_urgent or self._is_stopping:
                    break

        failures = await asyncio.gather(*(send_batches() for _ in range(BATCHES_AT_ONCE)), return_exceptions=True)
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure
        await self._settle(campaign, len(roll))

    async def _read_progress(self, members: int) -> Progress:
        async with transaction(self._engine) as conn:
            by_kind = await read_receipts(conn, self._unit.slot)
            numbered = await load_kinds(conn)
        over = self._type.evidence["sent"] | self._type.evidence["failed"] | {"skipped"}

        def add_up(signals: frozenset[str] | set[str]) -> Numbers:
            total = np.zeros(members, np.int64)
            for number, bits in by_kind.items():
                if numbered[number].signal in signals:
                    total += np.unpackbits(bits)[:members]
            return total

        return Progress(add_up({"attempted"}), add_up({"refused"}), add_up(over) > 0)

    async def _send_batch(
        self, campaign: Campaign, template: ContentTemplate, within: Numbers, numbers: Numbers, tries: Numbers
    ) -> None:
        positions = within + chunk_of(self._unit.slot) * CHUNK
        async with transaction(self._engine) as conn:
            addressees = await read_addressees(conn, campaign.app_id, campaign.channel, numbers)
        tokens = self._ledger.tokens.make(campaign.campaign_id, positions)
        now = datetime.now(UTC)
        drafts: list[Draft] = []
        skipped: list[Fact] = []
        for position, number, token in zip(positions.tolist(), numbers.tolist(), tokens, strict=True):
            drafted = self._draft(template, position, addressees.get(number), token)
            if isinstance(drafted, Draft):
                drafts.append(drafted)
            else:
                skipped.append(Fact(campaign, position, drafted, now))
        tries_of = dict(zip(positions.tolist(), (tries + 1).tolist(), strict=True))
        await self._mark(
            skipped + [Fact(campaign, d.position, Kind("attempted", "", str(tries_of[d.position])), now) for d in drafts]
        )
        messages = [message for draft in drafts for message in draft.messages]
        outcomes = iter(await self._call_channel(messages))
        facts: list[Fact] = []
        tried: list[Tried] = []
        changes: list[tuple[int, str, bytes, str, str]] = []
        for draft in drafts:
            own = [next(outcomes) for _ in draft.messages]
            now = datetime.now(UTC)
            facts += [Fact(campaign, draft.position, kind, now) for kind in self._judge(own, tries_of[draft.position])]
            for address_hash, outcome in zip(draft.hashes, own, strict=True):
                message_id = outcome.message_id[:256] if isinstance(outcome, Accepted) else ""
                tried.append(Tried(campaign, draft.position, self._describe(outcome), address_hash, message_id))
            changes += self._follow(draft, own)
        await self._ledger.record(facts, tried)
        await self._change_subscriptions(campaign, changes)
        if self._refusal_of_config:
            await self._pause(campaign)

    def _draft(self, template: ContentTemplate, position: int, addressee: Addressee | None, token: str) -> Draft | Kind:
        """The messages for one person, or why there are none."""
        if addressee is None or not addressee.addresses:
            return Kind("skipped", "unsubscribed", "no_active_subscription")
        try:
            content = template.render(addressee.external_id, addressee.attributes)
        except RenderError as error:
            return Kind("skipped", ReasonClass.CONTENT, error.code)
        draft = Draft(position, addressee)
        for address_hash, values in addressee.addresses:
            try:
                address = self._type.channel.address_model.model_validate(values)
            except ValueError:
                # It was stored by a version of the channel that took it.
                continue
            draft.messages.append(Message(token=token, address=address, content=content))
            draft.hashes.append(address_hash)
        return draft if draft.messages else Kind("skipped", ReasonClass.CONTENT, "invalid_address")

    async def _mark(self, facts: Sequence[Fact]) -> None:
        """Make it durable who is being attempted, by the unit's one holder: nothing was sent when this fails."""
        async with transaction(self._engine) as conn:
            await hold_unit(conn, self._unit, LEASE)
            await self._ledger.record_within(conn, facts)

    async def _call_channel(self, messages: list[Message[Address, Content]]) -> list[Outcome]:
        """An outcome for each message, whatever the channel does."""
        outcomes: list[Outcome] = []
        size = self._channel.capabilities.batch_size
        for start in range(0, len(messages), size):
            batch = messages[start : start + size]
            try:
                async with asyncio.timeout(LONGEST_SEND.total_seconds()):
                    answered = list(await self._channel.send(batch))
                if len(answered) != len(batch) or not all(map(_is_sound, answered)):
                    raise TypeError(f"send did not return one sound outcome for each of {len(batch)} messages")
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise
                # A cancellation that is not ours came out of the channel, like any other exception.
                log.exception("a channel failed", action="send", channel=self._channel.name)
                answered = [Unclear(detail=type(error).__name__)] * len(batch)
            outcomes += answered
        return outcomes

    def _judge(self, outcomes: list[Outcome], tries: int) -> list[Kind]:
        """What became of a person, from the outcomes of each of their addresses: one that was reached is enough."""
        accepted = [outcome for outcome in outcomes if isinstance(outcome, Accepted)]
        if accepted:
            extra = frozenset.intersection(*(frozenset(outcome.signals) for outcome in accepted))
            return [Kind("sent"), *(Kind(signal) for signal in sorted(extra & self._type.evidence.keys()))]
        refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
        if len(refused) < len(outcomes):
            return []
        classified = [(self._type.channel.classify(outcome.code), outcome) for outcome in refused]
        for reason_class, outcome in classified:
            if reason_class is ReasonClass.CONFIG:
                self._refusal_of_config = outcome.code
            if reason_class is ReasonClass.CONFIG or self._may_try_again(reason_class, tries):
                self._wait(reason_class, outcome, tries)
                return [Kind("refused", reason_class, str(tries))]
        reason_class, outcome = classified[0]
        return [self._ledger.lookups.bound_kind(Kind("failed", reason_class, outcome.code[:64]))]

    @staticmethod
    def _may_try_again(reason_class: ReasonClass, tries: int) -> bool:
        match reason_class:
            case ReasonClass.RATE:
                return True
            case ReasonClass.UNKNOWN:
                return tries < MOST_UNKNOWN_TRIES
            case _:
                return reason_class.is_retryable and tries < MOST_TRIES

    def _wait(self, reason_class: ReasonClass, outcome: Refused, tries: int) -> None:
        back_off = min(timedelta(seconds=2 ** min(tries - 1, 10)), LONGEST_BACK_OFF) * random.uniform(0.5, 1.0)
        self._retry.wait(min(outcome.retry_after, LONGEST_RETRY_AFTER) if outcome.retry_after else back_off)
        self._retry.is_urgent |= reason_class in (ReasonClass.RATE, ReasonClass.CONFIG)

    def _describe(self, outcome: Outcome) -> Kind:
        """One message's outcome, for the attempt log."""
        match outcome:
            case Accepted():
                return Kind("sent")
            case Refused():
                return self._ledger.lookups.bound_kind(
                    Kind("failed", self._type.channel.classify(outcome.code), outcome.code[:64])
                )
            case Unclear():
                return Kind("attempted")

    async def _change_subscriptions(self, campaign: Campaign, changes: list[tuple[int, str, bytes, str, str]]) -> None:
        """Make what providers said of addresses durable, however long the database is away."""
        while changes:
            try:
                async with transaction(self._engine) as conn:
                    await set_states(conn, campaign.app_id, changes)
                return
            except DatabaseUnavailable:
                if self._is_stopping:
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    def _follow(self, draft: Draft, outcomes: list[Outcome]) -> list[tuple[int, str, bytes, str, str]]:
        """What the outcomes mean for the subscriptions that they are about."""
        states = {ReasonClass.RECIPIENT_GONE: "invalid", ReasonClass.OPTED_OUT: "opted_out"}
        changes = []
        for address_hash, outcome in zip(draft.hashes, outcomes, strict=True):
            if isinstance(outcome, Refused) and (reason_class := self._type.channel.classify(outcome.code)) in states:
                reason = f"{reason_class}/{outcome.code[:64]}"
                changes.append((draft.addressee.number, self._channel.name, address_hash, states[reason_class], reason))
        return changes

    async def _pause(self, campaign: Campaign) -> None:
        """Pause the campaign, because the provider says that our account, key or template is wrong."""
        async with transaction(self._engine) as conn:
            current = await read_campaign(conn, campaign.campaign_id, lock=True)
            if current is not None and current.state == "SENDING":
                code = self._refusal_of_config
                reason = f"{campaign.channel} answered {code}: the account, key or template is wrong; mend it, then resume"
                await update_campaign(conn, campaign.campaign_id, state="PAUSED", state_reason=reason)
        log.error("a campaign was paused", action="pause", campaign_id=campaign.campaign_id, channel=campaign.channel)
        raise LeaseLost

    async def _settle(self, campaign: Campaign, members: int) -> None:
        """Finish the unit when everybody is dealt with, else hand it back until the first may be tried again."""
        progress = await self._read_progress(members)
        is_left = len(progress.find_todo(idempotent=self._channel.capabilities.idempotent_sends)) > 0
        async with transaction(self._engine) as conn:
            if is_left:
                shortest = timedelta(0) if self._is_stopping else timedelta(seconds=1)
                await release_unit(conn, self._unit, max(self._retry.after, shortest))
            elif await finish_unit(conn, self._unit):
                await update_campaign(conn, campaign.campaign_id, state="SENT", finish_time=datetime.now(UTC))
                log.info("a campaign was sent", action="finish_campaign", campaign_id=campaign.campaign_id)


def _is_sound(outcome: object) -> bool:
    """True for an outcome whose fields are what they are declared as; a dataclass does not check that itself."""
    match outcome:
        case Accepted(message_id=str(), signals=tuple() as signals):
            return all(isinstance(signal, str) for signal in signals)
        case Refused(code=str(), retry_after=None | timedelta()) | Unclear():
            return True
        case _:
            return False
