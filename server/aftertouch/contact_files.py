"""Files of contacts: CSV whose columns are external_id, time_zone, ``<channel>.<address field>``, and attributes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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


class RowError(ValueError):
    """A row cannot be read; the text says why."""


OnRejected = Callable[[int, str, str], None]
"""Told of a row that is left out: its place from 0, its external_id, and why."""


@dataclass(frozen=True)
class Rejected:
    """A row that was left out."""

    place: int
    """In the file, from 0."""
    external_id: str
    field: str
    """Of the contact, where the server found it wrong; empty where the row could not be read."""
    text: str


class LeftOut:
    """The rows of a file that were left out, some when it was read: those the server never saw, and did not count."""

    def __init__(self, most: int) -> None:
        """``most`` is how many are kept to be told."""
        self._most = most
        self._unread: list[int] = []
        self._told: list[Rejected] = []

    @property
    def unread_count(self) -> int:
        """How many were left out when the file was read."""
        return len(self._unread)

    @property
    def told(self) -> list[Rejected]:
        """Those to be told, in the order of the file."""
        return sorted(self._told, key=lambda rejected: rejected.place)[: self._most]

    def add(self, index: int, external_id: str, text: str) -> None:
        """Leave out a row, by its place in the file."""
        self._unread.append(index)
        if len(self._unread) <= self._most:
            self._told.append(Rejected(index, external_id, "", text))

    def add_answer(self, index: int, external_id: str, text: str, field: str = "") -> None:
        """Leave out a row, by its place in what was sent."""
        for unread in self._unread:
            if unread > index:
                break
            index += 1
        self._told.append(Rejected(index, external_id, field, text))


def read_external_ids(rows: Iterable[Mapping[str, str]], on_rejected: OnRejected) -> Iterator[str]:
    """The external_id of each row; other columns are passed over."""
    for index, row in enumerate(rows):
        if text := _find_fault(row):
            on_rejected(index, row.get("external_id") or "", text)
        else:
            yield row["external_id"]


async def read_contacts(
    rows: Iterable[Mapping[str, str]], on_rejected: OnRejected | None = None
) -> AsyncIterator[contacts_pb2.Contact]:
    """The contact of each row, for an import. Empty cells are left out; the header was checked.

    Raises:
        RowError: a row has more cells than the header, and nobody is to be told of it.
    """
    for index, row in enumerate(rows):
        if text := _find_fault(row):
            if on_rejected is None:
                raise RowError(f"row {index + 1} {text}")
            on_rejected(index, row.get("external_id") or "", text)
            continue
        attributes: dict[str, str] = {}
        addresses: dict[str, dict[str, Any]] = {}
        for column, value in row.items():
            if column in ("external_id", "time_zone") or not value:
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


def _find_fault(row: Mapping[str, str]) -> str:
    """Why a row of ``csv.DictReader`` cannot be read; empty when it can. Cells beyond the header stand under no name."""
    return "has more cells than the header; is a text with a comma not quoted?" if None in row else ""
