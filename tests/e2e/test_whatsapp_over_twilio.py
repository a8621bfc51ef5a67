"""WhatsApp over Twilio's API in a whole world: the same campaigns and the same questions, with another provider's words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.sandbox.control import Inbound
from aftertouch.sandbox.truth import Entry
from aftertouch.sandbox.twilio import name_content
from aftertouch.v1 import campaigns_pb2, contacts_pb2, retargeting_pb2
from tests.fix_world import CONTENT as CONTENTS
from tests.fix_world import OpenWorld, World
from tests.refusals import refuse
from tests.sandbox.conftest import CERTAIN

pytestmark = [pytest.mark.e2e]

CONTENT = {**CONTENTS["whatsapp"], "body": ["{{ first_name | default: 'there' }}", "https://shop.example/sale"]}
REASONS = {"63024": "recipient_gone/63024", "63014": "opted_out/63014", "63049": "capped/63049"}


def read_settings(size: int = 5, **changes: Any) -> SandboxSettings:
    given: dict[str, Any] = {"whatsapp_provider": "twilio", "size": size, "time_scale": 0.05, "shares": CERTAIN}
    return SandboxSettings(**{**given, "templates": {"summer_sale": "Dear {{1}}, {{2}} off"}, **changes})


async def create_campaign(world: World, **content: Any) -> campaigns_pb2.Campaign:
    """A draft to everybody."""
    campaign = campaigns_pb2.Campaign(
        display_name="Summer Sale",
        channel="whatsapp",
        content=to_struct({**CONTENT, **content}),
        audience=campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers()),
    )
    return await world.client.campaigns.CreateCampaign(
        campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=campaign)
    )


def list_entries(world: World, channel: str = "whatsapp") -> dict[str, Entry]:
    """What the sandbox knows of the messages on a channel, by person."""
    entries = [entry for entry in world.sandbox.truth.entries if entry.channel == channel]
    found = {entry.person.external_id: entry for entry in entries if entry.person}
    assert len(found) == len(entries), "somebody was sent to twice"
    return found


async def test_campaign_is_sent_heard_of_and_followed_up(open_world: OpenWorld) -> None:
    shares = Shares(all_channels=1.0, whatsapp_gone=0.1, whatsapp_opted_out=0.1, whatsapp_capped=0.1, whatsapp_read=0.5)
    async with open_world(read_settings(80, shares=shares, duplicate_share=0.3, late_share=0.3)) as world:
        await world.import_people()
        campaign = await create_campaign(world)
        await world.launch(campaign.name)
        entries = list_entries(world)
        assert len(entries) == 80
        for entry in entries.values():
            assert entry.content["ContentSid"] == name_content("summer_sale")
            assert f"/l/{entry.token}" in entry.content["ContentVariables"]

        recipients = await world.read_recipients(campaign.name)
        truth = {who: set(entry.signals) for who, entry in entries.items()}
        did_read = {who for who, signals in truth.items() if signals & {"read", "replied"}}
        failed = {who for who, signals in truth.items() if "failed" in signals}
        assert {who for who, recipient in recipients.items() if "read" in recipient.signals} == did_read
        delivered = {who for who, signals in truth.items() if "delivered" in signals} | did_read
        assert {who for who, recipient in recipients.items() if "delivered" in recipient.signals} == delivered
        told = {who: [*recipient.reasons] for who, recipient in recipients.items() if recipient.reasons}
        assert told == {who: [REASONS[str(entries[who].signals["failed"].code)]] for who in failed}
        assert {reason for [reason] in told.values()} == set(REASONS.values()), "each of them has to happen to somebody"

        unread = delivered - did_read
        assert unread
        wave = await world.client.retargeting.CreateRetarget(
            retargeting_pb2.CreateRetargetRequest(
                selection=campaigns_pb2.RetargetSelection(source=campaign.name, action="not_read"), channel="sms"
            )
        )
        content = campaigns_pb2.Campaign(name=wave.name, content=to_struct({"body": "The sale ends tonight"}))
        await world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=content))
        await world.launch(wave.name)
        assert list_entries(world, "sms").keys() == unread

        # Whoever is gone, said stop or is left alone for a day is not written to again.
        before = len(world.sandbox.truth.entries)
        await world.launch((await create_campaign(world)).name)
        again = [entry.person.external_id for entry in world.sandbox.truth.entries[before:] if entry.person]
        assert sorted(again) == sorted(entries.keys() - failed)


async def test_quick_reply_belongs_to_its_message_and_stop_ends_the_subscription(open_world: OpenWorld) -> None:
    async with open_world(read_settings(shares=replace(CERTAIN, whatsapp_replied=1.0))) as world:
        await world.import_people()
        campaign = await create_campaign(world)
        await world.launch(campaign.name)
        assert (await world.get_campaign(campaign.name)).counts.signals["replied"] == 5
        person = world.sandbox.population.get_person(1)
        State = contacts_pb2.Subscription.State
        for word, state in (("Stop", State.OPTED_OUT), ("Start", State.ACTIVE)):
            assert world.sandbox.control.write(Inbound(channel="whatsapp", address=person.phone, text=word))
            await world.hear_all()
            contact = await world.client.contacts.GetContact(
                contacts_pb2.GetContactRequest(name=f"{world.client.parent}/contacts/{person.external_id}")
            )
            states = {found.channel: found.state for found in contact.subscriptions}
            assert (states["whatsapp"], states["sms"]) == (state, State.ACTIVE)


async def test_launch_asks_for_an_approved_template_first(open_world: OpenWorld) -> None:
    templates = {"summer_sale": "Dear {{1}}, {{2}} off", "winter_sale": "Dear {{1}}, {{2}} off"}
    async with open_world(read_settings(templates=templates, template_statuses={"winter_sale": "PAUSED"})) as world:
        await world.import_people()

        async def launch(**content: Any) -> campaigns_pb2.Campaign:
            campaign = await create_campaign(world, **content)
            request = campaigns_pb2.LaunchCampaignRequest(name=campaign.name, validate_only=True)
            return await world.client.campaigns.LaunchCampaign(request)

        assert (await launch()).counts.recipients == 5
        for content, field in (
            ({"body": ["x"]}, "content.body"),
            ({"template": "winter_sale"}, "content.template"),
            ({"template": "spring_sale"}, "content.template"),
            ({"language": "de"}, "content.language"),
        ):
            refusal = await refuse(launch(**content))
            assert (refusal.reason, [*refusal.fields]) == ("FIELDS_INVALID", [field])
