"""Quiet hours: whether it is a time to leave a person alone, by their own clock, and when that ends."""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

from aftertouch.store.apps import App

DAY_MINUTES = 24 * 60


def find_opening(app: App, time_zone: str, now: datetime) -> datetime | None:
    """When the quiet hours end for somebody in this time zone; None when they may be messaged now.

    Args:
        time_zone: an IANA name; empty for somebody of whom it is not known.
        now: aware.
    """
    if app.quiet_start is None or app.quiet_end is None:
        return None
    return _find_opening(app.quiet_start, app.quiet_end, time_zone or app.quiet_time_zone, now.replace(second=0, microsecond=0))


@lru_cache(maxsize=1_000)
def _find_opening(start: int, end: int, time_zone: str, minute: datetime) -> datetime | None:
    """Cached: the people of a batch share a few zones and a minute, and converting a time costs as much as a database row."""
    zone = ZoneInfo(time_zone)
    local = minute.astimezone(zone)
    at = local.hour * 60 + local.minute
    if not (start <= at < end if start < end else at >= start or at < end):
        return None
    day = local.date() if at < end else local.date() + timedelta(days=1)
    # In the hour that an autumn night repeats, the end of that time round.
    return datetime.combine(day, time(*divmod(end, 60), fold=local.fold), zone).astimezone(UTC)
