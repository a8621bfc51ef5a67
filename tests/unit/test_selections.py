"""Selections and settling as far as they need no database: names of waves, what is denied, and how delays are measured."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import pytest
from aftertouch_push import PushChannel
from aftertouch_sms import SmsChannel
from aftertouch_whatsapp import WhatsAppChannel

from aftertouch.declarations import compile_channel
from aftertouch.retargeting.selections import Combination, Question, Source, find_root, list_questions, title_wave
from aftertouch.retargeting.settling import SHARE, find_quantile, list_denied, pair_delays
from aftertouch.store.campaigns import Campaign

TYPES = {
    channel.name: compile_channel(channel, distribution="test", version="1")
    for channel in (PushChannel, SmsChannel, WhatsAppChannel)
}


def make_source(number: int, name: str, channel: str, root_id: int | None = None) -> Source:
    now = datetime.now(UTC)
    values: dict[str, Any] = {field.name: None for field in fields(Campaign)} | {
        "launch_time": now,
        "finish_time": now,
        "root_id": root_id,
    }
    values |= {"campaign_id": number, "app_id": 1, "campaign": f"c{number}", "display_name": name, "channel": channel}
    campaign = Campaign(**values)
    return Source(campaign, TYPES[channel])


SALE, NUDGE, TEXT = (
    make_source(1, "Summer Sale", "push"),
    make_source(2, "Retarget: Summer Sale (not clicked)", "whatsapp", 1),
    make_source(3, "Last call", "sms"),
)
CLICKED, UNCLICKED = Question("c1", "clicked"), Question("c1", "not_clicked")
READ, UNREAD, TEXTED = Question("c2", "read"), Question("c2", "not_read"), Question("c3", "delivered")


def find_sources(selection: Question | Combination) -> dict[str, Source]:
    all_sources = {source.campaign.campaign: source for source in (SALE, NUDGE, TEXT)}
    return {question.source: all_sources[question.source] for question, _ in list_questions(selection)}


def any_of(*operands: Question | Combination) -> Combination:
    return Combination("any_of", operands)


def all_of(*operands: Question | Combination) -> Combination:
    return Combination("all_of", operands)


def all_but(everybody: Question | Combination, excluded: Question | Combination) -> Combination:
    return Combination("all_but", (everybody, excluded))


@pytest.mark.parametrize(
    ("selection", "title"),
    [
        (CLICKED, "Retarget: Summer Sale (clicked)"),
        (READ, "Retarget: Summer Sale (not clicked) (read)"),
        (any_of(CLICKED, UNCLICKED), "Retarget: Summer Sale (clicked or not clicked)"),
        (any_of(CLICKED, TEXTED), "Retarget: Summer Sale (clicked) or Last call (delivered)"),
        (
            all_but(any_of(CLICKED, READ), TEXTED),
            "Retarget: [Summer Sale (clicked) or Summer Sale (not clicked) (read)] but not Last call (delivered)",
        ),
        (all_of(CLICKED, all_but(UNCLICKED, CLICKED)), "Retarget: Summer Sale (clicked and [not clicked but not clicked])"),
    ],
)
def test_wave_is_named_after_its_selection(selection: Question | Combination, title: str) -> None:
    assert title_wave(selection, find_sources(selection)) == title


def test_name_of_a_large_combination_fits_and_says_that_it_goes_on() -> None:
    for selection in (any_of(*[CLICKED] * 20), any_of(*[CLICKED, TEXTED] * 10)):
        title = title_wave(selection, find_sources(selection))
        assert len(title) <= 200
        assert "…" in title


def test_wave_belongs_to_the_chain_that_is_named_first() -> None:
    assert find_root(find_sources(all_but(READ, TEXTED))) == 1
    assert find_root(find_sources(all_but(TEXTED, READ))) == 3


@pytest.mark.parametrize(
    ("selection", "denied"),
    [
        (CLICKED, set()),
        (UNCLICKED, {("c1", "clicked")}),
        (UNREAD, {("c2", "read")}),
        (Question("c2", "not_received"), {("c2", "delivered")}),
        (Question("c1", "not_confirmed"), {("c1", "confirmed")}),
        (all_but(UNREAD, READ), {("c2", "read")}),
        (all_but(TEXTED, READ), {("c2", "read")}),
        (all_but(TEXTED, all_but(READ, CLICKED)), {("c2", "read")}),
        (all_but(READ, UNREAD), {("c2", "delivered")}),
        (any_of(CLICKED, all_of(READ, UNCLICKED)), {("c1", "clicked")}),
    ],
)
def test_selection_denies_what_it_would_be_wrong_about_later(
    selection: Question | Combination, denied: set[tuple[str, str]]
) -> None:
    assert list_denied(selection, find_sources(selection)) == denied


def test_delays_are_paired_in_the_order_of_sending() -> None:
    assert pair_delays([(100, 10)], [(100, 2), (103, 5), (160, 1)]) == [(1, 2), (4, 5), (61, 1)]
    assert pair_delays([(100, 5), (110, 5)], [(101, 2), (112, 2)]) == [(2, 2), (3, 2)]
    assert pair_delays([(100, 5)], [(99, 1)]) == [(1, 1)]
    assert pair_delays([(100, 5)], []) == []


@pytest.mark.parametrize(
    ("delays", "minutes"),
    [([(3, 100)], 3), ([(1, 95), (60, 5)], 1), ([(1, 94), (60, 6)], 60), ([(60, 1), (1, 1), (30, 18)], 30)],
)
def test_quantile_is_the_delay_that_95_of_100_kept(delays: list[tuple[int, int]], minutes: int) -> None:
    assert find_quantile(delays, SHARE) == minutes
