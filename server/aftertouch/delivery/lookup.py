"""Reconciliation: asking a provider what became of messages whose outcome is unclear, after a crash or a timeout."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Accepted, Channel, Finding, NotTaken, ReasonClass, Unclear
from aftertouch.delivery.calls import LONGEST_CALL, look_up_messages
from aftertouch.delivery.drafts import Drafter, Sending
from aftertouch.delivery.outcomes import list_prices, may_try_again
from aftertouch.delivery.progress import Progress
from aftertouch.ingest.ledger import Fact, Ledger, Tried
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.logs import find_messages

log = structlog.get_logger()

LOOK_UP_AFTER = LONGEST_CALL + timedelta(seconds=10)
"""A holder whose lease ran out may have a call under way for so long, and what a provider took a moment ago may not be in its
list yet: "not taken" would then have the message sent twice."""
LOOK_UP_FOR = timedelta(minutes=15)
"""Then the rest stays unclear: the campaign ends, and late receipts still settle them."""

_LOST = Kind("failed", ReasonClass.TRANSIENT, "not_taken")


def is_look_up_due(channel: Channel, since: datetime | None) -> bool:
    """True when it is long enough ago that a provider's word on unclear messages can be trusted.

    Args:
        since: when it was found that only they are left; None while somebody is still sent to.
    """
    return channel.capabilities.look_up and since is not None and datetime.now(UTC) - since >= LOOK_UP_AFTER


def may_look_up(channel: Channel, progress: Progress, since: datetime | None) -> bool:
    """True when there are people whose outcome the channel may still find out.

    Args:
        since: when it was found that they are left; None when it is only now.
    """
    is_time = since is None or datetime.now(UTC) - since < LOOK_UP_FOR
    return is_time and channel.capabilities.look_up and len(progress.find_unclear()) > 0


async def _leave_out_known(engine: AsyncEngine, channel: Channel, findings: Sequence[Finding]) -> list[Finding]:
    """What was found, without messages that are on record as other ones: the same words may have gone to the same person.

    Of whichever app, since several may send by one account.
    """
    message_ids = [finding.message_id for finding in findings if isinstance(finding, Accepted) and finding.message_id]
    async with transaction(engine) as conn:
        known = await find_messages(conn, channel.name, message_ids)
    return [
        Unclear(detail="another message") if isinstance(finding, Accepted) and finding.message_id in known else finding
        for finding in findings
    ]


async def look_up(
    engine: AsyncEngine, drafter: Drafter, ledger: Ledger, channel: Channel, sending: Sending, progress: Progress
) -> bool:
    """Settle those people of a unit whose outcome the provider knows: sent, or certainly not, so that they are sent to again.

    False when there was nobody to ask about: a message is told by its address, which those who are left have no more.
    """
    campaign = sending.campaign
    assert campaign.launch_time is not None, "it is being sent"
    unclear = progress.find_unclear()
    size = channel.capabilities.batch_size
    asked = 0
    for start in range(0, len(unclear), size):
        within = unclear[start : start + size]
        drafts = (await drafter.draft(sending, within, progress.tries[within], now=None)).ready
        messages = [message for draft in drafts for message in draft.messages]
        answers = await look_up_messages(channel, messages, campaign.launch_time)
        findings = iter(await _leave_out_known(engine, channel, answers))
        now = datetime.now(UTC)
        facts: list[Fact] = []
        tried: list[Tried] = []
        for draft in drafts:
            own = [next(findings) for _ in draft.messages]
            if accepted := [finding for finding in own if isinstance(finding, Accepted)]:
                kinds = [Kind("sent"), *list_prices(accepted)]
                facts += [Fact(campaign, draft.position, kind, now) for kind in kinds]
            elif all(isinstance(finding, NotTaken) for finding in own):
                # A provider that loses every message is asked no longer than one that refuses it.
                may_try = may_try_again(ReasonClass.TRANSIENT, draft.tries, in_trouble=False)
                kind = Kind("refused", ReasonClass.TRANSIENT, str(draft.tries)) if may_try else _LOST
                facts.append(Fact(campaign, draft.position, kind, now))
            for address_hash, finding in zip(draft.hashes, own, strict=True):
                if isinstance(finding, Accepted):
                    tried.append(Tried(campaign, draft.position, Kind("sent"), address_hash, finding.message_id[:256]))
        await ledger.record(facts, tried)
        log.info("unclear messages were looked up", action="look_up", channel=channel.name, asked=len(drafts), found=len(facts))
        asked += len(drafts)
    return asked > 0
