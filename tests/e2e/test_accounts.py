"""Apps with accounts of their own: what they set is kept from everybody, and what one account is told holds for nobody else."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aftertouch_sms import SmsAddress, SmsChannel
from sqlalchemy import text
from twilio.request_validator import RequestValidator

from aftertouch.channels import Standing, Webhook
from aftertouch.client import Client
from aftertouch.contact_files import read_contacts
from aftertouch.delivery import sender
from aftertouch.delivery.launch import launch, launch_due
from aftertouch.delivery.reconciliation import Reconciler
from aftertouch.delivery.trial import send_test
from aftertouch.errors import ChannelNotReady
from aftertouch.ingest import accounts
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings, TwilioAccount
from aftertouch.store.apps import find_app
from aftertouch.store.audit import list_entries
from aftertouch.store.campaigns import find_campaign, update_campaign
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2, channels_pb2, contacts_pb2
from tests.e2e.spools import count_rows, wait_until_drained
from tests.e2e.test_spool import stop_backends, take_away
from tests.fix_world import CONTENT, OpenWorld, World
from tests.refusals import refuse
from tests.sandbox.conftest import CERTAIN

State = channels_pb2.Channel.State
PHONE = "+16502530000"
RIVAL_SECRET = "the-secret-of-a-rival"
RIVAL = {"account_sid": "AC" + "1" * 32, "auth_token": RIVAL_SECRET, "sender": "+15005550009"}
NOBODYS = {f"AFTERTOUCH_SMS_{name}": "" for name in ("ACCOUNT_SID", "AUTH_TOKEN", "MESSAGING_SERVICE_SID", "SENDER")}
"""The operator has no account at Twilio, but says where Twilio is."""


@dataclass
class House:
    """A world whose server has no account for SMS, and of whose apps ``acme`` has the sandbox's."""

    world: World
    settings: SandboxSettings
    rival: Client

    @property
    def own(self) -> dict[str, str]:
        return find_own(self.settings)

    async def report_once(self, app: str, secret: str, form: dict[str, str], query: str = "") -> int:
        """Report something as Twilio does to an app's own address, and return the answer's status."""
        url = f"{self.world.addresses.public_url}/v1/apps/{app}/webhooks/sms{query}"
        headers = {"X-Twilio-Signature": RequestValidator(secret).compute_signature(url, form)}
        async with aiohttp.ClientSession() as http, http.post(url, data=form, headers=headers) as response:
            return response.status

    async def report(self, app: str, secret: str, form: dict[str, str], query: str = "") -> int:
        """The same, again and again while a crowded machine's database does not answer in time, and until it is stored."""
        async with asyncio.timeout(60):
            while (status := await self.report_once(app, secret, form, query)) == 503:  # noqa: ASYNC110
                await asyncio.sleep(0.5)
        await self.world.wait_until_stored()
        return status


def find_own(settings: SandboxSettings) -> dict[str, str]:
    """The sandbox's account at Twilio."""
    return {name: getattr(settings, name) for name in ("account_sid", "auth_token", "messaging_service_sid")}


async def set_own(client: Client, channel: str = "sms", **values: str) -> channels_pb2.ChannelSettings:
    given = channels_pb2.ChannelSettings(name=f"{client.parent}/channelSettings/{channel}", values=values)
    return await client.channels.UpdateChannelSettings(channels_pb2.UpdateChannelSettingsRequest(channel_settings=given))


async def get_channel(client: Client) -> channels_pb2.Channel:
    return await client.channels.GetChannel(channels_pb2.GetChannelRequest(name="channels/sms"))


async def delete_own(client: Client) -> None:
    request = channels_pb2.DeleteChannelSettingsRequest(name=f"{client.parent}/channelSettings/sms")
    await client.channels.DeleteChannelSettings(request)


async def read_standing(client: Client) -> str:
    """What the person behind the phone is to an app."""
    contact = await client.contacts.GetContact(contacts_pb2.GetContactRequest(name=f"{client.parent}/contacts/ada"))
    return contacts_pb2.Subscription.State.Name(contact.subscriptions[0].state)


async def import_ada(client: Client) -> None:
    subscription = contacts_pb2.Subscription(channel="sms")
    subscription.address.update({"phone": PHONE})
    contact = contacts_pb2.Contact(external_id="ada", subscriptions=[subscription])
    await client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=[contact]))


@pytest.fixture
async def house(open_world: OpenWorld) -> AsyncIterator[House]:
    settings = SandboxSettings(size=20, time_scale=0.02, shares=CERTAIN)
    async with open_world(settings, environment=NOBODYS) as world:
        secret = await world.create_key("rival", "admin")
        async with world.connect("rival", secret) as rival:
            yield House(world, settings, rival)


async def test_app_sends_and_hears_through_its_own_account(house: House) -> None:
    world = house.world
    assert (await get_channel(world.client)).state == State.NOT_CONFIGURED
    told = await set_own(world.client, **house.own)
    assert told.webhook_url == f"{world.addresses.public_url}/v1/apps/acme/webhooks/sms"
    assert list(told.set_values) == sorted(house.own)
    assert list(told.problems) == []
    assert (await get_channel(world.client)).state == State.READY
    assert (await get_channel(house.rival)).state == State.NOT_CONFIGURED
    await world.import_people()
    campaign = await world.create_campaign("sms")
    await world.launch(campaign.name)
    counts = (await world.get_campaign(campaign.name)).counts
    assert counts.recipients > 0
    people = await world.read_recipients(campaign.name)
    # Delivered is known only from callbacks, which came to the app's own address and were signed with its own token.
    async with asyncio.timeout(60):
        while not all("delivered" in person.signals for person in people.values()):
            await asyncio.sleep(0.1)
            people = await world.read_recipients(campaign.name)


async def test_secrets_are_returned_by_nothing_and_stored_for_nobody_to_read(house: House) -> None:
    client = house.world.client
    answers: list[Any] = [await set_own(client, **house.own)]
    name = f"{client.parent}/channelSettings/sms"
    answers.append(await client.channels.GetChannelSettings(channels_pb2.GetChannelSettingsRequest(name=name)))
    answers.append(await get_channel(client))
    assert not any(secret in str(answer) for answer in answers for secret in house.own.values())
    async with transaction(house.world.core.engine) as conn:
        tables = (await conn.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))).scalars().all()
        for table in tables:
            rows = (await conn.execute(text(f'SELECT t::text FROM "{table}" t'))).scalars().all()
            secret = house.settings.auth_token
            assert not any(secret in row or secret.encode().hex() in row for row in rows), table


@pytest.mark.parametrize(
    ("values", "field", "quoted"),
    [
        ({"account_sid": "AC-hush-hush"}, "account_sid", "hush"),
        ({"auth_token": ""}, "auth_token", "nothing"),
        ({"sender": "+15005550006"}, "", "nothing"),
        ({"api_url": "http://169.254.169.254"}, "api_url", "169"),
        ({"timeout_seconds": "1"}, "timeout_seconds", "nothing"),
        ({"auth_tokn": "hush-hush"}, "auth_tokn", "hush"),
    ],
    ids=["malformed", "missing", "two senders", "the operator's address", "the operator's patience", "misspelt"],
)
async def test_settings_that_cannot_work_are_refused_without_being_quoted(
    house: House, values: dict[str, str], field: str, quoted: str
) -> None:
    refusal = await refuse(set_own(house.world.client, **(house.own | values)))
    assert refusal.reason == "FIELDS_INVALID"
    assert list(refusal.fields) == [f"channel_settings.values.{field}" if field else "channel_settings.values"]
    assert quoted not in str(refusal.fields)
    assert (await get_channel(house.world.client)).state == State.NOT_CONFIGURED


async def test_one_value_is_changed_and_the_others_stay(house: House) -> None:
    client = house.world.client
    await set_own(client, **house.own)
    changed = await set_own(client, validity_period_seconds="600", messaging_service_sid="", sender="+15005550006")
    assert list(changed.set_values) == ["account_sid", "auth_token", "sender", "validity_period_seconds"]
    await delete_own(client)
    assert (await get_channel(client)).state == State.NOT_CONFIGURED
    assert (await refuse(delete_own(client))).reason == "RESOURCE_NOT_FOUND"
    assert (await refuse(set_own(client, "fax", x="y"))).reason == "RESOURCE_NOT_FOUND"


async def test_only_an_admin_sets_them_and_only_for_the_own_app(house: House) -> None:
    world = house.world
    async with world.connect("acme", await world.create_key("acme", "manage")) as manager:
        assert (await refuse(set_own(manager, **house.own))).reason == "SCOPE_INSUFFICIENT"
    given = channels_pb2.ChannelSettings(name="apps/acme/channelSettings/sms", values=RIVAL)
    request = channels_pb2.UpdateChannelSettingsRequest(channel_settings=given)
    assert (await refuse(house.rival.channels.UpdateChannelSettings(request))).reason == "RESOURCE_NOT_FOUND"


async def test_account_of_one_app_can_say_nothing_of_anothers_messages(house: House) -> None:
    world = house.world
    await set_own(world.client, **house.own)
    await set_own(house.rival, **RIVAL)
    await import_ada(world.client)
    campaign = await world.create_campaign("sms")
    await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=campaign.name))
    await world.wait_until_sent(campaign.name)
    await world.hear_all()
    async with transaction(world.core.engine) as conn:
        number = (await conn.execute(text("SELECT campaign_id FROM campaigns"))).scalar_one()
        message_id = (await conn.execute(text("SELECT message_id FROM attempts"))).scalar_one()
    (token,) = world.core.ledger.tokens.make(number, np.array([0]))
    failed = {"MessageStatus": "failed", "ErrorCode": "21610"}
    before = await world.read_recipients(campaign.name)
    # By a token that it saw somewhere, and by Twilio's id.
    assert await house.report("rival", RIVAL_SECRET, {**failed, "MessageSid": "SM" + "9" * 32}, f"?t={token}") == 204
    assert await house.report("rival", RIVAL_SECRET, {**failed, "MessageSid": message_id}) == 204
    # With the rival's signature at the other's address, and the other way round.
    assert await house.report("acme", RIVAL_SECRET, {**failed, "MessageSid": message_id}) == 403
    assert await house.report("rival", house.settings.auth_token, {**failed, "MessageSid": message_id}) == 403
    assert await house.report("nobody", RIVAL_SECRET, failed) == 404
    assert await world.read_recipients(campaign.name) == before
    assert await read_standing(world.client) == "ACTIVE"
    # The same from the account itself counts.
    assert await house.report("acme", house.settings.auth_token, {**failed, "MessageSid": message_id}) == 204
    assert "failed" in (await world.read_recipients(campaign.name))["ada"].signals
    assert await read_standing(world.client) == "OPTED_OUT"


@pytest.mark.parametrize("take", [take_away, stop_backends])
async def test_what_an_apps_account_reports_in_an_outage_is_kept_and_is_still_that_apps(
    open_world: OpenWorld,
    database_url: str,
    tmp_path: Path,
    take: Callable[[str], AbstractAsyncContextManager[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It has to be looked at anew for each webhook, and cannot be.
    monkeypatch.setattr(accounts, "KEEP_SECONDS", 0.0)
    settings = SandboxSettings(size=5, time_scale=0.02, shares=CERTAIN)
    async with (
        open_world(settings, data_dir=tmp_path) as world,
        world.connect("rival", await world.create_key("rival", "admin")) as rival,
    ):
        house = House(world, settings, rival)
        await set_own(world.client, **house.own)
        await set_own(rival, **RIVAL)
        await world.import_people()
        campaign = await world.create_campaign("sms")
        await world.launch(campaign.name)
        tokens = [entry.token for entry in world.sandbox.truth.entries]
        assert len(tokens) == 5
        failed = {"MessageStatus": "failed", "ErrorCode": "30003", "MessageSid": "SM" + "9" * 32}
        assert await house.report("acme", settings.auth_token, {"MessageStatus": "sending", "MessageSid": "SM1"}) == 204
        assert await house.report("rival", RIVAL_SECRET, {"MessageStatus": "sending", "MessageSid": "SM1"}) == 204
        async with take(database_url):
            assert await house.report_once("rival", RIVAL_SECRET, failed, f"?t={tokens[0]}") == 204
            assert await house.report_once("acme", settings.auth_token, failed, f"?t={tokens[1]}") == 204
            assert await house.report_once("acme", RIVAL_SECRET, failed, f"?t={tokens[2]}") == 403
            # Where backends hang, new connections may find one that does not.
            assert count_rows(tmp_path) == 2 or take is stop_backends
        await wait_until_drained(tmp_path)
        signals = (await world.get_campaign(campaign.name)).counts.signals
        assert (signals["delivered"], signals["failed"]) == (5, 1)


async def test_stop_to_one_account_ends_nothing_at_another(house: House) -> None:
    await set_own(house.world.client, **house.own)
    await set_own(house.rival, **RIVAL)
    for client in (house.world.client, house.rival):
        await import_ada(client)
    stop = {"SmsStatus": "received", "From": PHONE, "To": RIVAL["sender"], "Body": "STOP", "MessageSid": "SM" + "9" * 32}
    assert await house.report("rival", RIVAL_SECRET, stop) == 204
    assert (await read_standing(house.rival), await read_standing(house.world.client)) == ("OPTED_OUT", "ACTIVE")


async def test_stop_to_the_servers_account_ends_nothing_where_an_app_has_its_own(open_world: OpenWorld) -> None:
    settings = SandboxSettings(size=20, time_scale=0.02, shares=CERTAIN)
    async with open_world(settings) as world:
        secret = await world.create_key("rival", "admin")
        async with world.connect("rival", secret) as rival:
            await set_own(rival, **RIVAL)
            for client in (world.client, rival):
                await import_ada(client)
            service = settings.messaging_service_sid
            form = {"SmsStatus": "received", "From": PHONE, "MessagingServiceSid": service, "Body": "STOP", "MessageSid": "SM1"}
            url = f"{world.addresses.public_url}/v1/webhooks/sms"
            headers = {"X-Twilio-Signature": RequestValidator(settings.auth_token).compute_signature(url, form)}
            async with aiohttp.ClientSession() as http, http.post(url, data=form, headers=headers) as response:
                assert response.status == 204
            await world.wait_until_stored()
            assert (await read_standing(world.client), await read_standing(rival)) == ("OPTED_OUT", "ACTIVE")


async def test_unheard_messages_are_asked_about_at_the_account_that_sent_them(open_world: OpenWorld) -> None:
    settings = SandboxSettings(size=10, time_scale=0.02, shares=CERTAIN, strict_retries=True, duplicate_share=0)
    # Nobody answers there, so every callback is given up.
    async with open_world(settings, environment=NOBODYS, public_url="http://127.0.0.1:9") as world:
        await set_own(world.client, **find_own(settings))
        core = world.core
        reconciler = Reconciler(*(core.engine, core.ledger, core.registry, core.context.accounts), [timedelta(0)])
        await reconciler.check()
        await world.import_people()
        campaign = await world.create_campaign("sms")
        await world.launch(campaign.name)
        assert (await world.get_campaign(campaign.name)).counts.signals["delivered"] == 0
        await reconciler.check()
        assert (await world.get_campaign(campaign.name)).counts.signals["delivered"] == 10


async def test_settings_that_cannot_be_opened_any_more_pause_what_is_being_sent(house: House) -> None:
    world = house.world
    await set_own(world.client, **house.own)
    await import_ada(world.client)
    campaign = await world.create_campaign("sms")
    async with transaction(world.core.engine) as conn:
        sealed = "sealed || '\\x00'::bytea, secret_id = DEFAULT"
        await conn.execute(text(f"UPDATE app_secrets SET sealed = {sealed} WHERE name = 'settings/sms'"))
    refusal = await refuse(world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=campaign.name)))
    assert refusal.reason == "CHANNEL_NOT_READY"
    channel = await get_channel(world.client)
    assert channel.state == State.NOT_CONFIGURED
    assert "AFTERTOUCH_SECRET_KEY" in channel.problems[0]
    # A launch that was planned meets it when it is due, and pauses with the reason instead of using anybody else's account.
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("UPDATE campaigns SET state = 'SCHEDULED', schedule_time = now()"))
    async with asyncio.timeout(60):
        while (found := await world.get_campaign(campaign.name)).state != campaigns_pb2.Campaign.State.PAUSED:  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    assert "AFTERTOUCH_SECRET_KEY" in found.state_reason
    # Set anew, it goes on.
    await set_own(world.client, **house.own)
    await world.client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=campaign.name))
    await world.wait_until_sent(campaign.name)
    assert "sent" in (await world.read_recipients(campaign.name))["ada"].signals


@dataclass
class Tenant:
    """An app with everybody as its contacts."""

    world: World
    client: Client

    async def create_campaign(self) -> str:
        """A text to everybody."""
        campaign = campaigns_pb2.Campaign(
            display_name="Sale",
            channel="sms",
            content=to_struct(CONTENT["sms"]),
            audience=campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers()),
        )
        request = campaigns_pb2.CreateCampaignRequest(parent=self.client.parent, campaign=campaign)
        return (await self.client.campaigns.CreateCampaign(request)).name

    async def get(self, name: str) -> campaigns_pb2.Campaign:
        return await self.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))

    async def send(self, name: str) -> campaigns_pb2.Campaign:
        """Launch a campaign, and wait until all is sent and all is heard that is going to be heard."""
        await self.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
        async with asyncio.timeout(120):
            while (await self.get(name)).state == campaigns_pb2.Campaign.State.SENDING:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await self.world.hear_all()
        return await self.get(name)


@asynccontextmanager
async def open_tenants(world: World, *apps: str) -> AsyncIterator[list[Tenant]]:
    """Apps whose people are all the same: the sandbox's."""
    async with AsyncExitStack() as stack:
        tenants = []
        for app in apps:
            client = await stack.enter_async_context(world.connect(app, await world.create_key(app, "admin")))
            assert (await client.import_contacts(read_contacts(world.sandbox.population.list_rows()))).rejected_count == 0
            tenants.append(Tenant(world, client))
        yield tenants


async def count_texts(world: World, *accounts: TwilioAccount) -> list[int]:
    """How many messages each account was given, as it says itself."""
    counts = []
    for account in accounts:
        url = f"{world.sandbox.url}/2010-04-01/Accounts/{account.account_sid}/Messages.json?PageSize=1000"
        headers = {"Authorization": aiohttp.encode_basic_auth(account.account_sid, account.auth_token)}
        async with aiohttp.ClientSession(headers=headers) as http, http.get(url) as response:
            counts.append(len((await response.json())["messages"]))
    return counts


NORTH = TwilioAccount(account_sid="AC" + "a" * 32, auth_token="the-token-of-north", sender="+13125550101")
SOUTH = TwilioAccount(account_sid="AC" + "b" * 32, auth_token="the-token-of-south", sender="+13125550102")


async def test_apps_on_two_accounts_send_hear_and_pace_apart_from_each_other(open_world: OpenWorld) -> None:
    settings = SandboxSettings(size=10, time_scale=0.02, shares=CERTAIN, duplicate_share=0, more_accounts=(NORTH, SOUTH))
    environment = {"AFTERTOUCH_SMS_MESSAGES_PER_SECOND": "200"}
    async with (
        open_world(settings, environment=environment) as world,
        open_tenants(world, "north", "south", "acme") as (north, south, acme),
    ):
        await set_own(north.client, **vars(NORTH), messages_per_second="200")
        await set_own(south.client, **vars(SOUTH), messages_per_second="200")
        for tenant in (north, south, acme):
            campaign = await tenant.send(await tenant.create_campaign())
            assert (campaign.counts.signals["sent"], campaign.counts.signals["delivered"]) == (10, 10)
        shared = TwilioAccount(account_sid=settings.account_sid, auth_token=settings.auth_token, sender="")
        assert await count_texts(world, NORTH, SOUTH, shared) == [10, 10, 10]
        async with transaction(world.core.engine) as conn:
            limits = set((await conn.execute(text("SELECT key FROM paces WHERE key LIKE 'sms/%'"))).scalars())
            apps = {row.app: row.app_id for row in await conn.execute(text("SELECT app, app_id FROM apps"))}
        # A limit of one account holds up no other.
        assert limits == {"sms/account", f"sms/apps/{apps['north']}/account", f"sms/apps/{apps['south']}/account"}
        # What somebody tells one number is told to nobody else.
        person = world.sandbox.population.get_person(1)
        assert world.sandbox.more_twilio[NORTH.account_sid].receive(person.phone, "STOP")
        await world.hear_all()
        reached = [(await tenant.send(await tenant.create_campaign())).counts.recipients for tenant in (north, south, acme)]
        assert reached == [9, 10, 10]


async def test_campaign_that_is_being_sent_goes_on_by_the_apps_new_account(
    open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The unit is not handed back for any other reason.
    monkeypatch.setattr(sender, "TURN_SECONDS", 3600.0)
    # Enough that most are left when the account changes, however late that is.
    settings = SandboxSettings(
        size=60, time_scale=0.02, shares=CERTAIN, duplicate_share=0, strict_retries=True, more_accounts=(NORTH, SOUTH)
    )
    async with open_world(settings) as world, open_tenants(world, "north") as (north,):
        await set_own(north.client, **vars(NORTH), messages_per_second="1")
        sending = asyncio.create_task(north.send(await north.create_campaign()))
        async with asyncio.timeout(60):
            while (await count_texts(world, NORTH))[0] < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await set_own(north.client, **vars(SOUTH), messages_per_second="200")
        campaign = await sending
        first, second = await count_texts(world, NORTH, SOUTH)
        # Everybody was sent to, and nobody twice.
        assert (first + second, campaign.counts.signals["sent"]) == (60, 60)
        assert min(first, second) > 0
        # What the account before has still to say is taken from nobody any more.
        assert campaign.counts.signals["delivered"] >= second


async def test_channels_of_apps_are_closed_when_too_many_are_open_and_nobody_uses_them(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    async def note(channel: SmsChannel, *_: object) -> None:
        closed.append(channel.settings.account_sid)

    monkeypatch.setattr(accounts, "MOST_OPEN", 1)
    monkeypatch.setattr(SmsChannel, "__aexit__", note)
    await set_own(house.world.client, **house.own)
    await set_own(house.rival, **RIVAL)
    core = house.world.core
    found = core.context.accounts

    async def find(app: str) -> accounts.Account:
        async with transaction(core.engine) as conn:
            choice = await found.choose(conn, await find_app(conn, app), "sms")
        return await found.open(choice)

    first = await find("acme")
    assert await find("acme") is first
    with found.hold(first):
        second = await find("rival")
        await asyncio.sleep(0.1)
        assert closed == [], "somebody is sending by it"
    async with asyncio.timeout(30):
        while not closed:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert closed == [house.own["account_sid"]]
    assert await find("rival") is second
    assert await find("acme") is not first


async def test_account_that_takes_long_to_open_holds_up_nobody_else(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """More wait for it than there are connections; addresses need no provider."""
    answers = asyncio.Event()

    async def wait(channel: SmsChannel) -> SmsChannel:
        await answers.wait()
        return await opens(channel)

    opens = SmsChannel.__aenter__
    monkeypatch.setattr(SmsChannel, "__aenter__", wait)
    await set_own(house.world.client, **house.own)
    await import_ada(house.world.client)
    draft = await house.world.create_campaign("sms")
    test = campaigns_pb2.SendTestRequest(name=draft.name, contact=f"{house.world.client.parent}/contacts/ada")
    waiting = [asyncio.ensure_future(house.world.client.campaigns.SendTest(test)) for _ in range(30)]
    await asyncio.sleep(1)
    await asyncio.gather(*(import_ada(house.world.client) for _ in range(30)))
    assert (await get_channel(house.rival)).state == State.NOT_CONFIGURED
    assert await house.report("acme", house.own["auth_token"], {"MessageSid": "SM" + "0" * 32, "MessageStatus": "queued"}) < 300
    assert not any(call.done() for call in waiting)
    answers.set()
    assert {len((await call).outcomes) for call in waiting} == {1}


async def test_stops_of_two_apps_in_one_go_end_both(world: World) -> None:
    async with world.connect("rival", await world.create_key("rival", "admin")) as rival:
        await import_ada(world.client)
        subscription = contacts_pb2.Subscription(channel="sms")
        subscription.address.update({"phone": "+16502530001"})
        bob = contacts_pb2.Contact(external_id="ada", subscriptions=[subscription])
        await rival.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=rival.parent, contacts=[bob]))
        standings = [
            Standing(address=SmsAddress(phone=phone), state="opted_out", reason="STOP") for phone in (PHONE, "+16502530001")
        ]
        await world.core.ledger.ingest_webhooks("sms", [Webhook(standings=tuple(standings))])
        assert [await read_standing(client) for client in (world.client, rival)] == ["OPTED_OUT", "OPTED_OUT"]


async def test_campaign_of_a_channel_that_is_gone_waits_and_harms_nobody(house: House) -> None:
    """An app's own settings are still there when the plugin is not."""
    world = house.world
    await set_own(world.client, **house.own)
    await import_ada(world.client)
    draft = await world.create_campaign("sms")
    installed = world.core.registry
    lacking = replace(installed, types={name: found for name, found in installed.types.items() if name != "sms"}, obstacles={})
    async with transaction(world.core.engine) as conn:
        (app, campaign) = (await find_app(conn, "acme"), await find_campaign(conn, 1, draft.name.rpartition("/")[2]))
        assert app is not None
        assert campaign is not None
        with pytest.raises(ChannelNotReady, match="not installed"):
            await launch(conn, lacking, app, campaign, None)
        await update_campaign(conn, campaign.campaign_id, state="SCHEDULED", schedule_time=datetime.now(UTC))
        assert not await launch_due(conn, lacking)
    with pytest.raises(ChannelNotReady, match="not installed"):
        await send_test(*(world.core.engine, world.core.ledger, lacking, world.core.context, app, campaign, "ada"))
    async with asyncio.timeout(60):
        # There is nothing to wait on but the answer of the next call.
        while (found := await world.get_campaign(draft.name)).state != campaigns_pb2.Campaign.State.SENT:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert found.counts.recipients == 1


async def test_operator_sets_an_apps_account_and_sends_one_by_it(house: House, tmp_path: Path) -> None:
    environment = house.world.make_worker_environment(tmp_path) | NOBODYS

    def run(*arguments: str, answer: str = "") -> tuple[int, str]:
        command = [sys.executable, "-m", "aftertouch", "channels", *arguments]
        done = subprocess.run(command, env=os.environ | environment, input=answer, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    async def call(*arguments: str, answer: str = "") -> tuple[int, str]:
        return await asyncio.to_thread(run, *arguments, answer=answer)

    person = house.world.sandbox.population.get_person(1).phone
    one = ("test", "sms", "--to", person, "--content", '{"body": "Hello"}', "--app", "acme")
    assert (await call(*one))[0] == 2, "the server has no account"
    values = [f"{name}={value}" for name, value in house.own.items() if name != "auth_token"]
    assert (await call("set", "sms", *values, "--app", "acme"))[0] == 2, "the token is missing"
    status, said = await call("set", "sms", *values, "auth_token=x", "sender=+13125550101", "--app", "acme")
    assert (status, said.splitlines()[-1]) == (2, "  set either messaging_service_sid or sender")
    assert (await call("set", "sms", *values, "auth_token=-", "api_url=http://10.0.0.1", "--app", "acme", answer="x\n"))[0] == 2
    status, text = await call("set", "sms", *values, "auth_token=-", "--app", "acme", answer=f"{house.settings.auth_token}\n")
    assert status == 0, text
    assert "/v1/apps/acme/webhooks/sms" in text
    assert house.settings.auth_token not in text
    status, text = await call("--app", "acme")
    assert (status, re.findall(r"^ *sms +(\S.*?)  +(\S.*?)  ", text, re.MULTILINE)) == (0, [("ready", "its own")]), text
    status, text = await call()
    assert (status, re.findall(r"^ *sms +(\S.*?)  +(\S.*?)  ", text, re.MULTILINE)) == (0, [("not ready", "server's")]), text
    status, text = await call(*one)
    assert (status, "accepted as SM" in text) == (0, True), text
    assert len(house.world.sandbox.truth.entries) == 1
    assert (await call("unset", "sms", "--app", "acme"))[0] == 0
    assert (await call("unset", "sms", "--app", "acme"))[0] == 1
    assert (await call(*one))[0] == 2
    async with transaction(house.world.core.engine) as conn:
        entries = [(entry.actor, entry.method, entry.resource) for entry in await list_entries(conn, 1, None, 10)]
    own = "apps/acme/channelSettings/sms"
    assert entries == [
        ("command line", "Channels/DeleteChannelSettings", own),
        ("command line", "Channels/UpdateChannelSettings", own),
    ]
