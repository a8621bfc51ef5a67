"""Drafts: who of a batch can be sent to, on which addresses, and what they are told."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import STORED, Address, Channel, Content, Limit, Message, ReasonClass
from aftertouch.declarations import ChannelType
from aftertouch.delivery.pace import find_limits
from aftertouch.delivery.quiet import find_opening
from aftertouch.delivery.render import ContentTemplate, RenderError
from aftertouch.ingest.tokens import TokenCodec
from aftertouch.retargeting.recheck import Recheck
from aftertouch.rolls.chunks import CHUNK, Numbers, chunk_of
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import Addressee, read_addressees
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind


@dataclass(frozen=True)
class Sending:
    """A unit of a campaign that is being sent, with what its messages are made of."""

    campaign: Campaign
    app: App
    template: ContentTemplate
    app_keys: Mapping[str, str]
    """Of the channel."""
    slot: int
    roll: Numbers
    """Of the unit."""
    recheck: Recheck | None = None
    """Of a wave whose people have to match until they are sent to."""


READ_AT_ONCE = 500
"""People, however small the batches are: a statement costs as much as ten of them."""
READ_SECONDS = 1.0
"""How old what was read may be when messages are written: somebody may have opted out meanwhile."""


@dataclass(slots=True)
class Draft:
    """One person of a batch, with the messages for each of their addresses. Not frozen, for the same reason as an addressee."""

    within: int
    """Position in the unit."""
    position: int
    """Over the whole roll."""
    number: int
    tries: int
    """With this one."""
    messages: list[Message[Address, Content]]
    hashes: list[bytes]
    limits: list[tuple[Limit, ...]]
    """That each message counts against."""

    def counts_against(self, keys: Collection[str]) -> bool:
        """True when one of the messages does, against any of these limits."""
        return bool(keys) and any(limit.key in keys for limits in self.limits for limit in limits)


@dataclass
class Drafts:
    """A batch of people, sorted by what is to be done about them now."""

    ready: list[Draft] = field(default_factory=list)
    skipped: list[tuple[int, Kind]] = field(default_factory=list)
    """Positions over the whole roll, and why."""
    opening: datetime | None = None
    """When the first of those may be sent to whose quiet hours it is."""


class Drafter:
    """Writes the messages of one channel."""

    def __init__(self, engine: AsyncEngine, tokens: TokenCodec, channel_type: ChannelType, channel: Channel, scope: str) -> None:
        self._engine = engine
        self._tokens = tokens
        self._type = channel_type
        self._channel = channel
        self._scope = scope
        self._reading = asyncio.Lock()
        self._read_at = -READ_SECONDS
        self._asked: frozenset[int] = frozenset()
        self._addressees: Mapping[int, Addressee] = {}

    async def draft(
        self, sending: Sending, within: Numbers, tries: Numbers, now: datetime | None, upcoming: Numbers | None = None
    ) -> Drafts:
        """Write the messages for some people of a unit.

        Args:
            within: their positions in the unit.
            tries: how often each was tried, with this time.
            now: to respect quiet hours; None where nothing is going to be sent.
            upcoming: positions whose turn is next.
        """
        campaign = sending.campaign
        first = chunk_of(sending.slot) * CHUNK
        drafts = Drafts()
        if sending.recheck is not None and now is not None:
            async with transaction(self._engine) as conn:
                matching = await sending.recheck.find_matching(conn, sending.roll[within])
            # Who read the first message while the second was on its way does not get it.
            converted = Kind("skipped", "policy", "converted")
            drafts.skipped += [(first + at, converted) for at in within[~matching].tolist()]
            within, tries = within[matching], tries[matching]
        numbers = sending.roll[within]
        ahead = within if upcoming is None else np.concatenate([within, upcoming])[: max(READ_AT_ONCE, len(within))]
        addressees = await self._read(campaign, numbers, sending.roll[ahead])
        positions = within + first
        tokens = self._tokens.make(campaign.campaign_id, positions)
        for at, position, number, token, tried in zip(
            within.tolist(), positions.tolist(), numbers.tolist(), tokens, tries.tolist(), strict=True
        ):
            addressee = addressees.get(number)
            written = write_messages(self._type, sending.template, sending.app_keys, addressee, token)
            if isinstance(written, Kind):
                drafts.skipped.append((position, written))
                continue
            if addressee is not None and now is not None and not campaign.transactional:
                opening = find_opening(sending.app, addressee.time_zone, now)
                if opening is not None and campaign.send_by_time is not None and opening >= campaign.send_by_time:
                    drafts.skipped.append((position, Kind("skipped", "policy", "quiet_hours")))
                    continue
                if opening is not None:
                    drafts.opening = min(opening, drafts.opening or opening)
                    continue
            hashes = [address_hash for address_hash, _ in written]
            messages = [message for _, message in written]
            limits = [find_limits(self._channel, self._scope, campaign, message) for message in messages]
            drafts.ready.append(Draft(at, position, number, tried, messages, hashes, limits))
        return drafts

    async def _read(self, campaign: Campaign, numbers: Numbers, ahead: Numbers) -> Mapping[int, Addressee]:
        """The addressees behind contact numbers, with those of the batches that come next."""
        async with self._reading:
            now = time.monotonic()
            if now - self._read_at > READ_SECONDS or not self._asked.issuperset(numbers.tolist()):
                async with transaction(self._engine) as conn:
                    self._addressees = await read_addressees(conn, campaign.app_id, campaign.channel, ahead)
                self._read_at, self._asked = now, frozenset(ahead.tolist())
            return self._addressees


def write_messages(
    channel_type: ChannelType,
    template: ContentTemplate,
    app_keys: Mapping[str, str],
    addressee: Addressee | None,
    token: str,
) -> list[tuple[bytes, Message[Address, Content]]] | Kind:
    """The messages to each address of a person, with the addresses' hashes, or why there are none."""
    if addressee is None or not addressee.addresses:
        if addressee is not None and addressee.is_held:
            return Kind("skipped", ReasonClass.CAPPED, "held")
        return Kind("skipped", "unsubscribed", "no_active_subscription")
    try:
        content = template.render(addressee.external_id, addressee.attributes, token)
    except RenderError as error:
        return Kind("skipped", ReasonClass.CONTENT, error.code)
    messages: list[tuple[bytes, Message[Address, Content]]] = []
    for address_hash, values in addressee.addresses:
        try:
            address = channel_type.channel.address_model.model_validate(values, context=STORED)
        except ValueError:
            # It was stored by a version of the channel that took it.
            continue
        messages.append((address_hash, Message(token=token, address=address, content=content, app_keys=app_keys)))
    return messages or Kind("skipped", ReasonClass.CONTENT, "invalid_address")
