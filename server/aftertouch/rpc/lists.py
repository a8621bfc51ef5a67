"""The Lists service."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from google.protobuf.empty_pb2 import Empty

from aftertouch.errors import AlreadyExists, FieldsInvalid, ListInUse, ListLimitReached, NotFound, Violation
from aftertouch.retargeting.matching import count_blocks
from aftertouch.rolls.sql import read_sets
from aftertouch.rpc.exports import begin_export, stream_contacts
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.pages import fill_page, make_page_token, read_page_token, size_page
from aftertouch.rpc.values import to_timestamp
from aftertouch.store import lists as store
from aftertouch.store.engine import snapshot, transaction
from aftertouch.v1 import lists_pb2, lists_pb2_grpc

MOST_LISTS = 1_000
"""Of one app: each takes a kilobyte for every 8,192 contacts."""
MOST_CONTACTS = 10_000
"""In one message."""
MOST_REJECTIONS = 1_000
"""How many contacts that were left out are reported one by one."""

_Reason = lists_pb2.AddListContactsResponse.Reason


class Lists(lists_pb2_grpc.ListsServicer):
    """The lists of the caller's app."""

    async def CreateList(self, request: lists_pb2.CreateListRequest, call: Call) -> lists_pb2.List:  # type: ignore[override]
        check_parent(call, request.parent)
        conn = await call.begin()
        # Two at once may both find room; one list more does no harm.
        if await store.count_lists(conn, call.app.app_id) >= MOST_LISTS:
            raise ListLimitReached(call.app.name, MOST_LISTS)
        try:
            made = await store.create_list(conn, call.app.app_id, request.list_id, request.list.display_name)
        except AlreadyExists as error:
            raise AlreadyExists(f"{call.app.name}/{error.metadata['resource']}") from error
        return _to_list(call, made, 0)

    async def GetList(self, request: lists_pb2.GetListRequest, call: Call) -> lists_pb2.List:  # type: ignore[override]
        found = await find(call, request.name)
        counts = await store.count_members(await call.begin(), call.app.app_id, [found])
        return _to_list(call, found, counts[found.list_id])

    async def ListLists(  # type: ignore[override]
        self, request: lists_pb2.ListListsRequest, call: Call
    ) -> lists_pb2.ListListsResponse:
        check_parent(call, request.parent)
        size = size_page(request.page_size)
        question = f"{request.parent}/lists"
        before = read_page_token(request.page_token, question, int)
        conn = await call.begin()
        found = await store.list_lists(conn, call.app.app_id, before, size + 1)
        counts = await store.count_members(conn, call.app.app_id, found[:size])
        page = fill_page([_to_list(call, one, counts[one.list_id]) for one in found[:size]])
        return lists_pb2.ListListsResponse(
            lists=page, next_page_token=make_page_token(question, found[len(page) - 1].list_id) if len(found) > len(page) else ""
        )

    async def DeleteList(self, request: lists_pb2.DeleteListRequest, call: Call) -> Empty:  # type: ignore[override]
        found = await find(call, request.name, lock=True)
        conn = await call.begin()
        if campaign := await store.find_waiting_campaign(conn, call.app.app_id, found.list):
            raise ListInUse(request.name, f"{call.app.name}/campaigns/{campaign}")
        await store.delete_list(conn, found)
        return Empty()

    async def AddListContacts(  # type: ignore[override]
        self, request: lists_pb2.AddListContactsRequest, call: Call
    ) -> lists_pb2.AddListContactsResponse:
        found = await find(call, request.name, lock=True)
        addition = _Adding(call)
        external_ids = addition.read(request.contacts)
        addition.count(await store.add_members(await call.begin(), found, external_ids))
        return addition.response

    async def ImportListContacts(  # type: ignore[override]
        self, requests: AsyncIterator[lists_pb2.ImportListContactsRequest], call: Call
    ) -> lists_pb2.AddListContactsResponse:
        addition = _Adding(call)
        name = ""
        async for request in requests:
            name = request.name or name
            if not name:
                raise FieldsInvalid([Violation("name", "is required in the first message")])
            list_id = read_name(call, name, "lists")
            if len(request.contacts) > MOST_CONTACTS:
                raise FieldsInvalid(
                    [Violation("contacts", f"has more than {MOST_CONTACTS} in one message; send several messages")]
                )
            external_ids = addition.read(request.contacts)
            async with transaction(call.engine) as conn:
                found = await store.find_list(conn, call.app.app_id, list_id, lock=True)
                if found is None:
                    raise NotFound(name)
                addition.count(await store.add_members(conn, found, external_ids))
        return addition.response

    async def ExportListContacts(  # type: ignore[override]
        self, request: lists_pb2.ExportListContactsRequest, call: Call
    ) -> AsyncIterator[lists_pb2.ExportListContactsResponse]:
        app_id, name = call.app.app_id, read_name(call, request.name, "lists")
        pages = begin_export(f"{request.name}/contacts", request.resume_token)
        async with snapshot(call.engine) as (conn, as_of_time):
            found = await store.find_list(conn, app_id, name)
            if found is None:
                raise NotFound(request.name)
            sets = await read_sets(conn, app_id, [found.set_name], await count_blocks(conn, app_id))
        respond, people = lists_pb2.ExportListContactsResponse, sets[found.set_name]
        async for response in stream_contacts(call, respond, people, as_of_time, pages):
            yield response

    async def RemoveListContacts(  # type: ignore[override]
        self, request: lists_pb2.RemoveListContactsRequest, call: Call
    ) -> lists_pb2.RemoveListContactsResponse:
        found = await find(call, request.name, lock=True)
        external_ids = [external_id for contact in request.contacts if (external_id := _read_contact(call, contact))]
        removed = await store.remove_members(await call.begin(), found, external_ids)
        return lists_pb2.RemoveListContactsResponse(removed_count=removed)


class _Adding:
    """The answer to what may come in several messages: contacts are counted on, from 0."""

    def __init__(self, call: Call) -> None:
        self.response = lists_pb2.AddListContactsResponse()
        self._call = call
        self._start = 0
        self._given: Sequence[str] = ()
        self._places: list[int] = []

    def read(self, contacts: Sequence[str]) -> list[str]:
        """The external_ids of a message's contacts; those that are none are rejected."""
        self._start += len(self._given)
        self._given = contacts
        self._places = []
        external_ids = []
        for place, contact in enumerate(contacts):
            if external_id := _read_contact(self._call, contact):
                external_ids.append(external_id)
                self._places.append(place)
            else:
                self._reject(
                    place, _Reason.MALFORMED, "is neither an external_id nor a name like apps/{app}/contacts/{external_id}"
                )
        return external_ids

    def count(self, addition: store.Addition) -> None:
        """Take in what became of them."""
        self.response.added_count += addition.added
        self.response.present_count += addition.present
        for place in addition.unknown:
            self._reject(self._places[place], _Reason.CONTACT_UNKNOWN, "no contact of this external_id; import it first")

    def _reject(self, place: int, reason: lists_pb2.AddListContactsResponse.Reason.ValueType, description: str) -> None:
        self.response.rejected_count += 1
        if len(self.response.rejections) < MOST_REJECTIONS:
            self.response.rejections.add(
                index=self._start + place, contact=self._given[place][:200], reason=reason, description=description
            )


async def find(call: Call, name: str, *, field: str = "name", lock: bool = False) -> store.ContactList:
    """The list of this resource name.

    Raises:
        FieldsInvalid, NotFound.
    """
    found = await store.find_list(await call.begin(), call.app.app_id, read_name(call, name, "lists", field), lock=lock)
    if found is None:
        raise NotFound(name)
    return found


def _read_contact(call: Call, contact: str) -> str:
    """The external_id that is meant; empty when nobody can be."""
    if "\0" in contact:
        return ""
    if "/" not in contact:
        return contact
    prefix = f"{call.app.name}/contacts/"
    external_id = contact.removeprefix(prefix)
    return external_id if contact.startswith(prefix) and "/" not in external_id else ""


def _to_list(call: Call, found: store.ContactList, count: int) -> lists_pb2.List:
    return lists_pb2.List(
        name=f"{call.app.name}/lists/{found.list}",
        display_name=found.display_name,
        contact_count=count,
        create_time=to_timestamp(found.create_time),
        update_time=to_timestamp(found.update_time),
    )
