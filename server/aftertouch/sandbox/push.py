"""A web push service (RFC 8030, 8188, 8291, 8292) and the browsers behind it, service workers included.

The service stores what it cannot read, as the real ones do; the browser decrypts. A message that does not decrypt is
therefore answered 201 and shows up in the truth only, as ``undecryptable``.
"""

from __future__ import annotations

import binascii
import hmac
import json
import os
import re
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .draws import draw_numbers
from .faults import Fault, Faults
from .population import Person, Population
from .settings import SandboxSettings
from .truth import Decision, Entry, Truth
from .webhooks import Outbox, Request, Stream

_LONGEST_BODY = 4096
_LONGEST_TTL = 2_592_000
_LONGEST_TOKEN_LIFE = 24 * 3600
_TOPIC = re.compile(r"[A-Za-z0-9_-]{1,32}")
_CREDENTIALS = re.compile(r"vapid\s+(.+)", re.IGNORECASE)
_SUBJECT = re.compile(r"mailto:[^\s<>@]+@[^\s<>@]+|https://[^\s]+")
_ANY_PAGE = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Allow-Methods": "POST, DELETE",
    "Access-Control-Allow-Headers": "*",
}
_URGENCIES = ("very-low", "low", "normal", "high")

# The shapes and numbers of Mozilla's service: https://mozilla-services.github.io/autopush-rs/errors.html
_FAULTS = {
    "429": (429, 203, "Too many requests"),
    "429_retry_after": (429, 203, "Too many requests"),
    "500": (500, 999, "Unknown error"),
    "503": (503, 201, "Use exponential back-off for retries"),
    "expired_token": (401, 109, "Expired VAPID token"),
}


class _Refused(Exception):
    def __init__(self, status: int, errno: int, message: str) -> None:
        super().__init__(status, errno, message)
        self.status = status
        self.errno = errno
        self.message = message


class Undecryptable(Exception):
    """The browser cannot make sense of a message."""


@dataclass(frozen=True, slots=True)
class _Report:
    entry: Entry
    kind: str
    url: str


class _Beacons(Stream[_Report]):
    name = "push"

    def compose(self, items: Sequence[_Report]) -> Request | None:
        (report,) = items
        return Request(report.url, b"", {"User-Agent": "Mozilla/5.0 (sandbox)"})

    def acknowledge(self, items: Sequence[_Report]) -> None:
        for report in items:
            if decision := report.entry.signals.get(report.kind):
                decision.acknowledged = True

    def pick_backoff(self, attempts: int, elapsed: float, failure: str, item: _Report) -> float | None:
        return None if self.settings.strict_retries else super().pick_backoff(attempts, elapsed, failure, item)


@dataclass(frozen=True, slots=True)
class _Visitor:
    """A browser outside of the population, whose service worker is somebody else's: it is only handed what it was sent."""

    key: ec.EllipticCurvePrivateKey
    secret: bytes
    server_key: str
    messages: list[str]


@dataclass(frozen=True, slots=True)
class _Waiting:
    entry: Entry
    expires: float
    topic: str


class Push:
    """One push service and all browsers that are subscribed to it."""

    def __init__(
        self, settings: SandboxSettings, url: str, population: Population, truth: Truth, faults: Faults, outbox: Outbox
    ) -> None:
        self._settings = settings
        self._url = url
        self._population = population
        self._truth = truth
        self._faults = faults
        self._outbox = outbox
        self._beacons = _Beacons(settings)
        self._server_key = settings.vapid_public_key
        # A sender keeps one signed token for hours; checking it once per message would cost more than the decryption.
        self._checked: dict[str, float] = {}
        self._waiting: dict[int, list[_Waiting]] = {}
        self._visitors: dict[str, _Visitor] = {}
        self.routes = [
            Route("/push/visitors", self._subscribe, methods=["POST", "OPTIONS"]),
            Route("/push/visitors/{name}", self._create_for_visitor, methods=["POST"]),
            Route("/push/visitors/{name}", self._unsubscribe, methods=["DELETE", "OPTIONS"]),
            Route("/push/visitors/{name}", self._list_messages, methods=["GET"]),
            Route("/push/{browser}", self._create, methods=["POST"]),
        ]

    def clear(self) -> None:
        """Forget what waits for browsers that are offline."""
        self._waiting.clear()

    async def _create(self, request: HttpRequest) -> Response:
        fault = self._faults.strike("push")
        if fault and not fault.taken:
            return self._answer_fault(fault)
        try:
            message_id, ttl = self._take(request.path_params["browser"], request.headers, await request.body())
        except _Refused as refused:
            return _answer_error(refused.status, refused.errno, refused.message)
        if fault:
            return self._answer_fault(fault)
        return Response(status_code=201, headers={"location": f"{self._url}/push/messages/{message_id}", "ttl": str(ttl)})

    async def _subscribe(self, request: HttpRequest) -> Response:
        """What ``PushManager.subscribe`` asks a push service for: a page of any origin calls it, in the browser's place."""
        if request.method == "OPTIONS":
            return Response(status_code=204, headers=_ANY_PAGE)
        name, key, secret = uuid4().hex, ec.generate_private_key(ec.SECP256R1()), os.urandom(16)
        self._visitors[name] = _Visitor(key, secret, (await request.json())["applicationServerKey"], [])
        point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        keys = {"p256dh": _encode(point), "auth": _encode(secret)}
        answer = {"endpoint": f"{self._url}/push/visitors/{name}", "expirationTime": None, "keys": keys}
        return JSONResponse(answer, 201, _ANY_PAGE)

    async def _unsubscribe(self, request: HttpRequest) -> Response:
        if request.method == "DELETE":
            self._visitors.pop(request.path_params["name"], None)
        return Response(status_code=204, headers=_ANY_PAGE)

    async def _list_messages(self, request: HttpRequest) -> Response:
        """The messages to a visitor, decrypted, oldest first."""
        visitor = self._visitors.get(request.path_params["name"])
        return JSONResponse([] if visitor is None else visitor.messages)

    async def _create_for_visitor(self, request: HttpRequest) -> Response:
        visitor = self._visitors.get(request.path_params["name"])
        try:
            if visitor is None:
                raise _Refused(410, 106, "The subscription is gone")
            body = await request.body()
            check_vapid(request.headers.get("authorization", ""), audience=self._url, server_key=visitor.server_key)
            _check_headers(request.headers, body)
        except _Refused as refused:
            return _answer_error(refused.status, refused.errno, refused.message)
        visitor.messages.append(decrypt(body, visitor.key, visitor.secret).decode())
        return Response(status_code=201, headers={"location": f"{self._url}/push/messages/{uuid4().hex}"})

    def _answer_fault(self, fault: Fault) -> Response:
        answer = _FAULTS.get(fault.mode or "")
        return self._faults.keep_silent(fault) if answer is None else _answer_error(*answer, fault.retry_headers)

    def _take(self, browser: str, headers: Mapping[str, str], body: bytes) -> tuple[str, int]:
        self._check_authorization(headers.get("authorization", ""))
        ttl, topic = _check_headers(headers, body)
        person = self._population.find_browser(browser)
        if person is None:
            raise _Refused(404, 102, "No such subscription")
        address = self._population.get_endpoint(person.index)
        if draw_numbers(self._settings.seed, "push", person.index)[0] < self._settings.shares.push_gone:
            # Recorded without its token: a push service cannot read it.
            entry = self._truth.record("push", address, person, refused="410")
            entry.signals["failed"] = Decision("410")
            raise _Refused(410, 106, "The subscription is gone")
        message_id = uuid4().hex
        entry, payload = self._open(person, address, message_id, body)
        self._deliver(person, entry, payload, time.time() + ttl, ttl, topic)
        return message_id, ttl

    def _check_authorization(self, header: str) -> None:
        expires = self._checked.get(header)
        if expires is None:
            expires = check_vapid(header, audience=self._url, server_key=self._server_key)
            self._checked[header] = expires
        if expires < time.time():
            raise _Refused(401, 109, "Expired VAPID token")

    def _open(self, person: Person, address: str, message_id: str, body: bytes) -> tuple[Entry, dict[str, Any] | None]:
        """Decrypt in the browser's place; the payload is None when nothing can be shown."""
        try:
            text = decrypt(
                body, self._population.derive_push_key(person.index), self._population.derive_push_secret(person.index)
            )
        except Undecryptable as problem:
            entry = self._truth.record("push", address, person, message_id=message_id)
            entry.signals["undecryptable"] = Decision(str(problem))
            return entry, None
        try:
            payload = json.loads(text)
        except ValueError:
            payload = None
        if not isinstance(payload, dict):
            payload = {"body": text.decode(errors="replace")}
        token = payload.get("t")
        entry = self._truth.record(
            "push",
            address,
            person,
            token=token if isinstance(token, str) else "",
            message_id=message_id,
            title=str(payload.get("title") or payload.get("body") or ""),
            content=payload,
        )
        return entry, payload

    def _deliver(
        self, person: Person, entry: Entry, payload: dict[str, Any] | None, expires: float, ttl: int, topic: str
    ) -> None:
        if payload is None:
            return
        waiting = self._waiting.pop(person.index, [])
        if topic:
            for message in waiting:
                if message.topic == topic:
                    message.entry.signals["replaced"] = Decision()
            waiting = [message for message in waiting if message.topic != topic]
        number = self._truth.count_earlier("push", entry.address, entry.token)
        is_offline = (
            draw_numbers(self._settings.seed, "push online", person.index, number)[0] < self._settings.shares.push_offline
        )
        if is_offline:
            # TTL 0 is "now or never".
            if ttl:
                waiting.append(_Waiting(entry, expires, topic))
            else:
                entry.signals["expired"] = Decision()
            if waiting:
                self._waiting[person.index] = waiting
            return
        for message in waiting:
            if message.expires < time.time():
                message.entry.signals["expired"] = Decision()
            else:
                self._show(person, message.entry)
        self._show(person, entry)

    def _show(self, person: Person, entry: Entry) -> None:
        """Play the service worker, and the person in front of it."""
        entry.signals["shown"] = Decision()
        base = entry.content.get("b")
        if not person.push_confirms or not entry.token or not isinstance(base, str):
            return
        shares = self._settings.shares
        number = self._truth.count_earlier("push", entry.address, entry.token)
        lost, reaction = draw_numbers(self._settings.seed, "push shown", person.index, number)[:2]
        if lost >= shares.push_beacon_lost:
            self._report(entry, base, "confirmed", 0.0, 0.8)
        if reaction < shares.push_clicked:
            self._report(entry, base, "clicked", 0.3, 1.8)
        elif reaction < shares.push_clicked + shares.push_dismissed:
            self._report(entry, base, "dismissed", 0.3, 1.8)

    def _report(self, entry: Entry, base: str, kind: str, earliest: float, latest: float) -> None:
        entry.signals[kind] = Decision()
        url = f"{base.rstrip('/')}/{kind}?t={quote(entry.token, safe='')}"
        self._outbox.schedule(self._beacons, _Report(entry, kind, url), earliest, latest)


def _check_headers(headers: Mapping[str, str], body: bytes) -> tuple[int, str]:
    """The TTL, cut to what is kept at most, and the topic."""
    ttl = headers.get("ttl", "")
    if not ttl.isdecimal():
        raise _Refused(400, 111, "Missing or invalid TTL header")
    topic = headers.get("topic")
    if topic is not None and not _TOPIC.fullmatch(topic):
        raise _Refused(400, 113, "Invalid Topic: at most 32 characters of the base64url alphabet")
    if headers.get("urgency", "normal") not in _URGENCIES:
        raise _Refused(400, 110, "Invalid Urgency")
    if len(body) > _LONGEST_BODY:
        raise _Refused(413, 104, "The payload is too large")
    if headers.get("content-encoding") != "aes128gcm":
        raise _Refused(400, 110, "Content-Encoding must be aes128gcm")
    return min(int(ttl), _LONGEST_TTL), topic or ""


def check_vapid(header: str, *, audience: str, server_key: str | None) -> float:
    """Check an Authorization header (RFC 8292) and return when its token expires."""
    credentials = _CREDENTIALS.fullmatch(header)
    if not credentials:
        raise _Refused(401, 109, "Missing VAPID credentials")
    parameters = dict(part.strip().partition("=")[::2] for part in credentials[1].split(","))
    try:
        signed, _, signature = parameters["t"].rpartition(".")
        head, claims = (json.loads(_decode(part)) for part in signed.split("."))
        point, raw = _decode(parameters["k"]), _decode(signature)
        key = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        if len(raw) != 64 or head["alg"] != "ES256":
            raise ValueError("not an ES256 signature")
        encoded = encode_dss_signature(int.from_bytes(raw[:32], "big"), int.from_bytes(raw[32:], "big"))
        key.verify(encoded, signed.encode(), ec.ECDSA(SHA256()))
        aud, exp, sub = claims["aud"], float(claims["exp"]), claims.get("sub", "")
    except (KeyError, ValueError, TypeError, InvalidSignature):
        raise _Refused(401, 109, "Invalid VAPID credentials") from None
    if aud != audience:
        raise _Refused(401, 109, "The VAPID token is for another audience")
    if exp > time.time() + _LONGEST_TOKEN_LIFE:
        raise _Refused(401, 109, "The VAPID token lives longer than 24 hours")
    if not isinstance(sub, str) or not _SUBJECT.fullmatch(sub):
        raise _Refused(403, 109, "The VAPID subject is neither mailto: nor https:")
    if server_key is not None and not hmac.compare_digest(point, _decode(server_key)):
        raise _Refused(403, 109, "The subscription belongs to another application server key")
    return exp


def decrypt(body: bytes, key: ec.EllipticCurvePrivateKey, secret: bytes) -> bytes:
    """Decrypt an aes128gcm message of one record (RFC 8291, section 4)."""
    salt, record_size, sender_point, record = body[:16], int.from_bytes(body[16:20], "big"), body[21:86], body[86:]
    if len(body) < 86 + 17 or body[20] != 65 or not len(record) <= record_size:
        raise Undecryptable("not one aes128gcm record")
    try:
        sender = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), sender_point)
        shared = key.exchange(ec.ECDH(), sender)
    except ValueError:
        raise Undecryptable("the sender's key is no point of P-256") from None
    receiver_point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    keying = _derive(secret, shared, b"WebPush: info\0" + receiver_point + sender_point, 32)
    content_key = _derive(salt, keying, b"Content-Encoding: aes128gcm\0", 16)
    nonce = _derive(salt, keying, b"Content-Encoding: nonce\0", 12)
    try:
        padded = AESGCM(content_key).decrypt(nonce, record, None)
    except InvalidTag:
        raise Undecryptable("the tag does not fit") from None
    text = padded.rstrip(b"\0")
    if not text.endswith(b"\x02"):
        raise Undecryptable("no delimiter of a last record")
    return text[:-1]


def _derive(salt: bytes, secret: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 of at most one block; a tenth of the time that an HKDF object takes."""
    return hmac.digest(hmac.digest(salt, secret, "sha256"), info + b"\x01", "sha256")[:length]


def _encode(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as problem:
        raise ValueError("not base64url") from problem


def _answer_error(status: int, errno: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"code": status, "errno": errno, "error": message, "message": message}, status, headers)
