"""Lists: named sets of people, changed by a file of external ids or by hand."""

from __future__ import annotations

import asyncio
import csv
import io
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

from starlette.datastructures import FormData, UploadFile
from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.exports import read_cell
from aftertouch.console.visits import Visit, name_faults, read_id, to_time
from aftertouch.errors import AftertouchError, FieldsInvalid, Violation
from aftertouch.v1 import lists_pb2

LARGEST_FILE = 64 << 20
BATCH = 10_000
"""Contacts in one message of an import: the most that it may have."""
SHOWN_REJECTIONS = 200

Changed: TypeAlias = tuple[Mapping[str, int], Sequence[lists_pb2.AddListContactsResponse.Rejection]]
"""What became of the people that a list was to be changed by: numbers with their labels, and who could not be added."""
Change: TypeAlias = Callable[[Visit, str, Iterator[list[str]]], Awaitable[Changed]]


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
    return await _change(visit, read_id(made.name), form, _add)


async def add(visit: Visit) -> Response:
    """Fill a list with what was given."""
    return await _change(visit, visit.param("list"), await visit.read_form(), _add)


async def remove(visit: Visit) -> Response:
    """Take people out of a list."""
    return await _change(visit, visit.param("list"), await visit.read_form(), _remove)


async def _change(visit: Visit, name: str, form: FormData, change: Change) -> Response:
    """Have a list changed by the people of a form, of its file if there is one, and say what became of them."""
    file = form.get("file")
    try:
        if isinstance(file, UploadFile) and file.filename:
            with io.TextIOWrapper(file.file, encoding="utf-8-sig", newline="") as lines:
                # A file that breaks off in the middle changes nothing.
                await asyncio.to_thread(lambda: sum(1 for _ in _read_ids(lines)))
                lines.seek(0)
                figures, rejections = await change(visit, visit.name("lists", name), _pack(_read_ids(lines)))
        else:
            typed = str(form.get("contacts", "")).replace(",", "\n").splitlines()
            figures, rejections = await change(visit, visit.name("lists", name), _pack(typed))
    except (csv.Error, UnicodeDecodeError):
        return await _render(visit, faults=name_faults([Violation("file", "The file is not CSV in UTF-8.")]))
    except AftertouchError as error:
        if error.code != "INVALID_ARGUMENT":
            raise
        return await _render(visit, faults=name_faults([Violation("file", words.explain(error))]))
    return visit.render("list_changed.html", name=name, figures=figures, rejections=rejections[:SHOWN_REJECTIONS])


async def _add(visit: Visit, name: str, batches: Iterator[list[str]]) -> Changed:
    async def pack() -> AsyncIterator[lists_pb2.ImportListContactsRequest]:
        for batch in batches:
            yield lists_pb2.ImportListContactsRequest(name=name, contacts=batch)

    result = await visit.client.lists.ImportListContacts(pack())
    figures = {"Added": result.added_count, "In it already": result.present_count, "Left out": result.rejected_count}
    return figures, result.rejections


async def _remove(visit: Visit, name: str, batches: Iterator[list[str]]) -> Changed:
    given = removed = 0
    for batch in batches:
        request = lists_pb2.RemoveListContactsRequest(name=name, contacts=batch)
        removed += (await visit.client.lists.RemoveListContacts(request)).removed_count
        given += len(batch)
    return {"Taken out": removed, "Not in it, or named twice": given - removed}, ()


def _read_ids(lines: io.TextIOWrapper) -> Iterator[str]:
    """The column external_id where the first line names it, as an export of ours does, or else the first column."""
    rows = csv.reader(lines)
    first = next(rows, [])
    if "external_id" in first:
        place = first.index("external_id")
        yield from (read_cell(row[place].strip()) for row in rows if len(row) > place)
    else:
        yield from (row[0] for row in itertools.chain((first,), rows) if row)


def _pack(external_ids: Iterable[str]) -> Iterator[list[str]]:
    """As many as one message may have; one batch at least, so that the list is looked for."""
    batch: list[str] = []
    for external_id in external_ids:
        if text := external_id.strip():
            batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    yield batch


async def delete(visit: Visit) -> Response:
    """Delete a list; its people stay contacts."""
    try:
        await visit.client.lists.DeleteList(lists_pb2.DeleteListRequest(name=visit.name("lists", visit.param("list"))))
    except AftertouchError as error:
        if error.reason != "LIST_IN_USE":
            raise
        return await _render(visit, faults=name_faults([Violation("change", words.explain(error))]))
    return visit.redirect("/lists")
