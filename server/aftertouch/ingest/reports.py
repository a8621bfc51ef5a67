"""Reports: a caller's events as columns, and the way from them to people, all at once instead of one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.declarations import ChannelType
from aftertouch.ingest.identities import ExternalIds
from aftertouch.ingest.lookups import Lookups
from aftertouch.ingest.tokens import TokenCodec
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, SLOT_SHIFT, Numbers, chunk_of, members_of, rank
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind
from aftertouch.store.logs import MICROSECONDS, TEST_ROW, EventBatch, find_messages

AHEAD = timedelta(minutes=5)
"""How far an event's time may be ahead of our clock, or before its campaign's launch: clocks differ."""
SERVER_SIGNALS = frozenset({"attempted", "skipped"})
"""Signals that only the server itself sets."""

REASONS = {
    "TOKEN_INVALID": "the token is not one of ours",
    "CAMPAIGN_UNKNOWN": "no launched campaign of this name",
    "CONTACT_UNKNOWN": "no contact of this external_id",
    "NOT_A_RECIPIENT": "the contact is not a recipient of the campaign, or the message was a test",
    "SIGNAL_UNKNOWN": "the campaign's channel has no such signal that can be reported",
    "TIME_OUT_OF_RANGE": "the time is before the campaign was launched, or ahead of the clock",
    "MALFORMED": "it names no target or no signal, or a text of it is too long",
    "MESSAGE_UNKNOWN": "no message with this id, or it is too long ago",
    "CAMPAIGN_TOO_OLD": "the campaign was launched longer ago than events are kept",
}
"""Why an event is left out, by the names of ``RejectedEvent.Reason``."""
_CODES = {name: code for code, name in enumerate(REASONS, 1)}
_NAMES = dict(enumerate(REASONS, 1))


@dataclass(frozen=True)
class NamedTargets:
    """People by campaign and external_id."""

    indexes: Numbers
    """Which reports name somebody in this way."""
    campaigns: list[str]
    """Distinct ids of campaigns."""
    campaign_of: Numbers
    """For each, its place in ``campaigns``."""
    external_ids: ExternalIds


@dataclass(frozen=True)
class MessageTargets:
    """People by their message."""

    indexes: Numbers
    channels: list[str]
    message_ids: list[str]


@dataclass(frozen=True)
class TokenTargets:
    """People by token."""

    indexes: Numbers
    tokens: bytes
    """24 bytes each."""


@dataclass(frozen=True)
class Reports:
    """Events as a caller names them, as columns."""

    labels: list[tuple[str, str]]
    """Distinct signals with their reason codes."""
    label_of: Numbers
    """For each report, its place in ``labels``."""
    times: Numbers
    """Microseconds since 1970; 0 stands for now."""
    by_token: TokenTargets | None = None
    by_name: NamedTargets | None = None
    by_message: MessageTargets | None = None
    malformed: Numbers | None = None
    """Which reports cannot be understood."""

    def __len__(self) -> int:
        return len(self.label_of)


@dataclass(frozen=True)
class Rejection:
    """Why an event was left out."""

    index: int
    reason: str
    """A name of ``RejectedEvent.Reason``."""
    description: str


class _Placing:
    """Reports on their way: whom each is about, or why it is left out."""

    def __init__(self, count: int) -> None:
        self.campaign_ids = np.zeros(count, np.int64)
        self.positions = np.zeros(count, np.int64)
        self.faults = np.zeros(count, np.int8)

    def put(self, indexes: Numbers, campaign_ids: Numbers | int, positions: Numbers) -> None:
        """Say whom these reports are about."""
        self.campaign_ids[indexes] = campaign_ids
        self.positions[indexes] = positions

    def reject(self, indexes: Numbers, reason: str) -> None:
        """Leave out these reports, as far as nothing else was wrong with them."""
        self.faults[indexes[self.faults[indexes] == 0]] = _CODES[reason]

    def reject_where(self, is_faulty: NDArray[np.bool_], reason: str) -> None:
        """The same, by a flag for each report."""
        if is_faulty.any():
            self.reject(np.flatnonzero(is_faulty), reason)


async def place_reports(
    engine: AsyncEngine, lookups: Lookups, tokens: TokenCodec, types: Mapping[str, ChannelType], app: App, reports: Reports
) -> tuple[EventBatch, list[Rejection]]:
    """Find the people that reports are about, and return the events with what was left out, by index."""
    placing = _Placing(len(reports))
    if reports.malformed is not None:
        placing.reject(reports.malformed, "MALFORMED")
    if reports.by_token is not None:
        _place_by_token(tokens, reports.by_token, placing)
    if reports.by_name is not None:
        await _place_by_name(lookups, app, reports.by_name, placing)
    if reports.by_message is not None:
        await _place_by_message(engine, app, reports.by_message, placing)
    if not len(reports):
        return EventBatch.empty(), []
    distinct, places = rank(placing.campaign_ids)
    launched = await lookups.read_launched(number for number in distinct.tolist() if number)
    own = [found if found and found.app_id == app.app_id else None for found in map(launched.get, distinct.tolist())]
    recipients = np.array([campaign.recipients if campaign else 0 for campaign in own], np.int64)[places]
    starts = np.array([_start_of(campaign) for campaign in own], np.int64)[places]
    placing.reject_where(placing.positions >= recipients, "TOKEN_INVALID")
    now = int(datetime.now(UTC).timestamp() * MICROSECONDS)
    placing.reject_where(starts < now - app.retention_days * 86_400 * MICROSECONDS, "CAMPAIGN_TOO_OLD")
    times = np.where(reports.times == 0, now, reports.times)
    ahead = int(AHEAD.total_seconds()) * MICROSECONDS
    placing.reject_where((times > now + ahead) | (times < starts - ahead), "TIME_OUT_OF_RANGE")
    kinds = (await _number_kinds(lookups, types, own, reports.labels))[places, reports.label_of]
    placing.reject_where(kinds == 0, "SIGNAL_UNKNOWN")
    chunks = placing.positions >> CHUNK_BITS
    batch = EventBatch(
        slots=placing.campaign_ids << SLOT_SHIFT | chunks,
        positions=(placing.positions & (CHUNK - 1)).astype(np.int32),
        members=members_of(recipients, chunks),
        kinds=kinds,
        times=times,
    )
    if not placing.faults.any():
        return batch, []
    good = placing.faults == 0
    rejections = [
        Rejection(index, _NAMES[code], REASONS[_NAMES[code]])
        for index, code in zip(np.flatnonzero(~good).tolist(), placing.faults[~good].tolist(), strict=True)
    ]
    return batch.select(good), rejections


def _start_of(campaign: Campaign | None) -> int:
    if campaign is None or campaign.launch_time is None:
        return 0
    return int(campaign.launch_time.timestamp() * MICROSECONDS)


def _place_by_token(codec: TokenCodec, targets: TokenTargets, placing: _Placing) -> None:
    found = codec.read_joined(targets.tokens)
    placing.put(targets.indexes, found.campaigns, found.positions)
    if not found.valid.all():
        placing.reject(targets.indexes[~found.valid], "TOKEN_INVALID")


async def _place_by_name(lookups: Lookups, app: App, targets: NamedTargets, placing: _Placing) -> None:
    campaigns = await lookups.find_launched(app.app_id, targets.campaigns)
    numbers = await lookups.find_numbers(app.app_id, targets.external_ids)
    placing.reject(targets.indexes[numbers < 0], "CONTACT_UNKNOWN")
    for place, name in enumerate(targets.campaigns):
        members = np.flatnonzero(targets.campaign_of == place)
        if name not in campaigns:
            placing.reject(targets.indexes[members], "CAMPAIGN_UNKNOWN")
            continue
        roll = await lookups.read_roll(campaigns[name].campaign_id)
        positions = roll.find(numbers[members])
        is_found = positions >= 0
        placing.put(targets.indexes[members[is_found]], campaigns[name].campaign_id, positions[is_found])
        placing.reject(targets.indexes[members[~is_found]], "NOT_A_RECIPIENT")


async def _place_by_message(engine: AsyncEngine, app: App, targets: MessageTargets, placing: _Placing) -> None:
    asked: dict[str, set[str]] = defaultdict(set)
    for channel, message_id in zip(targets.channels, targets.message_ids, strict=True):
        asked[channel].add(message_id)
    async with transaction(engine) as conn:
        found = {channel: await find_messages(conn, channel, list(ids), app.app_id) for channel, ids in asked.items()}
    for index, channel, message_id in zip(targets.indexes.tolist(), targets.channels, targets.message_ids, strict=True):
        attempt = found[channel].get(message_id)
        if attempt is None:
            placing.reject(np.array([index]), "MESSAGE_UNKNOWN")
        elif attempt.position == TEST_ROW:
            placing.reject(np.array([index]), "NOT_A_RECIPIENT")
        else:
            placing.campaign_ids[index] = attempt.slot >> SLOT_SHIFT
            placing.positions[index] = chunk_of(attempt.slot) * CHUNK + attempt.position


async def _number_kinds(
    lookups: Lookups, types: Mapping[str, ChannelType], campaigns: list[Campaign | None], labels: list[tuple[str, str]]
) -> NDArray[np.int32]:
    """The kind of each campaign's (row) labels (column); 0 where its channel has no such signal that can be reported."""
    kinds: dict[tuple[int, int], Kind] = {}
    for row, campaign in enumerate(campaigns):
        channel = types.get(campaign.channel) if campaign else None
        if channel is None:
            continue
        for column, (signal, code) in enumerate(labels):
            if signal in channel.evidence and signal not in SERVER_SIGNALS:
                kinds[row, column] = kind_of(channel, signal, code)
    numbers = await lookups.number_kinds(kinds.values())
    table = np.zeros((len(campaigns), len(labels)), np.int32)
    for place, kind in kinds.items():
        table[place] = numbers[kind]
    return table


def kind_of(channel: ChannelType, signal: str, code: str) -> Kind:
    """The kind of a report: a failure has the code's class, a click the number of its link, other signals no reason."""
    if signal == "clicked" and code:
        return Kind(signal, "link", code[:64])
    if signal != "failed":
        return Kind(signal)
    code = code[:64] or "unknown"
    return Kind(signal, channel.channel.classify(code), code)
