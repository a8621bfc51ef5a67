"""Every code of every provider, as data: its class, and what a refusal with it leads to.

``provider_codes.tsv`` is written from the providers' documentation, one line for each code or range; a code that a channel learns
needs a line there.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from aftertouch.channels import ReasonClass, Refused
from aftertouch.declarations import ChannelType
from aftertouch.delivery.drafts import Draft
from aftertouch.delivery.outcomes import MOST_TRIES, MOST_UNKNOWN_TRIES, Consequences, judge
from aftertouch.plugins import discover_channels

TYPES = discover_channels().types
NOW = datetime(2026, 3, 1, tzinfo=UTC)


def read_codes() -> Iterator[tuple[str, list[str], str, str]]:
    """Channel, codes, class and consequence of each line."""
    with Path(__file__).with_name("provider_codes.tsv").open(newline="") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            assert row["meaning"], row
            yield row["channel"], expand(row["code"]), row["class"], row["consequence"]


def expand(written: str) -> list[str]:
    """``http_300-399`` as a hundred codes."""
    found = re.fullmatch(r"(http_)?(\d+)-(\d+)", written)
    return [f"{found[1] or ''}{code}" for code in range(int(found[2]), int(found[3]) + 1)] if found else [written]


LINES = [line for line in read_codes() if line[0] in TYPES]
CASES = [(channel, code, *rest) for channel, codes, *rest in LINES for code in sorted({codes[0], codes[-1]})]


def follow(declared: ChannelType, code: str) -> str:
    """What becomes of somebody whose one address is refused with this code, again and again, in the data's words."""
    draft: Any = Draft(0, 0, 7, 1, [], [b"h"], [])
    consequences = Consequences()
    consequences.follow(declared.channel, draft, [Refused(code=code)], NOW)
    tries = 1
    while tries <= 1_000:
        verdict = judge(declared, [Refused(code=code)], tries, in_trouble=False)
        if verdict.refusal is None:
            break
        tries += 1
    # The sender does these two; they are never a failure of the person.
    if verdict.reason_class is ReasonClass.CONFIG:
        return "pauses"
    if verdict.reason_class is ReasonClass.RATE:
        return "waits"
    [kind] = verdict.kinds
    assert (kind.signal, kind.reason_code) == ("failed", code)
    if consequences.states:
        [(number, channel, address_hash, state, reason)] = consequences.states
        assert (number, channel, address_hash, reason) == (7, declared.channel.name, b"h", f"{verdict.reason_class}/{code}")
        return state
    if consequences.holds:
        [(*_, until)] = consequences.holds
        return f"held {(until - NOW) // timedelta(hours=1)} h"
    return f"{tries} tries" if tries > 1 else "fails"


@pytest.mark.parametrize(("channel", "code", "reason_class", "consequence"), CASES, ids=lambda value: value or "-")
def test_code_has_its_class_and_its_consequence(channel: str, code: str, reason_class: str, consequence: str) -> None:
    declared = TYPES[channel]
    assert declared.channel.classify(code) == reason_class
    assert follow(declared, code) == consequence


@pytest.mark.parametrize("channel", sorted({channel for channel, *_ in LINES}))
def test_data_has_every_code_of_the_channel_once(channel: str) -> None:
    listed = [code for name, codes, *_ in LINES if name == channel for code in codes]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(TYPES[channel].channel.reasons)


@pytest.mark.parametrize("channel", sorted({channel for channel, *_ in LINES}))
def test_code_that_nobody_knows_is_tried_a_few_times(channel: str) -> None:
    assert follow(TYPES[channel], "unheard_of") == f"{MOST_UNKNOWN_TRIES} tries"
    assert MOST_UNKNOWN_TRIES < MOST_TRIES == 10
