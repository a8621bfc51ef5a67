"""Pages of a list: how many, and where the next one begins.

A page token holds a position by key and a digest of what else the list was asked for, so a token that is used with another
question is refused instead of giving a page of something else.
"""

from __future__ import annotations

import hashlib
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Any

from aftertouch.errors import FieldsInvalid, Violation

DEFAULT_SIZE = 50
LARGEST_SIZE = 1000


def size_page(page_size: int) -> int:
    """How many to return for what was asked."""
    return min(page_size or DEFAULT_SIZE, LARGEST_SIZE)


def _digest(question: str) -> str:
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def make_page_token(question: str, position: Sequence[Any]) -> str:
    """A token for the page after ``position``, for this question."""
    return urlsafe_b64encode(json.dumps([_digest(question), *position]).encode()).decode()


def read_page_token(token: str, question: str) -> list[Any] | None:
    """The position in a token; None at the beginning.

    Raises:
        FieldsInvalid: it is not a token, or one for another question.
    """
    if not token:
        return None
    try:
        digest, *position = json.loads(urlsafe_b64decode(token))
    except (ValueError, TypeError) as error:
        raise FieldsInvalid([Violation("page_token", "is not a page token")]) from error
    if digest != _digest(question):
        raise FieldsInvalid([Violation("page_token", "belongs to a list with another parent or filter")])
    return list(position)
