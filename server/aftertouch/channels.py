"""The channel author's door: what a channel declares, what it is handed and what it answers.

Everything here is a frozen, keyword-only value or an abstract class, so a later field breaks no plugin. The module
imports the standard library and pydantic only: a channel can be written and tested without the server.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import cached_property
from types import TracebackType
from typing import ClassVar, Generic, Literal, Self, TypeVar
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator


class ReasonClass(StrEnum):
    """What a provider's refusal means, and so what may happen next."""

    RECIPIENT_GONE = "recipient_gone"
    """The address will never work: the subscription becomes invalid."""
    OPTED_OUT = "opted_out"
    """The person said stop: the subscription is suppressed at once."""
    CAPPED = "capped"
    """The provider holds this person back for now; other channels may go at once."""
    WINDOW = "window"
    """A free-form message outside the provider's service window: it needs a template."""
    CONTENT = "content"
    """This message cannot be sent to this person as it is (too long, a parameter missing)."""
    CONFIG = "config"
    """Our account, key or template is wrong: nobody is written off, the campaign has to wait."""
    RATE = "rate"
    """Too fast: tried again after the provider's delay, never a failure of the person."""
    TRANSIENT = "transient"
    """A timeout or a 5xx: tried again with jitter, up to a limit."""
    UNKNOWN = "unknown"
    """A code that nobody has met yet: treated as transient with a low limit, and kept."""

    @property
    def is_retryable(self) -> bool:
        """True when the same message may be tried again without anybody changing anything."""
        return self in (ReasonClass.RATE, ReasonClass.TRANSIENT, ReasonClass.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A fact that can become true of a recipient and never becomes false again.

    The server knows four signals of its own on every channel: ``attempted`` (a provider call was begun), ``sent`` (the
    provider took the message; implies attempted), ``failed`` (it was refused, or reported undeliverable; implies
    attempted) and ``skipped`` (the server decided not to send, with a reason). A channel declares the others.
    """

    name: str
    """Lower-case word, as in ``read``."""
    label: str
    """For people, as in "Read"."""
    implies: tuple[str, ...] = ()
    """Names of signals that are true whenever this one is, as in ``("delivered",)``; transitive."""


@dataclass(frozen=True, kw_only=True)
class Action:
    """What a person can retarget on: a named, labelled boolean expression over signals.

    ``expression`` uses signal names, ``&``, ``|``, ``~`` and parentheses. It must be false for somebody of whom nothing is
    known, so that people who were never sent to can never match (``~read`` alone is refused, ``delivered & ~read`` is not).
    """

    name: str
    label: str
    short_name: str
    """For titles, as in "not read": the wave is called "Retarget: Summer Sale (not read)"."""
    expression: str
    apart: str | None = None
    """People of whom the answer cannot be known (yet), as an expression. They are counted apart and left out unless asked for."""
    apart_label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a channel's provider can do; the contract suite chooses its checks by these."""

    idempotent_sends: bool = False
    """The same token sent twice reaches the person once (web push with a Topic): after a crash such messages are sent again."""
    webhooks: bool = True
    """Receipts arrive over HTTP; ``verify`` and ``parse`` are then required."""
    signed_webhooks: bool = True
    """A webhook request proves by itself that the provider made it. Where it does not (a browser's beacon), the token is the
    only proof: a receipt without one of ours is then refused, and nothing of it kept."""
    batch_size: int = 50
    """How many messages one call of ``send`` may be handed (1 to 1,000)."""
    look_up: bool = False
    """``look_up`` can find out at the provider whether it took a message."""
    fetch_receipts: bool = False
    """``fetch_receipts`` can find out at the provider what became of messages that no webhook has told of."""
    templates: bool = False
    """The provider keeps messages that contents only fill in, and ``list_templates`` says which."""
    browsers: bool = False
    """Addresses are those of browsers, which register them by themselves from an app's pages; ``make_app_keys`` and
    ``describe_app_keys`` are then required."""
    tracked_links: tuple[str, ...] = ()
    """Fields of the content in whose texts links are tracked: ``("body",)``, or ``("buttons.url",)`` for the ``url`` of every
    button. The links in a message then lead through the server, which reports ``clicked``, and ``scanned`` where it is
    declared and a machine follows a link."""


STORED = "stored"
"""The validation context of an address that comes from our own tables, for a message that is about to be sent."""


def _take_stored(value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> object:
    return value if info.context is STORED and isinstance(value, str) else handler(value)


CHECKED_ONCE = WrapValidator(_take_stored)
"""Put it last into the ``Annotated`` of a text whose checks cost more than a message may: they passed when it was stored,
and are left out when it is read for a message. A phone number's take 40 us, the rest of an SMS a hundred."""


class Address(BaseModel, ABC):
    """Where one subscription of a contact is reached. Subclass it with your fields and validators."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    @property
    @abstractmethod
    def key(self) -> str:
        """The same string for the same address, however it was written; at most 2,048 characters. Never shown or logged."""


class Content(BaseModel):
    """What a campaign says on this channel. Every string in it is a Liquid template until it reaches ``send``, rendered.

    The text below a field is its description in the schema, which people who write messages read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Settings(BaseModel):
    """The operator's settings for a channel, read from ``AFTERTOUCH_<CHANNEL>_<FIELD>``. Use ``SecretStr`` for secrets.

    The text below a field is its description, for whoever sets it.
    """

    by_app: ClassVar[frozenset[str]] = frozenset()
    """Fields that an app may set for itself, to send from an account of its own. Whoever does sets all of them: nothing of the
    operator's account is used along with it. The other fields stay the operator's; never name one here that decides which host is
    spoken to, since apps are strangers to the operator's network."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)


A = TypeVar("A", bound="Address", covariant=True)
C = TypeVar("C", bound="Content", covariant=True)


@dataclass(frozen=True, kw_only=True)
class Message(Generic[A, C]):
    """One message to one subscription."""

    token: str
    """24 characters of the base64url alphabet that name campaign and recipient and cannot be forged. It is the same when the
    message is sent again. Put it into the provider's echo field, so that receipts carry it back."""
    address: A = field(repr=False)
    content: C = field(repr=False)
    app_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What ``make_app_keys`` made for the app that it comes from."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How fast messages that share something may leave. All workers together keep it."""

    key: str
    """What the messages share, at most 200 characters: ``account``, a sender, the host of a push service. Where they share a
    person, put a hash of the address."""
    interval: timedelta = timedelta(0)
    """Between two messages: 12.5 ms for 80 a second. Zero where only the provider ever holds messages back, by asking for a rest
    or by being in trouble: each limit rests by itself."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What the provider takes for one message.

    Raises:
        ValueError: it is none.
    """

    amount: Decimal
    """From 0 to less than a million; kept to a millionth."""
    currency: str
    """ISO 4217, as in ``USD``."""

    def __post_init__(self) -> None:
        """A wrong one would be met only when costs are added up."""
        if not isinstance(self.amount, Decimal) or not (self.amount.is_finite() and 0 <= self.amount < 1_000_000):
            raise ValueError(f"{self.amount!r} is not a Decimal from 0 to less than a million")
        if not re.fullmatch("[A-Z]{3}", self.currency):
            raise ValueError(f"{self.currency!r} is not a currency of three capitals")


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The provider took the message."""

    message_id: str = ""
    """The provider's name for it, at most 256 characters; empty where it has none."""
    signals: tuple[str, ...] = ()
    """Declared signals that are already known to be true, besides ``sent``."""
    price: Price | None = None
    """What it costs, where the provider's answer or the operator's settings say so. A chain's report adds it up."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The provider certainly did not take the message, or we refused it before asking (a limit)."""

    code: str
    """The provider's code, or a word of yours (``payload_too_large``); its class is looked up in ``Channel.reasons``."""
    retry_after: timedelta | None = None
    """What the provider asked for, if it did."""
    limit: str = ""
    """With a code of the class ``rate``: the key of the limit that is exhausted; empty for the message's first."""


@dataclass(frozen=True, kw_only=True)
class Unclear:
    """The message may or may not have been taken: a timeout or a reset after the request had left.

    It is not sent again unless the channel's sends are idempotent; a receipt that carries the token settles it, or ``look_up``.
    """

    detail: str
    """For the operator; no address, no body, no secret."""


Outcome = Accepted | Refused | Unclear


@dataclass(frozen=True, kw_only=True)
class NotTaken:
    """The provider certainly never took the message, so that it may be sent: an answer of ``look_up``."""


Finding = Accepted | NotTaken | Unclear


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Why the provider would not take a content, whoever gets it."""

    field: str
    """Of the content, as in ``template`` or ``body[0]``."""
    text: str
    """For the caller, who can mend it."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A message that the provider keeps for the account, and that a content fills in.

    The words are Liquid over the content's own fields, for whoever wants to see what people will get: ``Hi {{ body[0] }}``.
    ``write_words`` writes them. A text of more than 4,000 characters is not shown, nor a twenty-first button.
    """

    name: str
    language: str = ""
    """As the provider names it; empty where it knows none."""
    status: str = ""
    """The provider's word for whether it may be sent, as in ``APPROVED``."""
    is_usable: bool = True
    """A message that uses it would be taken now."""
    content: Mapping[str, object]
    """A content that uses it: what a form begins with, with empty texts where somebody has to fill something in."""
    header: str = ""
    body: str = ""
    footer: str = ""
    buttons: tuple[str, ...] = ()


class TemplatesUnreadable(Exception):
    """The provider does not say which templates there are. The text says why, to whoever asked: no secret, no address."""


def write_words(text: str, placeholder: re.Pattern[str], fields: Mapping[str, str]) -> str:
    """A provider's text as Liquid over a content.

    Args:
        placeholder: what stands in the text for a value; its one group is the value's name.
        fields: the content's field for each name, as in ``{"1": "body[0]"}``. What is not filled in yet shows its name.
    """
    literals_and_names = placeholder.split(text)
    for at, part in enumerate(literals_and_names):
        if at % 2 == 0:
            literals_and_names[at] = part.replace("{", "{{ '{' }}")
        else:
            literals_and_names[at] = f"{{{{ {fields[part]} | default: '[{part}]' }}}}" if part in fields else f"[{part}]"
    return "".join(literals_and_names)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one message is billed as."""

    units: int
    unit: str
    """For people, in the plural: ``segments``."""
    cost: Decimal | None = None
    """None where the price is not known."""
    currency: str = ""
    """ISO 4217, with ``cost``."""


@dataclass(frozen=True, kw_only=True)
class WebhookRequest:
    """A provider's HTTP request, untouched."""

    method: str
    url: str
    """The public address as it was configured at the provider, with path and query exactly as received."""
    path: str
    """What follows the channel's webhook address, without a leading slash; often empty."""
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes = field(repr=False)

    @cached_property
    def query(self) -> Mapping[str, str]:
        """The first value of every query parameter."""
        return dict(reversed(parse_qsl(self.url.partition("?")[2], keep_blank_values=True)))


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """News of one message: the signal that became true, of whom, when and why."""

    signal: str
    token: str | None = None
    """The token that the provider echoed. Without it ``message_id`` names the message."""
    message_id: str | None = None
    time: datetime | None = None
    """When it happened, aware; None when the provider does not say (the time of arrival is taken)."""
    code: str | None = None
    """With ``failed``: the provider's code."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A person wrote to us. It becomes a signal of the message that it answers: the one that it names, or else the last that was
    sent to the address in the days before."""

    address: Address = field(repr=False)
    """Where it came from."""
    message_id: str | None = None
    """The message that it answers, by the provider's name, where the provider says so."""
    signal: str = "replied"
    """One that the channel declares."""
    time: datetime | None = None
    """Aware; None when the provider does not say."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The provider tells that the person behind an address said stop to it, or took that back.

    It holds for everybody who has the address on this channel, in all apps that share the sender that was spoken to: the one app
    whose own settings these are, or all that have none. What callers themselves recorded as an opt-out is not taken back by it.
    """

    address: Address = field(repr=False)
    state: Literal["opted_out", "active"]
    reason: str
    """The word or code by which it was said, as in ``STOP``; at most 64 characters."""
    time: datetime | None = None
    """Aware; None when the provider does not say."""


@dataclass(frozen=True, kw_only=True)
class WebhookAnswer:
    """What the provider gets back once the receipts are durable."""

    status: int = 204
    body: str = ""
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Webhook:
    """What a webhook request said."""

    receipts: tuple[Receipt, ...] = ()
    replies: tuple[Reply, ...] = ()
    """Only of a webhook that is signed."""
    standings: tuple[Standing, ...] = ()
    """Only of a webhook that is signed."""
    unrecognized: tuple[str, ...] = ()
    """Items that were authentic but not understood (a new status), as text. They are kept for the operator, never an error."""
    answer: WebhookAnswer = WebhookAnswer()


class InvalidSignature(Exception):
    """The request does not prove that it comes from the provider: answered 403, nothing is stored."""


class InvalidWebhook(Exception):
    """The request is authentic but makes no sense: answered 400, nothing is stored. The text reaches the caller."""


class Channel(ABC):
    """A way to reach people. The server makes one object per channel, and one for each app that has settings of its own, and
    enters each as an async context manager."""

    name: ClassVar[str]
    """Lower-case word of up to 32 letters, digits and hyphens: ``sms``."""
    label: ClassVar[str]
    address_model: ClassVar[type[Address]]
    content_model: ClassVar[type[Content]]
    settings_model: ClassVar[type[Settings]]
    capabilities: ClassVar[Capabilities]
    signals: ClassVar[tuple[Signal, ...]]
    """The channel's own signals, besides the four that every channel has."""
    actions: ClassVar[tuple[Action, ...]]
    reasons: ClassVar[Mapping[str, ReasonClass]]
    """The class of each code that ``send`` and ``parse`` can bring."""
    capped_for: ClassVar[Mapping[str, timedelta]] = {}
    """For codes of the class ``capped``: how long the person is left alone on this channel, where it is not 24 hours."""

    def __init__(self, settings: Settings, *, webhook_url: str) -> None:
        """Keep the settings; do no I/O here.

        Args:
            settings: an instance of this class's ``settings_model``.
            webhook_url: the public address of this channel's webhooks; paths below it are yours too.
        """
        self.settings = settings
        self.webhook_url = webhook_url

    async def __aenter__(self) -> Self:
        """Open what sending needs (an HTTP session). Called once, in the event loop that will send."""
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close it again."""
        return

    def parse_address(self, values: Mapping[str, object]) -> Address:
        """Check what a caller gives as an address. Override it where the settings decide what is allowed (which hosts).

        Raises:
            pydantic.ValidationError: with the fields and reasons that the caller is shown.
        """
        return self.address_model.model_validate(values)

    @abstractmethod
    async def send(self, messages: Sequence[Message[Address, Content]]) -> Sequence[Outcome]:
        """Send each message and say what became of it: one outcome per message, in their order.

        Never raises for a provider's trouble; an exception is taken for a bug, and every message of the batch for ``Unclear``.
        Set a timeout on every call, follow no redirects, and keep the provider's limits before asking it.
        """

    @classmethod
    def make_app_keys(cls) -> Mapping[str, str]:
        """Make keys of its own for an app. Called once for each app; the server keeps them encrypted."""
        raise NotImplementedError

    def describe_app_keys(self, app_keys: Mapping[str, str]) -> Mapping[str, str]:
        """What an app's pages have to know to subscribe a browser: a public key. Everybody can read it."""
        raise NotImplementedError

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        """The limits that a message counts against, the most general first; none by default. Pure; called for every message."""
        return ()

    async def check_content(self, content: Content) -> Sequence[Problem]:
        """Ask the provider, before a campaign is launched, whether it would take the content: is the template approved?

        Its strings are still Liquid templates. What cannot be found out is no problem. Raise an exception when the provider
        cannot be asked: then the launch goes on, with a warning in the log.
        """
        return ()

    async def list_templates(self) -> Sequence[Template]:
        """Ask the provider for the templates of the account, in all languages and states.

        Only called when ``capabilities.templates`` is set, at most once a minute.

        Raises:
            TemplatesUnreadable: it does not say, or a setting is missing that leads to them.
        """
        raise NotImplementedError

    def estimate(self, content: Content) -> Estimate | None:
        """What a rendered content would be billed as, for callers who want to know before they launch. Pure; None by default."""
        return None

    async def look_up(self, messages: Sequence[Message[Address, Content]], since: datetime) -> Sequence[Finding]:
        """Find out at the provider what became of messages whose outcome is unclear: one finding per message, in their order.

        Only called when ``capabilities.look_up`` is set, and not within the first seconds after the attempt. ``NotTaken`` has the
        message sent again, so it must be certain; ``Unclear`` has it looked up once more later.

        Args:
            messages: as they were handed to ``send``.
            since: before the first of them was attempted; an older message of the provider's is none of these.
        """
        raise NotImplementedError

    async def fetch_receipts(self, message_ids: Sequence[str]) -> Sequence[Receipt]:
        """Ask the provider what became of messages, by its own names for them, and return what is news beyond ``sent``.

        Only called when ``capabilities.fetch_receipts`` is set, some time after a message was taken of which nothing was heard.
        Receipts name their message by ``message_id``. What the provider does not say, or does not know yet, is left out.

        Args:
            message_ids: at most ``capabilities.batch_size``.
        """
        raise NotImplementedError

    def verify(self, request: WebhookRequest) -> None:
        """Raise ``InvalidSignature`` unless the request proves where it comes from. Pure: bytes and headers in, nothing else."""
        raise NotImplementedError

    def parse(self, request: WebhookRequest) -> Webhook:
        """Turn a verified request into receipts. Pure. One strange item must not lose the rest."""
        raise NotImplementedError

    @classmethod
    def classify(cls, code: str) -> ReasonClass:
        """The class of a code; ``UNKNOWN`` for one that nobody has met yet."""
        return cls.reasons.get(code, ReasonClass.UNKNOWN)

    @classmethod
    def find_cap(cls, code: str) -> timedelta:
        """How long a code of the class ``capped`` holds a person: 24 hours, where ``capped_for`` does not say."""
        return cls.capped_for.get(code, timedelta(hours=24))


def parse_retry_after(text: str | None) -> timedelta | None:
    """Read a Retry-After header: seconds or a date (RFC 9110, section 10.2.3); None where it is absent or makes no sense."""
    if text is None:
        return None
    if re.fullmatch(r"[0-9]{1,7}", text):
        return timedelta(seconds=int(text))
    try:
        due = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(due - datetime.now(UTC), timedelta()) if due.tzinfo else None
