"""Pages of a list: how many, and where the next one begins.

A page token holds a position by key and a digest of which list was asked for, so a token that is used with another question
is refused instead of giving a page of something else. Tokens are not secret and not signed: a position says where to go on
in what the caller may read anyway, and is checked to be one.
"""

from __future__ import annotations

import hashlib
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import TypeVar

from google.protobuf.message import Message

from aftertouch.errors import FieldsInvalid, Violation

DEFAULT_SIZE = 50
LARGEST_SIZE = 1000
LARGEST_ANSWER = 3 * 1024 * 1024
"""Bytes of a page: gRPC's clients refuse an answer above 4 MB unless they are told otherwise."""

K = TypeVar("K", int, str)
M = TypeVar("M", bound=Message)


def size_page(page_size: int) -> int:
    """How many to return for what was asked."""
    return min(page_size or DEFAULT_SIZE, LARGEST_SIZE)


def fill_page(messages: Sequence[M]) -> Sequence[M]:
    """As many of the messages as one answer may hold, and never none of them."""
    ends = list(accumulate(message.ByteSize() for message in messages))
    return messages[: max(bisect_right(ends, LARGEST_ANSWER), 1)]


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def make_page_token(question: str, position: int | str) -> str:
    """A token for the page after ``position``, for this question."""
    return urlsafe_b64encode(json.dumps([_digest(question), position]).encode()).decode()


def read_page_token(token: str, question: str, kind: type[K], field: str = "page_token") -> K | None:
    """The position in a token; None at the beginning.

    Args:
        question: names the list, and what else was asked of it.
        kind: of the list's positions: numbers of a row, or ids in plain letters.
        field: where the token was given.

    Raises:
        FieldsInvalid: it is not a token, or one for another question.
    """
    if not token:
        return None
    try:
        digest, position = json.loads(urlsafe_b64decode(token))
    except (ValueError, TypeError, RecursionError) as error:
        raise FieldsInvalid([Violation(field, "is not a page token")]) from error
    if digest != _digest(question):
        raise FieldsInvalid([Violation(field, "belongs to another list")])
    if type(position) is not kind or not _is_position(position):
        raise FieldsInvalid([Violation(field, "is not a page token")])
    return position


def _is_position(position: int | str) -> bool:
    if isinstance(position, int):
        return 0 <= position < 1 << 63
    return position.isascii() and position.isprintable()
