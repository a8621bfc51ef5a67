"""A test send: one campaign's content to one contact, outside of the campaign.

Its token names a position that no roll has, so whatever comes back for it is answered and counted nowhere; the attempt log
keeps it at position -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.channels import Accepted, Address, Content, Message, Outcome, ReasonClass
from aftertouch.declarations import ChannelType
from aftertouch.delivery.calls import send_messages
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.drafts import write_messages
from aftertouch.delivery.estimates import Bill, estimate_contents
from aftertouch.delivery.outcomes import describe
from aftertouch.errors import ChannelNotReady, ContentMissing, FieldsInvalid, NotFound, Violation
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.tokens import TEST_POSITION
from aftertouch.plugins import Registry
from aftertouch.rolls.chunks import slot_of
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import find_numbers, read_addressees
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.logs import TEST_ROW, Attempt, store_attempts

_OBSTACLES = {
    "no_active_subscription": "has no active subscription on this channel",
    "held": "is held back by the provider for now",
    "missing_attribute": "lacks an attribute that the content needs and gives no default for",
    "template_error": "has an attribute that the content cannot work with",
    "invalid_content": "has attributes that make the content one that the channel does not take",
    "invalid_address": "has an address that the channel does not take any more",
}


@dataclass(frozen=True)
class Trial:
    """What a test send came to."""

    content: Mapping[str, Any]
    """Rendered."""
    outcomes: Sequence[tuple[Outcome, ReasonClass | None]]
    """Of the message to each address, with the class of a refusal."""
    bill: Bill | None


async def send_test(
    engine: AsyncEngine,
    ledger: Ledger,
    registry: Registry,
    context: MessageContext,
    app: App,
    campaign: Campaign,
    external_id: str,
) -> Trial:
    """Send a campaign's content to one contact now; no connection is held while the provider is waited for.

    Raises:
        ContentMissing, ChannelNotReady, NotFound, or FieldsInvalid when there is nothing to send or nowhere to send it.
    """
    if campaign.content is None:
        raise ContentMissing(f"{app.name}/campaigns/{campaign.campaign}")
    declared = registry.types.get(campaign.channel)
    if declared is None:
        raise ChannelNotReady(campaign.channel, ("it is not installed",))
    (token,) = ledger.tokens.make(campaign.campaign_id, np.array([TEST_POSITION]))
    async with transaction(engine) as conn:
        choice = await context.accounts.choose(conn, app, campaign.channel)
        number = (await find_numbers(conn, app.app_id, [external_id])).get(external_id)
        if number is None:
            raise NotFound(f"{app.name}/contacts/{external_id}")
        written = await _write(conn, declared, context, app, campaign, number, token)
    with context.accounts.hold(await context.accounts.open(choice)) as channel:
        messages = [message for _, message in written]
        outcomes = await send_messages(channel, messages)
        described = [describe(declared.channel, outcome) for outcome in outcomes]
        bill = estimate_contents(channel, [message.content for message in messages])
    numbers = await ledger.lookups.number_kinds(set(described))
    attempts = [
        Attempt(
            slot=slot_of(campaign.campaign_id, 0),
            position=TEST_ROW,
            kind=numbers[kind],
            address_hash=address_hash,
            channel=campaign.channel,
            message_id=outcome.message_id[:256] if isinstance(outcome, Accepted) else "",
        )
        for (address_hash, _), outcome, kind in zip(written, outcomes, described, strict=True)
    ]
    async with transaction(engine) as conn:
        if (await find_numbers(conn, app.app_id, [external_id], hold=True)).get(external_id) != number:
            # Whoever was erased meanwhile leaves no trace.
            attempts = [attempt._replace(address_hash=b"", message_id="") for attempt in attempts]
        await store_attempts(conn, attempts)
    classes = [ReasonClass(kind.reason_class) if kind.reason_class else None for kind in described]
    content = messages[0].content.model_dump(mode="json", exclude_none=True)
    return Trial(content, list(zip(outcomes, classes, strict=True)), bill)


async def _write(
    conn: AsyncConnection,
    declared: ChannelType,
    context: MessageContext,
    app: App,
    campaign: Campaign,
    number: int,
    token: str,
) -> list[tuple[bytes, Message[Address, Content]]]:
    """The messages to a contact's addresses, each with the hash of its address."""
    addressees = await read_addressees(conn, app.app_id, campaign.channel, np.array([number]))
    template = context.compile_content(app, campaign, declared)
    app_keys = await context.read_app_keys(conn, app, declared)
    written = write_messages(declared, template, app_keys, addressees.get(number), token)
    if isinstance(written, Kind):
        raise FieldsInvalid([Violation("contact", _OBSTACLES[written.reason_code])])
    return written
