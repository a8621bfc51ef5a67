"""A selection: an action of a launched campaign, maybe narrowed to reasons, or a combination of selections; and its rules.

Whatever is combined are selections again, so lists and other audiences cannot get in, and each source has to meet the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import ReasonClass
from aftertouch.declarations import ChannelType
from aftertouch.errors import (
    FieldsInvalid,
    NotFound,
    RetargetingNotEnabled,
    ScheduleTooLate,
    SourceBeforePlan,
    SourceNotSent,
    SourceTooOld,
    Violation,
)
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, find_campaigns

MOST_QUESTIONS = 20
"""In one selection, so that no call reads more than so many campaigns."""
DEEPEST = 5
"""A question alone is one deep."""


@dataclass(frozen=True)
class Question:
    """The people of whom an action of one campaign is true."""

    source: str
    """The campaign's id."""
    action: str
    reason_codes: tuple[str, ...] = ()
    reason_classes: tuple[str, ...] = ()
    include_apart: bool = False
    leave_out_pending: bool = False


@dataclass(frozen=True)
class Combination:
    """The people who are in any of the operands, in all of them, or in the first and not in the second."""

    operator: Literal["any_of", "all_of", "all_but"]
    operands: tuple[Selection, ...]


Selection: TypeAlias = Question | Combination


@dataclass(frozen=True)
class Source:
    """A campaign that is asked, and its channel."""

    campaign: Campaign
    channel: ChannelType


Sources: TypeAlias = Mapping[str, Source]
"""By the campaign's id, in the order in which a selection first names them."""


def list_questions(selection: Selection, path: str = "") -> Iterator[tuple[Question, str]]:
    """Every question of a selection with the path to it, from left to right."""
    match selection:
        case Question():
            yield selection, path
        case Combination(operator="all_but", operands=(everybody, excluded)):
            yield from list_questions(everybody, f"{path}.all_but.all")
            yield from list_questions(excluded, f"{path}.all_but.but")
        case Combination():
            for index, operand in enumerate(selection.operands):
                yield from list_questions(operand, f"{path}.{selection.operator}.selections[{index}]")


async def find_sources(
    conn: AsyncConnection,
    app: App,
    channels: Mapping[str, ChannelType],
    selection: Selection,
    path: str,
    at: datetime | None = None,
    *,
    may_wait: bool = False,
) -> Sources:
    """The campaigns that a selection asks, when each can be asked.

    Args:
        at: when the wave goes out; now, by default.
        may_wait: the wave waits until its source is sent, which need not be launched yet.

    Raises:
        NotFound, FieldsInvalid, or what ``check_source`` raises.
    """
    asked = list(list_questions(selection, path))
    names = list(dict.fromkeys(question.source for question, _ in asked))
    found = await find_campaigns(conn, app.app_id, names)
    sources: dict[str, Source] = {}
    for name in names:
        if name not in found:
            raise NotFound(f"{app.name}/campaigns/{name}")
        sources[name] = find_source(app, channels, found[name], at, may_wait=may_wait)
    violations = [fault for question, where in asked for fault in find_faults(question, sources[question.source].channel, where)]
    if violations:
        raise FieldsInvalid(violations)
    return sources


def find_source(
    app: App,
    channels: Mapping[str, ChannelType],
    campaign: Campaign,
    at: datetime | None = None,
    *,
    may_wait: bool = False,
) -> Source:
    """A campaign with its channel, when it can be retargeted.

    Raises:
        NotFound: its channel is no longer installed; or what ``check_source`` raises.
    """
    check_source(app, campaign, at, may_wait=may_wait)
    if campaign.channel not in channels:
        raise NotFound(f"channels/{campaign.channel}")
    return Source(campaign, channels[campaign.channel])


def check_source(app: App, source: Campaign, at: datetime | None = None, *, may_wait: bool = False) -> None:
    """Raise unless the campaign can be retargeted by a wave that goes out at this time (now, by default), or waits for it."""
    name = f"{app.name}/campaigns/{source.campaign}"
    if not app.retargeting_enabled:
        raise RetargetingNotEnabled(app.name)
    if source.launch_time is None and may_wait:
        return
    if source.launch_time is None:
        raise SourceNotSent(name, source.state)
    if source.launch_time < app.retargetable_since:
        raise SourceBeforePlan(name, app.retargetable_since)
    last_time = source.launch_time + timedelta(days=app.retention_days)
    if datetime.now(UTC) > last_time:
        raise SourceTooOld(name, app.retention_days, last_time)
    if at is not None and at > last_time:
        raise ScheduleTooLate(name, app.retention_days, at, last_time)


def find_faults(question: Question, channel: ChannelType, path: str) -> Iterator[Violation]:
    """What the source's channel cannot be asked."""
    compiled = channel.actions.get(question.action)
    if compiled is None:
        known = ", ".join(channel.actions)
        yield Violation(f"{path}.action", f"{channel.name} has no action {question.action!r}; it has {known}")
    elif (question.reason_codes or question.reason_classes) and compiled.reasoned is None:
        text = f"only an action over failed, or clicked itself, can be narrowed to reasons; {question.action} is neither"
        yield Violation(f"{path}.reason_codes", text)
    for index, name in enumerate(question.reason_classes):
        if name not in [known.value for known in ReasonClass]:
            yield Violation(f"{path}.reason_classes[{index}]", f"unknown class {name!r}; known are {', '.join(ReasonClass)}")


def root_of(campaign: Campaign) -> int:
    """The campaign at the root of a campaign's chain."""
    return campaign.root_id or campaign.campaign_id


def find_root(sources: Sources) -> int:
    """The campaign at the root of the chain to which a wave belongs: that of the source which its selection names first."""
    return root_of(next(iter(sources.values())).campaign)


def find_roots(sources: Sources) -> frozenset[int]:
    """The roots of all chains that a selection asks."""
    return frozenset(root_of(source.campaign) for source in sources.values())


_LONGEST_TITLE = 200
_LONGEST_TAIL = 160
_WORDS = {"any_of": " or ", "all_of": " and ", "all_but": " but not "}


def title_wave(selection: Selection, sources: Sources) -> str:
    """The name of a wave, at most 200 characters: "Retarget: Summer Sale (not read)"; a wave of a wave adds its action.

    Combined: "Retarget: Summer Sale (clicked or confirmed)" of one campaign, and of several
    "Retarget: Summer Sale (clicked) or Reminder (read)".
    """

    def name(source: str) -> str:
        return sources[source].campaign.display_name.removeprefix("Retarget: ")

    def describe(question: Question) -> str:
        return sources[question.source].channel.actions[question.action].action.short_name

    if len(sources) == 1:
        tail = _cut(f" ({_phrase(selection, describe)})", _LONGEST_TAIL)
        return f"Retarget: {name(next(iter(sources)))}"[: _LONGEST_TITLE - len(tail)] + tail
    phrase = _phrase(selection, lambda question: f"{name(question.source)} ({describe(question)})")
    return _cut(f"Retarget: {phrase}", _LONGEST_TITLE)


def _phrase(selection: Selection, describe: Callable[[Question], str]) -> str:
    if isinstance(selection, Question):
        return describe(selection)
    parts = [
        f"[{_phrase(operand, describe)}]" if isinstance(operand, Combination) else describe(operand)
        for operand in selection.operands
    ]
    return _WORDS[selection.operator].join(parts)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
