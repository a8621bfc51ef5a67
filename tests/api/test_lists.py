"""Lists over gRPC: what is taken and left out, exact counts, and campaigns to their members."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from aftertouch.client import Client
from aftertouch.processes import ProcessFailed, run_command
from aftertouch.rpc import lists as rpc_lists
from aftertouch.v1 import campaigns_pb2, contacts_pb2, lists_pb2
from tests.fix_world import World
from tests.refusals import refuse

Reason = lists_pb2.AddListContactsResponse.Reason


async def create(client: Client, list_id: str, display_name: str = "Some people", **fields: Any) -> lists_pb2.List:
    made = lists_pb2.List(display_name=display_name)
    return await client.lists.CreateList(lists_pb2.CreateListRequest(parent=client.parent, list_id=list_id, list=made, **fields))


async def get(client: Client, name: str) -> lists_pb2.List:
    return await client.lists.GetList(lists_pb2.GetListRequest(name=name))


async def add(client: Client, name: str, contacts: Iterable[str]) -> lists_pb2.AddListContactsResponse:
    return await client.lists.AddListContacts(lists_pb2.AddListContactsRequest(name=name, contacts=contacts))


async def remove(client: Client, name: str, contacts: Iterable[str]) -> int:
    request = lists_pb2.RemoveListContactsRequest(name=name, contacts=contacts)
    return int((await client.lists.RemoveListContacts(request)).removed_count)


async def list_members(client: Client, name: str, size: int = 1000) -> list[str]:
    members: list[str] = []
    token = ""
    while True:
        page = await client.contacts.ListContacts(
            contacts_pb2.ListContactsRequest(
                parent=client.parent, filter=contacts_pb2.ContactFilter(list=name), page_size=size, page_token=token
            )
        )
        members += [contact.external_id for contact in page.contacts]
        token = page.next_page_token
        if not token:
            return members


def pick(world: World, channel: str) -> list[str]:
    """The sandbox's people who have an address on a channel."""
    return [person.external_id for person in world.sandbox.population if channel in person.channels]


def aim(name: str) -> campaigns_pb2.Audience:
    return campaigns_pb2.Audience(list=name)


async def test_list_is_made_empty_and_returned_as_it_was_given(shared_world: World) -> None:
    made = await create(shared_world.client, "gold", "Gold customers")
    assert (made.name, made.display_name, made.contact_count) == ("apps/acme/lists/gold", "Gold customers", 0)
    assert made.create_time == made.update_time
    assert await get(shared_world.client, made.name) == made


async def test_list_counts_each_member_once(shared_world: World) -> None:
    client = shared_world.client
    some, more = pick(shared_world, "sms")[:5], pick(shared_world, "whatsapp")[-5:]
    made = await create(client, "counted")
    first = await add(client, made.name, some)
    second = await add(client, made.name, [*some, *(client.name("contacts", one) for one in more), more[0]])
    assert (first.added_count, first.present_count, first.rejected_count) == (5, 0, 0)
    expected = {*some, *more}
    assert (second.added_count, second.present_count) == (len(expected) - 5, 5 + 6 - (len(expected) - 5))
    found = await get(client, made.name)
    assert found.contact_count == len(expected)
    assert found.update_time.ToNanoseconds() > found.create_time.ToNanoseconds()
    assert set(await list_members(client, made.name)) == expected
    assert await list_members(client, made.name, size=3) == await list_members(client, made.name)


async def test_members_are_removed_and_strangers_passed_over(shared_world: World) -> None:
    client = shared_world.client
    some = pick(shared_world, "sms")[:6]
    made = await create(client, "removed")
    await add(client, made.name, some)
    assert await remove(client, made.name, [*some[:2], some[0], "nobody", "apps/acme/contacts/x/y"]) == 2
    assert await remove(client, made.name, some[:2]) == 0
    assert set(await list_members(client, made.name)) == set(some[2:])
    assert (await get(client, made.name)).contact_count == 4


async def test_contacts_that_cannot_be_added_are_named_with_their_place(shared_world: World) -> None:
    client = shared_world.client
    some = pick(shared_world, "sms")[:3]
    made = await create(client, "rejecting")
    given = [some[0], "nobody", client.name("contacts", some[1]), "apps/other/contacts/x", "a/b", "", some[2], "x" * 300]
    answer = await add(client, made.name, given)
    assert (answer.added_count, answer.present_count, answer.rejected_count) == (3, 0, 5)
    assert sorted((r.index, r.contact, r.reason) for r in answer.rejections) == [
        (1, "nobody", Reason.CONTACT_UNKNOWN),
        (3, "apps/other/contacts/x", Reason.MALFORMED),
        (4, "a/b", Reason.MALFORMED),
        (5, "", Reason.MALFORMED),
        (7, "x" * 200, Reason.CONTACT_UNKNOWN),
    ]


async def test_import_takes_a_file_of_any_length_and_counts_places_through_it(shared_world: World) -> None:
    client = shared_world.client
    some = pick(shared_world, "sms")
    made = await create(client, "poured")
    given = [f"stranger-{i}" if i % 1000 == 999 else some[i % len(some)] for i in range(12_000)]
    sent: list[int] = []
    answer = await client.import_list_contacts(made.name, given, sent.append)
    assert (answer.added_count, answer.rejected_count) == (len(some), 12)
    assert answer.present_count == 12_000 - 12 - len(some)
    assert [r.index for r in answer.rejections] == [i for i in range(12_000) if i % 1000 == 999]
    assert sent == [5_000, 10_000, 12_000]
    assert (await get(client, made.name)).contact_count == len(some)


async def test_import_reports_the_first_thousand_rejections(shared_world: World) -> None:
    made = await create(shared_world.client, "strangers")
    answer = await shared_world.client.import_list_contacts(made.name, (f"nobody-{i}" for i in range(1100)))
    assert (answer.rejected_count, len(answer.rejections)) == (1100, 1000)


async def test_import_needs_a_list_of_ones_own(shared_world: World) -> None:
    client = shared_world.client
    message = lists_pb2.ImportListContactsRequest
    for messages, reason in [
        ([message(contacts=["x"])], "FIELDS_INVALID"),
        ([message(name="apps/acme/lists/never-made")], "RESOURCE_NOT_FOUND"),
        ([message(name="apps/other/lists/x")], "RESOURCE_NOT_FOUND"),
        ([message(name="lists/x")], "FIELDS_INVALID"),
    ]:
        assert (await refuse(client.lists.ImportListContacts(iter(messages)))).reason == reason
    made = await create(client, "limited")
    crowd = message(name=made.name, contacts=["x"] * 10_001)
    assert list((await refuse(client.lists.ImportListContacts(iter([crowd])))).fields) == ["contacts"]
    assert list((await refuse(add(client, made.name, ["x"] * 10_001))).fields) == ["contacts"]


async def test_adding_at_once_counts_nobody_twice(shared_world: World) -> None:
    client = shared_world.client
    some = pick(shared_world, "sms")
    made = await create(client, "crowded")
    answers = await asyncio.gather(*(add(client, made.name, some if i % 2 else reversed(some)) for i in range(12)))
    assert sum(answer.added_count for answer in answers) == len(some)
    assert (await get(client, made.name)).contact_count == len(some)


async def test_lists_are_listed_newest_first_with_their_counts(shared_world: World) -> None:
    async with shared_world.connect("lister", await shared_world.create_key("lister", "manage")) as client:
        people = [contacts_pb2.Contact(external_id=f"p{i}") for i in range(7)]
        await client.import_contacts(people)
        for i in range(7):
            made = await create(client, f"l{i}")
            await add(client, made.name, [f"p{n}" for n in range(i)])
        seen: list[tuple[str, int]] = []
        token = ""
        while True:
            page = await client.lists.ListLists(lists_pb2.ListListsRequest(parent=client.parent, page_size=3, page_token=token))
            seen += [(one.name, one.contact_count) for one in page.lists]
            token = page.next_page_token
            if not token:
                break
        assert seen == [(f"apps/lister/lists/l{i}", i) for i in range(6, -1, -1)]


@pytest.mark.parametrize("list_id", ["", "Gold", "1st", "-a", "a-", "a_b", "a" * 64, "é", "a/b"])
async def test_id_of_another_form_is_refused(shared_world: World, list_id: str) -> None:
    assert list((await refuse(create(shared_world.client, list_id))).fields) == ["list_id"]


async def test_list_needs_a_display_name_of_some_length(shared_world: World) -> None:
    for display_name in ("", "x" * 201):
        assert list((await refuse(create(shared_world.client, "named", display_name))).fields) == ["list.display_name"]


async def test_id_that_is_taken_is_refused(shared_world: World) -> None:
    await create(shared_world.client, "taken")
    refusal = await refuse(create(shared_world.client, "taken"))
    assert (refusal.code, refusal.reason) == ("ALREADY_EXISTS", "RESOURCE_ALREADY_EXISTS")
    assert refusal.metadata == {"resource": "apps/acme/lists/taken"}


async def test_create_repeated_answers_the_same(shared_world: World) -> None:
    request_id = str(uuid.uuid4())
    first = await create(shared_world.client, "repeated", request_id=request_id)
    assert await create(shared_world.client, "repeated", request_id=request_id) == first


async def test_more_lists_than_the_limit_are_refused(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_lists, "MOST_LISTS", 2)
    async with shared_world.connect("limited", await shared_world.create_key("limited", "manage")) as client:
        await create(client, "first")
        await create(client, "second")
        refusal = await refuse(create(client, "third"))
    assert (refusal.reason, refusal.metadata) == ("LIST_LIMIT_REACHED", {"app": "apps/limited", "limit": "2"})


async def test_campaign_to_a_list_reaches_its_members_at_the_launch(shared_world: World) -> None:
    client = shared_world.client
    some = pick(shared_world, "sms")
    made = await create(client, "reached")
    await add(client, made.name, [*some[:8], *(one for one in pick(shared_world, "push") if one not in some)])
    draft = await shared_world.create_campaign("sms", aim(made.name))
    assert draft.audience == aim(made.name)
    await remove(client, made.name, some[:2])
    await add(client, made.name, some[8:9])
    await shared_world.launch(draft.name)
    assert set(await shared_world.read_recipients(draft.name)) == set(some[2:9])


async def test_campaign_to_an_empty_list_is_refused(shared_world: World) -> None:
    made = await create(shared_world.client, "hollow")
    draft = await shared_world.create_campaign("sms", aim(made.name))
    launched = shared_world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=draft.name))
    assert (await refuse(launched)).reason == "AUDIENCE_EMPTY"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("apps/acme/lists/never-made", "RESOURCE_NOT_FOUND"), ("apps/other/lists/x", "RESOURCE_NOT_FOUND"), ("x", "FIELDS_INVALID")],
)
async def test_campaign_to_a_list_that_is_not_there_is_refused(shared_world: World, name: str, reason: str) -> None:
    assert (await refuse(shared_world.create_campaign("sms", aim(name)))).reason == reason


async def test_list_and_selection_cannot_be_mixed(shared_world: World) -> None:
    """They are kinds of one audience: on the wire the later one replaces the earlier."""
    made = await create(shared_world.client, "unmixed")
    both = campaigns_pb2.Audience(retarget={"source": "apps/acme/campaigns/x", "action": "delivered"})
    both.list = made.name
    draft = await shared_world.create_campaign("sms", both)
    assert draft.audience == aim(made.name)
    assert draft.root == ""


async def test_list_that_a_draft_is_for_is_not_deleted(shared_world: World) -> None:
    client = shared_world.client
    made = await create(client, "needed")
    await add(client, made.name, pick(shared_world, "sms")[:3])
    draft = await shared_world.create_campaign("sms", aim(made.name))
    deletion = lists_pb2.DeleteListRequest(name=made.name)
    refusal = await refuse(client.lists.DeleteList(deletion))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "LIST_IN_USE")
    assert refusal.metadata == {"list": made.name, "campaign": draft.name}
    await shared_world.launch(draft.name)
    await client.lists.DeleteList(deletion)
    assert (await refuse(get(client, made.name))).reason == "RESOURCE_NOT_FOUND"
    assert (await shared_world.get_campaign(draft.name)).counts.recipients == 3


async def test_list_made_again_under_a_name_begins_empty(shared_world: World) -> None:
    client = shared_world.client
    made = await create(client, "again")
    await add(client, made.name, pick(shared_world, "sms")[:3])
    await client.lists.DeleteList(lists_pb2.DeleteListRequest(name=made.name))
    assert (await create(client, "again")).contact_count == 0
    assert await list_members(client, made.name) == []


async def test_draft_made_while_its_list_is_deleted_never_points_at_nothing(shared_world: World) -> None:
    client = shared_world.client
    for i in range(10):
        made = await create(client, f"raced-{i}")
        content = campaigns_pb2.Campaign(display_name="x", channel="sms", audience=aim(made.name))
        drafted = client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=content, campaign_id=f"raced-{i}")
        )
        deleted = client.lists.DeleteList(lists_pb2.DeleteListRequest(name=made.name))
        outcomes = await asyncio.gather(drafted, deleted, return_exceptions=True)
        assert sum(isinstance(outcome, Exception) for outcome in outcomes) == 1


async def test_list_is_exported_as_it_was_when_it_was_asked_for(shared_world: World) -> None:
    client = shared_world.client
    made = await create(client, "exported")
    many = [contacts_pb2.Contact(external_id=f"exported-{number:04}") for number in range(1_500)]
    for start in (0, 1_000):
        request = contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=many[start : start + 1_000])
        await client.contacts.UpsertContacts(request)
    members = [contact.external_id for contact in many]
    await add(client, made.name, members)

    async def export(resume_token: str = "") -> list[lists_pb2.ExportListContactsResponse]:
        wanted = lists_pb2.ExportListContactsRequest(name=made.name, resume_token=resume_token)
        return [page async for page in client.lists.ExportListContacts(wanted)]

    pages = await export()
    assert [name.rpartition("/")[2] for page in pages for name in page.contacts] == members
    assert [(len(page.contacts), page.total_count) for page in pages] == [(1_000, 1_500), (500, 1_500)]
    (rest,) = await export(pages[0].resume_token)
    assert rest.contacts == pages[1].contacts
    assert await remove(client, made.name, members) == 1_500
    (nobody,) = await export()
    assert (list(nobody.contacts), nobody.total_count) == ([], 0)


# The command


@pytest.fixture
def people_file(tmp_path: Path, shared_world: World) -> Path:
    file = tmp_path / "list.csv"
    rows = [f"{external_id},Name" for external_id in pick(shared_world, "sms")[:4]]
    file.write_text("\n".join(["external_id,first_name", rows[0], "nobody,x", rows[1], f"{rows[2]},too,many", rows[3], "else,y"]))
    return file


async def run_import(world: World, file: Path, *options: str) -> str:
    return await run_command(
        *("lists", "import", str(file), "--app", "acme", "--address", world.addresses.grpc, *options),
        environment={"AFTERTOUCH_API_KEY": world.secret},
    )


async def test_command_makes_a_list_and_names_the_rows_it_left_out(shared_world: World, people_file: Path) -> None:
    for _ in range(2):
        with pytest.raises(ProcessFailed) as failed:
            await run_import(shared_world, people_file, "--list", "from-file", "--display-name", "From a file")
        told = str(failed.value)
        assert "row 2 (nobody): no contact of this external_id; import it first" in told
        assert "row 4" in told
        assert "has more cells than the header" in told
        assert "row 6 (else): no contact of this external_id" in told
        assert "3 rows were rejected; any others are stored" in told
        assert "Traceback" not in told
    found = await get(shared_world.client, "apps/acme/lists/from-file")
    assert (found.display_name, found.contact_count) == ("From a file", 3)


async def test_command_imports_a_clean_file(shared_world: World, tmp_path: Path) -> None:
    file = tmp_path / "clean.csv"
    file.write_text("external_id\n" + "\n".join(pick(shared_world, "sms")))
    assert f"{len(pick(shared_world, 'sms'))} added, 0 in it already, 0 rejected" in await run_import(
        shared_world, file, "--list", "clean"
    )


async def test_command_says_what_is_wrong_with_a_list(shared_world: World, people_file: Path) -> None:
    with pytest.raises(ProcessFailed, match="INVALID_ARGUMENT"):
        await run_import(shared_world, people_file, "--list", "No List")
