"""A selection: an action of a launched campaign, maybe narrowed to reasons, as a question over its receipts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import ReasonClass
from aftertouch.declarations import ChannelType
from aftertouch.errors import (
    FieldsInvalid,
    RetargetingNotEnabled,
    SourceBeforePlan,
    SourceNotSent,
    SourceTooOld,
    Violation,
)
from aftertouch.rolls.chunks import Numbers
from aftertouch.rolls.sql import count_expressions, filter_by_set, read_roll, select_positions
from aftertouch.signals import Expression
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import standing_set
from aftertouch.store.kinds import group_evidence, load_kinds

_NARROWED = "failed for a chosen reason"
"""A pseudo signal: no declared signal has blanks in its name."""


@dataclass(frozen=True)
class Selection:
    """Who: the people of whom an action of a campaign is true."""

    source: str
    """The campaign's id."""
    action: str
    reason_codes: tuple[str, ...] = ()
    reason_classes: tuple[str, ...] = ()
    include_apart: bool = False


@dataclass(frozen=True)
class ActionCount:
    """How many people match an action, and of how many the answer cannot be known (yet)."""

    action: str
    count: int
    apart_count: int


@dataclass(frozen=True)
class Preview:
    """A retarget's funnel: ``matched`` less all drops is ``audience``."""

    matched: int
    no_subscription: int
    opted_out: int
    invalid: int
    audience: int


def check_source(app: App, source: Campaign, at: datetime | None = None) -> None:
    """Raise unless the campaign can be retargeted by a wave that goes out at this time (now, by default)."""
    name = f"{app.name}/campaigns/{source.campaign}"
    if not app.retargeting_enabled:
        raise RetargetingNotEnabled(app.name)
    if source.launch_time is None:
        raise SourceNotSent(name, source.state)
    if source.launch_time < app.retargetable_since:
        raise SourceBeforePlan(name, app.retargetable_since.isoformat())
    last_time = source.launch_time + timedelta(days=app.retention_days)
    if (at or datetime.now(UTC)) > last_time:
        raise SourceTooOld(name, app.retention_days, last_time.isoformat())


def check_selection(selection: Selection, channel: ChannelType, path: str) -> None:
    """Raise ``FieldsInvalid`` unless the source's channel has the action, and it can be narrowed as asked."""
    violations = []
    compiled = channel.actions.get(selection.action)
    if compiled is None:
        known = ", ".join(channel.actions)
        violations.append(Violation(f"{path}.action", f"{channel.name} has no action {selection.action!r}; it has {known}"))
    elif (selection.reason_codes or selection.reason_classes) and "failed" not in compiled.expression.names:
        violations.append(
            Violation(f"{path}.reason_codes", f"only an action over failed can be narrowed to reasons; {selection.action} is not")
        )
    for index, name in enumerate(selection.reason_classes):
        if name not in [known.value for known in ReasonClass]:
            known = ", ".join(ReasonClass)
            violations.append(Violation(f"{path}.reason_classes[{index}]", f"unknown class {name!r}; known are {known}"))
    if violations:
        raise FieldsInvalid(violations)


async def count_actions(conn: AsyncConnection, source: Campaign, channel: ChannelType) -> list[ActionCount]:
    """Every action of the campaign's channel with its exact counts, in one scan of its receipts."""
    expressions: dict[tuple[str, bool], Expression] = {}
    for name, compiled in channel.actions.items():
        expressions[name, False] = _leave_apart(compiled.expression, compiled.apart)
        if compiled.apart is not None:
            expressions[name, True] = compiled.apart
    kinds = group_evidence(await load_kinds(conn), channel.evidence)
    counts = await count_expressions(conn, source.campaign_id, kinds, expressions)
    return [ActionCount(name, counts[name, False], counts.get((name, True), 0)) for name in channel.actions]


async def select_numbers(conn: AsyncConnection, source: Campaign, channel: ChannelType, selection: Selection) -> Numbers:
    """The contact numbers of the people who match, ascending. The selection was checked."""
    compiled = channel.actions[selection.action]
    numbered = await load_kinds(conn)
    kinds = group_evidence(numbered, channel.evidence)
    if selection.include_apart and compiled.apart is not None:
        expression = Expression("|", (compiled.expression, compiled.apart))
    else:
        expression = _leave_apart(compiled.expression, compiled.apart)
    if selection.reason_codes or selection.reason_classes:
        expression = Expression("&", (expression, Expression("name", name=_NARROWED)))
        kinds[_NARROWED] = [
            number
            for number, kind in numbered.items()
            if kind.signal == "failed"
            and (kind.reason_code in selection.reason_codes or kind.reason_class in selection.reason_classes)
        ]
    positions = await select_positions(conn, source.campaign_id, kinds, expression)
    return (await read_roll(conn, source.campaign_id))[positions]


def _leave_apart(expression: Expression, apart: Expression | None) -> Expression:
    return expression if apart is None else Expression("&", (expression, Expression("~", (apart,))))


async def preview(conn: AsyncConnection, app: App, numbers: Numbers, channel: str) -> Preview:
    """What becomes of these people on a channel."""
    standings: Mapping[str, int] = {
        standing: int(np.count_nonzero(await filter_by_set(conn, app.app_id, standing_set(standing, channel), numbers)))
        for standing in ("active", "opted_out", "invalid")
    }
    return Preview(
        matched=len(numbers),
        no_subscription=len(numbers) - sum(standings.values()),
        opted_out=standings["opted_out"],
        invalid=standings["invalid"],
        audience=standings["active"],
    )


def title_wave(source: Campaign, channel: ChannelType, selection: Selection) -> str:
    """The name of a wave: "Retarget: Summer Sale (not read)", cut to 200 characters; a wave of a wave adds its action."""
    tail = f" ({channel.actions[selection.action].action.short_name})"
    return f"Retarget: {source.display_name.removeprefix('Retarget: ')}"[: 200 - len(tail)] + tail
