"""The Contacts service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from google.protobuf import json_format
from pydantic import ValidationError

from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.plugins import Registry
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.pages import fill_page, make_page_token, read_page_token, size_page
from aftertouch.rpc.validation import check_message
from aftertouch.rpc.values import TIME_ZONES, to_struct, to_timestamp
from aftertouch.store import contacts as store
from aftertouch.store.engine import transaction
from aftertouch.v1 import contacts_pb2, contacts_pb2_grpc

LARGEST_ATTRIBUTES = 16_384
"""Bytes of a contact's attributes as JSON."""
MOST_REJECTIONS = 1_000
"""How many rows of an import are reported one by one."""

_STATES = {"ACTIVE": "active", "OPTED_OUT": "opted_out", "INVALID": "invalid"}


class Contacts(contacts_pb2_grpc.ContactsServicer):
    """The people of the caller's app."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ImportContacts(  # type: ignore[override]
        self, requests: AsyncIterator[contacts_pb2.ImportContactsRequest], call: Call
    ) -> contacts_pb2.ImportContactsResponse:
        response = contacts_pb2.ImportContactsResponse()
        index = 0
        parent = ""
        async for request in requests:
            parent = request.parent or parent
            if not parent:
                raise FieldsInvalid([Violation("parent", "is required in the first message")])
            check_parent(call, parent)
            if len(request.contacts) > 1000:
                raise FieldsInvalid([Violation("contacts", "has more than 1,000 in one message; send several messages")])
            good = []
            for contact in request.contacts:
                try:
                    good.append(self._read_contact(contact))
                except FieldsInvalid as error:
                    response.rejected_count += 1
                    if len(response.rejections) < MOST_REJECTIONS:
                        violation = error.violations[0]
                        response.rejections.add(
                            index=index,
                            external_id=contact.external_id[:200],
                            field=violation.field,
                            description=violation.description,
                        )
                index += 1
            if good:
                async with transaction(call.engine) as conn:
                    created, updated = await store.upsert_contacts(conn, call.app.app_id, good)
                response.created_count += created
                response.updated_count += updated
        return response

    async def UpsertContacts(  # type: ignore[override]
        self, request: contacts_pb2.UpsertContactsRequest, call: Call
    ) -> contacts_pb2.UpsertContactsResponse:
        check_parent(call, request.parent)
        good, violations = [], []
        for index, contact in enumerate(request.contacts):
            try:
                good.append(self._read_contact(contact))
            except FieldsInvalid as error:
                violations += [Violation(f"contacts[{index}].{v.field}", v.description) for v in error.violations]
        if violations:
            raise FieldsInvalid(violations)
        created, updated = await store.upsert_contacts(await call.begin(), call.app.app_id, good)
        return contacts_pb2.UpsertContactsResponse(created_count=created, updated_count=updated)

    async def GetContact(self, request: contacts_pb2.GetContactRequest, call: Call) -> contacts_pb2.Contact:  # type: ignore[override]
        external_id = read_name(call, request.name, "contacts")
        conn = await call.begin()
        numbers = await store.find_numbers(conn, call.app.app_id, [external_id])
        found = await store.read_contacts(conn, call.app.app_id, list(numbers.values()))
        if not found:
            raise NotFound(request.name)
        return _to_contact(call, found[0])

    async def ListContacts(  # type: ignore[override]
        self, request: contacts_pb2.ListContactsRequest, call: Call
    ) -> contacts_pb2.ListContactsResponse:
        check_parent(call, request.parent)
        size = size_page(request.page_size)
        question = f"{request.parent}/contacts"
        after = read_page_token(request.page_token, question, int)
        found = await store.list_contacts(await call.begin(), call.app.app_id, -1 if after is None else after, size + 1)
        page = fill_page([_to_contact(call, contact) for contact in found[:size]])
        return contacts_pb2.ListContactsResponse(
            contacts=page,
            next_page_token=make_page_token(question, found[len(page) - 1].number) if len(found) > len(page) else "",
        )

    def _read_contact(self, contact: contacts_pb2.Contact) -> store.Contact:
        """The contact as it is stored.

        Raises:
            FieldsInvalid: with paths relative to the contact.
        """
        check_message(contact)
        violations: list[Violation] = []
        attributes = json_format.MessageToDict(contact.attributes)
        if len(json.dumps(attributes)) > LARGEST_ATTRIBUTES:
            violations.append(Violation("attributes", f"are larger than {LARGEST_ATTRIBUTES} bytes as JSON"))
        if contact.time_zone and contact.time_zone not in TIME_ZONES:
            violations.append(Violation("time_zone", f"{contact.time_zone!r} is not an IANA time zone like Europe/Madrid"))
        subscriptions = []
        for index, subscription in enumerate(contact.subscriptions):
            read = self._read_subscription(subscription, f"subscriptions[{index}]")
            if isinstance(read, list):
                violations += read
            else:
                subscriptions.append(read)
        if violations:
            raise FieldsInvalid(violations)
        return store.Contact(contact.external_id, attributes, contact.time_zone, tuple(subscriptions))

    def _read_subscription(self, subscription: contacts_pb2.Subscription, path: str) -> store.Subscription | list[Violation]:
        name = subscription.channel
        if name not in self._registry.types:
            known = ", ".join(sorted(self._registry.types))
            return [Violation(f"{path}.channel", f"no channel {name!r} is installed; there are {known}")]
        if name not in self._registry.channels:
            return [Violation(f"{path}.channel", f"{name} is not configured, so its addresses cannot be checked")]
        try:
            address = self._registry.channels[name].parse_address(json_format.MessageToDict(subscription.address))
        except ValidationError as error:
            return [
                Violation(".".join([f"{path}.address", *map(str, fault["loc"])]), fault["msg"])
                for fault in error.errors(include_url=False, include_context=False, include_input=False)
            ]
        state = contacts_pb2.Subscription.State.Name(subscription.state)
        return store.Subscription(name, address.model_dump(mode="json"), address.key, _STATES.get(state))


def _to_contact(call: Call, contact: store.Contact) -> contacts_pb2.Contact:
    message = contacts_pb2.Contact(
        name=f"{call.app.name}/contacts/{contact.external_id}",
        external_id=contact.external_id,
        attributes=to_struct(contact.attributes),
        time_zone=contact.time_zone,
        create_time=to_timestamp(contact.create_time),
        update_time=to_timestamp(contact.update_time),
    )
    for subscription in contact.subscriptions:
        message.subscriptions.add(
            channel=subscription.channel,
            address=to_struct(subscription.address),
            state=contacts_pb2.Subscription.State.Value((subscription.state or "active").upper()),
            reason=subscription.reason,
            update_time=to_timestamp(subscription.update_time),
        )
    return message
