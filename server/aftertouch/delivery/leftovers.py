"""Leftovers: the units of campaigns that were canceled or are past their time. Whoever is left in them is skipped."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

import numpy as np
import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.declarations import ChannelType
from aftertouch.delivery.leases import LEASE
from aftertouch.delivery.progress import read_progress
from aftertouch.ingest.ledger import Fact, Ledger
from aftertouch.rolls.chunks import CHUNK, chunk_of
from aftertouch.rolls.sql import read_roll_chunk
from aftertouch.store.campaigns import read_campaign, update_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.units import Unit, claim_leftover, finish_unit

log = structlog.get_logger()


async def close_leftover(engine: AsyncEngine, ledger: Ledger, types: Mapping[str, ChannelType]) -> bool:
    """Skip everybody who is left in one unit, and finish it; False when there is none.

    Raises:
        DatabaseUnavailable: it will be taken up again when the lease has run out.
    """
    async with transaction(engine) as conn:
        unit = await claim_leftover(conn, LEASE)
    if unit is None:
        return False
    await _close(engine, ledger, types, unit)
    return True


async def _close(engine: AsyncEngine, ledger: Ledger, types: Mapping[str, ChannelType], unit: Unit) -> None:
    async with transaction(engine) as conn:
        campaign = await read_campaign(conn, unit.campaign_id, lock=True)
        assert campaign is not None, "a launched campaign is never deleted"
        members = len(await read_roll_chunk(conn, unit.slot))
        progress = await read_progress(conn, types.get(campaign.channel), unit.slot, members)
        # Somebody whose outcome is unclear was perhaps sent to, and stays unclear.
        left = np.flatnonzero(~progress.is_done & (progress.tries == progress.refusals))
        kind = Kind("skipped", "policy", "canceled" if campaign.state == "CANCELED" else "send_by_time")
        now = datetime.now(UTC)
        first = chunk_of(unit.slot) * CHUNK
        await ledger.record_within(conn, [Fact(campaign, first + int(position), kind, now) for position in left])
        # Paused since the unit was claimed: without units it could not be resumed into anything.
        if await finish_unit(conn, unit) and campaign.state in ("SENDING", "PAUSED"):
            await update_campaign(conn, campaign.campaign_id, state="SENT", state_reason="", finish_time=now)
            log.info("a campaign was sent", action="finish_campaign", campaign_id=campaign.campaign_id)
