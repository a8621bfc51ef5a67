"""Producers of event streams: how far each is durable, and which of its streams is the newest.

The row is locked by the transaction that stores a batch, so a stream that is opened meanwhile waits for it and is told the
position after it; and a stream that is no longer the newest finds that out before it stores anything.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import StreamSuperseded
from aftertouch.store.engine import driver
from aftertouch.store.tables import producers


@dataclass(frozen=True, order=True)
class Stream:
    """One opened stream of a producer."""

    app_id: int
    producer: str
    number: int
    """Of two streams of one producer the larger is the newer."""


class Progress(NamedTuple):
    """How far a producer is, or a batch brings it."""

    position: int
    accepted: int
    """Events that were stored."""
    rejected: int
    """Events that were left out."""


async def open_stream(
    conn: AsyncConnection, app_id: int, producer: str, session: str, *, is_resumption: bool
) -> tuple[Stream, Progress]:
    """Make the newest stream of a producer, and return it with what is durable.

    Args:
        session: whose it is.
        is_resumption: goes on only where the newest stream is of the same session.

    Raises:
        StreamSuperseded: another session has opened a stream since.
    """
    statement = insert(producers).values(
        app_id=app_id, producer=producer, position=0, accepted=0, rejected=0, stream=1, session=session
    )
    row = (
        await conn.execute(
            statement.on_conflict_do_update(
                index_elements=["app_id", "producer"],
                set_={"stream": producers.c.stream + 1, "session": session, "update_time": func.now()},
                where=producers.c.session == session if is_resumption else None,
            ).returning(producers.c.stream, producers.c.position, producers.c.accepted, producers.c.rejected)
        )
    ).one_or_none()
    if row is None:
        raise StreamSuperseded(producer)
    return Stream(app_id, producer, row.stream), Progress(row.position, row.accepted, row.rejected)


async def lock_positions(conn: AsyncConnection, streams: Collection[Stream]) -> dict[Stream, int]:
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


async def set_positions(conn: AsyncConnection, progress: Mapping[Stream, Progress]) -> None:
    """Move the durable positions on, and add to what was counted; the rows are locked."""
    pg = await driver(conn)
    ordered = sorted(progress)
    await pg.execute(
        "UPDATE producers AS p SET position = new.position, accepted = p.accepted + new.accepted,"
        " rejected = p.rejected + new.rejected, update_time = now()"
        " FROM unnest(%b::bigint[], %b::text[], %b::bigint[], %b::bigint[], %b::bigint[])"
        " AS new (app_id, producer, position, accepted, rejected)"
        " WHERE p.app_id = new.app_id AND p.producer = new.producer",
        (
            [stream.app_id for stream in ordered],
            [stream.producer for stream in ordered],
            *map(list, zip(*(progress[stream] for stream in ordered), strict=True)),
        ),
    )
