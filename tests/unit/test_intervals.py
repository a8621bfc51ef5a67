"""Confidence intervals against the tables of Newcombe's two papers of 1998."""

from __future__ import annotations

import pytest

from aftertouch.retargeting.intervals import find_difference_interval, find_share_interval


@pytest.mark.parametrize(
    ("count", "people", "lower", "upper"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_share_interval_is_wilsons(count: int, people: int, lower: float, upper: float) -> None:
    assert find_share_interval(count, people) == pytest.approx((lower, upper), abs=5e-5)


@pytest.mark.parametrize(
    ("first", "second", "lower", "upper"),
    [
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((6, 7), (2, 7), 0.0582, 0.8062),
        ((5, 56), (0, 29), -0.0381, 0.1926),
        ((0, 10), (0, 20), -0.1611, 0.2775),
        ((0, 10), (0, 10), -0.2775, 0.2775),
        ((10, 10), (0, 20), 0.6791, 1.0),
        ((10, 10), (0, 10), 0.6075, 1.0),
    ],
)
def test_difference_interval_is_newcombes(first: tuple[int, int], second: tuple[int, int], lower: float, upper: float) -> None:
    assert find_difference_interval(*first, *second) == pytest.approx((lower, upper), abs=5e-5)
    assert find_difference_interval(*second, *first) == pytest.approx((-upper, -lower), abs=5e-5)
