"""The channels, and the sandbox's stand-ins, against what others wrote: `make peers` installs it from npm.

Twilio's OpenAPI document behind Prism judges every request to Twilio and every answer of the sandbox's; Twilio's node library and
@octokit/webhooks-methods sign and judge webhooks; web-push-testing is a push service that checks signatures and decrypts.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import aftertouch_twilio
import aiohttp
import pytest
from aftertouch_push import PushChannel, PushContent, PushSettings
from aftertouch_sms import SmsAddress, SmsChannel, SmsContent, SmsSettings
from aftertouch_whatsapp import WhatsAppAddress, WhatsAppChannel, WhatsAppContent, WhatsAppSettings
from aftertouch_whatsapp.twilio import read_template
from aiohttp import web
from aiohttp.test_utils import TestServer

from aftertouch.channels import (
    Accepted,
    InvalidSignature,
    Message,
    Outcome,
    Problem,
    ReasonClass,
    Refused,
    Unclear,
    WebhookRequest,
)
from aftertouch.sandbox import Sandbox, SandboxSettings
from aftertouch.sandbox.meta import sign_webhook
from aftertouch.sandbox.twilio import sign_callback
from tests.ports import find_free_port

HERE = Path(__file__).parent
MODULES = HERE / "node_modules"
DOCUMENTS = MODULES / "@twilio/cli-core/src/services/twilio-api"
OPENAPI = DOCUMENTS / "twilio_api_v2010.json"
CONTENT_OPENAPI = DOCUMENTS / "twilio_content_v1.json"
NODE = shutil.which("node")
TOKEN = "AbCdEfGhIjKlMnOpQrStUv-_"
ACCOUNT = "AC" + "0" * 32
SERVICE = "MG" + "1" * 32
LONG_AGO = datetime(2019, 1, 1, tzinfo=UTC)
START_SECONDS = 120
"""For a program of node's on a machine that is busy with other tests; it takes two."""

pytestmark = pytest.mark.skipif(NODE is None or not MODULES.is_dir(), reason="not installed: run `make peers`")


@asynccontextmanager
async def run_node(*command: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A program of node's, ended afterwards with all that it started."""
    process = await asyncio.create_subprocess_exec(
        str(NODE), *map(str, command), cwd=HERE, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def ask(part: str, questions: Sequence[dict[str, Any]]) -> list[Any]:
    """What a part of peer.mjs answers to each question."""
    process = await asyncio.create_subprocess_exec(
        str(NODE), "peer.mjs", part, cwd=HERE, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    answer, _ = await process.communicate(json.dumps(questions).encode())
    assert process.returncode == 0
    answers: list[Any] = json.loads(answer)
    return answers


# Twilio's OpenAPI document, by Prism


@asynccontextmanager
async def run_prism(*arguments: str | Path) -> AsyncIterator[str]:
    """Prism's address, once it listens there."""
    port = find_free_port()
    program = MODULES / "@stoplight/prism-cli/dist/index.js"
    async with run_node(program, arguments[0], "-h", "127.0.0.1", "-p", str(port), *arguments[1:]) as process:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            while b"is listening" not in (line := await process.stdout.readline()):
                assert line, "Prism ended"
        reading = asyncio.create_task(process.stdout.read(), name="read what Prism says, or it would wait for that")
        yield f"http://127.0.0.1:{port}"
        reading.cancel()
        await asyncio.wait({reading})


@pytest.fixture(scope="module")
async def twilio_by_the_document() -> AsyncIterator[str]:
    """A Twilio that refuses with 422 what the document does not allow, and answers with the document's examples."""
    async with run_prism("mock", OPENAPI) as url:
        yield url


def make_sms(url: str, **values: object) -> SmsChannel:
    sender: dict[str, object] = {} if "sender" in values else {"messaging_service_sid": SERVICE}
    settings = {"account_sid": ACCOUNT, "auth_token": "12345", "api_url": url, "timeout_seconds": 60, **sender, **values}
    return SmsChannel(SmsSettings.model_validate(settings), webhook_url="https://hooks.example.com/v1/webhooks/sms")


def make_text(phone: str = "+16502530000", body: str = "Ends tonight 👍") -> Message[SmsAddress, SmsContent]:
    return Message(token=TOKEN, address=SmsAddress(phone=phone), content=SmsContent(body=body))


@pytest.mark.parametrize(
    "values",
    [{}, {"sender": "+15005550006"}, {"sender": "ACME", "validity_period_seconds": 600}],
    ids=["service", "number", "name"],
)
async def test_sms_is_one_that_twilios_document_allows(twilio_by_the_document: str, values: dict[str, object]) -> None:
    async with make_sms(twilio_by_the_document, **values) as channel:
        outcomes = await channel.send([make_text(), make_text("+34611222333")])
    assert all(isinstance(outcome, Accepted) and re.fullmatch("SM[0-9a-f]{32}", outcome.message_id) for outcome in outcomes)


async def test_twilios_document_would_have_refused_a_wrong_sms(twilio_by_the_document: str) -> None:
    form = {"To": "+16502530000", "From": "+15005550006", "Body": "x"}
    target = f"{twilio_by_the_document}/2010-04-01/Accounts/{ACCOUNT}/Messages.json"
    authorization = {"Authorization": aiohttp.encode_basic_auth(ACCOUNT, "12345")}
    wrong: list[tuple[int, dict[str, Any]]] = [
        (422, {"data": {"From": "+15005550006", "Body": "x"}, "headers": authorization}),
        (422, {"data": {**form, "ValidityPeriod": "soon"}, "headers": authorization}),
        (422, {"data": {**form, "MessagingServiceSid": "MG1"}, "headers": authorization}),
        (415, {"json": form, "headers": authorization}),
        (401, {"data": form}),
    ]
    async with aiohttp.ClientSession() as http:
        for status, request in wrong:
            async with http.post(target, **request) as response:
                assert response.status == status


async def test_message_is_fetched_as_twilios_document_has_it(twilio_by_the_document: str) -> None:
    async with make_sms(twilio_by_the_document) as channel:
        # The document's example was sent, which is no news.
        assert await channel.fetch_receipts(["SM" + "2" * 32]) == []


async def test_list_of_messages_is_read_as_twilios_document_has_it(twilio_by_the_document: str) -> None:
    async with make_sms(twilio_by_the_document) as channel:
        (finding,) = await channel.look_up([make_text()], since=LONG_AGO)
    # The messages of the example are not ours, and each of its pages names a next one.
    assert finding == Unclear(detail="too many messages to the number")


def test_every_status_of_twilios_document_is_known() -> None:
    statuses = json.loads(OPENAPI.read_text())["components"]["schemas"]["message_enum_status"]["enum"]
    assert set(statuses) - {"receiving", "received"} <= aftertouch_twilio.SIGNALS.keys()


def make_whatsapp(**values: object) -> WhatsAppChannel:
    account = {"provider": "twilio", "account_sid": ACCOUNT, "auth_token": "12345", "timeout_seconds": 60}
    settings = WhatsAppSettings.model_validate({**account, "sender": "+15005550006", **values})
    return WhatsAppChannel(settings, webhook_url="https://hooks.example.com/v1/webhooks/whatsapp")


SALE = WhatsAppContent(template="sale", language="en", body=["Ada"])


async def test_whatsapp_message_is_one_that_twilios_document_allows(twilio_by_the_document: str) -> None:
    async def list_templates(_: web.Request) -> web.Response:
        shown = {"twilio/text": {"body": "Dear {{1}}"}}
        approval = {"name": "sale", "status": "approved", "content_type": "twilio/text"}
        listed = {"sid": "HX" + "3" * 32, "language": "en", "types": shown, "approval_requests": approval}
        return web.json_response({"contents": [listed], "meta": {"next_page_url": None}})

    app = web.Application()
    app.router.add_get("/v1/ContentAndApprovals", list_templates)
    message = Message(token=TOKEN, address=WhatsAppAddress(phone="+16502530000"), content=SALE)
    async with TestServer(app, host="127.0.0.1") as server:
        urls = {"twilio_api_url": twilio_by_the_document, "twilio_content_url": str(server.make_url("/"))}
        async with make_whatsapp(**urls) as channel:
            assert [type(outcome) for outcome in await channel.send([message])] == [Accepted]


async def test_templates_are_asked_for_as_twilios_document_allows() -> None:
    async with run_prism("mock", CONTENT_OPENAPI) as url, make_whatsapp(twilio_content_url=url) as channel:
        # The document's example has none; whatever it did not allow would be an error.
        assert await channel.check_content(SALE) == [Problem(field="template", text="the account has no template 'sale'")]


def test_templates_of_twilios_document_are_read() -> None:
    listing = json.loads(CONTENT_OPENAPI.read_text())["paths"]["/v1/ContentAndApprovals"]["get"]["responses"]["200"]
    contents = listing["content"]["application/json"]["examples"]["readResults"]["value"]["contents"]
    read = [read_template(item) for item in contents]
    assert [(known.name, known.status) for known in read if known] == [
        ("Some content", "UNSUBMITTED"),
        ("Media Test", "APPROVED"),
        ("Video Highlights", "REJECTED"),
    ]
    assert read[2] is not None
    assert [part.text for part in read[2].components[:2]] == [
        "Hi there, {{1}}, we have received your request to upload {{2}}, and should be uploaded shortly.",
        "http://example.com/highlights/{{3}}",
    ]


@pytest.fixture(scope="module")
async def judged_sandbox() -> AsyncIterator[tuple[Sandbox, str]]:
    """The sandbox behind a Prism that judges its answers too, with 500 where they are not the document's."""
    async with (
        Sandbox(SandboxSettings(size=50, time_scale=1_000_000.0)) as sandbox,
        run_prism("proxy", OPENAPI, sandbox.url, "--errors") as url,
    ):
        yield sandbox, url


async def test_sandbox_answers_as_twilios_document_says(judged_sandbox: tuple[Sandbox, str]) -> None:
    sandbox, url = judged_sandbox
    account, secret = sandbox.settings.account_sid, sandbox.settings.auth_token
    values = {"account_sid": account, "auth_token": secret, "messaging_service_sid": sandbox.settings.messaging_service_sid}
    async with make_sms(url, **values) as channel:
        (taken,) = await channel.send([make_text(sandbox.population.get_person(1).phone)])
        assert isinstance(taken, Accepted)
    messages = f"{url}/2010-04-01/Accounts/{account}/Messages"
    async with aiohttp.ClientSession(headers={"Authorization": aiohttp.encode_basic_auth(account, secret)}) as http:
        async with http.get(f"{messages}/{taken.message_id}.json") as response:
            assert (response.status, (await response.json())["status"]) == (200, "accepted")
        async with http.get(f"{messages}.json") as response:
            faults = (await response.json())["validation"]
    # The document wants whole addresses there, and its own examples have paths, as Twilio answers.
    pages = [["response", "body", name] for name in ("first_page_uri", "uri")]
    assert [(fault["code"], fault["location"]) for fault in faults] == [("format", page) for page in pages]


# Signatures, by Twilio's node library and @octokit/webhooks-methods

FORMS = [
    {"MessageSid": "SM" + "2" * 32, "MessageStatus": "delivered", "To": "+16502530000", "RawDlrDoneDate": ""},
    {"MessageSid": "SM" + "2" * 32, "MessageStatus": "failed", "ErrorCode": "30005", "Ünï": "ñandú 👍 & = +"},
    {},
]
ADDRESSES = [
    f"https://hooks.example.com/v1/webhooks/sms?t={TOKEN}",
    f"https://hooks.example.com:8443/v1/webhooks/sms?t={TOKEN}",
    "http://127.0.0.1:7071/v1/webhooks/sms",
]


def make_callback(url: str, form: dict[str, str], signature: str) -> WebhookRequest:
    headers = {"x-twilio-signature": signature}
    return WebhookRequest(method="POST", url=url, path="", headers=headers, body=urlencode(form).encode())


async def test_sms_webhook_takes_what_twilios_node_library_signs_and_nothing_else() -> None:
    cases = [(url, form) for url in ADDRESSES for form in FORMS]
    signatures = await ask("twilio-signatures", [{"token": "12345", "url": url, "form": form} for url, form in cases])
    channel = make_sms("https://api.twilio.com")
    for (url, form), signature in zip(cases, signatures, strict=True):
        channel.verify(make_callback(url, form, signature))
        assert sign_callback("12345", url, form) == signature
        for other in (make_callback(f"{url}x", form, signature), make_callback(url, {**form, "Body": "x"}, signature)):
            with pytest.raises(InvalidSignature):
                channel.verify(other)


BODIES = ['{"entry": []}', '{"text": "\\u00f1and\\u00fa"}', '{"text": "ñandú 👍"}', "no JSON"]


async def test_whatsapp_webhook_takes_what_octokit_signs_and_nothing_else() -> None:
    settings = {"phone_number_id": "1", "access_token": "t", "app_secret": "secret", "verify_token": "word"}
    channel = WhatsAppChannel(
        WhatsAppSettings.model_validate(settings), webhook_url="https://hooks.example.com/v1/webhooks/whatsapp"
    )

    def make_update(body: str, signature: str) -> WebhookRequest:
        headers = {"x-hub-signature-256": signature}
        return WebhookRequest(method="POST", url=channel.webhook_url, path="", headers=headers, body=body.encode())

    signatures = await ask("octokit-signatures", [{"secret": "secret", "body": body} for body in BODIES])
    for body, signature in zip(BODIES, signatures, strict=True):
        channel.verify(make_update(body, signature))
        for wrong in (make_update(f"{body} ", signature), make_update(body, signature[:-1]), make_update(body, "")):
            with pytest.raises(InvalidSignature):
                channel.verify(wrong)


async def test_octokit_takes_what_the_sandbox_signs_as_meta() -> None:
    questions = [{"secret": "secret", "body": body, "signature": sign_webhook("secret", body.encode())} for body in BODIES]
    assert await ask("octokit-verdicts", questions) == [True] * len(BODIES)
    assert await ask("octokit-verdicts", [{**question, "secret": "other"} for question in questions]) == [False] * len(BODIES)


# A push service, by web-push-testing


@pytest.fixture(scope="module")
async def push_service() -> AsyncIterator[str]:
    async with run_node("peer.mjs", "push-service") as process:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            port = int(await process.stdout.readline())
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
async def push() -> AsyncIterator[PushChannel]:
    settings = {"vapid_subject": "mailto:ops@example.com", "allow_insecure_loopback": True, "timeout_seconds": 60}
    async with PushChannel(
        PushSettings.model_validate(settings), webhook_url="https://hooks.example.com/v1/webhooks/push"
    ) as channel:
        yield channel


async def call(service: str, path: str, **values: str) -> Any:
    async with aiohttp.ClientSession() as http, http.post(f"{service}/{path}", json=values) as response:
        assert response.status == 200, await response.text()
        return await response.json() if response.content_type == "application/json" else None


async def send_push(channel: PushChannel, keys: dict[str, str], subscription: dict[str, Any]) -> Outcome:
    address = channel.parse_address({"endpoint": subscription["endpoint"], "keys": subscription["keys"]})
    content = PushContent(title="Sale ñ 👍", body="Ends tonight", url="https://shop.example/")
    (outcome,) = await channel.send([Message(token=TOKEN, address=address, content=content, app_keys=keys)])
    return outcome


async def test_push_is_decrypted_by_a_push_service_that_others_wrote(push_service: str, push: PushChannel) -> None:
    keys = dict(push.make_app_keys())
    key = push.describe_app_keys(keys)["application_server_key"]
    subscribed = (await call(push_service, "subscribe", userVisibleOnly="true", applicationServerKey=key))["data"]
    assert isinstance(await send_push(push, keys, subscribed), Accepted)
    (text,) = (await call(push_service, "get-notifications", clientHash=subscribed["clientHash"]))["data"]["messages"]
    assert json.loads(text) == {
        "t": TOKEN,
        "title": "Sale ñ 👍",
        "body": "Ends tonight",
        "url": "https://shop.example/",
        "b": "https://hooks.example.com/v1/webhooks/push",
    }


async def test_push_with_the_key_of_another_app_is_refused_by_it(push_service: str, push: PushChannel) -> None:
    own, other = dict(push.make_app_keys()), dict(push.make_app_keys())
    key = push.describe_app_keys(own)["application_server_key"]
    subscribed = (await call(push_service, "subscribe", userVisibleOnly="true", applicationServerKey=key))["data"]
    outcome = await send_push(push, other, subscribed)
    assert isinstance(outcome, Refused)
    assert outcome.code == "http_400"


async def test_push_to_a_subscription_that_it_ended_finds_nobody(push_service: str, push: PushChannel) -> None:
    keys = dict(push.make_app_keys())
    key = push.describe_app_keys(keys)["application_server_key"]
    subscribed = (await call(push_service, "subscribe", userVisibleOnly="true", applicationServerKey=key))["data"]
    await call(push_service, f"expire-subscription/{subscribed['clientHash']}")
    outcome = await send_push(push, keys, subscribed)
    assert isinstance(outcome, Refused)
    assert push.classify(outcome.code) is ReasonClass.RECIPIENT_GONE
