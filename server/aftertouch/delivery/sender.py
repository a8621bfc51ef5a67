"""The send loop of one work unit: who is still to be sent to, try after try, and what became of each.

Before a batch of provider calls each of its people is marked ``attempted`` in the receipts, in the transaction that
proves the unit's lease; afterwards the outcomes are recorded. So after any crash the receipts say exactly who may have
been messaged: somebody attempted without outcome is sent to again only on a channel whose sends are idempotent, and
elsewhere is left to the receipt that settles it, or looked up at the provider.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain, islice

import numpy as np
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.channels import Accepted, Channel, Limit, Outcome, ReasonClass, Unclear
from aftertouch.declarations import ChannelType
from aftertouch.delivery.breaker import Breaker
from aftertouch.delivery.calls import Defect, send_messages
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.control import stop_sending
from aftertouch.delivery.drafts import READ_AT_ONCE, Draft, Drafter, Drafts, Sending
from aftertouch.delivery.leases import LEASE, Lease
from aftertouch.delivery.lookup import LOOK_UP_AFTER, is_look_up_due, look_up, may_look_up
from aftertouch.delivery.outcomes import Consequences, Verdict, describe, judge
from aftertouch.delivery.pace import HORIZON, Pacer, back_off, name_limit
from aftertouch.delivery.progress import read_progress
from aftertouch.errors import DatabaseUnavailable, NotFound
from aftertouch.ingest.batcher import RETRY_SECONDS
from aftertouch.ingest.ledger import Fact, Ledger, Tried
from aftertouch.retargeting.audiences import decode_audience, decode_frozen
from aftertouch.retargeting.recheck import Recheck
from aftertouch.retargeting.selections import Combination, Question
from aftertouch.rolls.chunks import CHUNK, Numbers, chunk_of
from aftertouch.rolls.sql import read_roll_chunk
from aftertouch.store.app_secrets import has_changed_since
from aftertouch.store.apps import read_app
from aftertouch.store.campaigns import Campaign, read_campaign, update_campaign
from aftertouch.store.contacts import hold_addresses, set_states
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.paces import count_messages
from aftertouch.store.units import LeaseLost, finish_unit, hold_unit, release_unit, reopen_unit

log = structlog.get_logger()

BATCHES_AT_ONCE = 4
"""Of one unit: while one is with the provider, others are being rendered, marked and recorded."""
PEOPLE_AT_ONCE = 1_000
"""The same where batches are large: who has no connection after half of a request's time is refused, on any provider."""
FIRST_BATCH = 50
"""The first messages of a unit do not wait until 500 are written."""
TURN_SECONDS = 10.0
"""After this a unit that has to wait for its pace is handed back, so that slow campaigns do not take every place of a channel."""
_ZERO = timedelta(0)


@dataclass
class Waits:
    """When the unit is worth taking up again."""

    refused: timedelta = _ZERO
    """The longest that somebody who was refused has to wait."""
    later: timedelta | None = None
    """The shortest until somebody may be sent to who may not now."""

    def wait_for_refused(self, delay: timedelta) -> None:
        """Somebody was refused, and may be tried again after this."""
        self.refused = max(self.refused, delay)

    def wait_until_later(self, delay: timedelta) -> None:
        """Somebody may not be sent to before this."""
        self.later = delay if self.later is None else min(self.later, delay)

    def find_shortest(self) -> timedelta:
        """When to look again."""
        waits = [self.refused] if self.refused else []
        waits += [self.later] if self.later is not None else []
        return max(min(waits, default=_ZERO), timedelta(seconds=1))


class Sender:
    """Sends one claimed unit of a campaign."""

    def __init__(
        self,
        engine: AsyncEngine,
        ledger: Ledger,
        context: MessageContext,
        pacer: Pacer,
        breaker: Breaker,
        types: Mapping[str, ChannelType],
        channel: Channel,
        lease: Lease,
        scope: str = "",
    ) -> None:
        """``scope`` is what the limits of the channel's account are named by; the channel's name by default."""
        self._engine = engine
        self._ledger = ledger
        self._context = context
        self._pacer = pacer
        self._breaker = breaker
        self._types = types
        self._type = types[channel.name]
        self._channel = channel
        self._scope = scope or channel.name
        self._drafter = Drafter(engine, ledger.tokens, self._type, channel, self._scope)
        self._lease = lease
        self._unit = lease.unit
        self._todo: deque[int] = deque()
        self._tries: Numbers = np.empty(0, np.int64)
        self._waits = Waits()
        self._is_over = False
        """Nobody else of this unit can go for now."""
        self._is_turned = False
        """The line was turned since somebody could go, so that its end comes first."""
        self._may_ask = channel.capabilities.look_up
        """What became of unclear messages; not where they may have gone by another account, which alone knows them: this one
        would say that they were never taken, and they would be sent again."""
        self._turn_end = time.monotonic() + TURN_SECONDS
        self._has_waited = False
        """For its pace."""
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """End ``run`` after the batches under way, handing the unit back."""
        self._stopping.set()

    async def run(self) -> None:
        """Send until everybody is dealt with or has to wait, then finish the unit or hand it back.

        Raises:
            LeaseLost: somebody else has the unit, or the campaign is not being sent any more.
            DatabaseUnavailable: the lease will run out, and the unit be taken up again.
        """
        try:
            await self._run()
        except LeaseLost:
            if self._lease.has_refused:
                await self._reopen()
            raise

    async def _run(self) -> None:
        obstacle = ""
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, self._unit.campaign_id)
            if campaign is None or campaign.content is None:
                raise LeaseLost
            app = await read_app(conn, campaign.app_id)
            roll = await read_roll_chunk(conn, self._unit.slot)
            if self._lease.unsent:
                await self._take_back(conn, campaign, len(roll))
            progress = await read_progress(conn, self._type, self._unit.slot, len(roll))
            app_keys = await self._context.read_app_keys(conn, app, self._type)
            if self._may_ask and campaign.launch_time is not None:
                self._may_ask = not await has_changed_since(conn, app.app_id, campaign.channel, campaign.launch_time)
            try:
                recheck = await self._prepare_recheck(conn, campaign, roll)
            except NotFound as error:
                recheck = None
                obstacle = f"nobody can be asked again whether they match: {error}; install it, then resume"
        self._lease.unsent.clear()
        self._ledger.lookups.remember(campaign)
        if obstacle:
            await stop_sending(self._engine, campaign, obstacle)
            raise LeaseLost
        template = self._context.compile_content(app, campaign, self._type)
        sending = Sending(campaign, app, template, app_keys, self._unit.slot, roll, recheck)
        if self._may_ask and is_look_up_due(self._channel, self._lease.unclear_since):
            self._may_ask = await look_up(self._engine, self._drafter, self._ledger, self._channel, sending, progress)
            async with transaction(self._engine) as conn:
                progress = await read_progress(conn, self._type, self._unit.slot, len(roll))
        self._tries = progress.tries
        todo = progress.find_todo(idempotent=self._channel.capabilities.idempotent_sends)
        # Whoever was tried least comes first: while a provider is in trouble the probes do not use up one person's tries.
        self._todo.extend(todo[np.argsort(self._tries[todo], kind="stable")].tolist())
        await self._send_all(sending)
        await self._settle(sending)

    async def _prepare_recheck(self, conn: AsyncConnection, campaign: Campaign, roll: Numbers) -> Recheck | None:
        """What a wave's people are asked again just before each is sent to; None where nobody is, as in a frozen audience."""
        assert campaign.audience is not None, "it was launched"
        audience = decode_audience(campaign.audience)
        if not isinstance(audience, Question | Combination) or decode_frozen(campaign.audience) is not None:
            return None
        return await Recheck.prepare(conn, campaign.app_id, self._types, audience, roll)

    async def _take_back(self, conn: AsyncConnection, campaign: Campaign, members: int) -> None:
        """Let people be tried again whom this holder marked in a commit whose answer was lost, so that it sent them nothing."""
        await hold_unit(conn, self._unit, LEASE)
        tries = (await read_progress(conn, self._type, self._unit.slot, members)).tries
        first, now = chunk_of(self._unit.slot) * CHUNK, datetime.now(UTC)
        if marked := [(within, number) for within, number in self._lease.unsent if tries[within] >= number]:
            refused = [Kind("refused", ReasonClass.TRANSIENT, str(number)) for _, number in marked]
            positions = [first + within for within, _ in marked]
            await self._ledger.record_within(
                conn, [Fact(campaign, position, kind, now) for position, kind in zip(positions, refused, strict=True)]
            )

    @property
    def _is_turn_over(self) -> bool:
        return self._has_waited and time.monotonic() > self._turn_end

    async def _send_all(self, sending: Sending) -> None:
        size = self._channel.capabilities.batch_size
        lanes = min(BATCHES_AT_ONCE, max(PEOPLE_AT_ONCE // size, 1))

        async def send_batches() -> None:
            most = min(size, FIRST_BATCH)
            while self._todo and not (self._is_over or self._is_turn_over or self._stopping.is_set()):
                within = [self._todo.popleft() for _ in range(min(most, len(self._todo)))]
                most = size
                try:
                    await self._send_batch(sending, np.array(within, np.int64))
                finally:
                    # Of the batches under way none is cut off: its people would be left attempted without outcome.
                    if sys.exception() is not None:
                        self._stopping.set()

        failures = await asyncio.gather(*(send_batches() for _ in range(lanes)), return_exceptions=True)
        for failure in failures:
            if isinstance(failure, BaseException):
                raise failure

    async def _send_batch(self, sending: Sending, within: Numbers) -> None:
        now = datetime.now(UTC)
        upcoming = np.fromiter(islice(self._todo, READ_AT_ONCE), np.int64)
        drafts = await self._drafter.draft(sending, within, self._tries[within] + 1, now, upcoming)
        if drafts.opening is not None:
            self._waits.wait_until_later(drafts.opening - now)
        if drafts.ready:
            drafts.ready = await self._admit(drafts.ready)
        if self._stopping.is_set() or not (drafts.ready or drafts.skipped):
            return
        marked = await self._mark(sending, drafts)
        if marked:
            await self._deliver(sending.campaign, marked)

    async def _admit(self, drafts: list[Draft]) -> list[Draft]:
        """Wait until some of these people may be sent to, by every limit, and return them; the others go back into the line."""
        admission = await self._pacer.admit(
            [draft.limits[0] if len(draft.limits) == 1 else tuple(chain.from_iterable(draft.limits)) for draft in drafts]
        )
        admitted = []
        next_ones = []
        shortest: timedelta | None = None
        for draft, rest in zip(drafts, admission.rests, strict=True):
            if rest is None:
                admitted.append(draft)
            elif rest > HORIZON:
                self._waits.wait_until_later(rest)
            elif rest > _ZERO:
                # Behind the others, whose limits may have room. The unit may be over before it comes to them.
                self._waits.wait_until_later(rest)
                self._todo.append(draft.within)
                shortest = min(rest, shortest or rest)
            else:
                next_ones.append(draft.within)
        self._todo.extendleft(reversed(next_ones))
        if admitted:
            self._is_over = self._is_turned = False
        elif not next_ones and shortest is None:
            # None of these for long. Whoever stands at the end of the line, tried most, may count against other limits.
            self._is_over |= self._is_turned or admission.is_paced
            self._is_turned = True
            self._todo.rotate(min(self._channel.capabilities.batch_size, len(self._todo)))
        delay = admission.delay if admitted else shortest or _ZERO
        if delay > _ZERO and not self._is_over:
            self._has_waited = True
            with suppress(TimeoutError):
                async with asyncio.timeout(delay.total_seconds()):
                    await self._stopping.wait()
        if held := self._pacer.find_held({limit.key for draft in admitted for limits in draft.limits for limit in limits}):
            # Their provider asked for a rest while they waited for their turn.
            self._todo.extend(draft.within for draft in admitted if draft.counts_against(held))
            admitted = [draft for draft in admitted if not draft.counts_against(held)]
        return admitted

    async def _mark(self, sending: Sending, drafts: Drafts) -> list[Draft]:
        """Make it durable who is being attempted, by the unit's one holder, and return them: nothing was sent when this fails."""
        asked_at = time.monotonic()
        try:
            async with transaction(self._engine) as conn:
                marked = await self._mark_within(conn, sending, drafts)
        except DatabaseUnavailable:
            # It may have committed all the same.
            self._lease.unsent += [(draft.within, draft.tries) for draft in drafts.ready]
            raise
        self._lease.renew(asked_at)
        self._lease.unclear_since = None
        return marked

    async def _mark_within(self, conn: AsyncConnection, sending: Sending, drafts: Drafts) -> list[Draft]:
        campaign, app = sending.campaign, sending.app
        now = datetime.now(UTC)
        marked, skipped = drafts.ready, drafts.skipped
        await hold_unit(conn, self._unit, LEASE)
        if app.cap_messages and app.cap_hours and not campaign.transactional:
            # Who is tried again was counted the first time.
            fresh = np.array([draft.number for draft in marked if draft.tries == 1], np.int64)
            window = timedelta(hours=app.cap_hours)
            counted = await count_messages(conn, app.app_id, fresh, app.cap_messages, window)
            is_capped = [draft.tries == 1 and draft.number not in counted for draft in marked]
            capped = Kind("skipped", "policy", "frequency_cap")
            skipped = skipped + [(d.position, capped) for d, is_out in zip(marked, is_capped, strict=True) if is_out]
            marked = [draft for draft, is_out in zip(marked, is_capped, strict=True) if not is_out]
        await self._ledger.record_within(
            conn,
            [Fact(campaign, position, kind, now) for position, kind in skipped]
            + [Fact(campaign, draft.position, Kind("attempted", "", str(draft.tries)), now) for draft in marked],
        )
        return marked

    async def _deliver(self, campaign: Campaign, drafts: list[Draft]) -> None:
        """Hand marked people's messages to the channel, and make it durable what became of them."""
        if not self._lease.is_sure:
            await self._give_up(campaign, drafts)
        begun_at = time.monotonic()
        answered = iter(await send_messages(self._channel, [message for draft in drafts for message in draft.messages]))
        outcomes = [[next(answered) for _ in draft.messages] for draft in drafts]
        defects = [outcome for own in outcomes for outcome in own if isinstance(outcome, Defect)]
        self._breaker.note_call(f"{self._channel.name}: {defects[0].detail}" if defects else "")
        holds = self._find_holds(drafts, outcomes)
        troubled = {key for key in holds if self._pacer.is_in_trouble(key)}
        sizes = Counter(limit.key for draft in drafts for limits in draft.limits for limit in limits) if holds else {}
        # At once for this process: recording takes a while.
        rests = self._pacer.slow_down(holds, sizes, begun_at)
        now = datetime.now(UTC)
        facts: list[Fact] = []
        tried: list[Tried] = []
        consequences = Consequences()
        obstacle = ""
        for draft, own in zip(drafts, outcomes, strict=True):
            verdict = judge(self._type, own, draft.tries, in_trouble=draft.counts_against(troubled))
            obstacle = self._note(verdict, draft.tries) or obstacle
            facts += [Fact(campaign, draft.position, kind, now) for kind in verdict.kinds]
            for address_hash, outcome in zip(draft.hashes, own, strict=True):
                message_id = outcome.message_id[:256] if isinstance(outcome, Accepted) else ""
                kind = describe(self._type.channel, outcome)
                tried.append(Tried(campaign, draft.position, kind, address_hash, message_id))
            consequences.follow(self._type.channel, draft, own, now)
        await self._ledger.record(facts, tried)
        await self._apply(campaign, consequences)
        if rests:
            await self._pacer.hold(rests)
            self._waits.wait_until_later(min(rests.values()))
        if reason := obstacle or self._breaker.find_reason():
            await stop_sending(self._engine, campaign, reason)
            raise LeaseLost

    async def _give_up(self, campaign: Campaign, drafts: list[Draft]) -> None:
        """Let people be tried by somebody else: this process stood still after it had marked them, and sent nothing."""
        now = datetime.now(UTC)
        self._lease.has_refused = True
        await self._ledger.record(
            [Fact(campaign, draft.position, Kind("refused", ReasonClass.TRANSIENT, str(draft.tries)), now) for draft in drafts]
        )
        raise LeaseLost

    def _find_holds(self, drafts: Sequence[Draft], outcomes: Sequence[Sequence[Outcome]]) -> dict[str, timedelta | None]:
        """The limits that have to rest, with what the provider asked for: it said so, or nothing gets through there."""
        holds: dict[str, timedelta | None] = {}
        lost: Counter[str] = Counter()
        reached: set[str] = set()
        passed: dict[int, Sequence[Limit]] = {}
        for draft, own in zip(drafts, outcomes, strict=True):
            for limits, outcome in zip(draft.limits, own, strict=True):
                if isinstance(outcome, Unclear):
                    lost[limits[0].key] += 1
                    continue
                if isinstance(outcome, Accepted):
                    passed[id(limits)] = limits
                    continue
                reason_class, asked = self._type.channel.classify(outcome.code), outcome.retry_after
                if reason_class is ReasonClass.RATE or (reason_class is ReasonClass.TRANSIENT and asked is not None):
                    key = name_limit(self._scope, outcome.limit) if outcome.limit else limits[0].key
                    asks = [delay for delay in (holds.get(key), asked) if delay is not None]
                    holds[key] = max(asks, default=None)
                elif reason_class is ReasonClass.TRANSIENT:
                    lost[limits[0].key] += 1
                else:
                    # Whatever was wrong, the provider is there.
                    reached.update(limit.key for limit in limits)
        reached.update(limit.key for limits in passed.values() for limit in limits)
        self._pacer.note_success(reached, holds)
        # One message may fail for its own reasons; several at once, or the one that was to probe, do not.
        broken = {key for key, n in lost.items() if key not in reached and (n > 1 or self._pacer.is_probing(key))}
        return dict.fromkeys(broken) | holds

    def _note(self, verdict: Verdict, tries: int) -> str:
        """Take note of what became of a person; why the campaign cannot go on, where that is so."""
        if verdict.refusal is not None:
            self._lease.has_refused = True
            if verdict.reason_class is ReasonClass.CONFIG:
                name, code = self._channel.name, verdict.refusal.code[:64]
                return f"{name} answered {code}: the account, key or template is wrong; mend it, then resume"
            if verdict.reason_class is not ReasonClass.RATE and verdict.refusal.retry_after is None:
                self._waits.wait_for_refused(back_off(tries))
        elif verdict.reason_class is not None:
            self._breaker.note_failed(verdict.reason_class)
        elif verdict.kinds:
            self._breaker.note_sent()
        return ""

    async def _apply(self, campaign: Campaign, consequences: Consequences) -> None:
        """Make durable what providers said of addresses, however long the database is away."""
        while consequences.states or consequences.holds:
            try:
                async with transaction(self._engine) as conn:
                    await set_states(conn, campaign.app_id, consequences.states)
                    await hold_addresses(conn, campaign.app_id, consequences.holds)
                return
            except DatabaseUnavailable:
                if self._stopping.is_set():
                    raise
                await asyncio.sleep(RETRY_SECONDS)

    async def _settle(self, sending: Sending) -> None:
        """Finish the unit when everybody is dealt with, else hand it back until the first may be tried again."""
        campaign, since = sending.campaign, self._lease.unclear_since
        async with transaction(self._engine) as conn:
            # Whoever is refused here after somebody else took the unit over puts it back, under the same lock: either this
            # finds the refusal, or that finds the unit gone.
            await read_campaign(conn, campaign.campaign_id, lock=True)
            await hold_unit(conn, self._unit, LEASE)
            progress = await read_progress(conn, self._type, self._unit.slot, len(sending.roll))
            now = datetime.now(UTC)
            if len(progress.find_todo(idempotent=self._channel.capabilities.idempotent_sends)):
                is_next = self._stopping.is_set() or (self._is_turn_over and self._todo and not self._is_over)
                delay = _ZERO if is_next else self._waits.find_shortest()
                await release_unit(conn, self._unit, delay, unclear_since=since)
            elif self._may_ask and may_look_up(self._channel, progress, since):
                await release_unit(conn, self._unit, LOOK_UP_AFTER, unclear_since=since or now)
            elif await finish_unit(conn, self._unit):
                await update_campaign(conn, campaign.campaign_id, state="SENT", finish_time=now)
                log.info("a campaign was sent", action="finish_campaign", campaign_id=campaign.campaign_id)

    async def _reopen(self) -> None:
        """Have people tried again who were refused here after somebody else had taken the unit over, and perhaps finished it."""
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, self._unit.campaign_id, lock=True)
            if campaign is not None and await reopen_unit(conn, self._unit) and campaign.state == "SENT":
                await update_campaign(conn, campaign.campaign_id, state="SENDING", finish_time=None)
