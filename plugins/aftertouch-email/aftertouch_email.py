"""Email: messages leave by SMTP, what became of them comes as Twilio SendGrid's signed events, and one click unsubscribes.

SMTP says only that a server took a message, or why it did not; ``delivered``, ``opened``, ``clicked`` and ``complained`` come
from the provider's webhook, which knows a message by the token in its ``X-SMTPAPI`` header. Any SMTP server can send; without
SendGrid's key nothing but unsubscribing comes back. Mail clients unsubscribe with a POST that nobody signs (RFC 8058), so its
address is signed.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from email.headerregistry import Address as Mailbox
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime, parseaddr
from typing import Annotated, Any, ClassVar, Literal, cast

from aiosmtplib import SMTP, SMTPException, SMTPResponseException
from cryptography.exceptions import InvalidSignature as WrongSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import load_der_public_key
from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator

from aftertouch.channels import (
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
    Standing,
    Unclear,
    Webhook,
    WebhookAnswer,
    WebhookRequest,
)
from aftertouch.hookspecs import hookimpl

CONNECTIONS = 4
"""For the messages of one batch; one carries them one after the other, at three round trips each."""
MAX_MESSAGE = 10_000_000
"""Bytes. Gmail takes 25 MB and shows 102 kB of HTML; what is larger than this is a mistake."""
TOKEN = "aftertouch_token"
"""The name of the token among SendGrid's ``unique_args``, which come back at the top level of every event."""

_MAILBOX = re.compile(
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]{1,62}"
)
"""In ASCII: an address beyond it needs SMTPUTF8, which few servers on the way have."""
_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})\b")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_CODES: Mapping[ReasonClass, Sequence[str]] = {
    # RFC 3463, section 3: mailbox, domain or syntax of the address is bad, the mailbox moved or is disabled; 5.1.10: RFC 7505.
    ReasonClass.RECIPIENT_GONE: (
        *("550", "551", "553", "5.1.1", "5.1.2", "5.1.3", "5.1.6", "5.1.10", "5.2.1"),
        *("bounce", "dropped_bounced_address", "dropped_invalid"),
    ),
    ReasonClass.OPTED_OUT: ("unsubscribed", "dropped_unsubscribed_address", "dropped_spam_reporting_address"),
    ReasonClass.CONTENT: ("552", "554", "5.2.3", "5.3.4", "5.6.0", "5.7.1", "subject_invalid", "payload_too_large"),
    ReasonClass.CONFIG: ("500", "501", "502", "503", "530", "534", "535", "538", "5.7.0", "5.7.8", "5.7.9", "5.7.26", "5.1.8"),
    ReasonClass.RATE: ("4.7.0", "4.7.1", "4.7.28", "4.2.1", "4.4.5"),
    ReasonClass.TRANSIENT: (
        *("connect_error", "out_of_time", "421", "450", "451", "452", "454", "4.2.2", "4.3.0", "4.3.2", "4.4.1", "4.4.2"),
        *("blocked", "dropped"),
    ),
}
_SIGNALS = {
    "delivered": "delivered",
    "open": "opened",
    "click": "clicked",
    "spamreport": "complained",
    "unsubscribe": "unsubscribed",
    "group_unsubscribe": "unsubscribed",
}
"""SendGrid's events: https://www.twilio.com/docs/sendgrid/for-developers/tracking-events/event"""
_STANDINGS: Mapping[str, Literal["opted_out", "active"]] = {
    "spamreport": "opted_out",
    "unsubscribe": "opted_out",
    "group_unsubscribe": "opted_out",
    "group_resubscribe": "active",
}
_NO_NEWS = frozenset({"processed", "deferred", "group_resubscribe"})


def _check_mailbox(text: str) -> str:
    _, mailbox = parseaddr(text)
    if _MAILBOX.fullmatch(mailbox) is None or _CONTROL.search(text):
        raise ValueError("must be like news@shop.example, or Shop <news@shop.example>")
    return text


class EmailSettings(Settings):
    """Which server mail leaves by, from whom, and how what comes back is proved."""

    by_app = frozenset(("username", "password", "sender", "reply_to", "unsubscribe_secret", "webhook_key", "messages_per_second"))

    host: str
    """Of the SMTP server; SendGrid's is ``smtp.sendgrid.net``."""
    port: int = Field(default=587, ge=1, le=65_535)
    security: Literal["starttls", "tls", "none"] = "starttls"
    """``tls`` from the first byte is for port 465, ``none`` for a server on this machine."""
    username: str | None = None
    """SendGrid's is the word ``apikey``."""
    password: SecretStr | None = None
    sender: Annotated[str, AfterValidator(_check_mailbox)]
    """``Shop <news@shop.example>``; its domain has to be set up for DKIM at the provider."""
    reply_to: Annotated[str, AfterValidator(_check_mailbox)] | None = None
    unsubscribe_secret: SecretStr
    """Signs the addresses that unsubscribe; keep it, for mail is read late. 32 characters or more."""
    webhook_key: str | None = None
    """SendGrid's verification key, as its page of the event webhook shows it."""
    messages_per_second: float = Field(default=0, ge=0, le=10_000)
    """Of the whole account, over all workers; 0 leaves the pace to the server, which refuses for a while what is too fast."""
    timeout_seconds: float = Field(default=15, gt=0, le=15)
    """For all mails of a batch; those that were not begun by then are tried again. A call that takes 20 seconds is given up, and
    then nobody knows what became of any of them."""

    @field_validator("unsubscribe_secret")
    @classmethod
    def _check_unsubscribe_secret(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 32:
            raise ValueError("must have at least 32 characters; `openssl rand -base64 32` makes one")
        return value

    @field_validator("webhook_key")
    @classmethod
    def _check_webhook_key(cls, value: str | None) -> str | None:
        if value is not None:
            load_webhook_key(value)
        return value


def load_webhook_key(text: str) -> ec.EllipticCurvePublicKey:
    """Load SendGrid's verification key.

    Raises:
        ValueError: it is none.
    """
    key = load_der_public_key(base64.b64decode(text, validate=True))
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("must be a key on an elliptic curve, in base64")
    return key


class EmailAddress(Address):
    """A mailbox."""

    email: str = Field(max_length=254, repr=False)

    @field_validator("email")
    @classmethod
    def _check_email(cls, value: str) -> str:
        if _MAILBOX.fullmatch(value) is None:
            raise ValueError("must be like ada@shop.example")
        return value

    @property
    def key(self) -> str:
        # By the standard the part before the @ has a case; no provider makes use of it, and people write it as they like.
        return self.email.lower()


class EmailContent(Content):
    """A mail. Whoever reads no HTML reads the text."""

    subject: str
    text: str
    html: str | None = None


class EmailChannel(Channel):
    """Mail by SMTP."""

    name = "email"
    label = "Email"
    address_model = EmailAddress
    content_model = EmailContent
    settings_model = EmailSettings
    capabilities = Capabilities(batch_size=50)
    signals = (
        Signal(name="delivered", label="Delivered", implies=("sent",)),
        Signal(name="opened", label="Opened", implies=("delivered",)),
        Signal(name="clicked", label="Clicked a link", implies=("opened",)),
        Signal(name="unsubscribed", label="Unsubscribed", implies=("delivered",)),
        Signal(name="complained", label="Reported as spam", implies=("delivered",)),
    )
    actions = (
        Action(name="opened", label="Opened", short_name="opened", expression="opened"),
        # Many mail clients load no pictures, and Apple's loads all: what was not opened is a guess, what was not clicked is not.
        Action(name="not_opened", label="Did not open", short_name="not opened", expression="delivered & ~opened"),
        Action(name="clicked", label="Clicked a link", short_name="clicked", expression="clicked"),
        Action(name="not_clicked", label="Did not click a link", short_name="not clicked", expression="delivered & ~clicked"),
        Action(
            name="not_delivered",
            label="Not delivered",
            short_name="not delivered",
            expression="failed & ~delivered",
            apart="sent & ~delivered & ~failed",
            apart_label="Still on its way",
        ),
        Action(name="delivered", label="Delivered", short_name="delivered", expression="delivered"),
    )
    reasons: ClassVar[Mapping[str, ReasonClass]] = {code: reason for reason, codes in _CODES.items() for code in codes}

    settings: EmailSettings

    def __init__(self, settings: EmailSettings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        self._mailbox = parseaddr(settings.sender)[1]
        self._webhook_key = load_webhook_key(settings.webhook_key) if settings.webhook_key is not None else None
        pace = settings.messages_per_second
        self._limits = (Limit(key="account", interval=timedelta(seconds=1 / pace if pace else 0)),)

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return self._limits

    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        mine = cast("Sequence[Message[EmailAddress, EmailContent]]", messages)
        deadline = asyncio.get_running_loop().time() + self.settings.timeout_seconds
        shares = [mine[start::CONNECTIONS] for start in range(min(CONNECTIONS, len(mine)))]
        told = await asyncio.gather(*(self._send_share(share, deadline) for share in shares))
        return [told[index % CONNECTIONS][index // CONNECTIONS] for index in range(len(mine))]

    async def _send_share(self, messages: Sequence[Message[EmailAddress, EmailContent]], deadline: float) -> list[Outcome]:
        """Send messages over one connection, which is opened again after it broke; none is begun after the deadline."""
        outcomes: list[Outcome] = []
        client: SMTP | None = None
        try:
            for message in messages:
                if asyncio.get_running_loop().time() >= deadline:
                    outcomes.append(Refused(code="out_of_time"))
                    continue
                if client is None or not client.is_connected:
                    client = self._make_client()
                    try:
                        async with asyncio.timeout_at(deadline):
                            await client.connect()
                    except SMTPResponseException as error:
                        outcomes.append(_refuse(error))
                        continue
                    except (SMTPException, OSError):
                        outcomes.append(Refused(code="connect_error"))
                        continue
                outcomes.append(await self._send_one(client, message, deadline))
        finally:
            if client is not None:
                client.close()
        return outcomes

    def _make_client(self) -> SMTP:
        settings = self.settings
        return SMTP(
            hostname=settings.host,
            port=settings.port,
            username=settings.username,
            password=None if settings.password is None else settings.password.get_secret_value(),
            use_tls=settings.security == "tls",
            # Never "if the server offers it": somebody in between could say that it does not.
            start_tls=settings.security == "starttls",
            timeout=settings.timeout_seconds,
        )

    async def _send_one(self, client: SMTP, message: Message[EmailAddress, EmailContent], deadline: float) -> Outcome:
        if _CONTROL.search(message.content.subject):
            return Refused(code="subject_invalid")
        data = self.write_mail(message).as_bytes()
        if len(data) > MAX_MESSAGE:
            return Refused(code="payload_too_large")
        try:
            async with asyncio.timeout_at(deadline):
                await client.mail(self._mailbox)
                await client.rcpt(message.address.email)
        except SMTPResponseException as error:
            outcome = _refuse(error)
            await _reset(client, deadline)
            return outcome
        except (SMTPException, OSError):
            client.close()
            return Refused(code="connect_error")
        try:
            async with asyncio.timeout_at(deadline):
                _, text = await client.data(data)
        except SMTPResponseException as error:
            return _refuse(error)
        except (SMTPException, OSError) as error:
            # It was on its way: whether it was taken, only the provider's events can say.
            client.close()
            return Unclear(detail=f"no answer after the message: {type(error).__name__}")
        return Accepted(message_id=_read_queue_id(text))

    def write_mail(self, message: Message[EmailAddress, EmailContent]) -> EmailMessage:
        """The mail with its headers; everything of it is ours or checked, and nothing can add a header."""
        settings, content = self.settings, message.content
        name, mailbox = parseaddr(settings.sender)
        mail = EmailMessage(policy=_POLICY)
        mail["From"] = Mailbox(display_name=name, addr_spec=mailbox)
        mail["To"] = Mailbox(addr_spec=message.address.email)
        if settings.reply_to is not None:
            reply_name, reply_mailbox = parseaddr(settings.reply_to)
            mail["Reply-To"] = Mailbox(display_name=reply_name, addr_spec=reply_mailbox)
        mail["Subject"] = content.subject
        mail["Date"] = format_datetime(datetime.now(UTC))
        # The same when it is sent again, so that mailboxes can tell.
        mail["Message-ID"] = f"<{message.token}@{mailbox.rpartition('@')[2]}>"
        mail["List-Unsubscribe"] = f"<{self.write_unsubscribe_url(message.token)}>"
        mail["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
        mail["X-SMTPAPI"] = json.dumps({"unique_args": {TOKEN: message.token}})
        mail.set_content(content.text)
        if content.html is not None:
            mail.add_alternative(content.html, subtype="html")
        return mail

    def write_unsubscribe_url(self, token: str) -> str:
        """Where a mail client POSTs, and a person finds a button."""
        return f"{self.webhook_url}/unsubscribe?t={token}&s={self._sign(token)}"

    def _sign(self, token: str) -> str:
        key = self.settings.unsubscribe_secret.get_secret_value().encode()
        return base64.urlsafe_b64encode(hmac.digest(key, token.encode(), "sha256")[:18]).decode()

    def verify(self, request: WebhookRequest) -> None:
        """Check the signed address of an unsubscription, or SendGrid's signature over timestamp and body."""
        if request.path == "unsubscribe":
            given = request.query.get("s", "")
            if not hmac.compare_digest(given.encode(), self._sign(request.query.get("t", "")).encode()):
                raise InvalidSignature
            return
        if self._webhook_key is None:
            raise InvalidSignature("AFTERTOUCH_EMAIL_WEBHOOK_KEY is not set, so nothing can be proved")
        signed = request.headers.get("x-twilio-email-event-webhook-timestamp", "").encode() + request.body
        try:
            signature = base64.b64decode(request.headers.get("x-twilio-email-event-webhook-signature", ""), validate=True)
            self._webhook_key.verify(signature, signed, ec.ECDSA(SHA256()))
        except (ValueError, WrongSignature):
            raise InvalidSignature from None

    def parse(self, request: WebhookRequest) -> Webhook:
        if request.path == "unsubscribe":
            return self._parse_unsubscription(request)
        try:
            events = json.loads(request.body)
        except (ValueError, RecursionError) as error:
            raise InvalidWebhook("the body is not JSON") from error
        if not isinstance(events, list):
            raise InvalidWebhook("the body is no list of events")
        receipts: list[Receipt] = []
        standings: list[Standing] = []
        unrecognized: list[str] = []
        for event in events:
            standings += _read_standing(event)
            if found := list(_read_event(event)):
                receipts += found
            elif not isinstance(event, dict) or str(event.get("event")) not in _NO_NEWS:
                unrecognized.append(json.dumps(event)[:1_000])
        return Webhook(receipts=tuple(receipts), standings=tuple(standings), unrecognized=tuple(unrecognized))

    def _parse_unsubscription(self, request: WebhookRequest) -> Webhook:
        """Unsubscribe on POST only: programs follow links in mail, and must not unsubscribe anybody (RFC 8058, section 3.1)."""
        if request.method != "POST":
            return Webhook(answer=WebhookAnswer(status=200, body=_page(_BUTTON, request.url), content_type=_HTML))
        token = request.query.get("t", "")
        # The class of the code ends the person's subscriptions: an address has no place in a URL.
        receipts = (Receipt(signal="unsubscribed", token=token), Receipt(signal="failed", token=token, code="unsubscribed"))
        return Webhook(receipts=receipts, answer=WebhookAnswer(status=200, body=_page(_DONE, ""), content_type=_HTML))


def _read_event(event: Any) -> Iterator[Receipt]:
    """What one of SendGrid's events says; nothing where it is none that we know, or about no message of ours."""
    if not isinstance(event, dict) or not isinstance(event.get(TOKEN), str) or not event[TOKEN]:
        return
    token, kind = event[TOKEN], event.get("event")
    time = _read_time(event.get("timestamp"))
    if isinstance(kind, str) and kind in _SIGNALS:
        yield Receipt(signal=_SIGNALS[kind], token=token, time=time)
    elif kind == "bounce":
        status = event.get("status")
        has_status = event.get("type") != "blocked" and isinstance(status, str) and _ENHANCED.fullmatch(status)
        yield Receipt(
            signal="failed", token=token, time=time, code=str(status) if has_status else str(event.get("type") or "bounce")
        )
    elif kind == "dropped":
        reason = re.sub(r"[^a-z]+", "_", str(event.get("reason") or "").lower()).strip("_")
        code = f"dropped_{reason}"
        yield Receipt(signal="failed", token=token, time=time, code=code if code in EmailChannel.reasons else "dropped")


def _read_standing(event: Any) -> Iterator[Standing]:
    """What an event says about more mail to its address; nothing where it is about something else."""
    kind = event.get("event") if isinstance(event, dict) else None
    if not isinstance(kind, str) or kind not in _STANDINGS:
        return
    try:
        address = EmailAddress(email=event.get("email"))
    except ValidationError:
        return
    yield Standing(address=address, state=_STANDINGS[kind], reason=kind, time=_read_time(event.get("timestamp")))


def _read_time(value: object) -> datetime | None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 40:
        return None
    try:
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError):
        return None


def _refuse(error: SMTPResponseException) -> Refused:
    enhanced = _ENHANCED.match(error.message.strip())
    return Refused(code=enhanced[1] if enhanced else str(error.code))


async def _reset(client: SMTP, deadline: float) -> None:
    """Have the server forget the envelope of a message that it refused; a connection that breaks meanwhile is opened again."""
    try:
        async with asyncio.timeout_at(deadline):
            await client.rset()
    except (SMTPException, OSError):
        client.close()


def _read_queue_id(text: str) -> str:
    """The server's own name for the message, as in "2.0.0 Ok: queued as 4FxYz"; empty where it says none."""
    match = re.search(r"\bqueued as ([\w.-]{1,200})", text)
    return match[1] if match else ""


# Folding would encode a long address in a header as a word, which no mail client reads.
_POLICY = SMTP_POLICY.clone(max_line_length=998)
_HTML = "text/html; charset=utf-8"
_BUTTON = '<form method="post" action="{url}"><p>Do you want no more mail from us?</p><button>Unsubscribe</button></form>'
_DONE = "<p>You will get no more mail from us.</p>"


def _page(body: str, url: str) -> str:
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return f"{head}<title>Unsubscribe</title>{body.format(url=html.escape(url))}</html>"


@hookimpl
def aftertouch_register_channels() -> Sequence[type[Channel]]:
    return (EmailChannel,)
