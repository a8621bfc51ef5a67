"""Audiences: whom a campaign is for, as stored with it, and the contact numbers that it stands for now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.errors import NotFound
from aftertouch.retargeting.selections import Selection, check_selection, check_source, select_numbers
from aftertouch.rolls.chunks import Numbers
from aftertouch.rolls.sql import filter_by_set, read_set
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, find_campaign
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


Audience = AllSubscribers | GivenContacts | ListMembers | Selection


def encode_audience(audience: Audience) -> dict[str, Any]:
    """As it is stored."""
    match audience:
        case AllSubscribers():
            return {"kind": "all_subscribers"}
        case GivenContacts():
            return {"kind": "given_contacts", "external_ids": list(audience.external_ids)}
        case ListMembers():
            return {"kind": "list", "list": audience.list}
        case Selection():
            return {
                "kind": "retarget",
                "source": audience.source,
                "action": audience.action,
                "reason_codes": list(audience.reason_codes),
                "reason_classes": list(audience.reason_classes),
                "include_apart": audience.include_apart,
            }


def decode_audience(stored: Mapping[str, Any]) -> Audience:
    """The inverse of ``encode_audience``."""
    match stored["kind"]:
        case "all_subscribers":
            return AllSubscribers()
        case "given_contacts":
            return GivenContacts(tuple(stored["external_ids"]))
        case "list":
            return ListMembers(stored["list"])
        case _:
            return Selection(
                stored["source"],
                stored["action"],
                tuple(stored["reason_codes"]),
                tuple(stored["reason_classes"]),
                stored["include_apart"],
            )


async def find_source(
    conn: AsyncConnection, app: App, channels: Mapping[str, ChannelType], selection: Selection, path: str
) -> tuple[Campaign, ChannelType]:
    """The campaign that a selection asks, and its channel, when the selection can be asked of it.

    Raises:
        NotFound, FieldsInvalid, or what ``check_source`` raises.
    """
    source = await find_campaign(conn, app.app_id, selection.source)
    if source is None:
        raise NotFound(f"{app.name}/campaigns/{selection.source}")
    check_source(app, source)
    if source.channel not in channels:
        raise NotFound(f"channels/{source.channel}")
    check_selection(selection, channels[source.channel], path)
    return source, channels[source.channel]


async def evaluate_audience(
    conn: AsyncConnection, app: App, channels: Mapping[str, ChannelType], audience: Audience, channel: str
) -> Numbers:
    """The contact numbers of those of an audience who can be reached on a channel now; sorted and distinct.

    Raises:
        NotFound: there is no such list.
        what ``find_source`` raises, for a selection.
    """
    active = standing_set("active", channel)
    match audience:
        case AllSubscribers():
            return await read_set(conn, app.app_id, active)
        case GivenContacts():
            found = await find_numbers(conn, app.app_id, audience.external_ids)
            numbers = np.array(sorted(found.values()), np.int64)
        case ListMembers():
            members = await find_list(conn, app.app_id, audience.list)
            if members is None:
                raise NotFound(f"{app.name}/lists/{audience.list}")
            numbers = await read_set(conn, app.app_id, members.set_name)
        case Selection():
            source, source_channel = await find_source(conn, app, channels, audience, "audience.retarget")
            numbers = await select_numbers(conn, source, source_channel, audience)
    return numbers[await filter_by_set(conn, app.app_id, active, numbers)]
