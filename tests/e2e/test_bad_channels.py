"""Channels that crash, hang, answer rubbish or flood: the server and the other channels go on, and it is told which and why."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, cast

import aiohttp
import pytest

from aftertouch.channels import Receipt, Webhook, WebhookRequest
from aftertouch.delivery import calls
from aftertouch.rpc.values import to_struct
from aftertouch.v1 import campaigns_pb2, contacts_pb2
from tests.e2e.pigeons import Messages, PigeonChannel
from tests.fix_world import OpenWorld, World

State = campaigns_pb2.Campaign.State
PEOPLE = 40


class BadChannel(PigeonChannel):
    capabilities = replace(PigeonChannel.capabilities, webhooks=True)

    def verify(self, request: WebhookRequest) -> None:
        return


class CrashingChannel(BadChannel):
    name = "crashing"
    label = "Crashing"

    async def send(self, messages: Messages) -> Any:
        raise RuntimeError("a defect")

    def parse(self, request: WebhookRequest) -> Webhook:
        raise RecursionError("a defect")


class HangingChannel(BadChannel):
    name = "hanging"
    label = "Hanging"

    async def send(self, messages: Messages) -> Any:
        await asyncio.get_running_loop().create_future()

    def parse(self, request: WebhookRequest) -> Webhook:
        return cast("Webhook", None)


class RubbishChannel(BadChannel):
    name = "rubbish"
    label = "Rubbish"

    async def send(self, messages: Messages) -> Any:
        return {"status": "ok"}

    def parse(self, request: WebhookRequest) -> Webhook:
        return Webhook(receipts=cast("tuple[Receipt, ...]", ("delivered", None)))


class FloodingChannel(BadChannel):
    name = "flooding"
    label = "Flooding"

    async def send(self, messages: Messages) -> Any:
        return [None] * 1_000_000

    def parse(self, request: WebhookRequest) -> Webhook:
        return Webhook(unrecognized=("x" * 100,) * 1_000_000)


BAD = (CrashingChannel, HangingChannel, RubbishChannel, FloodingChannel)
CAUSES = {"crashing": "RuntimeError", "hanging": "no answer in time", "rubbish": "unsound answer", "flooding": "unsound answer"}
FAULTS = {
    "crashing": "RecursionError",
    "hanging": "parse returned NoneType",
    "rubbish": "parse returned str",
    "flooding": "parse returned 1000000 items",
}


@dataclass
class Zoo:
    """A world with the bad channels beside the good ones."""

    world: World

    async def launch(self, channel: str, **content: Any) -> str:
        fields = {"content": to_struct(content)} if content else {}
        campaign = campaigns_pb2.Campaign(
            display_name=channel, channel=channel, audience=campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
        )
        campaign.MergeFrom(campaigns_pb2.Campaign(**fields))
        client = self.world.client
        request = campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=campaign)
        made = await client.campaigns.CreateCampaign(request)
        await client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=made.name))
        return str(made.name)


@pytest.fixture
async def zoo(open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Zoo]:
    # Shorter than it is, and longer than a crowded machine's sandbox takes for an SMS.
    monkeypatch.setattr(calls, "LONGEST_CALL", timedelta(seconds=10))
    async with open_world(extra=BAD) as world:
        contacts = []
        for number in range(PEOPLE):
            contact = contacts_pb2.Contact(external_id=f"p{number}")
            for channel in CAUSES:
                subscription = contact.subscriptions.add(channel=channel)
                subscription.address.update({"tree": f"oak {number}"})
            contact.subscriptions.add(channel="sms").address.update({"phone": f"+1650253{number:04}"})
            contacts.append(contact)
        request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=contacts)
        await world.client.contacts.UpsertContacts(request)
        yield Zoo(world)


async def test_bad_channels_stop_their_own_campaigns_only(zoo: Zoo) -> None:
    bad = {channel: await zoo.launch(channel, text="Hi") for channel in CAUSES}
    good = await zoo.launch("sms", body="Hi")
    sent = await zoo.world.wait_until_sent(good)
    assert (sent.state, sent.counts.signals["attempted"]) == (State.SENT, PEOPLE)
    for channel, name in bad.items():
        stopped = await zoo.world.wait_until_sent(name)
        assert stopped.state == State.PAUSED, channel
        assert "the channel itself failed" in stopped.state_reason
        assert f"{channel}: " in stopped.state_reason
        assert CAUSES[channel] in stopped.state_reason
        # Most are spared: they can be sent to when the plugin is mended.
        assert 0 < stopped.counts.unclear < PEOPLE
        assert stopped.counts.signals["failed"] == 0


async def test_webhooks_of_bad_channels_are_refused_and_told(zoo: Zoo, capfd: pytest.CaptureFixture[str]) -> None:
    public = zoo.world.addresses.public_url
    async with aiohttp.ClientSession() as http:
        for channel, fault in FAULTS.items():
            capfd.readouterr()
            async with http.post(f"{public}/v1/webhooks/{channel}", data=b"x") as response:
                assert response.status == 500, channel
            logged = capfd.readouterr().out
            assert "a channel failed" in logged, channel
            assert channel in logged
            assert fault in logged
        async with http.get(f"{public}/healthz") as response:
            assert response.status == 200
