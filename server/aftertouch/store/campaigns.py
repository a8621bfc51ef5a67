"""Campaigns: the drafts, and where each stands. What became true of their recipients is in ``rolls``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import AlreadyExists
from aftertouch.rolls.sql import delete_roll
from aftertouch.store.app_secrets import is_of_owner
from aftertouch.store.tables import campaigns


@dataclass(frozen=True)
class Campaign:
    """One content to one audience on one channel."""

    campaign_id: int
    app_id: int
    campaign: str
    display_name: str
    channel: str
    content: Mapping[str, Any] | None
    audience: Mapping[str, Any] | None
    """The Audience message as JSON."""
    state: str
    """The name of a value of ``Campaign.State``."""
    state_reason: str
    version: int
    recipients: int
    root_id: int | None
    create_time: datetime
    update_time: datetime
    schedule_time: datetime | None
    """When it is to be launched, or was."""
    send_by_time: datetime | None
    """After this nobody is sent to any more."""
    messages_per_second: int
    """0 is as fast as the limits of the channel allow."""
    transactional: bool
    """Neither quiet hours nor the frequency cap hold for it."""
    track_links: bool
    """Links in its content lead through us."""
    links: Sequence[str]
    """The tracked ones by their numbers, as they stand in the content; none before the launch."""
    launch_time: datetime | None
    finish_time: datetime | None
    holdout_percent: int
    """How many of 100 people of the audience are not messaged."""
    holdout_count: int
    """How many were not."""
    source_id: int | None
    """Of a follow-up: the campaign after whose sending it is launched."""
    delay_seconds: int | None
    """And how long after."""


_DRAFTS = 1
"""The class of the advisory locks on drafts of a chain."""
_LAUNCHES = 2
"""Of those on launches in a chain."""
STATES = ("DRAFT", "SCHEDULED", "SENDING", "PAUSED", "SENT", "CANCELED", "FAILED")
_OVER = ("SENT", "CANCELED", "FAILED")
"""States from which nothing more comes."""


def _campaign(row: Row[Any]) -> Campaign:
    return Campaign(**row._mapping)


async def create_campaign(conn: AsyncConnection, app_id: int, campaign: str, values: Mapping[str, Any]) -> Campaign:
    """Make a draft.

    Raises:
        AlreadyExists: its id is taken.
    """
    try:
        async with conn.begin_nested():
            return _campaign(
                (
                    await conn.execute(
                        insert(campaigns).values(app_id=app_id, campaign=campaign, state="DRAFT", **values).returning(campaigns)
                    )
                ).one()
            )
    except IntegrityError as error:
        raise AlreadyExists(f"campaigns/{campaign}") from error


async def find_campaign(conn: AsyncConnection, app_id: int, campaign: str, *, lock: bool = False) -> Campaign | None:
    """The campaign of this id; with ``lock``, nobody else changes it until the transaction ends."""
    statement = select(campaigns).where(campaigns.c.app_id == app_id, campaigns.c.campaign == campaign)
    row = (await conn.execute(statement.with_for_update() if lock else statement)).one_or_none()
    return _campaign(row) if row else None


async def read_campaign(conn: AsyncConnection, campaign_id: int, *, lock: bool = False) -> Campaign | None:
    """The campaign of this number."""
    statement = select(campaigns).where(campaigns.c.campaign_id == campaign_id)
    row = (await conn.execute(statement.with_for_update() if lock else statement)).one_or_none()
    return _campaign(row) if row else None


async def find_campaigns(conn: AsyncConnection, app_id: int, names: list[str]) -> dict[str, Campaign]:
    """Those of these campaigns that exist, by id."""
    rows = await conn.execute(select(campaigns).where(campaigns.c.app_id == app_id, campaigns.c.campaign.in_(names)))
    return {row.campaign: _campaign(row) for row in rows}


async def read_campaigns(conn: AsyncConnection, campaign_ids: list[int]) -> dict[int, Campaign]:
    """Those of these campaigns that exist, by number."""
    rows = await conn.execute(select(campaigns).where(campaigns.c.campaign_id.in_(campaign_ids)))
    return {row.campaign_id: _campaign(row) for row in rows}


@dataclass(frozen=True)
class CampaignFilter:
    """Which campaigns to list; None asks nothing."""

    state: str | None = None
    channel: str | None = None
    root: str | None = None
    """The id of the campaign at the root: only its waves."""
    text: str | None = None
    """Part of the display name, in capitals or not."""


async def list_campaigns(
    conn: AsyncConnection, app_id: int, before: int | None, limit: int, where: CampaignFilter | None = None
) -> list[Campaign]:
    """Newest first, those made before the campaign with this number."""
    columns = campaigns.c
    statement = select(campaigns).where(columns.app_id == app_id).order_by(columns.campaign_id.desc()).limit(limit)
    if before is not None:
        statement = statement.where(columns.campaign_id < before)
    where = where or CampaignFilter()
    if where.state is not None:
        statement = statement.where(columns.state == where.state)
    if where.channel is not None:
        statement = statement.where(columns.channel == where.channel)
    if where.root is not None:
        root = select(columns.campaign_id).where(columns.app_id == app_id, columns.campaign == where.root).scalar_subquery()
        statement = statement.where(columns.root_id == root)
    if where.text is not None:
        statement = statement.where(columns.display_name.icontains(where.text, autoescape=True))
    return [_campaign(row) for row in await conn.execute(statement)]


async def count_states(conn: AsyncConnection) -> dict[str, int]:
    """How many campaigns of all apps are in each state, those that none is in as well."""
    rows = await conn.execute(select(campaigns.c.state, func.count()).group_by(campaigns.c.state))
    return dict.fromkeys(STATES, 0) | {state: number for state, number in rows}


async def lock_due_campaign(conn: AsyncConnection, shared: Collection[str], installed: Collection[str]) -> Campaign | None:
    """A scheduled campaign whose time has come, locked; None when there is none that is free.

    Args:
        shared: channels on which every app's campaigns are wanted.
        installed: those on which campaigns of apps with settings of their own are wanted.
    """
    statement = (
        select(campaigns)
        .where(campaigns.c.state == "SCHEDULED", campaigns.c.schedule_time <= func.now())
        .where(campaigns.c.channel.in_(shared) | (campaigns.c.channel.in_(installed) & is_of_owner()))
        .order_by(campaigns.c.schedule_time)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    row = (await conn.execute(statement)).one_or_none()
    return _campaign(row) if row else None


async def lock_settled_follow_up(conn: AsyncConnection) -> Campaign | None:
    """A follow-up whose source is sent, or never will be, and that has no time yet, locked; None when there is none."""
    source = campaigns.alias()
    statement = (
        select(campaigns)
        .outerjoin(source, source.c.campaign_id == campaigns.c.source_id)
        .where(
            campaigns.c.state == "SCHEDULED",
            campaigns.c.schedule_time.is_(None),
            source.c.campaign_id.is_(None) | source.c.state.in_(_OVER),
        )
        .order_by(campaigns.c.campaign_id)
        .limit(1)
        .with_for_update(skip_locked=True, of=campaigns)
    )
    row = (await conn.execute(statement)).one_or_none()
    return _campaign(row) if row else None


async def list_chain(conn: AsyncConnection, root_id: int, limit: int) -> list[Campaign]:
    """The campaigns of a chain: the root, the launched ones by the time of their launch, then the others."""
    statement = (
        select(campaigns)
        .where((campaigns.c.campaign_id == root_id) | (campaigns.c.root_id == root_id))
        .order_by(campaigns.c.campaign_id != root_id, campaigns.c.launch_time, campaigns.c.campaign_id)
        .limit(limit)
    )
    return [_campaign(row) for row in await conn.execute(statement)]


async def read_holdouts(conn: AsyncConnection, root_ids: Collection[int]) -> dict[int, int]:
    """How many of 100 people the launched campaigns of these chains hold out at the most, by root; none is left out."""
    root = func.coalesce(campaigns.c.root_id, campaigns.c.campaign_id)
    statement = (
        select(root, func.max(campaigns.c.holdout_percent))
        .where(
            campaigns.c.campaign_id.in_(root_ids) | campaigns.c.root_id.in_(root_ids),
            campaigns.c.launch_time.is_not(None),
            campaigns.c.holdout_percent > 0,
        )
        .group_by(root)
    )
    return {root_id: percent for root_id, percent in await conn.execute(statement)}


async def list_launched(conn: AsyncConnection, app_id: int, before: int | None, limit: int) -> list[int]:
    """The numbers of launched campaigns, newest first, those made before the campaign with this number."""
    statement = (
        select(campaigns.c.campaign_id)
        .where(campaigns.c.app_id == app_id, campaigns.c.launch_time.is_not(None))
        .order_by(campaigns.c.campaign_id.desc())
        .limit(limit)
    )
    if before is not None:
        statement = statement.where(campaigns.c.campaign_id < before)
    return list((await conn.execute(statement)).scalars())


async def list_open_waves(conn: AsyncConnection, root_ids: Collection[int]) -> list[Campaign]:
    """The waves of these chains that have their people and are not sent yet."""
    statement = select(campaigns).where(
        campaigns.c.root_id.in_(root_ids), campaigns.c.state.in_(("SCHEDULED", "SENDING", "PAUSED")), campaigns.c.recipients > 0
    )
    return [_campaign(row) for row in await conn.execute(statement)]


async def list_waves_at(conn: AsyncConnection, root_ids: Collection[int], at: datetime) -> list[Campaign]:
    """The waves of these chains that were launched, and not sent yet, at a time that is past."""
    statement = select(campaigns).where(
        campaigns.c.root_id.in_(root_ids),
        campaigns.c.launch_time < at,
        func.coalesce(campaigns.c.finish_time, func.now()) > at,
    )
    return [_campaign(row) for row in await conn.execute(statement)]


async def lock_chains(conn: AsyncConnection, root_ids: Collection[int]) -> None:
    """Until the transaction ends, have nobody else choose whom to launch a wave of these chains to."""
    for root_id in sorted(root_ids):
        await conn.execute(select(func.pg_advisory_xact_lock(_LAUNCHES, func.hashint8(root_id))))


async def list_sent_since(conn: AsyncConnection, app_id: int, channel: str, since: datetime, limit: int) -> list[Campaign]:
    """The campaigns on a channel that were still being sent then, or were launched later, newest first."""
    statement = (
        select(campaigns)
        .where(
            campaigns.c.app_id == app_id,
            campaigns.c.channel == channel,
            campaigns.c.launch_time.is_not(None),
            func.coalesce(campaigns.c.finish_time, func.now()) >= since,
        )
        .order_by(campaigns.c.launch_time.desc())
        .limit(limit)
    )
    return [_campaign(row) for row in await conn.execute(statement)]


async def list_finished(conn: AsyncConnection, app_id: int, channel: str, since: datetime, limit: int) -> list[Campaign]:
    """The campaigns on a channel that were launched since then and are sent, newest first."""
    statement = (
        select(campaigns)
        .where(
            campaigns.c.app_id == app_id,
            campaigns.c.channel == channel,
            campaigns.c.launch_time >= since,
            campaigns.c.finish_time.is_not(None),
        )
        .order_by(campaigns.c.launch_time.desc())
        .limit(limit)
    )
    return [_campaign(row) for row in await conn.execute(statement)]


async def find_draft(
    conn: AsyncConnection, app_id: int, root_id: int, channel: str, audience: Mapping[str, Any]
) -> Campaign | None:
    """A wave of the chain for the same audience on the same channel that was not launched yet.

    Until the transaction ends, nobody else looks for one.
    """
    await conn.execute(select(func.pg_advisory_xact_lock(_DRAFTS, func.hashint8(root_id))))
    statement = select(campaigns).where(
        campaigns.c.app_id == app_id,
        campaigns.c.root_id == root_id,
        campaigns.c.state.in_(("DRAFT", "SCHEDULED")),
        campaigns.c.channel == channel,
        campaigns.c.audience.op("-")("frozen") == {key: value for key, value in audience.items() if key != "frozen"},
    )
    row = (await conn.execute(statement.order_by(campaigns.c.campaign_id).limit(1))).one_or_none()
    return _campaign(row) if row else None


async def update_campaign(conn: AsyncConnection, campaign_id: int, **values: Any) -> Campaign:
    """Change a campaign; its version and update_time move on. The caller holds its lock."""
    statement = (
        update(campaigns)
        .where(campaigns.c.campaign_id == campaign_id)
        .values(version=campaigns.c.version + 1, update_time=func.now(), **values)
        .returning(campaigns)
    )
    return _campaign((await conn.execute(statement)).one())


async def delete_campaign(conn: AsyncConnection, campaign_id: int) -> None:
    """Delete a draft, with the people that were frozen for it."""
    await delete_roll(conn, campaign_id)
    await conn.execute(delete(campaigns).where(campaigns.c.campaign_id == campaign_id))
