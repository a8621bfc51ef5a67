"""Quiet hours by everybody's own clock, on the days on which clocks change, and in zones that are half an hour off."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from aftertouch.delivery.quiet import find_opening
from aftertouch.store.apps import App

NIGHT = (22 * 60, 8 * 60)
NOON = (12 * 60, 14 * 60)


BARE = App(
    app_id=1,
    app="acme",
    display_name="Acme",
    retargeting_enabled=True,
    retargetable_since=datetime.now(UTC),
    retention_days=30,
    quiet_start=None,
    quiet_end=None,
    quiet_time_zone="UTC",
    cap_messages=None,
    cap_hours=None,
    web_origins=(),
    link_url="",
    create_time=datetime.now(UTC),
)


def make_app(hours: tuple[int, int] | None, default: str = "UTC") -> App:
    start, end = hours or (None, None)
    return replace(BARE, quiet_start=start, quiet_end=end, quiet_time_zone=default)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("hours", "zone", "now", "opening"),
    [
        (NIGHT, "UTC", "2026-01-10 21:59", None),
        (NIGHT, "UTC", "2026-01-10 22:00", "2026-01-11 08:00"),
        (NIGHT, "UTC", "2026-01-11 07:59", "2026-01-11 08:00"),
        (NIGHT, "UTC", "2026-01-11 08:00", None),
        (NOON, "UTC", "2026-01-10 11:59", None),
        (NOON, "UTC", "2026-01-10 12:00", "2026-01-10 14:00"),
        (NOON, "UTC", "2026-01-10 14:00", None),
        # Half an hour and three quarters off.
        (NIGHT, "Asia/Kolkata", "2026-01-10 16:29", None),
        (NIGHT, "Asia/Kolkata", "2026-01-10 16:30", "2026-01-11 02:30"),
        (NIGHT, "Asia/Kathmandu", "2026-01-10 16:15", "2026-01-11 02:15"),
        # The hour from two to three comes twice there, and so does the end of the quiet.
        ((22 * 60, 150), "Europe/Madrid", "2026-10-25 00:15", "2026-10-25 00:30"),
        ((22 * 60, 150), "Europe/Madrid", "2026-10-25 00:45", None),
        ((22 * 60, 150), "Europe/Madrid", "2026-10-25 01:15", "2026-10-25 01:30"),
        # Another day there than here.
        (NIGHT, "Pacific/Auckland", "2026-01-10 12:00", "2026-01-10 19:00"),
        (NIGHT, "Pacific/Honolulu", "2026-01-10 08:00", "2026-01-10 18:00"),
        # The night in which an hour is missing is an hour shorter, and the one that has it twice an hour longer.
        (NIGHT, "Europe/Berlin", "2026-03-28 21:00", "2026-03-29 06:00"),
        (NIGHT, "Europe/Berlin", "2026-03-29 06:00", None),
        (NIGHT, "Europe/Berlin", "2026-10-24 20:00", "2026-10-25 07:00"),
        (NIGHT, "Europe/Berlin", "2026-10-25 06:59", "2026-10-25 07:00"),
        (NIGHT, "Europe/Berlin", "2026-10-25 07:00", None),
        # An end that the clock leaps over: 02:30 does not exist, and it is over when the hour is.
        ((60, 150), "Europe/Berlin", "2026-03-29 00:30", "2026-03-29 01:30"),
        ((60, 150), "Europe/Berlin", "2026-03-29 01:30", None),
        # A quiet hour that comes twice is quiet twice.
        ((120, 180), "Europe/Berlin", "2026-10-25 00:30", "2026-10-25 02:00"),
        ((120, 180), "Europe/Berlin", "2026-10-25 01:30", "2026-10-25 02:00"),
        ((120, 180), "Europe/Berlin", "2026-10-25 02:00", None),
    ],
)
def test_quiet_hours_end_by_the_clock_of_the_person(hours: tuple[int, int], zone: str, now: str, opening: str | None) -> None:
    assert find_opening(make_app(hours), zone, at(now)) == (at(opening) if opening else None)


def test_quiet_hours_end_by_the_default_clock_where_the_zone_is_not_known() -> None:
    app = make_app(NIGHT, "Asia/Tokyo")
    assert find_opening(app, "", at("2026-01-10 13:00")) == at("2026-01-10 23:00")
    assert find_opening(app, "UTC", at("2026-01-10 13:00")) is None


def test_quiet_hours_of_an_app_without_any_never_begin() -> None:
    assert find_opening(make_app(None), "UTC", at("2026-01-10 23:00")) is None


def test_quiet_hours_do_not_depend_on_the_seconds() -> None:
    assert find_opening(make_app(NIGHT), "UTC", at("2026-01-10 21:59:59.9")) is None


@pytest.mark.parametrize(
    ("now", "opening"),
    [("2026-03-28 22:00", "2026-03-29 06:00"), ("2026-10-24 22:00", "2026-10-25 07:00")],
)
def test_person_is_not_quiet_at_the_opening(now: str, opening: str) -> None:
    """Whoever waits for the opening must not find it closed."""
    app = make_app(NIGHT)
    assert find_opening(app, "Europe/Berlin", at(now)) == at(opening)
    assert find_opening(app, "Europe/Berlin", at(opening)) is None
