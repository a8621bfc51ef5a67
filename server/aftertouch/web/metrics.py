"""``/metrics`` on an address of its own, which is not for strangers: what the process counts, and how the campaigns stand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from aftertouch.errors import DatabaseUnavailable
from aftertouch.metrics import CAMPAIGNS, DATABASE_UP
from aftertouch.store.campaigns import count_states
from aftertouch.store.engine import transaction

COUNT_SECONDS = 2.0
"""For the database; whoever scrapes waits for ten seconds or so."""


def create_metrics(engine: AsyncEngine) -> ASGIApp:
    """The application for the address."""
    counting: asyncio.Task[Mapping[str, int]] | None = None

    async def count() -> Mapping[str, int]:
        async with transaction(engine) as conn:
            return await count_states(conn)

    async def refresh() -> None:
        nonlocal counting
        # One at a time, and not cancelled when it hangs: psycopg would wait for the server's word on that.
        if counting is None or counting.done():
            counting = asyncio.create_task(count(), name="count campaigns")
        asked = counting
        await asyncio.wait({asked}, timeout=COUNT_SECONDS)
        try:
            states = asked.result()
        except (DatabaseUnavailable, asyncio.InvalidStateError):
            DATABASE_UP.set(0)
            return
        DATABASE_UP.set(1)
        for state, number in states.items():
            CAMPAIGNS.labels(state).set(number)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        response: Response = PlainTextResponse("not found; metrics are at /metrics", 404)
        if scope["path"] == "/metrics":
            await refresh()
            response = Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
        await response(scope, receive, send)

    return serve
