"""Contacts: what is taken, what is left out and why, and that a repeat changes nothing."""

from __future__ import annotations

import asyncio
import csv
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aftertouch.cli import CommandFailed, app
from aftertouch.contact_files import RowError, read_contacts
from aftertouch.processes import ProcessFailed, run_command
from aftertouch.rpc.values import to_struct
from aftertouch.v1 import campaigns_pb2, contacts_pb2
from tests.fix_world import World
from tests.refusals import refuse

State = contacts_pb2.Subscription.State
_numbers = itertools.count(10_000_000)


def new_phone() -> str:
    return f"+346{next(_numbers)}"


def write_contact(
    external_id: str, attributes: dict[str, Any] | None = None, *subscriptions: tuple[str, dict[str, Any], int], **fields: Any
) -> contacts_pb2.Contact:
    contact = contacts_pb2.Contact(external_id=external_id, **fields)
    if attributes is not None:
        contact.attributes.CopyFrom(to_struct(attributes))
    for channel, address, state in subscriptions:
        contact.subscriptions.add(channel=channel, address=to_struct(address), state=state)
    return contact


async def upsert(world: World, *contacts: contacts_pb2.Contact) -> contacts_pb2.UpsertContactsResponse:
    request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=contacts)
    return await world.client.contacts.UpsertContacts(request)


async def get(world: World, external_id: str) -> contacts_pb2.Contact:
    request = contacts_pb2.GetContactRequest(name=world.client.name("contacts", external_id))
    return await world.client.contacts.GetContact(request)


async def import_all(world: World, contacts: Iterable[contacts_pb2.Contact]) -> contacts_pb2.ImportContactsResponse:
    return await world.client.import_contacts(contacts)


def read_attributes(contact: contacts_pb2.Contact) -> dict[str, Any]:
    return dict(contact.attributes.items())


async def count_reachable(world: World, *external_ids: str) -> int:
    """How many of these an sms campaign would reach: what the contact sets say, which no contact shows."""
    names = [world.client.name("contacts", external_id) for external_id in external_ids]
    given = campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=names))
    draft = await world.create_campaign("sms", given)
    checked = campaigns_pb2.LaunchCampaignRequest(name=draft.name, validate_only=True)
    try:
        return int((await world.client.campaigns.LaunchCampaign(checked)).counts.recipients)
    except Exception:
        assert (await refuse(world.client.campaigns.LaunchCampaign(checked))).reason == "AUDIENCE_EMPTY"
        return 0


# Upserts


async def test_upsert_makes_then_updates(shared_world: World) -> None:
    contact = write_contact("ada", {"first_name": "Ada"}, time_zone="Europe/London")
    first = await upsert(shared_world, contact)
    made = await get(shared_world, "ada")
    second = await upsert(shared_world, contact)
    again = await get(shared_world, "ada")
    assert (first.created_count, first.updated_count, second.created_count, second.updated_count) == (1, 0, 0, 1)
    assert (made.name, made.external_id, made.time_zone) == ("apps/acme/contacts/ada", "ada", "Europe/London")
    again.update_time.CopyFrom(made.update_time)
    assert again == made


async def test_upsert_takes_all_or_none(shared_world: World) -> None:
    good, bad = write_contact("whole-1"), write_contact("whole-2", None, ("sms", {"phone": "12"}, 0))
    worse = write_contact("", {"x": 1}, ("fax", {}, 0), time_zone="Mars/Olympus")
    odd = write_contact("whole-4", None, ("fax", {"n": 1}, 0), ("sms", {}, 0), time_zone="Mars/Olympus")
    refusal = await refuse(upsert(shared_world, good, bad, odd))
    assert list(refusal.fields) == [
        "contacts[1].subscriptions[0].address.phone",
        "contacts[2].time_zone",
        "contacts[2].subscriptions[0].channel",
        "contacts[2].subscriptions[1].address.phone",
    ]
    assert "contacts[0].external_id" in (await refuse(upsert(shared_world, worse))).fields
    assert (await refuse(get(shared_world, "whole-1"))).reason == "RESOURCE_NOT_FOUND"


async def test_upsert_merges_attributes_and_null_removes(shared_world: World) -> None:
    await upsert(shared_world, write_contact("merge", {"a": 1, "b": {"c": [1, "x"]}, "d": True, "gone": "soon"}, time_zone="UTC"))
    await upsert(shared_world, write_contact("merge", {"a": "two", "e": 1.5, "gone": None, "never": None}))
    contact = await get(shared_world, "merge")
    assert contact.attributes == to_struct({"a": "two", "b": {"c": [1, "x"]}, "d": True, "e": 1.5})
    assert contact.time_zone == "UTC"
    await upsert(shared_world, write_contact("merge"))
    assert (await get(shared_world, "merge")).attributes == contact.attributes


async def test_upsert_of_a_new_contact_stores_no_null(shared_world: World) -> None:
    await upsert(shared_world, write_contact("nulls", {"a": None, "b": 1}))
    assert read_attributes(await get(shared_world, "nulls")) == {"b": 1}


async def test_upsert_keeps_and_adds_subscriptions(shared_world: World) -> None:
    first, second = new_phone(), new_phone()
    await upsert(shared_world, write_contact("phones", None, ("sms", {"phone": first}, 0)))
    await upsert(shared_world, write_contact("phones", None, ("sms", {"phone": second}, 0), ("whatsapp", {"phone": first}, 0)))
    await upsert(shared_world, write_contact("phones", {"x": 1}))
    contact = await get(shared_world, "phones")
    assert sorted((s.channel, s.address["phone"], s.state) for s in contact.subscriptions) == [
        ("sms", first, State.ACTIVE),
        ("sms", second, State.ACTIVE),
        ("whatsapp", first, State.ACTIVE),
    ]


async def test_upsert_keeps_opted_out_unless_it_is_stated(shared_world: World) -> None:
    address = {"phone": new_phone()}
    for stated, expected in [
        (State.STATE_UNSPECIFIED, State.ACTIVE),
        (State.OPTED_OUT, State.OPTED_OUT),
        (State.STATE_UNSPECIFIED, State.OPTED_OUT),
        (State.ACTIVE, State.ACTIVE),
        (State.INVALID, State.INVALID),
        (State.STATE_UNSPECIFIED, State.INVALID),
        (State.ACTIVE, State.ACTIVE),
    ]:
        await upsert(shared_world, write_contact("stop", None, ("sms", address, stated)))
        (subscription,) = (await get(shared_world, "stop")).subscriptions
        assert subscription.state == expected
        assert await count_reachable(shared_world, "stop") == (expected == State.ACTIVE)


async def test_upsert_finds_an_address_however_it_is_written(shared_world: World) -> None:
    await upsert(shared_world, write_contact("forms", None, ("sms", {"phone": "+34 612 34 56 78"}, State.OPTED_OUT)))
    await upsert(shared_world, write_contact("forms", None, ("sms", {"phone": "+34612345678"}, 0)))
    (subscription,) = (await get(shared_world, "forms")).subscriptions
    assert (subscription.address["phone"], subscription.state) == ("+34612345678", State.OPTED_OUT)


async def test_upsert_with_one_active_address_of_several_is_reachable(shared_world: World) -> None:
    first, second = {"phone": new_phone()}, {"phone": new_phone()}
    await upsert(shared_world, write_contact("two", None, ("sms", first, State.OPTED_OUT), ("sms", second, State.ACTIVE)))
    assert await count_reachable(shared_world, "two") == 1
    await upsert(shared_world, write_contact("two", None, ("sms", second, State.INVALID)))
    assert await count_reachable(shared_world, "two") == 0


async def test_upsert_with_one_id_twice_is_as_one_after_the_other(shared_world: World) -> None:
    first, second = {"phone": new_phone()}, {"phone": new_phone()}
    answer = await upsert(
        shared_world,
        write_contact("twice", {"a": 1, "b": 1}, ("sms", first, State.OPTED_OUT), time_zone="UTC"),
        write_contact("twice", {"b": 2, "a": None}, ("sms", second, 0), ("sms", first, 0)),
    )
    contact = await get(shared_world, "twice")
    assert (answer.created_count, answer.updated_count) == (1, 1)
    assert (read_attributes(contact), contact.time_zone) == ({"b": 2}, "UTC")
    assert {s.address["phone"]: s.state for s in contact.subscriptions} == {
        first["phone"]: State.OPTED_OUT,
        second["phone"]: State.ACTIVE,
    }


async def test_upserts_at_once_neither_fail_nor_lose_anything(shared_world: World) -> None:
    phones = [{"phone": new_phone()} for _ in range(12)]
    calls = [
        upsert(shared_world, *(write_contact(f"crowd-{i}", {f"k{n}": n}, ("sms", phone, 0)) for i in order))
        for n, phone in enumerate(phones)
        for order in [range(20) if n % 2 else range(19, -1, -1)]
    ]
    answers = await asyncio.gather(*calls)
    assert sum(answer.created_count for answer in answers) == 20
    for i in range(20):
        contact = await get(shared_world, f"crowd-{i}")
        assert (len(contact.subscriptions), len(contact.attributes)) == (12, 12)
    assert await count_reachable(shared_world, *(f"crowd-{i}" for i in range(20))) == 20


GOOD_IDS = [
    "0",
    "Ünïcödé",
    "美咲",
    "🙂" * 200,
    "a b",
    "a\xa0b",
    "a\u3000b",
    "a%2Fb",
    "a@b.example",
    "..",
    "-",
    "'; drop table contacts; --",
    "x" * 200,
]
BAD_IDS = ["", " ", " a", "a ", "a/b", "/", "a\tb", "a\nb", "\x7f", "a\0b", "x" * 201]
BAD_IDS += ["\xa0", "\xa0a", "a\xa0", "a\u2003", "\u3000a", "a\u2028", "\x80", "a\x85b", "\x9fa", "a\x9b"]
"""Blanks that are not ASCII's, and the control characters from U+0080 to U+009F."""


@pytest.mark.parametrize("external_id", GOOD_IDS, ids=range(len(GOOD_IDS)))
async def test_external_id_is_kept_as_it_is(shared_world: World, external_id: str) -> None:
    await upsert(shared_world, write_contact(external_id))
    assert (await get(shared_world, external_id)).external_id == external_id


@pytest.mark.parametrize("external_id", BAD_IDS, ids=range(len(BAD_IDS)))
async def test_external_id_of_another_form_is_refused(shared_world: World, external_id: str) -> None:
    assert list((await refuse(upsert(shared_world, write_contact(external_id)))).fields) == ["contacts[0].external_id"]


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ("+34612345678", "+34612345678"),
        ("+34 612-345-678", "+34612345678"),
        ("+34 (612) 345678", "+34612345678"),
        ("tel:+34612345678", "+34612345678"),
        ("+1 650 253 0000", "+16502530000"),
    ],
)
async def test_phone_is_stored_as_e164(shared_world: World, given: str, stored: str) -> None:
    await upsert(shared_world, write_contact("e164-" + given[:3] + str(len(given)), None, ("sms", {"phone": given}, 0)))
    contact = await get(shared_world, "e164-" + given[:3] + str(len(given)))
    assert [s.address["phone"] for s in contact.subscriptions] == [stored]


@pytest.mark.parametrize(
    "phone",
    ["", "612345678", "+", "+34", "+999612345678", "+34612", "+3461234567890123", "phone", "+34612345678;ext=x", None, 5, {}],
)
async def test_phone_that_is_none_is_refused(shared_world: World, phone: Any) -> None:
    refusal = await refuse(upsert(shared_world, write_contact("bad-phone", None, ("sms", {"phone": phone}, 0))))
    assert list(refusal.fields) == ["contacts[0].subscriptions[0].address.phone"]


POINT = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
SECRET = "BTBZMqHH6r4Tts7J_aSIgg"


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"p256dh": POINT}, "keys.auth"),
        ({"p256dh": POINT, "auth": SECRET[:-2]}, "keys.auth"),
        ({"p256dh": POINT, "auth": "!" * 22}, "keys.auth"),
        ({"p256dh": POINT[:-1], "auth": SECRET}, "keys.p256dh"),
        ({"p256dh": POINT[:-4] + "AAAA", "auth": SECRET}, "keys.p256dh"),
        ({"p256dh": "", "auth": SECRET}, "keys.p256dh"),
        ({"p256dh": POINT, "auth": SECRET, "more": 1}, "keys.more"),
        ({}, "keys.p256dh"),
        (None, "keys"),
    ],
)
async def test_push_keys_that_cannot_encrypt_are_refused(shared_world: World, keys: Any, field: str) -> None:
    address = {"endpoint": "https://fcm.googleapis.com/fcm/send/x", "keys": keys}
    refusal = await refuse(upsert(shared_world, write_contact("bad-push", None, ("push", address, 0))))
    assert f"contacts[0].subscriptions[0].address.{field}" in refusal.fields
    assert POINT not in str(refusal)


async def test_too_much_in_one_contact_is_refused(shared_world: World) -> None:
    huge = write_contact("huge", {"x": "y" * 16_384})
    many = write_contact("many", None, *(("sms", {"phone": new_phone()}, 0) for _ in range(21)))
    assert list((await refuse(upsert(shared_world, huge))).fields) == ["contacts[0].attributes"]
    assert list((await refuse(upsert(shared_world, many))).fields) == ["contacts[0].subscriptions"]
    crowd = [write_contact(f"c{i}") for i in range(1001)]
    assert list((await refuse(upsert(shared_world, *crowd))).fields) == ["contacts"]
    assert list((await refuse(upsert(shared_world))).fields) == ["contacts"]


async def test_attributes_keep_every_kind_of_json(shared_world: World) -> None:
    values = {"text": 'a"b\\ü\u2028', "zero": 0, "big": 1e300, "small": -1.5, "list": [None, [], {}], "": "unnamed", "yes": True}
    await upsert(shared_world, write_contact("json", values))
    assert (await get(shared_world, "json")).attributes == to_struct(values)


async def test_output_only_fields_are_passed_over(shared_world: World) -> None:
    contact = write_contact("output", None, ("sms", {"phone": new_phone()}, 0), name="apps/other/contacts/x")
    contact.create_time.FromSeconds(1)
    contact.subscriptions[0].reason = "forged/1"
    await upsert(shared_world, contact)
    stored = await get(shared_world, "output")
    assert stored.name == "apps/acme/contacts/output"
    assert stored.create_time.seconds > 1
    assert stored.subscriptions[0].reason == ""


# Imports


async def test_import_leaves_out_rows_and_says_which(shared_world: World) -> None:
    rows = [write_contact(f"row-{i}", {"i": i}, ("sms", {"phone": new_phone()}, 0)) for i in range(1200)]
    rows[3] = write_contact("row-3", None, ("sms", {"phone": "nonsense"}, 0))
    rows[700] = write_contact("", {"i": 700})
    rows[1199] = write_contact("row-1199", None, ("fax", {"n": 1}, 0))
    answer = await import_all(shared_world, rows)
    assert (answer.created_count, answer.updated_count, answer.rejected_count) == (1197, 0, 3)
    assert [(r.index, r.external_id, r.field) for r in answer.rejections] == [
        (3, "row-3", "subscriptions[0].address.phone"),
        (700, "", "external_id"),
        (1199, "row-1199", "subscriptions[0].channel"),
    ]
    assert "nonsense" not in answer.rejections[0].description
    assert (await refuse(get(shared_world, "row-3"))).reason == "RESOURCE_NOT_FOUND"
    assert read_attributes(await get(shared_world, "row-701")) == {"i": 701}


async def test_import_again_changes_nothing(shared_world: World) -> None:
    rows = [write_contact(f"again-{i}", {"i": i}, ("sms", {"phone": new_phone()}, 0)) for i in range(50)]
    first = await import_all(shared_world, rows)
    before = [await get(shared_world, f"again-{i}") for i in range(50)]
    second = await import_all(shared_world, rows)
    after = [await get(shared_world, f"again-{i}") for i in range(50)]
    assert (first.created_count, second.created_count, second.updated_count) == (50, 0, 50)
    for earlier, later in zip(before, after, strict=True):
        later.update_time.CopyFrom(earlier.update_time)
        assert later == earlier


async def test_import_reports_the_first_thousand_rejections(shared_world: World) -> None:
    answer = await import_all(shared_world, (write_contact("") for _ in range(1100)))
    assert (answer.rejected_count, len(answer.rejections)) == (1100, 1000)


async def test_import_of_nothing_is_no_error(shared_world: World) -> None:
    answer = await import_all(shared_world, [])
    assert (answer.created_count, answer.updated_count, answer.rejected_count) == (0, 0, 0)
    assert await shared_world.client.contacts.ImportContacts(iter([])) == contacts_pb2.ImportContactsResponse()


async def test_import_needs_its_parent_first_and_the_same_one(shared_world: World) -> None:
    request = contacts_pb2.ImportContactsRequest
    for parents, reason in [
        ([""], "FIELDS_INVALID"),
        (["apps/acme", "apps/other"], "RESOURCE_NOT_FOUND"),
        (["acme"], "FIELDS_INVALID"),
    ]:
        messages = [request(parent=parent, contacts=[write_contact("parented")]) for parent in parents]
        assert (await refuse(shared_world.client.contacts.ImportContacts(iter(messages)))).reason == reason
    messages = [request(parent="apps/acme"), request(contacts=[write_contact("parentless")])]
    assert (await shared_world.client.contacts.ImportContacts(iter(messages))).created_count == 1


async def test_import_broken_off_keeps_what_was_stored(shared_world: World) -> None:
    request = contacts_pb2.ImportContactsRequest
    messages = [
        request(parent="apps/acme", contacts=[write_contact("kept")]),
        request(contacts=[write_contact(f"too-many-{i}") for i in range(1001)]),
    ]
    assert list((await refuse(shared_world.client.contacts.ImportContacts(iter(messages)))).fields) == ["contacts"]
    assert (await get(shared_world, "kept")).external_id == "kept"


# Pages


async def test_list_goes_through_all_in_the_order_they_were_made(shared_world: World) -> None:
    async with shared_world.connect("paged", await shared_world.create_key("paged", "manage")) as client:
        contacts = [contacts_pb2.Contact(external_id=f"p{i}") for i in range(57)]
        await client.import_contacts(contacts)
        for size in (1, 10, 19, 56, 57, 58, 0, 100_000):
            seen, token = [], ""
            while True:
                page = await client.contacts.ListContacts(
                    contacts_pb2.ListContactsRequest(parent=client.parent, page_size=size, page_token=token)
                )
                assert len(page.contacts) <= (size or 50)
                seen += [contact.external_id for contact in page.contacts]
                token = page.next_page_token
                if not token:
                    break
            assert seen == [f"p{i}" for i in range(57)], size


async def test_list_of_an_empty_app_is_empty(shared_world: World) -> None:
    async with shared_world.connect("empty", await shared_world.create_key("empty", "manage")) as client:
        page = await client.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent=client.parent))
    assert page == contacts_pb2.ListContactsResponse()


async def test_page_token_of_another_list_is_refused(shared_world: World) -> None:
    client = shared_world.client
    page = await client.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent=client.parent, page_size=1))
    misused = campaigns_pb2.ListCampaignsRequest(parent=client.parent, page_token=page.next_page_token)
    assert list((await refuse(client.campaigns.ListCampaigns(misused))).fields) == ["page_token"]
    async with shared_world.connect("elsewhere", await shared_world.create_key("elsewhere", "manage")) as other:
        request = contacts_pb2.ListContactsRequest(parent=other.parent, page_token=page.next_page_token)
        assert list((await refuse(other.contacts.ListContacts(request))).fields) == ["page_token"]


async def test_page_of_large_contacts_fits_into_an_answer(shared_world: World) -> None:
    """gRPC's clients take 4 MB; 300 contacts of 15 kB are more."""
    async with shared_world.connect("large", await shared_world.create_key("large", "manage")) as client:
        large = (write_contact(f"l{i}", {"x": "y" * 15_000}) for i in range(300))
        for batch in (list(itertools.islice(large, 150)), list(large)):
            await client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=batch))
        request = contacts_pb2.ListContactsRequest(parent=client.parent, page_size=1000)
        first = await client.contacts.ListContacts(request)
        request.page_token = first.next_page_token
        second = await client.contacts.ListContacts(request)
    assert [contact.external_id for contact in (*first.contacts, *second.contacts)] == [f"l{i}" for i in range(300)]
    assert second.next_page_token == ""


async def test_page_size_below_zero_is_refused(shared_world: World) -> None:
    request = contacts_pb2.ListContactsRequest(parent="apps/acme", page_size=-1)
    assert list((await refuse(shared_world.client.contacts.ListContacts(request))).fields) == ["page_size"]


# The command


async def run_import(world: World, file: Path, app: str, key: str) -> str:
    return await run_command(
        *("contacts", "import", str(file), "--app", app, "--address", world.addresses.grpc),
        environment={"AFTERTOUCH_API_KEY": key},
    )


async def test_command_imports_a_file_with_a_byte_order_mark(shared_world: World, tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_bytes(
        '\ufeffexternal_id,first_name,sms.phone,time_zone\r\ncsv-1,"Zoë, ""Z""",+34612345678,UTC\r\ncsv-2,,,\r\n'.encode()
    )
    assert "2 made, 0 updated, 0 rejected" in await run_import(shared_world, file, "acme", shared_world.secret)
    assert "0 made, 2 updated, 0 rejected" in await run_import(shared_world, file, "acme", shared_world.secret)
    first, second = await get(shared_world, "csv-1"), await get(shared_world, "csv-2")
    assert (first.attributes["first_name"], first.time_zone, len(first.subscriptions)) == ('Zoë, "Z"', "UTC", 1)
    assert (len(second.attributes), len(second.subscriptions)) == (0, 0)


async def test_command_names_the_rows_it_left_out(shared_world: World, tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_text("external_id,sms.phone\ncsv-3,+34612345678\ncsv-4,nonsense\n,+34612345678\n")
    with pytest.raises(ProcessFailed) as failed:
        await run_import(shared_world, file, "acme", shared_world.secret)
    assert "row 2 (csv-4): subscriptions[0].address.phone: " in str(failed.value)
    assert "row 3 (no external_id): external_id: " in str(failed.value)
    assert "2 rows were rejected; any others are stored" in str(failed.value)
    assert "Traceback" not in str(failed.value)
    assert (await get(shared_world, "csv-3")).external_id == "csv-3"


async def test_command_rejects_a_row_with_more_cells_than_the_header(shared_world: World, tmp_path: Path) -> None:
    """Its comma may have split any cell, so none of it can be trusted; and it moves no other row's place."""
    file = tmp_path / "people.csv"
    rows = ["more-1,Ada", "more-2,Bob,Ross", "more-3,Cy", ",Di", "more-5,E,F,", "more-6,Fay,", "/,G", 'more-8,"H, I"', "more-9"]
    file.write_text("\n".join(["external_id,first_name", *rows, "", "more-11,K"]))
    with pytest.raises(ProcessFailed) as failed:
        await run_import(shared_world, file, "acme", shared_world.secret)
    told = str(failed.value)
    for row, name, text in [
        (2, "more-2", "has more cells than the header"),
        (4, "no external_id", "external_id: is required"),
        (5, "more-5", "has more cells than the header"),
        (6, "more-6", "has more cells than the header"),
        (7, "/", "external_id: "),
    ]:
        assert f"row {row} ({name}): {text}" in told
    assert "5 rows were rejected; any others are stored" in told
    assert read_attributes(await get(shared_world, "more-8")) == {"first_name": "H, I"}
    assert read_attributes(await get(shared_world, "more-11")) == {"first_name": "K"}
    assert (await refuse(get(shared_world, "more-2"))).reason == "RESOURCE_NOT_FOUND"


async def test_rows_with_more_cells_are_never_dropped_silently() -> None:
    rows = list(csv.DictReader(["external_id,x", "a,1", "b,1,2"]))
    with pytest.raises(RowError, match="row 2 has more cells than the header"):
        _ = [contact async for contact in read_contacts(rows)]


FAULTY_FILES = {
    "no header": (b"", "no column external_id"),
    "another header": (b"id,name\n1,x\n", "no column external_id"),
    "not UTF-8": (b"external_id,name\n1,Zo\xeb\n", "not a CSV file in UTF-8"),
    "a cell too large": (b'external_id,name\n1,"' + b"x" * 200_000 + b'"\n', "not a CSV file in UTF-8"),
    "a column twice": (b"external_id,sms.phone,sms.phone\n1,2,3\n", "is there twice"),
    "a column inside another": (b"external_id,sms.phone,sms.phone.x\n1,2,3\n", "is the beginning of another one"),
    "a column without a name": (b"external_id,,x\n1,2,3\n", "has no name"),
}


@pytest.mark.parametrize(("content", "complaint"), FAULTY_FILES.values(), ids=FAULTY_FILES.keys())
def test_command_says_what_is_wrong_with_a_file(tmp_path: Path, content: bytes, complaint: str) -> None:
    """Before it connects: nothing listens there."""
    file = tmp_path / "people.csv"
    file.write_bytes(content)
    arguments = ["contacts", "import", str(file), "--app", "acme", "--key", "x", "--address", "127.0.0.1:1"]
    with pytest.raises(CommandFailed, match=complaint):
        CliRunner().invoke(app, arguments, catch_exceptions=False)


async def test_command_says_what_is_wrong_with_a_call(shared_world: World, tmp_path: Path) -> None:
    file = tmp_path / "people.csv"
    file.write_text("external_id\nx\n")
    for path, owner, key, complaint in [
        (tmp_path / "missing.csv", "acme", shared_world.secret, "does not exist"),
        (file, "acme", "at_wrong_key", "UNAUTHENTICATED"),
        (file, "nobody", shared_world.secret, "NOT_FOUND"),
    ]:
        with pytest.raises(ProcessFailed) as failed:
            await run_import(shared_world, path, owner, key)
        assert complaint in str(failed.value)
        assert "Traceback" not in str(failed.value)
