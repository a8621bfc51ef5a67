"""The WhatsApp channel over Twilio: against Twilio's two APIs on loopback, and the SDK's own signer."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import aftertouch_whatsapp.twilio
import pytest
from aftertouch_whatsapp import WhatsAppAddress, WhatsAppChannel, WhatsAppContent, WhatsAppSettings
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import ValidationError
from twilio.request_validator import RequestValidator

from aftertouch.channels import (
    Accepted,
    InvalidSignature,
    Message,
    Outcome,
    Problem,
    ReasonClass,
    Receipt,
    Refused,
    Reply,
    Standing,
    Webhook,
    WebhookRequest,
)

TOKEN = "AbCdEfGhIjKlMnOpQrStUv-_"
WEBHOOK_URL = "https://hooks.example.com/v1/webhooks/whatsapp"
ACCOUNT, SERVICE = "AC" + "0" * 32, "MG" + "1" * 32
SENDER = "+15005550006"
SID = "MM" + "2" * 32
LINK = "https://hooks.example.com/l/"


def write_template(sid: str, name: str, kind: str, shown: object, status: str = "approved") -> dict[str, Any]:
    approval = {"name": name, "status": status, "content_type": kind, "category": "MARKETING", "rejection_reason": ""}
    return {
        "sid": sid,
        "friendly_name": "x",
        "language": "en_US",
        "types": {kind: shown},
        "approval_requests": approval,
    }


PLAIN = write_template("HX" + "a" * 32, "summer_sale", "twilio/text", {"body": "Dear {{1}}, {{2}} off"})
NAMED = write_template("HX" + "b" * 32, "named_sale", "twilio/text", {"body": "Dear {{first_name}}, {{discount}} off"})
CARD = write_template(
    "HX" + "c" * 32,
    "card_sale",
    "whatsapp/card",
    {
        "header_text": None,
        "media": ["https://cdn.example/{{1}}.png"],
        "body": "Dear {{2}}, {{3}} off",
        "actions": [
            {"type": "URL", "title": "Shop", "url": f"{LINK}{{{{4}}}}"},
            {"type": "URL", "title": "About", "url": "https://shop.example/about"},
        ],
    },
)
TITLED = write_template("HX" + "d" * 32, "titled_sale", "whatsapp/card", {"header_text": "{{1}}!", "body": "Dear {{2}}"})
REPLIES = write_template(
    "HX" + "e" * 32,
    "asking_sale",
    "twilio/quick-reply",
    {"body": "Still interested?", "actions": [{"title": "Yes", "id": "yes_{{1}}"}, {"title": "Stop promotions", "id": "stop"}]},
)
CODE = write_template(
    "HX" + "f" * 32, "code_sale", "twilio/call-to-action", {"body": "Yours", "actions": [{"type": "COPY_CODE", "code": "{{1}}"}]}
)
WAITING = write_template("HX" + "1" * 32, "waiting_sale", "twilio/text", {"body": "Hello"}, "pending")
TEMPLATES = [PLAIN, NAMED, CARD, TITLED, REPLIES, CODE, WAITING]


def make_settings(**values: object) -> WhatsAppSettings:
    sender: dict[str, object] = {} if "messaging_service_sid" in values else {"sender": SENDER}
    account = {"provider": "twilio", "account_sid": ACCOUNT, "auth_token": "12345", "timeout_seconds": "30"}
    return WhatsAppSettings.model_validate({**account, **sender, **values})


def make_channel(url: str = "http://127.0.0.1:9", **values: object) -> WhatsAppChannel:
    settings = make_settings(twilio_api_url=url, twilio_content_url=url, **values)
    return WhatsAppChannel(settings, webhook_url=WEBHOOK_URL)


def make_message(template: str = "summer_sale", **content: object) -> Message[WhatsAppAddress, WhatsAppContent]:
    values = {"template": template, "language": "en_US", "body": ["Ada", "20 %"], **content}
    return Message(token=TOKEN, address=WhatsAppAddress(phone="+16502530000"), content=WhatsAppContent.model_validate(values))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Twilio:
    """Two APIs in one: messages are answered as it is told, templates are listed one a page."""

    url: str = ""
    templates: list[dict[str, Any]] = field(default_factory=lambda: list(TEMPLATES))
    list_status: int = 200
    list_delay: float = 0
    answer: tuple[int, object] = (201, {"sid": SID, "status": "queued"})
    forms: list[dict[str, str]] = field(default_factory=list)
    lists: int = 0

    async def create(self, request: web.Request) -> web.StreamResponse:
        assert request.path == f"/2010-04-01/Accounts/{ACCOUNT}/Messages.json"
        assert request.headers["Authorization"].startswith("Basic ")
        self.forms.append({name: str(value) for name, value in (await request.post()).items()})
        return web.json_response(self.answer[1], status=self.answer[0])

    async def list(self, request: web.Request) -> web.StreamResponse:
        assert request.headers["Authorization"].startswith("Basic ")
        page = int(request.query.get("Page", "0"))
        self.lists += page == 0
        await asyncio.sleep(self.list_delay)
        following = (
            f"https://elsewhere.example/v1/ContentAndApprovals?Page={page + 1}" if page + 1 < len(self.templates) else None
        )
        contents = self.templates[page : page + 1]
        return web.json_response({"contents": contents, "meta": {"next_page_url": following}}, status=self.list_status)


@asynccontextmanager
async def run_twilio(**values: Any) -> AsyncIterator[Twilio]:
    twilio = Twilio(**values)
    app = web.Application()
    app.router.add_post("/{path:.*}", twilio.create)
    app.router.add_get("/v1/ContentAndApprovals", twilio.list)
    async with TestServer(app, host="127.0.0.1") as server:
        twilio.url = str(server.make_url("/"))
        yield twilio


async def send_one(message: Message[WhatsAppAddress, WhatsAppContent], **values: Any) -> tuple[Outcome, dict[str, str]]:
    async with run_twilio(**values) as twilio, make_channel(twilio.url) as channel:
        [outcome] = await channel.send([message])
    return outcome, twilio.forms[0] if twilio.forms else {}


# Settings


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        (
            {},
            {("phone_number_id", "missing"), ("access_token", "missing"), ("app_secret", "missing"), ("verify_token", "missing")},
        ),
        ({"provider": "twilio", "sender": SENDER}, {("account_sid", "missing"), ("auth_token", "missing")}),
        ({"provider": "twilio", "account_sid": ACCOUNT, "auth_token": "", "sender": SENDER}, {("auth_token", "missing")}),
        ({"provider": "twilio", "account_sid": ACCOUNT, "auth_token": "x"}, {("messaging_service_sid", "value_error")}),
        (
            {"provider": "twilio", "account_sid": ACCOUNT, "auth_token": "x", "sender": SENDER, "messaging_service_sid": SERVICE},
            {("messaging_service_sid", "value_error")},
        ),
        ({"provider": "vonage"}, {("provider", "literal_error")}),
    ],
)
def test_settings_name_what_a_provider_lacks(values: dict[str, object], faults: set[tuple[str, str]]) -> None:
    with pytest.raises(ValidationError) as caught:
        WhatsAppSettings.model_validate(values)
    assert {(str(fault["loc"][0]), fault["type"]) for fault in caught.value.errors()} == faults


# Sending


async def test_send_asks_twilio_for_one_message() -> None:
    outcome, form = await send_one(make_message())
    assert outcome == Accepted(message_id=SID)
    assert json.loads(form.pop("ContentVariables")) == {"1": "Ada", "2": "20 %"}
    assert form == {
        "To": "whatsapp:+16502530000",
        "From": f"whatsapp:{SENDER}",
        "ContentSid": PLAIN["sid"],
        "StatusCallback": f"{WEBHOOK_URL}?t={TOKEN}#rc=5&rp=all",
    }


async def test_send_names_a_service_instead_of_a_sender() -> None:
    async with run_twilio() as twilio, make_channel(twilio.url, messaging_service_sid=SERVICE) as channel:
        await channel.send([make_message()])
    assert (twilio.forms[0]["MessagingServiceSid"], "From" in twilio.forms[0]) == (SERVICE, False)


@pytest.mark.parametrize(
    ("message", "variables"),
    [
        (make_message("named_sale", body={"first_name": "Ada", "discount": "20 %"}), {"first_name": "Ada", "discount": "20 %"}),
        (
            make_message(
                "card_sale",
                header={"type": "image", "link": "https://cdn.example/summer.png"},
                buttons=[{"type": "url", "index": 0, "value": f"{LINK}{TOKEN}0"}],
            ),
            {"1": "summer", "2": "Ada", "3": "20 %", "4": f"{TOKEN}0"},
        ),
        (
            make_message(
                "card_sale",
                header={"type": "image", "link": "https://cdn.example/summer.png"},
                buttons=[{"type": "url", "index": 0, "value": "sale?x=1"}],
            ),
            {"1": "summer", "2": "Ada", "3": "20 %", "4": "sale?x=1"},
        ),
        (make_message("titled_sale", header="Sale", body=["Ada"]), {"1": "Sale", "2": "Ada"}),
        (make_message("asking_sale", body=[], buttons=[{"type": "quick_reply", "index": 0, "value": "summer"}]), {"1": "summer"}),
        (make_message("code_sale", body=[], buttons=[{"type": "copy_code", "index": 0, "value": "SAVE20"}]), {"1": "SAVE20"}),
    ],
    ids=["named", "tracked button", "button", "header", "reply", "code"],
)
async def test_send_fills_text_header_and_buttons(
    message: Message[WhatsAppAddress, WhatsAppContent], variables: dict[str, str]
) -> None:
    outcome, form = await send_one(message)
    assert isinstance(outcome, Accepted)
    assert json.loads(form["ContentVariables"]) == variables


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (make_message("winter_sale"), "template_unknown"),
        (make_message(language="es"), "template_unknown"),
        (make_message(body=["Ada"]), "template_misfit"),
        (make_message("card_sale", header={"type": "image", "link": "https://elsewhere.example/summer.png"}), "template_misfit"),
        (make_message("asking_sale", body=[], buttons=[{"type": "quick_reply", "index": 1, "value": "x"}]), "template_misfit"),
    ],
)
async def test_what_no_template_takes_pauses_the_campaign(message: Message[WhatsAppAddress, WhatsAppContent], code: str) -> None:
    outcome, form = await send_one(message)
    assert (outcome, form) == (Refused(code=code), {})
    assert WhatsAppChannel.classify(code) is ReasonClass.CONFIG


async def test_templates_are_read_once_for_many_messages_and_again_when_one_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_twilio(templates=[NAMED]) as twilio, make_channel(twilio.url) as channel:
        named = make_message("named_sale", body={"first_name": "Ada", "discount": "20 %"})
        assert all(isinstance(outcome, Accepted) for outcome in await channel.send([named] * 5))
        assert twilio.lists == 1
        twilio.templates.append(PLAIN)
        monkeypatch.setattr(aftertouch_whatsapp.twilio, "MISSING_SECONDS", 0.0)
        [outcome] = await channel.send([make_message()])
        assert (outcome, twilio.lists) == (Accepted(message_id=SID), 2)


async def test_list_that_cannot_be_read_stops_nobody_whose_template_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_twilio() as twilio, make_channel(twilio.url) as channel:
        await channel.send([make_message()])
        twilio.list_status = 503
        monkeypatch.setattr(aftertouch_whatsapp.twilio, "KEEP_SECONDS", 0.0)
        assert await channel.send([make_message()]) == [Accepted(message_id=SID)]


async def test_list_that_hangs_is_asked_for_once_and_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of ``send`` that takes too long would leave everybody of its batch without an outcome."""
    # Long enough for the request to be there on a busy machine.
    monkeypatch.setattr(aftertouch_whatsapp.twilio, "LISTING_SECONDS", 2.0)
    async with run_twilio(list_delay=120) as twilio, make_channel(twilio.url) as channel:
        async with asyncio.timeout(25):
            outcomes = await channel.send([make_message()] * 50)
        assert outcomes == [Refused(code="templates_unreadable")] * 50
        assert (twilio.lists, twilio.forms) == (1, [])
        twilio.list_delay = 0
        monkeypatch.setattr(aftertouch_whatsapp.twilio, "LISTING_SECONDS", 60.0)
        monkeypatch.setattr(aftertouch_whatsapp.twilio, "MISSING_SECONDS", 0.0)
        assert await channel.send([make_message()]) == [Accepted(message_id=SID)]
        twilio.list_delay = 120
        monkeypatch.setattr(aftertouch_whatsapp.twilio, "LISTING_SECONDS", 0.3)
        monkeypatch.setattr(aftertouch_whatsapp.twilio, "KEEP_SECONDS", 0.0)
        assert await channel.send([make_message()]) == [Accepted(message_id=SID)]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (401, "http_401", ReasonClass.CONFIG),
        (429, "http_429", ReasonClass.RATE),
        (503, "http_503", ReasonClass.TRANSIENT),
        (418, "templates_unreadable", ReasonClass.TRANSIENT),
    ],
)
async def test_list_that_cannot_be_read_refuses_the_message(status: int, code: str, reason: ReasonClass) -> None:
    assert (await send_one(make_message(), list_status=status))[0] == Refused(code=code)
    assert WhatsAppChannel.classify(code) is reason


async def test_send_is_refused_when_nothing_listens() -> None:
    # A port that is bound and not listened on: one that is only free may be taken by somebody meanwhile.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with make_channel(f"http://127.0.0.1:{bound.getsockname()[1]}") as channel:
            assert await channel.send([make_message()]) == [Refused(code="connect_error")]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(63024, ReasonClass.RECIPIENT_GONE), (63049, ReasonClass.CAPPED), (63016, ReasonClass.WINDOW), (63018, ReasonClass.RATE)],
)
async def test_send_classifies_a_refusal_by_twilios_code(code: int, reason: ReasonClass) -> None:
    outcome, _ = await send_one(make_message(), answer=(400, {"code": code, "status": 400}))
    assert outcome == Refused(code=str(code))
    assert WhatsAppChannel.classify(str(code)) is reason


# Before the launch


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (make_message().content, None),
        (make_message("winter_sale").content, Problem(field="template", text="the account has no template 'winter_sale'")),
        (
            make_message(language="es").content,
            Problem(field="language", text="the template 'summer_sale' exists in en_US only"),
        ),
        (
            make_message("waiting_sale", body=[]).content,
            Problem(field="template", text="the template 'waiting_sale' is PENDING, not APPROVED"),
        ),
        (make_message(body=["Ada"]).content, Problem(field="body", text="has 1 parameters, and the template wants 2")),
        (
            make_message(
                "card_sale",
                header={"type": "video", "link": "https://cdn.example/summer.png"},
                buttons=[{"type": "url", "index": 0, "value": "x"}, {"type": "url", "index": 1, "value": "x"}],
            ).content,
            Problem(field="buttons[1]", text="button 1 of the template takes no value"),
        ),
        (
            make_message("card_sale", buttons=[{"type": "url", "index": 0, "value": "x"}]).content,
            Problem(field="header", text="the template's header wants media, and has nothing"),
        ),
    ],
)
async def test_content_is_held_against_the_accounts_templates(content: WhatsAppContent, problem: Problem | None) -> None:
    async with run_twilio() as twilio, make_channel(twilio.url) as channel:
        assert list(await channel.check_content(content)) == ([problem] if problem else [])


async def test_list_with_what_is_no_template_keeps_the_others() -> None:
    strange: list[Any] = [None, {"sid": "HX1"}, {"sid": 1}, write_template("HX2", "summer_sale", "twilio/text", "x")]
    async with run_twilio(templates=[*strange, PLAIN]) as twilio, make_channel(twilio.url) as channel:
        assert await channel.send([make_message()]) == [Accepted(message_id=SID)]


# Webhooks


def make_webhook(form: dict[str, str], url: str = WEBHOOK_URL) -> WebhookRequest:
    headers = {"x-twilio-signature": RequestValidator("12345").compute_signature(url, form)}
    return WebhookRequest(method="POST", url=url, path="", headers=headers, body=urlencode(form).encode())


def parse(form: dict[str, str], url: str = WEBHOOK_URL, **values: object) -> Webhook:
    channel = make_channel(**values)
    request = make_webhook(form, url)
    channel.verify(request)
    return channel.parse(request)


@pytest.mark.parametrize(
    ("status", "signal"),
    [("sent", "sent"), ("delivered", "delivered"), ("read", "read"), ("undelivered", "failed"), ("failed", "failed")],
)
def test_callback_brings_the_signal_of_its_status(status: str, signal: str) -> None:
    form = {"MessageSid": SID, "MessageStatus": status, "ErrorCode": "63024"}
    code = "63024" if signal == "failed" else None
    receipt = Receipt(signal=signal, token=TOKEN, message_id=SID, code=code)
    assert parse(form, f"{WEBHOOK_URL}?t={TOKEN}") == Webhook(receipts=(receipt,))


def test_registration_that_only_meta_makes_is_refused() -> None:
    with pytest.raises(InvalidSignature):
        make_channel().verify(
            WebhookRequest(method="GET", url=f"{WEBHOOK_URL}?hub.mode=subscribe", path="", headers={}, body=b"")
        )


ADA = WhatsAppAddress(phone="+16502530000")
NO_NUMBER = f"SmsStatus=received from no WhatsApp number MessageSid={SID}"
INBOUND = {"SmsStatus": "received", "From": "whatsapp:+16502530000", "To": f"whatsapp:{SENDER}", "MessageSid": SID}


@pytest.mark.parametrize(
    ("form", "webhook"),
    [
        ({"Body": "Nice"}, Webhook(replies=(Reply(address=ADA),))),
        ({"Body": "Yes", "OriginalRepliedMessageSid": "MM1"}, Webhook(replies=(Reply(address=ADA, message_id="MM1"),))),
        ({"Body": "Yes", "ButtonPayload": "yes_summer"}, Webhook(replies=(Reply(address=ADA),))),
        ({"Body": " stop "}, Webhook(standings=(Standing(address=ADA, state="opted_out", reason="STOP"),))),
        (
            {"Body": "x", "ButtonText": "Stop promotions"},
            Webhook(standings=(Standing(address=ADA, state="opted_out", reason="STOP"),)),
        ),
        ({"Body": "basta", "OptOutType": "STOP"}, Webhook(standings=(Standing(address=ADA, state="opted_out", reason="STOP"),))),
        ({"Body": "START"}, Webhook(standings=(Standing(address=ADA, state="active", reason="START"),))),
        (
            {"Body": "stop", "To": "whatsapp:+15005550001"},
            Webhook(unrecognized=(f"SmsStatus=received for another sender MessageSid={SID}",)),
        ),
        (
            {"Body": "stop", "From": "+16502530000"},
            Webhook(unrecognized=(NO_NUMBER,)),
        ),
    ],
)
def test_what_people_write_is_a_reply_or_their_word(form: dict[str, str], webhook: Webhook) -> None:
    assert parse({**INBOUND, **form}) == webhook


def test_what_is_written_to_a_service_is_for_us() -> None:
    form = {**INBOUND, "To": "whatsapp:+15005550001", "MessagingServiceSid": SERVICE, "Body": "STOP"}
    assert parse(form, messaging_service_sid=SERVICE).standings[0].state == "opted_out"
    assert parse(form).unrecognized


def test_limits_are_the_senders_and_the_persons() -> None:
    number, pair = make_channel().limits(make_message())
    assert number.key == f"number/{SENDER}"
    assert pair.key.startswith(f"pair/{SENDER}/")
