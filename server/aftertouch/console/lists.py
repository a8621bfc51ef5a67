"""Lists: named sets of people, filled from a file of external ids or by hand."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from starlette.datastructures import UploadFile
from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.visits import Visit, name_faults, read_id, to_time
from aftertouch.errors import AftertouchError, FieldsInvalid, Violation
from aftertouch.v1 import lists_pb2

LARGEST_FILE = 64 << 20
BATCH = 10_000
"""Contacts in one message of an import: the most that it may have."""
SHOWN_REJECTIONS = 200


async def show_all(visit: Visit) -> Response:
    """Every list, with how many people are in it."""
    return await _render(visit)


async def _render(visit: Visit, *, faults: Mapping[str, str] | None = None, values: Mapping[str, str] | None = None) -> Response:
    request = lists_pb2.ListListsRequest(parent=visit.parent, page_size=1000)
    lists = (await visit.client.lists.ListLists(request)).lists
    return visit.render(
        "lists.html",
        400 if faults else 200,
        lists=[
            {
                "id": read_id(found.name),
                "display_name": found.display_name,
                "contact_count": found.contact_count,
                "update_time": to_time(found.update_time),
            }
            for found in lists
        ],
        faults=faults or name_faults(),
        values=values or {"display_name": "", "list_id": ""},
    )


async def create(visit: Visit) -> Response:
    """Make a list, and fill it with what was given."""
    form = await visit.read_form()
    values = {name: str(form.get(name, "")) for name in ("display_name", "list_id")}
    request = lists_pb2.CreateListRequest(
        parent=visit.parent, list_id=values["list_id"], list=lists_pb2.List(display_name=values["display_name"])
    )
    try:
        made = await visit.client.lists.CreateList(request)
    except FieldsInvalid as error:
        return await _render(visit, faults=name_faults(error.violations, "list."), values=values)
    except AftertouchError as error:
        if error.reason not in ("RESOURCE_ALREADY_EXISTS", "LIST_LIMIT_REACHED"):
            raise
        return await _render(visit, faults=name_faults([Violation("list_id", words.explain(error))]), values=values)
    return await _fill(visit, read_id(made.name), form.get("file"), str(form.get("contacts", "")))


async def add(visit: Visit) -> Response:
    """Fill a list with what was given."""
    form = await visit.read_form()
    return await _fill(visit, visit.param("list"), form.get("file"), str(form.get("contacts", "")))


async def _fill(visit: Visit, name: str, file: Any, text: str) -> Response:
    """Add people to a list, and say who could not be added."""
    try:
        if isinstance(file, UploadFile) and file.filename:
            with io.TextIOWrapper(file.file, encoding="utf-8-sig", newline="") as lines:
                result = await visit.client.lists.ImportListContacts(_pack(visit, name, _read_ids(lines)))
        else:
            result = await visit.client.lists.ImportListContacts(_pack(visit, name, text.replace(",", "\n").splitlines()))
    except (csv.Error, UnicodeDecodeError):
        return await _render(visit, faults=name_faults([Violation("file", "The file is not CSV in UTF-8.")]))
    except AftertouchError as error:
        if error.code != "INVALID_ARGUMENT":
            raise
        return await _render(visit, faults=name_faults([Violation("file", words.explain(error))]))
    return visit.render("list_filled.html", result=result, name=name, rejections=result.rejections[:SHOWN_REJECTIONS])


def _read_ids(lines: io.TextIOWrapper) -> Iterable[str]:
    """The column external_id where the first line names it, or else the first column."""
    rows = csv.reader(lines)
    first = next(rows, [])
    place = first.index("external_id") if "external_id" in first else 0
    if "external_id" not in first and first:
        yield first[0]
    for row in rows:
        if len(row) > place:
            yield row[place]


async def _pack(visit: Visit, name: str, external_ids: Iterable[str]) -> AsyncIterator[lists_pb2.ImportListContactsRequest]:
    batch: list[str] = []
    for external_id in external_ids:
        if text := external_id.strip():
            batch.append(text)
        if len(batch) == BATCH:
            yield lists_pb2.ImportListContactsRequest(name=visit.name("lists", name), contacts=batch)
            batch = []
    yield lists_pb2.ImportListContactsRequest(name=visit.name("lists", name), contacts=batch)


async def delete(visit: Visit) -> Response:
    """Delete a list; its people stay contacts."""
    try:
        await visit.client.lists.DeleteList(lists_pb2.DeleteListRequest(name=visit.name("lists", visit.param("list"))))
    except AftertouchError as error:
        if error.reason != "LIST_IN_USE":
            raise
        return await _render(visit, faults=name_faults([Violation("change", words.explain(error))]))
    return visit.redirect("/lists")
