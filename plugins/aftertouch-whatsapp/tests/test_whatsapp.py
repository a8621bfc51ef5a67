"""The WhatsApp channel against a Graph API on loopback, and against pywa, which signs, reads and writes the same things."""

import asyncio
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

import aftertouch_whatsapp
import pytest
from aftertouch_twilio import REASONS
from aftertouch_whatsapp import WhatsAppAddress, WhatsAppChannel, WhatsAppContent, WhatsAppSettings
from aftertouch_whatsapp.meta import CODES
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from pluggy import PluginManager
from pydantic import ValidationError
from pywa import WhatsApp
from pywa.types.templates import (
    BodyText,
    CopyCodeButton,
    HeaderImage,
    HeaderText,
    QuickReplyButton,
    TemplateLanguage,
    URLButton,
)

from aftertouch import hookspecs
from aftertouch.channels import (
    Accepted,
    InvalidSignature,
    InvalidWebhook,
    Limit,
    Message,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Reply,
    Template,
    TemplatesUnreadable,
    Unclear,
    Webhook,
    WebhookAnswer,
    WebhookRequest,
)
from aftertouch.delivery.render import render_words
from aftertouch.signals import CORE_IMPLICATIONS, close_implications, parse

TOKEN = "AbCdEfGhIjKlMnOpQrStUv-_"
WEBHOOK_URL = "https://hooks.example.com/v1/webhooks/whatsapp"
WAMID = "wamid.HBgLMTY1MDM4Nzk0MzkVAgARGBI0QUQ2MjA4NEYyRkExNjMyREUA"
APP_SECRET = "s3cr3t"


def make_channel(**values: object) -> WhatsAppChannel:
    settings = WhatsAppSettings.model_validate(
        {
            "phone_number_id": "106540352242922",
            "access_token": "EAAJB",
            "app_secret": APP_SECRET,
            "verify_token": "wörd",
            "timeout_seconds": "30",
            **values,
        }
    )
    return WhatsAppChannel(settings, webhook_url=WEBHOOK_URL)


def make_message(phone: str = "+16502530000", **content: object) -> Message[WhatsAppAddress, WhatsAppContent]:
    values = {"template": "summer_sale", "language": "en_US", **content}
    return Message(token=TOKEN, address=WhatsAppAddress(phone=phone), content=WhatsAppContent.model_validate(values))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class GraphApi:
    """Answers every request as it is told, and keeps what it was sent."""

    url: str
    answer: Handler
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)


@asynccontextmanager
async def run_graph_api(answer: Handler) -> AsyncIterator[GraphApi]:
    async def take(request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = await request.json() if request.can_read_body else dict(request.query)
        api.requests.append((request.method, request.path, headers, body))
        return await api.answer(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    async with TestServer(app, host="127.0.0.1") as server:
        api = GraphApi(url=str(server.make_url("/")), answer=answer)
        yield api


def answer_with(status: int, body: object = None, **headers: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


def refuse_with(status: int, code: int, **headers: str) -> Handler:
    return answer_with(status, {"error": {"message": "no", "type": "OAuthException", "code": code, "fbtrace_id": "A"}}, **headers)


accept = answer_with(
    200,
    {
        "messaging_product": "whatsapp",
        "contacts": [{"input": "+16502530000", "wa_id": "16502530000"}],
        "messages": [{"id": WAMID, "message_status": "accepted"}],
    },
)


async def send_one(answer: Handler, **content: object) -> Outcome:
    async with run_graph_api(answer) as api, make_channel(api_url=api.url) as channel:
        [outcome] = await channel.send([make_message(**content)])
    return outcome


# What is declared


def test_plugin_registers_the_channel() -> None:
    plugins = PluginManager(hookspecs.PROJECT)
    plugins.add_hookspecs(hookspecs)
    plugins.register(aftertouch_whatsapp)
    assert plugins.hook.aftertouch_register_channels() == [(WhatsAppChannel,)]


def test_actions_use_declared_signals_only() -> None:
    implies = {**CORE_IMPLICATIONS, **{signal.name: signal.implies for signal in WhatsAppChannel.signals}}
    assert "read" in close_implications(implies)["sent"]
    for action in WhatsAppChannel.actions:
        parse(action.expression, implies)


def test_reasons_name_every_code_once() -> None:
    assert sum(map(len, CODES.values())) == len({code for codes in CODES.values() for code in codes})
    twice = REASONS.keys() & {code for codes in CODES.values() for code in codes}
    assert all(code == "connect_error" or code.startswith("http_") for code in twice), "Meta's and Twilio's codes are apart"


def test_address_key_keeps_its_plus_sign() -> None:
    assert make_channel().parse_address({"phone": "+1 (650) 253-0000"}).key == "+16502530000"
    with pytest.raises(ValidationError):
        make_channel().parse_address({"phone": "16502530000"})


@pytest.mark.parametrize(
    "values",
    [
        {"template": "Summer Sale"},
        {"language": "english"},
        {"body": {"First Name": "Ann"}},
        {"buttons": [{"type": "call", "index": 0, "value": "1"}]},
        {"header": {"type": "audio", "link": "https://example.com/a.mp3"}},
        {"text": "hello"},
    ],
)
def test_content_that_no_template_takes_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        WhatsAppContent.model_validate({"template": "summer_sale", "language": "en_US", **values})


# Sending


async def test_send_asks_meta_for_one_message() -> None:
    async with run_graph_api(accept) as api, make_channel(api_url=api.url) as channel:
        outcomes = await channel.send([make_message(body=["Ann", "25 %"])])
        [(method, path, headers, body)] = api.requests
    assert outcomes == [Accepted(message_id=WAMID)]
    assert (method, path) == ("POST", "/v23.0/106540352242922/messages")
    assert headers["authorization"] == "Bearer EAAJB"
    assert body["to"] == "+16502530000"
    assert body["biz_opaque_callback_data"] == TOKEN


@pytest.mark.parametrize(
    ("content", "params"),
    [
        ({}, []),
        ({"body": ["Ann", "25 %"]}, [BodyText.params("Ann", "25 %")]),
        ({"body": {"first_name": "Ann", "discount": "25 %"}}, [BodyText.params(first_name="Ann", discount="25 %")]),
        ({"header": "Summer"}, [HeaderText.params("Summer")]),
        (
            {"header": {"type": "image", "link": "https://example.com/a.png"}},
            [HeaderImage.params(image="https://example.com/a.png")],
        ),
        (
            {
                "buttons": [
                    {"type": "url", "index": 0, "value": "summer"},
                    {"type": "quick_reply", "index": 1, "value": "stop"},
                    {"type": "copy_code", "index": 2, "value": "25OFF"},
                ]
            },
            [
                URLButton.params(url_variable="summer", index=0),
                QuickReplyButton.params(callback_data="stop", index=1),
                CopyCodeButton.params(coupon_code="25OFF", index=2),
            ],
        ),
    ],
    ids=["nothing", "positional", "named", "header text", "header image", "buttons"],
)
async def test_send_writes_what_pywa_writes(content: dict[str, object], params: list[Any]) -> None:
    def send_with_pywa(url: str) -> None:
        peer = WhatsApp(phone_id="106540352242922", token="EAAJB")
        peer.api._session.base_url = f"{url}v23.0"
        peer.send_template(
            "+16502530000", "summer_sale", TemplateLanguage.ENGLISH_US, params, tracker=TOKEN, sender="106540352242922"
        )
        peer.api._session.close()

    async with run_graph_api(accept) as api, make_channel(api_url=api.url) as channel:
        await channel.send([make_message(**content)])
        await asyncio.to_thread(send_with_pywa, api.url)
        [(_, our_path, _, ours), (_, peers_path, _, peers)] = api.requests
    assert our_path == peers_path
    # pywa writes a component's kind in capitals and its index as a number; Meta's reference writes them as we do.
    for component in peers["template"]["components"]:
        component |= {name: str(value).lower() for name, value in component.items() if name != "parameters"}
    assert ours == peers


async def test_send_keeps_the_order_of_its_messages() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        number = int((await request.json())["template"]["name"])
        await asyncio.sleep(0.02 * (3 - number))
        if number % 2:
            return web.json_response({"messages": [{"id": f"wamid.{number}"}]})
        return web.json_response({"error": {"code": 131026}}, status=400)

    async with run_graph_api(answer) as api, make_channel(api_url=api.url) as channel:
        outcomes = await channel.send([make_message(template=str(number)) for number in range(4)])
    refused = Refused(code="131026")
    assert outcomes == [refused, Accepted(message_id="wamid.1"), refused, Accepted(message_id="wamid.3")]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (400, 131026, ReasonClass.RECIPIENT_GONE),
        (400, 131050, ReasonClass.OPTED_OUT),
        (400, 131049, ReasonClass.CAPPED),
        (400, 131047, ReasonClass.WINDOW),
        (400, 132018, ReasonClass.CONTENT),
        (401, 190, ReasonClass.CONFIG),
        (403, 200, ReasonClass.CONFIG),
        (404, 132001, ReasonClass.CONFIG),
        (400, 130429, ReasonClass.RATE),
        (500, 131000, ReasonClass.TRANSIENT),
        (502, 2, ReasonClass.TRANSIENT),
        (400, 999999, ReasonClass.UNKNOWN),
    ],
)
async def test_send_classifies_a_refusal_by_metas_code(status: int, code: int, reason: ReasonClass) -> None:
    assert await send_one(refuse_with(status, code)) == Refused(code=str(code))
    assert WhatsAppChannel.classify(str(code)) is reason


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, ReasonClass.CONFIG), (429, ReasonClass.RATE), (500, ReasonClass.TRANSIENT), (503, ReasonClass.TRANSIENT)],
)
async def test_send_classifies_a_refusal_without_a_code_by_its_status(status: int, reason: ReasonClass) -> None:
    assert await send_one(answer_with(status)) == Refused(code=f"http_{status}")
    assert WhatsAppChannel.classify(f"http_{status}") is reason


async def test_send_keeps_the_delay_that_is_asked_for() -> None:
    expected = Refused(code="130429", retry_after=timedelta(seconds=30))
    assert await send_one(refuse_with(429, 130429, Retry_After="30")) == expected


@pytest.mark.parametrize("status", [502, 504])
async def test_send_is_unclear_when_only_a_gateway_answers(status: int) -> None:
    assert await send_one(answer_with(status)) == Unclear(detail=f"http_{status}")


async def test_send_follows_no_redirect() -> None:
    async with run_graph_api(accept) as target:
        assert await send_one(answer_with(307, Location=target.url)) == Refused(code="http_307")
        assert target.requests == []


@pytest.mark.parametrize("body", [None, [], {}, {"messages": []}, {"messages": ["x"]}, {"messages": [{"id": "x" * 70_000}]}])
async def test_send_is_unclear_when_a_success_names_no_message(body: object) -> None:
    assert isinstance(await send_one(answer_with(200, body)), Unclear)


async def test_send_is_unclear_when_the_answer_stalls() -> None:
    released = asyncio.Event()

    async def stall(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response()

    async with run_graph_api(stall) as api, make_channel(api_url=api.url, timeout_seconds="3") as channel:
        [outcome] = await channel.send([make_message()])
        released.set()
    assert isinstance(outcome, Unclear)
    assert len(api.requests) == 1


async def test_send_is_unclear_when_the_connection_is_reset() -> None:
    async def reset(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with run_graph_api(reset) as api, make_channel(api_url=api.url) as channel:
        [outcome] = await channel.send([make_message()])
    assert isinstance(outcome, Unclear)
    assert len(api.requests) == 1


async def test_send_is_refused_when_nothing_listens() -> None:
    # A port that is bound and not listened on: one that is only free may be taken by somebody meanwhile.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with make_channel(api_url=f"http://127.0.0.1:{bound.getsockname()[1]}") as channel:
            assert await channel.send([make_message()]) == [Refused(code="connect_error")]
    assert WhatsAppChannel.classify("connect_error") is ReasonClass.TRANSIENT


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ({"body": ["two\nlines"]}, "parameter_invalid"),
        ({"body": {"name": "a\ttab"}}, "parameter_invalid"),
        ({"body": ["five     spaces"]}, "parameter_invalid"),
        ({"body": [""]}, "parameter_invalid"),
        ({"header": " "}, "parameter_invalid"),
        ({"buttons": [{"type": "url", "index": 0, "value": ""}]}, "parameter_invalid"),
        ({"body": ["x" * 1000, "y" * 25]}, "payload_too_large"),
    ],
)
async def test_send_keeps_metas_limits_before_asking(content: dict[str, object], code: str) -> None:
    async with run_graph_api(accept) as api, make_channel(api_url=api.url) as channel:
        assert await channel.send([make_message(**content)]) == [Refused(code=code)]
        assert api.requests == []
    assert WhatsAppChannel.classify(code) is ReasonClass.CONTENT


# Before the launch

BODY = {"type": "BODY", "text": "Hello {{1}}, {{2}} and {{1}}"}


def make_listed(*components: object, **values: object) -> dict[str, object]:
    """A template as Meta lists it."""
    listed = {"name": "summer_sale", "language": "en_US", "status": "APPROVED", "id": "1", "parameter_format": "POSITIONAL"}
    return {**listed, "components": list(components), **values}


async def check(listed: list[object], **content: object) -> list[tuple[str, str]]:
    answer = answer_with(200, {"data": listed, "paging": {}})
    async with run_graph_api(answer) as api, make_channel(api_url=api.url, business_account_id="1022") as channel:
        problems = await channel.check_content(make_message(**content).content)
        [(method, path, headers, query)] = api.requests
    assert (method, path, query["name"]) == ("GET", "/v23.0/1022/message_templates", "summer_sale")
    assert headers["authorization"] == "Bearer EAAJB"
    return [(problem.field, problem.text) for problem in problems]


@pytest.mark.parametrize(
    ("listed", "content"),
    [
        (make_listed(BODY), {"body": ["{{ first_name }}", "x"]}),
        (make_listed({"type": "BODY", "text": "Hello"}), {}),
        (
            make_listed({"type": "BODY", "text": "Hello {{first_name}}"}, parameter_format="NAMED"),
            {"body": {"first_name": "{{ first_name }}"}},
        ),
        (make_listed({"type": "HEADER", "format": "TEXT", "text": "For {{1}}"}), {"header": "you"}),
        (
            make_listed({"type": "HEADER", "format": "IMAGE"}),
            {"header": {"type": "image", "link": "https://shop.example/sale.png"}},
        ),
        (
            make_listed(
                {"type": "BUTTONS", "buttons": [{"type": "QUICK_REPLY"}, {"type": "URL", "url": "https://a.example/{{1}}"}]}
            ),
            {"buttons": [{"type": "url", "index": 1, "value": "x"}]},
        ),
        (make_listed({"type": "BUTTONS", "buttons": [{"type": "URL", "url": "https://a.example/"}]}, {"type": "FOOTER"}), {}),
    ],
)
async def test_content_that_fits_its_approved_template_has_no_problem(listed: object, content: dict[str, object]) -> None:
    assert await check([make_listed(name="summer_sale_2", status="REJECTED"), listed], **content) == []


@pytest.mark.parametrize(
    ("listed", "content", "problem"),
    [
        ([], {}, ("template", "no template 'summer_sale'")),
        ([make_listed(name="summer_sale_2")], {}, ("template", "no template")),
        ([make_listed(language="de")], {}, ("language", "in de only")),
        ([make_listed(status="PAUSED")], {}, ("template", "is PAUSED")),
        ([make_listed(BODY)], {"body": ["x"]}, ("body", "has 1 parameters, and the template wants 2")),
        ([make_listed(BODY)], {"body": {"a": "x"}}, ("body", "wants them in order")),
        ([make_listed(BODY, parameter_format="NAMED")], {"body": ["x"]}, ("body", "wants them by name: 1, 2")),
        (
            [make_listed({"type": "BODY", "text": "{{first_name}}"}, parameter_format="NAMED")],
            {"body": {}},
            ("body", "lacks the template's parameter 'first_name'"),
        ),
        (
            [make_listed({"type": "BODY", "text": "Hello"}, parameter_format="NAMED")],
            {"body": {"name": "x"}},
            ("body.name", "no such parameter"),
        ),
        ([make_listed({"type": "HEADER", "format": "IMAGE"})], {}, ("header", "wants image, and has nothing")),
        ([make_listed()], {"header": "x"}, ("header", "takes no parameter, and has text")),
        (
            [make_listed({"type": "BUTTONS", "buttons": [{"type": "URL", "url": "https://a.example/{{1}}"}]})],
            {},
            ("buttons", "button 0 wants the end of its URL"),
        ),
        ([make_listed({"type": "BUTTONS", "buttons": [{"type": "COPY_CODE"}]})], {}, ("buttons", "wants the code")),
        (
            [make_listed()],
            {"buttons": [{"type": "quick_reply", "index": 0, "value": "x"}]},
            ("buttons[0]", "is none, not quick_reply"),
        ),
    ],
)
async def test_content_that_meta_would_refuse_is_told_why(
    listed: list[object], content: dict[str, object], problem: tuple[str, str]
) -> None:
    [(field, told)] = await check(listed, **content)
    assert field == problem[0]
    assert problem[1] in told


async def test_content_is_not_looked_up_without_the_account() -> None:
    async with run_graph_api(accept) as api, make_channel(api_url=api.url) as channel:
        assert await channel.check_content(make_message().content) == ()
        assert api.requests == []


@pytest.mark.parametrize("answer", [refuse_with(400, 200), answer_with(500), answer_with(200, {"data": [{"name": 1}]})])
async def test_list_that_cannot_be_read_is_an_error_and_no_problem(answer: Handler) -> None:
    async with run_graph_api(answer) as api, make_channel(api_url=api.url, business_account_id="1022") as channel:
        with pytest.raises(TemplatesUnreadable):
            await channel.check_content(make_message().content)


# Choosing one

BUTTONS = {
    "type": "BUTTONS",
    "buttons": [
        {"type": "QUICK_REPLY", "text": "Later"},
        {"type": "URL", "text": "Shop", "url": "https://shop.example/{{1}}"},
        {"type": "COPY_CODE", "text": "Copy"},
        {"type": "URL", "text": "About us", "url": "https://shop.example/about"},
    ],
}


async def list_templates(*listed: object, **settings: object) -> list[Template]:
    chosen = {"business_account_id": "1022", **settings}
    answer = answer_with(200, {"data": list(listed), "paging": {}})
    async with run_graph_api(answer) as api, make_channel(api_url=api.url, **chosen) as channel:
        return list(await channel.list_templates())


async def test_template_is_offered_with_a_content_that_uses_it_and_its_words_over_that() -> None:
    header, footer = {"type": "HEADER", "format": "TEXT", "text": "For {{1}}"}, {"type": "FOOTER", "text": "Until {Sunday}"}
    body = {"type": "BODY", "text": "Dear {{2}}, {{ 1 }} off, {{% 3 %}}"}
    (template,) = await list_templates(make_listed(header, body, footer, BUTTONS))
    assert template == Template(
        name="summer_sale",
        language="en_US",
        status="APPROVED",
        content={
            "template": "summer_sale",
            "language": "en_US",
            "header": "",
            "body": ["", ""],
            "buttons": [{"type": "url", "index": 1, "value": ""}, {"type": "copy_code", "index": 2, "value": ""}],
        },
        header="For {{ header | default: '[1]' }}",
        body=("Dear {{ body[1] | default: '[2]' }}, {{ body[0] | default: '[1]' }} off, {{ '{' }}{{ '{' }}% 3 %}}"),
        footer="Until {{ '{' }}Sunday}",
        buttons=("Later", "Shop", "Copy", "About us"),
    )
    assert render_words({"body": template.body}, {"body": ["20 %", ""]}) == {"body": "Dear [2], 20 % off, {{% 3 %}}"}


async def test_template_with_names_and_media_is_offered_by_them() -> None:
    media = {"type": "HEADER", "format": "IMAGE"}
    listed = make_listed(media, {"type": "BODY", "text": "Dear {{first_name}}"}, parameter_format="NAMED", status="PAUSED")
    (template,) = await list_templates(listed, {"name": 1})
    assert (template.is_usable, template.status) == (False, "PAUSED")
    assert template.content["body"] == {"first_name": ""}
    assert template.content["header"] == {"type": "image", "link": ""}
    words = {"header": template.header, "body": template.body}
    content = {"header": {"link": "https://cdn.example/1.png"}, "body": {"first_name": "Ada"}}
    assert render_words(words, content) == {"header": "https://cdn.example/1.png", "body": "Dear Ada"}
    assert render_words(words, {}) == {"header": "[image]", "body": "Dear [first_name]"}


async def test_templates_are_read_page_by_page() -> None:
    names = [f"sale_{number}" for number in range(3)]

    async def answer(request: web.Request) -> web.StreamResponse:
        at = int(request.query.get("after", "0"))
        paging = {"cursors": {"before": "x", "after": str(at + 1)}} | ({"next": "https://elsewhere.example/"} if at < 2 else {})
        return web.json_response({"data": [make_listed(name=names[at])], "paging": paging})

    async with run_graph_api(answer) as api, make_channel(api_url=api.url, business_account_id="1022") as channel:
        assert [template.name for template in await channel.list_templates()] == names
        assert [request[1] for request in api.requests] == ["/v23.0/1022/message_templates"] * 3


async def test_templates_of_an_account_that_nobody_named_are_unreadable() -> None:
    with pytest.raises(TemplatesUnreadable, match="business_account_id"):
        await list_templates(business_account_id="")


async def test_parameter_that_is_empty_for_everybody_is_told_before_the_launch() -> None:
    listed = make_listed(BODY, {"type": "HEADER", "format": "TEXT", "text": "{{1}}"}, BUTTONS)
    buttons = [{"type": "url", "index": 1, "value": " "}, {"type": "copy_code", "index": 2, "value": "x"}]
    problems = await check([listed], body=["x", ""], header="", buttons=buttons)
    assert problems == [("body[1]", "is empty"), ("header", "is empty"), ("buttons[0].value", "is empty")]


def test_limits_are_the_numbers_and_the_persons() -> None:
    [number, person] = make_channel().limits(make_message())
    assert number == Limit(key="number/106540352242922", interval=timedelta(milliseconds=12.5))
    assert person.interval == timedelta(seconds=6)
    assert person in make_channel().limits(make_message(template="winter_sale"))
    assert person not in make_channel().limits(make_message("+16502530001"))
    assert "650253" not in person.key


async def test_refusal_names_the_limit_that_is_exhausted() -> None:
    [_, person] = make_channel().limits(make_message())
    assert await send_one(refuse_with(400, 131056)) == Refused(code="131056", limit=person.key)
    for code in (130429, 80007):
        assert await send_one(refuse_with(429, code)) == Refused(code=str(code))
    assert {WhatsAppChannel.classify(code) for code in ("131056", "130429", "80007")} == {ReasonClass.RATE}


# Webhooks


def make_status(status: str, **values: object) -> dict[str, object]:
    return {
        "id": WAMID,
        "status": status,
        "timestamp": "1751142888",
        "recipient_id": "16505551234",
        "biz_opaque_callback_data": TOKEN,
        **values,
    }


def make_update(*statuses: object, field: str = "messages", **value: object) -> dict[str, object]:
    metadata = {"display_phone_number": "15550783881", "phone_number_id": "106540352242922"}
    full = {"messaging_product": "whatsapp", "metadata": metadata, **value}
    if statuses:
        full["statuses"] = list(statuses)
    changes = [{"field": field, "value": full}]
    return {"object": "whatsapp_business_account", "entry": [{"id": "102290129340398", "changes": changes}]}


def make_request(body: bytes, *, secret: str = APP_SECRET, method: str = "POST") -> WebhookRequest:
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    headers = {"x-hub-signature-256": f"sha256={signature}"}
    return WebhookRequest(method=method, url=WEBHOOK_URL, path="", headers=headers, body=body)


def make_verification(**query: str) -> WebhookRequest:
    return WebhookRequest(method="GET", url=f"{WEBHOOK_URL}?{urlencode(query)}", path="", headers={}, body=b"")


@settings(deadline=None)
@given(st.binary(), st.sampled_from(["", "sha256=", "sha256=00"]))
def test_webhook_signature_is_judged_as_pywa_judges_it(body: bytes, forged: str) -> None:
    peer = WhatsApp(phone_id="1", token="EAAJB", app_secret=APP_SECRET, validate_updates=True)
    good = make_request(body)
    assert peer.webhook_update_validator(body, good.headers["x-hub-signature-256"]) is None
    make_channel().verify(good)
    bad = WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={"x-hub-signature-256": forged}, body=body)
    assert peer.webhook_update_validator(body, forged) is not None
    with pytest.raises(InvalidSignature):
        make_channel().verify(bad)


@pytest.mark.parametrize(
    "request_",
    [
        make_request(b"{}", secret="other"),
        make_request(b"{}", method="PUT"),
        WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={}, body=b"{}"),
        WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={"x-hub-signature-256": "é"}, body=b"{}"),
    ],
    ids=["other secret", "other method", "unsigned", "not ascii"],
)
def test_webhook_that_proves_nothing_is_refused(request_: WebhookRequest) -> None:
    with pytest.raises(InvalidSignature):
        make_channel().verify(request_)


def test_webhook_registration_is_answered_with_the_bare_challenge() -> None:
    channel = make_channel()
    request = make_verification(**{"hub.mode": "subscribe", "hub.challenge": "1158201444", "hub.verify_token": "wörd"})
    channel.verify(request)
    webhook = channel.parse(request)
    assert (webhook.answer.status, webhook.answer.body) == (200, "1158201444")
    assert webhook.receipts == ()


@pytest.mark.parametrize("query", [{}, {"hub.mode": "subscribe"}, {"hub.verify_token": "wörd"}])
def test_webhook_registration_with_another_word_is_refused(query: dict[str, str]) -> None:
    with pytest.raises(InvalidSignature):
        make_channel().verify(make_verification(**{"hub.challenge": "1", **query}))


def read(update: object) -> tuple[tuple[Receipt, ...], tuple[str, ...]]:
    channel, request = make_channel(), make_request(json.dumps(update).encode())
    channel.verify(request)
    webhook = channel.parse(request)
    assert webhook.answer.status == 200
    return webhook.receipts, webhook.unrecognized


@pytest.mark.parametrize("status", ["sent", "delivered", "read"])
def test_webhook_brings_the_signal_of_its_status(status: str) -> None:
    time = datetime(2025, 6, 28, 20, 34, 48, tzinfo=UTC)
    assert read(make_update(make_status(status))) == ((Receipt(signal=status, token=TOKEN, message_id=WAMID, time=time),), ())


def test_webhook_brings_the_code_of_a_failure() -> None:
    [receipt], _ = read(make_update(make_status("failed", errors=[{"code": 131049, "title": "..."}, {"code": 1}])))
    assert (receipt.signal, receipt.code) == ("failed", "131049")


def test_webhook_of_a_failure_without_a_code_is_still_a_failure() -> None:
    [receipt], _ = read(make_update(make_status("failed")))
    assert (receipt.signal, receipt.code) == ("failed", None)


@pytest.mark.parametrize("data", [None, "", "another system's data", TOKEN + "x"])
def test_webhook_without_our_token_names_the_message(data: str | None) -> None:
    [receipt], _ = read(make_update(make_status("read", biz_opaque_callback_data=data)))
    assert (receipt.token, receipt.message_id) == (None, WAMID)


@pytest.mark.parametrize("status", ["deleted", "warning", "played", "teleported"])
def test_webhook_of_an_unknown_status_is_kept_without_the_person(status: str) -> None:
    receipts, [text] = read(make_update(make_status(status)))
    assert receipts == ()
    assert status in text
    assert WAMID in text
    assert "16505551234" not in text


def test_webhook_of_many_entries_loses_none() -> None:
    update = make_update(make_status("sent"), make_status("delivered"))
    more = make_update(make_status("read"))
    update["entry"] = [*update["entry"], *more["entry"]]  # type: ignore[misc]
    receipts, _ = read(update)
    assert [receipt.signal for receipt in receipts] == ["sent", "delivered", "read"]


@pytest.mark.parametrize(
    "strange", [None, 1, "x", [], {}, {"id": WAMID}, {"id": "", "status": "sent"}, make_status("sent", timestamp="tomorrow")]
)
def test_webhook_with_one_strange_status_keeps_the_others(strange: object) -> None:
    receipts, unrecognized = read(make_update(make_status("sent"), strange, make_status("read")))
    assert [receipt.signal for receipt in receipts] == ["sent", "read"]
    assert len(unrecognized) == 1


def test_webhook_of_another_field_is_kept() -> None:
    assert read(make_update(field="phone_number_quality_update")) == ((), ("field=phone_number_quality_update",))


def test_webhook_of_an_account_error_is_kept() -> None:
    assert read(make_update(errors=[{"code": 131031, "title": "locked"}])) == ((), ("error=131031",))


# What people write

NUMBER = WhatsAppAddress(phone="+16502530000")
SENT_AT = datetime(2025, 6, 28, 20, 34, 48, tzinfo=UTC)


def make_inbound(kind: str, **values: object) -> dict[str, object]:
    return {"from": "16502530000", "id": "wamid.in", "timestamp": "1751142888", "type": kind, **values}


def read_inbound(*messages: object, **value: object) -> Webhook:
    return make_channel().parse(make_request(json.dumps(make_update(messages=list(messages), **value)).encode()))


@pytest.mark.parametrize(
    ("message", "message_id"),
    [
        (make_inbound("text", text={"body": "Great!"}), None),
        (make_inbound("text", text={"body": "Great!"}, context={"from": "15550783881", "id": WAMID}), WAMID),
        (make_inbound("button", button={"payload": "YES", "text": "Yes"}, context={"from": "1", "id": WAMID}), WAMID),
        (make_inbound("interactive", interactive={"type": "button_reply"}, context={"id": WAMID}), WAMID),
        (make_inbound("image", image={"id": "1"}), None),
        (make_inbound("reaction", reaction={"message_id": WAMID}), None),
        (make_inbound("unheard_of"), None),
    ],
)
def test_message_of_a_person_is_a_reply_to_what_it_names(message: dict[str, object], message_id: str | None) -> None:
    webhook = read_inbound(message)
    assert webhook.replies == (Reply(address=NUMBER, message_id=message_id, time=SENT_AT),)
    assert webhook.standings == webhook.unrecognized == ()


@pytest.mark.parametrize(
    ("message", "state"),
    [
        (make_inbound("text", text={"body": " stop "}), "opted_out"),
        (make_inbound("button", button={"payload": "x", "text": "Stop promotions"}), "opted_out"),
        (make_inbound("button", button={"payload": "STOP", "text": "Basta"}, context={"id": WAMID}), "opted_out"),
        (make_inbound("text", text={"body": "Start"}), "active"),
    ],
)
def test_stop_and_start_are_respected(message: dict[str, object], state: str) -> None:
    webhook = read_inbound(message)
    assert [(standing.address, standing.state, standing.time) for standing in webhook.standings] == [(NUMBER, state, SENT_AT)]
    assert webhook.replies == webhook.unrecognized == ()


def test_text_that_only_mentions_stop_is_a_reply() -> None:
    assert read_inbound(make_inbound("text", text={"body": "Stop by any time"})).standings == ()


@pytest.mark.parametrize(("value", "state"), [("stop", "opted_out"), ("resume", "active")])
@pytest.mark.parametrize("timestamp", ["1751142888", 1751142888])
def test_preference_ends_or_resumes_the_subscription(value: str, state: str, timestamp: object) -> None:
    preference = {"wa_id": "16502530000", "detail": "x", "category": "marketing_messages", "value": value, "timestamp": timestamp}
    webhook = make_channel().parse(
        make_request(json.dumps(make_update(field="user_preferences", user_preferences=[preference])).encode())
    )
    [standing] = webhook.standings
    assert (standing.address, standing.state, standing.reason, standing.time) == (NUMBER, state, "user_preferences", SENT_AT)
    assert webhook.unrecognized == ()


def test_change_of_a_persons_number_is_no_reply() -> None:
    assert read_inbound(make_inbound("system", system={"body": "x", "wa_id": "1"})) == Webhook(answer=WebhookAnswer(status=200))


@pytest.mark.parametrize("message", [None, {}, make_inbound("text", **{"from": "x"}), make_inbound("text", text=None)])
def test_message_that_cannot_be_read_is_kept_without_the_person(message: object) -> None:
    webhook = read_inbound(message, make_inbound("text"))
    assert len(webhook.replies) == 1
    [kept] = webhook.unrecognized
    assert "650253" not in kept


def test_message_to_another_number_of_the_account_ends_nothing() -> None:
    webhook = read_inbound(make_inbound("text", text={"body": "STOP"}), metadata={"phone_number_id": "1"})
    assert webhook.standings == webhook.replies == ()
    assert len(webhook.unrecognized) == 1


def test_message_of_a_person_shows_in_nothing_that_is_kept() -> None:
    shown = repr(read_inbound(make_inbound("text", text={"body": "my secret"})))
    assert "secret" not in shown
    assert "650253" not in shown


@settings(deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_webhook_of_any_json_is_survived(update: object) -> None:
    receipts, unrecognized = read(update)
    assert receipts == ()
    assert unrecognized


def test_webhook_that_is_not_json_is_refused() -> None:
    for body in (b"", b"\xff", b"{"):
        with pytest.raises(InvalidWebhook):
            make_channel().parse(make_request(body))
