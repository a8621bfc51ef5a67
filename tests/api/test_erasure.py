"""Erasing over gRPC: nothing leads to the person any more, every count stays, and what comes later does no harm."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import aiohttp
import numpy as np
import pytest
from sqlalchemy import insert, text
from twilio.request_validator import RequestValidator

from aftertouch.client import Client
from aftertouch.processes import ProcessFailed, run_command
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.server import keep_house
from aftertouch.store import imports
from aftertouch.store.apps import create_app, find_app
from aftertouch.store.campaigns import create_campaign, find_campaign
from aftertouch.store.contacts import hash_address
from aftertouch.store.engine import transaction
from aftertouch.store.logs import TEST_ROW, Attempt, store_attempts
from aftertouch.store.tables import attempts, unrecognized_receipts
from aftertouch.v1 import campaigns_pb2, contacts_pb2, events_pb2, lists_pb2, retargeting_pb2
from tests.fix_database import clone_database
from tests.fix_world import World, run_world
from tests.refusals import refuse


@pytest.fixture(scope="module")
async def shared_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world with a campaign that was sent on each channel; of some SMS nothing is ever heard."""
    settings = SandboxSettings(size=60, time_scale=0.05, shares=Shares(sms_no_report=0.4))
    async with clone_database(postgres_url, template) as url, run_world(url, settings) as world:
        await world.import_people()
        for channel in ("sms", "whatsapp", "push"):
            draft = await world.create_campaign(channel)
            await world.launch(draft.name)
        yield world


def pick(world: World, number: int) -> str:
    """Somebody who has an address on each channel; every test its own."""
    return [p.external_id for p in world.sandbox.population if len(p.channels) == 3][number]


async def erase(client: Client, external_id: str, **fields: Any) -> contacts_pb2.EraseContactResponse:
    request = contacts_pb2.EraseContactRequest(name=client.name("contacts", external_id), **fields)
    return await client.contacts.EraseContact(request)


async def get(world: World, external_id: str) -> contacts_pb2.Contact:
    request = contacts_pb2.GetContactRequest(name=world.client.name("contacts", external_id))
    return await world.client.contacts.GetContact(request)


async def upsert(world: World, external_id: str, phone: str = "", **attributes: Any) -> None:
    contact = contacts_pb2.Contact(external_id=external_id, attributes=to_struct(attributes))
    if phone:
        contact.subscriptions.add(channel="sms", address=to_struct({"phone": phone}))
    await world.client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent="apps/acme", contacts=[contact]))


async def list_sent(world: World) -> list[campaigns_pb2.Campaign]:
    """All launched campaigns, with their counts."""
    listed = await world.client.campaigns.ListCampaigns(campaigns_pb2.ListCampaignsRequest(parent="apps/acme", page_size=1000))
    return [await world.get_campaign(campaign.name) for campaign in listed.campaigns if campaign.HasField("launch_time")]


async def read_everything(world: World) -> str:
    """Every row of every table as text, bytes in hexadecimal."""
    async with transaction(world.core.engine) as conn:
        names = await conn.execute(
            text("SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace")
        )
        rows = [await conn.execute(text(f'SELECT t::text FROM "{name}" AS t')) for name in names.scalars()]
    return "\n".join(row for result in rows for row in result.scalars())


async def import_rejected(world: World, *rows: tuple[str, str]) -> tuple[int, int]:
    """A file that came through the console, of which these rows were left out; the app's and its number."""
    rejections = [
        {"row": at, "external_id": external_id, "field": "", "description": text}
        for at, (external_id, text) in enumerate(rows, 2)
    ]
    async with transaction(world.core.engine) as conn:
        app = await find_app(conn, "acme")
        assert app is not None
        number = await imports.create_import(conn, app.app_id, "people.csv")
        await imports.update_import(conn, app.app_id, number, state="DONE", rejected_count=len(rows), rejections=rejections)
    return app.app_id, number


async def test_erased_person_is_nowhere(shared_world: World) -> None:
    world, client = shared_world, shared_world.client
    phone = "+34699123456"
    await upsert(world, "traceable", phone, secret_wish="a pony for traceable")
    made = await client.lists.CreateList(
        lists_pb2.CreateListRequest(parent="apps/acme", list_id="traced", list=lists_pb2.List(display_name="x"))
    )
    added = lists_pb2.AddListContactsRequest(name=made.name, contacts=["traceable", pick(world, 0)])
    await client.lists.AddListContacts(added)
    names = ["apps/acme/contacts/traceable", f"apps/acme/contacts/{pick(world, 0)}"]
    given = campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=names))
    sent, draft = await world.create_campaign("sms", given), await world.create_campaign("sms", given)
    await world.launch(sent.name)
    tested = campaigns_pb2.SendTestRequest(name=draft.name, contact=names[0])
    (test,) = (await client.campaigns.SendTest(tested)).outcomes
    async with transaction(world.core.engine) as conn:
        row = {"channel": "sms", "item": f"To=%2B{phone[1:]}&MessageStatus=unheard-of"}
        await conn.execute(insert(unrecognized_receipts), [row, {"channel": "sms", "item": "To=%2B34600000000"}])
    imported = await import_rejected(
        world,
        ("traceable", "is not a time zone"),
        *((f"{blank}traceable{blank}", "has blanks at the ends") for blank in (" ", "\t", "\u00a0")),
        ("", f"{phone} is no address"),
        ("other", "is not a time zone"),
    )
    explained = await client.contacts.ExplainContact(contacts_pb2.ExplainContactRequest(name=names[0], campaign=sent.name))
    message_ids = [test.message_id, *(attempt.message_id for attempt in explained.attempts)]
    traces = ["traceable", phone[1:], "a pony", hash_address(phone).hex(), *message_ids]
    assert all(message_ids)
    before = await read_everything(world)
    assert all(trace in before for trace in traces)

    erased = await erase(client, "traceable")

    after = await read_everything(world)
    assert [trace for trace in traces if trace in after] == []
    assert "34600000000" in after
    async with transaction(world.core.engine) as conn:
        left = await imports.find_import(conn, *imported)
    assert left is not None
    assert ([row["external_id"] for row in left.rejections], left.rejected_count) == (["other"], 6)
    assert (erased.subscription_count, erased.list_count, erased.audience_count) == (1, 1, 2)
    assert (erased.attempt_count, erased.unrecognized_receipt_count) == (len(message_ids), 1)
    assert (await client.lists.GetList(lists_pb2.GetListRequest(name=made.name))).contact_count == 1
    assert list((await world.get_campaign(draft.name)).audience.given_contacts.contacts) == names[1:]
    assert await refuse_get(world, "traceable") == "RESOURCE_NOT_FOUND"


async def test_test_of_a_deleted_draft_is_blanked(shared_world: World) -> None:
    """The hash of the address and the message's id stayed as long as the log."""
    world, client = shared_world, shared_world.client
    await upsert(world, "tested", "+34699000007")
    draft = await world.create_campaign("sms")
    tested = campaigns_pb2.SendTestRequest(name=draft.name, contact="apps/acme/contacts/tested")
    (test,) = (await client.campaigns.SendTest(tested)).outcomes
    await client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=draft.name))
    assert (await erase(client, "tested")).attempt_count == 1
    left = await read_everything(world)
    assert test.message_id not in left
    assert hash_address("+34699000007").hex() not in left


async def test_tests_of_other_apps_stay_when_somebody_is_erased(shared_world: World) -> None:
    """The same person is another contact there, who was not erased."""
    world = shared_world
    phone = "+34699000008"
    await upsert(world, "shared", phone)
    async with transaction(world.core.engine) as conn:
        app = await create_app(conn, "neighbour", "Neighbour")
        campaign = await create_campaign(conn, app.app_id, "sale", {"display_name": "Sale", "channel": "sms"})
        await store_attempts(conn, [Attempt(campaign.campaign_id << 20, TEST_ROW, 1, hash_address(phone), "sms", "SMtheirs")])
    assert (await erase(world.client, "shared")).attempt_count == 0
    assert "SMtheirs" in await read_everything(world)


async def refuse_get(world: World, external_id: str) -> str:
    return (await refuse(get(world, external_id))).reason


async def test_counts_stay_and_recipients_have_no_name(shared_world: World) -> None:
    world = shared_world
    external_id = pick(world, 1)
    sent = await list_sent(world)
    actions = [await list_actions(world, campaign.name) for campaign in sent]
    involved = [c for c in sent if external_id in await world.read_recipients(c.name)]
    assert len(involved) >= 3
    erased = await erase(world.client, external_id)
    assert erased.subscription_count == 3
    assert erased.attempt_count >= 3
    for campaign, counted in zip(sent, actions, strict=True):
        assert (await world.get_campaign(campaign.name)).counts == campaign.counts
        assert await list_actions(world, campaign.name) == counted
    for campaign in involved:
        page = await world.client.campaigns.ListRecipients(
            campaigns_pb2.ListRecipientsRequest(parent=campaign.name, page_size=1000)
        )
        assert len(page.recipients) == campaign.counts.recipients
        nameless = [recipient for recipient in page.recipients if not recipient.contact]
        assert nameless
        assert all(recipient.signals for recipient in nameless)


async def list_actions(world: World, name: str) -> list[tuple[str, int, int]]:
    listed = await world.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=name))
    return [(counted.action.action, counted.count, counted.apart_count) for counted in listed.actions]


async def test_retarget_leaves_the_erased_out(shared_world: World) -> None:
    """They still match, as a number, and drop out because there is no address."""
    world = shared_world
    source = (await world.create_campaign("sms")).name
    await world.launch(source)
    selection = campaigns_pb2.RetargetSelection(source=source, action="sent")
    request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="sms")
    before = await world.client.retargeting.PreviewRetarget(request)
    await erase(world.client, pick(world, 2))
    after = await world.client.retargeting.PreviewRetarget(request)
    assert (after.matched_count, after.audience_count) == (before.matched_count, before.audience_count - 1)
    assert after.drops[0].count == before.drops[0].count + 1


async def test_later_receipts_of_the_erased_are_taken_and_counted(shared_world: World) -> None:
    world = shared_world
    draft = await world.create_campaign("sms")
    await world.launch(draft.name)
    recipients = await world.read_recipients(draft.name)
    position, (external_id, recipient) = next(
        (place, (one, r)) for place, (one, r) in enumerate(recipients.items()) if not {"delivered", "failed"} & set(r.signals)
    )
    async with transaction(world.core.engine) as conn:
        campaign = await find_campaign(conn, 1, draft.name.rpartition("/")[2])
        assert campaign is not None
        tried = await conn.execute(
            text("SELECT message_id FROM attempts WHERE slot = :slot AND position = :position"),
            {
                "slot": campaign.campaign_id << 20,
                "position": position,
            },
        )
        (message_id, *_) = tried.scalars()
    await erase(world.client, external_id)
    before = (await world.get_campaign(draft.name)).counts.signals
    (token,) = world.core.ledger.tokens.make(campaign.campaign_id, np.array([position]))
    url = f"http://{world.addresses.http}/v1/webhooks/sms?t={token}"
    async with aiohttp.ClientSession() as session:
        for news in (
            {"MessageStatus": "delivered"},
            {"MessageStatus": "undelivered", "ErrorCode": "30005"},
            {"MessageStatus": "failed", "ErrorCode": "21610"},
        ):
            form = {"MessageSid": message_id, **news}
            signature = RequestValidator(world.sandbox.settings.auth_token).compute_signature(url, form)
            async with session.post(url, data=form, headers={"X-Twilio-Signature": signature}) as response:
                assert response.status < 300
    events = [events_pb2.Event(token=token, signal="delivered")]
    answer = await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=events))
    assert (answer.accepted_count, len(answer.rejections)) == (1, 0)
    after = (await world.get_campaign(draft.name)).counts.signals
    assert "sent" in recipient.signals
    assert (after["delivered"], after["failed"]) == (before["delivered"] + 1, before["failed"] + 1)
    assert await refuse_get(world, external_id) == "RESOURCE_NOT_FOUND"


async def test_event_by_the_erased_name_is_rejected(shared_world: World) -> None:
    world = shared_world
    await upsert(world, "forgotten", "+34699000003")
    await erase(world.client, "forgotten")
    (source, *_) = await list_sent(world)
    target = events_pb2.RecipientTarget(campaign=source.name, external_id="forgotten")
    request = events_pb2.IngestEventsRequest(parent="apps/acme", events=[events_pb2.Event(recipient=target, signal="delivered")])
    (rejection,) = (await world.client.events.IngestEvents(request)).rejections
    assert rejection.reason == events_pb2.RejectedEvent.Reason.CONTACT_UNKNOWN


async def test_event_by_a_name_that_was_in_use_is_rejected_once_it_is_erased(shared_world: World) -> None:
    """And when somebody new has it, the event is not taken for the one who was erased."""
    world = shared_world
    external_id = pick(world, 9)
    (source, *_) = await list_sent(world)
    target = events_pb2.RecipientTarget(campaign=source.name, external_id=external_id)
    request = events_pb2.IngestEventsRequest(parent="apps/acme", events=[events_pb2.Event(recipient=target, signal="sent")])
    assert not (await world.client.events.IngestEvents(request)).rejections
    await erase(world.client, external_id)
    async with asyncio.timeout(120):
        # A server looks every second for who was erased.
        while not (rejections := (await world.client.events.IngestEvents(request)).rejections):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert rejections[0].reason == events_pb2.RejectedEvent.Reason.CONTACT_UNKNOWN
    await upsert(world, external_id, "+34699000009")
    (rejection,) = (await world.client.events.IngestEvents(request)).rejections
    assert rejection.reason == events_pb2.RejectedEvent.Reason.NOT_A_RECIPIENT


async def test_same_external_id_is_somebody_new_afterwards(shared_world: World) -> None:
    world = shared_world
    external_id = pick(world, 3)
    old = await get(world, external_id)
    assert old.campaigns
    await erase(world.client, external_id)
    await upsert(world, external_id, "+34699000001")
    new = await get(world, external_id)
    assert (len(new.subscriptions), len(new.attributes), len(new.campaigns)) == (1, 0, 0)
    assert new.create_time.ToNanoseconds() > old.create_time.ToNanoseconds()
    listed = contacts_pb2.ListContactsRequest(parent="apps/acme", page_size=1000)
    ids = [contact.external_id for contact in (await world.client.contacts.ListContacts(listed)).contacts]
    assert ids[-1] == external_id
    assert ids.count(external_id) == 1


async def test_erasing_repeated_with_its_request_id_answers_the_same(shared_world: World) -> None:
    await upsert(shared_world, "once", "+34699000002")
    request_id = str(uuid.uuid4())
    first = await erase(shared_world.client, "once", request_id=request_id)
    assert first.subscription_count == 1
    assert await erase(shared_world.client, "once", request_id=request_id) == first
    assert (await refuse(erase(shared_world.client, "other", request_id=request_id))).reason == "REQUEST_ID_REUSED"
    refusal = await refuse(erase(shared_world.client, "once"))
    assert refusal.metadata == {"resource": "apps/acme/contacts/once"}


async def test_erasing_at_once_erases_once(shared_world: World) -> None:
    await upsert(shared_world, "raced", "+34699000004")
    outcomes = await asyncio.gather(*(erase(shared_world.client, "raced") for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(outcome, contacts_pb2.EraseContactResponse) for outcome in outcomes) == 1


async def test_nobody_comes_back_by_what_happens_at_the_same_time(shared_world: World) -> None:
    """Upserts and additions to a list race with erasing; whoever is left is somebody new, and whole."""
    world, client = shared_world, shared_world.client
    made = await client.lists.CreateList(
        lists_pb2.CreateListRequest(parent="apps/acme", list_id="racing", list=lists_pb2.List(display_name="x"))
    )
    for i in range(25):
        await upsert(world, f"racer-{i}", f"+346970000{i:02}", earlier=True)
        await asyncio.gather(
            upsert(world, f"racer-{i}", f"+346980000{i:02}", later=True),
            client.lists.AddListContacts(lists_pb2.AddListContactsRequest(name=made.name, contacts=[f"racer-{i}"])),
            erase(client, f"racer-{i}"),
            upsert(world, f"racer-{i}", f"+346980000{i:02}", later=True),
        )
    async with transaction(world.core.engine) as conn:
        stray = await conn.execute(
            text(
                "SELECT number FROM contacts LEFT JOIN contact_ids USING (external_id, number) WHERE app_id IS NULL"
                " UNION SELECT number FROM subscriptions LEFT JOIN contacts USING (block, number) WHERE external_id IS NULL"
                " UNION SELECT number FROM erasures JOIN contact_sets ON block = (app_id << 20) | (number >> 13)"
                "   AND get_bit(bits, (number & 8191)::int) = 1"
            )
        )
        assert list(stray.scalars()) == []
    for i in range(25):
        try:
            left = await get(world, f"racer-{i}")
        except Exception:
            assert await refuse_get(world, f"racer-{i}") == "RESOURCE_NOT_FOUND"
        else:
            assert set(left.attributes.keys()) == {"later"}
            assert [s.address["phone"] for s in left.subscriptions] == [f"+346980000{i:02}"]


async def test_message_that_was_under_way_is_blanked_by_housekeeping(shared_world: World) -> None:
    world = shared_world
    await upsert(world, "under-way", "+34699000005")
    names = ["apps/acme/contacts/under-way"]
    draft = await world.create_campaign("sms", campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=names)))
    await world.launch(draft.name)
    async with transaction(world.core.engine) as conn:
        campaign = await find_campaign(conn, 1, draft.name.rpartition("/")[2])
        assert campaign is not None
        await conn.execute(text("UPDATE campaigns SET finish_time = NULL WHERE campaign_id = :id"), {"id": campaign.campaign_id})
    await erase(world.client, "under-way")
    late = {
        "arrive_time": datetime.now(UTC),
        "slot": campaign.campaign_id << 20,
        "position": 0,
        "kind": 1,
        "address_hash": hash_address("+34699000005"),
        "channel": "sms",
        "message_id": "SMlate",
    }
    async with transaction(world.core.engine) as conn:
        await conn.execute(insert(attempts), [late])
    assert "SMlate" in await read_everything(world)
    await keep_house(world.core.engine)
    left = await read_everything(world)
    assert "SMlate" not in left
    assert hash_address("+34699000005").hex() not in left


async def test_command_erases_and_says_what_was_removed(shared_world: World) -> None:
    await upsert(shared_world, "by-command", "+34699000006")
    arguments = ("contacts", "erase", "by-command", "--app", "acme", "--address", shared_world.addresses.grpc, "--yes")
    environment = {"AFTERTOUCH_API_KEY": shared_world.secret}
    told = await run_command(*arguments, environment=environment)
    assert "erased, with 1 addresses; taken out of 0 lists and 0 audiences; 0 attempts blanked" in told
    assert await refuse_get(shared_world, "by-command") == "RESOURCE_NOT_FOUND"
    with pytest.raises(ProcessFailed, match="NOT_FOUND: apps/acme/contacts/by-command does not exist"):
        await run_command(*arguments, environment=environment)


async def test_command_asks_before_it_erases(shared_world: World) -> None:
    await upsert(shared_world, "spared")
    arguments = ("contacts", "erase", "spared", "--app", "acme", "--address", shared_world.addresses.grpc)
    with pytest.raises(ProcessFailed):
        await run_command(*arguments, environment={"AFTERTOUCH_API_KEY": shared_world.secret})
    assert (await get(shared_world, "spared")).external_id == "spared"
