"""WhatsApp: approved templates go out through Meta's Cloud API, or Twilio's; webhooks bring what became of them, and answers.

Which of the two is a setting; content, addresses, signals and actions are the same.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import ClassVar, Self, cast

import aftertouch_twilio

from aftertouch.channels import (
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    Limit,
    Message,
    Outcome,
    Problem,
    ReasonClass,
    Refused,
    Signal,
    Template,
    TemplatesUnreadable,
    Webhook,
    WebhookRequest,
)
from aftertouch.hookspecs import hookimpl
from aftertouch.http import HttpClient
from aftertouch_whatsapp.meta import CODES, Meta
from aftertouch_whatsapp.people import WhatsAppAddress
from aftertouch_whatsapp.settings import WhatsAppSettings
from aftertouch_whatsapp.templates import WhatsAppContent, describe_template, find_problems
from aftertouch_whatsapp.twilio import OWN_CODES, Twilio

__all__ = ["WhatsAppAddress", "WhatsAppChannel", "WhatsAppContent", "WhatsAppSettings"]

MAX_BODY = 1024
"""Characters of a template's body with its parameters filled in (Meta: error 132005)."""

_FORBIDDEN_TEXT = re.compile(r"[\n\r\t]| {5}")
"""What Meta takes in no parameter: line breaks, tabs, more than four spaces in a row (error 132018)."""


class WhatsAppChannel(Channel):
    """Template messages to WhatsApp accounts."""

    name = "whatsapp"
    label = "WhatsApp"
    address_model = WhatsAppAddress
    content_model = WhatsAppContent
    settings_model = WhatsAppSettings
    capabilities = Capabilities(templates=True, tracked_links=("body", "buttons.value"))
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
    reasons: ClassVar[Mapping[str, ReasonClass]] = {
        **{code: reason for reason, codes in CODES.items() for code in codes},
        **aftertouch_twilio.REASONS,
        **OWN_CODES,
        **dict.fromkeys(("payload_too_large", "parameter_invalid", "button_not_tracked"), ReasonClass.CONTENT),
    }

    settings: WhatsAppSettings
    _http: HttpClient

    def __init__(self, settings: WhatsAppSettings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        self._provider = Meta(settings) if settings.provider == "meta" else Twilio(settings, webhook_url)
        interval = timedelta(seconds=1 / settings.messages_per_second)
        self._pace = Limit(key=f"number/{self._provider.sender}", interval=interval)
        self._pair_interval = timedelta(seconds=settings.seconds_between_messages)

    async def __aenter__(self) -> Self:
        self._http = HttpClient(timeout=self.settings.timeout_seconds)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.close()

    async def check_content(self, content: Content) -> Sequence[Problem]:
        mine = cast("WhatsAppContent", content)
        if "{" in mine.template:
            return ()
        templates = await self._provider.list_templates(self._http, mine.template)
        return () if templates is None else find_problems(mine, templates)

    async def list_templates(self) -> Sequence[Template]:
        templates = await self._provider.list_templates(self._http)
        if templates is None:
            raise TemplatesUnreadable("the setting business_account_id is missing, which leads to the account's templates")
        return [describe_template(template) for template in templates]

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
        outcome = await self._provider.send(self._http, message)
        # The other codes of this class are about the number as a whole: its throughput, or its account's.
        if isinstance(outcome, Refused) and outcome.code == "131056":
            return replace(outcome, limit=self._name_pair(message.address))
        return outcome

    def _name_pair(self, address: Address) -> str:
        """The limit of messages from one number to one person, without naming the person."""
        person = hashlib.blake2b(address.key.encode(), digest_size=8).hexdigest()
        return f"pair/{self._provider.sender}/{person}"

    def verify(self, request: WebhookRequest) -> None:
        self._provider.verify(request)

    def parse(self, request: WebhookRequest) -> Webhook:
        return self._provider.parse(request)


@hookimpl
def aftertouch_register_channels() -> Sequence[type[Channel]]:
    return (WhatsAppChannel,)
