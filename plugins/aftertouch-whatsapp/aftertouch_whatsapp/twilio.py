"""WhatsApp over Twilio: the same templates, as its Content API has them, filled in through its Messages resource.

A campaign names a template as it was approved, and Twilio takes its own id of it; so the account's list is read, and kept for
some minutes. In it a template's text, header and buttons share one set of variables.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from aftertouch_twilio import REASONS, SIGNALS, Messages, parse_object, read_form, read_status
from pydantic import BaseModel, ValidationError

from aftertouch.channels import Message, Outcome, ReasonClass, Refused, Standing, TemplatesUnreadable, Webhook, WebhookRequest
from aftertouch.http import HttpClient, NoAnswer, NotSent, split_url
from aftertouch_whatsapp.people import WhatsAppAddress, read_answer
from aftertouch_whatsapp.settings import WhatsAppSettings
from aftertouch_whatsapp.templates import (
    PLACEHOLDER,
    ButtonPart,
    Media,
    Part,
    WhatsAppContent,
    WhatsAppTemplate,
    find_misfits,
    list_parameters,
)

KEEP_SECONDS = 300.0
"""How long the account's list of templates is believed, also when it could not be read again."""
MISSING_SECONDS = 5.0
"""The same for a template that is not in it, since somebody may have made it meanwhile, and for a list that could not be read."""
LISTING_SECONDS = 8.0
"""For the whole list. Messages wait for it, and a call of ``send`` is given up after 20."""
LISTED_AT_ONCE = 100
MOST_PAGES = 50
LARGEST_PAGE = 2_000_000
"""Bytes: a template is some kilobytes."""
OWN_CODES: Mapping[str, ReasonClass] = {
    # The account has no such template, or it takes other parameters by now: so for everybody.
    **dict.fromkeys(("template_unknown", "template_misfit"), ReasonClass.CONFIG),
    "templates_unreadable": ReasonClass.TRANSIENT,
}
"""Words for what is wrong before Twilio is asked to send."""


class _Approval(BaseModel):
    """What WhatsApp says of a template."""

    name: str | None = None
    status: str | None = None
    content_type: str | None = None


class _Resource(BaseModel):
    """A template, as Twilio has it."""

    sid: str
    friendly_name: str | None = None
    language: str | None = None
    types: dict[str, Any] | None = None
    approval_requests: _Approval | None = None


class Known(WhatsAppTemplate):
    """A template of the account, with Twilio's id of it."""

    sid: str


class _Unreadable(TemplatesUnreadable):
    """Twilio does not say which templates there are; ``code`` is why."""

    def __init__(self, code: str) -> None:
        super().__init__(f"Twilio's Content API does not say which there are: {code}")
        self.code = code


class Twilio:
    """The messages of one sender."""

    def __init__(self, settings: WhatsAppSettings, webhook_url: str) -> None:
        assert settings.auth_token, "the settings say twilio"
        self._has_service = bool(settings.messaging_service_sid)
        self.sender = settings.messaging_service_sid or settings.sender
        service = {"MessagingServiceSid": settings.messaging_service_sid}
        self._messages = Messages(
            account_sid=settings.account_sid,
            auth_token=settings.auth_token,
            api_url=settings.twilio_api_url,
            webhook_url=webhook_url,
            options=service if settings.messaging_service_sid else {"From": f"whatsapp:{settings.sender}"},
        )
        self._origin, base = split_url(settings.twilio_content_url)
        self._base = base.rstrip("/")
        self._known: dict[tuple[str, str], Known] = {}
        self._read_at = -KEEP_SECONDS
        self._failure: _Unreadable | None = None
        """Of the last reading."""
        self._reading = asyncio.Lock()

    async def send(self, http: HttpClient, message: Message[WhatsAppAddress, WhatsAppContent]) -> Outcome:
        """Have Twilio send one message."""
        content = message.content
        try:
            template = await self._find_template(http, content.template, content.language)
        except _Unreadable as error:
            return Refused(code=error.code)
        if template is None:
            return Refused(code="template_unknown")
        variables = write_variables(content, template, message.token)
        if variables is None:
            return Refused(code="template_misfit")
        fields = {
            "To": f"whatsapp:{message.address.phone}",
            "ContentSid": template.sid,
            "ContentVariables": json.dumps(variables),
        }
        return await self._messages.create(http, message.token, fields)

    async def list_templates(self, http: HttpClient, name: str = "") -> Sequence[WhatsAppTemplate]:
        """The account's templates, of a name where one is given, approved ones first.

        Raises:
            TemplatesUnreadable: Twilio does not say.
        """
        return [template for template in await self._read_templates(http) if name in ("", template.name)]

    async def _find_template(self, http: HttpClient, name: str, language: str) -> Known | None:
        async with self._reading:
            age = time.monotonic() - self._read_at
            found = self._known.get((name, language))
            if age >= (KEEP_SECONDS if found else MISSING_SECONDS):
                # All messages of a batch wait here: whatever comes of it, they do not ask one after the other.
                self._failure = await self._read_again(http)
                self._read_at = time.monotonic()
                found = self._known.get((name, language))
            if found is None and self._failure is not None:
                raise self._failure
            return found

    async def _read_again(self, http: HttpClient) -> _Unreadable | None:
        """Read the list anew; why it stays as it was, where it cannot be read."""
        try:
            read = await self._read_templates(http)
        except _Unreadable as error:
            return error
        self._known = {(template.name, template.language): template for template in reversed(read)}
        return None

    async def _read_templates(self, http: HttpClient) -> list[Known]:
        """All templates of the account, approved ones first."""
        try:
            async with asyncio.timeout(LISTING_SECONDS):
                return await self._read_pages(http)
        except TimeoutError:
            raise _Unreadable("templates_unreadable") from None

    async def _read_pages(self, http: HttpClient) -> list[Known]:
        found: list[Known] = []
        target = f"{self._base}/v1/ContentAndApprovals?PageSize={LISTED_AT_ONCE}"
        for _ in range(MOST_PAGES):
            page = await self._read(http, target)
            contents = page.get("contents")
            if not isinstance(contents, list):
                raise _Unreadable("templates_unreadable")
            found += filter(None, map(read_template, contents))
            meta = page.get("meta")
            following = meta.get("next_page_url") if isinstance(meta, dict) else None
            if not isinstance(following, str):
                break
            # Only what follows the host: whoever answers does not choose where our credentials go.
            target = f"{self._base}{split_url(following)[1]}"
        return sorted(found, key=lambda template: template.status != "APPROVED")

    async def _read(self, http: HttpClient, target: str) -> dict[str, object]:
        try:
            answer = await http.get(self._origin, target, self._messages.headers, most_bytes=LARGEST_PAGE)
        except NotSent:
            raise _Unreadable("connect_error") from None
        except (NoAnswer, ValueError):
            raise _Unreadable("templates_unreadable") from None
        if answer.status != 200:
            code = f"http_{answer.status}"
            raise _Unreadable(code if code in REASONS else "templates_unreadable")
        return parse_object(answer.body) or {}

    def verify(self, request: WebhookRequest) -> None:
        """Check Twilio's signature."""
        self._messages.verify(request)

    def parse(self, request: WebhookRequest) -> Webhook:
        """Read a status callback, or what somebody wrote."""
        form, status = read_form(request)
        return self._parse_inbound(form) if status == "received" else read_status(request, form, status, SIGNALS)

    def _parse_inbound(self, form: Mapping[str, str]) -> Webhook:
        """Read what a person wrote, or which button they pressed (Twilio: "Webhooks for inbound messages")."""
        message = f"MessageSid={form.get('MessageSid', '')[:64]}"
        own = form.get("MessagingServiceSid") if self._has_service else form.get("To", "").removeprefix("whatsapp:")
        if own != self.sender:
            # The stop of another sender's readers is none of ours.
            return Webhook(unrecognized=(f"SmsStatus=received for another sender {message}",))
        channel, _, phone = form.get("From", "").partition(":")
        try:
            address = WhatsAppAddress(phone=phone if channel == "whatsapp" else "")
        except ValidationError:
            return Webhook(unrecognized=(f"SmsStatus=received from no WhatsApp number {message}",))
        words = tuple(form.get(name, "") for name in ("OptOutType", "Body", "ButtonText", "ButtonPayload"))
        answer = read_answer(address, words, form.get("OriginalRepliedMessageSid") or None)
        return Webhook(standings=(answer,)) if isinstance(answer, Standing) else Webhook(replies=(answer,))


def write_variables(content: WhatsAppContent, template: WhatsAppTemplate, token: str) -> dict[str, str] | None:
    """A template's variables by their names, as text, header and buttons fill them; None where they do not fit.

    ``token`` is what tracked links have.
    """
    if find_misfits(content, template):
        return None
    parts = {part.type: part for part in template.components}
    if isinstance(content.body, dict):
        variables = dict(content.body)
    else:
        # The first parameter is for the smallest number, which is not 1 where the header has that one.
        numbers = list_parameters(parts["BODY"].text) if content.body else []
        variables = dict(zip(numbers, content.body, strict=True))
    if content.header is not None:
        shown = content.header.link if isinstance(content.header, Media) else content.header
        pattern = parts["HEADER"].text
        if isinstance(content.header, Media):
            before, _, after = PLACEHOLDER.sub("\0", pattern, count=1).partition("\0")
            if not (shown.startswith(before) and shown.endswith(after) and len(shown) > len(before) + len(after)):
                return None
            shown = shown[len(before) : len(shown) - len(after)]
        variables[PLACEHOLDER.findall(pattern)[0]] = shown
    for button in content.buttons:
        # The template has the beginning of the URL, and takes what follows it.
        value = button.value[button.value.index(token) :] if button.is_address else button.value
        variables[PLACEHOLDER.findall(parts["BUTTONS"].buttons[button.index].url)[0]] = value
    return variables


def read_template(item: object) -> Known | None:
    """A template of Twilio's in the shape that Meta's have; None for what WhatsApp has no use of."""
    try:
        resource = _Resource.model_validate(item)
    except ValidationError:
        return None
    approval = resource.approval_requests or _Approval()
    types = resource.types or {}
    kind = approval.content_type if approval.content_type in types else next(iter(types), None)
    shown = types.get(kind) if kind is not None else None
    name = approval.name or resource.friendly_name
    if not isinstance(shown, dict) or not name or not resource.language:
        return None
    text = _join_texts(shown.get("body"), shown.get("title") if kind == "twilio/card" else None)
    media = shown.get("media")
    header = _join_texts(shown.get("header_text"))
    link = _join_texts(media[0] if isinstance(media, list) and media else media)
    has_media = PLACEHOLDER.search(link) is not None
    buttons = [_read_button(action) for action in _list_of(shown.get("actions"))]
    footer = shown.get("footer") or (shown.get("subtitle") if kind == "twilio/card" else None)
    is_named = any(not found.isdecimal() for found in PLACEHOLDER.findall(text))
    return Known(
        sid=resource.sid,
        name=name,
        language=resource.language,
        status=(approval.status or "unsubmitted").upper(),
        parameter_format="NAMED" if is_named else "POSITIONAL",
        components=[
            Part(type="BODY", text=text),
            Part(type="HEADER", format="MEDIA" if has_media else "TEXT", text=link if has_media else header),
            Part(type="FOOTER", text=_join_texts(footer)),
            Part(type="BUTTONS", buttons=buttons),
        ],
    )


def _read_button(action: object) -> ButtonPart:
    fields = action if isinstance(action, dict) else {}
    kind = str(fields.get("type") or "QUICK_REPLY")
    filled = _join_texts(fields.get({"URL": "url", "COPY_CODE": "code"}.get(kind, "id")))
    return ButtonPart(type=kind, text=_join_texts(fields.get("title")), url=filled, is_fixed=PLACEHOLDER.search(filled) is None)


def _join_texts(*texts: object) -> str:
    return " ".join(text for text in texts if isinstance(text, str))


def _list_of(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else ()
