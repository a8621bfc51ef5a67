"""Follow-ups: waves that wait until their source is sent, and are launched so long after the end of its sending.

A follow-up is a SCHEDULED campaign like any other, except that it has no time yet. Whoever looks for campaigns that are due gives
it one once its source is sent, so nothing has to be remembered at the end of sending, and a crash there loses no follow-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.delivery.control import check_state
from aftertouch.errors import FieldsInvalid, Violation
from aftertouch.retargeting.audiences import encode_audience
from aftertouch.retargeting.selections import Question, check_source, find_faults, find_source, root_of, title_wave
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, lock_settled_follow_up, read_campaign, update_campaign

log = structlog.get_logger()


@dataclass(frozen=True)
class Wait:
    """What a scheduled campaign waits for, as columns of it: a time, or, as a follow-up, the end of its source's sending."""

    schedule_time: datetime | None
    """None of a follow-up whose source is not sent yet."""
    source_id: int | None = None
    delay_seconds: int | None = None

    @property
    def earliest(self) -> datetime:
        """When it can be over: of a follow-up whose source is not sent, if that were sent now."""
        return self.schedule_time or datetime.now(UTC) + timedelta(seconds=self.delay_seconds or 0)


def plan_follow_up(
    app: App, channels: Mapping[str, ChannelType], source: Campaign, question: Question, delay: timedelta, path: str
) -> dict[str, Any]:
    """The columns of a follow-up, when it may be made; but for what it says, and on which channel.

    Args:
        source: launched or not; the question is about it.
        path: to the step, for errors.

    Raises:
        FieldsInvalid, or what ``find_source`` and ``plan_delay`` raise.
    """
    asked = find_source(app, channels, source, may_wait=True)
    if violations := list(find_faults(question, asked.channel, f"{path}.selection")):
        raise FieldsInvalid(violations)
    return {
        "display_name": title_wave(question, {source.campaign: asked}),
        "audience": encode_audience(question),
        "root_id": root_of(source),
        **vars(plan_delay(app, source, delay, f"{path}.delay")),
    }


def plan_delay(app: App, source: Campaign, delay: timedelta, path: str) -> Wait:
    """Have a wave wait for so long after the end of its source's sending, when it may.

    Args:
        path: to the delay, for errors.

    Raises:
        CampaignStateWrong: nothing more comes of the source.
        FieldsInvalid, or what ``check_source`` raises.
    """
    check_state(app, source, "DRAFT", "SCHEDULED", "SENDING", "PAUSED", "SENT")
    if delay > timedelta(days=app.retention_days):
        raise FieldsInvalid([Violation(path, f"must be at most {app.retention_days} days: event data is kept so long")])
    wait = Wait(source.finish_time and source.finish_time + delay, source.campaign_id, int(delay.total_seconds()))
    check_source(app, source, wait.earliest, may_wait=True)
    return wait


async def time_follow_up(conn: AsyncConnection) -> bool:
    """Give one follow-up whose source is sent its time, or skip it if that will never be; False when there is none."""
    waiting = await lock_settled_follow_up(conn)
    if waiting is None:
        return False
    assert waiting.source_id is not None, "only a follow-up is scheduled without a time"
    assert waiting.delay_seconds is not None
    source = await read_campaign(conn, waiting.source_id)
    if source is not None and source.state == "SENT" and source.finish_time is not None:
        time = source.finish_time + timedelta(seconds=waiting.delay_seconds)
        await update_campaign(conn, waiting.campaign_id, schedule_time=time)
        log.info("a follow-up has its time", action="time_follow_up", campaign_id=waiting.campaign_id)
        return True
    reason = f"skipped: its source {source.campaign} is {source.state}" if source else "skipped: its source was deleted"
    await update_campaign(conn, waiting.campaign_id, state="CANCELED", state_reason=reason, finish_time=func.now())
    log.warning("a follow-up was skipped", action="time_follow_up", campaign_id=waiting.campaign_id)
    return True
