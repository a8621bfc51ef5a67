"""Twilio's Programmable Messaging, for SMS and WhatsApp: sending, fetching, templates, and signed status callbacks.

As strict as the real one about forms, fields and credentials; error codes and shapes are Twilio's
(https://www.twilio.com/docs/api/errors), the signature is https://www.twilio.com/docs/usage/security.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import json
import re
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from email.utils import format_datetime
from math import ceil
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urldefrag, urlencode, urlsplit
from uuid import uuid4

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .draws import draw_numbers
from .faults import Fault, Faults
from .population import Population
from .settings import SandboxSettings, list_parameters
from .truth import Decision, Entry, Truth
from .webhooks import CONNECT_FAILED, READ_FAILED, Outbox, Request, Stream

WHATSAPP = "whatsapp:"
"""What stands before a number that is one on WhatsApp."""

_E164 = re.compile(r"\+[1-9][0-9]{6,14}")
_CONTENT_SID = re.compile(r"HX[0-9a-fA-F]{32}")
_HOST = re.compile(r"[a-z0-9.:-]+")
_LONGEST_BODY = 1600
_LONGEST_VALIDITY = 36_000
_LARGEST_PAGE = 1000

# Twilio's numbers for tests: https://www.twilio.com/docs/iam/test-credentials
_MAGIC_RECIPIENTS = {
    "+15005550001": 21211,
    "+15005550002": 21612,
    "+15005550003": 21408,
    "+15005550004": 21610,
    "+15005550009": 21614,
}
_MAGIC_SENDERS = {"+15005550001": 21212, "+15005550007": 21606, "+15005550008": 21611}

_MESSAGES = {
    20001: "Invalid parameter",
    20003: "Authenticate",
    20404: "The requested resource was not found",
    20415: "Unsupported media type: only application/x-www-form-urlencoded is accepted",
    20429: "Too Many Requests",
    20500: "An internal server error has occurred",
    20503: "Service unavailable",
    21211: "The 'To' number is not a valid phone number",
    21212: "The 'From' number is not a valid phone number, shortcode, or alphanumeric sender ID",
    21408: "Permission to send an SMS has not been enabled for the region indicated by the 'To' number",
    21602: "A message body, media or content is required to send a message",
    21603: "A 'From' phone number or a 'MessagingServiceSid' is required to send a message",
    21604: "A 'To' phone number is required to send a message",
    21606: "The 'From' phone number is not a valid, SMS-capable phone number for this account",
    21609: "The 'StatusCallback' URL is not a valid URL",
    21610: "Attempt to send to unsubscribed recipient",
    21611: "The 'From' number has exceeded the maximum number of queued messages",
    21612: "Message cannot be sent with the current combination of 'To' and 'From' parameters",
    21614: "The 'To' number is not a valid mobile number",
    21617: f"The concatenated message body exceeds the {_LONGEST_BODY} character limit",
    21655: "The 'ContentSid' is invalid",
    21656: "The 'ContentVariables' parameter is invalid",
    21701: "The messaging service was not found",
    21910: "Invalid 'From' and 'To' pair. 'From' and 'To' should be of the same channel",
    30003: "Unreachable destination handset",
    63007: "Twilio could not find a Channel with the specified From address",
    63014: "The message failed to send because it was blocked by a user action",
    63016: "Failed to send freeform message because you are outside the allowed window. Please use a Message Template.",
    63024: "Invalid message recipient",
    63049: "Meta chose not to deliver this marketing message",
}
_STATUSES = {20003: 401, 20404: 404, 20415: 415, 20429: 429, 20500: 500, 20503: 503, 21408: 403, 21611: 429, 21701: 404}
_FAULT_CODES = {"429": 20429, "429_retry_after": 20429, "500": 20500, "503": 20503, "expired_token": 20003}

_RANKS = {"accepted": 0, "queued": 1, "sent": 2, "failed": 3, "undelivered": 3, "delivered": 4, "read": 5}

_CHANNEL_INSTALL = "XE5a4db0c05a4db0c05a4db0c05a4db0c0"

_GSM_7 = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?¡ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿"
    "abcdefghijklmnopqrstuvwxyzäöñüà"
)
_GSM_7_EXTENDED = frozenset("^{}\\[~]|€")


class _Refused(Exception):
    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True, eq=False)
class _Text:
    """A message resource."""

    sid: str
    fields: Mapping[str, str]
    entry: Entry
    created: datetime
    status: str
    error_code: int | None = None

    @property
    def is_sent(self) -> bool:
        """True from when it has a date on which it was sent."""
        return self.status in ("sent", "delivered", "undelivered", "read")

    @property
    def is_whatsapp(self) -> bool:
        """True of a message to somebody on WhatsApp."""
        return self.fields["To"].startswith(WHATSAPP)

    def find_sender(self, settings: SandboxSettings) -> str:
        """Who it is from; a Messaging Service chooses."""
        chosen = f"{WHATSAPP}{settings.whatsapp_sender}" if self.is_whatsapp else settings.sender
        return self.fields.get("From", chosen)


@dataclass(frozen=True, slots=True)
class _Report:
    text: _Text
    status: str
    error_code: int | None = None


class _Callbacks(Stream[_Report]):
    name = "twilio"

    def compose(self, items: Sequence[_Report]) -> Request | None:
        (report,) = items
        text = report.text
        if _RANKS[report.status] > _RANKS[text.status]:
            text.status, text.error_code = report.status, report.error_code
        if "StatusCallback" not in text.fields:
            return None
        url, _ = urldefrag(text.fields["StatusCallback"])
        parameters = {
            "ApiVersion": "2010-04-01",
            "SmsSid": text.sid,
            "SmsStatus": report.status,
            "MessageStatus": report.status,
            "To": text.fields["To"],
            "From": text.find_sender(self.settings),
            "MessageSid": text.sid,
            "AccountSid": self.settings.account_sid,
        }
        if "MessagingServiceSid" in text.fields:
            parameters["MessagingServiceSid"] = text.fields["MessagingServiceSid"]
        if report.error_code is not None:
            parameters["ErrorCode"] = str(report.error_code)
        if text.is_whatsapp:
            parameters |= {"ChannelInstallSid": _CHANNEL_INSTALL, "ChannelPrefix": "whatsapp"}
            if report.status == "read":
                parameters["EventType"] = "READ"
            if report.error_code is not None:
                parameters["ChannelStatusMessage"] = "refused"
        elif report.status in ("delivered", "undelivered"):
            parameters["RawDlrDoneDate"] = f"{datetime.now(UTC):%y%m%d%H%M}"
        # Plus signs of phone numbers are all there is to escape, and urlencode is a quarter of a callback's cost.
        form = "&".join(f"{name}={value}" for name, value in parameters.items()).replace("+", "%2B")
        return _sign_request(self.settings, url, parameters, form)

    def acknowledge(self, items: Sequence[_Report]) -> None:
        for report in items:
            if decision := report.text.entry.signals.get(_name_signal(report.status)):
                decision.acknowledged = True

    def pick_backoff(self, attempts: int, elapsed: float, failure: str, item: _Report) -> float | None:
        asked = RetryRule.read(item.text.fields["StatusCallback"])
        if asked.wants_retry(attempts, elapsed, failure):
            return 0.1 * attempts
        return None if self.settings.strict_retries else super().pick_backoff(attempts, elapsed, failure, item)


@dataclass(frozen=True, slots=True)
class _Inbound:
    """What a person writes after a text."""

    text: _Text
    body: str
    button: str | None = None
    """The payload of the button that they pressed instead."""


class _Inbox(Stream[_Inbound]):
    """The webhook of the number or Messaging Service. The real one is set in Twilio's console; this one is where the texts that
    the person got report to."""

    name = "twilio inbound"

    def compose(self, items: Sequence[_Inbound]) -> Request | None:
        (inbound,) = items
        fields = inbound.text.fields
        if "StatusCallback" not in fields:
            return None
        url = urldefrag(fields["StatusCallback"]).url.partition("?")[0]
        sid = f"SM{uuid4().hex}"
        parameters = {
            "ToCountry": "US",
            "SmsMessageSid": sid,
            "NumMedia": "0",
            "SmsSid": sid,
            "SmsStatus": "received",
            "Body": inbound.body,
            "To": inbound.text.find_sender(self.settings),
            "NumSegments": str(count_segments(inbound.body)),
            "MessageSid": sid,
            "AccountSid": self.settings.account_sid,
            "From": fields["To"],
            "ApiVersion": "2010-04-01",
        }
        if "MessagingServiceSid" in fields:
            parameters["MessagingServiceSid"] = fields["MessagingServiceSid"]
        if inbound.text.is_whatsapp:
            del parameters["ToCountry"]
            person = inbound.text.entry.person
            digits = fields["To"].removeprefix(f"{WHATSAPP}+")
            parameters |= {"ProfileName": (person.first_name if person else "") or digits, "WaId": digits, "MessageType": "text"}
            if inbound.button is not None:
                parameters |= {
                    "MessageType": "button",
                    "ButtonText": inbound.body,
                    "ButtonPayload": inbound.button,
                    "OriginalRepliedMessageSid": inbound.text.sid,
                    "OriginalRepliedMessageSender": parameters["To"],
                }
        return _sign_request(self.settings, url, parameters, urlencode(parameters))

    def acknowledge(self, items: Sequence[_Inbound]) -> None:
        for inbound in items:
            if decision := inbound.text.entry.signals.get("replied"):
                decision.acknowledged = True


def _sign_request(settings: SandboxSettings, url: str, parameters: Mapping[str, str], form: str) -> Request:
    headers = {
        "Content-Type": "application/x-www-form-urlencoded; charset=UTF-8",
        "X-Twilio-Signature": sign_callback(settings.auth_token, url, parameters),
        "I-Twilio-Idempotency-Token": str(uuid4()),
        "User-Agent": "TwilioProxy/1.1",
    }
    return Request(url, form.encode(), headers)


@dataclass(frozen=True)
class RetryRule:
    """What the fragment of a callback URL asks for (https://www.twilio.com/docs/usage/webhooks/webhooks-connection-overrides)."""

    retries: int = 1
    policies: frozenset[str] = frozenset({CONNECT_FAILED})
    seconds: float = 15.0

    @classmethod
    def read(cls, url: str) -> RetryRule:
        """Read ``#rc=5&rp=all&tt=15000``; what is missing or out of range has Twilio's default."""
        given = dict(parse_qsl(urlsplit(url).fragment))
        retries, milliseconds = given.get("rc", ""), given.get("tt", "")
        policies = frozenset(given.get("rp", "").split(","))
        return cls(
            retries=int(retries) if retries in {"0", "1", "2", "3", "4", "5"} else cls.retries,
            policies=policies if policies <= {"ct", "rt", "4xx", "5xx", "all"} else cls.policies,
            seconds=int(milliseconds) / 1000 if milliseconds.isdecimal() and int(milliseconds) <= 15_000 else cls.seconds,
        )

    def wants_retry(self, attempts: int, elapsed: float, failure: str) -> bool:
        """Whether one more attempt is asked for after this failure."""
        kind = failure if failure in (CONNECT_FAILED, READ_FAILED) else f"{failure[0]}xx"
        return attempts <= self.retries and elapsed < self.seconds and bool(self.policies & {kind, "all"})


def sign_callback(auth_token: str, url: str, parameters: Mapping[str, str]) -> str:
    """The value of X-Twilio-Signature."""
    text = url + "".join(name + parameters[name] for name in sorted(parameters))
    return b64encode(hmac.digest(auth_token.encode(), text.encode(), "sha1")).decode()


class Twilio:
    """One account."""

    def __init__(
        self,
        settings: SandboxSettings,
        population: Population,
        truth: Truth,
        faults: Faults,
        outbox: Outbox,
        *,
        account: str = "{account}",
    ) -> None:
        """``account`` is what its path begins with; by default that is all that no other account takes."""
        self._settings = settings
        self._population = population
        self._truth = truth
        self._faults = faults
        self._outbox = outbox
        self._callbacks = _Callbacks(settings)
        self._inbox = _Inbox(settings)
        self._stopped: set[str] = set()
        self._texts: dict[str, _Text] = {}
        self._contents = {name_content(name): name for name in settings.templates}
        self._texts_to: defaultdict[str, list[_Text]] = defaultdict(list)
        self.routes = [
            Route(f"/2010-04-01/Accounts/{account}/Messages.json", self._create, methods=["POST"]),
            Route(f"/2010-04-01/Accounts/{account}/Messages.json", self._list, methods=["GET"]),
            Route(f"/2010-04-01/Accounts/{account}/Messages/{{sid}}.json", self._fetch, methods=["GET"]),
            Route("/v1/ContentAndApprovals", self._list_contents, methods=["GET"]),
        ]

    def clear(self) -> None:
        """Forget all messages."""
        self._texts.clear()
        self._texts_to.clear()
        self._stopped.clear()

    def receive(self, address: str, body: str) -> bool:
        """Let a person write, to whoever wrote to them last; False when nobody did.

        Twilio acts on STOP and START of texts only: on WhatsApp it leaves them to its customer.
        """
        if address not in self._texts_to:
            return False
        word = "" if address.startswith(WHATSAPP) else body.strip().upper()
        if word == "STOP":
            self._stopped.add(address)
        elif word == "START":
            self._stopped.discard(address)
        self._outbox.schedule(self._inbox, _Inbound(self._texts_to[address][-1], body), 0.0, 0.1)
        return True

    async def _create(self, request: HttpRequest) -> Response:
        body = await request.body()
        # The form is read where the provider would; which of its channels has trouble shows in it.
        fault = self._faults.strike("whatsapp" if b"To=whatsapp%3A" in body else "sms")
        if fault and not fault.taken:
            return self._answer_fault(fault)
        try:
            self._authenticate(request)
            text = self._take(_read_form(request, body))
        except _Refused as refused:
            return _answer_error(refused.code)
        return self._answer_fault(fault) if fault else JSONResponse(self._describe(text), 201)

    async def _fetch(self, request: HttpRequest) -> Response:
        try:
            self._authenticate(request)
        except _Refused as refused:
            return _answer_error(refused.code)
        text = self._texts.get(request.path_params["sid"])
        return JSONResponse(self._describe(text)) if text else _answer_error(20404)

    async def _list_contents(self, request: HttpRequest) -> Response:
        """The account's templates and what WhatsApp said of them (https://www.twilio.com/docs/content/content-api-resources)."""
        query = request.query_params
        try:
            self._check_credentials(request)
            size = _read_number(query.get("PageSize", "50"), 1, _LARGEST_PAGE)
            page = _read_number(query.get("Page", "0"), 0, 10**6)
        except _Refused as refused:
            return _answer_error(refused.code)
        start = page * size
        address = f"https://content.twilio.com{request.url.path}?PageSize={size}"
        names = list(self._settings.templates)
        return JSONResponse(
            {
                "contents": [self._describe_content(name) for name in names[start : start + size]],
                "meta": {
                    "page": page,
                    "page_size": size,
                    "first_page_url": f"{address}&Page=0",
                    "previous_page_url": f"{address}&Page={page - 1}" if page else None,
                    "next_page_url": f"{address}&Page={page + 1}" if start + size < len(names) else None,
                    "url": f"{address}&Page={page}",
                    "key": "contents",
                },
            }
        )

    def _describe_content(self, name: str) -> dict[str, Any]:
        text = self._settings.templates[name]
        return {
            "date_created": "2026-01-01T09:00:00Z",
            "date_updated": "2026-01-01T09:00:00Z",
            "sid": name_content(name),
            "account_sid": self._settings.account_sid,
            "friendly_name": name,
            "language": "en_US",
            "variables": dict.fromkeys(list_parameters(text), "example"),
            "types": {"twilio/text": {"body": text}},
            "approval_requests": {
                "name": name,
                "category": "MARKETING",
                "content_type": "twilio/text",
                "status": self._settings.template_statuses.get(name, "approved").lower(),
                "rejection_reason": "",
                "allow_category_change": True,
            },
        }

    async def _list(self, request: HttpRequest) -> Response:
        """The messages of the account that match, the newest first, a page at a time."""
        query = request.query_params
        try:
            self._authenticate(request)
            texts = self._find_texts(query)
            size = _read_number(query.get("PageSize", "50"), 1, _LARGEST_PAGE)
            page = _read_number(query.get("Page", "0"), 0, 10**6)
        except _Refused as refused:
            return _answer_error(refused.code)
        path, token = request.url.path, query.get("PageToken", "").removeprefix("PA")
        # From a message on, not from a count on: what is sent meanwhile moves nothing.
        start = next((at + 1 for at, text in enumerate(texts) if text.sid == token), 0)
        shown = texts[start : start + size]
        following = None
        if start + size < len(texts):
            given = [(name, value) for name, value in query.multi_items() if name not in ("Page", "PageSize", "PageToken")]
            paging = [("PageSize", str(size)), ("Page", str(page + 1)), ("PageToken", f"PA{shown[-1].sid}")]
            following = f"{path}?{urlencode(given + paging)}"
        return JSONResponse(
            {
                "messages": [self._describe(text) for text in shown],
                "first_page_uri": f"{path}?PageSize={size}&Page=0",
                "next_page_uri": following,
                "previous_page_uri": None,
                "uri": f"{path}?{request.url.query}",
                "page": page,
                "page_size": size,
                "start": page * size,
                "end": page * size + max(len(shown) - 1, 0),
            }
        )

    def _find_texts(self, query: Mapping[str, str]) -> list[_Text]:
        found: Iterable[_Text] = self._texts_to[query["To"]] if "To" in query else self._texts.values()
        if "From" in query:
            found = [text for text in found if text.find_sender(self._settings) == query["From"]]
        for name in ("DateSent", "DateSent<", "DateSent>"):
            if name in query:
                # A message that has no date yet matches none.
                found = [text for text in found if text.is_sent and _matches_date(name, text.created, query[name])]
        return list(found)[::-1]

    def _answer_fault(self, fault: Fault) -> Response:
        code = _FAULT_CODES.get(fault.mode or "")
        return self._faults.keep_silent(fault) if code is None else _answer_error(code, fault.retry_headers)

    def _authenticate(self, request: HttpRequest) -> None:
        self._check_credentials(request)
        if request.path_params.get("account", self._settings.account_sid) != self._settings.account_sid:
            raise _Refused(20404)

    def _check_credentials(self, request: HttpRequest) -> None:
        scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
        try:
            given = b64decode(encoded, validate=True)
        except binascii.Error:
            raise _Refused(20003) from None
        known = f"{self._settings.account_sid}:{self._settings.auth_token}".encode()
        if scheme.lower() != "basic" or not hmac.compare_digest(given, known):
            raise _Refused(20003)

    def _take(self, fields: Mapping[str, str]) -> _Text:
        _check_recipient(fields)
        self._check_sender(fields)
        _check_content(fields)
        sid = fields.get("ContentSid")
        if sid and (not _CONTENT_SID.fullmatch(sid) or (self._contents and sid not in self._contents)):
            raise _Refused(21655)
        _check_options(fields)
        return self._take_whatsapp(fields) if fields["To"].startswith(WHATSAPP) else self._take_text(fields)

    def _take_text(self, fields: Mapping[str, str]) -> _Text:
        address = fields["To"]
        person = self._population.find_phone(address)
        token = _read_token(fields)
        content = fields.get("Body") or {name: fields[name] for name in ("ContentSid", "ContentVariables") if name in fields}
        title = fields.get("Body") or fields.get("ContentSid", "")
        shares = self._settings.shares
        trait = draw_numbers(self._settings.seed, "sms", address)[0]
        if address in self._stopped or trait < shares.sms_opted_out + shares.sms_gone:
            code = 21610 if address in self._stopped or trait < shares.sms_opted_out else 21211
            entry = self._truth.record("sms", address, person, token=token, title=title, content=content, refused=str(code))
            entry.signals["failed"] = Decision(str(code))
            raise _Refused(code)

        sid = f"SM{uuid4().hex}"
        entry = self._truth.record("sms", address, person, token=token, message_id=sid, title=title, content=content)
        text = self._keep(sid, fields, entry)
        number = self._truth.count_earlier("sms", address, token)
        chance, answer = draw_numbers(self._settings.seed, "sms", address, number)[:2]
        self._report(text, "sent", 0.05, 0.6)
        if chance < shares.sms_unreachable:
            self._report(text, "undelivered", 0.2, 1.2, 30003)
        elif chance >= shares.sms_unreachable + shares.sms_no_report:
            self._report(text, "delivered", 0.1, 1.2)
            if answer < shares.sms_replied:
                entry.signals["replied"] = Decision()
                self._outbox.schedule(self._inbox, _Inbound(text, "Tell me more"), 0.3, 1.8)
        return text

    def _take_whatsapp(self, fields: Mapping[str, str]) -> _Text:
        """Take a message to somebody on WhatsApp; whatever Meta says of it comes later, in a callback."""
        address = fields["To"].removeprefix(WHATSAPP)
        person, token = self._population.find_phone(address), _read_token(fields)
        content = {name: fields[name] for name in ("ContentSid", "ContentVariables", "Body") if name in fields}
        content_sid = fields.get("ContentSid")
        title = self._contents.get(content_sid, content_sid) if content_sid else fields["Body"]
        sid = f"{'MM' if 'ContentSid' in fields else 'SM'}{uuid4().hex}"
        entry = self._truth.record("whatsapp", address, person, token=token, message_id=sid, title=title, content=content)
        text = self._keep(sid, fields, entry)
        shares = self._settings.shares
        trait = draw_numbers(self._settings.seed, "whatsapp", address)[0]
        number = self._truth.count_earlier("whatsapp", address, token)
        fate, read, order, _, answer = draw_numbers(self._settings.seed, "whatsapp", address, number)[:5]
        if "ContentSid" not in fields:
            # Free-form text needs an inbound message within 24 hours, and nobody writes to a sandbox first.
            code: int | None = 63016
        elif trait < shares.whatsapp_gone or (person is not None and "whatsapp" not in person.channels):
            code = 63024
        elif trait < shares.whatsapp_gone + shares.whatsapp_opted_out:
            code = 63014
        elif fate < shares.whatsapp_capped or address.startswith("+1"):
            # Meta has not delivered marketing templates to +1 numbers since 2025-04-01.
            code = 63049
        else:
            code = None
        if code is not None:
            self._report(text, "failed" if code == 63016 else "undelivered", 0.05, 0.8, code)
            return text
        self._report(text, "sent", 0.0, 0.5)
        if fate < shares.whatsapp_capped + shares.whatsapp_switched_off:
            return text
        is_read = read < shares.whatsapp_read
        if not is_read or order >= shares.whatsapp_read_only:
            self._report(text, "delivered", 0.1, 1.0)
        if is_read:
            self._report(text, "read", 0.3, 1.8)
            if answer < shares.whatsapp_replied:
                entry.signals["replied"] = Decision()
                self._outbox.schedule(self._inbox, _Inbound(text, "Tell me more", button="more"), 0.4, 1.8)
        return text

    def _keep(self, sid: str, fields: Mapping[str, str], entry: Entry) -> _Text:
        has_service = "MessagingServiceSid" in fields
        text = _Text(sid, fields, entry, datetime.now(UTC), "accepted" if has_service else "queued")
        self._texts[sid] = text
        self._texts_to[fields["To"]].append(text)
        if has_service:
            # The first status is never called back, and that is "queued" only without a Messaging Service.
            self._report(text, "queued", 0.0, 0.1)
        return text

    def _check_sender(self, fields: Mapping[str, str]) -> None:
        service, sender = fields.get("MessagingServiceSid"), fields.get("From")
        if not service and not sender:
            raise _Refused(21603)
        if service and service != self._settings.messaging_service_sid:
            raise _Refused(21701)
        if sender and sender.startswith(WHATSAPP) != fields["To"].startswith(WHATSAPP):
            raise _Refused(21910)
        if sender and sender.startswith(WHATSAPP):
            if sender != f"{WHATSAPP}{self._settings.whatsapp_sender}":
                raise _Refused(63007)
            return
        if sender and sender in _MAGIC_SENDERS:
            raise _Refused(_MAGIC_SENDERS[sender])
        if sender and sender != self._settings.sender:
            raise _Refused(21606 if _E164.fullmatch(sender) else 21212)

    def _report(self, text: _Text, status: str, earliest: float, latest: float, error_code: int | None = None) -> None:
        if status != "queued":
            code = None if error_code is None else str(error_code)
            text.entry.signals.setdefault(_name_signal(status), Decision(code))
        self._outbox.schedule(self._callbacks, _Report(text, status, error_code), earliest, latest)

    def _describe(self, text: _Text) -> dict[str, Any]:
        fields, written = text.fields, format_datetime(text.created)
        uri = f"/2010-04-01/Accounts/{self._settings.account_sid}/Messages/{text.sid}"
        has_sender = "From" in fields or text.status != "accepted"
        body = fields.get("Body", "")
        return {
            "account_sid": self._settings.account_sid,
            "api_version": "2010-04-01",
            "body": body,
            "date_created": written,
            "date_sent": written if text.is_sent else None,
            "date_updated": written,
            "direction": "outbound-api",
            "error_code": text.error_code,
            "error_message": None if text.error_code is None else _MESSAGES[text.error_code],
            "from": text.find_sender(self._settings) if has_sender else None,
            "messaging_service_sid": fields.get("MessagingServiceSid"),
            "num_media": "0",
            "num_segments": str(count_segments(body)) if has_sender else "0",
            "price": None,
            "price_unit": "USD",
            "sid": text.sid,
            "status": text.status,
            "subresource_uris": {"media": f"{uri}/Media.json"},
            "to": fields["To"],
            "uri": f"{uri}.json",
        }


def _read_number(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise _Refused(20001)
    return int(text)


def _matches_date(name: str, sent: datetime, given: str) -> bool:
    """``DateSent>=2026-11-22`` is the parameter ``DateSent>``: on that day in GMT, or after it."""
    try:
        day = date.fromisoformat(given[:10])
    except ValueError:
        raise _Refused(20001) from None
    match name:
        case "DateSent<":
            return sent.date() <= day
        case "DateSent>":
            return sent.date() >= day
        case _:
            return sent.date() == day


def name_content(name: str) -> str:
    """The ContentSid of a template."""
    return f"HX{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"


def _read_token(fields: Mapping[str, str]) -> str:
    return parse_qs(urlsplit(fields.get("StatusCallback", "")).query).get("t", [""])[0]


def _read_form(request: HttpRequest, body: bytes) -> dict[str, str]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise _Refused(20415)
    try:
        return dict(parse_qsl(body.decode()))
    except UnicodeDecodeError:
        raise _Refused(20001) from None


def _check_recipient(fields: Mapping[str, str]) -> None:
    to = fields.get("To")
    if not to:
        raise _Refused(21604)
    if to in _MAGIC_RECIPIENTS:
        raise _Refused(_MAGIC_RECIPIENTS[to])
    if not _E164.fullmatch(to.removeprefix(WHATSAPP)):
        raise _Refused(21211)


def _check_content(fields: Mapping[str, str]) -> None:
    if not (fields.get("Body") or fields.get("ContentSid")):
        raise _Refused(21602)
    if len(fields.get("Body", "")) > _LONGEST_BODY:
        raise _Refused(21617)
    try:
        variables = json.loads(fields.get("ContentVariables", "{}"))
    except json.JSONDecodeError:
        raise _Refused(21656) from None
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        raise _Refused(21656)


def _check_options(fields: Mapping[str, str]) -> None:
    validity = fields.get("ValidityPeriod", "1")
    if not validity.isdecimal() or not 1 <= int(validity) <= _LONGEST_VALIDITY:
        raise _Refused(20001)
    if "StatusCallback" in fields:
        try:
            url = urlsplit(fields["StatusCallback"])
        except ValueError:
            raise _Refused(21609) from None
        # Twilio takes no host name with an underscore.
        if url.scheme not in ("http", "https") or not _HOST.fullmatch(url.hostname or ""):
            raise _Refused(21609)


def count_segments(body: str) -> int:
    """How many messages the body is billed as: 160 or 153 septets each, or 70 or 67 UTF-16 units."""
    if set(body) <= _GSM_7 | _GSM_7_EXTENDED:
        length, alone, split = sum(2 if character in _GSM_7_EXTENDED else 1 for character in body), 160, 153
    else:
        length, alone, split = len(body.encode("utf-16-le")) // 2, 70, 67
    return 1 if length <= alone else ceil(length / split)


def _name_signal(status: str) -> str:
    return "failed" if status == "undelivered" else status


def _answer_error(code: int, headers: Mapping[str, str] | None = None) -> Response:
    status = _STATUSES.get(code, 400)
    body = {
        "code": code,
        "message": _MESSAGES[code],
        "more_info": f"https://www.twilio.com/docs/errors/{code}",
        "status": status,
    }
    challenge = {"www-authenticate": 'Basic realm="Twilio API"'} if status == 401 else {}
    return JSONResponse(body, status, {**challenge, **(headers or {})})
