"""The Channels service: what is installed, what it takes, and why it cannot send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from google.protobuf import json_format

from aftertouch.channels import Capabilities, Template, TemplatesUnreadable
from aftertouch.delivery import templates
from aftertouch.sandbox import SandboxSettings
from aftertouch.v1 import channels_pb2
from tests.e2e.pigeons import PigeonChannel
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


# Templates


class Shelf(PigeonChannel):
    """A channel whose provider keeps what the test puts there."""

    name = "shelf"
    capabilities = Capabilities(webhooks=False, templates=True)
    asked = 0
    answer: ClassVar[Any] = ()
    delay = 0.0

    async def list_templates(self) -> Sequence[Template]:
        type(self).asked += 1
        await asyncio.sleep(type(self).delay)
        answer = type(self).answer
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
async def shelf(open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    for name, value in (("asked", 0), ("answer", ()), ("delay", 0.0)):
        monkeypatch.setattr(Shelf, name, value)
    async with open_world(extra=[Shelf]) as world:
        yield world


async def list_templates(world: World, channel: str = "shelf", **page: Any) -> channels_pb2.ListTemplatesResponse:
    request = channels_pb2.ListTemplatesRequest(parent=world.client.parent, channel=channel, **page)
    return await world.client.channels.ListTemplates(request)


def make_template(name: str, **fields: Any) -> Template:
    return Template(**{"name": name, "content": {"text": name}, **fields})


async def test_templates_of_the_account_are_listed_with_what_uses_them(open_world: OpenWorld) -> None:
    kept = {"winter_sale": "Hello {{first_name}}", "summer_sale": "Hello {{1}}, {{2}} off"}
    settings = SandboxSettings(size=1, templates=kept, template_statuses={"winter_sale": "PAUSED"})
    async with open_world(settings) as world:
        summer, winter = (await list_templates(world, "whatsapp")).templates
        assert (summer.template, summer.language, summer.status, summer.usable) == ("summer_sale", "en_US", "APPROVED", True)
        assert (winter.template, winter.status, winter.usable) == ("winter_sale", "PAUSED", False)
        assert json_format.MessageToDict(summer.content) == {"template": "summer_sale", "language": "en_US", "body": ["", ""]}
        assert summer.body == "Hello {{ body[0] | default: '[1]' }}, {{ body[1] | default: '[2]' }} off"
        campaign = await world.create_campaign("whatsapp", content=summer.content)
        assert campaign.content == summer.content
        # Another app speaks through the same account, and one without templates has none.
        async with world.connect("neighbour", await world.create_key("neighbour", "read")) as neighbour:
            request = channels_pb2.ListTemplatesRequest(parent=neighbour.parent, channel="whatsapp")
            assert len((await neighbour.channels.ListTemplates(request)).templates) == 2
        assert not (await list_templates(world, "sms")).templates
        assert {channel: (await get(world, f"channels/{channel}")).has_templates for channel in ("sms", "whatsapp")} == {
            "sms": False,
            "whatsapp": True,
        }


async def test_templates_come_in_pages_and_are_read_once_a_minute(shelf: World, monkeypatch: pytest.MonkeyPatch) -> None:
    Shelf.answer = [make_template("b"), make_template("a", language="en"), make_template("a", language="de")]
    Shelf.delay = 0.2
    monkeypatch.setattr(templates, "KEEP_SECONDS", 600.0)
    await asyncio.gather(*(list_templates(shelf) for _ in range(10)))
    seen, token = [], ""
    while True:
        page = await list_templates(shelf, page_size=2, page_token=token)
        seen += [(template.template, template.language) for template in page.templates]
        if not (token := page.next_page_token):
            break
    assert seen == [("a", "de"), ("a", "en"), ("b", "")]
    assert Shelf.asked == 1
    monkeypatch.setattr(templates, "KEEP_SECONDS", 0.0)
    await list_templates(shelf)
    assert Shelf.asked == 2


async def test_caller_that_goes_away_takes_the_answer_from_nobody(shelf: World) -> None:
    Shelf.answer, Shelf.delay = [make_template("a")], 0.5
    leaving = asyncio.ensure_future(list_templates(shelf))
    async with asyncio.timeout(60):
        while not Shelf.asked:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
    staying = asyncio.ensure_future(list_templates(shelf))
    await asyncio.sleep(0.1)
    leaving.cancel()
    assert len((await staying).templates) == 1
    assert Shelf.asked == 1


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (TemplatesUnreadable("the token has expired"), "the token has expired"),
        (RuntimeError("secret"), "the channel failed; its log says how"),
        (["a"], "the channel failed; its log says how"),
        (7, "the channel failed; its log says how"),
        ([make_template("a", body=3)], "the channel failed; its log says how"),
        ([make_template("a", content={"at": object()})], "the channel failed; its log says how"),
        ([make_template("a", content={"at": float("nan")})], "the channel failed; its log says how"),
    ],
)
async def test_templates_that_cannot_be_read_are_a_refusal_in_words(
    shelf: World, monkeypatch: pytest.MonkeyPatch, answer: Any, cause: str
) -> None:
    Shelf.answer = answer
    monkeypatch.setattr(templates, "ASK_AGAIN_SECONDS", 600.0)
    refusal = await refuse(list_templates(shelf))
    assert (refusal.code, refusal.reason) == ("FAILED_PRECONDITION", "TEMPLATES_UNREADABLE")
    assert refusal.metadata == {"channel": "shelf", "cause": cause}
    await refuse(list_templates(shelf))
    assert Shelf.asked == 1
    monkeypatch.setattr(templates, "ASK_AGAIN_SECONDS", 0.0)
    Shelf.answer = [make_template("a", body="x" * 4_001, buttons=("y",) * 30)]
    (listed,) = (await list_templates(shelf)).templates
    assert (listed.body, len(listed.buttons)) == ("", 20)


async def test_templates_of_a_provider_that_hangs_are_waited_for_no_longer_than_a_call(
    shelf: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(templates, "LONGEST_CALL", timedelta(seconds=0.1))
    Shelf.delay = 60
    assert (await refuse(list_templates(shelf))).metadata["cause"] == "it did not answer in time"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"channel": "fax"}, "RESOURCE_NOT_FOUND"),
        ({"channel": "email"}, "CHANNEL_NOT_READY"),
        ({"channel": "sms", "parent": "apps/other"}, "RESOURCE_NOT_FOUND"),
        ({"channel": "sms", "page_token": "x"}, "FIELDS_INVALID"),
        ({"channel": "sms", "page_size": -1}, "FIELDS_INVALID"),
    ],
)
async def test_templates_of_nothing_are_refused(shared_world: World, fields: dict[str, Any], reason: str) -> None:
    request = channels_pb2.ListTemplatesRequest(**{"parent": shared_world.client.parent, **fields})
    assert (await refuse(shared_world.client.channels.ListTemplates(request))).reason == reason
