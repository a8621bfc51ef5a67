"""Pausing, resuming and canceling: what happens to a campaign that is being sent.

A state is changed first and for good; then whoever asked waits until no unit of the campaign is held. Only a holder sends,
and nobody can mark a person as attempted in a campaign that is not SENDING, so after that no send begins.
"""

from __future__ import annotations

import asyncio

import structlog
from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.errors import CampaignStateWrong
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, read_campaign, update_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.units import is_under_way, ready_units, wake_workers

log = structlog.get_logger()

SETTLE_SECONDS = 0.05
"""Between two looks whether anything is still under way."""


def check_state(app: App, campaign: Campaign, *wanted: str) -> None:
    """Raise ``CampaignStateWrong`` unless the campaign is in one of these states."""
    if campaign.state not in wanted:
        raise CampaignStateWrong(f"{app.name}/campaigns/{campaign.campaign}", campaign.state, " or ".join(wanted))


async def pause(conn: AsyncConnection, app: App, campaign: Campaign, reason: str = "") -> Campaign:
    """Hold a campaign that is being sent; one that is paused stays so. The caller holds the campaign's lock.

    Raises:
        CampaignStateWrong: it is neither.
    """
    check_state(app, campaign, "SENDING", "PAUSED")
    if campaign.state == "PAUSED":
        return campaign
    await wake_workers(conn)
    return await update_campaign(conn, campaign.campaign_id, state="PAUSED", state_reason=reason)


async def resume(conn: AsyncConnection, app: App, campaign: Campaign) -> Campaign:
    """Go on with a campaign that was paused; whoever was dealt with stays so. The caller holds the campaign's lock.

    Raises:
        CampaignStateWrong: it is not paused.
    """
    check_state(app, campaign, "PAUSED")
    await ready_units(conn, campaign.campaign_id)
    await wake_workers(conn)
    return await update_campaign(conn, campaign.campaign_id, state="SENDING", state_reason="")


async def cancel(conn: AsyncConnection, app: App, campaign: Campaign) -> Campaign:
    """Stop a campaign for good; whoever was not sent to is skipped. The caller holds the campaign's lock.

    Raises:
        CampaignStateWrong: it was never launched, or is over.
    """
    check_state(app, campaign, "SCHEDULED", "SENDING", "PAUSED", "CANCELED")
    if campaign.state == "CANCELED":
        return campaign
    await wake_workers(conn)
    return await update_campaign(conn, campaign.campaign_id, state="CANCELED", state_reason="", finish_time=func.now())


async def settle(engine: AsyncEngine, campaign: Campaign) -> Campaign:
    """Wait until nothing of a campaign that was paused or canceled is under way, or somebody changed its state again.

    As long as the slowest provider call that had begun, and after a crash until the leases end.
    """
    while True:
        async with transaction(engine) as conn:
            current = await read_campaign(conn, campaign.campaign_id)
            assert current is not None, "a launched campaign is never deleted"
            if current.state != campaign.state or not await is_under_way(conn, campaign.campaign_id):
                return current
        await asyncio.sleep(SETTLE_SECONDS)


async def stop_sending(engine: AsyncEngine, campaign: Campaign, reason: str) -> None:
    """Pause a campaign from inside, because it cannot go well; somebody has to act on the reason.

    Not one that was resumed since this campaign was read: what a call that had begun before tells is mended perhaps, or else the
    next one meets it.
    """
    async with transaction(engine) as conn:
        current = await read_campaign(conn, campaign.campaign_id, lock=True)
        if current is None or current.state != "SENDING" or current.version != campaign.version:
            return
        await wake_workers(conn)
        await update_campaign(conn, campaign.campaign_id, state="PAUSED", state_reason=reason)
    log.error("a campaign was paused", action="pause", campaign_id=campaign.campaign_id, channel=campaign.channel, reason=reason)
