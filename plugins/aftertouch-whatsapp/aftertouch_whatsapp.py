"""WhatsApp through Meta's Cloud API: approved templates go out, webhooks bring what became of them and what people answer.

The token travels as ``biz_opaque_callback_data``, which Meta returns with every status, so a status settles even a message whose
request was never answered. The API has no idempotency key: a request that may have arrived is never sent again.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from types import TracebackType
from typing import Annotated, Any, ClassVar, Literal, Self, cast
from urllib.parse import urlencode

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, SecretStr, StringConstraints, ValidationError
from pydantic_extra_types.phone_numbers import PhoneNumberValidator

from aftertouch.channels import (
    CHECKED_ONCE,
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
    Problem,
    ReasonClass,
    Receipt,
    Refused,
    Reply,
    Settings,
    Signal,
    Standing,
    Unclear,
    Webhook,
    WebhookAnswer,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.hookspecs import hookimpl
from aftertouch.http import Answer, HttpClient, NoAnswer, NotSent, encode_headers, split_url

MAX_BODY = 1024
"""Characters of a template's body with its parameters filled in (Meta: error 132005)."""

LARGEST_LIST = 1_000_000
"""Bytes of a list of templates: a hundred of some kilobytes each."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{24}")
_FORBIDDEN_TEXT = re.compile(r"[\n\r\t]| {5}")
"""What Meta takes in no parameter: line breaks, tabs, more than four spaces in a row (error 132018)."""

_PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")

_STATUSES = frozenset(("sent", "delivered", "read", "failed"))
"""The statuses of the webhook reference, each of them a signal. ``read`` may come without ``delivered``, which it implies."""

_STOP = frozenset(("STOP", "STOPALL", "STOP PROMOTIONS", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "REVOKE", "OPTOUT"))
_START = frozenset(("START", "UNSTOP"))
"""Words that are all of a text, or on a button. Meta acts on none of them, but asks that they are respected (WhatsApp Business
Messaging Policy); "Stop promotions" is the button that it proposes."""

_CODES: Mapping[ReasonClass, Sequence[str]] = {
    # Not on WhatsApp, ourselves, not on a test number's list, not allowed here, changed identity.
    ReasonClass.RECIPIENT_GONE: ("131026", "131021", "131030", "131062", "137000"),
    ReasonClass.OPTED_OUT: ("131050",),
    ReasonClass.CAPPED: ("131049", "130472"),  # Meta's limit on marketing per person (24 hours at least), Meta's experiment
    ReasonClass.WINDOW: ("131047",),
    ReasonClass.CONTENT: (
        *("payload_too_large", "parameter_invalid", "button_not_tracked"),
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


class WhatsAppSettings(Settings):
    """The business's phone number and app at Meta."""

    phone_number_id: str = Field(pattern=r"^[0-9]+$")
    """Meta's id of the number that messages come from, which is not the number."""
    business_account_id: str = Field(default="", pattern=r"^[0-9]*$")
    """Meta's id of the WhatsApp Business Account. With it a campaign's template is looked up before the launch, for which the
    access token needs whatsapp_business_management as well."""
    access_token: SecretStr = Field(min_length=1)
    """Of a system user that may use whatsapp_business_messaging."""
    app_secret: SecretStr = Field(min_length=1)
    """The key of the webhooks' signatures."""
    verify_token: SecretStr = Field(min_length=1)
    """A word of ours that Meta repeats when the webhook's address is registered."""
    api_url: str = Field(default="https://graph.facebook.com", pattern=r"^https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?/?$")
    """Meta's Graph API, or a sandbox."""
    api_version: str = Field(default="v23.0", pattern=r"^v[0-9]+\.[0-9]+$")
    """Of the Graph API; Meta retires each about two years after it came out."""
    messages_per_second: float = Field(default=80, gt=0, le=10_000)
    """Of the phone number: what Meta gives every number. Meta raises it to 1,000 for some; 20 where the number is also in use
    with the WhatsApp Business app."""
    seconds_between_messages: float = Field(default=6, ge=0, le=3_600)
    """To one person. Meta's limit, from which a burst of 45 may borrow; campaigns that meet in one person can wait."""
    timeout_seconds: float = Field(default=15, gt=0)
    """For a whole request; the connection may take half of it."""


class WhatsAppAddress(Address):
    """A phone number."""

    phone: Annotated[str, PhoneNumberValidator(number_format="E164"), CHECKED_ONCE] = Field(repr=False)

    @property
    def key(self) -> str:
        return self.phone


class Media(BaseModel):
    """What a template's header shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["image", "video", "document"]
    link: str


class Button(BaseModel):
    """What fills one of a template's buttons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["url", "quick_reply", "copy_code"]
    index: int = Field(ge=0, le=9)
    """The button's place in the template, from 0."""
    value: str
    """The end of the URL, the payload of the reply, or the code to copy. For a template whose button leads to our tracked links
    (``https://<public URL>/l/{{1}}``) the whole address that a click is to lead to."""

    @property
    def is_address(self) -> bool:
        """True for a URL button with a whole address."""
        return self.type == "url" and self.value.startswith(("https://", "http://"))


class WhatsAppContent(Content):
    """An approved template and what fills it.

    Outside the 24 hours after a person's last message nothing but a template may be sent, so this channel sends nothing else.
    """

    template: str = Field(pattern=r"^[a-z0-9_]{1,512}$")
    language: str = Field(pattern=r"^[a-z]{2,3}(_[A-Za-z]{2,4})?$")
    """As the template was approved in: ``en_US``."""
    header: str | Media | None = None
    """A text header's parameter, or the media that the header shows."""
    body: list[str] | dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")], str] = []
    """Parameters in order, or by name where the template has named ones."""
    buttons: list[Button] = []


class _Status(BaseModel):
    """What is read of one status; Meta adds fields without notice."""

    id: str = Field(min_length=1)
    status: str
    timestamp: AwareDatetime | None = None
    biz_opaque_callback_data: str | None = None
    errors: list[dict[str, Any]] = []


class _Button(BaseModel):
    type: str
    url: str = ""


class _Component(BaseModel):
    """A part of a template, as the account has it."""

    type: str
    format: str = "TEXT"
    text: str = ""
    buttons: list[_Button] = []


class _Template(BaseModel):
    """A template of the account, in one language."""

    name: str
    language: str
    status: str
    parameter_format: str = "POSITIONAL"
    components: list[_Component] = []


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


class WhatsAppChannel(Channel):
    """Template messages to WhatsApp accounts."""

    name = "whatsapp"
    label = "WhatsApp"
    address_model = WhatsAppAddress
    content_model = WhatsAppContent
    settings_model = WhatsAppSettings
    capabilities = Capabilities(tracked_links=("body", "buttons.value"))
    signals = (
        Signal(name="delivered", label="Delivered", implies=("sent",)),
        Signal(name="read", label="Read", implies=("delivered",)),
        # Whoever writes has the chat open, also where read receipts are switched off.
        Signal(name="replied", label="Replied", implies=("read",)),
        # Whoever clicked has read it, with read receipts turned off too.
        Signal(name="clicked", label="Clicked a link", implies=("read",)),
        Signal(name="scanned", label="A machine followed a link", implies=("sent",)),
    )
    actions = (
        Action(name="not_read", label="Didn't read", short_name="not read", expression="delivered & ~read"),
        Action(name="not_received", label="Didn't receive", short_name="not received", expression="(failed | sent) & ~delivered"),
        Action(name="read", label="Read", short_name="read", expression="read"),
        Action(name="failed", label="Failed", short_name="failed", expression="failed & ~delivered"),
        Action(name="replied", label="Replied", short_name="replied", expression="replied"),
        Action(name="not_replied", label="Didn't reply", short_name="not replied", expression="delivered & ~replied"),
        Action(name="clicked", label="Clicked a link", short_name="clicked", expression="clicked"),
        Action(name="not_clicked", label="Did not click a link", short_name="not clicked", expression="delivered & ~clicked"),
    )
    reasons: ClassVar[Mapping[str, ReasonClass]] = {code: reason for reason, codes in _CODES.items() for code in codes}

    settings: WhatsAppSettings
    _http: HttpClient

    def __init__(self, settings: WhatsAppSettings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
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
        interval = timedelta(seconds=1 / settings.messages_per_second)
        self._pace = Limit(key=f"number/{settings.phone_number_id}", interval=interval)
        self._pair_interval = timedelta(seconds=settings.seconds_between_messages)

    async def __aenter__(self) -> Self:
        self._http = HttpClient(timeout=self.settings.timeout_seconds)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.close()

    async def check_content(self, content: Content) -> Sequence[Problem]:
        mine = cast("WhatsAppContent", content)
        # Meta's own filter may find more than this name.
        query = {"name": mine.template, "fields": "name,language,status,parameter_format,components", "limit": "100"}
        if not self._templates or "{" in mine.template:
            return ()
        answer = await self._http.get(
            self._origin, f"{self._templates}?{urlencode(query)}", self._read_headers, most_bytes=LARGEST_LIST
        )
        if answer.status != 200:
            raise LookupError(f"http_{answer.status} {_read_code((_parse_object(answer.body) or {}).get('error')) or ''}".strip())
        templates = [_Template.model_validate(item) for item in _list_of(_parse_object(answer.body), "data")]
        return find_problems(mine, [template for template in templates if template.name == mine.template])

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return (self._pace, Limit(key=self._name_pair(message.address), interval=self._pair_interval))

    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        mine = cast("Sequence[Message[WhatsAppAddress, WhatsAppContent]]", messages)
        return await asyncio.gather(*(self._send_one(message) for message in mine))

    async def _send_one(self, message: Message[WhatsAppAddress, WhatsAppContent]) -> Outcome:
        content = message.content
        body = list(content.body.values()) if isinstance(content.body, dict) else content.body
        texts = [*body, *([content.header] if isinstance(content.header, str) else []), *(b.value for b in content.buttons)]
        if any(not text.strip() or _FORBIDDEN_TEXT.search(text) for text in texts):
            return Refused(code="parameter_invalid")
        if any(button.is_address and message.token not in button.value for button in content.buttons):
            return Refused(code="button_not_tracked")
        if sum(map(len, body)) > MAX_BODY:
            return Refused(code="payload_too_large")
        request = {
            "messaging_product": "whatsapp",
            "recipient_type": "individual",
            # With its plus sign: Meta puts the business's own country code before a number without one.
            "to": message.address.phone,
            "type": "template",
            "template": write_template(content, message.token),
            "biz_opaque_callback_data": message.token,
        }
        try:
            answer = await self._http.post(self._origin, self._target, self._headers, json.dumps(request).encode())
        except NotSent:
            return Refused(code="connect_error")
        except NoAnswer as error:
            return Unclear(detail=str(error))
        outcome = judge_answer(answer)
        # The other codes of this class are about the number as a whole: its throughput, or its account's.
        if isinstance(outcome, Refused) and outcome.code == "131056":
            return replace(outcome, limit=self._name_pair(message.address))
        return outcome

    def _name_pair(self, address: Address) -> str:
        """The limit of messages from one number to one person, without naming the person."""
        person = hashlib.blake2b(address.key.encode(), digest_size=8).hexdigest()
        return f"pair/{self.settings.phone_number_id}/{person}"

    def verify(self, request: WebhookRequest) -> None:
        """Check the registration's word, or the signature over the body's bytes (Meta: Webhooks, "Validate payloads")."""
        if request.method == "GET":
            given = request.query.get("hub.verify_token", "")
            expected = self.settings.verify_token.get_secret_value()
            if request.query.get("hub.mode") != "subscribe" or not hmac.compare_digest(given.encode(), expected.encode()):
                raise InvalidSignature
            return
        signature = request.headers.get("x-hub-signature-256", "")
        digest = hmac.new(self.settings.app_secret.get_secret_value().encode(), request.body, hashlib.sha256).hexdigest()
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
            if (inbound or preferences) and _read_number(value) != self.settings.phone_number_id:
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


def find_problems(content: WhatsAppContent, templates: Sequence[_Template]) -> list[Problem]:
    """Say what is wrong with a content, given the account's templates of its name."""
    if not templates:
        return [Problem(field="template", text=f"the account has no template {content.template!r}")]
    found = next((template for template in templates if template.language == content.language), None)
    if found is None:
        languages = ", ".join(sorted(template.language for template in templates))
        return [Problem(field="language", text=f"the template {content.template!r} exists in {languages} only")]
    if found.status != "APPROVED":
        return [Problem(field="template", text=f"the template {content.template!r} is {found.status}, not APPROVED")]
    parts = {part.type: part for part in found.components}
    return [
        *_find_body_problems(content, parts.get("BODY", _Component(type="BODY")), found.parameter_format == "NAMED"),
        *_find_header_problems(content, parts.get("HEADER", _Component(type="HEADER"))),
        *_find_button_problems(content, parts.get("BUTTONS", _Component(type="BUTTONS")).buttons),
    ]


def _find_body_problems(content: WhatsAppContent, body: _Component, is_named: bool) -> Iterator[Problem]:
    wanted = list(dict.fromkeys(_PLACEHOLDER.findall(body.text)))
    if is_named and isinstance(content.body, dict):
        for name in wanted:
            if name not in content.body:
                yield Problem(field="body", text=f"lacks the template's parameter {name!r}")
        for name in content.body:
            if name not in wanted:
                yield Problem(field=f"body.{name}", text="the template has no such parameter")
    elif isinstance(content.body, dict) or (is_named and content.body):
        named, given = ("by name", "in order") if is_named else ("in order", "by name")
        yield Problem(field="body", text=f"has its parameters {given}; the template wants them {named}: {', '.join(wanted)}")
    elif len(content.body) != len(wanted):
        yield Problem(field="body", text=f"has {len(content.body)} parameters, and the template wants {len(wanted)}")


def _find_header_problems(content: WhatsAppContent, header: _Component) -> Iterator[Problem]:
    given = content.header.type.upper() if isinstance(content.header, Media) else "TEXT" if content.header is not None else ""
    shown = header.format if header.format in ("IMAGE", "VIDEO", "DOCUMENT") else ""
    wanted = shown or ("TEXT" if _PLACEHOLDER.search(header.text) else "")
    if given != wanted:
        text = f"the template's header wants {wanted.lower()}" if wanted else "the template's header takes no parameter"
        yield Problem(field="header", text=f"{text}, and has {given.lower() or 'nothing'}")


def _find_button_problems(content: WhatsAppContent, buttons: Sequence[_Button]) -> Iterator[Problem]:
    given = {button.index: button for button in content.buttons}
    for index, button in enumerate(buttons):
        if button.type == "URL" and _PLACEHOLDER.search(button.url) and index not in given:
            yield Problem(field="buttons", text=f"the template's button {index} wants the end of its URL")
        if button.type == "COPY_CODE" and index not in given:
            yield Problem(field="buttons", text=f"the template's button {index} wants the code to copy")
    for place, button_given in enumerate(content.buttons):
        kind = buttons[button_given.index].type if button_given.index < len(buttons) else "none"
        if kind != button_given.type.upper():
            text = f"button {button_given.index} of the template is {kind.lower()}, not {button_given.type}"
            yield Problem(field=f"buttons[{place}]", text=text)


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
    words = {text.strip().upper() for text in (inbound.text.body, inbound.button.text, inbound.button.payload)}
    if words & _STOP:
        return Standing(address=address, state="opted_out", reason="STOP", time=inbound.timestamp)
    if words & _START:
        return Standing(address=address, state="active", reason="START", time=inbound.timestamp)
    return Reply(address=address, message_id=inbound.context.id, time=inbound.timestamp)


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


@hookimpl
def aftertouch_register_channels() -> Sequence[type[Channel]]:
    return (WhatsAppChannel,)
