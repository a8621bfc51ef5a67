"""Events from callers: whom they are about, which are left out and why, and that repeats and disorder change nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from aftertouch.client import Client
from aftertouch.config import Config
from aftertouch.plugins import discover_channels
from aftertouch.server import serve
from aftertouch.store.apps import create_app, find_app
from aftertouch.store.campaigns import create_campaign, find_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.logs import Attempt, store_attempts
from aftertouch.v1 import campaigns_pb2, contacts_pb2, events_pb2
from aftertouch.web.server import bind
from tests.fix_world import SECRET_KEY, World
from tests.refusals import refuse

Reason = events_pb2.RejectedEvent.Reason


@dataclass
class Sent:
    """A campaign that was sent, its people in their order, and a token for each."""

    world: World
    name: str
    people: list[str]
    tokens: list[str]

    async def signals(self) -> dict[str, set[str]]:
        return {name: set(found.signals) for name, found in (await self.world.read_recipients(self.name)).items()}

    def target(self, index: int) -> events_pb2.RecipientTarget:
        return events_pb2.RecipientTarget(campaign=self.name, external_id=self.people[index])


async def send_one(world: World, channel: str) -> Sent:
    draft = await world.create_campaign(channel)
    await world.launch(draft.name)
    people = list(await world.read_recipients(draft.name))
    async with transaction(world.core.engine) as conn:
        app = await find_app(conn, "acme")
        assert app is not None
        campaign = await find_campaign(conn, app.app_id, draft.name.rpartition("/")[2])
        assert campaign is not None
    return Sent(world, draft.name, people, world.core.ledger.tokens.make(campaign.campaign_id, np.arange(len(people))))


@pytest.fixture
async def push(shared_world: World) -> Sent:
    return await send_one(shared_world, "push")


async def ingest(world: World, *events: events_pb2.Event) -> events_pb2.IngestEventsResponse:
    return await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=events))


def read_rejections(answer: events_pb2.IngestEventsResponse) -> list[tuple[int, str]]:
    assert all(rejection.description for rejection in answer.rejections)
    return [(rejection.index, Reason.Name(rejection.reason)) for rejection in answer.rejections]


async def test_event_by_the_message_of_a_test_is_rejected(shared_world: World) -> None:
    """It was taken, into a place that all apps have in common."""
    sent = await send_one(shared_world, "sms")
    request = campaigns_pb2.SendTestRequest(name=sent.name, contact=f"apps/acme/contacts/{sent.people[0]}")
    (test,) = (await shared_world.client.campaigns.SendTest(request)).outcomes
    target = events_pb2.MessageTarget(channel="sms", message_id=test.message_id)
    answer = await ingest(shared_world, events_pb2.Event(message=target, signal="delivered"))
    assert (answer.accepted_count, read_rejections(answer)) == (0, [(0, "NOT_A_RECIPIENT")])


async def test_event_by_message_is_about_the_apps_own(shared_world: World) -> None:
    """Two accounts had given one id, and one app's event was rejected; and an app could tell which ids others have."""
    await send_one(shared_world, "sms")
    async with transaction(shared_world.core.engine) as conn:
        app = await create_app(conn, "neighbour", "Neighbour")
        campaign = await create_campaign(conn, app.app_id, "sale", {"display_name": "Sale", "channel": "sms"})
        own = "SELECT message_id FROM attempts WHERE channel = 'sms' AND message_id <> '' ORDER BY arrive_time DESC LIMIT 1"
        shared = (await conn.execute(text(own))).scalar_one()
        attempts = [Attempt(campaign.campaign_id << 20, 7, 1, b"hash", "sms", message_id) for message_id in (shared, "SMtheirs")]
        await store_attempts(conn, attempts)
    targets = [events_pb2.MessageTarget(channel="sms", message_id=message_id) for message_id in (shared, "SMtheirs")]
    answer = await ingest(shared_world, *(events_pb2.Event(message=target, signal="delivered") for target in targets))
    assert (answer.accepted_count, read_rejections(answer)) == (1, [(1, "MESSAGE_UNKNOWN")])


async def test_event_by_token_and_by_external_id_become_true_with_what_they_imply(shared_world: World, push: Sent) -> None:
    by_token = events_pb2.Event(token=push.tokens[0], signal="clicked")
    by_name = events_pb2.Event(recipient=push.target(1), signal="confirmed")
    answer = await ingest(shared_world, by_token, by_name)
    assert (answer.accepted_count, read_rejections(answer)) == (2, [])
    signals = await push.signals()
    assert signals[push.people[0]] >= {"clicked", "confirmed", "sent", "attempted"}
    assert signals[push.people[1]] >= {"confirmed", "sent", "attempted"}


async def test_every_reason_of_a_rejection_is_told_with_its_place(shared_world: World, push: Sent) -> None:
    silent = next(person.external_id for person in shared_world.sandbox.population if "push" not in person.channels)
    draft = await shared_world.create_campaign("push")
    early = (await shared_world.get_campaign(push.name)).launch_time.seconds - 400
    unknown = events_pb2.RecipientTarget(campaign="apps/acme/campaigns/none", external_id=push.people[0])
    foreign = events_pb2.RecipientTarget(campaign="apps/other/campaigns/none", external_id=push.people[0])
    nameless = events_pb2.RecipientTarget(campaign="none", external_id=push.people[0])
    unheard = events_pb2.MessageTarget(channel="push", message_id="never sent")
    unsent = events_pb2.RecipientTarget(campaign=draft.name, external_id=push.people[0])
    events = [
        (events_pb2.Event(token="x", signal="clicked"), "TOKEN_INVALID"),
        (events_pb2.Event(token="", signal="clicked"), "TOKEN_INVALID"),
        (events_pb2.Event(token="A" * 22 + "==", signal="clicked"), "TOKEN_INVALID"),
        (events_pb2.Event(token=push.tokens[0][:-1] + "é", signal="clicked"), "TOKEN_INVALID"),
        (events_pb2.Event(token=push.tokens[0], signal="clicked"), None),
        (events_pb2.Event(token=push.tokens[0] + "A", signal="clicked"), "TOKEN_INVALID"),
        (events_pb2.Event(recipient=unknown, signal="clicked"), "CAMPAIGN_UNKNOWN"),
        (events_pb2.Event(recipient=unsent, signal="clicked"), "CAMPAIGN_UNKNOWN"),
        (events_pb2.Event(recipient=foreign, signal="clicked"), "CAMPAIGN_UNKNOWN"),
        (events_pb2.Event(recipient=nameless, signal="clicked"), "CAMPAIGN_UNKNOWN"),
        (events_pb2.Event(message=unheard, signal="clicked"), "MESSAGE_UNKNOWN"),
        (events_pb2.Event(recipient={"campaign": push.name, "external_id": "nobody"}, signal="clicked"), "CONTACT_UNKNOWN"),
        (events_pb2.Event(recipient={"campaign": push.name, "external_id": silent}, signal="clicked"), "NOT_A_RECIPIENT"),
        (events_pb2.Event(recipient=push.target(1), signal="clicked"), None),
        (events_pb2.Event(token=push.tokens[0], signal="read"), "SIGNAL_UNKNOWN"),
        (events_pb2.Event(token=push.tokens[0], signal="attempted"), "SIGNAL_UNKNOWN"),
        (events_pb2.Event(token=push.tokens[0], signal="skipped"), "SIGNAL_UNKNOWN"),
        (events_pb2.Event(token=push.tokens[0], signal="clicked", time={"seconds": early}), "TIME_OUT_OF_RANGE"),
        (events_pb2.Event(token=push.tokens[0], signal="clicked", time={"seconds": early + 10**6}), "TIME_OUT_OF_RANGE"),
        (events_pb2.Event(token=push.tokens[0], signal="clicked", time={"seconds": 253_402_300_799}), "TIME_OUT_OF_RANGE"),
        (events_pb2.Event(token=push.tokens[0], signal="clicked", time={"seconds": -62_135_596_800}), "TIME_OUT_OF_RANGE"),
        (events_pb2.Event(token=push.tokens[2], signal="clicked", time={"seconds": early + 400}), None),
    ]
    answer = await ingest(shared_world, *(event for event, _ in events))
    expected = [(index, reason) for index, (_, reason) in enumerate(events) if reason]
    assert read_rejections(answer) == expected
    assert answer.accepted_count == len(events) - len(expected)


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (events_pb2.Event(signal="clicked"), "MALFORMED"),
        (events_pb2.Event(token="x"), "MALFORMED"),
        (events_pb2.Event(token="x", signal="s" * 65), "MALFORMED"),
        (events_pb2.Event(token="x", signal="s", reason_code="r" * 65), "MALFORMED"),
        (events_pb2.Event(token="x", signal="s", reason_code="r\0"), "MALFORMED"),
        (events_pb2.Event(token="x\0", signal="clicked"), "TOKEN_INVALID"),
        (events_pb2.Event(message={"channel": "sms"}, signal="s"), "MALFORMED"),
        (events_pb2.Event(message={"channel": "sms", "message_id": "m" * 257}, signal="s"), "MALFORMED"),
        (events_pb2.Event(message={"channel": "sms\0", "message_id": "m"}, signal="s"), "MESSAGE_UNKNOWN"),
        (events_pb2.Event(recipient={"campaign": "apps/acme/campaigns/x"}, signal="s"), "MALFORMED"),
        (
            events_pb2.Event(recipient={"campaign": "apps/acme/campaigns/x\0", "external_id": "y\0"}, signal="s"),
            "CONTACT_UNKNOWN",
        ),
    ],
)
async def test_malformed_event_is_left_out_and_the_others_are_stored(
    shared_world: World, push: Sent, event: events_pb2.Event, reason: str
) -> None:
    good = events_pb2.Event(token=push.tokens[0], signal="clicked")
    assert read_rejections(await ingest(shared_world, event, good)) == [(0, reason)]
    assert "clicked" in (await push.signals())[push.people[0]]


@pytest.mark.parametrize("time", [{"seconds": 1 << 62}, {"seconds": -(1 << 62)}])
async def test_time_that_no_timestamp_holds_is_out_of_range(shared_world: World, push: Sent, time: dict[str, int]) -> None:
    event = events_pb2.Event(token=push.tokens[0], signal="clicked", time=time)
    assert read_rejections(await ingest(shared_world, event)) == [(0, "TIME_OUT_OF_RANGE")]


async def test_batch_of_none_or_too_many_is_refused(shared_world: World) -> None:
    assert list((await refuse(ingest(shared_world))).fields) == ["events"]
    many = [events_pb2.Event(token="x", signal="clicked")] * 10_001
    assert list((await refuse(ingest(shared_world, *many))).fields) == ["events"]
    assert len((await ingest(shared_world, *many[:-1])).rejections) == 10_000


async def test_events_again_and_in_any_order_change_nothing(shared_world: World, push: Sent) -> None:
    dice = random.Random(5)
    wanted = [
        events_pb2.Event(token=token, signal=signal)
        for token in push.tokens
        for signal in ("confirmed", "clicked", "dismissed")
        if dice.random() < 0.5
    ]
    await ingest(shared_world, *wanted)
    before, counts = await push.signals(), (await shared_world.get_campaign(push.name)).counts
    for _ in range(3):
        dice.shuffle(wanted)
        answer = await ingest(shared_world, *wanted, *wanted[: len(wanted) // 2])
        assert answer.accepted_count == len(wanted) + len(wanted) // 2
    assert await push.signals() == before
    assert (await shared_world.get_campaign(push.name)).counts == counts


async def test_failure_with_a_code_that_nobody_knows_is_kept_under_its_code(shared_world: World) -> None:
    sms = await send_one(shared_world, "sms")
    codes = {"30005": "recipient_gone/30005", "98765": "unknown/98765", "": "unknown/unknown", "é' --": "unknown/é' --"}
    events = [
        events_pb2.Event(token=token, signal="failed", reason_code=code) for token, code in zip(sms.tokens, codes, strict=False)
    ]
    assert (await ingest(shared_world, *events)).accepted_count == len(codes)
    recipients = await shared_world.read_recipients(sms.name)
    for person, reason in zip(sms.people, codes.values(), strict=False):
        assert reason in recipients[person].reasons
        assert "failed" in recipients[person].signals


async def test_reported_failure_changes_nobodys_subscription(shared_world: World) -> None:
    """Only providers say that an address is gone; a caller who knows it says so with UpsertContacts."""
    sms = await send_one(shared_world, "sms")
    contact = contacts_pb2.GetContactRequest(name=f"apps/acme/contacts/{sms.people[-1]}")
    before = (await shared_world.client.contacts.GetContact(contact)).subscriptions
    await ingest(shared_world, events_pb2.Event(token=sms.tokens[-1], signal="failed", reason_code="21610"))
    assert (await shared_world.client.contacts.GetContact(contact)).subscriptions == before


async def test_token_of_another_app_is_not_valid(shared_world: World, push: Sent) -> None:
    async with shared_world.connect("thief", await shared_world.create_key("thief", "ingest")) as thief:
        request = events_pb2.IngestEventsRequest(
            parent=thief.parent, events=[events_pb2.Event(token=push.tokens[3], signal="clicked")]
        )
        before = await push.signals()
        assert read_rejections(await thief.events.IngestEvents(request)) == [(0, "TOKEN_INVALID")]
        assert await push.signals() == before


@asynccontextmanager
async def open_without_push(world: World) -> AsyncIterator[Client]:
    """A second server on the same database that knows sms only."""
    url = world.core.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    config = Config(database_url=SecretStr(url), secret_key=SecretStr(SECRET_KEY), grpc_address="127.0.0.1:0", send_units=0)
    discovery = discover_channels(allowed=frozenset({"sms"}))
    stopping, listener = asyncio.Event(), bind("127.0.0.1:0")
    async with (
        serve(config, discovery, world.sandbox.environment, stopping, listener) as (_, addresses),
        Client(addresses.grpc, api_key=world.secret, app="acme") as client,
    ):
        yield client


async def test_event_of_a_channel_that_was_taken_out_is_a_signal_unknown(shared_world: World, push: Sent) -> None:
    async with open_without_push(shared_world) as client:
        request = events_pb2.IngestEventsRequest(
            parent="apps/acme", events=[events_pb2.Event(token=push.tokens[0], signal="clicked")]
        )
        assert read_rejections(await client.events.IngestEvents(request)) == [(0, "SIGNAL_UNKNOWN")]
        sent = await client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=push.name))
        assert (sent.channel, sent.counts.recipients) == ("push", len(push.people))
        listed = await client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=push.name))
        assert len(listed.recipients) == min(50, len(push.people))
