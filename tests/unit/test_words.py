"""What the console says: every refusal that somebody can meet there in words, and times as the viewer reads them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from aftertouch import errors
from aftertouch.console.words import explain, show_times
from aftertouch.v1 import errors_pb2

CAMPAIGN = "apps/acme/campaigns/summer"
NOON = datetime(2026, 12, 27, 12, 0, 59, 123_456, UTC)

MET = [
    errors.ScopeInsufficient("/campaigns/new", "manage"),
    errors.NotFound(CAMPAIGN),
    errors.AlreadyExists("apps/acme/lists/gold"),
    errors.EtagMismatch(CAMPAIGN),
    errors.RequestIdReused("7d1f"),
    errors.CampaignStateWrong(CAMPAIGN, "SENT", "DRAFT"),
    errors.ContentMissing(CAMPAIGN),
    errors.AudienceEmpty(CAMPAIGN),
    errors.ChannelNotReady("sms", ["it is not installed"]),
    errors.TemplatesUnreadable("whatsapp", "Meta does not say which there are"),
    errors.SourceNotSent(CAMPAIGN, "DRAFT"),
    errors.SourceTooOld(CAMPAIGN, 30, NOON),
    errors.RetargetingNotEnabled("apps/acme"),
    errors.SourceBeforePlan(CAMPAIGN, NOON),
    errors.SelectionUnsettled(CAMPAIGN, "read", timedelta(hours=2), 1200, NOON),
    errors.ScheduleTooLate(CAMPAIGN, 30, NOON + timedelta(days=1), NOON),
    errors.ChainTooLong(CAMPAIGN, 200),
    errors.MessageTooLarge(1 << 30),
    errors.DatabaseUnavailable(),
    errors.ServerStopping(),
    errors.Internal("7d1f"),
    errors.ListInUse("apps/acme/lists/gold", CAMPAIGN),
    errors.ListLimitReached("apps/acme", 1000),
]
"""Of FIELDS_INVALID each violation is shown at its field."""

NEVER_MET = {
    *("ERROR_REASON_UNSPECIFIED", "FIELDS_INVALID", "METHOD_UNKNOWN"),
    *("API_KEY_MISSING", "API_KEY_INVALID", "IDENTITY_INVALID", "ORIGIN_NOT_ALLOWED", "TOO_MANY_REQUESTS"),
    *("POSITION_OUT_OF_ORDER", "STREAM_SUPERSEDED", "STREAM_NOT_OPENED", "RESUME_TOKEN_TOO_OLD"),
}
"""No page signs in with a key, or keeps a stream."""


def test_every_reason_is_one_that_a_visitor_can_meet_or_not() -> None:
    assert sorted([*NEVER_MET, *(error.reason for error in MET)]) == sorted(errors_pb2.ErrorReason.keys())


@pytest.mark.parametrize("error", MET, ids=lambda error: error.reason)
def test_refusal_is_told_without_names_of_resources_and_with_the_viewers_times(error: errors.AftertouchError) -> None:
    shown = show_times(explain(error))
    assert "apps/" not in shown
    assert not re.search(r"\d{4}-\d\d-\d\d", re.sub(r"<time .*?</time>", "", shown))
    assert re.fullmatch(r"[A-Z].*[.]", shown)


def test_times_of_errors_are_whole_seconds_of_utc() -> None:
    in_tokyo = NOON.astimezone(ZoneInfo("Asia/Tokyo"))
    told = errors.ScheduleTooLate(CAMPAIGN, 30, NOON + timedelta(days=1), in_tokyo)
    assert (told.metadata["last_time"], told.metadata["schedule_time"]) == ("2026-12-27T12:00:59Z", "2026-12-28T12:00:59Z")
    assert "until 2026-12-27T12:00:59Z, not for 2026-12-28T12:00:59Z" in str(told)


def test_settle_time_that_is_told_is_not_too_early_again() -> None:
    told = errors.SelectionUnsettled(CAMPAIGN, "read", timedelta(hours=2), 1200, NOON)
    assert NOON <= datetime.fromisoformat(told.metadata["settle_time"]) < NOON + timedelta(seconds=1)


@pytest.mark.parametrize("told", ["2026-12-27T19:28:59Z", "2026-12-27 19:28:59 UTC", "2026-12-27 19:28 UTC"])
def test_time_in_a_text_is_one_for_the_pages_script(told: str) -> None:
    assert re.fullmatch(
        r'until <time datetime="2026-12-27T19:28:(59|00)\+00:00">2026-12-27 19:28 UTC</time>, &amp;c\.',
        show_times(f"until {told}, &c."),
    )


@pytest.mark.parametrize("name", ["<b>2026-02-30T25:00:00Z</b>", "0000-00-00 00:00 UTC <script>"])
def test_name_that_only_looks_like_a_time_stays_a_text(name: str) -> None:
    shown = show_times(name)
    assert "<" not in shown
    assert shown.unescape() == name
