"""The Contacts service."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from urllib.parse import quote, unquote

from google.protobuf import json_format
from google.protobuf.struct_pb2 import Struct
from pydantic import ValidationError

from aftertouch.channels import Address, Channel
from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.ingest.accounts import Accounts
from aftertouch.plugins import Registry
from aftertouch.retargeting.chains import find_chain
from aftertouch.retargeting.explanations import explain_campaign, explain_chain, explain_retarget
from aftertouch.retargeting.history import page_history
from aftertouch.rolls.sql import page_set
from aftertouch.rpc.campaigns import find as find_campaign
from aftertouch.rpc.explanations import to_contact_campaign, to_explanation
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.lists import find as find_list
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.pages import fill_page, make_page_token, read_page_token, size_page
from aftertouch.rpc.selections import read_selection
from aftertouch.rpc.validation import check_message
from aftertouch.rpc.values import TIME_ZONES, to_struct, to_timestamp
from aftertouch.store import contacts as store
from aftertouch.store.engine import transaction
from aftertouch.store.erasures import erase_contact
from aftertouch.store.recipients import find_by_message
from aftertouch.v1 import contacts_pb2, contacts_pb2_grpc

LARGEST_ATTRIBUTES = 16_384
"""Bytes of a contact's attributes as JSON."""
MOST_REJECTIONS = 1_000
"""How many rows of an import are reported one by one."""
SHOWN_CAMPAIGNS, SHOWN_OF_CAMPAIGNS = 20, 200
"""How many campaigns a single contact is shown with, and in how many they are looked for: each to 50,000 people who are
scattered among 10 million takes some 0.1 ms, one to all of them 5 ms."""
MOST_CAMPAIGNS = 1_000
"""In how many a page of a contact's campaigns is looked for."""

_STATES = {"ACTIVE": "active", "OPTED_OUT": "opted_out", "INVALID": "invalid"}


class Contacts(contacts_pb2_grpc.ContactsServicer):
    """The people of the caller's app."""

    def __init__(self, registry: Registry, accounts: Accounts) -> None:
        self._registry = registry
        self._accounts = accounts

    async def ImportContacts(  # type: ignore[override]
        self, requests: AsyncIterator[contacts_pb2.ImportContactsRequest], call: Call
    ) -> contacts_pb2.ImportContactsResponse:
        response = contacts_pb2.ImportContactsResponse()
        index = 0
        parent = ""
        async with transaction(call.engine) as conn:
            channels = await self._accounts.list_ready(conn, call.app)
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
                    good.append(self._read_contact(contact, channels))
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
        channels = await self._accounts.list_ready(await call.begin(), call.app)
        for index, contact in enumerate(request.contacts):
            try:
                good.append(self._read_contact(contact, channels))
            except FieldsInvalid as error:
                violations += [Violation(f"contacts[{index}].{v.field}", v.description) for v in error.violations]
        if violations:
            raise FieldsInvalid(violations)
        created, updated = await store.upsert_contacts(await call.begin(), call.app.app_id, good)
        return contacts_pb2.UpsertContactsResponse(created_count=created, updated_count=updated)

    async def GetContact(self, request: contacts_pb2.GetContactRequest, call: Call) -> contacts_pb2.Contact:  # type: ignore[override]
        contact = await _find(call, request.name)
        message = _to_contact(call, contact)
        page = await page_history(
            *(await call.begin(), call.app.app_id, self._registry.types, contact.number, None),
            size=SHOWN_CAMPAIGNS,
            most_campaigns=SHOWN_OF_CAMPAIGNS,
        )
        message.campaigns.extend(to_contact_campaign(call, participation) for participation in page.participations)
        return message

    async def ListContacts(  # type: ignore[override]
        self, request: contacts_pb2.ListContactsRequest, call: Call
    ) -> contacts_pb2.ListContactsResponse:
        check_parent(call, request.parent)
        size = size_page(request.page_size)
        # Not its bytes: a map, as an address is one, has them in any order.
        question = f"{request.parent}/contacts {json_format.MessageToJson(request.filter, sort_keys=True)}"
        rows = await self._find_page(call, request, question, size + 1)
        numbers = [number for _, number in rows[:size]]
        read = {contact.number: contact for contact in await store.read_contacts(await call.begin(), call.app.app_id, numbers)}
        # Whoever was erased between the two statements is passed over, and ends no list.
        shown = [(position, read[number]) for position, number in rows[:size] if number in read]
        page = fill_page([_to_contact(call, contact) for _, contact in shown])
        if len(page) < len(shown):
            token = make_page_token(question, shown[len(page) - 1][0])
        else:
            token = make_page_token(question, rows[size - 1][0]) if len(rows) > size else ""
        return contacts_pb2.ListContactsResponse(contacts=page, next_page_token=token)

    async def _find_page(
        self, call: Call, request: contacts_pb2.ListContactsRequest, question: str, limit: int
    ) -> list[tuple[int | str, int]]:
        """Contact numbers that the filter wants, each with its position in the list."""
        conn, app_id, wanted = await call.begin(), call.app.app_id, request.filter
        if wanted.WhichOneof("kind") == "external_id_prefix":
            # Percent-encoded, since an external_id may be in any script, and a position is plain letters.
            last = unquote(read_page_token(request.page_token, question, str) or "")
            if "\0" in last:
                raise FieldsInvalid([Violation("page_token", "is not a page token")])
            found = await store.page_prefix(conn, app_id, wanted.external_id_prefix, last, limit)
            return [(quote(external_id, safe=""), number) for external_id, number in found]
        token = read_page_token(request.page_token, question, int)
        after = -1 if token is None else token
        match wanted.WhichOneof("kind"):
            case "address":
                channels = await self._accounts.list_ready(conn, call.app)
                key = self._read_address(wanted.address.channel, wanted.address.address, "filter.address", channels).key
                numbers = await store.page_address(conn, app_id, wanted.address.channel, store.hash_address(key), after, limit)
            case "standing":
                self._check_channel(wanted.standing.channel, "filter.standing.channel")
                standing = _STATES[contacts_pb2.Subscription.State.Name(wanted.standing.state)]
                name = store.standing_set(standing, wanted.standing.channel)
                numbers = (await page_set(conn, app_id, name, after, limit)).tolist()
            case "list":
                members = await find_list(call, wanted.list, field="filter.list")
                numbers = (await page_set(conn, app_id, members.set_name, after, limit)).tolist()
            case "message_id":
                named = await find_by_message(conn, app_id, wanted.message_id)
                numbers = [number for number in named if number > after][:limit]
            case _:
                numbers = await store.page_contacts(conn, app_id, after, limit)
        return [(number, number) for number in numbers]

    async def ListContactCampaigns(  # type: ignore[override]
        self, request: contacts_pb2.ListContactCampaignsRequest, call: Call
    ) -> contacts_pb2.ListContactCampaignsResponse:
        contact = await _find(call, request.parent, field="parent")
        question = f"{request.parent}/campaigns of a contact"
        page = await page_history(
            *(await call.begin(), call.app.app_id, self._registry.types, contact.number),
            read_page_token(request.page_token, question, int),
            size=size_page(request.page_size),
            most_campaigns=MOST_CAMPAIGNS,
        )
        return contacts_pb2.ListContactCampaignsResponse(
            campaigns=[to_contact_campaign(call, participation) for participation in page.participations],
            next_page_token="" if page.before is None else make_page_token(question, page.before),
        )

    async def ExplainContact(  # type: ignore[override]
        self, request: contacts_pb2.ExplainContactRequest, call: Call
    ) -> contacts_pb2.ContactExplanation:
        contact = await _find(call, request.name)
        conn = await call.begin()
        now = datetime.now(UTC)
        if request.WhichOneof("question") == "chain":
            chain = await find_chain(conn, call.app, await find_campaign(call, request.chain, field="chain"))
            explanations = [
                to_explanation(call, request.name, explained, now)
                for explained in await explain_chain(conn, call.app, self._registry.types, chain, contact)
            ]
            answer, waves = explanations[0], explanations[1:]
            answer.waves.extend(waves)
            return answer
        if request.WhichOneof("question") == "campaign":
            campaign = await find_campaign(call, request.campaign, field="campaign")
            explained = await explain_campaign(conn, call.app, self._registry.types, campaign, contact)
        else:
            self._check_channel(request.retarget.channel, "retarget.channel")
            selection = read_selection(call, request.retarget.selection, "retarget.selection")
            explained = await explain_retarget(conn, call.app, self._registry.types, selection, request.retarget.channel, contact)
        return to_explanation(call, request.name, explained, now)

    async def EraseContact(  # type: ignore[override]
        self, request: contacts_pb2.EraseContactRequest, call: Call
    ) -> contacts_pb2.EraseContactResponse:
        external_id = read_name(call, request.name, "contacts")
        erased = await erase_contact(await call.begin(), call.app.app_id, external_id)
        if erased is None:
            raise NotFound(request.name)
        return contacts_pb2.EraseContactResponse(
            erase_time=to_timestamp(erased.erase_time),
            subscription_count=erased.subscriptions,
            list_count=erased.lists,
            audience_count=erased.audiences,
            attempt_count=erased.attempts,
            unrecognized_receipt_count=erased.unrecognized,
        )

    def _read_contact(self, contact: contacts_pb2.Contact, channels: Mapping[str, Channel]) -> store.Contact:
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
            try:
                subscriptions.append(self._read_subscription(subscription, f"subscriptions[{index}]", channels))
            except FieldsInvalid as error:
                violations += error.violations
        if violations:
            raise FieldsInvalid(violations)
        return store.Contact(contact.external_id, attributes, contact.time_zone, tuple(subscriptions))

    def _read_subscription(
        self, subscription: contacts_pb2.Subscription, path: str, channels: Mapping[str, Channel]
    ) -> store.Subscription:
        address = self._read_address(subscription.channel, subscription.address, path, channels)
        state = contacts_pb2.Subscription.State.Name(subscription.state)
        return store.Subscription(subscription.channel, address.model_dump(mode="json"), address.key, _STATES.get(state))

    def _read_address(self, channel: str, address: Struct, path: str, channels: Mapping[str, Channel]) -> Address:
        """An address as its channel reads it.

        Raises:
            FieldsInvalid: with paths below ``path``.
        """
        self._check_channel(channel, f"{path}.channel")
        if channel not in channels:
            raise FieldsInvalid(
                [Violation(f"{path}.channel", f"{channel} is not configured, so its addresses cannot be checked")]
            )
        try:
            return channels[channel].parse_address(json_format.MessageToDict(address))
        except ValidationError as error:
            raise FieldsInvalid(
                Violation(".".join([f"{path}.address", *map(str, fault["loc"])]), fault["msg"])
                for fault in error.errors(include_url=False, include_context=False, include_input=False)
            ) from error

    def _check_channel(self, channel: str, path: str) -> None:
        if channel not in self._registry.types:
            known = ", ".join(sorted(self._registry.types))
            raise FieldsInvalid([Violation(path, f"no channel {channel!r} is installed; there are {known}")])


async def _find(call: Call, name: str, *, field: str = "name") -> store.Contact:
    """The contact of this resource name.

    Raises:
        FieldsInvalid, NotFound.
    """
    conn = await call.begin()
    numbers = await store.find_numbers(conn, call.app.app_id, [read_name(call, name, "contacts", field)])
    found = await store.read_contacts(conn, call.app.app_id, list(numbers.values()))
    if not found:
        raise NotFound(name)
    return found[0]


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
