"""What an author tells the contract about a channel and its provider.

Only facts that no declaration holds are asked for; everything else is read from the class, so a contract cannot disagree with
its channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, TypeVar

from pydantic import SecretBytes, SecretStr

from aftertouch.channels import Address, Channel, Content, Message, Settings, WebhookRequest
from aftertouch.plugins import build_registry, discover_channels, name_setting
from aftertouch.testing._provider import FakeProvider, ProviderRequest, Response

WEBHOOK_BASE_URL = "https://hooks.example/webhooks"
UNHEARD_OF = "unheard_of"
"""A status that no provider knows today."""
Check = TypeVar("Check", bound=Callable[..., object])
TOKENS = tuple(f"Contract-_Token-{number:08d}" for number in range(5))
"""Tokens with every kind of character that the base64url alphabet has."""


def needs(*capabilities: str) -> Callable[[Check], Check]:
    """Mark a check as one of these capabilities: a channel that does not declare them has no such check, not a skipped one."""

    def mark(check: Check) -> Check:
        check.__dict__["needs"] = capabilities
        return check

    return mark


class Subject:
    """The facts and the provider's manners. In every string of the three mappings ``{provider}`` becomes the provider's URL."""

    channel: ClassVar[type[Channel]]
    settings: ClassVar[Mapping[str, str]] = {}
    """Field names and texts, as they would stand in the environment. Keep the timeout of calls well below ``patience``."""
    address: ClassVar[Mapping[str, object]]
    """As a caller gives it."""
    content: ClassVar[Mapping[str, object]]
    """Rendered, and with texts that you would recognise in a log."""
    refusals: ClassVar[Sequence[str]]
    """Codes that ``refuse`` can play, among them those that you met most."""
    reported: ClassVar[Sequence[str]] = ()
    """Signals that ``sign`` can report, with webhooks."""
    signature_header: ClassVar[str] = ""
    """The lower-case header that proves a webhook; empty where something else does, and then override ``forge``."""
    samples: ClassVar[str] = ""
    """The folder of recorded webhooks, beside the test's file."""
    provider_type: ClassVar[type[FakeProvider]] = FakeProvider
    """What stands in for the provider; a subclass of yours where it speaks no HTTP."""
    patience: ClassVar[float] = 10
    """Seconds that a call to a provider that does not answer may take."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if channel := getattr(cls, "channel", None):
            for name in dir(cls):
                if not all(getattr(channel.capabilities, needed) for needed in getattr(getattr(cls, name), "needs", ())):
                    setattr(cls, name, None)

    def accept(self, request: ProviderRequest) -> Response:
        """The provider takes the message. Give each a name of its own, where the provider does."""
        raise NotImplementedError(f"{type(self).__qualname__} must say how the provider accepts a message")

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        """The provider refuses with one of ``refusals``."""
        raise NotImplementedError(f"{type(self).__qualname__} must say how the provider refuses a message")

    def throttle(self, request: ProviderRequest, retry_after: str | None) -> Response:
        """The provider is asked too fast; with or without the Retry-After that it sends."""
        return Response(status=429, headers={} if retry_after is None else {"Retry-After": retry_after})

    def report_taken(self, request: ProviderRequest, taken: Sequence[Message[Address, Content]]) -> Response:
        """The provider's answer to what ``look_up`` asks, where these messages, or none, are all that it ever took."""
        raise NotImplementedError(f"{type(self).__qualname__} must say what the provider answers to look_up")

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        """The provider's own report of a message's status: one of ``reported``, or a word that nobody knows yet."""
        raise NotImplementedError(f"{type(self).__qualname__} must say how the provider reports a status")

    def forge(self, request: WebhookRequest) -> Mapping[str, WebhookRequest]:
        """Requests that ``verify`` must refuse, by what is wrong with each."""
        assert self.signature_header, "set signature_header, or override forge where another thing proves a webhook"
        signature = request.headers.get(self.signature_header)
        assert signature, f"sign gave no header {self.signature_header!r}, or an empty one"
        wrong = signature[:-1] + ("0" if signature[-1] != "0" else "1")

        def with_signature(value: str) -> WebhookRequest:
            return replace(request, headers={**request.headers, self.signature_header: value})

        bare = {name: value for name, value in request.headers.items() if name != self.signature_header}
        return {
            "no signature": replace(request, headers=bare),
            "an empty signature": with_signature(""),
            "one character of the signature changed": with_signature(wrong),
            "a signature cut short": with_signature(signature[: len(signature) // 2]),
            "a signature with a character outside ASCII": with_signature(signature[:-1] + "é"),
            "a tampered body": replace(request, body=request.body + b" "),
            "no body": replace(request, body=b""),
        }

    def carries_token(self, request: ProviderRequest, token: str) -> bool:
        """True when the request names ``token``. Override it where the provider's echo field is encoded or compressed."""
        text = request.url + "".join(request.headers.values())
        return token in text or token.encode() in request.body

    # What the checks build from those facts.

    def build(self, provider_url: str = "http://127.0.0.1:9") -> Channel:
        """The channel, built from its settings as the server does it."""
        name = self.channel.name
        environment = {name_setting(name, field): str(_place(value, provider_url)) for field, value in self.settings.items()}
        discovery = discover_channels(extra=[self.channel], group="")
        assert not discovery.problems, "; ".join(problem.cause for problem in discovery.problems)
        registry = build_registry(discovery, environment, webhook_base_url=WEBHOOK_BASE_URL)
        assert name in registry.channels, f"`settings` do not build the channel: {'; '.join(registry.obstacles[name])}"
        return registry.channels[name]

    def make_address(self, channel: Channel, provider_url: str = "http://127.0.0.1:9") -> Address:
        """The address, checked as a caller's is."""
        return channel.parse_address({field: _place(value, provider_url) for field, value in self.address.items()})

    def make_content(self, provider_url: str = "http://127.0.0.1:9") -> Content:
        """The content, checked as a campaign's is."""
        return self.channel.content_model.model_validate(
            {field: _place(value, provider_url) for field, value in self.content.items()}
        )

    def make_messages(self, channel: Channel, provider_url: str, count: int = 1) -> list[Message[Address, Content]]:
        """Messages with the first ``count`` tokens."""
        address, content = self.make_address(channel, provider_url), self.make_content(provider_url)
        return [Message(token=token, address=address, content=content) for token in TOKENS[:count]]

    def find_leaks(self, text: str, channel: Channel, message: Message[Address, Content]) -> list[str]:
        """Names of the private things that ``text`` shows."""
        private = {f"settings.{name}": secret for name, secret in _reveal_secrets(channel.settings)}
        private["address.key"] = message.address.key
        private |= {f"address.{path}": leaf for path, leaf in _walk_texts(message.address.model_dump(mode="json"))}
        private |= {f"content.{path}": leaf for path, leaf in _walk_texts(message.content.model_dump(mode="json"))}
        # Words under 8 characters ("en", "body") occur in any log; a phone number is often shown without its plus sign.
        return [name for name, secret in private.items() if len(secret) >= 8 and secret.lstrip("+") in text]

    def find_samples(self, folder_of: Path) -> list[Path]:
        """The recorded webhooks."""
        return sorted((folder_of / self.samples).glob("*.json")) if self.samples else []


def _place(value: object, provider_url: str) -> object:
    match value:
        case str():
            return value.replace("{provider}", provider_url)
        case Mapping():
            return {key: _place(item, provider_url) for key, item in value.items()}
        case list() | tuple():
            return [_place(item, provider_url) for item in value]
        case _:
            return value


def _walk_texts(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    match value:
        case str():
            yield path.lstrip("."), value
        case dict():
            for key, item in value.items():
                yield from _walk_texts(item, f"{path}.{key}")
        case list():
            for at, item in enumerate(value):
                yield from _walk_texts(item, f"{path}.{at}")


def _reveal_secrets(settings: Settings) -> Iterator[tuple[str, str]]:
    for name, value in settings:
        match value:
            case SecretStr():
                yield name, value.get_secret_value()
            case SecretBytes():
                yield name, value.get_secret_value().decode(errors="replace")
