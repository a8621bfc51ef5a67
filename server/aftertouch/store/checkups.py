"""Checkups: how far the messages of a channel were asked about of which nothing had been heard at some age.

A checkup has one holder at a time, for a lease that each step prolongs; two that overlap would only ask twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.store.engine import driver


@dataclass(frozen=True)
class Checkup:
    """The messages of one channel that are to be asked about: taken after one time, and up to another."""

    channel: str
    age: timedelta
    start: datetime
    end: datetime


async def claim_checkup(
    conn: AsyncConnection, channel: str, age: timedelta, lease_for: timedelta, oldest: timedelta
) -> Checkup | None:
    """Claim what has come to this age since the last time; None when that is nothing, or somebody else has it.

    The first time nothing has: what is older was sent before anybody asked.

    Args:
        oldest: messages older than this are not asked about any more.
    """
    pg = await driver(conn)
    await pg.execute(
        "INSERT INTO checkups (channel, age, checked_until) VALUES (%b, %b, now() - %b) ON CONFLICT DO NOTHING",
        (channel, age, age),
    )
    rows = await pg.execute(
        "UPDATE checkups SET lease_until = now() + %b"
        " WHERE channel = %b AND age = %b AND coalesce(lease_until <= now(), true) AND checked_until < now() - age"
        " RETURNING greatest(checked_until, now() - %b), now() - age",
        (lease_for, channel, age, oldest),
    )
    row = await rows.fetchone()
    return Checkup(channel, age, *row) if row else None


async def note_checked(conn: AsyncConnection, checkup: Checkup, until: datetime, lease_for: timedelta) -> None:
    """Keep how far a checkup has come, and prolong its lease."""
    pg = await driver(conn)
    await pg.execute(
        "UPDATE checkups SET checked_until = greatest(checked_until, %b), lease_until = now() + %b"
        " WHERE channel = %b AND age = %b",
        (until, lease_for, checkup.channel, checkup.age),
    )


async def read_unheard(
    conn: AsyncConnection,
    channel: str,
    sent: Sequence[int],
    heard: Sequence[int],
    span: tuple[datetime, datetime],
    after: tuple[int, int, str],
    limit: int,
) -> list[tuple[int, int, str]]:
    """Messages that a provider took and of which nothing was heard since: slot, position and message id, in this order.

    Args:
        sent: the kinds of attempts that were taken.
        heard: the kinds that are news of a person.
        span: when they were taken: after the one time, and up to the other.
        after: the last one that is known.
    """
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT slot, position, message_id FROM attempts AS a"
        " WHERE arrive_time > %(start)b AND arrive_time <= %(end)b AND channel = %(channel)b AND kind = ANY(%(sent)b)"
        " AND message_id <> '' AND position >= 0 AND (slot, position, message_id) > (%(slot)b, %(position)b, %(id)b)"
        " AND NOT EXISTS (SELECT FROM receipts AS r WHERE r.slot = a.slot AND r.kind = ANY(%(heard)b)"
        "  AND get_bit(r.bits, a.position) = 1)"
        " ORDER BY slot, position, message_id LIMIT %(limit)b",
        {
            "start": span[0],
            "end": span[1],
            "channel": channel,
            "sent": list(sent),
            "heard": list(heard),
            "slot": after[0],
            "position": after[1],
            "id": after[2],
            "limit": limit,
        },
    )
    return await rows.fetchall()
