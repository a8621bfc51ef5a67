"""WhatsApp through Meta's Cloud API.

The token travels as ``biz_opaque_callback_data``, which Meta returns with every status, so a status settles even a message whose
request was never answered. The API has no idempotency key: a request that may have arrived is never sent again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal
from urllib.parse import urlencode

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from aftertouch.channels import (
    Accepted,
    InvalidSignature,
    InvalidWebhook,
    Message,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Reply,
    Standing,
    TemplatesUnreadable,
    Unclear,
    Webhook,
    WebhookAnswer,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.http import Answer, HttpClient, NoAnswer, NotSent, encode_headers, split_url
from aftertouch_whatsapp.people import WhatsAppAddress, read_answer
from aftertouch_whatsapp.settings import WhatsAppSettings
from aftertouch_whatsapp.templates import Media, WhatsAppContent, WhatsAppTemplate

LARGEST_LIST = 1_000_000
"""Bytes of a list of templates: a hundred of some kilobytes each."""
MOST_PAGES = 60
"""Of a hundred templates: a verified business has 6,000 at most."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")
_STATUSES = frozenset(("sent", "delivered", "read", "failed"))
"""The statuses of the webhook reference, each of them a signal. ``read`` may come without ``delivered``, which it implies."""

CODES: Mapping[ReasonClass, Sequence[str]] = {
    # Not on WhatsApp, ourselves, not on a test number's list, not allowed here, changed identity.
    ReasonClass.RECIPIENT_GONE: ("131026", "131021", "131030", "131062", "137000"),
    ReasonClass.OPTED_OUT: ("131050",),
    ReasonClass.CAPPED: ("131049", "130472"),  # Meta's limit on marketing per person (24 hours at least), Meta's experiment
    ReasonClass.WINDOW: ("131047",),
    ReasonClass.CONTENT: (
        *("132005", "132008", "132012", "132018"),  # the text with this person's parameters
        *("131052", "131053", "http_413"),  # media
    ),
    ReasonClass.CONFIG: (
        *("0", "3", "10", "190", *(str(code) for code in range(200, 300))),  # access token, permissions
        *("33", "100", "368", "130497", "131005", "131008", "131009", "131031", "131037", "131042", "131045", "131051"),
        *("131048", "131064"),  # our number's or account's quality: sending on makes it worse
        *("131063", "133010", "135000"),
        *("132000", "132001", "132007", "132015", "132016", "132068", "132069"),  # templates
        *("http_400", "http_401", "http_403", "http_404"),
        *(f"http_{status}" for status in range(300, 400)),  # the API does not redirect: the address is wrong
    ),
    ReasonClass.RATE: ("4", "80007", "130429", "131056", "133016", "http_429"),
    ReasonClass.TRANSIENT: (
        *("connect_error", "1", "2", "131000", "131016", "131057", "133004"),
        *(f"http_{status}" for status in range(500, 600)),
    ),
}
"""Meta: Cloud API error codes. Meta asks to decide by code, never by title or HTTP status."""


class _Status(BaseModel):
    """What is read of one status; Meta adds fields without notice."""

    id: str = Field(min_length=1)
    status: str
    timestamp: AwareDatetime | None = None
    biz_opaque_callback_data: str | None = None
    errors: list[dict[str, Any]] = []


class _Context(BaseModel):
    id: str | None = None


class _Text(BaseModel):
    """The words of a text, or of a quick reply."""

    body: str = ""
    text: str = ""
    payload: str = ""


class _Inbound(BaseModel):
    """What is read of something that a person sent."""

    sender: str = Field(alias="from")
    type: str = ""
    timestamp: AwareDatetime | None = None
    context: _Context = _Context()
    text: _Text = _Text()
    button: _Text = _Text()


class _Preference(BaseModel):
    """A person's word on a business's marketing, given in WhatsApp's own settings."""

    wa_id: str
    category: Literal["marketing_messages"]
    value: Literal["stop", "resume"]
    timestamp: AwareDatetime | None = None


class Meta:
    """The messages of one phone number."""

    def __init__(self, settings: WhatsAppSettings) -> None:
        # The settings say meta, so they have all three.
        assert settings.access_token
        assert settings.app_secret
        assert settings.verify_token
        self.sender = settings.phone_number_id
        self._app_secret = settings.app_secret.get_secret_value().encode()
        self._verify_token = settings.verify_token.get_secret_value().encode()
        self._origin, base = split_url(settings.api_url)
        graph = f"{base.rstrip('/')}/{settings.api_version}"
        self._target = f"{graph}/{settings.phone_number_id}/messages"
        self._templates = f"{graph}/{settings.business_account_id}/message_templates" if settings.business_account_id else ""
        read_headers = {
            "Authorization": f"Bearer {settings.access_token.get_secret_value()}",
            "Accept": "application/json",
        }
        self._read_headers = encode_headers(read_headers)
        self._headers = encode_headers(read_headers | {"Content-Type": "application/json"})

    async def send(self, http: HttpClient, message: Message[WhatsAppAddress, WhatsAppContent]) -> Outcome:
        """Have Meta send one message."""
        request = {
            "messaging_product": "whatsapp",
            "recipient_type": "individual",
            # With its plus sign: Meta puts the business's own country code before a number without one.
            "to": message.address.phone,
            "type": "template",
            "template": write_template(message.content, message.token),
            "biz_opaque_callback_data": message.token,
        }
        try:
            answer = await http.post(self._origin, self._target, self._headers, json.dumps(request).encode())
        except NotSent:
            return Refused(code="connect_error")
        except NoAnswer as error:
            return Unclear(detail=str(error))
        return judge_answer(answer)

    async def list_templates(self, http: HttpClient, name: str = "") -> Sequence[WhatsAppTemplate] | None:
        """The account's templates, of a name where one is given; None where the account is not known.

        Raises:
            TemplatesUnreadable: Meta does not say.
        """
        if not self._templates:
            return None
        # Meta's own filter may find more than this name.
        query = {"fields": "name,language,status,parameter_format,components", "limit": "100"} | ({"name": name} if name else {})
        found: list[WhatsAppTemplate] = []
        for _ in range(MOST_PAGES):
            page = await self._read_page(http, query)
            read = [_read_template(item) for item in _list_of(page, "data")]
            if name and None in read:
                # It may be the one that is asked for, and "there is none" would hold a launch up.
                raise TemplatesUnreadable("Meta lists a template in a way that is not understood")
            found += filter(None, read)
            paging = page.get("paging")
            cursors = paging.get("cursors") if isinstance(paging, dict) and "next" in paging else None
            after = cursors.get("after") if isinstance(cursors, dict) else None
            if not isinstance(after, str):
                break
            query["after"] = after
        return [template for template in found if name in ("", template.name)]

    async def _read_page(self, http: HttpClient, query: Mapping[str, str]) -> dict[str, object]:
        try:
            answer = await http.get(
                self._origin, f"{self._templates}?{urlencode(query)}", self._read_headers, most_bytes=LARGEST_LIST
            )
        except (NotSent, NoAnswer, ValueError):
            raise TemplatesUnreadable("Meta does not answer which there are") from None
        page = _parse_object(answer.body) or {}
        if answer.status != 200 or not isinstance(page.get("data"), list):
            cause = f"http_{answer.status} {_read_code(page.get('error')) or ''}".strip()
            raise TemplatesUnreadable(f"Meta does not say which there are: {cause}")
        return page

    def verify(self, request: WebhookRequest) -> None:
        """Check the registration's word, or the signature over the body's bytes (Meta: Webhooks, "Validate payloads")."""
        if request.method == "GET":
            given = request.query.get("hub.verify_token", "")

            if request.query.get("hub.mode") != "subscribe" or not hmac.compare_digest(given.encode(), self._verify_token):
                raise InvalidSignature
            return
        signature = request.headers.get("x-hub-signature-256", "")
        digest = hmac.new(self._app_secret, request.body, hashlib.sha256).hexdigest()
        if request.method != "POST" or not hmac.compare_digest(signature.encode(), f"sha256={digest}".encode()):
            raise InvalidSignature

    def parse(self, request: WebhookRequest) -> Webhook:
        if request.method == "GET":
            return Webhook(answer=WebhookAnswer(status=200, body=request.query.get("hub.challenge", "")))
        try:
            update = json.loads(request.body)
        except (ValueError, RecursionError) as error:
            raise InvalidWebhook("the body is not JSON") from error
        receipts: list[Receipt] = []
        replies: list[Reply] = []
        standings: list[Standing] = []
        unrecognized: list[str] = []
        changes = list(_iterate_changes(update))
        if not changes:
            unrecognized.append("an update without changes")
        for field, value in changes:
            if field not in ("messages", "user_preferences"):
                unrecognized.append(f"field={field}"[:256])
            unrecognized.extend(f"error={_read_code(error)}" for error in _list_of(value, "errors"))
            for item in _list_of(value, "statuses"):
                receipt = _read_receipt(item)
                if isinstance(receipt, Receipt):
                    receipts.append(receipt)
                else:
                    unrecognized.append(receipt)
            inbound, preferences = _list_of(value, "messages"), _list_of(value, "user_preferences")
            if (inbound or preferences) and _read_number(value) != self.sender:
                # The stop of another number's readers is none of ours.
                unrecognized.append(f"field={field} of another number"[:256])
                continue
            told: Iterator[Reply | Standing | str | None] = chain(map(_read_inbound, inbound), map(_read_preference, preferences))
            for news in told:
                match news:
                    case Reply():
                        replies.append(news)
                    case Standing():
                        standings.append(news)
                    case str():
                        unrecognized.append(news)
        # Meta sends a webhook again for up to seven days unless the answer is exactly 200.
        return Webhook(
            receipts=tuple(receipts),
            replies=tuple(replies),
            standings=tuple(standings),
            unrecognized=tuple(unrecognized),
            answer=WebhookAnswer(status=200),
        )


def write_template(content: WhatsAppContent, token: str) -> dict[str, object]:
    """Write the ``template`` object of a message (Meta: Cloud API, "Template messages"); ``token`` is what tracked links have."""
    components: list[dict[str, object]] = []
    if isinstance(content.header, Media):
        media = {"type": content.header.type, content.header.type: {"link": content.header.link}}
        components.append({"type": "header", "parameters": [media]})
    elif content.header is not None:
        components.append({"type": "header", "parameters": [{"type": "text", "text": content.header}]})
    if isinstance(content.body, dict):
        body = [{"type": "text", "parameter_name": name, "text": text} for name, text in content.body.items()]
    else:
        body = [{"type": "text", "text": text} for text in content.body]
    if body:
        components.append({"type": "body", "parameters": body})
    for button in content.buttons:
        kind = {"url": "text", "quick_reply": "payload", "copy_code": "coupon_code"}[button.type]
        # The template has the beginning of the URL, and takes what follows it.
        value = button.value[button.value.index(token) :] if button.is_address else button.value
        parameter = {"type": kind, kind: value}
        # The index is a string there.
        components.append({"type": "button", "sub_type": button.type, "index": str(button.index), "parameters": [parameter]})
    return {"name": content.template, "language": {"code": content.language}, "components": components}


def judge_answer(answer: Answer) -> Outcome:
    """Say what an answer of the messages endpoint means."""
    said = _parse_object(answer.body)
    if 200 <= answer.status <= 299:
        for message in _list_of(said, "messages"):
            if isinstance(message, dict) and isinstance(message.get("id"), str):
                return Accepted(message_id=message["id"])
        return Unclear(detail=f"http_{answer.status} without a message id")
    code = _read_code((said or {}).get("error"))
    if code is None:
        if answer.status in (502, 504):
            # Only a gateway spoke: what stands behind it may have taken the message before it fell silent.
            return Unclear(detail=f"http_{answer.status}")
        code = f"http_{answer.status}"
    return Refused(code=code, retry_after=parse_retry_after(answer.headers.get("retry-after")))


def _read_template(item: object) -> WhatsAppTemplate | None:
    """A template of Meta's; None for one that nobody understands, which must not hide the others."""
    try:
        return WhatsAppTemplate.model_validate(item)
    except ValidationError:
        return None


def _parse_object(body: bytes | None) -> dict[str, object] | None:
    try:
        value = json.loads(body or b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _list_of(parent: object, key: str) -> list[object]:
    value = parent.get(key) if isinstance(parent, dict) else None
    return value if isinstance(value, list) else []


def _iterate_changes(update: object) -> Iterator[tuple[str, object]]:
    for entry in _list_of(update, "entry"):
        for change in _list_of(entry, "changes"):
            fields = change if isinstance(change, dict) else {}
            yield str(fields.get("field", "")), fields.get("value")


def _read_number(value: object) -> object:
    """The number that a change is about, by Meta's id."""
    metadata = value.get("metadata") if isinstance(value, dict) else None
    return metadata.get("phone_number_id") if isinstance(metadata, dict) else None


def _read_code(error: object) -> str | None:
    code = error.get("code") if isinstance(error, dict) else None
    return str(code) if isinstance(code, int) else None


def _read_receipt(item: object) -> Receipt | str:
    """Read one status; a text where it is not understood. It names the message, never the person."""
    try:
        status = _Status.model_validate(item)
    except ValidationError as error:
        return _describe("a status", error)
    if status.status not in _STATUSES:
        return f"status={status.status} id={status.id}"[:256]
    token = status.biz_opaque_callback_data or ""
    return Receipt(
        signal=status.status,
        token=token if _TOKEN.fullmatch(token) else None,
        message_id=status.id,
        time=status.timestamp,
        code=_read_code(status.errors[0]) if status.status == "failed" and status.errors else None,
    )


def _read_inbound(item: object) -> Reply | Standing | str | None:
    """Read what a person sent: a reply, or a word that ends or resumes their subscription."""
    try:
        inbound = _Inbound.model_validate(item)
        address = WhatsAppAddress(phone=f"+{inbound.sender}")
    except ValidationError as error:
        return _describe("a message", error)
    if inbound.type == "system":
        # WhatsApp itself tells that somebody has another number now.
        return None
    words = (inbound.text.body, inbound.button.text, inbound.button.payload)
    return read_answer(address, words, inbound.context.id, inbound.timestamp)


def _read_preference(item: object) -> Standing | str:
    try:
        preference = _Preference.model_validate(item)
        address = WhatsAppAddress(phone=f"+{preference.wa_id}")
    except ValidationError as error:
        return _describe("a preference", error)
    state: Literal["opted_out", "active"] = "opted_out" if preference.value == "stop" else "active"
    return Standing(address=address, state=state, reason="user_preferences", time=preference.timestamp)


def _describe(what: str, error: ValidationError) -> str:
    """What could not be read, by the names of its fields: their values are a person's."""
    fields = sorted({".".join(map(str, problem["loc"])) for problem in error.errors(include_input=False)})
    return f"{what} that cannot be read: {', '.join(fields)}"[:256]
