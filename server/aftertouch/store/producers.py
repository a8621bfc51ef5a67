"""Producers of event streams: how far each is durable, and which of its streams is the newest.

The row is locked by the transaction that stores a batch, so a stream that is opened meanwhile waits for it and is told the
position after it; and a stream that is no longer the newest finds that out before it stores anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.engine import driver
from aftertouch.store.tables import producers


@dataclass(frozen=True, order=True)
class Stream:
    """One opened stream of a producer."""

    app_id: int
    producer: str
    number: int
    """Of two streams of one producer the larger is the newer."""


async def open_stream(conn: AsyncConnection, app_id: int, producer: str) -> tuple[Stream, int]:
    """Make the newest stream of a producer, and return it with the last durable position."""
    statement = insert(producers).values(app_id=app_id, producer=producer, position=0, stream=1)
    row = (
        await conn.execute(
            statement.on_conflict_do_update(
                index_elements=["app_id", "producer"], set_={"stream": producers.c.stream + 1, "update_time": func.now()}
            ).returning(producers.c.stream, producers.c.position)
        )
    ).one()
    return Stream(app_id, producer, row.stream), row.position


async def lock_positions(conn: AsyncConnection, streams: set[Stream]) -> dict[Stream, int]:
    """The durable position of those of the streams that are still the newest, locked in order until the transaction ends."""
    pg = await driver(conn)
    ordered = sorted(streams)
    rows = await pg.execute(
        "SELECT app_id, producer, stream, position FROM producers"
        " WHERE (app_id, producer) IN (SELECT * FROM unnest(%b::bigint[], %b::text[])) ORDER BY app_id, producer FOR UPDATE",
        ([stream.app_id for stream in ordered], [stream.producer for stream in ordered]),
    )
    found = {Stream(app_id, producer, number): position for app_id, producer, number, position in await rows.fetchall()}
    return {stream: found[stream] for stream in ordered if stream in found}


async def set_positions(conn: AsyncConnection, positions: Mapping[Stream, int]) -> None:
    """Move the durable positions on; the rows are locked."""
    pg = await driver(conn)
    ordered = sorted(positions)
    await pg.execute(
        "UPDATE producers AS p SET position = new.position, update_time = now()"
        " FROM unnest(%b::bigint[], %b::text[], %b::bigint[]) AS new (app_id, producer, position)"
        " WHERE p.app_id = new.app_id AND p.producer = new.producer",
        ([s.app_id for s in ordered], [s.producer for s in ordered], [positions[s] for s in ordered]),
    )
