"""What a channel class declares, checked as a whole and compiled once.

The server and the contract suite for channel authors run this same code, so a class that passes its author's tests is one
that the server takes.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from pydantic.errors import PydanticInvalidForJsonSchema

from aftertouch.channels import Action, Address, Capabilities, Channel, Content, ReasonClass, Settings, Signal
from aftertouch.signals import CORE_IMPLICATIONS, RESERVED, Expression, ExpressionError, close_implications, parse

_CHANNEL_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_WORD = re.compile(r"[a-z][a-z0-9_]{0,31}")
_LARGEST_BATCH = 1_000
OPTIONAL_METHODS: Mapping[str, str] = {"look_up": "look_up", "fetch_receipts": "fetch_receipts", "list_templates": "templates"}
"""Methods of a channel, each with the capability without which nobody calls it."""

UNCLEAR = Action(
    name="unclear",
    label="Outcome unknown",
    short_name="outcome unknown",
    expression="attempted & ~sent & ~failed & ~skipped",
)
"""An action of every channel: a crash or a silent provider leaves people of whom nobody can say more."""


class InvalidDeclaration(Exception):
    """A class cannot be used as a channel; ``faults`` says everything that is wrong with it."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.faults))


@dataclass(frozen=True, kw_only=True)
class CompiledAction:
    """An action and its expressions, parsed."""

    action: Action
    expression: Expression
    apart: Expression | None

    @property
    def reasoned(self) -> str | None:
        """The signal by whose reasons the action can be narrowed: fewer of it have to mean fewer people."""
        if self.action is UNCLEAR:
            return None
        if "failed" in self.expression.names:
            return "failed"
        return "clicked" if self.expression == Expression("name", name="clicked") else None


@dataclass(frozen=True, kw_only=True)
class ChannelType:
    """A channel class, where it comes from, and its declarations in the form that counting needs."""

    channel: type[Channel]
    distribution: str
    version: str
    evidence: Mapping[str, frozenset[str]]
    """Per signal, the server's own included: the signals that prove it, itself among them."""
    actions: Mapping[str, CompiledAction]
    """The channel's own in its order, then ``UNCLEAR``."""

    @property
    def name(self) -> str:
        """The channel's name."""
        return self.channel.name


def compile_channel(candidate: object, *, distribution: str, version: str) -> ChannelType:
    """Check everything that ``candidate`` declares and compile it.

    Raises:
        InvalidDeclaration: with every fault that was found.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, Channel)):
        raise InvalidDeclaration([f"{candidate!r} is not a subclass of aftertouch.channels.Channel"])
    if faults := list(_find_type_faults(candidate)):
        raise InvalidDeclaration(faults)
    faults = [*_find_name_faults(candidate), *_find_model_faults(candidate), *_find_settings_faults(candidate)]
    faults += _find_capability_faults(candidate)
    if faults:
        raise InvalidDeclaration(faults)
    try:
        evidence = close_implications({**CORE_IMPLICATIONS, **{signal.name: signal.implies for signal in candidate.signals}})
    except ExpressionError as error:
        raise InvalidDeclaration([f"signals: {error}"]) from error
    actions: dict[str, CompiledAction] = {}
    for action in (*candidate.actions, UNCLEAR):
        try:
            expression = parse(action.expression, evidence)
            apart = None if action.apart is None else parse(action.apart, evidence)
        except ExpressionError as error:
            faults.append(f"action {action.name!r}: {error}")
        else:
            actions[action.name] = CompiledAction(action=action, expression=expression, apart=apart)
    if faults:
        raise InvalidDeclaration(faults)
    return ChannelType(channel=candidate, distribution=distribution, version=version, evidence=evidence, actions=actions)


def _find_type_faults(channel: type[Channel]) -> Iterator[str]:
    """Whatever would make a later check, or the server, stumble over a type."""
    if missing := sorted(getattr(channel, "__abstractmethods__", ())):
        yield f"{channel.__qualname__} does not implement {', '.join(missing)}"
    elif not inspect.iscoroutinefunction(channel.send):
        yield "send is not an async function"
    for attribute, kind in (("name", str), ("label", str), ("capabilities", Capabilities), ("reasons", Mapping)):
        value = getattr(channel, attribute, None)
        if not isinstance(value, kind):
            yield f"{attribute} is {value!r} where a {kind.__name__} is expected"
    for attribute, base in (("address_model", Address), ("content_model", Content), ("settings_model", Settings)):
        value = getattr(channel, attribute, None)
        if not (isinstance(value, type) and issubclass(value, base)):
            yield f"{attribute} is {value!r} where a subclass of {base.__name__} is expected"
        elif inspect.isabstract(value):
            yield f"{attribute} {value.__qualname__} does not implement {', '.join(sorted(value.__abstractmethods__))}"
    for attribute, item in (("signals", Signal), ("actions", Action)):
        value = getattr(channel, attribute, None)
        if not (isinstance(value, tuple) and all(isinstance(member, item) for member in value)):
            yield f"{attribute} is {value!r} where a tuple of {item.__name__} is expected"


def _find_name_faults(channel: type[Channel]) -> Iterator[str]:
    if not _CHANNEL_NAME.fullmatch(channel.name):
        yield f"name {channel.name!r} is not a lower-case word of up to 32 letters, digits and hyphens"
    if not channel.label.strip():
        yield "label is empty"
    for kind, members in (("signal", channel.signals), ("action", channel.actions)):
        for name, count in Counter(member.name for member in members).items():
            if not _WORD.fullmatch(name):
                yield f"{kind} {name!r} is not a lower-case word of up to 32 letters, digits and underscores"
            if count > 1:
                yield f"{kind} {name!r} is declared {count} times"
        for member in members:
            if not member.label.strip():
                yield f"{kind} {member.name!r} has an empty label"
    for signal in channel.signals:
        if signal.name in RESERVED:
            yield f"signal {signal.name!r} is the server's own and must not be declared"
        if isinstance(signal.implies, str):
            yield f"signal {signal.name!r} implies the text {signal.implies!r} where a tuple of names is expected"
    for action in channel.actions:
        if action.name == UNCLEAR.name:
            yield f"action {action.name!r} is the server's own and must not be declared"
        if not action.short_name.strip():
            yield f"action {action.name!r} has an empty short_name"
        if (action.apart is None) != (action.apart_label is None):
            yield f"action {action.name!r} needs both apart and apart_label, or neither"


def _find_model_faults(channel: type[Channel]) -> Iterator[str]:
    for model in (channel.address_model, channel.content_model, channel.settings_model):
        try:
            model.model_json_schema()
        except PydanticInvalidForJsonSchema as error:
            yield f"{model.__qualname__} has no JSON schema: {error.message}"
    for name, setting in channel.settings_model.model_fields.items():
        if name != name.lower():
            yield f"setting {name!r} is not lower-case, so no environment name leads to it"
        if setting.validation_alias is not None:
            yield f"setting {name!r} has an alias; it is read by its own name only"


def _find_settings_faults(channel: type[Channel]) -> Iterator[str]:
    if unknown := sorted(channel.settings_model.by_app - channel.settings_model.model_fields.keys()):
        yield f"by_app of {channel.settings_model.__name__} names {', '.join(unknown)}, which are no fields of it"


def _find_capability_faults(channel: type[Channel]) -> Iterator[str]:
    if not 1 <= channel.capabilities.batch_size <= _LARGEST_BATCH:
        yield f"capabilities.batch_size is {channel.capabilities.batch_size}, not 1 to {_LARGEST_BATCH:,}"
    if channel.capabilities.webhooks:
        for method in ("verify", "parse"):
            if getattr(channel, method) is getattr(Channel, method):
                yield f"capabilities.webhooks is True, but {method} is not overridden"
    for method, capability in OPTIONAL_METHODS.items():
        if getattr(channel.capabilities, capability) and getattr(channel, method) is getattr(Channel, method):
            yield f"capabilities.{capability} is True, but {method} is not overridden"
    if channel.capabilities.browsers:
        for method in ("make_app_keys", "describe_app_keys"):
            if inspect.getattr_static(channel, method) is inspect.getattr_static(Channel, method):
                yield f"capabilities.browsers is True, but {method} is not overridden"
    if channel.capabilities.tracked_links and "clicked" not in {signal.name for signal in channel.signals}:
        yield "capabilities.tracked_links is set, but there is no signal 'clicked'"
    for path in channel.capabilities.tracked_links:
        if path.partition(".")[0] not in channel.content_model.model_fields:
            yield f"capabilities.tracked_links names {path!r}, which {channel.content_model.__qualname__} has not"
    for code, reason in channel.reasons.items():
        if not (isinstance(code, str) and isinstance(reason, ReasonClass)):
            yield f"reasons[{code!r}] is {reason!r}: a code is a str and its class a ReasonClass"
