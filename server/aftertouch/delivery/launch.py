"""Launching: the audience becomes a roll, and the roll's chunks become work units, in one transaction."""

from __future__ import annotations

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import AudienceEmpty, CampaignStateWrong, ChannelNotReady, ContentMissing, FieldsInvalid, Violation
from aftertouch.plugins import Registry
from aftertouch.retargeting.audiences import decode_audience, evaluate_audience
from aftertouch.rolls.chunks import Numbers
from aftertouch.rolls.sql import write_roll
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, update_campaign
from aftertouch.store.units import create_units, free_units, wake_workers


async def prepare_launch(conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign) -> Numbers:
    """Check that a draft can be launched, and return whom it would go to.

    Raises:
        CampaignStateWrong, ContentMissing, FieldsInvalid, ChannelNotReady, AudienceEmpty, or what a selection's source raises.
    """
    name = f"{app.name}/campaigns/{campaign.campaign}"
    if campaign.state != "DRAFT":
        raise CampaignStateWrong(name, campaign.state, "DRAFT")
    if campaign.content is None:
        raise ContentMissing(name)
    if campaign.audience is None:
        raise FieldsInvalid([Violation("audience", "the campaign has none; set it with UpdateCampaign")])
    if campaign.channel not in registry.channels:
        raise ChannelNotReady(campaign.channel, registry.obstacles.get(campaign.channel, ("it is not installed",)))
    numbers = await evaluate_audience(conn, app, registry.types, decode_audience(campaign.audience), campaign.channel)
    if not len(numbers):
        raise AudienceEmpty(name)
    return numbers


async def launch(conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign) -> Campaign:
    """Freeze the audience and start sending when the transaction commits. The caller holds the campaign's lock."""
    numbers = await prepare_launch(conn, registry, app, campaign)
    chunks = await write_roll(conn, campaign.campaign_id, numbers)
    await create_units(conn, campaign.campaign_id, chunks)
    await wake_workers(conn)
    return await update_campaign(conn, campaign.campaign_id, state="SENDING", recipients=len(numbers), launch_time=func.now())


async def resume(conn: AsyncConnection, app: App, campaign: Campaign) -> Campaign:
    """Go on with a campaign that was paused; whoever was dealt with stays so. The caller holds the campaign's lock.

    Raises:
        CampaignStateWrong: it is not paused.
    """
    if campaign.state != "PAUSED":
        raise CampaignStateWrong(f"{app.name}/campaigns/{campaign.campaign}", campaign.state, "PAUSED")
    await free_units(conn, campaign.campaign_id)
    await wake_workers(conn)
    return await update_campaign(conn, campaign.campaign_id, state="SENDING", state_reason="")
