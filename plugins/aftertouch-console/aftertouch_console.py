"""The channel to copy: messages go out as JSON to one HTTP address, signed receipts come back.

It is small because the server owns retries, rates and bookkeeping; what is here only a channel can know.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Self, cast

import aiohttp
from pydantic import AwareDatetime, BaseModel, Field, HttpUrl, SecretStr, ValidationError

from aftertouch.channels import (
    Accepted,
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    InvalidSignature,
    InvalidWebhook,
    Message,
    Outcome,
    ReasonClass,
    Receipt,
    Refused,
    Settings,
    Signal,
    Unclear,
    Webhook,
    WebhookRequest,
    parse_retry_after,
)
from aftertouch.hookspecs import hookimpl


# --8<-- [start:models]
class ConsoleAddress(Address):
    """An inbox, by its name."""

    inbox: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")

    @property
    def key(self) -> str:
        return self.inbox


class ConsoleContent(Content):
    """A text."""

    text: str = Field(min_length=1)


class ConsoleSettings(Settings):
    """Where messages go, what proves that they are ours, and what proves that receipts are the provider's."""

    by_app = frozenset(("api_key", "webhook_secret"))

    url: HttpUrl
    api_key: SecretStr
    webhook_secret: SecretStr
    timeout_seconds: float = Field(default=10, gt=0, le=60)


# --8<-- [end:models]


# --8<-- [start:event]
class ConsoleEvent(BaseModel):
    """One item of a webhook, as the provider documents it."""

    reference: str = Field(min_length=1)
    status: Literal["delivered", "read", "failed"]
    time: AwareDatetime | None = None
    error: str | None = None


# --8<-- [end:event]


# --8<-- [start:declarations]
class ConsoleChannel(Channel):
    name = "console"
    label = "Console"
    address_model = ConsoleAddress
    content_model = ConsoleContent
    settings_model = ConsoleSettings
    capabilities = Capabilities(webhooks=True)
    signals = (
        Signal(name="delivered", label="Delivered", implies=("sent",)),
        Signal(name="read", label="Read", implies=("delivered",)),
    )
    actions = (
        Action(name="read", label="Read", short_name="read", expression="read"),
        Action(name="not_read", label="Didn't read", short_name="not read", expression="delivered & ~read"),
    )
    reasons = {
        "no_such_inbox": ReasonClass.RECIPIENT_GONE,
        "inbox_closed": ReasonClass.OPTED_OUT,
        "text_too_long": ReasonClass.CONTENT,
        "bad_key": ReasonClass.CONFIG,
        "redirected": ReasonClass.CONFIG,
        "too_fast": ReasonClass.RATE,
        "connect_error": ReasonClass.TRANSIENT,
        "unavailable": ReasonClass.TRANSIENT,
    }
    # --8<-- [end:declarations]

    # --8<-- [start:open]
    settings: ConsoleSettings

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=self.settings.timeout_seconds))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._session.close()

    # --8<-- [end:open]

    # --8<-- [start:send]
    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        mine = cast("Sequence[Message[ConsoleAddress, ConsoleContent]]", messages)
        return await asyncio.gather(*(self._send_one(message) for message in mine))

    async def _send_one(self, message: Message[ConsoleAddress, ConsoleContent]) -> Outcome:
        try:
            async with self._session.post(
                str(self.settings.url),
                json={"reference": message.token, "inbox": message.address.inbox, "text": message.content.text},
                headers={"Authorization": f"Bearer {self.settings.api_key.get_secret_value()}"},
                allow_redirects=False,
            ) as answer:
                return read_answer(answer.status, answer.headers.get("Retry-After"), await answer.read())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            return Refused(code="connect_error")  # nothing has left yet
        except (aiohttp.ClientError, TimeoutError) as error:
            return Unclear(detail=type(error).__name__)  # its text may quote the request

    # --8<-- [end:send]

    # --8<-- [start:verify]
    def verify(self, request: WebhookRequest) -> None:
        secret = self.settings.webhook_secret.get_secret_value().encode()
        expected = hmac.new(secret, request.body, hashlib.sha256).hexdigest()
        # compare_digest takes the same time wherever they differ, but refuses text outside ASCII: so compare bytes.
        if not hmac.compare_digest(expected.encode(), request.headers.get("x-console-signature", "").encode()):
            raise InvalidSignature

    # --8<-- [end:verify]

    # --8<-- [start:parse]
    def parse(self, request: WebhookRequest) -> Webhook:
        try:
            items = json.loads(request.body)["events"]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise InvalidWebhook('expected {"events": […]}') from error
        if not isinstance(items, list):
            raise InvalidWebhook("events is no list")
        receipts, unrecognized = [], []
        for item in items:
            try:
                event = ConsoleEvent.model_validate(item)
            except ValidationError:
                unrecognized.append(json.dumps(item))
                continue
            receipts.append(Receipt(signal=event.status, token=event.reference, time=event.time, code=event.error))
        return Webhook(receipts=tuple(receipts), unrecognized=tuple(unrecognized))

    # --8<-- [end:parse]


# --8<-- [start:answer]
def read_answer(status: int, retry_after: str | None, body: bytes) -> Outcome:
    """What the provider's answer means; its documentation as code."""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict):
        told = {}
    if status < 300:
        return Accepted(message_id=str(told.get("id", ""))[:256])
    if status < 400:
        return Refused(code="redirected")
    if status == 429:
        # Without a delay the server waits as long as it thinks fit.
        return Refused(code="too_fast", retry_after=parse_retry_after(retry_after))
    if status >= 500:
        return Refused(code="unavailable")
    return Refused(code=str(told.get("error", f"http_{status}")))


# --8<-- [end:answer]


# --8<-- [start:hook]
@hookimpl
def aftertouch_register_channels() -> list[type[Channel]]:
    return [ConsoleChannel]


# --8<-- [end:hook]
