"""Providers in trouble: nobody is written off for it, and nobody is messaged twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, get_args

import pytest

from aftertouch.sandbox import SandboxSettings
from aftertouch.sandbox.faults import Fault, Mode
from aftertouch.sandbox.population import CHANNELS, Channel
from aftertouch.v1 import campaigns_pb2, retargeting_pb2
from tests.fix_world import OpenWorld, World

_State = campaigns_pb2.Campaign.State
IMPATIENT = {f"AFTERTOUCH_{channel.upper()}_TIMEOUT_SECONDS": "5" for channel in CHANNELS}
"""Seconds are lost at each silence; but a crowded machine's sandbox may take one or two for an answer."""
STRIKES = 10
"""On each channel, of every second request at random: that 38 people make too few happens once in 100,000 times."""


def set_fault(world: World, channel: Channel, mode: Mode | None, **options: Any) -> None:
    world.sandbox.faults.set(Fault(channel=channel, mode=mode, **options))


async def launch_everywhere(world: World) -> dict[Channel, str]:
    names: dict[Channel, str] = {}
    for channel in CHANNELS:
        names[channel] = (await world.create_campaign(channel)).name
    for name in names.values():
        await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
    return names


def count_handed(world: World, channel: Channel) -> Counter[str]:
    """How often each person's message came through to the provider."""
    entries = [entry for entry in world.sandbox.truth.entries if entry.channel == channel and entry.person]
    return Counter(entry.person.external_id for entry in entries if entry.person)


def list_people(world: World, channel: Channel) -> set[str]:
    return {person.external_id for person in world.sandbox.population if channel in person.channels}


async def check_everybody_once(world: World, channel: Channel, name: str) -> None:
    campaign = await world.wait_until_sent(name)
    await world.hear_all()
    handed = count_handed(world, channel)
    assert campaign.state == _State.SENT
    assert set(handed) == list_people(world, channel)
    assert set(handed.values()) == {1}
    await check_nobody_written_off(world, channel, name)
    campaign = await world.get_campaign(name)
    assert campaign.counts.unclear == 0


async def check_everybody_by_one_token(world: World, name: str) -> None:
    """A push message may come twice: with its token as Topic, the second replaces the first."""
    campaign = await world.wait_until_sent(name)
    await world.hear_all()
    assert (campaign.state, campaign.counts.unclear) == (_State.SENT, 0)
    assert set(count_handed(world, "push")) == list_people(world, "push")
    entries = [entry for entry in world.sandbox.truth.entries if entry.channel == "push"]
    assert len({(entry.address, entry.token) for entry in entries}) == len({entry.address for entry in entries})
    await check_nobody_written_off(world, "push", name)


async def check_nobody_written_off(world: World, channel: Channel, name: str) -> None:
    """Only those have failed of whom the sandbox decided so."""
    people = await world.read_recipients(name)
    failed = {person for person, found in people.items() if "failed" in found.signals}
    entries = [entry for entry in world.sandbox.truth.entries if entry.channel == channel and "failed" in entry.signals]
    assert failed == {entry.person.external_id for entry in entries if entry.person}


@pytest.mark.parametrize("mode", ["429", "429_retry_after", "500", "503"])
async def test_refusals_for_the_providers_trouble_are_tried_again_once_each(open_world: OpenWorld, mode: Mode) -> None:
    async with open_world(SandboxSettings(size=60, time_scale=0.05)) as world:
        await world.import_people()
        for channel in CHANNELS:
            set_fault(world, channel, mode, share=0.5, times=STRIKES, retry_after=0.2)
        names = await launch_everywhere(world)
        for channel, name in names.items():
            await check_everybody_once(world, channel, name)
        assert sum(world.sandbox.faults.strikes.values()) == STRIKES * len(CHANNELS)


@pytest.mark.parametrize("mode", ["stall", "reset"])
async def test_silence_after_a_message_was_taken_is_settled_by_its_receipts(open_world: OpenWorld, mode: Mode) -> None:
    settings = SandboxSettings(size=60, time_scale=0.05)
    async with open_world(settings, environment=IMPATIENT) as world:
        await world.import_people()
        for channel in CHANNELS:
            set_fault(world, channel, mode, times=10, taken=True)
        names = await launch_everywhere(world)
        for channel in ("sms", "whatsapp"):
            await check_everybody_once(world, channel, names[channel])
        await check_everybody_by_one_token(world, names["push"])
        handed = count_handed(world, "push")
        assert sum(handed.values()) > len(handed), "nobody was sent to again"


@pytest.mark.usefixtures("_look_up_soon")
@pytest.mark.parametrize("mode", ["stall", "reset"])
async def test_silence_is_tried_again_only_where_that_cannot_message_twice(open_world: OpenWorld, mode: Mode) -> None:
    settings = SandboxSettings(size=60, time_scale=0.05)
    hushed = 10
    async with open_world(settings, environment=IMPATIENT) as world:
        await world.import_people()
        for channel in CHANNELS:
            set_fault(world, channel, mode, times=hushed)
        names = await launch_everywhere(world)
        # Twilio says whom it never heard of, so that they are sent to again.
        await check_everybody_once(world, "sms", names["sms"])
        assert world.sandbox.faults.strikes[f"sms {mode}"] == hushed
        await check_everybody_by_one_token(world, names["push"])
        # Meta can be asked nothing: whoever is in doubt is not sent to again, and is shown as such.
        await world.wait_until_sent(names["whatsapp"])
        await world.hear_all()
        campaign = await world.get_campaign(names["whatsapp"])
        people = await world.read_recipients(names["whatsapp"])
        handed = count_handed(world, "whatsapp")
        unclear = {person for person, found in people.items() if list(found.signals) == ["attempted"]}
        assert (campaign.state, campaign.counts.unclear) == (_State.SENT, len(unclear))
        assert unclear == list_people(world, "whatsapp") - set(handed)
        assert len(unclear) >= hushed
        wanted = retargeting_pb2.ListRetargetContactsRequest(
            selection=campaigns_pb2.RetargetSelection(source=names["whatsapp"], action="unclear"),
            channel="whatsapp",
            group=retargeting_pb2.ListRetargetContactsRequest.MATCHED,
        )
        pages = [page async for page in world.client.retargeting.ListRetargetContacts(wanted)]
        assert {contact.rpartition("/")[2] for page in pages for contact in page.contacts} == unclear
        assert set(handed.values()) == {1}
        await check_nobody_written_off(world, "whatsapp", names["whatsapp"])


@pytest.mark.parametrize("channel", get_args(Channel))
async def test_expired_token_pauses_until_it_is_resumed(open_world: OpenWorld, channel: Channel) -> None:
    async with open_world(SandboxSettings(size=300, time_scale=0.05)) as world:
        await world.import_people()
        draft = await world.create_campaign(channel)
        await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=draft.name))
        while not world.sandbox.truth.entries:  # noqa: ASYNC110 - the sandbox wakes nobody
            await asyncio.sleep(0)
        set_fault(world, channel, "expired_token")
        paused = await world.wait_until_sent(draft.name)
        before = len(world.sandbox.truth.entries)
        assert paused.state == _State.PAUSED
        assert 0 < before < len(list_people(world, channel)), "it expired too late to prove anything"
        assert channel in paused.state_reason
        assert "resume" in paused.state_reason
        await world.hear_all()
        await check_nobody_written_off(world, channel, draft.name)
        set_fault(world, channel, None)
        resumed = await world.client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=draft.name))
        assert (resumed.state, resumed.state_reason) == (_State.SENDING, "")
        await check_everybody_once(world, channel, draft.name)
