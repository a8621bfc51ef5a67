"""Settling: how long a signal takes to be reported on a channel, and which "did not" is asked before that.

A receipt that is late makes a reader a non-reader until it arrives. How late receipts are is measured from the app's own
campaigns on the channel, minute by minute: the delay after sending within which 95 of 100 events of the signal happened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.retargeting.selections import Combination, Question, Selection, Sources
from aftertouch.signals import Expression
from aftertouch.store.activity import read_minutes
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, list_finished
from aftertouch.store.kinds import Kind, load_kinds

SHARE = 0.95
FEWEST_EVENTS = 20
"""With fewer, the 95th in 100 would be the slowest of all, or one that was never seen."""
UNMEASURED_DELAY = timedelta(days=1)
"""Where nothing was measured: WhatsApp's reads and carriers' reports are nearly all in by then."""
_RIPE = timedelta(days=1)
"""Of younger campaigns the slow events are still to come, so they are asked only where there are no others."""
_MOST_CAMPAIGNS = 20
_KNOWN_AT_ONCE = frozenset({"attempted", "sent", "skipped"})
"""Signals that sending itself sets."""


@dataclass(frozen=True)
class Unsettled:
    """A source that is denied a signal which may still be reported."""

    source: Campaign
    signal: str
    delay: timedelta
    measured_events: int
    settle_time: datetime


async def find_unsettled(
    conn: AsyncConnection, app: App, sources: Sources, selection: Selection, now: datetime, at: datetime | None = None
) -> list[Unsettled]:
    """Where a selection says "did not" sooner than the channel's own delay.

    Args:
        at: when it is asked; now, by default.
    """
    numbered = await load_kinds(conn)
    found = []
    for name, signal in sorted(list_denied(selection, sources)):
        source = sources[name].campaign
        delay, measured = await _measure_delay(conn, app, source, signal, numbered, now)
        settle_time = (source.finish_time or now) + delay
        if (at or now) < settle_time:
            found.append(Unsettled(source, signal, delay, measured, settle_time))
    return found


def list_denied(selection: Selection, sources: Sources, *, is_denied: bool = False) -> set[tuple[str, str]]:
    """Source and signal wherever the signal being true keeps somebody out."""
    match selection:
        case Question():
            action = sources[selection.source].channel.actions[selection.action]
            signals = _list_negated(action.expression, is_negated=is_denied)
            return {(selection.source, signal) for signal in signals - _KNOWN_AT_ONCE}
        case Combination(operator="all_but", operands=(everybody, excluded)):
            return list_denied(everybody, sources, is_denied=is_denied) | list_denied(excluded, sources, is_denied=not is_denied)
        case Combination():
            return set().union(*(list_denied(operand, sources, is_denied=is_denied) for operand in selection.operands))


def _list_negated(expression: Expression, *, is_negated: bool) -> set[str]:
    if expression.operator == "name":
        return {expression.name} if is_negated else set()
    inner = is_negated != (expression.operator == "~")
    return set().union(*(_list_negated(operand, is_negated=inner) for operand in expression.operands))


async def _measure_delay(
    conn: AsyncConnection, app: App, source: Campaign, signal: str, numbered: dict[int, Kind], at: datetime
) -> tuple[timedelta, int]:
    """The delay of a signal on the source's channel, and from how many events it was measured."""
    since = at - timedelta(days=app.retention_days)
    finished = await list_finished(conn, app.app_id, source.channel, since, _MOST_CAMPAIGNS)
    others = [campaign for campaign in finished if campaign.campaign_id != source.campaign_id]
    ripe = [campaign for campaign in others if campaign.finish_time and campaign.finish_time <= at - _RIPE]
    kinds = [number for number, kind in numbered.items() if kind.signal in ("sent", signal)]
    rows = await read_minutes(conn, [campaign.campaign_id for campaign in ripe or others], kinds)
    minutes: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = defaultdict(lambda: ([], []))
    for campaign_id, minute, kind, events in rows:
        minutes[campaign_id][numbered[kind].signal == signal].append((minute, events))
    delays = [pair for sent, heard in minutes.values() if sent for pair in pair_delays(sent, heard)]
    measured = sum(events for _, events in delays)
    if measured < FEWEST_EVENTS:
        return UNMEASURED_DELAY, measured
    return timedelta(minutes=find_quantile(delays, SHARE)), measured


def pair_delays(sent: Sequence[tuple[int, int]], heard: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Minutes of delay and number of events, from minutes and numbers of what was sent and what was heard.

    Who sent and who heard is not known here, so the order is taken to be kept: the first tenth of what is heard is about the
    first tenth of what was sent. Minutes are rounded up.
    """
    sent_minutes, sent_events = np.array(sent).T
    heard_minutes, heard_events = np.array(heard).reshape(-1, 2).T
    shares = (np.cumsum(heard_events) - heard_events) / max(heard_events.sum(), 1)
    places = np.searchsorted(np.cumsum(sent_events) / sent_events.sum(), shares, side="right")
    delays = np.maximum(heard_minutes - sent_minutes[places], 0) + 1
    return list(zip(delays.tolist(), heard_events.tolist(), strict=True))


def find_quantile(delays: Sequence[tuple[int, int]], share: float) -> int:
    """The shortest delay within which this share of the events happened."""
    minutes, events = np.array(sorted(delays)).T
    return int(minutes[np.searchsorted(np.cumsum(events), share * events.sum())])
