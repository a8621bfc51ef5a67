"""Web push: encrypts a notification for one browser (RFC 8291), signs it (RFC 8292) and hands it to its push service (RFC 8030).

A push service says only that it keeps a message (201), so ``confirmed``, ``clicked`` and ``dismissed`` come from the service
worker, which calls back with the token that was inside the encrypted payload. Endpoints are addresses that callers give us
and that we POST to: nothing is sent to a host outside the allow-list, to an address that is not public, or after a redirect.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from types import TracebackType
from typing import Annotated, ClassVar, Literal, Self, cast

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from py_vapid import Vapid02
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo, field_validator

from aftertouch.channels import (
    CHECKED_ONCE,
    STORED,
    Accepted,
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    InvalidSignature,
    InvalidWebhook,
    Limit,
    Message,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Settings,
    Signal,
    Unclear,
    Webhook,
    WebhookAnswer,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.hookspecs import hookimpl
from aftertouch.http import HttpClient, IpAddress, NoAnswer, NotAllowed, NotSent, Origin, encode_headers, split_url

CURVE = ec.SECP256R1()

RECORD_SIZE = 4096
"""Bytes. A push service need not take a longer body (RFC 8030, section 7.2), and a body is one record (RFC 8291, section 4)."""
MAX_PLAINTEXT = RECORD_SIZE - 103
"""Bytes: header, the sender's key, delimiter and tag take 21 + 65 + 1 + 16 (RFC 8188, section 2)."""

PUSH_SERVICES = (
    "fcm.googleapis.com",  # Chrome, Edge on Android, Opera, Samsung Internet
    "jmt17.google.com",  # Chromium builds without Google's API keys
    ".push.services.mozilla.com",
    ".push.apple.com",
    ".notify.windows.com",
)
"""The hosts that browsers subscribe at. A leading dot stands for every host below that name."""

VAPID_LIFETIME = timedelta(hours=12)
"""A push service refuses more than 24 hours (RFC 8292, section 2); the rest is room for clocks that differ."""
VAPID_RENEWAL = timedelta(hours=1)
MAX_ORIGINS = 100
"""Hosts below a name with a leading dot are the subscribers' to invent, so what is kept of each needs an end."""
MAX_SIGNERS = 1_000
"""Keys of apps."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")
_SUBJECT = re.compile(r"mailto:[^\s<>@]+@[\w-]+(\.[\w-]+)+|https://[\w-]+(\.[\w-]+)+", re.ASCII)
_HOST_RULE = re.compile(r"\.?([a-z0-9-]+\.)+[a-z][a-z0-9-]*")
_LOOPBACK_HOSTS = frozenset(("127.0.0.1", "localhost"))

_CODES: Mapping[ReasonClass, Sequence[str]] = {
    ReasonClass.RECIPIENT_GONE: ("http_404", "http_410"),  # RFC 8030, section 7.3: the subscription expired or was ended
    # Whoever subscribed with a key that is no longer ours is not gone: the page subscribes the browser again.
    ReasonClass.CONTENT: ("payload_too_large", "endpoint_refused", "key_unknown", "keys_refused", "http_400", "http_413"),
    # A redirect is not part of the protocol: the endpoint is not what it seems.
    ReasonClass.CONFIG: ("http_401", "http_403", *(f"http_{status}" for status in range(300, 400))),
    ReasonClass.RATE: ("http_406", "http_429"),  # 406 is how the Windows service says 429
    ReasonClass.TRANSIENT: ("connect_error", *(f"http_{status}" for status in range(500, 600))),
}


def decode_base64url(text: str) -> bytes:
    """Decode base64url with or without its padding; Python's own decoder skips characters outside the alphabet."""
    if re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text) is None:
        raise ValueError("must be base64url")
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))


def encode_base64url(data: bytes) -> str:
    """Encode without padding, as browsers do."""
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def _check_point(text: str) -> str:
    point = decode_base64url(text)
    if len(point) != 65 or point[0] != 4:
        raise ValueError("must be an uncompressed point: 65 bytes that begin with 0x04")
    ec.EllipticCurvePublicKey.from_encoded_point(CURVE, point)
    return text


def _check_auth(text: str) -> str:
    if len(decode_base64url(text)) != 16:
        raise ValueError("must be 16 bytes")
    return text


def load_vapid_key(text: str) -> ec.EllipticCurvePrivateKey:
    """Load a P-256 key from PEM, or from the 32 bytes of its number as base64url.

    Raises:
        ValueError: it is neither; the text does not quote the key.
    """
    if "-----BEGIN" in text:
        try:
            # An environment file keeps a PEM on one line, with \n written out.
            key = load_pem_private_key(text.replace("\\n", "\n").encode(), password=None)
        except TypeError as error:
            raise ValueError("must be a PEM without a password") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError("must be a key on the curve P-256")
        return key
    number = decode_base64url(text)
    if len(number) != 32:
        raise ValueError("must be a PEM, or 32 bytes as base64url")
    return ec.derive_private_key(int.from_bytes(number, "big"), CURVE)


def write_public_key(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half as browsers want it: ``applicationServerKey`` (Push API, section 7)."""
    return encode_base64url(key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))


def _split_hosts(value: object) -> object:
    return [host.strip() for host in value.split(",") if host.strip()] if isinstance(value, str) else value


def _check_host_rule(rule: str) -> str:
    if _HOST_RULE.fullmatch(rule) is None:
        raise ValueError("must be a lower-case host name, or a name with a leading dot for every host below it")
    return rule


class PushSettings(Settings):
    """Who we are to push services, and which of them are spoken to."""

    by_app = frozenset(("vapid_private_key", "vapid_subject", "ttl_seconds"))

    vapid_private_key: SecretStr | None = None
    """The private half of a key pair that browsers subscribed with before, for all apps; PEM, or 32 bytes in base64url. Without
    it each app has a key pair of its own, which is made and kept."""
    vapid_subject: str
    """Whom a push service writes to: ``mailto:user@host`` or an https origin. Apple answers 403 to any other form."""
    ttl_seconds: int = Field(default=2 * 24 * 3600, ge=0, le=28 * 24 * 3600)
    """How long a push service keeps a message for a browser that is away."""
    extra_hosts: Annotated[tuple[Annotated[str, AfterValidator(_check_host_rule)], ...], BeforeValidator(_split_hosts)] = ()
    """More push services, comma separated."""
    allow_insecure_loopback: bool = False
    """Take ``http://127.0.0.1`` and ``http://localhost`` endpoints at any port: for a sandbox, never for production."""
    timeout_seconds: float = Field(default=10, gt=0)
    """For a whole request; the connection may take half of it. Keep it below 20, when a batch is given up and nobody knows what
    became of it."""

    @field_validator("vapid_private_key")
    @classmethod
    def _check_vapid_private_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            load_vapid_key(value.get_secret_value())
        return value

    @field_validator("vapid_subject")
    @classmethod
    def _check_vapid_subject(cls, value: str) -> str:
        if _SUBJECT.fullmatch(value) is None:
            raise ValueError("must be mailto:user@host, or an https origin without a path")
        return value

    def check_origin(self, origin: Origin) -> None:
        """Raise ``ValueError`` unless an endpoint's origin is a push service that these settings allow."""
        host = origin.host
        if self.allow_insecure_loopback and host in _LOOPBACK_HOSTS:
            return
        if origin.scheme != "https" or origin.port != 443:
            raise ValueError("must be https at port 443")
        if not any(host.endswith(rule) if rule.startswith(".") else host == rule for rule in (*PUSH_SERVICES, *self.extra_hosts)):
            raise ValueError("is not at a known push service")

    def may_connect(self, address: IpAddress) -> bool:
        """True for a public address: a name on the list could lead into some network of ours."""
        return (address.is_global and not address.is_multicast) or (self.allow_insecure_loopback and address.is_loopback)


class PushKeys(BaseModel):
    """The browser's side of the encryption (RFC 8291, section 3)."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    p256dh: Annotated[str, AfterValidator(_check_point), CHECKED_ONCE] = Field(repr=False)
    auth: Annotated[str, AfterValidator(_check_auth), CHECKED_ONCE] = Field(repr=False)


class PushAddress(Address):
    """A browser's ``PushSubscription``, as its ``toJSON`` writes it."""

    endpoint: str = Field(max_length=2048, repr=False)
    """Whoever knows it can try to send to it: a secret."""
    keys: PushKeys
    expirationTime: float | None = Field(default=None, exclude=True, repr=False)
    """Part of ``toJSON``, taken and dropped: an expired subscription answers 404 or 410."""
    application_server_key: Annotated[str, AfterValidator(_check_point), CHECKED_ONCE] | None = None
    """The public key that the browser subscribed with, where it is known: ``options.applicationServerKey`` in base64url."""
    confirms: bool = True
    """False for a browser whose service worker does not call back."""

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, value: str, info: ValidationInfo) -> str:
        if info.context is STORED:
            return value  # sending splits it again
        # The parser is the one that sends, so that both see the same host.
        origin, target = split_url(value)
        if isinstance(info.context, PushSettings):
            info.context.check_origin(origin)
        return f"{origin}{target}"

    @property
    def key(self) -> str:
        return self.endpoint


class PushAction(BaseModel):
    """A button below a notification."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$")
    """Its name."""
    title: str
    url: str | None = None
    """Where it leads, if not to the notification's own address."""
    icon: str | None = None


class PushContent(Content):
    """A notification, and where a click on it leads."""

    title: str
    body: str = ""
    url: str
    icon: str | None = None
    image: str | None = None
    """A large picture, where the browser shows one."""
    badge: str | None = None
    """A small one of a single colour, for the status bar of a phone."""
    actions: tuple[PushAction, ...] = Field(default=(), max_length=2)
    """Buttons. Chrome and Edge show two (``Notification.maxActions``), Firefox and Safari none."""
    tag: str | None = None
    """A later notification with the same tag takes this one's place on the screen."""
    urgency: Literal["very-low", "low", "normal", "high"] | None = None
    """RFC 8030, section 5.3: whether a device that saves power is woken."""


class _Signer:
    """One key pair, and what it signed for each push service (RFC 8292)."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, settings: PushSettings) -> None:
        self.public_key = write_public_key(key)
        self._vapid = Vapid02(key)
        self._settings = settings
        self._headers: dict[Origin, tuple[float, bytes]] = {}

    def authorize(self, origin: Origin) -> bytes:
        """The headers of every message to a push service, with a signature.

        One for each and half a day: its origin is all that a signature is bound to (RFC 8292, section 2).

        Raises:
            ValueError: the origin is not at a push service that the settings allow, whatever was stored.
        """
        now = time.time()
        renewal, headers = self._headers.get(origin, (0.0, b""))
        if renewal <= now:
            self._settings.check_origin(origin)
            if len(self._headers) >= MAX_ORIGINS:
                self._headers.clear()
            expiry = now + VAPID_LIFETIME.total_seconds()
            claims = {"aud": str(origin), "exp": int(expiry), "sub": self._settings.vapid_subject}
            headers = encode_headers(
                {
                    "Authorization": self._vapid.sign(claims)["Authorization"],
                    "Content-Encoding": "aes128gcm",
                    "Content-Type": "application/octet-stream",
                    "TTL": str(self._settings.ttl_seconds),
                }
            )
            self._headers[origin] = (expiry - VAPID_RENEWAL.total_seconds(), headers)
        return headers


class PushChannel(Channel):
    """Messages to browsers through whichever push service each of them subscribed at."""

    name = "push"
    label = "Web push"
    address_model = PushAddress
    content_model = PushContent
    settings_model = PushSettings
    # The token is the Topic, and a push service replaces a waiting message by the next one of its topic (RFC 8030, section 5.4).
    capabilities = Capabilities(
        idempotent_sends=True, signed_webhooks=False, batch_size=500, browsers=True, tracked_links=("url", "actions.url")
    )
    signals = (
        Signal(name="confirmed", label="Confirmed delivery", implies=("sent",)),
        Signal(name="clicked", label="Clicked", implies=("confirmed",)),
        Signal(name="scanned", label="A machine followed a link", implies=("sent",)),
        Signal(name="dismissed", label="Dismissed", implies=("confirmed",)),
        Signal(name="unconfirmable", label="Cannot confirm delivery"),
    )
    actions = (
        Action(name="clicked", label="Clicked this message", short_name="clicked", expression="clicked"),
        Action(name="not_clicked", label="Did not click this message", short_name="not clicked", expression="sent & ~clicked"),
        Action(name="confirmed", label="Confirmed delivery", short_name="confirmed", expression="confirmed"),
        Action(
            name="not_confirmed",
            label="Did not confirm delivery",
            short_name="not confirmed",
            expression="sent & ~confirmed",
            apart="sent & ~confirmed & unconfirmable",
            apart_label="Devices that can never confirm delivery",
        ),
        Action(name="sent", label="Sent this message", short_name="sent", expression="sent"),
    )
    reasons: ClassVar[Mapping[str, ReasonClass]] = {code: reason for reason, codes in _CODES.items() for code in codes}

    settings: PushSettings
    _http: HttpClient

    def __init__(self, settings: PushSettings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        given = settings.vapid_private_key
        self._given = None if given is None else _Signer(load_vapid_key(given.get_secret_value()), settings)
        self._signers: dict[str, _Signer] = {}
        """By the private keys of apps."""
        self._callback = json.dumps(webhook_url, ensure_ascii=False)

    async def __aenter__(self) -> Self:
        self._http = HttpClient(timeout=self.settings.timeout_seconds, may_connect=self.settings.may_connect)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.close()

    def parse_address(self, values: Mapping[str, object]) -> PushAddress:
        return PushAddress.model_validate(values, context=self.settings)

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        endpoint = cast("PushAddress", message.address).endpoint
        # What comes before the path, behind "https://", is looked up; taking the whole apart would cost 2 us a message.
        return _limit_service(endpoint[: endpoint.find("/", 8)])

    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        mine = cast("Sequence[Message[PushAddress, PushContent]]", messages)
        return await asyncio.gather(*(self._send_one(message) for message in mine))

    async def _send_one(self, message: Message[PushAddress, PushContent]) -> Outcome:
        address = message.address
        try:
            origin, target = split_url(address.endpoint)
            signer = self._find_signer(message)
            if signer is None:
                return Refused(code="key_unknown")
            headers = signer.authorize(origin)
        except ValueError:
            return Refused(code="endpoint_refused")
        payload = self._write_payload(message)
        if len(payload) > MAX_PLAINTEXT:
            return Refused(code="payload_too_large")
        headers += b"Topic: %b\r\n" % message.token.encode()
        if message.content.urgency is not None:
            headers += b"Urgency: %b\r\n" % message.content.urgency.encode()
        try:
            body = encrypt(payload, address.keys, sender=ec.generate_private_key(CURVE), salt=os.urandom(16))
        except ValueError:
            return Refused(code="keys_refused")
        try:
            answer = await self._http.post(origin, target, headers, body)
        except NotSent as error:
            return Refused(code="endpoint_refused" if isinstance(error, NotAllowed) else "connect_error")
        except NoAnswer as error:
            return Unclear(detail=str(error))
        if not 200 <= answer.status <= 299:
            return Refused(code=f"http_{answer.status}", retry_after=parse_retry_after(answer.headers.get("retry-after")))
        location = answer.headers.get("location", "")
        return Accepted(
            message_id=location if len(location) <= 256 else "", signals=() if address.confirms else ("unconfirmable",)
        )

    def _write_payload(self, message: Message[PushAddress, PushContent]) -> bytes:
        """Write what the service worker reads: the notification, the token ``t`` and ``b``, below which it calls back."""
        not_shown = _FOR_PUSH_SERVICES if message.content.actions else _NOT_SHOWN
        content = message.content.model_dump_json(exclude_none=True, exclude=not_shown)
        return f'{{"t":"{message.token}",{content[1:-1]},"b":{self._callback}}}'.encode()

    def _find_signer(self, message: Message[PushAddress, PushContent]) -> _Signer | None:
        """The key that the browser subscribed with; where that is not known, the one that browsers are told to subscribe with."""
        own = self._read_app_keys(message.app_keys)
        wanted = message.address.application_server_key
        if wanted is None:
            return self._given or own
        return next((signer for signer in (self._given, own) if signer is not None and signer.public_key == wanted), None)

    def _read_app_keys(self, app_keys: Mapping[str, str]) -> _Signer | None:
        text = app_keys.get(_PRIVATE_KEY)
        if text is None:
            return None
        if text not in self._signers:
            if len(self._signers) >= MAX_SIGNERS:
                self._signers.clear()
            self._signers[text] = _Signer(load_vapid_key(text), self.settings)
        return self._signers[text]

    @classmethod
    def make_app_keys(cls) -> Mapping[str, str]:
        number = ec.generate_private_key(CURVE).private_numbers().private_value
        return {_PRIVATE_KEY: encode_base64url(number.to_bytes(32, "big"))}

    def describe_app_keys(self, app_keys: Mapping[str, str]) -> Mapping[str, str]:
        signer = self._given or self._read_app_keys(app_keys)
        return {} if signer is None else {"application_server_key": signer.public_key}

    def verify(self, request: WebhookRequest) -> None:
        """Take a call with a token: a service worker holds no secret of ours, but nobody can make up a token."""
        if request.method == "OPTIONS":
            return
        if request.method != "POST" or _TOKEN.fullmatch(request.query.get("t", "")) is None:
            raise InvalidSignature

    def parse(self, request: WebhookRequest) -> Webhook:
        # The page that runs the service worker is of another origin than we are (Fetch standard, "CORS protocol").
        answer = WebhookAnswer(headers={"Access-Control-Allow-Origin": "*", "Access-Control-Allow-Methods": "POST"})
        if request.method == "OPTIONS":
            return Webhook(answer=answer)
        if request.path not in ("confirmed", "clicked", "dismissed"):
            raise InvalidWebhook("the path must end in confirmed, clicked or dismissed")
        return Webhook(receipts=(Receipt(signal=request.path, token=request.query["t"]),), answer=answer)


@lru_cache(maxsize=MAX_ORIGINS)
def _limit_service(url: str) -> Sequence[Limit]:
    """The limit of one push service, whose URL has no path: what it asks for, and its outages, are no other one's.

    It is the host, and not the name that the host is below: an outage may be one region's, and a host that a subscriber made up
    holds up nobody but whoever made it up.
    """
    try:
        origin, _ = split_url(url)
    except ValueError:
        return ()  # sending refuses it
    return (Limit(key=origin.authority),)


def encrypt(payload: bytes, keys: PushKeys, *, sender: ec.EllipticCurvePrivateKey, salt: bytes) -> bytes:
    """Encrypt for one browser, as one record (RFC 8291, section 3.4). ``sender`` and ``salt`` must never be used again.

    Done here because it is most of what a message costs: 90 us, of which 80 are the two operations on the curve that RFC 8291,
    section 3.1, wants for every message. And done on the event loop: a thread for it only took turns with the loop, and fewer
    messages left in all.
    """
    receiver_point = urlsafe_b64decode(keys.p256dh + "==")
    sender_point = sender.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    secret = sender.exchange(_ECDH, ec.EllipticCurvePublicKey.from_encoded_point(CURVE, receiver_point))
    info = b"WebPush: info\0" + receiver_point + sender_point
    keying_material = HKDF(_SHA256, 32, urlsafe_b64decode(keys.auth + "=="), info).derive(secret)
    key = HKDF(_SHA256, 16, salt, b"Content-Encoding: aes128gcm\0").derive(keying_material)
    nonce = HKDF(_SHA256, 12, salt, b"Content-Encoding: nonce\0").derive(keying_material)
    header = salt + RECORD_SIZE.to_bytes(4, "big") + bytes((len(sender_point),)) + sender_point
    return header + AESGCM(key).encrypt(nonce, payload + b"\2", None)


_PRIVATE_KEY = "vapid_private_key"
"""The one key of an app."""
_ECDH = ec.ECDH()
_SHA256 = SHA256()
_FOR_PUSH_SERVICES = {"urgency"}
"""Content that is not for the service worker."""
_NOT_SHOWN = {"urgency", "actions"}
"""The same where there are no buttons."""


@hookimpl
def aftertouch_register_channels() -> Sequence[type[Channel]]:
    return (PushChannel,)
