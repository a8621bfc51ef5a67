"""Exports: people who were found at one moment, as bits, streamed with their names, which are read page by page.

No connection is held while a caller takes its time. Ten million people are a megabyte meanwhile, and another for each signal and
reason of theirs where their rows tell of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from typing import TypeAlias, TypeVar

import numpy as np

from aftertouch.rolls.chunks import Bits, Numbers, count_bits, page_bits
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.pages import make_page_token, read_page_token
from aftertouch.rpc.values import to_timestamp
from aftertouch.store.contacts import find_external_ids
from aftertouch.store.engine import transaction

IN_A_RESPONSE = 1_000

R = TypeVar("R")


Pages: TypeAlias = Callable[[Bits], Iterator[tuple[Numbers, str]]]
"""What is set, a response's worth at a time, each with the token to go on after it; empty once when nothing is."""


def begin_export(question: str, resume_token: str) -> Pages:
    """Find out where an export goes on, before people are looked for.

    Args:
        question: names the export, and what else is asked of it.

    Raises:
        FieldsInvalid: the token is not one for this question.
    """
    after = read_page_token(resume_token, question, int, "resume_token")

    def page(bits: Bits) -> Iterator[tuple[Numbers, str]]:
        token = ""
        for numbers in page_bits(bits, 0 if after is None else after + 1, IN_A_RESPONSE):
            token = make_page_token(question, int(numbers[-1]))
            yield numbers, token
        if not token:
            # One response at least says how many there are.
            yield np.empty(0, np.int64), resume_token

    return page


async def stream_contacts(
    call: Call, respond: Callable[..., R], people: Bits, as_of_time: datetime, pages: Pages
) -> AsyncIterator[R]:
    """Responses with the names of contacts.

    Args:
        respond: makes one, from contacts, total_count, as_of_time and resume_token.
        people: by contact number.
    """
    total = count_bits(people)
    for numbers, token in pages(people):
        async with transaction(call.engine) as conn:
            names = await find_external_ids(conn, call.app.app_id, numbers)
        yield respond(
            contacts=[f"{call.app.name}/contacts/{names[number]}" for number in numbers.tolist() if number in names],
            total_count=total,
            as_of_time=to_timestamp(as_of_time),
            resume_token=token,
        )
