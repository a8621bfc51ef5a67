"""Watching: events in the order in which they became durable, none left out, each once.

Events carry the number of the transaction that stored them. Transactions may commit in another order than they are numbered,
so a watcher reads only up to the first that may still be running: whatever is below is all there, and stays so. A resume
token is the last event's transaction and its place within it among those that were asked for, with a digest of which these are.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, time

import numpy as np
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.errors import DatabaseUnavailable, FieldsInvalid, ResumeTokenTooOld, ServerStopping, Violation
from aftertouch.ingest.lookups import Lookups
from aftertouch.rolls.chunks import CHUNK, SLOT_SHIFT, slot_range
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.clusters import read_first_commit, read_horizon
from aftertouch.store.contacts import find_external_ids
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind, load_kinds
from aftertouch.store.logs import LoggedEvent, read_events
from aftertouch.store.partitions import read_last_dropped

POLL_SECONDS = 0.2
CHECKPOINT_SECONDS = 15.0
"""An answer at least this often, so that idle proxies do not cut the stream."""
PAGE = 1_000
"""Events in one answer at the most."""
READ = 10_000
"""Events that are read at once at the most: 5 MB for a watcher while its client takes them."""
LARGEST_SPAN = 1 << 20
"""Transactions that are looked through at once at the most. Half as many after a look that found too much to read at once, twice
as many after any other: whoever goes on after a day costs what there is to tell, not as much for every answer."""
_TOKEN = struct.Struct(">qq8s")
_ALL_SLOTS = (0, (1 << 63) - 1)


@dataclass(frozen=True)
class Watched:
    """An event, with whom it is about."""

    campaign: Campaign
    external_id: str
    """Empty when the person was erased."""
    kind: Kind
    time: datetime
    arrive_time: datetime


@dataclass(frozen=True)
class Page:
    """Some events, and where to go on after them."""

    events: list[Watched]
    resume_token: str


def encode_resume_token(commit_id: int, place: int, question: str) -> str:
    """A position among the events of a question as text."""
    return urlsafe_b64encode(_TOKEN.pack(commit_id, place, _digest(question))).decode()


def decode_resume_token(token: str, question: str) -> tuple[int, int]:
    """The position in a token.

    Raises:
        FieldsInvalid: it is none, or one for another question.
    """
    try:
        commit_id, place, digest = _TOKEN.unpack(urlsafe_b64decode(token))
    except (ValueError, struct.error) as error:
        raise FieldsInvalid([Violation("resume_token", "is not a resume token")]) from error
    if digest != _digest(question):
        text = "belongs to another watch: go on with the same campaign and signals, or watch without one"
        raise FieldsInvalid([Violation("resume_token", text)])
    return commit_id, place


def _digest(question: str) -> bytes:
    return hashlib.sha256(question.encode()).digest()[:8]


async def watch_events(
    engine: AsyncEngine,
    lookups: Lookups,
    app: App,
    campaign: Campaign | None,
    signals: Collection[str],
    resume_token: str,
    stopping: asyncio.Event,
) -> AsyncIterator[Page]:
    """Pages of an app's events, until ``stopping``; an empty one at the beginning, and every 15 seconds while nothing happens.

    Raises:
        FieldsInvalid: the token is none, of another watch, or not of this database.
        ResumeTokenTooOld: its events are no longer kept, or it was made before the database was restored.
        ServerStopping: they end, after whole pages.
    """
    slots = slot_range(campaign.campaign_id) if campaign else _ALL_SLOTS
    question = json.dumps([app.app_id, campaign and campaign.campaign_id, sorted(signals)])
    async with transaction(engine) as conn:
        now = after = (await read_horizon(conn), 0)
        if resume_token:
            after = decode_resume_token(resume_token, question)
            if after > now:
                text = "is not of this database: list what you need, then watch without one"
                raise FieldsInvalid([Violation("resume_token", text)])
            first, begin_time = await read_first_commit(conn)
            if after[0] < first:
                raise ResumeTokenTooOld(begin_time)
            dropped = await read_last_dropped(conn)
            if dropped is not None and after[0] <= dropped[0]:
                raise ResumeTokenTooOld(datetime.combine(dropped[1], time(), UTC))
    # Without a token the first answer comes at once: whoever is cut off before the first event can still go on from here.
    silent_until = asyncio.get_running_loop().time() + (CHECKPOINT_SECONDS if resume_token else 0)
    span = LARGEST_SPAN
    while not stopping.is_set():
        try:
            async with transaction(engine) as conn:
                # The horizon is read first: what commits from now on has a number beyond it, and whatever is below has a kind
                # that is known by now.
                horizon = await read_horizon(conn)
                numbered = await load_kinds(conn)
                kinds = [number for number, kind in numbered.items() if not signals or kind.signal in signals]
                until = min(horizon, after[0] + span)
                rows = await read_events(conn, after, until, slots, kinds, READ)
        except DatabaseUnavailable:
            await rest(stopping, 1)
            continue
        for start in range(0, len(rows), PAGE):
            page = rows[start : start + PAGE]
            events = await _name_people(engine, lookups, app, [event for _, event in page], numbered)
            after = (page[-1][1].commit_id, page[-1][0])
            # The events of other apps move the token on, and are no reason to answer.
            if events:
                yield Page(events, encode_resume_token(*after, question))
                silent_until = asyncio.get_running_loop().time() + CHECKPOINT_SECONDS
        if len(rows) < READ:
            after = max(after, (until, 0))
            span = min(2 * span, LARGEST_SPAN)
        else:
            span = max(1, (until - after[0]) // 2)
        if asyncio.get_running_loop().time() >= silent_until:
            yield Page([], encode_resume_token(*after, question))
            silent_until = asyncio.get_running_loop().time() + CHECKPOINT_SECONDS
        if after[0] >= horizon:
            await rest(stopping, POLL_SECONDS)
    raise ServerStopping


async def rest(stopping: asyncio.Event, seconds: float) -> None:
    """Wait, but no longer than until the server stops."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stopping.wait(), seconds)


async def _name_people(
    engine: AsyncEngine, lookups: Lookups, app: App, events: list[LoggedEvent], numbered: Mapping[int, Kind]
) -> list[Watched]:
    """The app's own of these events, with campaigns and external_ids."""
    campaigns = await lookups.read_launched({event.slot >> SLOT_SHIFT for event in events})
    own = [event for event in events if (found := campaigns.get(event.slot >> SLOT_SHIFT)) and found.app_id == app.app_id]
    numbers: list[int] = []
    for event in own:
        roll = await lookups.read_roll(event.slot >> SLOT_SHIFT)
        numbers.append(int(roll.numbers[(event.slot & ((1 << SLOT_SHIFT) - 1)) * CHUNK + event.position]))
    async with transaction(engine) as conn:
        external_ids = await find_external_ids(conn, app.app_id, np.array(sorted(set(numbers)), np.int64))
    return [
        Watched(
            campaigns[event.slot >> SLOT_SHIFT],
            external_ids.get(number, ""),
            numbered[event.kind],
            event.time.astimezone(UTC),
            event.arrive_time.astimezone(UTC),
        )
        for event, number in zip(own, numbers, strict=True)
    ]
