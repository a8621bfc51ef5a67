"""Page tokens: for one list, and nothing but a position."""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Any

import pytest
from google.protobuf import wrappers_pb2
from hypothesis import given
from hypothesis import strategies as st

from aftertouch.errors import FieldsInvalid
from aftertouch.rpc.pages import (
    DEFAULT_SIZE,
    LARGEST_ANSWER,
    LARGEST_SIZE,
    fill_page,
    make_page_token,
    read_page_token,
    size_page,
)

plain = st.text(st.characters(min_codepoint=32, max_codepoint=126))


@given(st.text(), st.integers(0, (1 << 63) - 1), plain)
def test_page_token_is_read_back(question: str, number: int, word: str) -> None:
    question = question.encode(errors="replace").decode()
    assert read_page_token(make_page_token(question, number), question, int) == number
    assert read_page_token(make_page_token(question, word), question, str) == word


def test_page_token_is_empty_at_the_beginning() -> None:
    assert read_page_token("", "a", int) is None


def test_page_token_of_another_list_is_refused() -> None:
    with pytest.raises(FieldsInvalid, match="belongs to another list"):
        read_page_token(make_page_token("apps/acme/contacts", 1), "apps/acme/campaigns", int)


@pytest.mark.parametrize("position", [-1, 1 << 63, True, 1.5, None, "1", [], {}, [1]])
def test_page_token_with_a_position_that_is_no_number_is_refused(position: Any) -> None:
    digest = json.loads(urlsafe_b64decode(make_page_token("a", 1)))[0]
    token = urlsafe_b64encode(json.dumps([digest, position]).encode()).decode()
    with pytest.raises(FieldsInvalid, match="is not a page token"):
        read_page_token(token, "a", int)


@given(st.text(min_size=1))
def test_any_text_is_refused_as_a_page_token(text: str) -> None:
    with pytest.raises(FieldsInvalid):
        read_page_token(text, "a", int)


def test_page_is_filled_up_to_the_largest_answer_and_never_empty() -> None:
    letter, half = wrappers_pb2.StringValue(value="x"), wrappers_pb2.StringValue(value="x" * (LARGEST_ANSWER // 2))
    whole = wrappers_pb2.StringValue(value="x" * LARGEST_ANSWER)
    assert fill_page([]) == []
    assert fill_page([letter] * 1000) == [letter] * 1000
    assert fill_page([half, half]) == [half]
    assert fill_page([whole, letter]) == [whole]
    assert fill_page([letter, whole, letter]) == [letter]


def test_page_has_a_default_and_a_largest_size() -> None:
    assert [size_page(size) for size in (0, 1, 1000, 1001)] == [DEFAULT_SIZE, 1, LARGEST_SIZE, LARGEST_SIZE]
