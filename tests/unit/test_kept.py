"""What a process remembers: it forgets what was used least recently, and only then."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aftertouch.kept import Kept

MOST = 20
keys = st.integers(0, 5)
steps = st.lists(st.tuples(keys, st.none() | st.integers(0, MOST + 5)), max_size=60)


@given(steps)
def test_kept_forgets_what_was_used_least_recently(steps: list[tuple[int, int | None]]) -> None:
    """A step puts a value of a weight under a key, or asks for it; values that are put again may weigh more or less."""
    kept: Kept[int, tuple[int, int]] = Kept(MOST, lambda value: value[1])
    expected: dict[int, tuple[int, int]] = {}
    for at, (key, weight) in enumerate(steps):
        if weight is None:
            assert kept.get(key) == expected.get(key)
            if key in expected:
                expected[key] = expected.pop(key)
            continue
        expected.pop(key, None)
        expected[key] = at, weight
        while sum(one for _, one in expected.values()) > MOST and len(expected) > 1:
            del expected[next(iter(expected))]
        kept.put(key, (at, weight))
        assert kept.weight == sum(one for _, one in expected.values())
        assert kept.weight <= MOST or len(expected) == 1
        assert kept.fits(MOST - kept.weight)
        assert not kept.fits(MOST - kept.weight + 1)
    assert [kept.get(key) for key in range(6)] == [expected.get(key) for key in range(6)]
