"""Providers in trouble: nobody is written off for it, nobody is texted twice, and the pace follows what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, get_args

import pytest
from sqlalchemy import text

from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.sandbox.faults import Fault, Mode
from aftertouch.sandbox.population import Channel
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.e2e.books import check_books
from tests.fix_database import clone_database
from tests.fix_world import World, run_world
from tests.ports import keep_port

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

State = campaigns_pb2.Campaign.State
CHANNELS: tuple[Channel, ...] = get_args(Channel)
TIMEOUT = {f"AFTERTOUCH_{channel.upper()}_TIMEOUT_SECONDS": "10" for channel in CHANNELS}
HEALTHY = Shares(
    sms_opted_out=0,
    sms_gone=0,
    sms_unreachable=0,
    whatsapp_gone=0,
    whatsapp_opted_out=0,
    whatsapp_capped=0,
    whatsapp_failed_first=0,
    push_gone=0,
)
"""People and carriers in perfect order: whoever fails fails for the provider."""


@pytest.fixture(scope="module")
async def shared(postgres_url: str, template: str) -> AsyncIterator[World]:
    settings = SandboxSettings(size=200, time_scale=0.02, shares=HEALTHY)
    async with (
        clone_database(postgres_url, template) as url,
        run_world(url, settings, environment=TIMEOUT, send_units=2) as world,
    ):
        await world.import_people()
        yield world


@pytest.fixture
async def world(shared: World) -> World:
    """A world with a worker, whose providers are well and whose limits have room."""
    await shared.sandbox.control.reset()
    async with transaction(shared.core.engine) as conn:
        await conn.execute(text("DELETE FROM paces"))
    return shared


async def launch(world: World, channel: Channel, **fields: Any) -> str:
    name = str((await world.create_campaign(channel, **fields)).name)
    await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
    return name


async def wait_for_strikes(world: World, channel: Channel, mode: Mode, count: int = 1) -> None:
    async with asyncio.timeout(120):
        while world.sandbox.faults.strikes[f"{channel} {mode}"] < count:  # noqa: ASYNC110 - the sandbox wakes nobody
            await asyncio.sleep(0.01)


async def finish(world: World, name: str) -> campaigns_pb2.Campaign:
    campaign = await world.wait_until_sent(name, seconds=120)
    assert (campaign.state, campaign.state_reason) == (State.SENT, "")
    assert "failed" not in campaign.counts.signals, "somebody was written off for the provider's trouble"
    return campaign


@pytest.mark.parametrize("channel", CHANNELS)
async def test_retry_after_is_kept_and_the_other_channels_go_on(world: World, channel: Channel) -> None:
    asked = 10.0
    # Slow enough that few are under way when the provider says it, and that all channels are still sending then.
    names = {name: await launch(world, name, messages_per_second=10) for name in CHANNELS}
    async with asyncio.timeout(60):
        while {arrival.channel for arrival in world.sandbox.faults.arrivals} != set(CHANNELS):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    world.sandbox.faults.set(Fault(channel=channel, mode="429_retry_after", retry_after=asked, times=1))
    for name in names.values():
        await finish(world, name)
    arrivals = list(world.sandbox.faults.arrivals)
    refused = next(arrival.time for arrival in arrivals if arrival.mode == "429_retry_after")
    after = [arrival.time for arrival in arrivals if arrival.channel == channel and arrival.time > refused]
    # What was under way arrives within a moment, and half of the time is a long one.
    assert not [time for time in after if refused + asked / 2 < time < refused + asked]
    assert after[-1] >= refused + asked, "nothing was left to be held back"
    going_on = {arrival.channel for arrival in arrivals if refused < arrival.time < refused + asked}
    assert going_on == set(CHANNELS), "another channel waited too"
    await check_books(world, names.values(), most_unclear=0)


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("mode", ["429", "500", "503"])
async def test_outage_writes_nobody_off(world: World, channel: Channel, mode: Mode) -> None:
    world.sandbox.faults.set(Fault(channel=channel, mode=mode))
    name = await launch(world, channel)
    await wait_for_strikes(world, channel, mode)
    await asyncio.sleep(3)
    struck = world.sandbox.faults.strikes[f"{channel} {mode}"]
    world.sandbox.faults.set(Fault(channel=channel, mode=None))
    campaign = await finish(world, name)
    assert campaign.counts.signals["sent"] == campaign.counts.recipients
    assert struck <= 2 * campaign.counts.recipients, "the provider was asked again and again meanwhile"
    await check_books(world, [name], most_unclear=0)


@pytest.mark.timeout(600)  # the last back-off may be as long as the outage
async def test_minute_of_errors_writes_nobody_off(world: World) -> None:
    for channel in CHANNELS:
        world.sandbox.faults.set(Fault(channel=channel, mode="500"))
    names = [await launch(world, channel) for channel in CHANNELS]
    await asyncio.sleep(60)
    struck = dict(world.sandbox.faults.strikes)
    world.sandbox.faults.clear()
    for channel, name in zip(CHANNELS, names, strict=True):
        campaign = await finish(world, name)
        assert campaign.counts.signals["sent"] == campaign.counts.recipients
        assert 1 < struck[f"{channel} 500"] < 2 * campaign.counts.recipients, "once in vain, or again and again"
    await check_books(world, names, most_unclear=0)


@pytest.mark.parametrize("mode", ["stall", "reset"])
async def test_silence_leaves_a_few_unclear_and_nobody_failed(world: World, mode: Mode) -> None:
    for channel in CHANNELS:
        world.sandbox.faults.set(Fault(channel=channel, mode=mode, times=20))
    names = [await launch(world, channel) for channel in CHANNELS]
    for name in names:
        await finish(world, name)
    await check_books(world, names, most_unclear=20)


@pytest.mark.parametrize("mode", ["stall", "reset"])
async def test_message_that_was_taken_without_an_answer_is_settled_by_its_receipt(world: World, mode: Mode) -> None:
    for channel in CHANNELS:
        world.sandbox.faults.set(Fault(channel=channel, mode=mode, times=10, taken=True))
    names = [await launch(world, channel) for channel in CHANNELS]
    for name in names:
        await finish(world, name)
    assert [world.sandbox.faults.strikes[f"{channel} {mode}"] for channel in CHANNELS] == [10] * len(CHANNELS)
    # Of whoever was taken nobody is unclear. A machine that stands still for seconds may time out others that were not.
    await check_books(world, names, most_unclear=10)


async def test_provider_that_cannot_be_reached_is_tried_again_until_it_can(postgres_url: str, template: str) -> None:
    settings = SandboxSettings(size=60, time_scale=0.02, shares=HEALTHY)
    async with AsyncExitStack() as stack:
        address = stack.enter_context(keep_port())
        url = await stack.enter_async_context(clone_database(postgres_url, template))
        environment = TIMEOUT | {"AFTERTOUCH_SMS_API_URL": f"http://{address}"}
        world = await stack.enter_async_context(run_world(url, settings, environment=environment, send_units=2))
        await world.import_people()
        name = await launch(world, "sms")
        await asyncio.sleep(2)
        assert (await world.get_campaign(name)).state == State.SENDING
        there, there_port = world.sandbox.url.removeprefix("http://").split(":")

        async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                sink.write(data)
            sink.close()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            back, forth = await asyncio.open_connection(there, int(there_port))
            await asyncio.gather(carry(reader, forth), carry(back, writer))

        host, port = address.split(":")
        async with await asyncio.start_server(accept, host, int(port)):
            campaign = await finish(world, name)
            assert campaign.counts.signals["sent"] == campaign.counts.recipients
            await check_books(world, [name], most_unclear=0)


@pytest.mark.parametrize("channel", ["sms", "whatsapp"])
async def test_expired_token_pauses_and_after_the_fix_everybody_is_messaged_once(world: World, channel: Channel) -> None:
    world.sandbox.faults.set(Fault(channel=channel, mode="expired_token"))
    name = await launch(world, channel)
    paused = await world.wait_until_sent(name, seconds=120)
    code = {"sms": "20003", "whatsapp": "190"}[channel]
    assert paused.state == State.PAUSED
    assert f"{channel} answered {code}" in paused.state_reason
    assert not {"sent", "failed", "skipped"} & set(paused.counts.signals)
    world.sandbox.faults.set(Fault(channel=channel, mode=None))
    await world.client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=name))
    campaign = await finish(world, name)
    assert campaign.counts.signals["sent"] == campaign.counts.recipients
    await check_books(world, [name], most_unclear=0)
