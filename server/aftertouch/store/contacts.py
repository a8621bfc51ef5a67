"""Contacts, their subscriptions, and the contact sets that say who can be reached on which channel.

A contact's standing on a channel is one of active, opted_out and invalid, or nothing without a subscription: active when
any subscription is, else opted_out when any is, else invalid. Each standing is a contact set (``active/sms``), kept in
the transaction that changes the subscriptions.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.rolls.chunks import CHUNK, SLOT_SHIFT, Numbers, block_of, blocks_of, pack_positions
from aftertouch.rolls.sql import SetChange, change_sets, lock_blocks
from aftertouch.store.engine import driver
from aftertouch.store.tables import contact_counters, contact_ids, contacts, subscriptions

STANDINGS = ("active", "opted_out", "invalid")
"""What a subscription can be, strongest first: the strongest of a contact's subscriptions is its standing on the channel."""
_ADDRESSES = 3
"""The class of the advisory locks on addresses, beside those of ``campaigns``."""


def standing_set(standing: str, channel: str) -> str:
    """The name of the contact set of everybody with this standing on a channel."""
    return f"{standing}/{channel}"


def hash_address(key: str) -> bytes:
    """What identifies an address within a contact and channel."""
    return blake2b(key.encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Subscription:
    """One address of a contact on one channel."""

    channel: str
    address: Mapping[str, Any] = field(repr=False)
    address_key: str = field(repr=False)
    state: str | None = None
    """None keeps the state of one that exists, and makes a new one active."""
    reason: str = ""
    update_time: datetime | None = None
    held_until: datetime | None = None
    """The provider asked to leave it alone until then."""


@dataclass(frozen=True)
class Contact:
    """A person in an app."""

    external_id: str
    attributes: Mapping[str, Any] = field(repr=False)
    """To be merged: a null removes an attribute."""
    time_zone: str = ""
    """Empty keeps the one that is stored."""
    subscriptions: tuple[Subscription, ...] = ()
    number: int = -1
    create_time: datetime | None = None
    update_time: datetime | None = None


async def find_numbers(conn: AsyncConnection, app_id: int, external_ids: Sequence[str], *, hold: bool = False) -> dict[str, int]:
    """The contact numbers of those external_ids that exist; with ``hold``, nobody erases them until the transaction ends."""
    if not external_ids:
        return {}
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT external_id, number FROM contact_ids WHERE app_id = %b AND external_id = ANY(%b)"
        + (" FOR KEY SHARE" if hold else ""),
        (app_id, list(external_ids)),
    )
    return dict(await rows.fetchall())


async def count_contacts(conn: AsyncConnection, app_id: int) -> int:
    """How many contacts an app ever had."""
    row = await conn.execute(select(contact_counters.c.next_number).where(contact_counters.c.app_id == app_id))
    return row.scalar() or 0


async def page_numbers(conn: AsyncConnection, app_id: int, after: str, limit: int) -> tuple[bytes, Numbers, Numbers]:
    """External_ids in order, those after ``after``, as columns: one behind the other in UTF-8, the bytes of each, the numbers.

    As a row for each they take the driver more than twice as long.
    """
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT string_agg(convert_to(external_id, 'UTF8'), ''::bytea),"
        " string_agg(int4send(octet_length(external_id)), ''::bytea), string_agg(int8send(number), ''::bytea)"
        " FROM (SELECT external_id, number FROM contact_ids"
        " WHERE app_id = %b AND external_id > %b ORDER BY external_id LIMIT %b) AS page",
        (app_id, after, limit),
    )
    external_ids, sizes, numbers = await rows.fetchone() or (None, None, None)
    return (
        external_ids or b"",
        np.frombuffer(sizes or b"", ">i4").astype(np.int64),
        np.frombuffer(numbers or b"", ">i8").astype(np.int64),
    )


async def page_prefix(conn: AsyncConnection, app_id: int, prefix: str, after: str, limit: int) -> list[tuple[str, int]]:
    """External_ids that begin with ``prefix``, with their contact numbers, in order, those after ``after``."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT external_id, number FROM contact_ids WHERE app_id = %b AND external_id >= %b AND external_id > %b"
        " AND (external_id < %b OR %b) ORDER BY external_id LIMIT %b",
        (app_id, prefix, after, end := _end_of(prefix), not end, limit),
    )
    return await rows.fetchall()


def _end_of(prefix: str) -> str:
    """The first text that sorts after all that begin with ``prefix``; empty when nothing does."""
    head = prefix.rstrip(chr(sys.maxunicode))
    if not head:
        return ""
    following = ord(head[-1]) + 1
    # Surrogates are no characters, and PostgreSQL takes none.
    return head[:-1] + chr(0xE000 if following == 0xD800 else following)


async def page_address(
    conn: AsyncConnection, app_id: int, channel: str, address_hash: bytes, after: int, limit: int
) -> list[int]:
    """The numbers of contacts who have an address on a channel, ascending, those after ``after``."""
    columns = subscriptions.c
    rows = await conn.execute(
        select(columns.number)
        .where(
            columns.address_hash == address_hash,
            columns.channel == channel,
            columns.block >= block_of(app_id, max(after, 0)),
            columns.block < (app_id + 1) << SLOT_SHIFT,
            columns.number > after,
        )
        .order_by(columns.number)
        .limit(limit)
    )
    return [row.number for row in rows]


@dataclass(frozen=True)
class Subscriber:
    """A contact who has a certain address."""

    app_id: int
    number: int
    state: str
    reason: str
    update_time: datetime


async def find_subscribers(
    conn: AsyncConnection, channel: str, address_hash: bytes, app_id: int | None = None
) -> list[Subscriber]:
    """Everybody, in one app or in all of them, who has this address on a channel, in whatever state."""
    columns = subscriptions.c
    statement = (
        select(columns.block, columns.number, columns.state, columns.reason, columns.update_time)
        .where(columns.address_hash == address_hash, columns.channel == channel)
        .order_by(columns.block, columns.number)
    )
    if app_id is not None:
        statement = statement.where(columns.block >= app_id << SLOT_SHIFT, columns.block < (app_id + 1) << SLOT_SHIFT)
    rows = await conn.execute(statement)
    return [Subscriber(row.block >> SLOT_SHIFT, row.number, row.state, row.reason, row.update_time) for row in rows]


async def lock_addresses(conn: AsyncConnection, address_hashes: Iterable[bytes]) -> None:
    """Until the transaction ends, have nobody else choose whose these addresses are; in order, so that nobody deadlocks."""
    keys = sorted({int.from_bytes(address_hash[:4], signed=True) for address_hash in address_hashes})
    pg = await driver(conn)
    await pg.execute("SELECT pg_advisory_xact_lock(%b, key) FROM unnest(%b::int[]) AS locks (key)", (_ADDRESSES, keys))


async def _number_new(conn: AsyncConnection, app_id: int, external_ids: Iterable[str]) -> tuple[dict[str, int], set[str]]:
    """The contact numbers of all these external_ids, and those that had to be made."""
    wanted = list(dict.fromkeys(external_ids))
    # Held: whoever is erased in between would come back to life under the old number.
    numbers = await find_numbers(conn, app_id, wanted, hold=True)
    if len(numbers) == len(wanted):
        return numbers, set()
    # The counter's row is locked until the end of the transaction, so the second look sees all that others made, and numbers
    # have no holes even when a transaction is rolled back.
    await conn.execute(insert(contact_counters).values(app_id=app_id, next_number=0).on_conflict_do_nothing())
    start = (
        await conn.execute(select(contact_counters.c.next_number).where(contact_counters.c.app_id == app_id).with_for_update())
    ).scalar_one()
    numbers = await find_numbers(conn, app_id, wanted, hold=True)
    new = [external_id for external_id in wanted if external_id not in numbers]
    if new:
        await conn.execute(
            update(contact_counters).where(contact_counters.c.app_id == app_id).values(next_number=start + len(new))
        )
        made = {external_id: start + i for i, external_id in enumerate(new)}
        await conn.execute(
            insert(contact_ids), [{"app_id": app_id, "external_id": key, "number": number} for key, number in made.items()]
        )
        numbers |= made
    return numbers, set(new)


async def upsert_contacts(conn: AsyncConnection, app_id: int, given: Sequence[Contact]) -> tuple[int, int]:
    """Create or update contacts, and return how many were made and how many existed. Two with one id are merged."""
    by_id: dict[str, Contact] = {}
    for contact in given:
        earlier = by_id.get(contact.external_id)
        by_id[contact.external_id] = _merge(earlier, contact) if earlier else contact
    numbers, made = await _number_new(conn, app_id, by_id)
    people = sorted(((numbers[key], contact) for key, contact in by_id.items()), key=lambda person: person[0])
    pg = await driver(conn)
    await pg.execute(
        "INSERT INTO contacts AS c (block, number, external_id, attributes, time_zone)"
        # What exists takes the nulls along into the merge, where they remove.
        " SELECT block, number, external_id,"
        " CASE WHEN made THEN jsonb_strip_nulls(attributes::jsonb) ELSE attributes::jsonb END, time_zone"
        " FROM unnest(%b::bigint[], %b::bigint[], %b::text[], %b::boolean[], %b::text[], %b::text[])"
        " AS new (block, number, external_id, made, attributes, time_zone) ORDER BY block, number"
        " ON CONFLICT (block, number) DO UPDATE SET"
        " attributes = jsonb_strip_nulls(c.attributes || excluded.attributes),"
        " time_zone = coalesce(nullif(excluded.time_zone, ''), c.time_zone), update_time = now()",
        (
            [block_of(app_id, number) for number, _ in people],
            [number for number, _ in people],
            [contact.external_id for _, contact in people],
            [contact.external_id in made for _, contact in people],
            [json.dumps(contact.attributes) for _, contact in people],
            [contact.time_zone for _, contact in people],
        ),
    )
    await put_subscriptions(
        conn, app_id, [(number, subscription) for number, contact in people for subscription in contact.subscriptions]
    )
    return len(made), len(given) - len(made)


def _merge(earlier: Contact, later: Contact) -> Contact:
    return replace(
        later,
        attributes={**earlier.attributes, **later.attributes},
        time_zone=later.time_zone or earlier.time_zone,
        subscriptions=(*earlier.subscriptions, *later.subscriptions),
    )


async def put_subscriptions(conn: AsyncConnection, app_id: int, rows: Sequence[tuple[int, Subscription]]) -> None:
    """Add subscriptions to contacts by their numbers, or change those with the same address."""
    if not rows:
        return
    unique: dict[tuple[int, str, bytes], Subscription] = {}
    for number, given in rows:
        key = number, given.channel, hash_address(given.address_key)
        # Somebody who is said to have opted out, and then named again without a state, has opted out.
        unique[key] = replace(given, state=given.state or unique[key].state) if key in unique else given
    keys = sorted(unique)
    blocks = [block_of(app_id, number) for number, _, _ in keys]
    numbers, channels, hashes = (list(column) for column in zip(*keys, strict=True))
    await lock_blocks(conn, blocks)
    pg = await driver(conn)
    await pg.execute(
        "INSERT INTO subscriptions (block, number, channel, address_hash, address, state, reason)"
        " SELECT block, number, channel, address_hash, address::jsonb, coalesce(state, 'active'), reason"
        " FROM unnest(%b::bigint[], %b::bigint[], %b::text[], %b::bytea[], %b::text[], %b::text[], %b::text[])"
        " AS new (block, number, channel, address_hash, address, state, reason) ORDER BY block, number, channel, address_hash"
        " ON CONFLICT (block, number, channel, address_hash) DO UPDATE SET address = excluded.address",
        (
            blocks,
            numbers,
            channels,
            hashes,
            [json.dumps(unique[key].address) for key in keys],
            [unique[key].state for key in keys],
            [unique[key].reason for key in keys],
        ),
    )
    stated = [key for key in keys if unique[key].state]
    await set_states(conn, app_id, [(*key, unique[key].state or "", unique[key].reason) for key in stated])
    await _refresh_standings(conn, app_id, {(number, channel) for number, channel, _ in keys})


async def set_states(conn: AsyncConnection, app_id: int, changes: Sequence[tuple[int, str, bytes, str, str]]) -> None:
    """Set state and reason of subscriptions that exist: (number, channel, address hash, state, reason) each."""
    if not changes:
        return
    changes = sorted(set(changes))
    numbers, channels, hashes, states, reasons = (list(column) for column in zip(*changes, strict=True))
    blocks = [block_of(app_id, number) for number in numbers]
    await lock_blocks(conn, blocks)
    pg = await driver(conn)
    await pg.execute(
        "UPDATE subscriptions AS s SET state = new.state, reason = new.reason, update_time = now()"
        " FROM unnest(%b::bigint[], %b::bigint[], %b::text[], %b::bytea[], %b::text[], %b::text[])"
        " AS new (block, number, channel, address_hash, state, reason)"
        " WHERE s.block = new.block AND s.number = new.number AND s.channel = new.channel"
        " AND s.address_hash = new.address_hash AND s.state <> new.state",
        (blocks, numbers, channels, hashes, states, reasons),
    )
    await _refresh_standings(conn, app_id, set(zip(numbers, channels, strict=True)))


async def mark_heard(conn: AsyncConnection, app_id: int, channel: str, address_hash: bytes, numbers: Sequence[int]) -> None:
    """Note that contacts' browser subscribed now by itself, whether that changes anything or not."""
    pg = await driver(conn)
    await pg.execute(
        "UPDATE subscriptions SET heard_time = now()"
        " WHERE block = ANY(%b) AND number = ANY(%b) AND channel = %b AND address_hash = %b",
        (sorted({block_of(app_id, number) for number in numbers}), list(numbers), channel, address_hash),
    )


async def list_surplus(
    conn: AsyncConnection, app_id: int, channel: str, numbers: Sequence[int], most: int
) -> list[tuple[int, bytes]]:
    """Number and hash of each active address of contacts on a channel, but for the ``most`` of each that were heard of last."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT number, address_hash FROM (SELECT number, address_hash, row_number() OVER"
        "  (PARTITION BY block, number ORDER BY coalesce(heard_time, update_time) DESC, address_hash) AS place"
        "  FROM subscriptions WHERE block = ANY(%b) AND number = ANY(%b) AND channel = %b AND state = 'active') AS heard"
        " WHERE place > %b",
        (sorted({block_of(app_id, number) for number in numbers}), list(numbers), channel, most),
    )
    return await rows.fetchall()


async def _refresh_standings(conn: AsyncConnection, app_id: int, touched: set[tuple[int, str]]) -> None:
    """Bring the contact sets of these contacts and channels in line with their subscriptions; the blocks are locked."""
    numbers = sorted({number for number, _ in touched})
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT number, channel, bool_or(state = 'active'), bool_or(state = 'opted_out') FROM subscriptions"
        " WHERE block = ANY(%b) AND number = ANY(%b) AND channel = ANY(%b) GROUP BY block, number, channel",
        (sorted({block_of(app_id, number) for number in numbers}), numbers, sorted({channel for _, channel in touched})),
    )
    seen: dict[tuple[int, str], list[int]] = defaultdict(list)
    members: dict[tuple[int, str], list[int]] = defaultdict(list)
    for number, channel, active, opted_out in await rows.fetchall():
        block, offset = block_of(app_id, number), number % CHUNK
        seen[block, channel].append(offset)
        standing = "active" if active else "opted_out" if opted_out else "invalid"
        members[block, standing_set(standing, channel)].append(offset)
    await change_sets(
        conn,
        [
            SetChange(
                block,
                name := standing_set(standing, channel),
                pack_positions(np.array(offsets), CHUNK),
                pack_positions(np.array(members[block, name], np.int64), CHUNK),
            )
            for (block, channel), offsets in seen.items()
            for standing in STANDINGS
        ],
    )


async def read_contacts(conn: AsyncConnection, app_id: int, numbers: Sequence[int]) -> list[Contact]:
    """Contacts with all their subscriptions, by number, ascending."""
    if not numbers:
        return []
    blocks = sorted({block_of(app_id, number) for number in numbers})
    held: dict[int, list[Subscription]] = defaultdict(list)
    columns = subscriptions.c
    for row in await conn.execute(
        select(subscriptions)
        .where(columns.block.in_(blocks), columns.number.in_(numbers))
        .order_by(columns.number, columns.channel, columns.update_time, columns.address_hash)
    ):
        held[row.number].append(
            Subscription(row.channel, row.address, "", row.state, row.reason, row.update_time, row.held_until)
        )
    rows = await conn.execute(
        select(contacts).where(contacts.c.block.in_(blocks), contacts.c.number.in_(numbers)).order_by(contacts.c.number)
    )
    return [
        Contact(
            row.external_id, row.attributes, row.time_zone, tuple(held[row.number]), row.number, row.create_time, row.update_time
        )
        for row in rows
    ]


async def page_contacts(conn: AsyncConnection, app_id: int, after: int, limit: int) -> list[int]:
    """The numbers of contacts, ascending, those after ``after``."""
    rows = await conn.execute(
        select(contacts.c.number)
        .where(
            contacts.c.block >= block_of(app_id, max(after, 0)),
            contacts.c.block < (app_id + 1) << SLOT_SHIFT,
            contacts.c.number > after,
        )
        .order_by(contacts.c.block, contacts.c.number)
        .limit(limit)
    )
    return [row.number for row in rows]


async def find_external_ids(conn: AsyncConnection, app_id: int, numbers: Numbers) -> dict[int, str]:
    """The external_ids of contact numbers."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT number, external_id FROM contacts WHERE block = ANY(%b) AND number = ANY(%b)",
        (np.unique(blocks_of(app_id, numbers)).tolist(), numbers.tolist()),
    )
    return dict(await rows.fetchall())


@dataclass(slots=True)
class Addressee:
    """What sending to one contact on one channel needs. Not frozen: that takes a microsecond more for each message."""

    number: int
    external_id: str
    attributes: Mapping[str, Any] = field(repr=False)
    time_zone: str
    """Empty when it is not known."""
    addresses: tuple[tuple[bytes, Mapping[str, Any]], ...] = field(repr=False)
    """Hash and address of each active subscription that is not held; empty when the person cannot be reached now."""
    is_held: bool
    """True when the provider asked to leave one of the addresses alone for now."""


async def read_addressees(conn: AsyncConnection, app_id: int, channel: str, numbers: Numbers) -> dict[int, Addressee]:
    """The addressees behind contact numbers."""
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT c.number, c.external_id, c.attributes, c.time_zone, s.address_hash, s.address, s.held_until > now()"
        " FROM contacts AS c"
        " LEFT JOIN subscriptions AS s ON s.block = c.block AND s.number = c.number AND s.channel = %b AND s.state = 'active'"
        " WHERE c.block = ANY(%b) AND c.number = ANY(%b)",
        (channel, np.unique(blocks_of(app_id, numbers)).tolist(), numbers.tolist()),
    )
    found: dict[int, tuple[str, Any, str, list[tuple[bytes, Any]]]] = {}
    held = set()
    for number, external_id, attributes, time_zone, address_hash, address, is_held in await rows.fetchall():
        *_, addresses = found.setdefault(number, (external_id, attributes, time_zone, []))
        if is_held:
            held.add(number)
        elif address_hash is not None:
            addresses.append((address_hash, address))
    return {
        number: Addressee(number, external_id, attributes, time_zone, tuple(addresses), number in held)
        for number, (external_id, attributes, time_zone, addresses) in found.items()
    }


@dataclass(frozen=True)
class Holds:
    """Who could be reached on a channel if their addresses there were not held, all of them."""

    numbers: Numbers
    until: NDArray[np.datetime64]
    """When the first address of each is free again, in UTC."""


async def find_held(conn: AsyncConnection, app_id: int, channel: str, blocks: Sequence[int] | None = None) -> Holds:
    """Whom providers asked to leave alone on a channel for now.

    Args:
        blocks: only in these; in all of the app's otherwise.
    """
    pg = await driver(conn)
    rows = await pg.execute(
        "SELECT number, (extract(epoch FROM min(held_until)) * 1000000)::bigint FROM subscriptions AS s"
        f" WHERE {'block = ANY(%(blocks)s::bigint[])' if blocks is not None else 'block >= %(first)s AND block < %(last)s'}"
        " AND channel = %(channel)s AND state = 'active' AND held_until > now()"
        " AND NOT EXISTS (SELECT FROM subscriptions AS o WHERE o.block = s.block AND o.number = s.number"
        "  AND o.channel = s.channel AND o.state = 'active' AND (o.held_until IS NULL OR o.held_until <= now()))"
        " GROUP BY block, number",
        {
            "blocks": list(blocks or ()),
            "first": app_id << SLOT_SHIFT,
            "last": (app_id + 1) << SLOT_SHIFT,
            "channel": channel,
        },
    )
    found = np.array(await rows.fetchall(), np.int64).reshape(-1, 2)
    return Holds(found[:, 0], found[:, 1].astype("datetime64[us]"))


async def hold_addresses(conn: AsyncConnection, app_id: int, holds: Sequence[tuple[int, str, bytes, datetime]]) -> None:
    """Leave addresses alone until a time: (number, channel, address hash, time) each. A longer hold stays."""
    if not holds:
        return
    numbers, channels, hashes, times = (list(column) for column in zip(*sorted(set(holds)), strict=True))
    pg = await driver(conn)
    await pg.execute(
        "UPDATE subscriptions AS s SET held_until = greatest(s.held_until, new.held_until)"
        " FROM unnest(%b::bigint[], %b::bigint[], %b::text[], %b::bytea[], %b::timestamptz[])"
        " AS new (block, number, channel, address_hash, held_until)"
        " WHERE s.block = new.block AND s.number = new.number AND s.channel = new.channel"
        " AND s.address_hash = new.address_hash",
        ([block_of(app_id, number) for number in numbers], numbers, channels, hashes, times),
    )


async def read_active_addresses(conn: AsyncConnection, app_id: int, channel: str, number: int) -> list[bytes]:
    """The hashes of a contact's active addresses on a channel."""
    rows = await conn.execute(
        select(subscriptions.c.address_hash).where(
            subscriptions.c.block == block_of(app_id, number),
            subscriptions.c.number == number,
            subscriptions.c.channel == channel,
            subscriptions.c.state == "active",
        )
    )
    return [row.address_hash for row in rows]
