"""Work units: the chunks of launched campaigns that are not dealt with yet, each leased to one worker at a time.

The units *are* a campaign's progress, chunk by chunk, and the receipts are its progress inside a chunk, so there is no
second count that could disagree. A lease is a number that grows with every claim: whoever holds an older one can no
longer mark anything, however late it wakes up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, exists, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import slot_of
from aftertouch.store.tables import campaigns, send_units

CHANNEL = "aftertouch_send"
"""The NOTIFY channel that wakes workers; a hint only, they poll as well."""


class LeaseLost(Exception):
    """The unit was taken over, or its campaign is no longer being sent: stop working on it."""


@dataclass(frozen=True)
class Unit:
    """A claimed chunk."""

    slot: int
    campaign_id: int
    lease: int


async def create_units(conn: AsyncConnection, campaign_id: int, chunks: int) -> None:
    """Make the units of a campaign that is being launched."""
    await conn.execute(
        insert(send_units), [{"slot": slot_of(campaign_id, chunk), "campaign_id": campaign_id} for chunk in range(chunks)]
    )


async def claim_unit(conn: AsyncConnection, channels: Sequence[str], lease_for: timedelta) -> Unit | None:
    """Claim a free unit of a campaign that is being sent on one of these channels; None when there is none."""
    candidate = (
        select(send_units.c.slot)
        .join(campaigns, campaigns.c.campaign_id == send_units.c.campaign_id)
        .where(
            or_(send_units.c.lease_until.is_(None), send_units.c.lease_until < func.now()),
            campaigns.c.state == "SENDING",
            campaigns.c.channel.in_(channels),
        )
        .order_by(send_units.c.slot)
        .limit(1)
        .with_for_update(skip_locked=True, of=send_units)
        .scalar_subquery()
    )
    row = (
        await conn.execute(
            update(send_units)
            .where(send_units.c.slot == candidate)
            .values(lease=send_units.c.lease + 1, lease_until=func.now() + lease_for)
            .returning(send_units.c.slot, send_units.c.campaign_id, send_units.c.lease)
        )
    ).one_or_none()
    return Unit(row.slot, row.campaign_id, row.lease) if row else None


async def hold_unit(conn: AsyncConnection, unit: Unit, lease_for: timedelta) -> None:
    """Prove and prolong a lease, and keep the unit's row locked: what this transaction marks is marked by its one holder.

    Raises:
        LeaseLost: stop working on it.
    """
    held = await conn.execute(
        update(send_units)
        .where(
            send_units.c.slot == unit.slot,
            send_units.c.lease == unit.lease,
            exists().where(campaigns.c.campaign_id == unit.campaign_id, campaigns.c.state == "SENDING"),
        )
        .values(lease_until=func.now() + lease_for)
        .returning(send_units.c.slot)
    )
    if held.one_or_none() is None:
        raise LeaseLost


async def release_unit(conn: AsyncConnection, unit: Unit, delay: timedelta) -> None:
    """Hand a unit back, for anybody to go on with after ``delay``."""
    await conn.execute(
        update(send_units)
        .where(send_units.c.slot == unit.slot, send_units.c.lease == unit.lease)
        .values(lease_until=func.now() + delay)
    )


async def wake_workers(conn: AsyncConnection) -> None:
    """Wake free workers when the transaction commits."""
    await conn.execute(select(func.pg_notify(CHANNEL, "")))


async def free_units(conn: AsyncConnection, campaign_id: int) -> None:
    """Let the units of a campaign be claimed at once; whoever still holds one has lost it."""
    await conn.execute(
        update(send_units).where(send_units.c.campaign_id == campaign_id).values(lease=send_units.c.lease + 1, lease_until=None)
    )


async def finish_unit(conn: AsyncConnection, unit: Unit) -> bool:
    """Delete a unit that is dealt with; True when it was the campaign's last.

    The campaign's row is locked first, so of two workers that finish at once the second sees the first one's deletion.
    """
    await conn.execute(select(campaigns.c.campaign_id).where(campaigns.c.campaign_id == unit.campaign_id).with_for_update())
    await conn.execute(delete(send_units).where(send_units.c.slot == unit.slot, send_units.c.lease == unit.lease))
    left = await conn.execute(select(exists().where(send_units.c.campaign_id == unit.campaign_id)))
    return not left.scalar_one()
