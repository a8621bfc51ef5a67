"""Activity over time, drawn as lines: a chart of one campaign's events, small enough to be written into the page."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from aftertouch.console.visits import Visit
from aftertouch.rpc.values import to_timestamp
from aftertouch.signals import CORE_IMPLICATIONS
from aftertouch.v1 import campaigns_pb2, events_pb2

COLUMNS, FEWEST_COLUMNS = 60, 12
"""About as many, and at least, so that of what was over at once it is seen that nothing came after it."""
MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
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
    """The chart of a launched campaign, up to its last event; None when there was none.

    A column is one bucket, so that neither the database nor we add up more than is drawn. Most campaigns are over soon: what is
    empty after the last event is left out, and the rest is asked again in finer columns.
    """
    launch_time, end = campaign.launch_time.ToDatetime(UTC).replace(second=0, microsecond=0), datetime.now(UTC)
    while True:
        start, end, step = _choose_columns(launch_time, end)
        request = events_pb2.GetActivityRequest(
            campaign=campaign.name, start_time=to_timestamp(start), end_time=to_timestamp(end)
        )
        request.bucket.FromTimedelta(step)
        activity = await visit.client.events.GetActivity(request)
        shown = [series for series in activity.series if series.signal not in _QUIET]
        if not shown:
            return None
        last = max(series.buckets[-1].start_time.ToDatetime(UTC) for series in shown) + step
        if last - start > (end - start) / 2 or end - start <= FEWEST_COLUMNS * MINUTE:
            break
        end = last
    columns = max((last - start) // step, FEWEST_COLUMNS)
    found = visit.console.registry.types.get(campaign.channel)
    labels = {signal.name: signal.label for signal in found.channel.signals} if found else {}
    counts = {series.signal: [0] * columns for series in shown}
    for series in shown:
        for one in series.buckets:
            counts[series.signal][(one.start_time.ToDatetime(UTC) - start) // step] = one.count
    highest = max(max(column) for column in counts.values())
    lines = [
        Line(labels.get(signal, signal.capitalize()), _join_points(column, highest), sum(column))
        for signal, column in counts.items()
        if signal in labels or signal in CORE_IMPLICATIONS
    ]
    return Chart(sorted(lines, key=lambda line: -line.total)[:6], highest, start, start + step * columns, step)


def _choose_columns(launch_time: datetime, end: datetime) -> tuple[datetime, datetime, timedelta]:
    """From when until when, and what one column spans; from a day on whole hours, which are counted apart from minutes."""
    end = max(end, launch_time + FEWEST_COLUMNS * MINUTE)
    is_long = end - launch_time >= DAY
    start, unit = (launch_time.replace(minute=0), HOUR) if is_long else (launch_time, MINUTE)
    return start, end, -((start - end) // (COLUMNS * unit)) * unit


def _join_points(column: list[int], highest: int) -> str:
    """The points of a line that holds each column's height over its width; the highest is a little below the upper edge."""
    room, width = HEIGHT - 6, WIDTH / len(column)
    heights = [HEIGHT - 3 - room * count / highest for count in column]
    return " ".join(
        f"{width * place:.1f},{height:.1f} {width * (place + 1):.1f},{height:.1f}" for place, height in enumerate(heights)
    )
