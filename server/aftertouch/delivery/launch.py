"""Launching, now or at a time: the audience becomes a roll, and the roll's chunks become work units, in one transaction.

Whoever is held out gets a roll of their own, which nothing sends to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import structlog
from sqlalchemy import func
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Channel
from aftertouch.delivery.context import find_links
from aftertouch.delivery.control import check_state
from aftertouch.delivery.follow_ups import Wait, plan_delay, time_follow_up
from aftertouch.errors import (
    AftertouchError,
    AudienceEmpty,
    ChannelNotReady,
    ContentMissing,
    DatabaseUnavailable,
    FieldsInvalid,
    NotFound,
    Violation,
)
from aftertouch.plugins import Registry
from aftertouch.retargeting.audiences import decode_audience, decode_frozen, evaluate_audience, filter_selection
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.holdouts import find_held_out, find_shares
from aftertouch.retargeting.selections import Combination, Question, find_roots, find_sources, list_questions, root_of
from aftertouch.rolls.chunks import Numbers, count_chunks, holdout_of, list_numbers
from aftertouch.rolls.sql import delete_roll, read_roll, write_roll
from aftertouch.store.app_secrets import list_own_channels
from aftertouch.store.apps import App, read_app
from aftertouch.store.campaigns import Campaign, find_campaigns, lock_chains, lock_due_campaign, update_campaign
from aftertouch.store.units import create_units, wake_workers

log = structlog.get_logger()

LONGEST_CHECK = timedelta(seconds=10)
"""Somebody waits for the answer to a launch."""
FURTHEST = timedelta(days=366)
"""How far ahead a launch may be scheduled."""


async def check_content(channel: Channel, campaign: Campaign) -> None:
    """Have the channel ask its provider whether it takes a draft's content. Outside of any transaction: it may take seconds.

    Raises:
        FieldsInvalid: it does not. When the provider does not answer, sending will show.
    """
    try:
        async with asyncio.timeout(LONGEST_CHECK.total_seconds()):
            problems = await channel.check_content(channel.content_model.model_validate(campaign.content))
        violations = [Violation(f"content.{problem.field}", problem.text) for problem in problems]
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        log.warning("a content could not be checked", action="check_content", channel=channel.name, cause=cause[:200])
        return
    if violations:
        raise FieldsInvalid(violations)


@dataclass(frozen=True)
class People:
    """Whom a launch is for, as contact numbers."""

    roll: Numbers
    held_out: Numbers


async def prepare_launch(
    conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign, wait: Wait | None = None
) -> People:
    """Check that a campaign can be launched, and return whom it would go to now.

    Args:
        wait: after which it is launched. As long as the source of a follow-up is not, there is nobody to go to.

    Raises:
        CampaignStateWrong, ContentMissing, FieldsInvalid, ChannelNotReady, or what a selection's source raises.
    """
    check_state(app, campaign, "DRAFT", "SCHEDULED")
    if campaign.content is None:
        raise ContentMissing(f"{app.name}/campaigns/{campaign.campaign}")
    if campaign.audience is None:
        raise FieldsInvalid([Violation("audience", "the campaign has none; set it with UpdateCampaign")])
    is_own = campaign.channel in registry.types and campaign.channel in await list_own_channels(conn, app.app_id)
    if campaign.channel not in registry.channels and not is_own:
        raise ChannelNotReady(campaign.channel, registry.obstacles.get(campaign.channel, ("it is not installed",)))
    chosen, roots = await _find_people(conn, registry, app, campaign, campaign.audience, wait)
    held_out = find_held_out(await find_shares(conn, roots, root_of(campaign), campaign.holdout_percent), chosen)
    return People(chosen[~held_out], chosen[held_out])


async def _find_people(
    conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign, stored: Mapping[str, Any], wait: Wait | None
) -> tuple[Numbers, Collection[int]]:
    """The people of an audience, or those for whom it was frozen when the draft was made; and the roots of the chains it asks."""
    audience, is_frozen = decode_audience(stored), decode_frozen(stored) is not None
    if isinstance(audience, Question | Combination):
        at, is_follow_up = (wait.schedule_time, wait.source_id is not None) if wait else (None, False)
        sources = await find_sources(conn, app, registry.types, audience, "audience.retarget", at, may_wait=is_follow_up)
        # Of two waves that are launched at once, each has to see whom the other took, and whom it held out.
        await lock_chains(conn, find_roots(sources))
        if is_frozen:
            return await read_roll(conn, campaign.campaign_id), find_roots(sources)
        funnel = await filter_selection(conn, Copies(), app, sources, audience, campaign.channel, campaign)
        return list_numbers(funnel.chosen), find_roots(sources)
    if is_frozen:
        return await read_roll(conn, campaign.campaign_id), ()
    return list_numbers(await evaluate_audience(conn, app, audience, campaign.channel)), ()


async def plan_launch(
    conn: AsyncConnection,
    app: App,
    campaign: Campaign,
    schedule_time: datetime | None,
    delay: timedelta | None,
    send_by_time: datetime | None,
) -> Wait | None:
    """What a draft would wait for, to be launched at a time or so long after its source was sent; None for now.

    Raises:
        FieldsInvalid, NotFound, or what ``plan_delay`` raises.
    """
    now, wait, violations = datetime.now(UTC), None, []
    if delay is not None:
        if schedule_time is not None:
            raise FieldsInvalid([Violation("delay", "cannot be given together with schedule_time")])
        wait = plan_delay(app, await _find_awaited(conn, app, campaign), delay, "delay")
        if wait.schedule_time is not None and wait.schedule_time <= now:
            wait = None
    elif schedule_time is not None:
        wait = Wait(schedule_time)
        if not now < schedule_time <= now + FURTHEST:
            violations.append(Violation("schedule_time", f"must be in the future and at most {FURTHEST.days} days ahead"))
    if send_by_time is not None and send_by_time <= (wait.earliest if wait else now):
        violations.append(Violation("send_by_time", "must be after the launch"))
    if violations:
        raise FieldsInvalid(violations)
    return wait


async def _find_awaited(conn: AsyncConnection, app: App, campaign: Campaign) -> Campaign:
    """The one campaign that a draft's audience asks, after whose sending it can be launched."""
    audience = decode_audience(campaign.audience) if campaign.audience else None
    asked = list_questions(audience) if isinstance(audience, Question | Combination) else ()
    names = {question.source for question, _ in asked}
    if len(names) != 1:
        raise FieldsInvalid([Violation("delay", "is for an audience that asks one campaign; give a schedule_time instead")])
    found = await find_campaigns(conn, app.app_id, list(names))
    if not found:
        raise NotFound(f"{app.name}/campaigns/{names.pop()}")
    return found[names.pop()]


async def schedule(
    conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign, wait: Wait, send_by_time: datetime | None
) -> Campaign:
    """Have a draft launched, and its audience evaluated, when its wait is over. The caller holds the campaign's lock.

    Raises:
        What ``prepare_launch`` raises: what is wrong now is said now. An empty audience may fill up.
    """
    check_state(app, campaign, "DRAFT")
    await prepare_launch(conn, registry, app, campaign, wait)
    return await update_campaign(
        conn, campaign.campaign_id, state="SCHEDULED", state_reason="", send_by_time=send_by_time, **vars(wait)
    )


async def unschedule(conn: AsyncConnection, app: App, campaign: Campaign) -> Campaign:
    """Make a scheduled campaign a draft again, which waits for nothing. The caller holds the campaign's lock.

    Raises:
        CampaignStateWrong: it is not scheduled.
    """
    check_state(app, campaign, "SCHEDULED")
    return await update_campaign(
        conn,
        campaign.campaign_id,
        state="DRAFT",
        schedule_time=None,
        send_by_time=None,
        source_id=None,
        delay_seconds=None,
    )


async def launch(
    conn: AsyncConnection, registry: Registry, app: App, campaign: Campaign, send_by_time: datetime | None
) -> Campaign:
    """Freeze the audience and start sending when the transaction commits. The caller holds the campaign's lock.

    Raises:
        AudienceEmpty, or what ``prepare_launch`` raises.
    """
    people = await prepare_launch(conn, registry, app, campaign)
    if not len(people.roll):
        raise AudienceEmpty(f"{app.name}/campaigns/{campaign.campaign}")
    is_frozen = campaign.audience is not None and decode_frozen(campaign.audience) is not None
    if not is_frozen or len(people.held_out):
        # What was frozen has everybody; without those who are held out it is another roll.
        await delete_roll(conn, campaign.campaign_id)
        await write_roll(conn, campaign.campaign_id, people.roll)
    await write_roll(conn, holdout_of(campaign.campaign_id), people.held_out)
    await create_units(conn, campaign.campaign_id, count_chunks(len(people.roll)))
    await wake_workers(conn)
    return await update_campaign(
        conn,
        campaign.campaign_id,
        state="SENDING",
        state_reason="",
        recipients=len(people.roll),
        holdout_count=len(people.held_out),
        launch_time=func.now(),
        send_by_time=send_by_time,
        links=find_links(campaign, registry.types[campaign.channel]),
    )


async def launch_due(conn: AsyncConnection, registry: Registry) -> bool:
    """Launch one scheduled campaign whose time has come, or give a follow-up its time; False when there is none of either.

    One that cannot be launched fails with the reason, and one that is past its send-by time is not launched at all: a server
    that was down for hours does not send what nobody wants any more. A follow-up with nobody to be sent to is skipped.
    """
    if await time_follow_up(conn):
        return True
    campaign = await lock_due_campaign(conn, sorted(registry.channels), sorted(registry.types))
    if campaign is None:
        return False
    app = await read_app(conn, campaign.app_id)
    if campaign.send_by_time is not None and campaign.send_by_time <= datetime.now(UTC):
        reason = "it was to be sent by a time at which no server was there to launch it"
        await update_campaign(conn, campaign.campaign_id, state="FAILED", state_reason=reason, finish_time=func.now())
        log.error("a campaign was not launched", action="launch_due", campaign_id=campaign.campaign_id, reason="SEND_BY_PASSED")
        return True
    try:
        async with conn.begin_nested():
            await launch(conn, registry, app, campaign, campaign.send_by_time)
    except (DatabaseUnavailable, DBAPIError, psycopg.Error):
        raise
    except AudienceEmpty as error:
        is_follow_up = campaign.source_id is not None
        state, reason = ("CANCELED", f"skipped: {error}") if is_follow_up else ("FAILED", str(error))
        await update_campaign(conn, campaign.campaign_id, state=state, state_reason=reason, finish_time=func.now())
        log.warning("a campaign has nobody to go to", action="launch_due", campaign_id=campaign.campaign_id, reason=error.reason)
    except AftertouchError as error:
        await update_campaign(conn, campaign.campaign_id, state="FAILED", state_reason=str(error), finish_time=func.now())
        log.error("a campaign was not launched", action="launch_due", campaign_id=campaign.campaign_id, reason=error.reason)
    except Exception:
        # It would be the first in turn again, and no other would ever be launched.
        reason = "it could not be launched, by a defect of ours; the server's log has the trace"
        await update_campaign(conn, campaign.campaign_id, state="FAILED", state_reason=reason, finish_time=func.now())
        log.exception("a campaign was not launched", action="launch_due", campaign_id=campaign.campaign_id)
    else:
        log.info("a campaign was launched", action="launch_due", campaign_id=campaign.campaign_id)
    return True
