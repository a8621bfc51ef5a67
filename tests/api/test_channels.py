"""The Channels service: what is installed, what it takes, and why it cannot send."""

from __future__ import annotations

import pytest
from google.protobuf import json_format

from aftertouch.v1 import channels_pb2
from tests.fix_world import OpenWorld, World
from tests.refusals import refuse

State = channels_pb2.Channel.State


async def get(world: World, name: str) -> channels_pb2.Channel:
    return await world.client.channels.GetChannel(channels_pb2.GetChannelRequest(name=name))


async def test_channels_are_listed_by_name_without_schemas(shared_world: World) -> None:
    seen, token = [], ""
    while True:
        request = channels_pb2.ListChannelsRequest(page_size=1, page_token=token)
        page = await shared_world.client.channels.ListChannels(request)
        seen += page.channels
        token = page.next_page_token
        if not token:
            break
    assert [channel.name for channel in seen] == sorted(channel.name for channel in seen)
    assert {"channels/push", "channels/sms", "channels/whatsapp"} <= {channel.name for channel in seen}
    assert not any(channel.HasField("content_schema") or channel.HasField("address_schema") for channel in seen)


@pytest.mark.parametrize("name", ["sms", "whatsapp", "push"])
async def test_channel_tells_what_it_takes_and_what_can_be_asked(shared_world: World, name: str) -> None:
    channel = await get(shared_world, f"channels/{name}")
    assert (channel.state, list(channel.problems), channel.distribution) == (State.READY, [], f"aftertouch-{name}")
    content = json_format.MessageToDict(channel.content_schema)
    address = json_format.MessageToDict(channel.address_schema)
    assert content["type"] == address["type"] == "object"
    assert content["required"]
    assert address["required"]
    signals = {signal.signal for signal in channel.signals}
    assert signals > {"attempted", "sent", "failed", "skipped"}
    assert all(set(signal.implies) <= signals and signal.display_name for signal in channel.signals)
    assert all(action.display_name and action.short_name and action.expression for action in channel.actions)
    assert all(bool(action.apart_expression) == bool(action.apart_display_name) for action in channel.actions)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "FIELDS_INVALID"),
        ("sms", "FIELDS_INVALID"),
        ("channels/", "FIELDS_INVALID"),
        ("apps/acme/channels/sms", "FIELDS_INVALID"),
        ("channels/fax", "RESOURCE_NOT_FOUND"),
        ("channels/SMS", "RESOURCE_NOT_FOUND"),
        ("channels/sms/x", "RESOURCE_NOT_FOUND"),
    ],
)
async def test_channel_that_is_not_there_is_refused(shared_world: World, name: str, reason: str) -> None:
    assert (await refuse(get(shared_world, name))).reason == reason


async def test_channel_without_its_settings_says_what_is_missing_and_no_values(open_world: OpenWorld) -> None:
    environment = {
        "AFTERTOUCH_SMS_ACCOUNT_SID": "hush-hush",
        "AFTERTOUCH_SMS_AUTH_TOKEN": "",
        "AFTERTOUCH_SMS_SENDR": "x",
    }
    async with open_world(environment=environment) as world:
        channel = await get(world, "channels/sms")
    assert channel.state == State.NOT_CONFIGURED
    problems = "\n".join(channel.problems)
    for name in ("AFTERTOUCH_SMS_ACCOUNT_SID", "AFTERTOUCH_SMS_AUTH_TOKEN", "AFTERTOUCH_SMS_SENDR"):
        assert name in problems
    assert "hush" not in problems
    assert channel.content_schema.fields
