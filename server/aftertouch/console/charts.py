"""Activity over time, drawn as lines: a chart of one campaign's events, small enough to be written into the page."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from aftertouch.console.visits import Visit, to_time
from aftertouch.signals import CORE_IMPLICATIONS
from aftertouch.v1 import campaigns_pb2, events_pb2

COLUMNS, FEWEST_COLUMNS = 60, 12
WIDTH, HEIGHT = 600, 140
_QUIET = frozenset({"attempted", "skipped"})
"""Signals of ours that say nothing new beside ``sent``."""


@dataclass(frozen=True)
class Line:
    """One signal's events."""

    label: str
    points: str
    """As a polyline's."""
    total: int


@dataclass(frozen=True)
class Chart:
    """The lines of a campaign, most events first, and what their axes span."""

    lines: list[Line]
    highest: int
    """Events of one signal in one column."""
    start: datetime
    end: datetime
    step: timedelta
    """What one column spans."""


async def read_chart(visit: Visit, campaign: campaigns_pb2.Campaign) -> Chart | None:
    """The chart of a launched campaign, up to its last event; None when there was none."""
    activity = await visit.client.events.GetActivity(events_pb2.GetActivityRequest(campaign=campaign.name))
    start, bucket = to_time(activity.start_time), activity.bucket.ToTimedelta()
    shown = [series for series in activity.series if series.signal not in _QUIET and series.buckets]
    if start is None or not shown:
        return None
    last = max(to_time(series.buckets[-1].start_time) or start for series in shown)
    # A column is some whole buckets, so that none of them is cut; of what was over at once it is seen that nothing came after it.
    buckets = max((last - start) // bucket + 1, FEWEST_COLUMNS)
    step = bucket * -(-buckets // COLUMNS)
    columns = -(-buckets * bucket // step)
    found = visit.console.registry.types.get(campaign.channel)
    labels = {signal.name: signal.label for signal in found.channel.signals} if found else {}
    counts = {series.signal: [0] * columns for series in shown}
    for series in shown:
        for one in series.buckets:
            counts[series.signal][min(((to_time(one.start_time) or start) - start) // step, columns - 1)] += one.count
    highest = max(max(column) for column in counts.values())
    lines = [
        Line(labels.get(signal, signal.capitalize()), _join_points(column, highest), sum(column))
        for signal, column in counts.items()
        if signal in labels or signal in CORE_IMPLICATIONS
    ]
    return Chart(sorted(lines, key=lambda line: -line.total)[:6], highest, start, start + step * columns, step)


def _join_points(column: list[int], highest: int) -> str:
    """The points of a line that holds each column's height over its width; the highest is a little below the upper edge."""
    room, width = HEIGHT - 6, WIDTH / len(column)
    heights = [HEIGHT - 3 - room * count / highest for count in column]
    return " ".join(
        f"{width * place:.1f},{height:.1f} {width * (place + 1):.1f},{height:.1f}" for place, height in enumerate(heights)
    )
