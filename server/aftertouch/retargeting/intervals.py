"""Confidence intervals of shares and of their differences; pure."""

from __future__ import annotations

from math import hypot, sqrt

_Z = 1.959963984540054
"""The normal deviate that 2.5 of 100 exceed: both ends together leave 95 %."""


def find_share_interval(count: int, people: int) -> tuple[float, float]:
    """Where a share lies that was seen as ``count`` of ``people``: Wilson's score interval (1927), without continuity correction.

    It stays within 0 and 1, and says something where nobody, or everybody, did it: the usual ± standard error does neither.
    """
    share, squared = count / people, _Z * _Z
    centre = share + squared / (2 * people)
    margin = _Z * sqrt(share * (1 - share) / people + squared / (4 * people * people))
    scale = 1 + squared / people
    return max((centre - margin) / scale, 0.0), min((centre + margin) / scale, 1.0)


def find_difference_interval(count: int, people: int, other_count: int, other_people: int) -> tuple[float, float]:
    """Where the first share less the second lies.

    Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine 17 (1998), method
    10: the distances from each share to the ends of its own Wilson interval, added like the sides of a right angle.
    """
    share, other = count / people, other_count / other_people
    lower, upper = find_share_interval(count, people)
    other_lower, other_upper = find_share_interval(other_count, other_people)
    difference = share - other
    return difference - hypot(share - lower, other_upper - other), difference + hypot(upper - share, other - other_lower)
