"""Audiences: whom a campaign is for, as stored with it, and the people that it stands for.

An audience is evaluated when the campaign is launched, or frozen when the draft gets it: then its people are the campaign's
roll from that moment on, and launching sends to exactly them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.errors import AudienceEmpty, NotFound
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.funnel import Funnel, Target, run_funnel
from aftertouch.retargeting.holdouts import find_shares
from aftertouch.retargeting.matching import count_blocks, match
from aftertouch.retargeting.selections import (
    Combination,
    Question,
    Selection,
    Sources,
    find_root,
    find_roots,
    find_sources,
)
from aftertouch.rolls.chunks import Bits, Numbers, list_numbers, set_numbers
from aftertouch.rolls.sql import read_sets
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.store.contacts import find_numbers, standing_set
from aftertouch.store.lists import find_list


@dataclass(frozen=True)
class AllSubscribers:
    """Everybody with an active subscription on the campaign's channel."""


@dataclass(frozen=True)
class GivenContacts:
    """Contacts by external_id."""

    external_ids: tuple[str, ...]


@dataclass(frozen=True)
class ListMembers:
    """Everybody who is in a list."""

    list: str
    """The list's id."""


Audience = AllSubscribers | GivenContacts | ListMembers | Question | Combination


@dataclass(frozen=True)
class Frozen:
    """What was frozen: how many people, when, and a checksum over which ones."""

    as_of_time: datetime
    count: int
    checksum: str


def encode_audience(audience: Audience, frozen: Frozen | None = None) -> dict[str, Any]:
    """As it is stored."""
    encoded: dict[str, Any]
    match audience:
        case AllSubscribers():
            encoded = {"kind": "all_subscribers"}
        case GivenContacts():
            encoded = {"kind": "given_contacts", "external_ids": list(audience.external_ids)}
        case ListMembers():
            encoded = {"kind": "list", "list": audience.list}
        case _:
            encoded = {"kind": "retarget", **_encode_selection(audience)}
    if frozen is not None:
        encoded["frozen"] = {**vars(frozen), "as_of_time": frozen.as_of_time.isoformat()}
    return encoded


def _encode_selection(selection: Selection) -> dict[str, Any]:
    if isinstance(selection, Combination):
        return {"operator": selection.operator, "operands": [_encode_selection(operand) for operand in selection.operands]}
    return {
        "source": selection.source,
        "action": selection.action,
        "reason_codes": list(selection.reason_codes),
        "reason_classes": list(selection.reason_classes),
        "include_apart": selection.include_apart,
        "leave_out_pending": selection.leave_out_pending,
    }


def decode_audience(stored: Mapping[str, Any]) -> Audience:
    """Whom ``encode_audience`` stored."""
    match stored["kind"]:
        case "all_subscribers":
            return AllSubscribers()
        case "given_contacts":
            return GivenContacts(tuple(stored["external_ids"]))
        case "list":
            return ListMembers(stored["list"])
        case _:
            return _decode_selection(stored)


def _decode_selection(stored: Mapping[str, Any]) -> Selection:
    if "operator" in stored:
        return Combination(stored["operator"], tuple(_decode_selection(operand) for operand in stored["operands"]))
    return Question(
        stored["source"],
        stored["action"],
        tuple(stored["reason_codes"]),
        tuple(stored["reason_classes"]),
        stored["include_apart"],
        stored["leave_out_pending"],
    )


def decode_frozen(stored: Mapping[str, Any]) -> Frozen | None:
    """What ``encode_audience`` stored of what was frozen; None when the audience is evaluated at launch."""
    found = stored.get("frozen")
    return found and Frozen(datetime.fromisoformat(found["as_of_time"]), found["count"], found["checksum"])


async def evaluate_audience(
    conn: AsyncConnection, app: App, audience: AllSubscribers | GivenContacts | ListMembers, channel: str
) -> Bits:
    """Those of an audience that is no selection for whom a campaign on a channel would be now, as bits by contact number.

    Raises:
        NotFound: there is no such list.
    """
    blocks = await count_blocks(conn, app.app_id)
    active = standing_set("active", channel)
    reached = (await read_sets(conn, app.app_id, [active], blocks))[active]
    if isinstance(audience, AllSubscribers):
        return reached
    if isinstance(audience, ListMembers):
        members = await find_list(conn, app.app_id, audience.list)
        if members is None:
            raise NotFound(f"{app.name}/lists/{audience.list}")
        return reached & (await read_sets(conn, app.app_id, [members.set_name], blocks))[members.set_name]
    found = await find_numbers(conn, app.app_id, audience.external_ids)
    return reached & set_numbers(np.array(list(found.values()), np.int64), blocks)


async def filter_selection(
    conn: AsyncConnection,
    copies: Copies,
    app: App,
    sources: Sources,
    selection: Selection,
    channel: str,
    wave: Campaign | None = None,
    *,
    holdout_percent: int = 0,
) -> Funnel:
    """The funnel of a selection whose sources were found.

    Args:
        wave: the campaign whose audience it is, once it is made.
        holdout_percent: what a campaign that is not made yet would hold out.
    """
    campaigns = [source.campaign for source in sources.values()]
    roots = find_roots(sources)
    percent = wave.holdout_percent if wave else holdout_percent
    matched = await match(conn, copies, sources, selection, await count_blocks(conn, app.app_id))
    target = Target(
        app=app,
        channel=channel,
        transactional=wave is not None and wave.transactional,
        roots=roots,
        shares=await find_shares(conn, roots, find_root(sources), percent),
        asked=frozenset(campaign.campaign_id for campaign in campaigns) | ({wave.campaign_id} if wave else frozenset()),
        matched=matched,
    )
    return await run_funnel(conn, copies, target)


@dataclass(frozen=True)
class Prepared:
    """An audience as a draft stores it."""

    values: dict[str, Any]
    """Columns of the campaign."""
    roll: Numbers | None
    """The contact numbers to be written as the campaign's roll, of an audience that is frozen."""


async def prepare_audience(
    conn: AsyncConnection,
    copies: Copies,
    app: App,
    channels: Mapping[str, ChannelType],
    audience: Audience,
    path: str,
    channel: str,
    *,
    draft: Campaign | None = None,
    as_of_time: datetime | None = None,
) -> Prepared:
    """Check an audience, and freeze it where there is a moment of which it is to be true.

    Args:
        path: to the audience, for errors.
        draft: that gets the audience, once it is made; or a follow-up, whose source need not be launched yet.

    Raises:
        AudienceEmpty: there is nobody to be frozen; or what ``find_sources`` raises, for a selection.
    """
    if isinstance(audience, Question | Combination):
        may_wait = draft is not None and draft.source_id is not None and as_of_time is None
        sources = await find_sources(conn, app, channels, audience, f"{path}.retarget", may_wait=may_wait)
        return await prepare_selection(conn, copies, app, sources, audience, channel, draft=draft, as_of_time=as_of_time)
    evaluated = await evaluate_audience(conn, app, audience, channel) if as_of_time else None
    return await _prepare(app, audience, None, draft, evaluated, as_of_time)


async def prepare_selection(
    conn: AsyncConnection,
    copies: Copies,
    app: App,
    sources: Sources,
    selection: Selection,
    channel: str,
    *,
    draft: Campaign | None = None,
    as_of_time: datetime | None = None,
) -> Prepared:
    """The same for a selection whose sources were found."""
    evaluated = None
    if as_of_time:
        evaluated = (await filter_selection(conn, copies, app, sources, selection, channel, draft)).lasting
    return await _prepare(app, selection, find_root(sources), draft, evaluated, as_of_time)


async def _prepare(
    app: App,
    audience: Audience,
    root_id: int | None,
    draft: Campaign | None,
    evaluated: Bits | None,
    as_of_time: datetime | None,
) -> Prepared:
    if evaluated is None or as_of_time is None:
        return Prepared({"audience": encode_audience(audience), "root_id": root_id, "recipients": 0}, None)
    roll = await asyncio.to_thread(list_numbers, evaluated)
    if not len(roll):
        raise AudienceEmpty(f"{app.name}/campaigns/{draft.campaign if draft else '-'}")
    frozen = Frozen(as_of_time, len(roll), _make_checksum(evaluated))
    return Prepared({"audience": encode_audience(audience, frozen), "root_id": root_id, "recipients": len(roll)}, roll)


def _make_checksum(audience: Bits) -> str:
    # An app that grows gets more bits, and its people stay the same: what is hashed ends with the last of them.
    return hashlib.sha256(audience.tobytes().rstrip(b"\0")).hexdigest()
