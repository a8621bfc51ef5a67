"""Files of contacts: CSV whose columns are external_id, time_zone, ``<channel>.<address field>``, and attributes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

from google.protobuf import json_format

from aftertouch.v1 import contacts_pb2


class HeaderError(ValueError):
    """The header cannot be used; the text says which column, and why."""


def check_header(columns: Sequence[str]) -> None:
    """Raise ``HeaderError`` unless every column has a place of its own in a contact."""
    if "external_id" not in columns:
        raise HeaderError("the file has no column external_id; its first line must name the columns")
    for column in columns:
        if columns.count(column) > 1:
            raise HeaderError(f"the column {column!r} is there twice")
        if any(other.startswith(f"{column}.") for other in columns if "." in column):
            raise HeaderError(f"the column {column!r} is the beginning of another one, and cannot be both")
        if not all(column.split(".")):
            raise HeaderError(f"the column {column!r} has no name; leave it out or name it")


async def read_contacts(rows: Iterable[Mapping[str, str]]) -> AsyncIterator[contacts_pb2.Contact]:
    """The contact of each row, for an import. Empty cells are left out; the header was checked."""
    for row in rows:
        attributes: dict[str, str] = {}
        addresses: dict[str, dict[str, Any]] = {}
        for column, value in row.items():
            if column in ("external_id", "time_zone") or column is None or not value:
                continue
            channel, dot, path = column.partition(".")
            if not dot:
                attributes[column] = value
                continue
            place = addresses.setdefault(channel, {})
            *parents, leaf = path.split(".")
            for parent in parents:
                place = place.setdefault(parent, {})
            place[leaf] = value
        contact = contacts_pb2.Contact(external_id=row.get("external_id") or "", time_zone=row.get("time_zone") or "")
        json_format.ParseDict(attributes, contact.attributes)
        for channel, address in addresses.items():
            json_format.ParseDict(address, contact.subscriptions.add(channel=channel).address)
        yield contact
