"""The SMS channel against a Twilio on loopback, Twilio's published signature and the SDK's own signer."""

import asyncio
import base64
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from urllib.parse import urlencode

import aftertouch_sms
import aftertouch_twilio
import pytest
from aftertouch_sms import SmsAddress, SmsChannel, SmsContent, SmsSettings
from aiohttp import web
from aiohttp.test_utils import TestServer
from hypothesis import given, settings
from hypothesis import strategies as st
from pluggy import PluginManager
from pydantic import ValidationError
from twilio.request_validator import RequestValidator

from aftertouch import hookspecs
from aftertouch.channels import (
    Accepted,
    Estimate,
    InvalidSignature,
    Limit,
    Message,
    NotTaken,
    Outcome,
    Price,
    ReasonClass,
    Receipt,
    Refused,
    Reply,
    Standing,
    Unclear,
    Webhook,
    WebhookRequest,
)
from aftertouch.signals import CORE_IMPLICATIONS, parse

TOKEN = "AbCdEfGhIjKlMnOpQrStUv-_"
WEBHOOK_URL = "https://hooks.example.com/v1/webhooks/sms"
ACCOUNT = "AC" + "0" * 32
SERVICE = "MG" + "1" * 32
SID = "SM" + "2" * 32


def make_settings(**values: object) -> SmsSettings:
    return SmsSettings.model_validate(
        {"account_sid": ACCOUNT, "auth_token": "12345", "messaging_service_sid": SERVICE, "timeout_seconds": "30", **values}
    )


def make_channel(**values: object) -> SmsChannel:
    return SmsChannel(make_settings(**values), webhook_url=WEBHOOK_URL)


def make_message(body: str = "Ends tonight", phone: str = "+16502530000") -> Message[SmsAddress, SmsContent]:
    return Message(token=TOKEN, address=SmsAddress(phone=phone), content=SmsContent(body=body))


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Twilio:
    """Answers every request as it is told, and keeps what it was sent."""

    url: str
    answer: Handler
    requests: list[tuple[str, str, dict[str, str], dict[str, str]]] = field(default_factory=list)


@asynccontextmanager
async def run_twilio(answer: Handler) -> AsyncIterator[Twilio]:
    async def take(request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        twilio.requests.append((request.method, request.path, headers, {n: str(v) for n, v in (await request.post()).items()}))
        return await twilio.answer(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    async with TestServer(app, host="127.0.0.1") as server:
        twilio = Twilio(url=str(server.make_url("/")), answer=answer)
        yield twilio


def answer_with(status: int, body: object = None, **headers: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


create = answer_with(201, {"sid": SID, "status": "accepted", "error_code": None, "date_created": None})


async def send_one(answer: Handler, message: Message[SmsAddress, SmsContent] | None = None, **values: object) -> Outcome:
    async with run_twilio(answer) as twilio, make_channel(api_url=twilio.url, **values) as channel:
        [outcome] = await channel.send([message or make_message()])
    return outcome


# What is declared


def test_plugin_registers_the_channel() -> None:
    plugins = PluginManager(hookspecs.PROJECT)
    plugins.add_hookspecs(hookspecs)
    plugins.register(aftertouch_sms)
    assert plugins.hook.aftertouch_register_channels() == [(SmsChannel,)]


def test_actions_use_declared_signals_only() -> None:
    known = [*CORE_IMPLICATIONS, *(signal.name for signal in SmsChannel.signals)]
    for action in SmsChannel.actions:
        parse(action.expression, known)
        if action.apart is not None:
            parse(action.apart, known)


def test_reasons_name_every_code_once() -> None:
    assert len(aftertouch_twilio.REASONS) == sum(len(codes) for codes in aftertouch_twilio.CODES.values())


# Addresses and settings


@pytest.mark.parametrize("written", ["+16502530000", "+1 650-253-0000", "tel:+1-650-253-0000", "+1 (650) 253 0000"])
def test_address_has_one_key_however_it_is_written(written: str) -> None:
    address = make_channel().parse_address({"phone": written})
    assert address.key == "+16502530000"
    assert "650" not in repr(address)


@pytest.mark.parametrize("written", ["", "6502530000", "+1", "+1650253000000", "hello", None, 16502530000])
def test_address_that_is_no_international_number_is_refused(written: object) -> None:
    with pytest.raises(ValidationError):
        make_channel().parse_address({"phone": written})


def test_settings_need_exactly_one_sender() -> None:
    assert make_settings(messaging_service_sid="", sender="+16502530000").sender == "+16502530000"
    for values in ({"messaging_service_sid": ""}, {"sender": "ACME"}):
        with pytest.raises(ValidationError, match="either messaging_service_sid or sender"):
            make_settings(**values)


def test_settings_hide_the_auth_token() -> None:
    settings = make_settings(auth_token="s3cr3t")
    assert "s3cr3t" not in repr(settings)


def test_settings_refuse_an_empty_auth_token_that_anybody_could_sign_with() -> None:
    with pytest.raises(ValidationError):
        make_settings(auth_token="")


# Sending


async def test_send_asks_twilio_for_one_message() -> None:
    async with run_twilio(create) as twilio, make_channel(api_url=twilio.url, validity_period_seconds="600") as channel:
        outcomes = await channel.send([make_message("Bis heute Nacht: 50 % & mehr für dich")])
        [(method, path, headers, form)] = twilio.requests
    assert outcomes == [Accepted(message_id=SID)]
    assert (method, path) == ("POST", f"/2010-04-01/Accounts/{ACCOUNT}/Messages.json")
    assert headers["content-type"] == "application/x-www-form-urlencoded"
    assert headers["authorization"] == "Basic " + base64.b64encode(f"{ACCOUNT}:12345".encode()).decode()
    assert form == {
        "To": "+16502530000",
        "MessagingServiceSid": SERVICE,
        "Body": "Bis heute Nacht: 50 % & mehr für dich",
        "StatusCallback": f"{WEBHOOK_URL}?t={TOKEN}#rc=5&rp=all",
        "ValidityPeriod": "600",
    }


async def test_send_names_a_sender_instead_of_a_service() -> None:
    async with (
        run_twilio(create) as twilio,
        make_channel(api_url=twilio.url, messaging_service_sid="", sender="ACME") as channel,
    ):
        await channel.send([make_message()])
        [(*_, form)] = twilio.requests
    assert form["From"] == "ACME"
    assert "MessagingServiceSid" not in form


async def test_send_stays_at_its_api_url_whatever_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWILIO_EDGE", "dublin")
    monkeypatch.setenv("TWILIO_REGION", "ie1")
    assert await send_one(create) == Accepted(message_id=SID)


async def test_send_keeps_the_order_of_its_messages() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = str((await request.post())["Body"])
        await asyncio.sleep(0.02 * (3 - int(body)))
        return web.json_response({"sid": f"SM{body}"} if int(body) % 2 else {"code": 21610}, status=201 if int(body) % 2 else 400)

    async with run_twilio(answer) as twilio, make_channel(api_url=twilio.url) as channel:
        outcomes = await channel.send([make_message(str(number)) for number in range(4)])
    refused = Refused(code="21610")
    assert outcomes == [refused, Accepted(message_id="SM1"), refused, Accepted(message_id="SM3")]


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (400, 21211, ReasonClass.RECIPIENT_GONE),
        (400, 21610, ReasonClass.OPTED_OUT),
        (400, 21617, ReasonClass.CONTENT),
        (401, 20003, ReasonClass.CONFIG),
        (429, 20429, ReasonClass.RATE),
        (503, 20503, ReasonClass.TRANSIENT),
        (400, 99999, ReasonClass.UNKNOWN),
    ],
)
async def test_send_classifies_a_refusal_by_twilios_code(status: int, code: int, reason: ReasonClass) -> None:
    outcome = await send_one(answer_with(status, {"code": code, "message": "no", "more_info": "", "status": status}))
    assert outcome == Refused(code=str(code))
    assert SmsChannel.classify(str(code)) is reason


async def test_send_reads_a_problem_document_too() -> None:
    problem = {"type": "https://www.twilio.com/docs/api/errors/20429", "title": "Too many requests", "status": 429, "code": 20429}
    assert await send_one(answer_with(429, problem, Retry_After="7")) == Refused(code="20429", retry_after=timedelta(seconds=7))


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, ReasonClass.CONFIG), (429, ReasonClass.RATE), (500, ReasonClass.TRANSIENT), (503, ReasonClass.TRANSIENT)],
)
async def test_send_classifies_a_refusal_without_a_code_by_its_status(status: int, reason: ReasonClass) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="<html>")

    assert await send_one(answer) == Refused(code=f"http_{status}")
    assert SmsChannel.classify(f"http_{status}") is reason


@pytest.mark.parametrize("status", [502, 504])
async def test_send_is_unclear_when_only_a_gateway_answers(status: int) -> None:
    assert await send_one(answer_with(status)) == Unclear(detail=f"http_{status}")


async def test_send_follows_no_redirect() -> None:
    async with run_twilio(create) as target:
        assert await send_one(answer_with(307, Location=target.url)) == Refused(code="http_307")
        assert target.requests == []


@pytest.mark.parametrize("text", ["<html>", "[]", "", '{"sid": "' + "x" * 70_000 + '"}'])
async def test_send_is_unclear_when_a_success_cannot_be_read(text: str) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=201, text=text)

    assert isinstance(await send_one(answer), Unclear)


async def test_send_is_unclear_when_the_answer_stalls() -> None:
    released = asyncio.Event()

    async def stall(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response(status=201)

    async with run_twilio(stall) as twilio, make_channel(api_url=twilio.url, timeout_seconds="3") as channel:
        [outcome] = await channel.send([make_message()])
        released.set()
    assert isinstance(outcome, Unclear)
    assert len(twilio.requests) == 1


async def test_send_is_unclear_when_the_connection_is_reset() -> None:
    async def reset(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with run_twilio(reset) as twilio, make_channel(api_url=twilio.url) as channel:
        [outcome] = await channel.send([make_message()])
    assert isinstance(outcome, Unclear)
    assert len(twilio.requests) == 1


async def test_send_is_refused_when_nothing_listens() -> None:
    # A port that is bound and not listened on: one that is only free may be taken by somebody meanwhile.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with make_channel(api_url=f"http://127.0.0.1:{bound.getsockname()[1]}") as channel:
            assert await channel.send([make_message()]) == [Refused(code="connect_error")]
    assert SmsChannel.classify("connect_error") is ReasonClass.TRANSIENT


async def test_send_keeps_twilios_limits_before_asking() -> None:
    async with run_twilio(create) as twilio, make_channel(api_url=twilio.url) as channel:
        outcomes = await channel.send([make_message("x" * 1601), make_message(" \n"), make_message("x" * 1600)])
        assert len(twilio.requests) == 1
    assert outcomes == [Refused(code="payload_too_large"), Refused(code="empty_text"), Accepted(message_id=SID)]
    assert {SmsChannel.classify(code) for code in ("payload_too_large", "empty_text")} == {ReasonClass.CONTENT}


def test_limit_is_the_accounts_and_twilios_own_unless_it_is_set() -> None:
    assert make_channel().limits(make_message()) == (Limit(key="account"),)
    [limit] = make_channel(messages_per_second="80").limits(make_message())
    assert limit == Limit(key="account", interval=timedelta(milliseconds=12.5))
    assert SmsChannel.classify("20429") is ReasonClass.RATE


# What it costs


@pytest.mark.parametrize(
    ("body", "segments"),
    [
        ("", 1),
        ("x" * 160, 1),
        ("x" * 161, 2),
        ("x" * 306, 2),
        ("x" * 307, 3),
        ("€" * 80, 1),
        ("€" * 81, 2),
        # 153 has no room for the second half of the last character.
        ("€" * 153, 3),
        ("x" + "€" * 152, 2),
        ("\f^{}\\[~]|" * 8, 1),
        ("ж" * 70, 1),
        ("ж" * 71, 2),
        ("x" * 70 + "\u2019", 2),
        ("🎉" * 35, 1),
        ("🎉" * 36, 2),
        ("🎉" * 66, 2),
        ("🎉" * 67, 3),
        ("ça va", 1),
        ("ç" * 71, 2),
        ("àèéùìòÇ" * 20, 1),
    ],
)
def test_segments_are_counted_as_they_are_billed(body: str, segments: int) -> None:
    assert aftertouch_sms.count_segments(body) == segments


def test_gsm_7_has_the_characters_of_its_table() -> None:
    """3GPP TS 23.038: 127 characters and the escape, and ten by way of it."""
    assert len(aftertouch_sms._GSM_7) == 127
    assert len(aftertouch_sms._GSM_7_EXTENSION) == 10
    assert not aftertouch_sms._GSM_7 & aftertouch_sms._GSM_7_EXTENSION


def test_estimate_has_a_cost_where_the_price_is_known() -> None:
    content = SmsContent(body="x" * 161)
    assert make_channel().estimate(content) == Estimate(units=2, unit="segments", currency="USD")
    known = make_channel(price_per_segment="0.0079", currency="EUR").estimate(content)
    assert known == Estimate(units=2, unit="segments", cost=Decimal("0.0158"), currency="EUR")


async def test_message_that_was_taken_has_its_price_where_the_operator_told_it() -> None:
    price = Price(amount=Decimal("0.0158"), currency="EUR")
    told = {"price_per_segment": "0.0079", "currency": "EUR"}
    async with run_twilio(create) as twilio, make_channel(api_url=twilio.url, **told) as channel:
        outcomes = await channel.send([make_message("x" * 161), make_message("")])
    assert outcomes == [Accepted(message_id=SID, price=price), Refused(code="empty_text")]
    found = await look_up_one(list_pages([list_message()]), **{**told, "price_per_segment": "0.0158"})
    assert found == Accepted(message_id=SID, price=price)


# Looking up what was taken

LAUNCHED = datetime(2026, 11, 22, 9, 0, tzinfo=UTC)


def list_message(**fields: object) -> dict[str, object]:
    """A message as Twilio lists it, which is the one that is looked up unless said otherwise."""
    minutes = fields.pop("minutes", 1)
    assert isinstance(minutes, int)
    return {
        "sid": SID,
        "to": "+16502530000",
        "from": "+15005550006",
        "body": "Ends tonight",
        "direction": "outbound-api",
        "messaging_service_sid": SERVICE,
        "status": "queued",
        "date_created": format_datetime(LAUNCHED + timedelta(minutes=minutes)),
        "date_sent": None,
        **fields,
    }


def list_pages(*pages: list[dict[str, object]]) -> Handler:
    """A list in pages, each with the address of the next."""

    async def answer(request: web.Request) -> web.StreamResponse:
        page = int(request.query.get("Page", 0))
        following = f"{request.path}?Page={page + 1}" if page + 1 < len(pages) else None
        return web.json_response({"messages": pages[page], "next_page_uri": following})

    return answer


async def look_up_one(answer: Handler, **values: object) -> object:
    async with run_twilio(answer) as twilio, make_channel(api_url=twilio.url, **values) as channel:
        [finding] = await channel.look_up([make_message()], LAUNCHED)
        assert [method for method, *_ in twilio.requests] == ["GET"] * len(twilio.requests)
    return finding


@pytest.mark.parametrize(
    ("pages", "finding"),
    [
        ([[]], NotTaken()),
        ([[list_message()]], Accepted(message_id=SID)),
        ([[list_message(body="Hello")], [list_message()]], Accepted(message_id=SID)),
        ([[list_message(body="Hello")], []], Unclear(detail="another message to the number")),
        ([[list_message(minutes=-1), list_message(minutes=-100)]], NotTaken()),
        ([[list_message(direction="inbound")]], NotTaken()),
        ([[list_message(messaging_service_sid="MG" + "2" * 32)]], NotTaken()),
        ([[list_message(date_created=None, body="Hello")]], Unclear(detail="another message to the number")),
        ([[]] * 6, Unclear(detail="too many messages to the number")),
    ],
    ids=["none", "this one", "on page 2", "another one", "older", "their own", "others'", "without a date", "too many"],
)
async def test_look_up_finds_what_twilio_took(pages: list[list[dict[str, object]]], finding: object) -> None:
    assert await look_up_one(list_pages(*pages)) == finding


async def test_look_up_knows_its_sender() -> None:
    sender = {"messaging_service_sid": "", "sender": "+15005550006"}
    assert await look_up_one(list_pages([list_message(messaging_service_sid=None)]), **sender) == Accepted(message_id=SID)
    assert await look_up_one(list_pages([list_message(messaging_service_sid=None)]), messaging_service_sid="", sender="ACME") == (
        NotTaken()
    )


async def test_look_up_asks_for_one_number_and_leaves_nothing_out_by_its_date() -> None:
    queries = []

    async def answer(request: web.Request) -> web.StreamResponse:
        queries.append(dict(request.query))
        return web.json_response({"messages": [], "next_page_uri": None})

    await look_up_one(answer)
    assert queries == [{"To": "+16502530000", "PageSize": "100"}]


async def stall(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(6)
    return web.json_response({"messages": []})


@pytest.mark.parametrize(
    "answer",
    [
        answer_with(429, {"code": 20429}),
        answer_with(200, {"messages": [None]}),
        answer_with(200, {}),
        answer_with(200, []),
        answer_with(200, {"messages": [], "next_page_uri": "/a b"}),
        stall,
    ],
    ids=["too fast", "no messages", "no list", "no object", "no address", "silence"],
)
async def test_look_up_is_unclear_when_twilio_does_not_say(answer: Handler) -> None:
    assert isinstance(await look_up_one(answer, timeout_seconds="30" if answer is not stall else "2"), Unclear)


# Asking what became of messages


@pytest.mark.parametrize(
    ("resource", "receipt"),
    [
        ({"status": "queued", "error_code": None}, None),
        ({"status": "sent", "error_code": None}, None),
        ({"status": "delivered", "error_code": None}, Receipt(signal="delivered", message_id=SID)),
        ({"status": "undelivered", "error_code": 30003}, Receipt(signal="failed", message_id=SID, code="30003")),
        ({"status": "failed", "error_code": None}, Receipt(signal="failed", message_id=SID)),
        (
            {"status": "delivered", "date_updated": "Sun, 22 Nov 2026 09:00:00 +0000"},
            Receipt(signal="delivered", message_id=SID, time=LAUNCHED),
        ),
        ({"status": "teleported"}, None),
        ([], None),
    ],
)
async def test_fetched_message_brings_what_is_news(resource: object, receipt: Receipt | None) -> None:
    async with run_twilio(answer_with(200, resource)) as twilio, make_channel(api_url=twilio.url) as channel:
        found = await channel.fetch_receipts([SID])
        assert [(method, path) for method, path, *_ in twilio.requests] == [
            ("GET", f"/2010-04-01/Accounts/{ACCOUNT}/Messages/{SID}.json")
        ]
    assert found == ([receipt] if receipt else [])


async def test_fetched_message_that_is_gone_or_none_of_twilios_brings_nothing() -> None:
    async with run_twilio(answer_with(404, {"code": 20404})) as twilio, make_channel(api_url=twilio.url) as channel:
        assert await channel.fetch_receipts([SID, "../../Accounts"]) == []
        assert len(twilio.requests) == 1


# Status callbacks


def make_callback(
    url: str = f"{WEBHOOK_URL}?t={TOKEN}", *, key: str = "12345", method: str = "POST", **form: str
) -> WebhookRequest:
    values = {"MessageSid": SID, "SmsSid": SID, "To": "+16502530000", "RawDlrDoneDate": "", **form}
    return WebhookRequest(
        method=method,
        url=url,
        path="",
        headers={"x-twilio-signature": RequestValidator(key).compute_signature(url, values)},
        body=urlencode(values).encode(),
    )


def test_webhook_takes_the_signature_that_twilio_published() -> None:
    """Twilio: "Validating requests", the example of the documentation."""
    form = {
        "CallSid": "CA1234567890ABCDE",
        "Caller": "+14158675309",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
    }
    request = WebhookRequest(
        method="POST",
        url="https://mycompany.com/myapp.php?foo=1&bar=2",
        path="",
        headers={"x-twilio-signature": "RSOYDt4T1cUTdK1PDd93/VVr8B8="},
        body=urlencode(form).encode(),
    )
    make_channel().verify(request)


@settings(deadline=None)
@given(form=st.dictionaries(st.sampled_from(["Body", "From", "X"]), st.text(st.characters(codec="utf-8"))))
def test_webhook_takes_whatever_the_sdk_signs(form: dict[str, str]) -> None:
    make_channel().verify(make_callback(**form))


@pytest.mark.parametrize(
    "request_",
    [
        make_callback(key="54321", MessageStatus="sent"),
        make_callback(method="GET", MessageStatus="sent"),
        WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={}, body=b"MessageStatus=sent"),
        WebhookRequest(method="POST", url=f"{WEBHOOK_URL}?bodySHA256=00", path="", headers={}, body=b'{"a": 1}'),
        WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={"x-twilio-signature": "é"}, body=b"\xff"),
        WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={}, body=b"a=1&" * 1000),
    ],
    ids=["other key", "other method", "unsigned", "json", "not utf-8", "too many fields"],
)
def test_webhook_that_proves_nothing_is_refused(request_: WebhookRequest) -> None:
    with pytest.raises(InvalidSignature):
        make_channel().verify(request_)


def test_webhook_is_bound_to_its_token() -> None:
    request = make_callback(MessageStatus="sent")
    moved = WebhookRequest(
        method="POST", url=request.url.replace(TOKEN, TOKEN[::-1]), path="", headers=request.headers, body=request.body
    )
    with pytest.raises(InvalidSignature):
        make_channel().verify(moved)


@pytest.mark.parametrize(
    ("status", "signal"), [("sent", "sent"), ("delivered", "delivered"), ("read", "delivered"), ("partially_delivered", "sent")]
)
def test_webhook_brings_the_signal_of_its_status(status: str, signal: str) -> None:
    webhook = make_channel().parse(make_callback(MessageStatus=status, SmsStatus=status))
    assert webhook.receipts == (Receipt(signal=signal, token=TOKEN, message_id=SID),)
    assert webhook.answer.status == 204


@pytest.mark.parametrize("status", ["undelivered", "failed"])
def test_webhook_brings_the_code_of_a_failure(status: str) -> None:
    webhook = make_channel().parse(make_callback(MessageStatus=status, ErrorCode="30003"))
    assert webhook.receipts == (Receipt(signal="failed", token=TOKEN, message_id=SID, code="30003"),)


@pytest.mark.parametrize("status", ["accepted", "queued", "sending"])
def test_webhook_of_a_message_still_under_way_brings_nothing(status: str) -> None:
    webhook = make_channel().parse(make_callback(MessageStatus=status))
    assert webhook.receipts == webhook.unrecognized == ()


@pytest.mark.parametrize("query", ["", "?t=short"])
def test_webhook_without_our_token_names_the_message(query: str) -> None:
    webhook = make_channel().parse(make_callback(WEBHOOK_URL + query, MessageStatus="delivered"))
    assert webhook.receipts == (Receipt(signal="delivered", message_id=SID),)


def test_webhook_of_an_unknown_status_is_kept_without_the_person() -> None:
    webhook = make_channel().parse(make_callback(MessageStatus="teleported", Body="hello"))
    assert webhook.receipts == ()
    [text] = webhook.unrecognized
    assert "teleported" in text
    assert SID in text
    assert "+1650" not in text
    assert "hello" not in text


# What people write

NUMBER = SmsAddress(phone="+16502530000")


def read_inbound(body: str, **form: str) -> Webhook:
    """What a text to our Messaging Service says."""
    values = {"SmsStatus": "received", "From": NUMBER.phone, "To": "+15005550006", "MessagingServiceSid": SERVICE, **form}
    request = make_callback(WEBHOOK_URL, Body=body, **values)
    channel = make_channel()
    channel.verify(request)
    return channel.parse(request)


@pytest.mark.parametrize("word", ["STOP", "stopall", " Unsubscribe\n", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"])
def test_stop_ends_the_subscription_and_is_no_reply(word: str) -> None:
    assert read_inbound(word) == Webhook(standings=(Standing(address=NUMBER, state="opted_out", reason="STOP"),))


@pytest.mark.parametrize("word", ["START", "unstop"])
def test_start_takes_the_stop_back(word: str) -> None:
    assert read_inbound(word) == Webhook(standings=(Standing(address=NUMBER, state="active", reason="START"),))


def test_yes_may_be_both() -> None:
    """Twilio takes it for START, and somebody may have been asked something."""
    webhook = read_inbound("Yes")
    assert webhook.replies == (Reply(address=NUMBER),)
    assert [standing.state for standing in webhook.standings] == ["active"]


@pytest.mark.parametrize("word", ["HELP", "info"])
def test_help_is_left_to_twilio(word: str) -> None:
    assert read_inbound(word) == Webhook()


@pytest.mark.parametrize("body", ["Please stop calling", "Stop it!", "", "Great", "helpful"])
def test_any_other_text_is_a_reply(body: str) -> None:
    assert read_inbound(body) == Webhook(replies=(Reply(address=NUMBER),))


@pytest.mark.parametrize(
    ("kind", "webhook"),
    [
        ("STOP", Webhook(standings=(Standing(address=NUMBER, state="opted_out", reason="STOP"),))),
        ("START", Webhook(standings=(Standing(address=NUMBER, state="active", reason="START"),))),
        ("HELP", Webhook()),
    ],
)
def test_words_of_an_accounts_own_mean_what_twilio_says(kind: str, webhook: Webhook) -> None:
    assert read_inbound("ARRET", OptOutType=kind) == webhook


@pytest.mark.parametrize("form", [{"MessagingServiceSid": "MG" + "2" * 32}, {"From": "12345"}, {"From": ""}])
def test_text_that_is_for_somebody_else_or_from_no_number_ends_nothing(form: dict[str, str]) -> None:
    webhook = read_inbound("STOP", **form)
    assert webhook.standings == webhook.replies == ()
    assert len(webhook.unrecognized) == 1
    assert "12345" not in webhook.unrecognized[0]


def test_text_to_a_single_sender_is_for_us() -> None:
    request = make_callback(WEBHOOK_URL, SmsStatus="received", Body="Hi", From=NUMBER.phone, To="+15005550006")
    settings = {"messaging_service_sid": "", "sender": "+15005550006"}
    assert make_channel(**settings).parse(request).replies == (Reply(address=NUMBER),)
    assert make_channel(**settings | {"sender": "+15005550007"}).parse(request).replies == ()


def test_text_of_a_person_shows_in_nothing_that_is_kept() -> None:
    webhook = read_inbound("my secret")
    assert "secret" not in repr(webhook)
    assert "650253" not in repr(webhook)
