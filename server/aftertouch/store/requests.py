"""What each request_id was answered with, so that a repeat gets the same answer and two at once make one thing."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import delete, func, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import RequestIdReused
from aftertouch.store.tables import requests

KEPT_FOR = timedelta(hours=24)


async def find_answer(conn: AsyncConnection, app_id: int, request_id: str, fingerprint: bytes) -> bytes | None:
    """What a request_id was answered with within 24 hours; None when it was not used, or its first call is still under way.

    Raises:
        RequestIdReused: it was used for another request.
    """
    statement = select(requests.c.fingerprint, requests.c.answer).where(
        requests.c.app_id == app_id, requests.c.request_id == request_id, requests.c.create_time >= func.now() - KEPT_FOR
    )
    row = (await conn.execute(statement)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != fingerprint:
        raise RequestIdReused(request_id)
    return bytes(row.answer)


async def begin_request(conn: AsyncConnection, app_id: int, request_id: str, fingerprint: bytes) -> bytes | None:
    """Claim a request_id in this transaction; the stored answer when it was used before, else None.

    Another transaction that holds the same id is waited for: PostgreSQL's unique index does that.

    Raises:
        RequestIdReused: it was used for another request.
    """
    same = (requests.c.app_id == app_id) & (requests.c.request_id == request_id)
    await conn.execute(delete(requests).where(same, requests.c.create_time < func.now() - KEPT_FOR))
    claimed = await conn.execute(
        insert(requests)
        .values(app_id=app_id, request_id=request_id, fingerprint=fingerprint)
        .on_conflict_do_nothing()
        .returning(requests.c.request_id)
    )
    return None if claimed.one_or_none() else await find_answer(conn, app_id, request_id, fingerprint)


async def finish_request(conn: AsyncConnection, app_id: int, request_id: str, answer: bytes) -> None:
    """Store the answer, in the transaction that claimed the id."""
    await conn.execute(
        update(requests).where(requests.c.app_id == app_id, requests.c.request_id == request_id).values(answer=answer)
    )


async def forget_requests(conn: AsyncConnection) -> None:
    """Delete what is older than 24 hours."""
    await conn.execute(delete(requests).where(requests.c.create_time < func.now() - KEPT_FOR))
