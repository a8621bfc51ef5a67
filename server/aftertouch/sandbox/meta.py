"""Meta's WhatsApp Cloud API: sending, and webhooks that are verified once and signed always.

200 is acceptance only: most that is wrong with a recipient comes later as a ``failed`` status, as with the real one
(https://developers.facebook.com/docs/whatsapp/cloud-api/support/error-codes).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import secrets
import time
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import aiohttp
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .draws import draw_numbers
from .faults import Fault, Faults
from .population import Person, Population
from .settings import SandboxSettings, list_parameters
from .truth import Decision, Entry, Truth
from .webhooks import Outbox, Request, Stream

_LONGEST_ECHO = 512
_LONGEST_TEXT = 4096
_LONGEST_PARAMETER = 1024
_STATUSES_PER_CHANGE = 50

_NAME = re.compile(r"[a-z0-9_]{1,512}")
_PARAMETER_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LANGUAGE = re.compile(r"[a-z]{2,3}(_[A-Z]{2,3})?")
_DIGITS = re.compile(r"[0-9]{5,15}")
_UNPRINTABLE_PARAMETER = re.compile(r"[\n\r\t]| {5}")

_TITLES = {
    1: "An unknown error occurred",
    2: "Service temporarily unavailable",
    33: "Parameter value is not valid",
    100: "Invalid parameter",
    190: "Authentication error: the access token has expired",
    130429: "Rate limit hit",
    131008: "Required parameter is missing",
    131009: "Parameter value is not valid",
    131026: "Message undeliverable",
    131047: "Re-engagement message",
    131049: "This message was not delivered to maintain healthy ecosystem engagement",
    131050: "Unable to deliver the message: the recipient has stopped marketing messages from the business",
    131051: "Unsupported message type",
    132000: "Number of parameters does not match the expected number of params",
    132001: "Template name does not exist in the translation",
    132005: "Translated text too long",
    132012: "Parameter format does not match format in the created template",
    132018: "Param text cannot have new-line/tab characters or more than 4 consecutive spaces",
}
_STATUSES = {1: 500, 2: 503, 190: 401, 130429: 429, 132001: 404}
_TRANSIENT = {1, 2, 130429}
_FAULT_CODES = {"429": 130429, "429_retry_after": 130429, "500": 1, "503": 2, "expired_token": 190}


class _Refused(Exception):
    def __init__(self, code: int, details: str) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details


@dataclass(frozen=True, slots=True)
class _Report:
    entry: Entry
    status: str
    code: int | None = None


@dataclass(frozen=True, slots=True)
class _Inbound:
    """What a person sends after a message: the message's own type and what belongs to it, as the webhook has it."""

    entry: Entry
    content: Mapping[str, Any]
    id: str


@dataclass(frozen=True, slots=True)
class _Preference:
    """What a person says of the business's marketing in WhatsApp's settings."""

    address: str
    value: str


_News = _Report | _Inbound | _Preference


class Webhooks(Stream[_News]):
    """The app's subscription to the fields ``messages`` and ``user_preferences``."""

    name = "meta"
    batch_size = 1000

    def __init__(self, settings: SandboxSettings) -> None:
        super().__init__(settings)
        self.url = settings.whatsapp_webhook_url
        self._verified: str | None = None
        self._verifying = asyncio.Lock()

    async def open(self, session: aiohttp.ClientSession) -> bool:
        """Ask the address, once, whether it is the one it should be; nothing goes to an address that cannot say so."""
        async with self._verifying:
            if self._verified == self.url:
                return True
            challenge = str(secrets.randbelow(10**10))
            query = {"hub.mode": "subscribe", "hub.challenge": challenge, "hub.verify_token": self.settings.verify_token}
            async with session.get(self.url or "", params=query, allow_redirects=False) as response:
                if response.status != 200 or await response.text() != challenge:
                    return False
            self._verified = self.url
            return True

    def compose(self, items: Sequence[_News]) -> Request | None:
        if self.url is None:
            return None
        changes = []
        for kind, field in ((_Report, "messages"), (_Inbound, "messages"), (_Preference, "user_preferences")):
            remaining = (item for item in items if isinstance(item, kind))
            while chunk := list(islice(remaining, _STATUSES_PER_CHANGE)):
                changes.append({"field": field, "value": self._describe_value(chunk)})
        payload = {
            "object": "whatsapp_business_account",
            "entry": [{"id": self.settings.business_account_id, "changes": changes}],
        }
        # ASCII only: Meta signs the text with its \\uXXXX escapes.
        body = json.dumps(payload, separators=(",", ":")).encode()
        return Request(
            self.url,
            body,
            {
                "Content-Type": "application/json",
                "X-Hub-Signature-256": sign_webhook(self.settings.app_secret, body),
                "User-Agent": "facebookexternalua",
            },
        )

    def _describe_value(self, news: Sequence[_News]) -> dict[str, Any]:
        described: dict[str, Any] = {
            "messaging_product": "whatsapp",
            "metadata": {
                "display_phone_number": self.settings.display_phone_number,
                "phone_number_id": self.settings.phone_number_id,
            },
            "contacts": [_describe_contact(item.entry) for item in news if not isinstance(item, _Preference)],
        }
        for item in news:
            match item:
                case _Report():
                    described.setdefault("statuses", []).append(_describe_status(item))
                case _Inbound():
                    described.setdefault("messages", []).append(_describe_inbound(item))
                case _Preference():
                    described.setdefault("user_preferences", []).append(_describe_preference(item))
        return described

    def acknowledge(self, items: Sequence[_News]) -> None:
        for item in items:
            if isinstance(item, _Preference):
                continue
            if decision := item.entry.signals.get(item.status if isinstance(item, _Report) else "replied"):
                decision.acknowledged = True

    def is_taken(self, status: int) -> bool:
        """Anything but 200 is tried again, also 204."""
        return status == 200


def _describe_contact(entry: Entry) -> dict[str, Any]:
    digits = entry.address.removeprefix("+")
    profile = {"name": (entry.person.first_name if entry.person else "") or digits}
    return {"profile": profile, "wa_id": digits, "user_id": f"XX.{digits}"}


def _describe_status(report: _Report) -> dict[str, Any]:
    status: dict[str, Any] = {
        "id": report.entry.message_id,
        "status": report.status,
        "timestamp": str(int(time.time())),
        "recipient_id": report.entry.address.removeprefix("+"),
    }
    if report.entry.token:
        status["biz_opaque_callback_data"] = report.entry.token
    if report.status == "sent":
        status["pricing"] = {"billable": True, "pricing_model": "PMP", "type": "regular", "category": "marketing"}
    if report.code is not None:
        title = _TITLES[report.code]
        status["errors"] = [{"code": report.code, "title": title, "message": title, "error_data": {"details": title}}]
    return status


def _describe_inbound(inbound: _Inbound) -> dict[str, Any]:
    sender = {"from": inbound.entry.address.removeprefix("+"), "id": inbound.id, "timestamp": str(int(time.time()))}
    return {**sender, **inbound.content}


def _describe_preference(preference: _Preference) -> dict[str, Any]:
    return {
        "wa_id": preference.address.removeprefix("+"),
        "detail": f"User requested to {preference.value} marketing messages",
        "category": "marketing_messages",
        "value": preference.value,
        "timestamp": int(time.time()),
    }


def sign_webhook(app_secret: str, body: bytes) -> str:
    """The value of X-Hub-Signature-256."""
    return "sha256=" + hmac.new(app_secret.encode(), body, "sha256").hexdigest()


class Meta:
    """One business phone number."""

    def __init__(self, settings: SandboxSettings, population: Population, truth: Truth, faults: Faults, outbox: Outbox) -> None:
        self._settings = settings
        self._population = population
        self._truth = truth
        self._faults = faults
        self._outbox = outbox
        self.webhooks = Webhooks(settings)
        self._entries: dict[str, Entry] = {}
        """The last message to each address."""
        self._stopped: set[str] = set()
        self.routes = [
            Route("/{version}/{number}/messages", self._create, methods=["POST"]),
            Route("/{version}/{account}/message_templates", self._list_templates, methods=["GET"]),
        ]

    def clear(self) -> None:
        """Forget all messages, and who stopped."""
        self._entries.clear()
        self._stopped.clear()

    def receive(self, address: str, text: str) -> bool:
        """Let a person write, to whoever wrote to them last; False when nobody did."""
        if address not in self._entries:
            return False
        self._hear(self._entries[address], {"type": "text", "text": {"body": text}}, 0.0, 0.1)
        return True

    def prefer(self, address: str, value: str) -> None:
        """Let a person ``stop`` or ``resume`` the business's marketing."""
        (self._stopped.add if value == "stop" else self._stopped.discard)(address)
        self._outbox.schedule(self.webhooks, _Preference(address, value), 0.0, 0.1)

    def _hear(self, entry: Entry, content: Mapping[str, Any], earliest: float, latest: float) -> None:
        inbound = _Inbound(entry, content, f"wamid.{b64encode(secrets.token_bytes(36)).decode()}")
        self._outbox.schedule(self.webhooks, inbound, earliest, latest)

    async def _create(self, request: HttpRequest) -> Response:
        fault = self._faults.strike("whatsapp")
        if fault and not fault.taken:
            return self._answer_fault(fault)
        try:
            self._check_request(request)
            answer = self._take(await _read_object(request))
        except _Refused as refused:
            return _answer_error(refused.code, refused.details)
        return self._answer_fault(fault) if fault else JSONResponse(answer)

    async def _list_templates(self, request: HttpRequest) -> Response:
        """The account's templates, whose names contain what is asked for, in one page."""
        try:
            self._check_version_and_token(request)
            if request.path_params["account"] != self._settings.business_account_id:
                raise _Refused(100, "Object with this id does not exist or cannot be loaded")
        except _Refused as refused:
            return _answer_error(refused.code, refused.details)
        sought = request.query_params.get("name", "")
        return JSONResponse(
            {
                "data": [
                    self._describe_template(name, text) for name, text in self._settings.templates.items() if sought in name
                ],
                "paging": {"cursors": {"before": "MAZDZD", "after": "MjQZD"}},
            }
        )

    def _describe_template(self, name: str, text: str) -> dict[str, Any]:
        is_positional = all(parameter.isdecimal() for parameter in list_parameters(text))
        return {
            "name": name,
            "language": "en_US",
            "status": self._settings.template_statuses.get(name, "APPROVED"),
            "parameter_format": "POSITIONAL" if is_positional else "NAMED",
            "components": [{"type": "BODY", "text": text}],
        }

    def _answer_fault(self, fault: Fault) -> Response:
        code = _FAULT_CODES.get(fault.mode or "")
        return self._faults.keep_silent(fault) if code is None else _answer_error(code, _TITLES[code], fault.retry_headers)

    def _check_request(self, request: HttpRequest) -> None:
        self._check_version_and_token(request)
        if request.path_params["number"] != self._settings.phone_number_id:
            raise _Refused(33, "Object with this id does not exist or cannot be loaded")

    def _check_version_and_token(self, request: HttpRequest) -> None:
        if not re.fullmatch(r"v[1-9]\d?\.0", request.path_params["version"]):
            raise _Refused(100, "Unknown API version")
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, f"Bearer {self._settings.access_token}".encode()):
            raise _Refused(190, "Invalid OAuth access token")

    def _take(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if message.get("messaging_product") != "whatsapp":
            raise _Refused(100, "(#100) The parameter messaging_product is required.")
        if message.get("recipient_type", "individual") != "individual":
            raise _Refused(131009, "recipient_type must be individual")
        echo = message.get("biz_opaque_callback_data", "")
        if not isinstance(echo, str) or len(echo) > _LONGEST_ECHO:
            raise _Refused(100, f"biz_opaque_callback_data must be a string of at most {_LONGEST_ECHO} characters")
        address = self._read_recipient(message)
        title = self._check_content(message)
        kind = message.get("type", "text")

        person = self._population.find_phone(address)
        message_id = f"wamid.{b64encode(secrets.token_bytes(36)).decode()}"
        entry = self._truth.record(
            "whatsapp", address, person, token=echo, message_id=message_id, title=title, content=message[kind]
        )
        self._entries[address] = entry
        self._decide(entry, kind)
        accepted = {"message_status": "accepted"} if kind == "template" else {}
        return {
            "messaging_product": "whatsapp",
            "contacts": [{"input": message["to"], "wa_id": address.removeprefix("+")}],
            "messages": [{"id": message_id, **accepted}],
        }

    def _read_recipient(self, message: Mapping[str, Any]) -> str:
        to = message.get("to")
        if not isinstance(to, str) or not to:
            raise _Refused(100, "(#100) The parameter to is required.")
        digits = re.sub(r"[ ()-]", "", to)
        if not _DIGITS.fullmatch(digits.removeprefix("+")):
            raise _Refused(131009, "to is not a phone number")
        # Without a plus sign Meta puts the business number's own country code in front, and still answers 200.
        return digits if digits.startswith("+") else f"+{self._settings.display_phone_number[0]}{digits}"

    def _check_content(self, message: Mapping[str, Any]) -> str:
        """The text, or the template's name."""
        kind = message.get("type", "text")
        if kind not in ("text", "template"):
            raise _Refused(131051, f"The sandbox knows text and template, not {kind}")
        content = message.get(kind)
        if not isinstance(content, dict):
            raise _Refused(100, f"(#100) The parameter {kind} is required.")
        if kind == "text":
            text = content.get("body")
            if not isinstance(text, str) or not 0 < len(text) <= _LONGEST_TEXT:
                raise _Refused(100, f"text['body'] must be a string of 1 to {_LONGEST_TEXT} characters")
            return text
        check_template(content, self._settings.templates)
        return f"{content['name']} {content['language']['code']}"

    def _decide(self, entry: Entry, kind: str) -> None:
        shares = self._settings.shares
        trait = draw_numbers(self._settings.seed, "whatsapp", entry.address)[0]
        number = self._truth.count_earlier("whatsapp", entry.address, entry.token)
        fate, read, order, twist, answer = draw_numbers(self._settings.seed, "whatsapp", entry.address, number)[:5]
        if kind == "text":
            # Free-form text needs an inbound message within 24 hours, and nobody writes to a sandbox.
            code: int | None = 131047
        elif entry.address.startswith("+1"):
            # Meta has not delivered marketing templates to +1 numbers since 2025-04-01.
            code = 131049
        elif trait < shares.whatsapp_gone or _lacks_whatsapp(entry.person):
            code = 131026
        elif entry.address in self._stopped or trait < shares.whatsapp_gone + shares.whatsapp_opted_out:
            code = 131050
        elif fate < shares.whatsapp_capped:
            code = 131049
        else:
            code = None
        if code is not None:
            self._report(entry, "failed", 0.05, 0.8, code)
            return
        self._report(entry, "sent", 0.0, 0.5)
        if fate < shares.whatsapp_capped + shares.whatsapp_switched_off:
            return
        is_read = read < shares.whatsapp_read
        if twist < shares.whatsapp_failed_first:
            self._report(entry, "failed", 0.0, 0.3, 131026)
        if not is_read or order >= shares.whatsapp_read_only:
            self._report(entry, "delivered", 0.1, 1.0)
        if is_read:
            self._report(entry, "read", 0.3, 1.8)
            if answer < shares.whatsapp_replied:
                entry.signals["replied"] = Decision()
                reply = {"type": "button", "button": {"payload": "more", "text": "Tell me more"}}
                context = {"from": self._settings.display_phone_number, "id": entry.message_id}
                self._hear(entry, {"context": context, **reply}, 0.4, 1.8)

    def _report(self, entry: Entry, status: str, earliest: float, latest: float, code: int | None = None) -> None:
        entry.signals[status] = Decision(None if code is None else str(code))
        self._outbox.schedule(self.webhooks, _Report(entry, status, code), earliest, latest)


def _lacks_whatsapp(person: Person | None) -> bool:
    """Numbers outside the population are taken to be on WhatsApp."""
    return person is not None and "whatsapp" not in person.channels


async def _read_object(request: HttpRequest) -> Mapping[str, Any]:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(100, "The body must be application/json")
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise _Refused(100, "The body is not JSON") from None
    if not isinstance(body, dict):
        raise _Refused(100, "The body must be an object")
    return body


def check_template(template: Mapping[str, Any], approved: Mapping[str, str]) -> None:
    """Refuse what Meta refuses about a template message at once."""
    name, language = template.get("name"), template.get("language")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _Refused(100, "template['name'] must be lower-case letters, digits and underscores")
    if not isinstance(language, dict) or not isinstance(language.get("code"), str) or not _LANGUAGE.fullmatch(language["code"]):
        raise _Refused(100, "template['language']['code'] is required")
    if approved and name not in approved:
        raise _Refused(132001, f"template name ({name}) does not exist in {language['code']}")
    components = template.get("components", [])
    if not isinstance(components, list):
        raise _Refused(100, "template['components'] must be a list")
    given: tuple[str, ...] = ()
    for component in components:
        if not isinstance(component, dict) or component.get("type") not in ("header", "body", "button"):
            raise _Refused(100, "a component is of type header, body or button")
        parameters = component.get("parameters", [])
        if not isinstance(parameters, list):
            raise _Refused(100, "a component's parameters must be a list")
        if component["type"] == "button":
            _check_button(component, parameters)
        names = _check_parameters(parameters)
        if component["type"] == "body":
            given = names
    if not approved:
        return
    wanted = list_parameters(approved[name])
    if len(given) != len(wanted):
        raise _Refused(132000, f"body: number of localizable_params ({len(given)}) does not match ({len(wanted)})")
    if set(given) != set(wanted):
        raise _Refused(100, "Parameter name does not match the template's")


def _check_button(component: Mapping[str, Any], parameters: Sequence[Any]) -> None:
    index = component.get("index")
    if component.get("sub_type") not in ("url", "quick_reply", "copy_code"):
        raise _Refused(100, "a button's sub_type is url, quick_reply or copy_code")
    if not isinstance(index, str) or not index.isdecimal():
        raise _Refused(131009, "a button's index must be a string of digits")
    if len(parameters) != 1:
        raise _Refused(131008, "a button has one parameter")


def _check_parameters(parameters: Sequence[Any]) -> tuple[str, ...]:
    """The names of the parameters: as given, or "1", "2", … by position."""
    for parameter in parameters:
        if not isinstance(parameter, dict):
            raise _Refused(100, "a parameter must be an object")
        _check_parameter(parameter)
    named = [parameter["parameter_name"] for parameter in parameters if "parameter_name" in parameter]
    if not named:
        return tuple(str(position) for position in range(1, len(parameters) + 1))
    if len(named) != len(parameters) or len(set(named)) != len(named):
        raise _Refused(100, "parameters are either all positional or all named, each name once")
    if not all(isinstance(name, str) and _PARAMETER_NAME.fullmatch(name) for name in named):
        raise _Refused(100, "parameter_name must be lower-case letters, digits and underscores")
    return tuple(named)


def _check_parameter(parameter: Mapping[str, Any]) -> None:
    kind = parameter.get("type")
    value = parameter.get("text") if kind == "text" else parameter.get(kind) if isinstance(kind, str) else None
    match kind:
        case "text":
            if not isinstance(value, str) or not value:
                raise _Refused(131008, "Parameter of type text is missing text value")
            if _UNPRINTABLE_PARAMETER.search(value):
                raise _Refused(132018, _TITLES[132018])
            if len(value) > _LONGEST_PARAMETER:
                raise _Refused(132005, f"more than {_LONGEST_PARAMETER} characters")
        case "currency" | "date_time":
            if not isinstance(value, dict) or not value.get("fallback_value"):
                raise _Refused(132012, f"{kind} needs a fallback_value")
        case "image" | "video" | "document":
            if not isinstance(value, dict) or ("link" in value) == ("id" in value):
                raise _Refused(132012, f"{kind} needs a link or an id")
        case "payload" | "coupon_code":
            if not isinstance(parameter.get(kind), str):
                raise _Refused(132012, f"{kind} must be a string")
        case _:
            raise _Refused(100, "unknown type of parameter")


def _answer_error(code: int, details: str, headers: Mapping[str, str] | None = None) -> Response:
    error = {
        "message": f"(#{code}) {_TITLES[code]}",
        "type": "OAuthException",
        "code": code,
        "error_data": {"messaging_product": "whatsapp", "details": details},
        "fbtrace_id": secrets.token_urlsafe(12),
        "is_transient": code in _TRANSIENT,
    }
    return JSONResponse({"error": error}, _STATUSES.get(code, 400), headers)
