"""SMS through Twilio: status callbacks bring what became of each message, and what people answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Annotated, ClassVar, Literal, Self, cast
from urllib.parse import urlencode

from aftertouch_twilio import ACCOUNT_SID, API_URL, REASONS, SIGNALS, Messages, parse_object, read_form, read_status
from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_extra_types.phone_numbers import PhoneNumberValidator

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
    Limit,
    Message,
    NotTaken,
    Outcome,
    Price,
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
)
from aftertouch.hookspecs import hookimpl
from aftertouch.http import HttpClient, NoAnswer, NotSent

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

_SID = re.compile(r"(SM|MM)[0-9a-fA-F]{32}")

_SIGNALS: Mapping[str, str | None] = {**SIGNALS, "read": "delivered"}
"""A text message has no read receipt; RCS, which a Messaging Service may use, has."""

_WORDS: Mapping[str, str] = {
    **dict.fromkeys(("STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"), "STOP"),
    **dict.fromkeys(("START", "YES", "UNSTOP"), "START"),
    **dict.fromkeys(("HELP", "INFO"), "HELP"),
}
"""The words that Twilio acts on by itself when they are all of a text (Twilio: "Support for opt-out keywords"). An account with
Advanced Opt-Out has words of its own, and Twilio says what they meant."""


class SmsSettings(Settings):
    """The Twilio account, and who its messages come from."""

    by_app = frozenset(
        (
            *("account_sid", "auth_token", "messaging_service_sid", "sender", "validity_period_seconds"),
            *("messages_per_second", "price_per_segment", "currency"),
        )
    )

    account_sid: str = Field(pattern=ACCOUNT_SID)
    auth_token: SecretStr = Field(min_length=1)
    """Also the key of the webhooks' signatures, so an API key cannot take its place."""
    messaging_service_sid: str = Field(default="", pattern=r"^(MG[0-9a-fA-F]{32})?$")
    sender: str = ""
    """A phone number, short code or alphanumeric sender, where there is no Messaging Service."""
    api_url: str = Field(default="https://api.twilio.com", pattern=API_URL)
    validity_period_seconds: int | None = Field(default=None, ge=1, le=36_000)
    """How long a message may wait in Twilio's queue; Twilio's own default is ten hours."""
    messages_per_second: float = Field(default=0, ge=0, le=10_000)
    """Of the whole account; 0 leaves the pace to Twilio, which queues what is more than a sender may send."""
    price_per_segment: Decimal | None = Field(default=None, ge=0)
    """What a segment costs you, for estimates and reports: one price for all countries. What Twilio bills is not read."""
    currency: str = Field(default="USD", pattern=r"^[A-Z]{3}$")
    """Of that price."""
    timeout_seconds: float = Field(default=15, gt=0)
    """For a whole request; the connection may take half of it. Keep it below 20, when a batch is given up and nobody knows what
    became of it."""

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


def _parse_date(written: object) -> datetime | None:
    """A date of Twilio's (RFC 2822); None where it makes no sense."""
    try:
        date = parsedate_to_datetime(str(written))
    except ValueError:
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


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
    reasons: ClassVar[Mapping[str, ReasonClass]] = {
        **REASONS,
        **dict.fromkeys(("payload_too_large", "empty_text"), ReasonClass.CONTENT),
    }

    settings: SmsSettings
    _http: HttpClient

    def __init__(self, settings: SmsSettings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        options = (
            {"MessagingServiceSid": settings.messaging_service_sid}
            if settings.messaging_service_sid
            else {"From": settings.sender}
        )
        if settings.validity_period_seconds is not None:
            options["ValidityPeriod"] = str(settings.validity_period_seconds)
        self._messages = Messages(
            account_sid=settings.account_sid,
            auth_token=settings.auth_token,
            api_url=settings.api_url,
            webhook_url=webhook_url,
            options=options,
        )
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
        price = self._find_price(segments)
        return Estimate(units=segments, unit="segments", cost=price.amount if price else None, currency=self.settings.currency)

    def _find_price(self, segments: int) -> Price | None:
        """What a message costs by the operator's word: Twilio's own is null until hours after the message was taken."""
        each = self.settings.price_per_segment
        return None if each is None else Price(amount=each * segments, currency=self.settings.currency)

    def _price(self, outcome: Outcome, body: str) -> Outcome:
        if isinstance(outcome, Accepted) and self.settings.price_per_segment is not None:
            return replace(outcome, price=self._find_price(count_segments(body)))
        return outcome

    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        mine = cast("Sequence[Message[SmsAddress, SmsContent]]", messages)
        return await asyncio.gather(*(self._send_one(message) for message in mine))

    async def _send_one(self, message: Message[SmsAddress, SmsContent]) -> Outcome:
        body = message.content.body
        if not body.strip():
            return Refused(code="empty_text")
        if len(body) > MAX_BODY:
            return Refused(code="payload_too_large")
        outcome = await self._messages.create(self._http, message.token, {"To": message.address.phone, "Body": body})
        return self._price(outcome, body)

    async def look_up(self, messages: Sequence[Message[Address, Content]], since: datetime) -> Sequence[Finding]:
        mine = cast("Sequence[Message[SmsAddress, SmsContent]]", messages)
        return await asyncio.gather(*(self._look_up_one(message, since - CLOCK_TOLERANCE) for message in mine))

    async def _look_up_one(self, message: Message[SmsAddress, SmsContent], since: datetime) -> Finding:
        """Look through what Twilio was given for this number, as far back as it goes.

        Twilio could leave out what is older than a day, but by the date of sending, which a message that waits in its queue does
        not have yet: the one that must not be missed.
        """
        target = f"{self._messages.target}?{urlencode({'To': message.address.phone, 'PageSize': LISTED_AT_ONCE})}"
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
                        return Accepted(
                            message_id=str(resource.get("sid", "")),
                            price=self._find_price(count_segments(message.content.body)),
                        )
                    # Perhaps this one: Twilio may have replaced characters, and whom we know may be called otherwise by now.
                    has_others = True
            following = page.get("next_page_uri")
            if following is None:
                return Unclear(detail="another message to the number") if has_others else NotTaken()
            target = f"{self._messages.base}{following}"
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
        resource = await self._read(f"{self._messages.target.removesuffix('.json')}/{message_id}.json")
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
            answer = await self._http.get(
                self._messages.origin, target, self._messages.headers, most_bytes=LISTED_AT_ONCE * 16_384
            )
        except (NotSent, NoAnswer, ValueError):
            return {}
        return (parse_object(answer.body) or {}) if answer.status == 200 else {}

    def verify(self, request: WebhookRequest) -> None:
        self._messages.verify(request)

    def parse(self, request: WebhookRequest) -> Webhook:
        form, status = read_form(request)
        return self._parse_inbound(form) if status == "received" else read_status(request, form, status, _SIGNALS)

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
