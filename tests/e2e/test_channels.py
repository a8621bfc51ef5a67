"""The house's channels in a whole world: what only shows with a provider, a server and a database together."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from aftertouch_whatsapp import WhatsAppAddress
from sqlalchemy import text

from aftertouch.channels import Reply, Webhook
from aftertouch.contact_files import read_contacts
from aftertouch.delivery.reconciliation import Reconciler
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings
from aftertouch.sandbox.control import Inbound
from aftertouch.store.contacts import hash_address, set_states
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2, contacts_pb2, retargeting_pb2
from tests.fix_console import Visitor, create_user
from tests.fix_world import CONTENT, OpenWorld, World
from tests.refusals import refuse
from tests.sandbox.conftest import CERTAIN

State = campaigns_pb2.Campaign.State


def read_settings(size: int = 5) -> SandboxSettings:
    """Everybody has everything and gets everything."""
    return SandboxSettings(size=size, time_scale=0.05, shares=CERTAIN, duplicate_share=0)


async def read_limits(world: World) -> dict[str, datetime]:
    """When each limit has room again."""
    async with transaction(world.core.engine) as conn:
        rows = await conn.execute(text("SELECT key, free_time FROM paces"))
    return {row.key: row.free_time for row in rows}


async def free_limits(world: World) -> None:
    """Let every limit have room at once, and look at what waits."""
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("UPDATE paces SET free_time = now()"))
        await conn.execute(text("UPDATE send_units SET ready_time = now()"))


async def test_second_message_to_a_person_on_whatsapp_waits_for_its_turn(open_world: OpenWorld) -> None:
    environment = {"AFTERTOUCH_WHATSAPP_SECONDS_BETWEEN_MESSAGES": "3600"}
    async with open_world(read_settings(), environment=environment) as world:
        await world.import_people()
        first, second = [await world.create_campaign("whatsapp") for _ in range(2)]
        await world.launch(first.name)
        limits = await read_limits(world)
        pairs = [key for key in limits if key.startswith("whatsapp/pair/")]
        assert len(pairs) == 5
        assert limits.keys() - set(pairs) == {f"whatsapp/number/{world.sandbox.settings.phone_number_id}"}
        await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=second.name))
        while not await is_put_off(world):  # noqa: ASYNC110 - nothing to wait on but the next look
            await asyncio.sleep(0.02)
        assert len(world.sandbox.truth.entries) == 5
        await free_limits(world)
        assert (await world.wait_until_sent(second.name)).state == State.SENT
        assert set(Counter(entry.address for entry in world.sandbox.truth.entries).values()) == {2}


async def is_put_off(world: World) -> bool:
    """True when no unit is under way and all wait for longer than a second."""
    async with transaction(world.core.engine) as conn:
        rows = await conn.execute(
            text("SELECT bool_and(lease_until IS NULL AND ready_time > now() + interval '1 minute') FROM send_units")
        )
    return bool(rows.scalar())


async def test_pace_of_an_sms_account_is_kept_by_all_its_campaigns(open_world: OpenWorld) -> None:
    async with open_world(read_settings(), environment={"AFTERTOUCH_SMS_MESSAGES_PER_SECOND": "200"}) as world:
        await world.import_people()
        campaigns = [await world.create_campaign("sms") for _ in range(2)]
        for campaign in campaigns:
            await world.launch(campaign.name)
        assert (await read_limits(world)).keys() == {"sms/account"}
        assert len(world.sandbox.truth.entries) == 10


async def test_receipts_whose_webhooks_were_lost_are_asked_for(open_world: OpenWorld) -> None:
    shares = replace(CERTAIN, sms_unreachable=0.3, sms_no_report=0.2)
    settings = replace(read_settings(30), shares=shares, strict_retries=True, duplicate_share=0)
    # Nobody answers there, so every callback is given up.
    async with open_world(settings, public_url="http://127.0.0.1:9") as world:
        await world.import_people()
        reconciler = Reconciler(
            *(world.core.engine, world.core.ledger, world.core.registry, world.core.context.accounts), [timedelta(0)]
        )
        await reconciler.check()
        campaign = await world.create_campaign("sms")
        await world.launch(campaign.name)
        signals = (await world.get_campaign(campaign.name)).counts.signals
        assert (signals["sent"], signals["delivered"], signals["failed"]) == (30, 0, 0)
        await reconciler.check()
        recipients = await world.read_recipients(campaign.name)
        entries = {entry.person.external_id: entry for entry in world.sandbox.truth.entries if entry.person}
        for external_id, recipient in recipients.items():
            truth = entries[external_id].signals.keys()
            assert set(recipient.signals) & {"delivered", "failed"} == truth - {"sent"}
            assert recipient.reasons == (["transient/30003"] if "failed" in truth else [])
        counted = (await world.get_campaign(campaign.name)).counts
        # Everybody who was heard of is not asked about again, and a second look changes nothing.
        await rewind_checkups(world)
        await reconciler.check()
        assert (await world.get_campaign(campaign.name)).counts == counted


async def rewind_checkups(world: World) -> None:
    """Look at everything once more."""
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("UPDATE checkups SET checked_until = checked_until - interval '1 hour', lease_until = NULL"))


async def read_subscription(world: World, external_id: str, channel: str) -> contacts_pb2.Subscription:
    contact = await world.client.contacts.GetContact(
        contacts_pb2.GetContactRequest(name=f"{world.client.parent}/contacts/{external_id}")
    )
    (found,) = [subscription for subscription in contact.subscriptions if subscription.channel == channel]
    return found


async def write(world: World, **inbound: Any) -> None:
    """Let a person write, and wait until the server has stored it."""
    assert world.sandbox.control.write(Inbound(**inbound))
    await world.hear_all()


OPTED_OUT = contacts_pb2.Subscription.State.OPTED_OUT
ACTIVE = contacts_pb2.Subscription.State.ACTIVE


async def test_stop_and_start_are_mirrored_in_every_app_that_has_the_number(open_world: OpenWorld) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        await world.launch((await world.create_campaign("sms")).name)
        person = world.sandbox.population.get_person(1)
        other = world.connect("other", await world.create_key("other", "admin"))
        async with other:
            await other.import_contacts(read_contacts(world.sandbox.population.list_rows()))
        await write(world, channel="sms", address=person.phone, text="Stop")
        assert (await read_subscription(world, person.external_id, "sms")).state == OPTED_OUT
        assert (await read_subscription(world, person.external_id, "sms")).reason == "opted_out/STOP"
        assert (await read_subscription(world, person.external_id, "whatsapp")).state == ACTIVE
        async with transaction(world.core.engine) as conn:
            rows = await conn.execute(text("SELECT count(*) FROM subscriptions WHERE state = 'opted_out' AND channel = 'sms'"))
            assert rows.scalar() == 2
        second = await world.create_campaign("sms")
        await world.launch(second.name)
        assert person.external_id not in await world.read_recipients(second.name)
        await write(world, channel="sms", address=person.phone, text="START")
        subscription = await read_subscription(world, person.external_id, "sms")
        assert (subscription.state, subscription.reason) == (ACTIVE, "")
        assert (await world.get_campaign(second.name)).counts.signals["replied"] == 0


async def test_start_takes_back_what_twilio_refused_and_nothing_that_a_caller_said(open_world: OpenWorld) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        await world.launch((await world.create_campaign("sms")).name)
        stopped, barred = (world.sandbox.population.get_person(number) for number in (1, 2))
        await write(world, channel="sms", address=stopped.phone, text="STOP")
        # As if the webhook of the stop had been lost: the next send is refused with 21610.
        async with transaction(world.core.engine) as conn:
            await set_states(conn, 1, [(1, "sms", hash_address(stopped.phone), "active", "")])
        contact = contacts_pb2.Contact(external_id=barred.external_id)
        subscription = contact.subscriptions.add(channel="sms", state=OPTED_OUT)
        subscription.address.update({"phone": barred.phone})
        await world.client.contacts.UpsertContacts(
            contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=[contact])
        )
        await world.launch((await world.create_campaign("sms")).name)
        assert (await read_subscription(world, stopped.external_id, "sms")).reason == "opted_out/21610"
        for person in (stopped, barred):
            await write(world, channel="sms", address=person.phone, text="START")
        assert (await read_subscription(world, stopped.external_id, "sms")).state == ACTIVE
        assert (await read_subscription(world, barred.external_id, "sms")).state == OPTED_OUT


@pytest.mark.parametrize("channel", ["sms", "whatsapp"])
async def test_reply_belongs_to_the_last_message_to_the_person(open_world: OpenWorld, channel: str) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        first, second = [await world.create_campaign(channel) for _ in range(2)]
        person = world.sandbox.population.get_person(1)
        await world.launch(first.name)
        await write(world, channel=channel, address=person.phone, text="Who is this?")
        await world.launch(second.name)
        await write(world, channel=channel, address=person.phone, text="Thanks")
        await write(world, channel=channel, address=person.phone, text="Really")
        for campaign in (first, second):
            recipients = await world.read_recipients(campaign.name)
            assert [who for who, found in recipients.items() if "replied" in found.signals] == [person.external_id]


async def test_quick_reply_belongs_to_the_message_that_it_names(open_world: OpenWorld) -> None:
    settings = replace(read_settings(), shares=replace(CERTAIN, whatsapp_replied=1.0), time_scale=1.0)
    async with open_world(settings) as world:
        await world.import_people()
        names = [(await world.create_campaign("whatsapp")).name for _ in range(2)]
        for name in names:
            await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
            await world.wait_until_sent(name)
        await world.hear_all()
        for name in names:
            counts = (await world.get_campaign(name)).counts
            assert (counts.signals["replied"], counts.signals["read"]) == (5, 5)


async def test_reply_to_somebody_elses_message_is_none_to_ours(open_world: OpenWorld) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        campaign = await world.create_campaign("whatsapp")
        await world.launch(campaign.name)
        address = WhatsAppAddress(phone=world.sandbox.population.get_person(1).phone)
        replies = [Reply(address=address, message_id="wamid.of-a-colleague"), Reply(address=address)]
        for reply, count in zip(replies, (0, 1), strict=True):
            await world.core.ledger.ingest_webhooks("whatsapp", [Webhook(replies=(reply,))])
            assert (await world.get_campaign(campaign.name)).counts.signals["replied"] == count


async def test_reply_that_outruns_the_record_of_its_message_finds_it(open_world: OpenWorld) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        campaign = await world.create_campaign("whatsapp")
        await world.launch(campaign.name)
        # As it is between the provider's answer and our commit.
        async with transaction(world.core.engine) as conn:
            await conn.execute(text("DELETE FROM attempts"))
        reply = Reply(address=WhatsAppAddress(phone=world.sandbox.population.get_person(1).phone), message_id="wamid.new")
        await world.core.ledger.ingest_webhooks("whatsapp", [Webhook(replies=(reply,))])
        assert (await world.get_campaign(campaign.name)).counts.signals["replied"] == 1


async def test_reply_is_not_to_a_message_that_failed(open_world: OpenWorld) -> None:
    async with open_world(replace(read_settings(), shares=replace(CERTAIN, sms_unreachable=1.0))) as world:
        await world.import_people()
        campaign = await world.create_campaign("sms")
        await world.launch(campaign.name)
        await write(world, channel="sms", address=world.sandbox.population.get_person(1).phone, text="Hello?")
        counts = (await world.get_campaign(campaign.name)).counts
        assert (counts.signals["failed"], counts.signals["replied"]) == (5, 0)


async def test_whatsapps_own_stop_and_resume_are_mirrored(open_world: OpenWorld) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        await world.launch((await world.create_campaign("whatsapp")).name)
        person = world.sandbox.population.get_person(1)
        for preference, state in (("stop", OPTED_OUT), ("resume", ACTIVE)):
            await write(world, channel="whatsapp", address=person.phone, preference=preference)
            assert (await read_subscription(world, person.external_id, "whatsapp")).state == state


async def test_stop_that_arrives_while_the_database_is_away_is_kept(open_world: OpenWorld) -> None:
    async with open_world(read_settings()) as world:
        await world.import_people()
        await world.launch((await world.create_campaign("sms")).name)
        person = world.sandbox.population.get_person(1)
        async with transaction(world.core.engine) as conn:
            await conn.execute(text("LOCK TABLE subscriptions"))
            assert world.sandbox.control.write(Inbound(channel="sms", address=person.phone, text="STOP"))
            await world.sandbox.outbox.drain()
        while (await read_subscription(world, person.external_id, "sms")).state != OPTED_OUT:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_estimate_tells_segments_and_cost_before_the_launch(open_world: OpenWorld) -> None:
    async with open_world(read_settings(20), environment={"AFTERTOUCH_SMS_PRICE_PER_SEGMENT": "0.5"}) as world:
        await world.import_people()
        draft = await world.create_campaign("sms", track_links=False)
        draft.content.update({"body": "{% if external_id contains '1' %}" + "x" * 161 + "{% else %}short{% endif %}"})
        await world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=draft))
        checked = await world.client.campaigns.LaunchCampaign(
            campaigns_pb2.LaunchCampaignRequest(name=draft.name, validate_only=True)
        )
        people = [person.external_id for person in world.sandbox.population]
        segments = sum(2 if "1" in person else 1 for person in people)
        assert checked.estimate == campaigns_pb2.Estimate(
            messages=20, units=segments, unit="segments", cost=f"{segments / 2:.2f}", currency="USD", sampled=20
        )
        await create_user(world, "mia@acme.example", "marketer")
        async with Visitor(world) as visitor:
            await visitor.sign_in("mia@acme.example")
            _, shown = await visitor.get(f"/campaigns/{draft.name.rpartition('/')[2]}/review")
        assert f"{segments} segments, {segments / 2:.2f} USD at your own price." in shown
        [long] = [person for person in people if "1" in person][:1]
        tested = await world.client.campaigns.SendTest(
            campaigns_pb2.SendTestRequest(name=draft.name, contact=f"{world.client.parent}/contacts/{long}")
        )
        assert (tested.estimate.messages, tested.estimate.units, tested.estimate.cost) == (1, 2, "1.00")
        whatsapp = await world.create_campaign("whatsapp")
        checked = await world.client.campaigns.LaunchCampaign(
            campaigns_pb2.LaunchCampaignRequest(name=whatsapp.name, validate_only=True)
        )
        assert not checked.HasField("estimate")


async def test_report_of_a_chain_tells_what_its_messages_cost(open_world: OpenWorld) -> None:
    async with open_world(read_settings(40), environment={"AFTERTOUCH_SMS_PRICE_PER_SEGMENT": "0.0079"}) as world:
        await world.import_people()
        root = await world.create_campaign("sms", track_links=False)
        root.content.update({"body": "{% if external_id contains '1' %}" + "x" * 161 + "{% else %}short{% endif %}"})
        await world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=root))
        await world.launch(root.name)
        selection = campaigns_pb2.RetargetSelection(source=root.name, action="delivered")
        made = {}
        for channel in ("sms", "push"):
            wave = await world.client.retargeting.CreateRetarget(
                retargeting_pb2.CreateRetargetRequest(selection=selection, channel=channel)
            )
            changed = campaigns_pb2.Campaign(name=wave.name, content=to_struct(CONTENT[channel]))
            await world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=changed))
            await world.launch(wave.name)
            made[channel] = wave.name
        taken = {
            name: [person for person, found in (await world.read_recipients(name)).items() if "sent" in found.signals]
            for name in (root.name, made["sms"])
        }
        segments = {root.name: sum(2 if "1" in person else 1 for person in taken[root.name])}
        segments[made["sms"]] = len(taken[made["sms"]])
        assert all(segments.values())
        report = await world.client.retargeting.GetChainReport(retargeting_pb2.GetChainReportRequest(name=root.name))
        each = Decimal("0.0079")
        # Push costs nothing that anybody would tell us.
        assert {link.campaign: read_costs(link.costs) for link in report.campaigns} == {
            **{name: [("USD", each * count, len(taken[name]))] for name, count in segments.items()},
            made["push"]: [],
        }
        assert read_costs(report.costs) == [("USD", each * sum(segments.values()), sum(map(len, taken.values())))]


def read_costs(costs: Iterable[retargeting_pb2.Cost]) -> list[tuple[str, Decimal, int]]:
    return [(cost.currency, Decimal(cost.amount), cost.recipient_count) for cost in costs]


async def test_launch_asks_for_an_approved_template_first(open_world: OpenWorld) -> None:
    templates = {"summer_sale": "Hello {{1}}", "winter_sale": "Hello {{first_name}}"}
    settings = replace(read_settings(), templates=templates, template_statuses={"winter_sale": "PAUSED"})
    async with open_world(settings) as world:
        await world.import_people()
        campaign = await world.create_campaign("whatsapp")

        async def launch(**content: Any) -> campaigns_pb2.Campaign:
            campaign.content.CopyFrom(to_struct({**CONTENT["whatsapp"], **content}))
            campaign.etag = ""
            await world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=campaign))
            request = campaigns_pb2.LaunchCampaignRequest(name=campaign.name, validate_only=True)
            return await world.client.campaigns.LaunchCampaign(request)

        assert (await launch()).counts.recipients == 5
        for content, field in (
            ({"body": []}, "content.body"),
            ({"template": "winter_sale", "body": {"first_name": "x"}}, "content.template"),
            ({"template": "spring_sale"}, "content.template"),
        ):
            refusal = await refuse(launch(**content))
            assert (refusal.reason, [*refusal.fields]) == ("FIELDS_INVALID", [field])
        # A provider that cannot be asked holds nothing up.
        world.core.registry.channels["whatsapp"]._templates = "/v23.0/1/message_templates"  # type: ignore[attr-defined]
        assert (await launch()).counts.recipients == 5
