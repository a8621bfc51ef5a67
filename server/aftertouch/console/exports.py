"""Groups of people as CSV: of a campaign, of a retarget, of a list.

The services say who is in a group, all at one moment, and a page of names is written as it comes: each number that the console
shows leads to its people, however many they are.
"""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from typing import TypeVar

from starlette.responses import Response, StreamingResponse

from aftertouch.console.campaigns import list_signals, read, read_plain
from aftertouch.console.retargets import Choice
from aftertouch.console.visits import Visit, read_id
from aftertouch.errors import FieldsInvalid, Violation
from aftertouch.signals import CORE_IMPLICATIONS
from aftertouch.v1 import campaigns_pb2, lists_pb2, retargeting_pb2

_FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a cell that begins so for a formula."""

_Group = retargeting_pb2.ListRetargetContactsRequest.Group
_Reason = retargeting_pb2.PreviewRetargetResponse.Reason

R = TypeVar("R")
_Contacts = TypeVar("_Contacts", retargeting_pb2.ListRetargetContactsResponse, lists_pb2.ExportListContactsResponse)


async def export_recipients(visit: Visit) -> Response:
    """A group of a campaign's people with what is true of each: everybody, or those who meet everything that is asked."""
    standing = await read_plain(visit)
    wanted = campaigns_pb2.RecipientFilter(
        signal=visit.query("signal"),
        reason=visit.query("reason"),
        action=visit.query("action"),
        apart=visit.query("apart") == "1",
        pending=visit.query("pending") == "1",
    )
    request = campaigns_pb2.ExportRecipientsRequest(parent=standing.message.name, filter=wanted)
    signals = [*CORE_IMPLICATIONS, *(name for name, _ in list_signals(visit, standing.message.channel))]

    def list_rows(page: campaigns_pb2.ExportRecipientsResponse) -> Iterable[Sequence[str]]:
        for person in page.recipients:
            true = ("yes" if signal in person.signals else "no" for signal in signals)
            yield read_id(person.contact), *true, " ".join(person.reasons)

    named = [wanted.signal, wanted.reason, wanted.action, *(flag for flag in ("apart", "pending") if getattr(wanted, flag))]
    pages = visit.client.campaigns.ExportRecipients(request)
    return await _answer(
        [standing.id, *(named if any(named) else ["all"])], ["external_id", *signals, "reasons"], pages, list_rows
    )


async def export_retarget(visit: Visit) -> Response:
    """A group of the people who are chosen in the retarget dialog."""
    source = await read_plain(visit)
    selection = Choice(source, visit.request.query_params).selection
    return await _export_funnel(visit, [source.id, selection.action], selection, visit.query("channel"))


async def export_audience(visit: Visit) -> Response:
    """A group of the people of a draft's audience, which is a selection."""
    draft = await read(visit)
    return await _export_funnel(visit, [draft.id], draft.message.audience.retarget, draft.message.channel)


async def _export_funnel(
    visit: Visit, names: Sequence[str], selection: campaigns_pb2.RetargetSelection, channel: str
) -> Response:
    group, reason = visit.query("group"), visit.query("reason")
    try:
        request = retargeting_pb2.ListRetargetContactsRequest(
            selection=selection,
            channel=channel,
            group=_Group.Value(group) if group else _Group.AUDIENCE,
            reason=_Reason.Value(reason) if reason else _Reason.REASON_UNSPECIFIED,
        )
    except ValueError as error:
        raise FieldsInvalid([Violation("group", f"of people who are retargeted: {error}")]) from error
    pages = visit.client.retargeting.ListRetargetContacts(request)
    return await _answer([*names, channel, group.lower(), reason.lower()], ["external_id"], pages, _list_names)


async def export_list(visit: Visit) -> Response:
    """The people of a list."""
    request = lists_pb2.ExportListContactsRequest(name=visit.name("lists", visit.param("list")))
    return await _answer([visit.param("list")], ["external_id"], visit.client.lists.ExportListContacts(request), _list_names)


def _list_names(page: _Contacts) -> Iterable[Sequence[str]]:
    return ((read_id(contact),) for contact in page.contacts)


async def _answer(
    names: Sequence[str], header: Sequence[str], pages: AsyncIterable[R], list_rows: Callable[[R], Iterable[Sequence[str]]]
) -> Response:
    """A file, page by page. Whatever is refused is refused before it begins.

    Args:
        names: of the file, its words; empty ones are left out.
        pages: one at least.
    """
    coming = aiter(pages)
    first = await anext(coming)

    async def write() -> AsyncIterator[str]:
        yield _write_rows([header, *list_rows(first)])
        async for page in coming:
            yield _write_rows(list_rows(page))

    name = "-".join(filter(None, names))
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_") else "-" for letter in name)[:120]
    headers = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return StreamingResponse(write(), headers=headers, media_type="text/csv; charset=utf-8")


def _write_rows(rows: Iterable[Sequence[str]]) -> str:
    lines = io.StringIO()
    csv.writer(lines).writerows([quote_cell(cell) for cell in row] for row in rows)
    return lines.getvalue()


def quote_cell(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula; ``read_cell`` gives back what it was."""
    return f"'{cell}" if cell.lstrip("'")[:1] in _FORMULAS else cell


def read_cell(cell: str) -> str:
    """What a cell of one of our files says."""
    return cell[1:] if cell[:1] == "'" and cell.lstrip("'")[:1] in _FORMULAS else cell
