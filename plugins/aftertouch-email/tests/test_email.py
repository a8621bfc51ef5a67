"""The email channel: what a mail says, what a server's refusals mean, and who can unsubscribe whom."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from email import message_from_bytes
from email.policy import default
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from aftertouch_email import EmailAddress, EmailChannel, EmailContent, EmailSettings
from aiosmtpd.smtp import AuthResult
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from pydantic import ValidationError

from aftertouch.channels import (
    Accepted,
    InvalidSignature,
    InvalidWebhook,
    Limit,
    Message,
    ReasonClass,
    Receipt,
    Refused,
    WebhookRequest,
)
from aftertouch.testing import Fault, ProviderRequest, Response

sys.path.insert(0, str(Path(__file__).parent))
from smtp import SmtpProvider
from test_email_contract import WEBHOOK_KEY, sign_events

TOKENS = ("Contract-_Token-00000000", "Contract-_Token-00000001", "Contract-_Token-00000002")
WEBHOOK_URL = "https://hooks.shop.example/v1/webhooks/email"


def make_channel(port: str = "9", **values: object) -> EmailChannel:
    given = {
        "host": "127.0.0.1",
        "port": port,
        "security": "none",
        "sender": "Shop Ñ <news@shop.example>",
        "unsubscribe_secret": "a secret of 32 characters or more",
        "webhook_key": WEBHOOK_KEY,
        "timeout_seconds": 15,
    }
    return EmailChannel(EmailSettings.model_validate({**given, **values}), webhook_url=WEBHOOK_URL)


def make_message(
    token: str = TOKENS[0], email: str = "ada@home.example", **content: object
) -> Message[EmailAddress, EmailContent]:
    values = {"subject": "Rebajas ☀", "text": "Hoy, ¡señora!\n.\nAdiós", "html": "<p>Hoy</p>", **content}
    return Message(token=token, address=EmailAddress(email=email), content=EmailContent.model_validate(values))


def accept(_: object) -> Response:
    return Response(status=250, body="2.0.0 Ok: queued as 4FxYz")


def make_request(url: str, method: str = "POST") -> WebhookRequest:
    path = urlsplit(url).path.removeprefix(urlsplit(WEBHOOK_URL).path).lstrip("/")
    return WebhookRequest(method=method, url=url, path=path, headers={}, body=b"List-Unsubscribe=One-Click")


async def test_mail_says_what_was_written_and_how_to_unsubscribe() -> None:
    async with SmtpProvider(accept) as provider:
        (outcome,) = await make_channel(provider.url, reply_to="help@shop.example").send([make_message()])
    assert outcome == Accepted(message_id="4FxYz")
    mail = message_from_bytes(provider.requests[0].body, policy=default)
    assert mail["From"].addresses[0].display_name == "Shop Ñ"
    assert (mail["To"], mail["Subject"], mail["Reply-To"]) == ("ada@home.example", "Rebajas ☀", "help@shop.example")
    assert mail["Message-ID"] == f"<{TOKENS[0]}@shop.example>"
    assert json.loads(mail["X-SMTPAPI"]) == {"unique_args": {"aftertouch_token": TOKENS[0]}}
    assert mail["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    url = mail["List-Unsubscribe"].strip("<>")
    assert parse_qs(urlsplit(url).query)["t"] == [TOKENS[0]]
    text, html = mail.iter_parts()
    assert (text.get_content().replace("\r\n", "\n").strip(), html.get_content().strip()) == (
        "Hoy, ¡señora!\n.\nAdiós",
        "<p>Hoy</p>",
    )


async def test_subject_cannot_add_a_header() -> None:
    async with SmtpProvider(accept) as provider:
        (outcome,) = await make_channel(provider.url).send([make_message(subject="Sale\r\nBcc: eve@evil.example")])
    assert outcome == Refused(code="subject_invalid")
    assert not provider.requests


@pytest.mark.parametrize(
    ("reply", "code", "reason"),
    [
        ("550 5.1.1 User unknown", "5.1.1", ReasonClass.RECIPIENT_GONE),
        ("550 No such user", "550", ReasonClass.RECIPIENT_GONE),
        ("450 4.2.1 Too many for this mailbox", "4.2.1", ReasonClass.RATE),
        ("452 4.2.2 Mailbox full", "4.2.2", ReasonClass.TRANSIENT),
        ("554 5.7.1 Refused", "5.7.1", ReasonClass.CONTENT),
        ("599 5.9.9 Unheard of", "5.9.9", ReasonClass.UNKNOWN),
    ],
)
async def test_refused_recipient_leaves_the_connection_to_the_others(reply: str, code: str, reason: ReasonClass) -> None:
    async with SmtpProvider(accept) as provider:
        provider.judge_recipient = lambda address: reply if address.startswith("gone") else "250 2.1.5 Ok"
        people = ["ada@home.example", "gone@home.example", *(f"p{number}@home.example" for number in range(8))]
        messages = [make_message(f"Contract-_Token-{number:08d}", email) for number, email in enumerate(people)]
        outcomes = await make_channel(provider.url).send(messages)
    assert outcomes[1] == Refused(code=code)
    assert EmailChannel.classify(code) is reason
    assert all(isinstance(outcome, Accepted) for outcome in [outcomes[0], *outcomes[2:]])
    assert {request.url for request in provider.requests} == {f"mailto:{person}" for person in people if "gone" not in person}


def make_messages(count: int) -> list[Message[EmailAddress, EmailContent]]:
    return [make_message(token=f"Contract-_Token-{number:08}") for number in range(count)]


class SlowProvider(SmtpProvider):
    """Takes four messages, and answers to no other one."""

    async def exchange(self, request: ProviderRequest) -> Response | Fault:
        answer = await super().exchange(request)
        return answer if len(self.exchanges) <= 4 else Fault.STALL


async def test_server_that_is_slow_takes_what_it_can_in_time_and_the_rest_is_tried_again() -> None:
    """The server gives a call up that takes longer, and then all of its people would be left without an outcome."""
    async with SlowProvider(accept) as provider, make_channel(provider.url, timeout_seconds=4) as channel, asyncio.timeout(60):
        outcomes = await channel.send(make_messages(20))
    found = Counter(type(outcome).__name__ if not isinstance(outcome, Refused) else outcome.code for outcome in outcomes)
    assert found["Accepted"] == 4
    # On each of the four connections one at most was under way.
    assert found["Unclear"] <= 4
    assert found["out_of_time"] >= 4
    assert found.total() == 20
    assert EmailChannel.classify("out_of_time") is ReasonClass.TRANSIENT


async def test_server_that_never_speaks_has_been_sent_nothing() -> None:
    async def be_silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(be_silent, "127.0.0.1", 0) as server:
        port = str(server.sockets[0].getsockname()[1])
        async with make_channel(port, timeout_seconds=0.5) as channel:
            outcomes = await channel.send(make_messages(20))
    assert {outcome.code for outcome in outcomes if isinstance(outcome, Refused)} == {"connect_error", "out_of_time"}
    assert len([outcome for outcome in outcomes if isinstance(outcome, Refused)]) == 20


async def test_wrong_password_is_nobodys_fault_but_ours() -> None:
    class Locked(SmtpProvider):
        options = {
            "authenticator": lambda *_: AuthResult(success=False, handled=False),
            "auth_require_tls": False,
        }

    async with Locked(accept) as provider:
        (outcome,) = await make_channel(provider.url, username="apikey", password="wrong").send([make_message()])
    assert isinstance(outcome, Refused)
    assert EmailChannel.classify(outcome.code) is ReasonClass.CONFIG


async def test_server_without_tls_is_not_told_the_password() -> None:
    async with SmtpProvider(accept) as provider:
        (outcome,) = await make_channel(provider.url, security="starttls", username="apikey", password="x").send([make_message()])
    assert isinstance(outcome, Refused)
    assert not provider.requests


def test_unsubscribing_takes_a_post_to_a_signed_address() -> None:
    channel = make_channel()
    request = make_request(channel.write_unsubscribe_url(TOKENS[0]))
    channel.verify(request)
    assert channel.parse(request).receipts == (
        Receipt(signal="unsubscribed", token=TOKENS[0]),
        Receipt(signal="failed", token=TOKENS[0], code="unsubscribed"),
    )
    shown = channel.parse(replace(request, method="GET"))
    assert shown.receipts == ()
    assert '<form method="post"' in shown.answer.body


def test_unsubscribe_page_shows_nothing_of_the_address_as_html() -> None:
    channel = make_channel()
    request = make_request(f'{channel.write_unsubscribe_url(TOKENS[0])}&x="><script>', "GET")
    assert "<script>" not in channel.parse(request).answer.body


@pytest.mark.parametrize("spoil", [lambda url: url.replace(TOKENS[0], TOKENS[1]), lambda url: url[:-1], lambda url: url + "é"])
def test_unsubscribe_address_of_another_message_is_refused(spoil) -> None:  # type: ignore[no-untyped-def]
    channel = make_channel()
    with pytest.raises(InvalidSignature):
        channel.verify(make_request(spoil(channel.write_unsubscribe_url(TOKENS[0]))))


def test_events_signed_by_somebody_else_are_refused() -> None:
    other = ec.derive_private_key(0xBAD, ec.SECP256R1()).public_key()
    key = base64.b64encode(other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
    signed = sign_events(make_channel(), {"event": "delivered", "aftertouch_token": TOKENS[0]})
    make_channel().verify(signed)
    for channel in (make_channel(webhook_key=key), make_channel(webhook_key=None)):
        with pytest.raises(InvalidSignature):
            channel.verify(signed)


@pytest.mark.parametrize("body", [b"{}", b"1", b"x"])
def test_body_that_is_no_list_is_refused(body: bytes) -> None:
    request = WebhookRequest(method="POST", url=WEBHOOK_URL, path="", headers={}, body=body)
    with pytest.raises(InvalidWebhook):
        make_channel().parse(request)


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ({"event": "bounce", "type": "blocked", "status": "5.7.1"}, "blocked"),
        ({"event": "bounce"}, "bounce"),
        ({"event": "dropped", "reason": "Unsubscribed Address"}, "dropped_unsubscribed_address"),
        ({"event": "dropped", "reason": "Some new reason"}, "dropped"),
    ],
)
def test_event_says_why_a_mail_did_not_arrive(event: dict[str, str], code: str) -> None:
    request = sign_events(make_channel(), {**event, "aftertouch_token": TOKENS[0]})
    assert make_channel().parse(request).receipts[-1] == Receipt(signal="failed", token=TOKENS[0], code=code)


@pytest.mark.parametrize(
    "email", ["ada", "ada@localhost", "a b@x.example", "ada@x.example\r\nBcc: b@x.example", "<a@x.example>", "ñ@x.example"]
)
def test_address_that_is_no_mailbox_is_refused(email: str) -> None:
    with pytest.raises(ValidationError):
        EmailAddress(email=email)


def test_address_is_the_same_however_it_is_written() -> None:
    assert EmailAddress(email="Ada@Home.example").key == EmailAddress(email="ada@home.EXAMPLE").key


@pytest.mark.parametrize(
    "change", [{"sender": "Shop"}, {"sender": "a@x.example\r\nX: y"}, {"unsubscribe_secret": "short"}, {"webhook_key": "AAAA"}]
)
def test_settings_that_cannot_work_are_refused(change: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        make_channel(**change)


@pytest.mark.parametrize(
    ("event", "signals", "state"),
    [
        ("spamreport", ["complained"], "opted_out"),
        ("unsubscribe", ["unsubscribed"], "opted_out"),
        ("group_unsubscribe", ["unsubscribed"], "opted_out"),
        ("group_resubscribe", [], "active"),
    ],
)
def test_event_says_whether_there_may_be_more_mail(event: str, signals: list[str], state: str) -> None:
    given = {"event": event, "aftertouch_token": TOKENS[0], "email": "Ada@Home.example", "timestamp": 1700000000}
    webhook = make_channel().parse(sign_events(make_channel(), given))
    assert [receipt.signal for receipt in webhook.receipts] == signals
    (standing,) = webhook.standings
    assert (standing.address.key, standing.state, standing.reason) == ("ada@home.example", state, event)
    assert webhook.unrecognized == ()


def test_standing_of_no_mailbox_is_passed_over() -> None:
    request = sign_events(make_channel(), {"event": "unsubscribe", "aftertouch_token": TOKENS[0], "email": "nobody"})
    assert make_channel().parse(request).standings == ()


def test_limit_is_the_accounts_and_the_servers_own_unless_it_is_set() -> None:
    assert make_channel().limits(make_message()) == (Limit(key="account"),)
    assert make_channel(messages_per_second="20").limits(make_message()) == (
        Limit(key="account", interval=timedelta(milliseconds=50)),
    )
    with pytest.raises(ValidationError, match="messages_per_second"):
        make_channel(messages_per_second="-1")
