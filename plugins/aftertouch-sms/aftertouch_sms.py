"""SMS through Twilio: one form posted for each message, status callbacks that bring what became of it, and what people answer.

The token travels in the query of each message's StatusCallback, so a callback settles even a message whose creation was never
answered. Twilio has no idempotency key for messages: a request that may have arrived is never sent again.
"""

from __future__ import annotations

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hmac import compare_digest
from types import TracebackType
from typing import Annotated, ClassVar, Literal, Self, cast
from urllib.parse import parse_qsl, urlencode

from multidict import MultiDict, MultiDictProxy
from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_extra_types.phone_numbers import PhoneNumberValidator
from twilio.request_validator import RequestValidator

from aftertouch.channels import (
    CHECKED_ONCE,
    Accepted,
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    Estimate,
    Finding,
    InvalidSignature,
    InvalidWebhook,
    Limit,
    Message,
    NotTaken,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Reply,
    Settings,
    Signal,
    Standing,
    Unclear,
    Webhook,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.hookspecs import hookimpl
from aftertouch.http import Answer, HttpClient, NoAnswer, NotSent, encode_headers, split_url

MAX_BODY = 1600
"""Characters (Twilio: error 21617)."""

LISTED_AT_ONCE = 100
"""Messages in a page of Twilio's list, 3 kB each at the most; the largest page has 1,000."""
MOST_PAGES = 5
CLOCK_TOLERANCE = timedelta(seconds=10)
"""How far Twilio's clock may be behind ours. It writes whole seconds."""

_GSM_7 = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?"
    "¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
_GSM_7_EXTENSION = frozenset("\f^{}\\[~]|€")
"""Characters that take an escape and so the room of two."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")

_SID = re.compile(r"(SM|MM)[0-9a-fA-F]{32}")

_SIGNALS: Mapping[str, str | None] = {
    "accepted": None,
    "scheduled": None,
    "queued": None,
    "sending": None,
    "sent": "sent",
    "partially_delivered": "sent",
    "delivered": "delivered",
    "read": "delivered",  # RCS only; a text message has no read receipt
    "undelivered": "failed",
    "failed": "failed",
    "canceled": "failed",  # by somebody at Twilio; we schedule nothing there
}
"""Twilio's message statuses, and the signal of each that is news (Twilio: Message resource, "Message status values")."""

_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"), "STOP"),
    **dict.fromkeys(("START", "YES", "UNSTOP"), "START"),
    **dict.fromkeys(("HELP", "INFO"), "HELP"),
}
"""The words that Twilio acts on by itself when they are all of a text (Twilio: "Support for opt-out keywords"). An account with
Advanced Opt-Out has words of its own, and Twilio says what they meant."""

_CODES: Mapping[ReasonClass, Sequence[str]] = {
    ReasonClass.RECIPIENT_GONE: (
        *("21211", "21217", "21401"),  # not a phone number
        *("21614", "21635"),  # not a mobile number
        *("30005", "30006", "30011"),  # unknown handset, a landline, no MMS
        *("63003", "63024", "63033"),  # channel address not valid, or blocked
    ),
    ReasonClass.OPTED_OUT: ("21610", "63014"),
    ReasonClass.CAPPED: ("63032", "63049"),
    ReasonClass.WINDOW: ("63016",),
    ReasonClass.CONTENT: (
        *("payload_too_large", "empty_text", "21602", "21617"),
        "21612",  # this sender cannot reach this number
        *("30004", "30007", "30450"),  # blocked by the recipient or filtered by the carrier
        "30036",  # its validity period is over
    ),
    ReasonClass.CONFIG: (
        *("20003", "20005", "20404", "21408", "21608", "21609", "30002"),  # account, permissions, callback address
        *("21212", "21603", "21606", "21654", "21655", "21656", "21701", "21702", "21703", "21704", "21705"),  # sender, content
        *("30018", "30024", "30032", "30033", "30034", "30035"),  # sender registration
        *("63001", "63002", "63005", "63007", "63008", "63013", "63021", "63026", "63051"),  # channel set-up and policy
        *("63027", "63028", "63030", "63040", "63041", "63042"),  # templates
        *("http_400", "http_401", "http_403", "http_404"),
        *(f"http_{status}" for status in range(300, 400)),  # the API does not redirect: the address is wrong
    ),
    ReasonClass.RATE: (
        *("20429", "14107", "http_429"),
        *("21611", "30001", "30022", "30023", "30027"),  # sender's queue or daily limit
        *("63017", "63018", "63038", "63119"),
    ),
    ReasonClass.TRANSIENT: (
        *("connect_error", "20500", "20503"),
        *("30003", "30008", "30017", "30020", "30021", "30410"),  # handset off, carrier congested or silent
        *("63009", "63010", "63012"),
        *(f"http_{status}" for status in range(500, 600)),
    ),
}
"""Twilio: Error and Warning Dictionary. The codes of its other channels are here because a Messaging Service may use them."""


class SmsSettings(Settings):
    """The Twilio account, and who its messages come from."""

    account_sid: str = Field(pattern=r"^AC[0-9a-fA-F]{32}$")
    auth_token: SecretStr = Field(min_length=1)
    """Also the key of the webhooks' signatures, so an API key cannot take its place."""
    messaging_service_sid: str = Field(default="", pattern=r"^(MG[0-9a-fA-F]{32})?$")
    sender: str = ""
    """A phone number, short code or alphanumeric sender, where there is no Messaging Service."""
    api_url: str = Field(default="https://api.twilio.com", pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?$")
    validity_period_seconds: int | None = Field(default=None, ge=1, le=36_000)
    """How long a message may wait in Twilio's queue; Twilio's own default is ten hours."""
    messages_per_second: float = Field(default=0, ge=0, le=10_000)
    """Of the whole account; 0 leaves the pace to Twilio, which queues what is more than a sender may send."""
    price_per_segment: Decimal | None = Field(default=None, ge=0)
    """What Twilio and the carriers take for a segment, for estimates; it differs from country to country."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Of that price."""
    timeout_seconds: float = Field(default=15, gt=0)
    """For a whole request; the connection may take half of it."""

    @model_validator(mode="after")
    def _check_one_sender(self) -> Self:
        if bool(self.messaging_service_sid) == bool(self.sender):
            raise ValueError("set either messaging_service_sid or sender")
        return self


class SmsAddress(Address):
    """A phone number."""

    phone: Annotated[str, PhoneNumberValidator(number_format="E164"), CHECKED_ONCE] = Field(repr=False)

    @property
    def key(self) -> str:
        return self.phone


class SmsContent(Content):
    """A text."""

    body: str
    """At most 1,600 characters once rendered; carriers bill by segments of 153, or 67 when it is not plain GSM-7."""


def count_segments(body: str) -> int:
    """How many segments a text is billed as (3GPP TS 23.038 and 23.040).

    One character outside of GSM-7 makes the whole text UCS-2. In several segments each gives up room for its place, and no
    character is cut in two. With Twilio's smart encoding a text may come out shorter, never longer.
    """
    if set(body) <= _GSM_7 | _GSM_7_EXTENSION:
        widths = [2 if character in _GSM_7_EXTENSION else 1 for character in body]
        alone, each = 160, 153
    else:
        widths = [2 if ord(character) > 0xFFFF else 1 for character in body]
        alone, each = 70, 67
    if sum(widths) <= alone:
        return 1
    segments, room = 1, each
    for width in widths:
        if width > room:
            segments, room = segments + 1, each
        room -= width
    return segments


def judge_answer(answer: Answer) -> Outcome:
    """Say what an answer of the Messages resource means."""
    created = _parse_object(answer.body)
    if 200 <= answer.status <= 299:
        if created is None:
            return Unclear(detail=f"http_{answer.status} without a JSON object")
        sid = created.get("sid")
        return Accepted(message_id=sid if isinstance(sid, str) else "")
    code = (created or {}).get("code")
    if not isinstance(code, int):
        if answer.status in (502, 504):
            # Only a gateway spoke: what stands behind it may have taken the message before it fell silent.
            return Unclear(detail=f"http_{answer.status}")
        code = f"http_{answer.status}"
    return Refused(code=str(code), retry_after=parse_retry_after(answer.headers.get("retry-after")))


def _parse_object(body: bytes | None) -> dict[str, object] | None:
    try:
        value = json.loads(body or b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parse_date(written: object) -> datetime | None:
    """A date of Twilio's (RFC 2822); None where it makes no sense."""
    try:
        date = parsedate_to_datetime(str(written))
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


@lru_cache(maxsize=1)
def parse_form(body: bytes) -> MultiDictProxy[str]:
    """Read a form as Twilio signs it: in UTF-8, blank values kept. The last is remembered: a request is verified, then parsed.

    Raises:
        ValueError: it is not UTF-8, or has more fields than any of Twilio's requests.
    """
    return MultiDictProxy(MultiDict(parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)))


class SmsChannel(Channel):
    """Texts to phones."""

    name = "sms"
    label = "SMS"
    address_model = SmsAddress
    content_model = SmsContent
    settings_model = SmsSettings
    capabilities = Capabilities(look_up=True, fetch_receipts=True, tracked_links=("body",))
    signals = (
        Signal(name="delivered", label="Delivered", implies=("sent",)),
        Signal(name="replied", label="Replied", implies=("sent",)),
        Signal(name="clicked", label="Clicked a link", implies=("delivered",)),
        # A carrier's filter may look at a link before anybody gets the message.
        Signal(name="scanned", label="A machine followed a link", implies=("sent",)),
    )
    actions = (
        Action(name="delivered", label="Delivered", short_name="delivered", expression="delivered"),
        Action(
            name="not_delivered",
            label="Not delivered",
            short_name="not delivered",
            expression="failed & ~delivered",
            apart="sent & ~delivered & ~failed",
            apart_label="Still waiting for the carrier",
        ),
        Action(name="sent", label="Sent", short_name="sent", expression="attempted"),
        Action(name="replied", label="Replied", short_name="replied", expression="replied"),
        Action(name="not_replied", label="Didn't reply", short_name="not replied", expression="delivered & ~replied"),
        Action(name="clicked", label="Clicked a link", short_name="clicked", expression="clicked"),
        Action(name="not_clicked", label="Did not click a link", short_name="not clicked", expression="delivered & ~clicked"),
    )
    reasons: ClassVar[Mapping[str, ReasonClass]] = {code: reason for reason, codes in _CODES.items() for code in codes}

    settings: SmsSettings
    _http: HttpClient

    def __init__(self, settings: SmsSettings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        self._validator = RequestValidator(settings.auth_token.get_secret_value())
        self._origin, base = split_url(settings.api_url)
        self._base = base.rstrip("/")
        self._target = f"{self._base}/2010-04-01/Accounts/{settings.account_sid}/Messages.json"
        credentials = b64encode(f"{settings.account_sid}:{settings.auth_token.get_secret_value()}".encode()).decode()
        self._headers = encode_headers({"Authorization": f"Basic {credentials}", "Accept": "application/json"})
        self._form_headers = self._headers + encode_headers({"Content-Type": "application/x-www-form-urlencoded"})
        self._options = (
            {"MessagingServiceSid": settings.messaging_service_sid}
            if settings.messaging_service_sid
            else {"From": settings.sender}
        )
        if settings.validity_period_seconds is not None:
            self._options["ValidityPeriod"] = str(settings.validity_period_seconds)
        pace = settings.messages_per_second
        self._limits = (Limit(key="account", interval=timedelta(seconds=1 / pace if pace else 0)),)

    async def __aenter__(self) -> Self:
        self._http = HttpClient(timeout=self.settings.timeout_seconds)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.close()

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return self._limits

    def estimate(self, content: Content) -> Estimate | None:
        segments = count_segments(cast("SmsContent", content).body)
        price = self.settings.price_per_segment
        cost = None if price is None else price * segments
        return Estimate(units=segments, unit="segments", cost=cost, currency=self.settings.currency)

    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        mine = cast("Sequence[Message[SmsAddress, SmsContent]]", messages)
        return await asyncio.gather(*(self._send_one(message) for message in mine))

    async def _send_one(self, message: Message[SmsAddress, SmsContent]) -> Outcome:
        body = message.content.body
        if not body.strip():
            return Refused(code="empty_text")
        if len(body) > MAX_BODY:
            return Refused(code="payload_too_large")
        form = {
            "To": message.address.phone,
            "Body": body,
            # By default Twilio calls back once more at most, and only when it could not connect. The fragment asks for five
            # more attempts after any failure (Twilio: Webhooks, "Connection overrides"); it is not part of the request.
            "StatusCallback": f"{self.webhook_url}?t={message.token}#rc=5&rp=all",
            **self._options,
        }
        try:
            answer = await self._http.post(self._origin, self._target, self._form_headers, urlencode(form).encode())
        except NotSent:
            return Refused(code="connect_error")
        except NoAnswer as error:
            return Unclear(detail=str(error))
        return judge_answer(answer)

    async def look_up(self, messages: Sequence[Message[Address, Content]], since: datetime) -> Sequence[Finding]:
        mine = cast("Sequence[Message[SmsAddress, SmsContent]]", messages)
        return await asyncio.gather(*(self._look_up_one(message, since - CLOCK_TOLERANCE) for message in mine))

    async def _look_up_one(self, message: Message[SmsAddress, SmsContent], since: datetime) -> Finding:
        """Look through what Twilio was given for this number, as far back as it goes.

        Twilio could leave out what is older than a day, but by the date of sending, which a message that waits in its queue does
        not have yet: the one that must not be missed.
        """
        target = f"{self._target}?{urlencode({'To': message.address.phone, 'PageSize': LISTED_AT_ONCE})}"
        has_others = False
        for _ in range(MOST_PAGES):
            page = await self._read(target)
            listed = page.get("messages")
            if not isinstance(listed, list) or not all(isinstance(item, dict) for item in listed):
                return Unclear(detail="the list of messages cannot be read")
            for resource in listed:
                date = _parse_date(resource.get("date_created"))
                if self._is_ours(resource) and (date is None or date >= since):
                    if resource.get("body") == message.content.body:
                        return Accepted(message_id=str(resource.get("sid", "")))
                    # Perhaps this one: Twilio may have replaced characters, and whom we know may be called otherwise by now.
                    has_others = True
            following = page.get("next_page_uri")
            if following is None:
                return Unclear(detail="another message to the number") if has_others else NotTaken()
            target = f"{self._base}{following}"
        return Unclear(detail="too many messages to the number")

    def _is_ours(self, resource: Mapping[str, object]) -> bool:
        """True unless it was written by the person, or sent for something else of the account."""
        if self.settings.messaging_service_sid:
            is_ours = resource.get("messaging_service_sid") == self.settings.messaging_service_sid
        else:
            is_ours = resource.get("from") == self.settings.sender
        return is_ours and resource.get("direction") != "inbound"

    async def fetch_receipts(self, message_ids: Sequence[str]) -> Sequence[Receipt]:
        found = await asyncio.gather(*(self._fetch_receipt(message_id) for message_id in message_ids))
        return [receipt for receipt in found if receipt is not None]

    async def _fetch_receipt(self, message_id: str) -> Receipt | None:
        if _SID.fullmatch(message_id) is None:
            return None
        resource = await self._read(f"{self._target.removesuffix('.json')}/{message_id}.json")
        signal = _SIGNALS.get(str(resource.get("status", "")))
        if signal in (None, "sent"):
            return None
        code = resource.get("error_code") if signal == "failed" else None
        return Receipt(
            signal=str(signal),
            message_id=message_id,
            time=_parse_date(resource.get("date_updated")),
            code=None if code is None else str(code),
        )

    async def _read(self, target: str) -> dict[str, object]:
        """What is at an address of the API; nothing where that cannot be known."""
        try:
            answer = await self._http.get(self._origin, target, self._headers, most_bytes=LISTED_AT_ONCE * 16_384)
        except (NotSent, NoAnswer, ValueError):
            return {}
        return (_parse_object(answer.body) or {}) if answer.status == 200 else {}

    def verify(self, request: WebhookRequest) -> None:
        """Check Twilio's signature over the address and the form (Twilio: "Validating requests").

        The algorithm is HMAC-SHA1 with the account's token, whatever a header asks for.
        """
        try:
            form = parse_form(request.body)
        except ValueError as error:
            raise InvalidSignature from error
        signature = request.headers.get("x-twilio-signature", "")
        if request.method != "POST":
            raise InvalidSignature
        # The validator computes two signatures, with the port and without; nearly always the address as it is will do.
        expected = self._validator.compute_signature(request.url, form)
        if not compare_digest(expected.encode(), signature.encode()) and not self._validator.validate(
            request.url, form, signature
        ):
            raise InvalidSignature

    def parse(self, request: WebhookRequest) -> Webhook:
        try:
            form = parse_form(request.body)
        except ValueError as error:
            raise InvalidWebhook("the body is not a form") from error
        status: str = form.get("MessageStatus", form.get("SmsStatus", ""))
        if status == "received":
            return self._parse_inbound(form)
        message_id = form.get("MessageSid") or None
        token = request.query.get("t", "")
        if status not in _SIGNALS or (message_id is None and _TOKEN.fullmatch(token) is None):
            return Webhook(unrecognized=(f"MessageStatus={status[:64]} MessageSid={(message_id or '')[:64]}",))
        signal = _SIGNALS[status]
        if signal is None:
            return Webhook()
        receipt = Receipt(
            signal=signal,
            token=token if _TOKEN.fullmatch(token) else None,
            message_id=message_id,
            code=form.get("ErrorCode") or None if signal == "failed" else None,
        )
        return Webhook(receipts=(receipt,))

    def _parse_inbound(self, form: Mapping[str, str]) -> Webhook:
        """Read what a person wrote. Twilio stops and starts sending to them by itself, and answers, so nothing is left to do."""
        known, name = (
            (self.settings.messaging_service_sid, "MessagingServiceSid")
            if self.settings.messaging_service_sid
            else (self.settings.sender, "To")
        )
        if form.get(name, "") != known:
            # The stop of another sender's readers is none of ours.
            return Webhook(unrecognized=(f"SmsStatus=received for another sender MessageSid={form.get('MessageSid', '')[:64]}",))
        try:
            address = SmsAddress(phone=form.get("From", ""))
        except ValidationError:
            return Webhook(unrecognized=(f"SmsStatus=received from no number MessageSid={form.get('MessageSid', '')[:64]}",))
        word = form.get("Body", "").strip().upper()
        meaning = form.get("OptOutType") or _WORDS.get(word, "")
        states: Mapping[str, Literal["opted_out", "active"]] = {"STOP": "opted_out", "START": "active"}
        standings = (Standing(address=address, state=states[meaning], reason=meaning),) if meaning in states else ()
        # Somebody who says yes may have been asked something else.
        is_reply = not meaning or word == "YES"
        return Webhook(standings=standings, replies=(Reply(address=address),) if is_reply else ())


@hookimpl
def aftertouch_register_channels() -> Sequence[type[Channel]]:
    return (SmsChannel,)
