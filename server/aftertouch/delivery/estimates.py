"""Estimates: what a campaign would be billed as, from the messages to some of its people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Channel, Content, Estimate
from aftertouch.declarations import ChannelType
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.drafts import write_messages
from aftertouch.ingest.tokens import SPECIMEN
from aftertouch.rolls.chunks import Numbers
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import read_addressees
from aftertouch.store.kinds import Kind

log = structlog.get_logger()

SAMPLE = 500
"""People whose messages are written: names of 500 people give the length of a text to a percent, in some 30 ms."""


@dataclass(frozen=True)
class Bill:
    """What messages are billed as."""

    messages: int
    units: int
    unit: str
    cost: Decimal | None
    currency: str
    sampled: int
    """Of how many people the messages were written; the rest is taken to be alike."""


async def estimate_campaign(
    conn: AsyncConnection,
    context: MessageContext,
    app: App,
    campaign: Campaign,
    declared: ChannelType,
    channel: Channel,
    numbers: Numbers,
) -> Bill | None:
    """What a campaign to these people would be billed as; None where its channel does not know."""
    if not len(numbers):
        return None
    # Evenly over everybody: those who came first may have other names than those who came last.
    places = np.unique(np.linspace(0, len(numbers) - 1, min(SAMPLE, len(numbers))).astype(np.int64))
    sample = numbers[places]
    addressees = await read_addressees(conn, app.app_id, campaign.channel, sample)
    template = context.compile_content(app, campaign, declared)
    contents: list[Content] = []
    for number in sample.tolist():
        written = write_messages(declared, template, {}, addressees.get(number), SPECIMEN)
        if not isinstance(written, Kind):
            contents += (message.content for _, message in written)
    return estimate_contents(channel, contents, len(sample), len(numbers))


def estimate_contents(channel: Channel, contents: Iterable[Content], sampled: int = 1, people: int = 1) -> Bill | None:
    """What so many people's messages are billed as, going by what some of them are told; None where the channel does not know."""
    try:
        estimates = [channel.estimate(content) for content in contents]
    except Exception:
        log.exception("a channel failed", action="estimate", channel=channel.name)
        return None
    known = [estimate for estimate in estimates if isinstance(estimate, Estimate)]
    if not known:
        return None
    costs = [estimate.cost for estimate in known if estimate.cost is not None]
    return Bill(
        messages=round(len(known) * people / sampled),
        units=round(sum(estimate.units for estimate in known) * people / sampled),
        unit=known[0].unit,
        cost=sum(costs, Decimal()) * people / sampled if len(costs) == len(known) else None,
        currency=known[0].currency,
        sampled=sampled,
    )
