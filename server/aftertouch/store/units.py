"""Work units: the chunks of launched campaigns that are not dealt with yet, each leased to one worker at a time.

The units *are* a campaign's progress, chunk by chunk, and the receipts are its progress inside a chunk, so there is no
second count that could disagree. A lease is a number that grows with every claim: whoever holds an older one can no
longer mark anything, however late it wakes up. A unit is held from its claim until its holder gives it back or its
lease runs out, and only a holder sends: where no unit of a campaign is held, nothing of it is under way.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    ColumnElement,
    Interval,
    Update,
    and_,
    bindparam,
    cast,
    delete,
    exists,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import SLOT_SHIFT, slot_of
from aftertouch.store.app_secrets import is_of_owner
from aftertouch.store.tables import campaigns, send_units

CHANNEL = "aftertouch_send"
"""The NOTIFY channel that wakes workers; a hint only, they poll as well."""

_CHUNK_MASK = (1 << SLOT_SHIFT) - 1
_TURN: ColumnElement[datetime] = literal_column(
    f"send_units.ready_time + (send_units.slot & {_CHUNK_MASK}) * interval '10 minutes'", TIMESTAMP(timezone=True)
)
"""Whose turn it is: by chunk, so that a short campaign is not kept waiting by a long one, and by how long each unit has waited,
so that slow campaigns take turns and none waits for ever."""


class LeaseLost(Exception):
    """The unit was taken over, or its campaign is no longer being sent: stop working on it."""


@dataclass(frozen=True)
class Unit:
    """A claimed chunk."""

    slot: int
    campaign_id: int
    lease: int
    unclear_since: datetime | None
    """When it was first found that only people of unclear outcome are left."""


def _may_be_sent() -> ColumnElement[bool]:
    return and_(
        campaigns.c.state == "SENDING", or_(campaigns.c.send_by_time.is_(None), campaigns.c.send_by_time > func.clock_timestamp())
    )


def _is_over() -> ColumnElement[bool]:
    """True of campaigns of which nobody may be sent to any more."""
    return or_(
        campaigns.c.state == "CANCELED", and_(campaigns.c.state == "SENDING", campaigns.c.send_by_time <= func.clock_timestamp())
    )


def _is_held() -> ColumnElement[bool]:
    return send_units.c.lease_until > func.clock_timestamp()


async def create_units(conn: AsyncConnection, campaign_id: int, chunks: int) -> None:
    """Make the units of a campaign that is being launched."""
    slots = func.generate_series(slot_of(campaign_id, 0), slot_of(campaign_id, chunks - 1)).column_valued("slot")
    await conn.execute(insert(send_units).from_select(["slot", "campaign_id"], select(slots, literal(campaign_id))))


async def claim_unit(conn: AsyncConnection, channel: str, lease_for: timedelta, *, of_owners: bool = False) -> Unit | None:
    """Claim a free unit of a campaign that is being sent on this channel; None when there is none.

    Args:
        of_owners: only of apps that have settings of their own for it.
    """
    return await _claim(conn, _CLAIM_OWN_UNIT if of_owners else _CLAIM_UNIT, {"channel": channel, "lease_for": lease_for})


async def claim_leftover(conn: AsyncConnection, lease_for: timedelta) -> Unit | None:
    """Claim a free unit of a campaign, on any channel, that was canceled or is past its time; None when there is none."""
    return await _claim(conn, _CLAIM_LEFTOVER, {"lease_for": lease_for})


async def _claim(conn: AsyncConnection, statement: Update, parameters: Mapping[str, object]) -> Unit | None:
    row = (await conn.execute(statement, parameters)).one_or_none()
    return Unit(*row) if row else None


def _is_ready() -> ColumnElement[bool]:
    return send_units.c.ready_time <= func.clock_timestamp()


def _write_claim(wanted: ColumnElement[bool]) -> Update:
    candidate = (
        select(send_units.c.slot)
        .join(campaigns, campaigns.c.campaign_id == send_units.c.campaign_id)
        .where(wanted, func.coalesce(~_is_held(), True))
        .order_by(_TURN, send_units.c.slot)
        .limit(1)
        .with_for_update(skip_locked=True, of=send_units)
        .scalar_subquery()
    )
    return (
        update(send_units)
        .where(send_units.c.slot == candidate)
        .values(lease=send_units.c.lease + 1, lease_until=func.clock_timestamp() + bindparam("lease_for", type_=Interval()))
        .returning(send_units.c.slot, send_units.c.campaign_id, send_units.c.lease, send_units.c.unclear_since)
    )


# Composed once: every free place of a worker asks each second.
_CLAIM_UNIT = _write_claim(and_(_may_be_sent(), _is_ready(), campaigns.c.channel == bindparam("channel")))
_CLAIM_OWN_UNIT = _write_claim(and_(_may_be_sent(), _is_ready(), campaigns.c.channel == bindparam("channel"), is_of_owner()))
# Whoever is left waits for nothing any more: not for the end of quiet hours, nor for a provider.
_CLAIM_LEFTOVER = _write_claim(_is_over())


async def hold_unit(conn: AsyncConnection, unit: Unit, lease_for: timedelta) -> None:
    """Prove and prolong a lease, and keep the unit's row locked: what this transaction marks is marked by its one holder.

    Somebody is attempted now, so how long others were unclear tells nothing any more about how long everybody was.

    Raises:
        LeaseLost: stop working on it.
    """
    held = await conn.execute(
        update(send_units)
        .where(
            send_units.c.slot == unit.slot,
            send_units.c.lease == unit.lease,
            exists().where(campaigns.c.campaign_id == unit.campaign_id, _may_be_sent()),
        )
        .values(lease_until=func.clock_timestamp() + lease_for, unclear_since=None)
        .returning(send_units.c.slot)
    )
    if held.one_or_none() is None:
        raise LeaseLost


async def prolong_leases(conn: AsyncConnection, units: Collection[Unit], lease_for: timedelta) -> set[Unit]:
    """The heartbeat of a worker: prolong the leases of its units, and return those that it may go on with."""
    if not units:
        return set()
    held = tuple_(send_units.c.slot, send_units.c.lease).in_([(unit.slot, unit.lease) for unit in units])
    rows = await conn.execute(
        update(send_units)
        .where(held, send_units.c.campaign_id == campaigns.c.campaign_id)
        .values(lease_until=func.clock_timestamp() + lease_for)
        .returning(send_units.c.slot, send_units.c.lease, _may_be_sent())
    )
    going_on = {(slot, lease) for slot, lease, may_be_sent in rows if may_be_sent}
    # By lease too: this process may have lost a unit, claimed it once more, and still hold the older lease.
    return {unit for unit in units if (unit.slot, unit.lease) in going_on}


async def release_unit(
    conn: AsyncConnection, unit: Unit, delay: timedelta = timedelta(0), *, unclear_since: datetime | None = None
) -> None:
    """Hand a unit back, for anybody to go on with after ``delay``."""
    await conn.execute(
        update(send_units)
        .where(send_units.c.slot == unit.slot, send_units.c.lease == unit.lease)
        .values(lease_until=None, ready_time=func.clock_timestamp() + delay, unclear_since=unclear_since)
    )


async def reopen_unit(conn: AsyncConnection, unit: Unit) -> bool:
    """Put back a unit that somebody else may have finished meanwhile; True when it had been.

    Its leases go on from the clock, above all that counted up from nothing: an older one must not fit again.
    """
    lease = cast(func.extract("epoch", func.clock_timestamp()) * 1_000_000, BigInteger)
    made = await conn.execute(
        upsert(send_units)
        .values(slot=unit.slot, campaign_id=unit.campaign_id, lease=lease)
        .on_conflict_do_nothing()
        .returning(send_units.c.slot)
    )
    return made.one_or_none() is not None


async def wake_workers(conn: AsyncConnection) -> None:
    """Have workers look for news when the transaction commits: for units to claim, and for units to give up."""
    await conn.execute(select(func.pg_notify(CHANNEL, "")))


async def ready_units(conn: AsyncConnection, campaign_id: int) -> None:
    """Let the units of a campaign be claimed at once, whatever they waited for."""
    await conn.execute(
        update(send_units).where(send_units.c.campaign_id == campaign_id).values(ready_time=func.clock_timestamp())
    )


async def is_under_way(conn: AsyncConnection, campaign_id: int) -> bool:
    """True while somebody holds a unit of the campaign, and so may be sending."""
    found = await conn.execute(select(exists().where(send_units.c.campaign_id == campaign_id, _is_held())))
    return bool(found.scalar_one())


async def has_units(conn: AsyncConnection, campaign_id: int) -> bool:
    """True while there are people in the campaign who are not dealt with."""
    return bool((await conn.execute(select(exists().where(send_units.c.campaign_id == campaign_id)))).scalar_one())


async def finish_unit(conn: AsyncConnection, unit: Unit) -> bool:
    """Delete a unit that is dealt with; True when it was the campaign's last.

    The campaign's row is locked first, so of two workers that finish at once the second sees the first one's deletion.
    """
    await conn.execute(select(campaigns.c.campaign_id).where(campaigns.c.campaign_id == unit.campaign_id).with_for_update())
    await conn.execute(delete(send_units).where(send_units.c.slot == unit.slot, send_units.c.lease == unit.lease))
    return not await has_units(conn, unit.campaign_id)
