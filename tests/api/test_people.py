"""People over gRPC: finding them, the campaigns that they were in, and why they were, or were not, messaged."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from aftertouch.retargeting import explanations
from aftertouch.rpc import contacts as rpc_contacts
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.store.contacts import find_numbers, hash_address, hold_addresses
from aftertouch.store.engine import transaction
from aftertouch.store.paces import count_messages
from aftertouch.store.tables import apps
from aftertouch.v1 import campaigns_pb2, contacts_pb2, lists_pb2, retargeting_pb2
from tests.fix_database import clone_database
from tests.fix_world import World, run_world
from tests.refusals import refuse

State = contacts_pb2.Subscription.State
Explanation = contacts_pb2.ContactExplanation
CHANNELS = ("sms", "whatsapp", "push")
UNKNOWN_ACTION = {"source": "apps/acme/campaigns/source-sms", "action": "x"}
_phones = itertools.count(10_000_000)


@pytest.fixture(scope="module")
async def shared_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world in which much goes wrong, with a campaign that was sent on each channel."""
    troubled = Shares(
        sms_opted_out=0.1, sms_gone=0.1, sms_unreachable=0.3, sms_no_report=0.2, whatsapp_gone=0.15, whatsapp_capped=0.2
    )
    settings = SandboxSettings(size=90, time_scale=0.05, shares=troubled)
    async with clone_database(postgres_url, template) as url, run_world(url, settings) as world:
        await world.import_people()
        for channel in CHANNELS:
            await launch_named(world, f"source-{channel}", channel)
        yield world


async def launch_named(world: World, campaign_id: str, channel: str, audience: campaigns_pb2.Audience | None = None) -> str:
    made = await world.create_campaign(channel, audience)
    campaign = campaigns_pb2.Campaign(display_name=campaign_id, channel=channel, content=made.content, audience=made.audience)
    request = campaigns_pb2.CreateCampaignRequest(parent="apps/acme", campaign=campaign, campaign_id=campaign_id)
    await world.client.campaigns.CreateCampaign(request)
    await world.launch(f"apps/acme/campaigns/{campaign_id}")
    return f"apps/acme/campaigns/{campaign_id}"


async def upsert(world: World, external_id: str, *subscriptions: tuple[str, dict[str, Any], int]) -> str:
    contact = contacts_pb2.Contact(external_id=external_id)
    for channel, address, state in subscriptions:
        contact.subscriptions.add(channel=channel, address=to_struct(address), state=state)
    await world.client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent="apps/acme", contacts=[contact]))
    return f"apps/acme/contacts/{external_id}"


def new_phone() -> dict[str, str]:
    return {"phone": f"+347{next(_phones)}"}


def give(*names: str) -> campaigns_pb2.Audience:
    return campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=names))


async def message_often(world: World, external_id: str) -> list[str]:
    """Five campaigns to one person, whose phone works again each time."""
    names = []
    for i in range(5):
        name = await upsert(world, external_id, ("sms", new_phone(), State.ACTIVE))
        names.append(await launch_named(world, f"{external_id}-{i}", "sms", give(name)))
    return names


# The campaigns that somebody was in


async def list_campaigns(world: World, contact: str, size: int = 1000) -> list[contacts_pb2.ContactCampaign]:
    found: list[contacts_pb2.ContactCampaign] = []
    token = ""
    while True:
        page = await world.client.contacts.ListContactCampaigns(
            contacts_pb2.ListContactCampaignsRequest(parent=contact, page_size=size, page_token=token)
        )
        assert len(page.campaigns) <= size
        found += page.campaigns
        token = page.next_page_token
        if not token:
            return found


async def test_campaigns_of_everybody_are_those_whose_recipients_they_are(shared_world: World) -> None:
    recipients = {channel: await shared_world.read_recipients(f"apps/acme/campaigns/source-{channel}") for channel in CHANNELS}
    assert any(len(people) < 90 for people in recipients.values())
    for person in shared_world.sandbox.population:
        shown = await list_campaigns(shared_world, f"apps/acme/contacts/{person.external_id}")
        sources = [one for one in shown if one.campaign.startswith("apps/acme/campaigns/source-")]
        expected = [channel for channel in reversed(CHANNELS) if person.external_id in recipients[channel]]
        assert [one.channel for one in sources] == expected
        for one in sources:
            recipient = recipients[one.channel][person.external_id]
            assert (list(one.signals), list(one.reasons)) == (list(recipient.signals), list(recipient.reasons))
            assert one.HasField("launch_time")


async def test_contact_shows_its_last_campaigns(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = await message_often(shared_world, "busy")
    name = "apps/acme/contacts/busy"
    await launch_named(shared_world, "not-for-busy", "sms", give("apps/acme/contacts/" + next(iter_people(shared_world, "sms"))))
    request = contacts_pb2.GetContactRequest(name=name)
    shown = await shared_world.client.contacts.GetContact(request)
    assert [one.campaign for one in shown.campaigns] == names[::-1]
    assert list(shown.campaigns) == await list_campaigns(shared_world, name)
    monkeypatch.setattr(rpc_contacts, "SHOWN_CAMPAIGNS", 2)
    assert [one.campaign for one in (await shared_world.client.contacts.GetContact(request)).campaigns] == names[:2:-1]
    monkeypatch.setattr(rpc_contacts, "SHOWN_OF_CAMPAIGNS", 2)
    assert [one.campaign for one in (await shared_world.client.contacts.GetContact(request)).campaigns] == names[:3:-1]


def iter_people(world: World, channel: str) -> Any:
    return (person.external_id for person in world.sandbox.population if channel in person.channels)


async def test_campaigns_of_a_contact_come_in_pages(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    names = await message_often(shared_world, "paged")
    name = "apps/acme/contacts/paged"
    for size, most in itertools.product((1, 2, 5, 6), (1, 3, 1000)):
        # However few campaigns are looked through for a page: a short one leads on.
        monkeypatch.setattr(rpc_contacts, "MOST_CAMPAIGNS", most)
        assert [one.campaign for one in await list_campaigns(shared_world, name, size)] == names[::-1]


async def test_contact_without_campaigns_shows_none(shared_world: World) -> None:
    name = await upsert(shared_world, "quiet", ("sms", new_phone(), 0))
    assert await list_campaigns(shared_world, name) == []
    assert not (await shared_world.client.contacts.GetContact(contacts_pb2.GetContactRequest(name=name))).campaigns


# Finding people


async def find(world: World, size: int = 1000, **fields: Any) -> list[str]:
    found: list[str] = []
    token = ""
    while True:
        page = await world.client.contacts.ListContacts(
            contacts_pb2.ListContactsRequest(
                parent="apps/acme", page_size=size, page_token=token, filter=contacts_pb2.ContactFilter(**fields)
            )
        )
        found += [contact.external_id for contact in page.contacts]
        token = page.next_page_token
        if not token:
            return found


async def test_prefix_finds_in_the_order_of_code_points(shared_world: World) -> None:
    ids = ["zz-a", "zz-B", "zz-", "zz-é", "zz-🙂", "zz-🙂b", "zz-~", "Zz-c", "zy", "zz.", "z"]
    for external_id in ids:
        await upsert(shared_world, external_id)
    for prefix in ("zz-", "zz-🙂", "zz", "Z", "zz-a", "zz-%", "zz_", "\U0010ffff"):
        expected = sorted(one for one in ids if one.startswith(prefix))
        for size in (1, 2, 1000):
            assert await find(shared_world, size, external_id_prefix=prefix) == expected, prefix


async def test_address_finds_however_it_is_written(shared_world: World) -> None:
    phone = new_phone()["phone"]
    for external_id in ("one", "two"):
        await upsert(shared_world, f"shared-{external_id}", ("sms", {"phone": phone}, 0), ("whatsapp", new_phone(), 0))
    spelt = {"channel": "sms", "address": to_struct({"phone": f"{phone[:3]} {phone[3:6]}-{phone[6:]}"})}
    for size in (1, 2):
        assert await find(shared_world, size, address=spelt) == ["shared-one", "shared-two"]
    assert await find(shared_world, address={"channel": "whatsapp", "address": to_struct({"phone": phone})}) == []
    assert await find(shared_world, address={"channel": "sms", "address": to_struct(new_phone())}) == []


async def test_standing_finds_by_the_best_subscription(shared_world: World) -> None:
    states = {
        "standing-a": [State.ACTIVE],
        "standing-b": [State.OPTED_OUT],
        "standing-c": [State.INVALID],
        "standing-d": [State.OPTED_OUT, State.ACTIVE],
        "standing-e": [State.INVALID, State.OPTED_OUT],
    }
    for external_id, given in states.items():
        await upsert(shared_world, external_id, *(("whatsapp", new_phone(), state) for state in given))
    for state, expected in [(State.ACTIVE, "ad"), (State.OPTED_OUT, "be"), (State.INVALID, "c")]:
        for size in (2, 1000):
            found = await find(shared_world, size, standing={"channel": "whatsapp", "state": state})
            assert [one[-1] for one in found if one.startswith("standing-")] == list(expected)


async def test_message_id_finds_who_was_sent_the_message(shared_world: World) -> None:
    """Support holds a provider's id, and nothing else."""
    for channel in ("sms", "whatsapp"):
        source = f"apps/acme/campaigns/source-{channel}"
        given = {}
        for external_id in list(await shared_world.read_recipients(source))[:10]:
            said = await explain(shared_world, f"apps/acme/contacts/{external_id}", source)
            given |= {attempt.message_id: external_id for attempt in said.attempts if attempt.message_id}
        assert len(given) > 5
        for message_id, external_id in given.items():
            assert await find(shared_world, message_id=message_id) == [external_id]
            for other in (message_id[:-1], message_id.swapcase(), f"{message_id} "):
                assert await find(shared_world, message_id=other) == []
    assert await find(shared_world, message_id="SM-never-given") == []


async def test_message_id_of_a_test_finds_whose_the_address_is(shared_world: World) -> None:
    phone = new_phone()
    contact = await upsert(shared_world, "tried", ("sms", phone, 0))
    draft = await shared_world.create_campaign("sms")
    request = campaigns_pb2.SendTestRequest(name=draft.name, contact=contact)
    (outcome,) = (await shared_world.client.campaigns.SendTest(request)).outcomes
    await upsert(shared_world, "tried-too", ("sms", phone, 0))
    for size in (1, 2):
        assert await find(shared_world, size, message_id=outcome.message_id) == ["tried", "tried-too"]


async def test_message_id_of_another_app_finds_nobody(shared_world: World) -> None:
    """An app could have learnt whom another one messages, or what its own numbers are there."""
    name = next(iter(await shared_world.read_recipients("apps/acme/campaigns/source-sms")))
    said = await explain(shared_world, f"apps/acme/contacts/{name}", "apps/acme/campaigns/source-sms")
    message_id = next(attempt.message_id for attempt in said.attempts if attempt.message_id)
    async with shared_world.connect("prying", await shared_world.create_key("prying", "read")) as client:
        wanted = contacts_pb2.ContactFilter(message_id=message_id)
        listed = await client.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent="apps/prying", filter=wanted))
        assert not listed.contacts


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "filter.kind"),
        ({"message_id": ""}, "filter.message_id"),
        ({"message_id": "x" * 257}, "filter.message_id"),
        ({"external_id_prefix": ""}, "filter.external_id_prefix"),
        ({"external_id_prefix": "x" * 201}, "filter.external_id_prefix"),
        ({"address": {"channel": "fax", "address": to_struct({"n": 1})}}, "filter.address.channel"),
        ({"address": {"channel": "sms"}}, "filter.address.address"),
        ({"address": {"channel": "sms", "address": to_struct({"phone": "12"})}}, "filter.address.address.phone"),
        ({"standing": {"channel": "fax", "state": State.ACTIVE}}, "filter.standing.channel"),
        ({"standing": {"channel": "sms"}}, "filter.standing.state"),
        ({"standing": {"channel": "sms", "state": 9}}, "filter.standing.state"),
        ({"list": "x"}, "filter.list"),
    ],
)
async def test_faulty_filter_is_refused_with_its_path(shared_world: World, fields: Any, path: str) -> None:
    assert list((await refuse(find(shared_world, **fields))).fields) in ([path], ["filter"])


async def test_filter_by_a_list_that_is_not_there_is_refused(shared_world: World) -> None:
    for name in ("apps/acme/lists/never-made", "apps/other/lists/x"):
        assert (await refuse(find(shared_world, list=name))).reason == "RESOURCE_NOT_FOUND"


async def test_page_token_of_another_filter_is_refused(shared_world: World) -> None:
    request = contacts_pb2.ListContactsRequest(parent="apps/acme", page_size=1)
    request.page_token = (await shared_world.client.contacts.ListContacts(request)).next_page_token
    for fields in ({"external_id_prefix": "a"}, {"standing": {"channel": "sms", "state": State.ACTIVE}}):
        request.filter.CopyFrom(contacts_pb2.ContactFilter(**fields))
        assert list((await refuse(shared_world.client.contacts.ListContacts(request))).fields) == ["page_token"]


# Why somebody was, or was not, messaged


async def explain(world: World, contact: str, campaign: str) -> contacts_pb2.ContactExplanation:
    request = contacts_pb2.ExplainContactRequest(name=contact, campaign=campaign)
    return await world.client.contacts.ExplainContact(request)


async def explain_retarget(
    world: World, contact: str, channel: str, selection: campaigns_pb2.RetargetSelection
) -> contacts_pb2.ContactExplanation:
    question = contacts_pb2.RetargetQuestion(selection=selection, channel=channel)
    return await world.client.contacts.ExplainContact(contacts_pb2.ExplainContactRequest(name=contact, retarget=question))


def steps_of(explanation: contacts_pb2.ContactExplanation) -> list[tuple[str, bool]]:
    return [(Explanation.Check.Name(step.check), step.passed) for step in explanation.steps]


@pytest.mark.parametrize("channel", CHANNELS)
async def test_explanation_of_every_recipient_is_what_the_receipts_say(shared_world: World, channel: str) -> None:
    source = f"apps/acme/campaigns/source-{channel}"
    for external_id, recipient in (await shared_world.read_recipients(source)).items():
        said = await explain(shared_world, f"apps/acme/contacts/{external_id}", source)
        assert (list(said.signals), list(said.reasons)) == (list(recipient.signals), list(recipient.reasons))
        true = set(recipient.signals)
        if "failed" in true and not true & {"delivered", "read", "confirmed", "clicked"}:
            expected = Explanation.NOT_DELIVERED
            assert all(reason in said.text for reason in recipient.reasons)
        elif "sent" in true:
            expected = Explanation.MESSAGED
        else:
            expected = Explanation.UNCLEAR
        assert said.decision == expected, (said, recipient)
        assert not said.steps
        assert not said.events_incomplete
        reported = {event.signal for event in said.events}
        assert reported <= true | {"refused"}
        assert "attempted" in reported
        times = [event.time.ToNanoseconds() for event in said.events]
        assert times == sorted(times)
        assert said.attempts
        assert {attempt.outcome for attempt in said.attempts} <= {"sent", "failed", "attempted"}


@pytest.mark.parametrize("channel", CHANNELS)
async def test_retarget_is_explained_as_it_is_counted(shared_world: World, channel: str) -> None:
    """Summed over everybody, the explanations are the funnel of the preview, action by action."""
    source = f"apps/acme/campaigns/source-{channel}"
    client = shared_world.client
    listed = await client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=source))
    people = [f"apps/acme/contacts/{one}" for one in await shared_world.read_recipients(source)]
    for counted in listed.actions:
        for include_apart in {False, bool(counted.action.apart_expression)}:
            selection = campaigns_pb2.RetargetSelection(source=source, action=counted.action.action, include_apart=include_apart)
            shown = await client.retargeting.PreviewRetarget(
                retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="push")
            )
            said = await asyncio.gather(*(explain_retarget(shared_world, person, "push", selection) for person in people))
            assert sum(dict(steps_of(one)).get("IN_AUDIENCE", False) for one in said) == shown.matched_count
            assert sum(one.decision == Explanation.WOULD_BE_MESSAGED for one in said) == shown.audience_count
        truths = [truth for one in said for truth in one.actions if truth.action == counted.action.action]
        assert sum(truth.matches for truth in truths) == counted.count
        assert sum(truth.is_apart for truth in truths) == counted.apart_count


async def test_retarget_by_reasons_is_explained_as_it_is_counted(shared_world: World) -> None:
    source = "apps/acme/campaigns/source-whatsapp"
    recipients = await shared_world.read_recipients(source)
    reasons = {reason for recipient in recipients.values() for reason in recipient.reasons}
    assert reasons
    for reason in sorted(reasons):
        reason_class, _, code = reason.partition("/")
        for narrowed in ({"reason_codes": [code]}, {"reason_classes": [reason_class]}):
            selection = campaigns_pb2.RetargetSelection(source=source, action="failed", **narrowed)
            shown = await shared_world.client.retargeting.PreviewRetarget(
                retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="sms")
            )
            failed = [f"apps/acme/contacts/{one}" for one, recipient in recipients.items() if recipient.reasons]
            said = await asyncio.gather(*(explain_retarget(shared_world, one, "sms", selection) for one in failed))
            assert sum(dict(steps_of(one)).get("IN_AUDIENCE", False) for one in said) == shown.matched_count > 0


async def test_stranger_to_the_source_would_not_be_messaged(shared_world: World) -> None:
    name = await upsert(shared_world, "stranger", ("sms", new_phone(), 0))
    selection = campaigns_pb2.RetargetSelection(source="apps/acme/campaigns/source-sms", action="delivered")
    said = await explain_retarget(shared_world, name, "sms", selection)
    assert said.decision == Explanation.WOULD_NOT_BE_MESSAGED
    assert steps_of(said) == [("RECIPIENT_OF_SOURCE", False), ("REACHABLE", True)]
    assert said.text == "Would not be messaged now: is not a recipient of source-sms."
    assert (said.campaign, list(said.signals)) == ("apps/acme/campaigns/source-sms", [])


async def test_somebody_made_after_the_launch_was_not_in_the_audience(shared_world: World) -> None:
    name = await upsert(shared_world, "late", ("sms", new_phone(), 0))
    said = await explain(shared_world, name, "apps/acme/campaigns/source-sms")
    assert said.decision == Explanation.NOT_IN_AUDIENCE
    assert steps_of(said) == [("CONTACT_MADE_IN_TIME", False), ("IN_AUDIENCE", True), ("REACHABLE", True)]
    assert "after the launch" in said.text


async def test_somebody_who_cannot_be_reached_was_not_in_the_audience(shared_world: World) -> None:
    stopped = await upsert(shared_world, "stopped", ("sms", new_phone(), State.OPTED_OUT))
    broken = await upsert(shared_world, "broken", ("sms", new_phone(), State.INVALID))
    without = await upsert(shared_world, "without")
    there = await upsert(shared_world, "there", ("sms", new_phone(), 0))
    campaign = await launch_named(shared_world, "to-some", "sms", give(stopped, broken, without, there))
    for name, words in [
        (stopped, "has opted out on sms since "),
        (broken, "has only addresses on sms that do not work since "),
        (without, "has no subscription on sms"),
    ]:
        said = await explain(shared_world, name, campaign)
        assert said.decision == Explanation.NOT_IN_AUDIENCE
        assert steps_of(said) == [("IN_AUDIENCE", True), ("REACHABLE", False)]
        assert words in said.text
    assert (await explain(shared_world, there, campaign)).decision != Explanation.NOT_IN_AUDIENCE
    other = await upsert(shared_world, "other", ("sms", new_phone(), 0))
    said = await explain(shared_world, other, campaign)
    assert "is not one of 4 given contacts" in [step.text for step in said.steps][1]


async def test_what_changed_since_the_launch_is_told(shared_world: World) -> None:
    address = new_phone()
    name = await upsert(shared_world, "returned", ("sms", address, State.OPTED_OUT))
    there = await upsert(shared_world, "there", ("sms", new_phone(), 0))
    campaign = await launch_named(shared_world, "before-return", "sms", give(name, there))
    await upsert(shared_world, "returned", ("sms", address, State.ACTIVE))
    said = await explain(shared_world, name, campaign)
    assert said.decision == Explanation.NOT_IN_AUDIENCE
    assert all(step.passed for step in said.steps)
    assert "something changed since" in said.text


async def test_draft_says_who_would_be_messaged(shared_world: World) -> None:
    client = shared_world.client
    listed = await client.lists.CreateList(
        lists_pb2.CreateListRequest(parent="apps/acme", list_id="asked", list=lists_pb2.List(display_name="x"))
    )
    name = await upsert(shared_world, "asked", ("sms", new_phone(), 0))
    audiences = {
        "is not in the list asked": campaigns_pb2.Audience(list=listed.name),
        "is not one of 1 given contacts": give("apps/acme/contacts/there"),
        "is not a recipient of source-sms": campaigns_pb2.Audience(
            retarget={"source": "apps/acme/campaigns/source-sms", "action": "sent"}
        ),
    }
    for words, audience in audiences.items():
        draft = await shared_world.create_campaign("sms", audience)
        said = await explain(shared_world, name, draft.name)
        assert (said.decision, said.text) == (Explanation.WOULD_NOT_BE_MESSAGED, f"Would not be messaged now: {words}.")
    await client.lists.AddListContacts(lists_pb2.AddListContactsRequest(name=listed.name, contacts=["asked"]))
    for audience in (campaigns_pb2.Audience(list=listed.name), give(name), None):
        draft = await shared_world.create_campaign("sms", audience)
        said = await explain(shared_world, name, draft.name)
        assert said.decision == Explanation.WOULD_BE_MESSAGED
        assert said.text.startswith("Would be messaged now: ")
        assert "can be reached on sms" in said.text
    empty = await client.campaigns.CreateCampaign(
        campaigns_pb2.CreateCampaignRequest(parent="apps/acme", campaign=campaigns_pb2.Campaign(display_name="x", channel="sms"))
    )
    assert "the campaign has no audience" in (await explain(shared_world, name, empty.name)).text


async def test_person_who_is_held_or_had_enough_is_told(shared_world: World) -> None:
    phone = new_phone()
    name = await upsert(shared_world, "paced", ("sms", phone, State.ACTIVE))
    draft = await shared_world.create_campaign("sms", give(name))
    until = datetime.now(UTC) + timedelta(hours=5)
    async with transaction(shared_world.core.engine) as conn:
        (number,) = (await find_numbers(conn, 1, ["paced"])).values()
        await hold_addresses(conn, 1, [(number, "sms", hash_address(phone["phone"]), until)])
    said = await explain(shared_world, name, draft.name)
    assert said.decision == Explanation.WOULD_NOT_BE_MESSAGED
    assert steps_of(said) == [("IN_AUDIENCE", True), ("REACHABLE", True), ("NOT_HELD", False)]
    assert f"until {until:%Y-%m-%d %H:%M:%S} UTC" in said.text

    await upsert(shared_world, "paced", ("sms", new_phone(), State.ACTIVE))
    assert (await explain(shared_world, name, draft.name)).decision == Explanation.WOULD_BE_MESSAGED
    async with transaction(shared_world.core.engine) as conn:
        await count_messages(conn, 1, np.array([number]), 1, timedelta(hours=24))
        await conn.execute(update(apps).values(cap_messages=1, cap_hours=24))
    try:
        said = await explain(shared_world, name, draft.name)
        assert steps_of(said)[-1] == ("BELOW_FREQUENCY_CAP", False)
        assert "has had 1 of 1 messages that the app allows within 24 hours" in said.text
        code = await shared_world.create_campaign("sms", give(name), transactional=True)
        assert (await explain(shared_world, name, code.name)).decision == Explanation.WOULD_BE_MESSAGED
    finally:
        async with transaction(shared_world.core.engine) as conn:
            await conn.execute(update(apps).values(cap_messages=None, cap_hours=None))


async def test_cap_that_was_changed_is_explained_as_it_is_now(shared_world: World) -> None:
    """Who had one message was said to have had three of three, and a launch messaged them."""
    name = await upsert(shared_world, "capped", ("sms", new_phone(), State.ACTIVE))
    draft = await shared_world.create_campaign("sms", give(name))
    async with transaction(shared_world.core.engine) as conn:
        (number,) = (await find_numbers(conn, 1, ["capped"])).values()
        await count_messages(conn, 1, np.array([number]), 1, timedelta(hours=24))
    try:
        for messages, expected in ((1, Explanation.WOULD_NOT_BE_MESSAGED), (3, Explanation.WOULD_BE_MESSAGED)):
            async with transaction(shared_world.core.engine) as conn:
                await conn.execute(update(apps).values(cap_messages=messages, cap_hours=24))
            assert (await explain(shared_world, name, draft.name)).decision == expected
    finally:
        async with transaction(shared_world.core.engine) as conn:
            await conn.execute(update(apps).values(cap_messages=None, cap_hours=None))


async def test_skipped_person_is_told_with_the_reason(shared_world: World) -> None:
    name = await upsert(shared_world, "nameless", ("sms", new_phone(), 0))
    campaign = campaigns_pb2.Campaign(
        display_name="x", channel="sms", content=to_struct({"body": "{{ nowhere }}"}), audience=give(name)
    )
    made = await shared_world.client.campaigns.CreateCampaign(
        campaigns_pb2.CreateCampaignRequest(parent="apps/acme", campaign=campaign)
    )
    await shared_world.launch(made.name)
    said = await explain(shared_world, name, made.name)
    assert (said.decision, list(said.reasons)) == (Explanation.SKIPPED, ["content/missing_attribute"])
    assert "was skipped when the turn came: content/missing_attribute" in said.text
    assert [event.signal for event in said.events] == ["skipped"]
    assert not said.attempts


async def test_events_that_take_too_long_to_find_are_said_to_be_missing(
    shared_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "apps/acme/campaigns/source-sms"
    (external_id, recipient), *_ = (await shared_world.read_recipients(source)).items()
    monkeypatch.setattr(explanations, "LONGEST_LOOK", timedelta(milliseconds=200))
    async with transaction(shared_world.core.engine) as conn:
        await conn.exec_driver_sql("LOCK TABLE events IN ACCESS EXCLUSIVE MODE")
        said = await explain(shared_world, f"apps/acme/contacts/{external_id}", source)
    assert (said.events_incomplete, list(said.events)) == (True, [])
    assert (list(said.signals), bool(said.attempts)) == (list(recipient.signals), True)
    assert said.decision == (await explain(shared_world, f"apps/acme/contacts/{external_id}", source)).decision


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "question"),
        ({"campaign": "x"}, "campaign"),
        ({"retarget": {"channel": "sms"}}, "retarget.selection"),
        (
            {"retarget": {"channel": "fax", "selection": {"source": "apps/acme/campaigns/source-sms", "action": "x"}}},
            "retarget.channel",
        ),
        (
            {"retarget": {"channel": "sms", "selection": {"source": "apps/acme/campaigns/source-sms", "action": "x"}}},
            "retarget.selection.action",
        ),
    ],
)
async def test_faulty_question_is_refused_with_its_path(shared_world: World, fields: Any, path: str) -> None:
    name = await upsert(shared_world, "questioned")
    request = contacts_pb2.ExplainContactRequest(name=name, **fields)
    assert path in (await refuse(shared_world.client.contacts.ExplainContact(request))).fields


async def test_retarget_that_cannot_be_made_is_refused_with_the_same_reason(shared_world: World) -> None:
    name = await upsert(shared_world, "refused")
    draft = await shared_world.create_campaign("sms")
    selection = campaigns_pb2.RetargetSelection(source=draft.name, action="delivered")
    assert (await refuse(explain_retarget(shared_world, name, "sms", selection))).reason == "SOURCE_NOT_SENT"
    async with transaction(shared_world.core.engine) as conn:
        await conn.execute(update(apps).values(retargetable_since=datetime.now(UTC) + timedelta(hours=1)))
    selection.source = "apps/acme/campaigns/source-sms"
    try:
        assert (await refuse(explain_retarget(shared_world, name, "sms", selection))).reason == "SOURCE_BEFORE_PLAN"
    finally:
        async with transaction(shared_world.core.engine) as conn:
            await conn.execute(update(apps).values(retargetable_since=datetime(2020, 1, 1, tzinfo=UTC)))


async def test_nobody_is_explained(shared_world: World) -> None:
    refusal = await refuse(explain(shared_world, "apps/acme/contacts/nobody-at-all", "apps/acme/campaigns/source-sms"))
    assert refusal.metadata == {"resource": "apps/acme/contacts/nobody-at-all"}
    name = await upsert(shared_world, "asks")
    assert (await refuse(explain(shared_world, name, "apps/acme/campaigns/never"))).reason == "RESOURCE_NOT_FOUND"
