"""When a campaign is stopped because its messages keep failing, and when it is not."""

from __future__ import annotations

import pytest

from aftertouch.channels import ReasonClass
from aftertouch.delivery.breaker import LEAST_OUTCOMES, Breaker, BreakerSettings


def test_failures_in_a_row_stop_and_a_success_between_them_starts_anew() -> None:
    breaker = Breaker(BreakerSettings(most_in_a_row=3, most_percent=0))
    for _ in range(10):
        breaker.note_failed(ReasonClass.CONTENT)
        breaker.note_failed(ReasonClass.CONTENT)
        assert not breaker.find_reason()
        breaker.note_sent()
    for _ in range(3):
        breaker.note_failed(ReasonClass.CONTENT)
    assert breaker.find_reason().startswith("3 messages in a row failed")


def test_share_of_failures_means_nothing_before_there_are_enough() -> None:
    breaker = Breaker(BreakerSettings(most_in_a_row=0, most_percent=50))
    for _ in range(LEAST_OUTCOMES - 1):
        breaker.note_failed(ReasonClass.UNKNOWN)
    assert not breaker.find_reason()
    breaker.note_failed(ReasonClass.UNKNOWN)
    assert breaker.find_reason().startswith(f"{LEAST_OUTCOMES} of the last {LEAST_OUTCOMES} messages failed")


def test_share_at_the_limit_goes_on_and_over_it_stops() -> None:
    breaker = Breaker(BreakerSettings(most_in_a_row=0, most_percent=50))
    for _ in range(LEAST_OUTCOMES // 2):
        breaker.note_failed(ReasonClass.CONTENT)
        breaker.note_sent()
    assert not breaker.find_reason()
    breaker.note_failed(ReasonClass.CONTENT)
    assert breaker.find_reason()


@pytest.mark.parametrize("reason_class", [ReasonClass.RECIPIENT_GONE, ReasonClass.OPTED_OUT, ReasonClass.CAPPED])
def test_people_who_are_gone_stop_nothing_and_excuse_nothing(reason_class: ReasonClass) -> None:
    breaker = Breaker(BreakerSettings(most_in_a_row=3, most_percent=50))
    for _ in range(10 * LEAST_OUTCOMES):
        breaker.note_failed(reason_class)
    assert not breaker.find_reason()
    for _ in range(3):
        breaker.note_failed(ReasonClass.CONTENT)
        breaker.note_failed(reason_class)
    assert breaker.find_reason()


def test_limits_of_zero_never_stop() -> None:
    breaker = Breaker(BreakerSettings(most_in_a_row=0, most_percent=0))
    for _ in range(10 * LEAST_OUTCOMES):
        breaker.note_failed(ReasonClass.CONTENT)
    assert not breaker.find_reason()


def test_channel_that_fails_by_itself_three_times_in_a_row_stops_the_campaign() -> None:
    breaker = Breaker(BreakerSettings(most_in_a_row=0, most_percent=0))
    for defect in ("sms: RuntimeError", "sms: RuntimeError", "", "sms: RuntimeError", "sms: RuntimeError"):
        breaker.note_call(defect)
        assert breaker.find_reason() == ""
    breaker.note_call("sms: KeyError")
    assert "failed 3 times in a row: sms: KeyError" in breaker.find_reason()
