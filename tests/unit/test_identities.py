"""The table of external_ids answers as a dict would."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from aftertouch.ingest.identities import SMALLEST, WIDTH, ExternalIds, Identities

texts = st.text(max_size=4) | st.text(max_size=2 * WIDTH)
pairs = st.dictionaries(texts.map(str.encode), st.integers(0, 1 << 33), max_size=50)


@given(st.lists(pairs, max_size=4), st.lists(texts.map(str.encode), max_size=20))
def test_identities_answer_as_a_dict_would(batches: list[dict[bytes, int]], others: list[bytes]) -> None:
    identities = Identities()
    expected: dict[bytes, int] = {}
    for batch in batches:
        new = {external_id: number for external_id, number in batch.items() if external_id not in expected}
        expected |= new
        identities.add(ExternalIds.join(list(new)), np.array(list(new.values()), np.int64))
    asked = [*expected, *others]
    assert identities.find(ExternalIds.join(asked)).tolist() == [expected.get(external_id, -1) for external_id in asked]
    assert len(identities) == len(expected)


@given(st.lists(texts.map(str.encode), max_size=20), st.data())
def test_external_ids_are_the_texts_that_they_were_made_of(given_texts: list[bytes], data: st.DataObject) -> None:
    external_ids = ExternalIds.join(given_texts)
    assert (list(external_ids), len(external_ids)) == (given_texts, len(given_texts))
    chosen = data.draw(st.lists(st.sampled_from(range(len(given_texts))))) if given_texts else []
    assert list(external_ids.select(np.array(chosen, np.int64))) == [given_texts[index] for index in chosen]
    assert not external_ids.are_ascii() or all(map(bytes.isascii, given_texts))


def test_identities_are_still_known_after_growing() -> None:
    identities = Identities()
    external_ids = [f"person-{number}".encode() for number in range(8 * SMALLEST)]
    for start in range(0, len(external_ids), 300):
        part = external_ids[start : start + 300]
        identities.add(ExternalIds.join(part), np.arange(start, start + len(part)))
    assert identities.find(ExternalIds.join(external_ids)).tolist() == list(range(len(external_ids)))
    assert identities.find(ExternalIds.join([b"person-", b"person-x"])).tolist() == [-1, -1]


def test_identities_learned_twice_are_the_same() -> None:
    identities = Identities()
    for _ in range(3):
        identities.add(ExternalIds.join([b"a", b"a", b"b", b"x" * 100]), np.array([1, 1, 2, 3]))
    assert identities.find(ExternalIds.join([b"a", b"b", b"x" * 100, b"x" * 99])).tolist() == [1, 2, 3, -1]


def test_identity_with_a_zero_byte_is_nobody() -> None:
    identities = Identities()
    identities.add(ExternalIds.join([b"a", b""]), np.array([1, 2]))
    assert identities.find(ExternalIds.join([b"a\0", b"\0", b"a", b""])).tolist() == [-1, -1, 1, 2]


def test_identities_that_are_forgotten_are_unknown_and_hide_no_other() -> None:
    identities = Identities()
    external_ids = [f"person-{number}".encode() for number in range(SMALLEST // 2 - 2)] + [b"x" * 100]
    numbers = np.arange(len(external_ids))
    identities.add(ExternalIds.join(external_ids), numbers)
    identities.forget(numbers[::2])
    assert identities.find(ExternalIds.join(external_ids)).tolist() == [
        number if number % 2 else -1 for number in numbers.tolist()
    ]
    identities.add(ExternalIds.join(external_ids[::2]), numbers[::2] + 10_000)
    assert identities.find(ExternalIds.join(external_ids)).tolist() == [
        number + 10_000 * (number % 2 == 0) for number in numbers.tolist()
    ]
