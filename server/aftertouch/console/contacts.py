"""The people: the list, one person, and files of them."""

from __future__ import annotations

import asyncio
import csv
import io
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, TextIO

import structlog
from google.protobuf import json_format
from starlette.datastructures import UploadFile
from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.visits import Visit, is_recent, read_id, to_time
from aftertouch.contact_files import HeaderError, LeftOut, check_header, read_contacts
from aftertouch.errors import AftertouchError, FieldsInvalid, NotFound
from aftertouch.rpc.values import to_struct
from aftertouch.store import imports as store
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2, contacts_pb2

log = structlog.get_logger()

PAGE_SIZE = 50
LONGEST_ID = 200
LONGEST_MESSAGE_ID = 256
BATCH = 1000
"""Contacts in one message of an import: the most that it may have."""
LARGEST_FILE = 1 << 30
PROGRESS_SECONDS = 0.5
SHOWN_REJECTIONS = 200
STALE_SECONDS = 60.0
"""An import that has said nothing for so long has ended with its server."""

_State = contacts_pb2.Subscription.State


async def show_list(visit: Visit) -> Response:
    """Contacts in the order in which they were made; those of a list, or whom a text leads to.

    It is the beginning of an id, or else an address, or else a provider's id of a message, as its own pages and support name it.
    """
    text, name = visit.query("q").strip(), visit.query("list")
    wanted = None
    if text:
        wanted = contacts_pb2.ContactFilter(external_id_prefix=text[:LONGEST_ID])
    elif name:
        wanted = contacts_pb2.ContactFilter(list=visit.name("lists", name))
    request = contacts_pb2.ListContactsRequest(
        parent=visit.parent, page_size=PAGE_SIZE, page_token=visit.query("after"), filter=wanted
    )
    listed = await visit.client.contacts.ListContacts(request)
    if text and not listed.contacts and not request.page_token:
        listed.contacts.extend(await _find_by_address(visit, text) or await _find_by_message(visit, text))
    async with transaction(visit.console.engine) as conn:
        imports = await store.list_imports(conn, visit.app.app_id, 5) if visit.may("manage") else []
    return visit.render(
        "contacts.html",
        contacts=[_describe(visit, contact) for contact in listed.contacts],
        text=text,
        list=name,
        after=visit.query("after"),
        next=listed.next_page_token,
        imports=imports,
    )


async def _find_by_address(visit: Visit, text: str) -> list[contacts_pb2.Contact]:
    """Who has this text as an address on a channel whose addresses are one text, as a phone number is."""
    found: dict[str, contacts_pb2.Contact] = {}
    for channel, kind, is_ready in await visit.list_channels():
        fields = [name for name, info in kind.channel.address_model.model_fields.items() if info.is_required()]
        if len(fields) != 1 or not is_ready:
            continue
        wanted = contacts_pb2.AddressFilter(channel=channel, address=to_struct({fields[0]: text}))
        request = contacts_pb2.ListContactsRequest(parent=visit.parent, filter=contacts_pb2.ContactFilter(address=wanted))
        try:
            listed = await visit.client.contacts.ListContacts(request)
        except FieldsInvalid:
            # It is no address of this channel.
            continue
        found |= {contact.name: contact for contact in listed.contacts}
    return list(found.values())


async def _find_by_message(visit: Visit, text: str) -> Sequence[contacts_pb2.Contact]:
    """Who was sent the message that a provider gave this id."""
    if len(text) > LONGEST_MESSAGE_ID:
        return ()
    request = contacts_pb2.ListContactsRequest(parent=visit.parent, filter=contacts_pb2.ContactFilter(message_id=text))
    return (await visit.client.contacts.ListContacts(request)).contacts


def _describe(visit: Visit, contact: contacts_pb2.Contact) -> dict[str, Any]:
    types = visit.console.registry.types
    described: dict[str, Any] = {
        "external_id": contact.external_id,
        "attributes": json_format.MessageToDict(contact.attributes),
        "time_zone": contact.time_zone,
        "create_time": to_time(contact.create_time),
        "update_time": to_time(contact.update_time),
        "subscriptions": [
            {
                "channel": types[s.channel].channel.label if s.channel in types else s.channel,
                "address": _shorten(json_format.MessageToDict(s.address)),
                "state": _State.Name(s.state).lower(),
                "reason": s.reason,
                "update_time": to_time(s.update_time),
            }
            for s in contact.subscriptions
        ],
    }
    return described | {"tags": _count_alike(described["subscriptions"])}


def _count_alike(subscriptions: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """How often each channel is there in each state, as text and state."""
    counted = Counter((s["channel"], s["state"]) for s in subscriptions)
    texts = []
    for (channel, state), count in counted.items():
        several = f" \u00d7 {count}" if count > 1 else ""
        standing = f" {words.STANDINGS[state]}" if state != "active" else ""
        texts.append((f"{channel}{several}{standing}", state))
    return texts


def _shorten(address: Mapping[str, Any]) -> str:
    """The parts of an address that people know it by; keys of a browser's subscription are none."""
    texts = [value if len(value) <= 60 else value[:57] + "…" for value in address.values() if isinstance(value, str)]
    return ", ".join(texts)


async def show(visit: Visit) -> Response:
    """One person. The id is in the query: it may be anything, a slash excepted."""
    return await _render_contact(visit, visit.query("id"))


async def _render_contact(visit: Visit, external_id: str, *, fault: str = "") -> Response:
    request = contacts_pb2.GetContactRequest(name=visit.name("contacts", external_id))
    contact = await visit.client.contacts.GetContact(request)
    campaigns = [
        {
            "id": read_id(found.campaign),
            "display_name": found.display_name,
            "channel": found.channel,
            "launch_time": to_time(found.launch_time),
            "signals": _list_news(visit, found),
            "reasons": found.reasons,
        }
        for found in contact.campaigns
    ]
    latest = campaigns_pb2.ListCampaignsRequest(parent=visit.parent, page_size=PAGE_SIZE)
    known = {campaign["id"] for campaign in campaigns}
    others = [
        (read_id(found.name), found.display_name)
        for found in (await visit.client.campaigns.ListCampaigns(latest)).campaigns
        if read_id(found.name) not in known
    ]
    return visit.render(
        "contact.html",
        400 if fault else 200,
        contact=_describe(visit, contact),
        campaigns=campaigns,
        others=others,
        fault=fault,
    )


def _list_news(visit: Visit, found: contacts_pb2.ContactCampaign) -> list[str]:
    """What is true of a person in a campaign, as its channel says it; what another signal implies is left out."""
    kind = visit.console.registry.types.get(found.channel)
    if kind is None:
        return list(found.signals)
    labels = {signal.name: signal.label for signal in kind.channel.signals}
    implied = {
        signal for signal, proofs in kind.evidence.items() for proof in proofs if proof != signal and proof in found.signals
    }
    return [labels.get(signal, signal.capitalize()) for signal in found.signals if signal not in implied]


async def explain(visit: Visit) -> Response:
    """Why a person was, or was not, messaged by a campaign."""
    external_id, campaign = visit.query("id"), visit.query("campaign")
    request = contacts_pb2.ExplainContactRequest(
        name=visit.name("contacts", external_id), campaign=visit.name("campaigns", campaign)
    )
    found = await visit.client.contacts.ExplainContact(request)
    shown = await visit.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=request.campaign))
    kind = visit.console.registry.types.get(shown.channel)
    labels = {signal.name: signal.label for signal in kind.channel.signals} if kind else {}
    events = [(to_time(event.time), labels.get(event.signal, event.signal.capitalize()), event.reason) for event in found.events]
    return visit.render("explain.html", found=found, external_id=external_id, campaign=shown.display_name, events=events)


async def erase(visit: Visit) -> Response:
    """Erase a person for good, when their id was typed once more."""
    form = await visit.read_form()
    external_id = str(form.get("id", ""))
    if form.get("again") != external_id:
        return await _render_contact(visit, external_id, fault="Type the id exactly as it is.")
    request = contacts_pb2.EraseContactRequest(name=visit.name("contacts", external_id))
    await visit.client.contacts.EraseContact(request)
    return visit.redirect("/contacts?erased=1")


# Files


async def show_import_form(visit: Visit) -> Response:
    """Where a file is chosen."""
    return visit.render("import_form.html", fault="", channels=_list_columns(visit))


def _list_columns(visit: Visit) -> list[str]:
    """An example of a column for each channel's address."""
    return [
        f"{name}.{field}"
        for name, found in sorted(visit.console.registry.types.items())
        for field, info in found.channel.address_model.model_fields.items()
        if info.is_required()
    ]


async def start_import(visit: Visit) -> Response:
    """Begin with a file; the page of the import shows how far it is."""
    upload = (await visit.read_form()).get("file")
    if not isinstance(upload, UploadFile) or not upload.filename:
        return visit.render("import_form.html", 400, fault="Choose a file first.", channels=_list_columns(visit))
    lines = io.TextIOWrapper(upload.file, encoding="utf-8-sig", newline="")
    try:
        check_header(next(csv.reader(lines), []))
    except (HeaderError, UnicodeDecodeError, csv.Error) as error:
        fault = str(error) if isinstance(error, HeaderError) else "The file is not CSV in UTF-8."
        return visit.render("import_form.html", 400, fault=fault, channels=_list_columns(visit))
    lines.seek(0)
    async with transaction(visit.console.engine) as conn:
        number = await store.create_import(conn, visit.app.app_id, upload.filename[:200])
    visit.keeps_upload = True
    visit.console.tasks.start(_import(visit, number, lines), f"import {number}")
    return visit.redirect(f"/contacts/imports/{number}")


async def _import(visit: Visit, number: int, lines: TextIO) -> None:
    """Pour a file in, telling how far it is; it ends with what became of the rows, or why it failed."""
    left_out = LeftOut(SHOWN_REJECTIONS)

    async def tell(**values: Any) -> None:
        async with transaction(visit.console.engine) as conn:
            await store.update_import(conn, visit.app.app_id, number, **values)

    async def pack() -> AsyncIterator[contacts_pb2.ImportContactsRequest]:
        batch: list[contacts_pb2.Contact] = []
        sent, told = 0, time.monotonic()
        async for contact in read_contacts(_list_rows(lines), left_out.add):
            batch.append(contact)
            if len(batch) == BATCH:
                yield contacts_pb2.ImportContactsRequest(parent=visit.parent, contacts=batch)
                sent, batch = sent + len(batch), []
                if time.monotonic() - told > PROGRESS_SECONDS:
                    await tell(read_count=sent + left_out.unread_count)
                    told = time.monotonic()
        yield contacts_pb2.ImportContactsRequest(parent=visit.parent, contacts=batch)
        await tell(read_count=sent + len(batch) + left_out.unread_count)

    try:
        with lines:
            result = await visit.client.contacts.ImportContacts(pack())
    except AftertouchError as error:
        await tell(state="FAILED", problem=words.explain(error))
    except (csv.Error, UnicodeDecodeError) as error:
        await tell(state="FAILED", problem=f"The file is not CSV in UTF-8 from some line on: {error}.")
    except asyncio.CancelledError:
        await tell(state="FAILED", problem="The server was stopped. Import the file again; nothing is stored twice.")
        raise
    except Exception:
        log.exception("an import failed", action="import_contacts", number=number)
        await tell(state="FAILED", problem="A defect of ours; the server's log has its trace.")
    else:
        for rejection in result.rejections:
            left_out.add_answer(rejection.index, rejection.external_id, rejection.description, rejection.field)
        rejections = [
            # The header is the first line.
            {"row": row.place + 2, "external_id": row.external_id, "field": row.field, "description": row.text}
            for row in left_out.told
        ]
        await tell(
            state="DONE",
            created_count=result.created_count,
            updated_count=result.updated_count,
            rejected_count=result.rejected_count + left_out.unread_count,
            rejections=rejections,
        )


def _list_rows(lines: TextIO) -> Iterator[Mapping[str, str]]:
    yield from csv.DictReader(lines)


async def show_import(visit: Visit) -> Response:
    """How far an import is, and what became of it."""
    text = visit.param("number")
    async with transaction(visit.console.engine) as conn:
        found = await store.find_import(conn, visit.app.app_id, int(text)) if text.isdecimal() and len(text) < 18 else None
    if found is None:
        raise NotFound(visit.name("imports", text))
    is_lost = found.state == "RUNNING" and not is_recent(found.update_time, STALE_SECONDS)
    template = "import_part.html" if visit.is_partial else "import.html"
    return visit.render(template, imported=found, is_lost=is_lost)
