"""Tokens: read back as they were made, and nothing else is one."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aftertouch.ingest.tokens import TOKEN_LENGTH, TokenCodec

CODEC = TokenCodec(b"a secret key of the tests, 32 characters or more")
campaigns = st.integers(0, (1 << 43) - 1)
positions = st.integers(0, (1 << 32) - 1)


def make(campaign_id: int, *at: int) -> list[str]:
    return CODEC.make(campaign_id, np.array(at, np.int64))


def is_valid(*tokens: str) -> list[bool]:
    return list(map(bool, CODEC.read(tokens).valid.tolist()))


@given(campaigns, st.lists(positions, max_size=20))
def test_token_is_read_back(campaign_id: int, at: list[int]) -> None:
    tokens = make(campaign_id, *at)
    found = CODEC.read(tokens)
    assert (found.campaigns.tolist(), found.positions.tolist()) == ([campaign_id] * len(at), at)
    assert found.valid.all()
    assert all(len(token) == TOKEN_LENGTH for token in tokens)
    assert make(campaign_id, *at) == tokens


def test_tokens_differ_with_campaign_and_position() -> None:
    tokens = [token for campaign_id in range(50) for token in make(campaign_id, *range(50))]
    assert len(set(tokens)) == 2500


@given(campaigns, positions)
def test_token_with_any_bit_changed_is_none(campaign_id: int, position: int) -> None:
    data = urlsafe_b64decode(make(campaign_id, position)[0])
    changed = []
    for bit in range(len(data) * 8):
        copy = bytearray(data)
        copy[bit // 8] ^= 1 << bit % 8
        changed.append(urlsafe_b64encode(copy).decode())
    assert not any(is_valid(*changed))


def test_token_of_another_key_is_none() -> None:
    assert is_valid(*TokenCodec(b"another key").make(1, np.arange(1000))) == [False] * 1000


ODD = [
    *("", " ", "x", "A" * 23, "A" * 25, "é" * 24, "🙂" * 24, "\0" * 24, "A" * 24, "_" * 24, "\ud800" * 24),
    *("A" * 22 + "==", "A" * 23 + "=", "=" * 24, "A" * 23 + "\n", "A" * 23 + " ", "A" * 20 + "AA==", "+/" * 12, "٣" * 24),
]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_odd_text_is_no_token_and_leaves_its_neighbours_alone(odd: str) -> None:
    """All tokens of a batch are decoded as one text, so a wrong length of one would shift the others."""
    before, after = make(7, 1, 2)
    found = CODEC.read([before, odd, after])
    assert found.valid.tolist() == [True, False, True]
    assert (found.positions[0], found.positions[2]) == (1, 2)
    assert (found.campaigns[1], found.positions[1]) == (0, 0)


@given(st.lists(st.text(max_size=30) | st.text("AZaz09-_=+/", min_size=24, max_size=24)))
def test_any_text_is_read_without_an_error(texts: list[str]) -> None:
    assert not any(is_valid(*texts))


def test_no_tokens_are_no_targets() -> None:
    assert len(CODEC.read([]).valid) == 0
    assert make(1) == []
