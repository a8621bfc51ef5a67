"""The push channel against a push service on loopback, the vector of RFC 8291, and the parsers of http_ece and py-vapid."""

import asyncio
import base64
import gc
import ipaddress
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import aftertouch_push
import http_ece
import pytest
from aftertouch_push import MAX_PLAINTEXT, PushAddress, PushChannel, PushContent, PushKeys, PushSettings
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st
from pluggy import PluginManager
from py_vapid import Vapid02
from py_vapid import jwt as vapid_jwt
from pydantic import ValidationError

from aftertouch import hookspecs
from aftertouch.channels import (
    STORED,
    Accepted,
    InvalidSignature,
    InvalidWebhook,
    Limit,
    Message,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Unclear,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.signals import CORE_IMPLICATIONS, close_implications, parse

TOKEN = "AbCdEfGhIjKlMnOpQrStUv-_"
WEBHOOK_URL = "https://hooks.example.com/v1/webhooks/push"


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def write_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


# Fixed, because they become names of tests, and every worker of a parallel run must find the same ones.
VAPID_KEY = ec.derive_private_key(0xA11CE, ec.SECP256R1())
BROWSER_KEY = ec.derive_private_key(0xB0B, ec.SECP256R1())
BROWSER_AUTH = bytes(range(16))
KEYS = {"p256dh": encode(write_point(BROWSER_KEY)), "auth": encode(BROWSER_AUTH)}


def make_settings(**values: object) -> PushSettings:
    key = encode(VAPID_KEY.private_numbers().private_value.to_bytes(32, "big"))
    given = {"vapid_private_key": key, "vapid_subject": "mailto:ops@example.com", **values}
    return PushSettings.model_validate(given)


def make_channel(**values: object) -> PushChannel:
    return PushChannel(make_settings(**values), webhook_url=WEBHOOK_URL)


def make_message(endpoint: str, *, confirms: bool = True, **content: object) -> Message[PushAddress, PushContent]:
    values = {"title": "Sale", "body": "Ends tonight", "url": "https://shop.example.com/", **content}
    return Message(
        token=TOKEN,
        address=PushAddress.model_validate({"endpoint": endpoint, "keys": KEYS, "confirms": confirms}),
        content=PushContent.model_validate(values),
    )


def decrypt(body: bytes) -> bytes:
    return http_ece.decrypt(body, private_key=BROWSER_KEY, auth_secret=BROWSER_AUTH, version="aes128gcm")


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class PushService:
    """A push service that answers every POST as it is told, and keeps what it was sent."""

    url: str
    answer: Handler
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)


@asynccontextmanager
async def run_push_service() -> AsyncIterator[PushService]:
    async def take(request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        service.requests.append((request.method, request.path, headers, await request.read()))
        return await service.answer(request)

    async def create(_: web.Request) -> web.StreamResponse:
        return web.Response(status=201, headers={"Location": f"{service.url}/m/1"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", take)
    async with TestServer(app, host="127.0.0.1") as server:
        service = PushService(url=str(server.make_url("/")).rstrip("/"), answer=create)
        yield service


def answer_with(status: int, **headers: str) -> Handler:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return answer


async def send_one(service: PushService, timeout: float = 30, **values: object) -> Outcome:  # noqa: ASYNC109
    async with make_channel(allow_insecure_loopback=True, timeout_seconds=timeout) as channel:
        [outcome] = await channel.send([make_message(f"{service.url}/push/1", **values)])
    return outcome


# What is declared


def test_plugin_registers_the_channel() -> None:
    plugins = PluginManager(hookspecs.PROJECT)
    plugins.add_hookspecs(hookspecs)
    plugins.register(aftertouch_push)
    assert plugins.hook.aftertouch_register_channels() == [(PushChannel,)]


def test_actions_use_declared_signals_only() -> None:
    implies = {**CORE_IMPLICATIONS, **{signal.name: signal.implies for signal in PushChannel.signals}}
    evidence = close_implications(implies)
    assert "clicked" in evidence["attempted"]
    for action in PushChannel.actions:
        parse(action.expression, implies)
        if action.apart is not None:
            parse(action.apart, implies)


# Addresses


def test_address_takes_what_a_browser_gives_and_drops_the_expiration() -> None:
    address = make_channel().parse_address(
        {"endpoint": "https://FCM.googleapis.com:443/fcm/send/x:y", "expirationTime": None, "keys": KEYS}
    )
    assert address.key == "https://fcm.googleapis.com/fcm/send/x:y"
    assert "expirationTime" not in address.model_dump()
    assert PushAddress.model_validate(address.model_dump()) == address
    assert "googleapis" not in repr(address)


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://fcm.googleapis.com/fcm/send/1",
        "https://updates.push.services.mozilla.com/wpush/v2/1",
        "https://web.push.apple.com/1",
        "https://wns2-par02p.notify.windows.com/w/?token=1",
        "https://push.example.org/1",
        "https://eu.ups.example.org/1",
    ],
)
def test_address_at_a_known_push_service_is_taken(endpoint: str) -> None:
    channel = make_channel(extra_hosts="push.example.org, .ups.example.org")
    assert channel.parse_address({"endpoint": endpoint, "keys": KEYS}).key == endpoint


@pytest.mark.parametrize(
    "endpoint",
    [
        "",
        "fcm.googleapis.com/x",
        "http://fcm.googleapis.com/x",
        "https://fcm.googleapis.com:8443/x",
        "https://fcm.googleapis.com./x",
        "https://fcm.googleapis.com.evil.example/x",
        "https://evilfcm.googleapis.com/x",
        "https://evilpush.apple.com/x",
        "https://push.apple.com/x",
        "https://user@fcm.googleapis.com/x",
        "https://fcm.googleapis.com/x#y",
        "https://fcm.googleapis.com\\@evil.example/x",
        "https://fcm.googleapis.com/x\r\nHost: evil.example",
        "https://fcm.googleapis.com/\u2028",
        "https://127.0.0.1/x",
        "https://[::1]/x",
        "https://2130706433/x",
        "https://localhost/x",
        "http://127.0.0.1:8080/x",
        "https://fcm.googleapis.com/" + "x" * 2048,
    ],
)
def test_address_elsewhere_is_refused_at_the_endpoint_field(endpoint: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        make_channel().parse_address({"endpoint": endpoint, "keys": KEYS})
    assert [error["loc"] for error in refusal.value.errors()] == [("endpoint",)]
    assert "evil" not in str(refusal.value)


def test_address_on_loopback_needs_the_setting() -> None:
    channel = make_channel(allow_insecure_loopback="true")
    assert channel.parse_address({"endpoint": "http://127.0.0.1:8080/x", "keys": KEYS}).key == "http://127.0.0.1:8080/x"
    with pytest.raises(ValidationError):
        channel.parse_address({"endpoint": "http://169.254.169.254/latest", "keys": KEYS})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p256dh", encode(b"\x04" + bytes(64))),  # not on the curve
        ("p256dh", encode(b"\x03" + write_point(BROWSER_KEY)[1:])),
        ("p256dh", encode(write_point(BROWSER_KEY)[:64])),
        ("p256dh", "*" * 87),
        ("auth", encode(bytes(15))),
        ("auth", encode(bytes(17))),
        ("auth", "A"),
        ("auth", ""),
    ],
)
def test_address_with_a_broken_key_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        make_channel().parse_address({"endpoint": "https://fcm.googleapis.com/x", "keys": {**KEYS, name: value}})
    assert [error["loc"] for error in refusal.value.errors()] == [("keys", name)]


@settings(deadline=None)
@given(st.text())
def test_address_parsing_never_raises_anything_else(text: str) -> None:
    with pytest.raises(ValidationError):
        make_channel().parse_address({"endpoint": f"https://{text}.example/", "keys": {"p256dh": text, "auth": text}})


# Settings


@settings(deadline=None)
@given(st.text())
def test_retry_after_of_any_text_is_survived(text: str) -> None:
    delay = parse_retry_after(text)
    assert delay is None or delay >= timedelta()


@pytest.mark.parametrize("written", ["pkcs8", "sec1", "one line"])
def test_settings_take_the_vapid_key_as_pem(written: str) -> None:
    form = PrivateFormat.TraditionalOpenSSL if written == "sec1" else PrivateFormat.PKCS8
    pem = VAPID_KEY.private_bytes(Encoding.PEM, form, NoEncryption()).decode()
    settings = make_settings(vapid_private_key=pem.replace("\n", "\\n") if written == "one line" else pem)
    loaded = aftertouch_push.load_vapid_key(settings.vapid_private_key.get_secret_value())
    assert write_point(loaded) == write_point(VAPID_KEY)


def test_settings_refuse_a_key_of_another_curve_without_quoting_it() -> None:
    pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    for key in (pem, "dG9vLXNob3J0", "no key at all"):
        with pytest.raises(ValidationError) as refusal:
            make_settings(vapid_private_key=key)
        assert key not in str(refusal.value)


@pytest.mark.parametrize(
    "subject", ["mailto: <ops@example.com>", "mailto:ops@", "mailto:ops@host", "https://example.com/x", "http://example.com", ""]
)
def test_settings_refuse_a_subject_that_push_services_refuse(subject: str) -> None:
    with pytest.raises(ValidationError):
        make_settings(vapid_subject=subject)


@pytest.mark.parametrize("hosts", ["10.0.0.1", "*.example.org", "https://push.example.org", "PUSH.example.org", "localhost"])
def test_settings_refuse_an_extra_host_that_is_no_name(hosts: str) -> None:
    with pytest.raises(ValidationError):
        make_settings(extra_hosts=hosts)


# Encryption


def test_encryption_writes_the_bytes_of_rfc_8291() -> None:
    """RFC 8291, appendix A."""
    sender = ec.derive_private_key(int.from_bytes(decode("yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw"), "big"), ec.SECP256R1())
    keys = PushKeys(
        p256dh="BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4",
        auth="BTBZMqHH6r4Tts7J_aSIgg",
    )
    text = b"When I grow up, I want to be a watermelon"
    assert encode(aftertouch_push.encrypt(text, keys, sender=sender, salt=decode("DGv6ra1nlYgDCS1FRnbzlw"))) == (
        "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27mlmlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95b"
        "Qpu6cVPTpK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
    )


@settings(deadline=None)
@given(payload=st.binary(max_size=MAX_PLAINTEXT), salt=st.binary(min_size=16, max_size=16))
def test_encryption_is_read_by_http_ece(payload: bytes, salt: bytes) -> None:
    keys = PushKeys.model_validate(KEYS)
    assert decrypt(aftertouch_push.encrypt(payload, keys, sender=VAPID_KEY, salt=salt)) == payload


# Sending


async def test_send_uses_a_new_key_and_salt_for_each_message() -> None:
    async with run_push_service() as service, make_channel(allow_insecure_loopback=True) as channel:
        await channel.send([make_message(f"{service.url}/1")] * 2)
        [first, second] = [body for *_, body in service.requests]
    assert first[:16] != second[:16]
    assert first[21:86] != second[21:86]


async def test_send_posts_what_the_rfcs_ask_for() -> None:
    async with run_push_service() as service:
        outcome = await send_one(service, urgency="high", icon="/icon.png")
        [(method, path, headers, body)] = service.requests
    assert outcome == Accepted(message_id=f"{service.url}/m/1")
    assert (method, path) == ("POST", "/push/1")
    assert headers["ttl"] == "172800"
    assert headers["topic"] == TOKEN
    assert headers["urgency"] == "high"
    assert headers["content-encoding"] == "aes128gcm"
    assert headers["content-type"] == "application/octet-stream"
    assert json.loads(decrypt(body)) == {
        "t": TOKEN,
        "title": "Sale",
        "body": "Ends tonight",
        "url": "https://shop.example.com/",
        "icon": "/icon.png",
        "b": WEBHOOK_URL,
    }
    assert Vapid02.verify(headers["authorization"])
    parts = dict(part.split("=", 1) for part in headers["authorization"].removeprefix("vapid ").split(","))
    assert decode(parts["k"]) == write_point(VAPID_KEY)
    claims = vapid_jwt.decode(parts["t"], parts["k"])
    assert claims["aud"] == service.url
    assert claims["sub"] == "mailto:ops@example.com"


async def test_send_keeps_one_signature_per_push_service() -> None:
    async with (
        run_push_service() as one,
        run_push_service() as other,
        make_channel(allow_insecure_loopback=True) as channel,
    ):
        await channel.send([make_message(f"{service.url}/{n}") for service in (one, other) for n in range(3)])
        signatures = [{headers["authorization"] for _, _, headers, _ in service.requests} for service in (one, other)]
    assert [len(kept) for kept in signatures] == [1, 1]
    assert signatures[0] != signatures[1]


async def test_send_keeps_the_order_of_its_messages() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        number = int(request.path.rsplit("/", 1)[1])
        await asyncio.sleep(0.02 * (3 - number))
        return web.Response(status=201 if number % 2 else 410)

    async with run_push_service() as service, make_channel(allow_insecure_loopback=True) as channel:
        service.answer = answer
        outcomes = await channel.send([make_message(f"{service.url}/{number}") for number in range(4)])
    assert [type(outcome) for outcome in outcomes] == [Refused, Accepted, Refused, Accepted]


async def test_send_says_who_can_never_confirm() -> None:
    async with run_push_service() as service:
        outcome = await send_one(service, confirms=False)
    assert isinstance(outcome, Accepted)
    assert outcome.signals == ("unconfirmable",)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (400, ReasonClass.CONTENT),
        (401, ReasonClass.CONFIG),
        (403, ReasonClass.CONFIG),
        (404, ReasonClass.RECIPIENT_GONE),
        (410, ReasonClass.RECIPIENT_GONE),
        (413, ReasonClass.CONTENT),
        (429, ReasonClass.RATE),
        (500, ReasonClass.TRANSIENT),
        (503, ReasonClass.TRANSIENT),
        (418, ReasonClass.UNKNOWN),
    ],
)
async def test_send_classifies_a_refusal(status: int, reason: ReasonClass) -> None:
    async with run_push_service() as service:
        service.answer = answer_with(status)
        outcome = await send_one(service)
    assert outcome == Refused(code=f"http_{status}")
    assert PushChannel.classify(f"http_{status}") is reason


@pytest.mark.parametrize(
    ("header", "delay"),
    [
        ("120", timedelta(seconds=120)),
        ("Wed, 21 Oct 2015 07:28:00 GMT", timedelta()),
        ("soon", None),
        ("9" * 5000, None),
        ("-1", None),
    ],
)
async def test_send_keeps_the_delay_that_is_asked_for(header: str, delay: timedelta | None) -> None:
    async with run_push_service() as service:
        service.answer = answer_with(429, Retry_After=header)
        outcome = await send_one(service)
    assert outcome == Refused(code="http_429", retry_after=delay)


async def test_send_follows_no_redirect() -> None:
    async with run_push_service() as target, run_push_service() as service:
        service.answer = answer_with(307, Location=f"{target.url}/stolen")
        outcome = await send_one(service)
    assert outcome == Refused(code="http_307")
    assert PushChannel.classify("http_307") is ReasonClass.CONFIG
    assert target.requests == []


async def test_send_is_unclear_when_the_answer_stalls() -> None:
    released = asyncio.Event()

    async def stall(_: web.Request) -> web.StreamResponse:
        await released.wait()
        return web.Response(status=201)

    async with run_push_service() as service:
        service.answer = stall
        outcome = await send_one(service, timeout=3)
        released.set()
    assert isinstance(outcome, Unclear)


async def test_send_is_unclear_when_the_connection_is_reset() -> None:
    async def reset(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with run_push_service() as service:
        service.answer = reset
        outcome = await send_one(service)
    assert isinstance(outcome, Unclear)


async def test_send_is_refused_when_nothing_listens() -> None:
    # A port that is bound and not listened on: one that is only free may be taken by somebody meanwhile.
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        service = PushService(url=f"http://127.0.0.1:{bound.getsockname()[1]}", answer=answer_with(201))
        assert await send_one(service) == Refused(code="connect_error")
    assert PushChannel.classify("connect_error") is ReasonClass.TRANSIENT


async def test_send_is_refused_when_the_connection_stalls() -> None:
    """The listener never answers the TLS handshake, so nothing of the message has left."""
    finished = asyncio.Event()

    async def listen(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await finished.wait()
        writer.close()

    async with await asyncio.start_server(listen, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outcome = await send_one(PushService(url=f"https://127.0.0.1:{port}", answer=answer_with(201)), timeout=1)
        finished.set()
    assert outcome == Refused(code="connect_error")


@pytest.mark.parametrize("p256dh", ["BA", KEYS["auth"], "B" + "A" * 86])
async def test_stored_keys_that_are_none_are_refused_at_the_send(p256dh: str) -> None:
    values = {"endpoint": "http://127.0.0.1:1/x", "keys": {**KEYS, "p256dh": p256dh}}
    with pytest.raises(ValidationError):
        PushAddress.model_validate(values)
    message = make_message("http://127.0.0.1:1/x")
    stored = replace(message, address=PushAddress.model_validate(values, context=STORED))
    async with make_channel(allow_insecure_loopback=True) as channel:
        assert await channel.send([stored]) == [Refused(code="keys_refused")]


async def test_send_does_not_trust_a_stored_endpoint() -> None:
    async with make_channel() as channel:
        outcomes = await channel.send([make_message("http://127.0.0.1:1/x"), make_message("https://evil.example/x")])
    assert outcomes == [Refused(code="endpoint_refused")] * 2


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "224.0.0.1", "::1", "fe80::1", "::ffff:127.0.0.1"]
)
async def test_send_opens_no_connection_into_a_private_network(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is on the allow-list; what the resolver says it means is not a public address."""

    async def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert host == "push.example.org"
        ip = ipaddress.ip_address(address)
        target = (address, port) if ip.version == 4 else (address, port, 0, 0)
        return [(socket.AF_INET if ip.version == 4 else socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", target)]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with make_channel(extra_hosts="push.example.org") as channel:
        assert await channel.send([make_message("https://push.example.org/x")]) == [Refused(code="endpoint_refused")]


async def test_send_enforces_the_limit_of_one_record() -> None:
    room = MAX_PLAINTEXT - len(make_channel()._write_payload(make_message("http://127.0.0.1/x", body="")))
    async with run_push_service() as service:
        assert isinstance(await send_one(service, body="x" * room), Accepted)
        assert await send_one(service, body="x" * (room - 1) + "é") == Refused(code="payload_too_large")
        [(_, _, _, body)] = service.requests
    assert len(body) == 4096
    assert PushChannel.classify("payload_too_large") is ReasonClass.CONTENT


# What the service worker reports


def make_request(path: str, *, method: str = "POST", query: str = f"?t={TOKEN}") -> WebhookRequest:
    return WebhookRequest(method=method, url=f"{WEBHOOK_URL}/{path}{query}", path=path, headers={}, body=b"")


@pytest.mark.parametrize("signal", ["confirmed", "clicked", "dismissed"])
def test_webhook_brings_the_signal_of_its_path(signal: str) -> None:
    channel, request = make_channel(), make_request(signal)
    channel.verify(request)
    webhook = channel.parse(request)
    assert webhook.receipts == (Receipt(signal=signal, token=TOKEN),)
    assert webhook.answer.status == 204
    assert webhook.answer.headers["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("query", ["", "?t=", f"?t={TOKEN}x", f"?t={TOKEN[:-1]}", f"?t={TOKEN[:-1]}%0a", f"?x={TOKEN}"])
def test_webhook_without_a_well_formed_token_is_refused(query: str) -> None:
    with pytest.raises(InvalidSignature):
        make_channel().verify(make_request("confirmed", query=query))


def test_webhook_of_another_method_is_refused() -> None:
    with pytest.raises(InvalidSignature):
        make_channel().verify(make_request("confirmed", method="GET"))


def test_webhook_answers_a_preflight_without_a_receipt() -> None:
    channel, request = make_channel(), make_request("clicked", method="OPTIONS")
    channel.verify(request)
    webhook = channel.parse(request)
    assert webhook.receipts == ()
    assert webhook.answer.headers["Access-Control-Allow-Methods"] == "POST"


def test_webhook_at_an_unknown_path_is_refused() -> None:
    with pytest.raises(InvalidWebhook):
        make_channel().parse(make_request("sent"))


def count_vapid() -> int:
    """Key pairs in memory, with what was signed by them."""
    gc.collect()
    return sum(isinstance(one, Vapid02) for one in gc.get_objects())


def test_keys_of_many_apps_take_no_more_memory_than_those_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each app's was kept for as long as the process ran."""
    monkeypatch.setattr(aftertouch_push, "MAX_SIGNERS", 3)
    channel, before = make_channel(vapid_private_key=None), count_vapid()
    keys = [PushChannel.make_app_keys() for _ in range(10)]
    described = [channel.describe_app_keys(own) for own in (*keys, *keys)]
    assert described[:10] == described[10:]
    assert len({one["application_server_key"] for one in described}) == 10
    assert count_vapid() - before <= 3


# Pace


@pytest.mark.parametrize(
    ("endpoint", "key"),
    [
        ("https://fcm.googleapis.com/fcm/send/x", "fcm.googleapis.com"),
        ("https://wns2-par02p.notify.windows.com/w/?token=x", "wns2-par02p.notify.windows.com"),
        ("https://wns2-am3p.notify.windows.com/w/?token=x", "wns2-am3p.notify.windows.com"),
        ("http://127.0.0.1:8080/push/x", "127.0.0.1:8080"),
    ],
)
def test_limit_is_the_push_services(endpoint: str, key: str) -> None:
    """One that asks for a rest, or is down, holds up no other; nor does one region hold up the next."""
    assert make_channel().limits(make_message(endpoint)) == (Limit(key=key),)


def test_what_was_stored_and_leads_nowhere_has_no_limit_and_is_refused_by_sending() -> None:
    stored = PushAddress.model_validate({"endpoint": "no URL at all", "keys": KEYS}, context=STORED)
    message = replace(make_message("https://fcm.googleapis.com/x"), address=stored)
    assert make_channel().limits(message) == ()
