"""Who is held out: the same people always, as many as was asked for, and others in another chain."""

from __future__ import annotations

import numpy as np
import pytest

from aftertouch.retargeting.holdouts import draw_lots, find_held_out

EVERYBODY = np.arange(100_000)


def test_lots_are_the_stream_of_splitmix64() -> None:
    """Held to the reference's first values, so that whoever is held out stays so in every version."""
    assert [hex(lot) for lot in draw_lots(0, np.array([1, 2, 3])).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize("percent", [1, 10, 50, 90])
def test_share_is_held_out_evenly(percent: int) -> None:
    for root in (1, 2, 1_000_003):
        held_out = find_held_out({root: percent}, EVERYBODY)
        # Four standard errors of a share of 10,000.
        parts = held_out.reshape(10, -1).mean(axis=1)
        assert np.abs(parts - percent / 100).max() < 4 * np.sqrt(percent / 100 * (1 - percent / 100) / 10_000)


def test_larger_share_holds_out_whoever_a_smaller_one_does() -> None:
    smaller, larger = (find_held_out({7: percent}, EVERYBODY) for percent in (10, 20))
    assert smaller.sum() < larger.sum()
    assert not (smaller & ~larger).any()


def test_chains_hold_out_people_of_their_own() -> None:
    first, second = (find_held_out({root: 50}, EVERYBODY) for root in (7, 8))
    assert abs((first & second).mean() - 0.25) < 0.01
    assert (find_held_out({7: 50, 8: 50}, EVERYBODY) == (first | second)).all()
    assert not find_held_out({}, EVERYBODY).any()


def test_somebody_alone_gets_the_same_lot_as_among_others() -> None:
    alone = [draw_lots(9, np.array([number]))[0] for number in (0, 8191, 99_999)]
    assert alone == draw_lots(9, EVERYBODY)[[0, 8191, 99_999]].tolist()
