"""Which channels there are: found among the installed distributions, built from their settings, opened and closed.

One plugin never takes another one down: entry points are loaded one by one, each into a pluggy manager of its own, and
whatever a plugin raises becomes a ``PluginProblem`` or an obstacle of its channel. Nothing here logs or reads the process's
environment; the caller shows the problems and passes the mapping.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points

import pluggy
from pydantic import SecretStr, ValidationError

from aftertouch import hookspecs
from aftertouch.channels import Channel, Settings
from aftertouch.declarations import ChannelType, InvalidDeclaration, compile_channel

OPEN_SECONDS = 30
"""How long one channel may take to open before it counts as failed and the others go on."""


@dataclass(frozen=True, kw_only=True)
class PluginProblem:
    """Why a plugin, or one of its channels, is not available."""

    distribution: str
    entry_point: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """What was found, and what was found broken."""

    types: Mapping[str, ChannelType]
    problems: tuple[PluginProblem, ...]


class SettingsWrong(Exception):
    """An app's own settings for a channel cannot be used; ``faults`` are fields with what is wrong, without values."""

    def __init__(self, faults: Iterable[tuple[str, str]]) -> None:
        self.faults = tuple(faults)
        super().__init__("; ".join(self.texts))

    @property
    def texts(self) -> list[str]:
        """What is wrong, with the fields."""
        return [f"{field}: {text}" if field else text for field, text in self.faults]


@dataclass(frozen=True, kw_only=True)
class Registry:
    """Every known channel by name. A known channel is either in ``channels`` or has its ``obstacles``.

    One with obstacles keeps its type, so its campaigns stay readable and its actions can be counted; it cannot send or take
    webhooks.
    """

    types: Mapping[str, ChannelType]
    channels: Mapping[str, Channel]
    """Built from complete settings: they check addresses and take webhooks, and inside ``open`` they send."""
    obstacles: Mapping[str, tuple[str, ...]]
    """Why a known channel is not usable, by environment names, never with a value."""
    problems: tuple[PluginProblem, ...]
    given: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    """The operator's settings by channel, as they stand in the environment."""

    def build_own(self, name: str, own: Mapping[str, str], webhook_url: str) -> Channel:
        """Build a known channel from an app's own settings, with the operator's in those fields only that apps may not set.

        Raises:
            SettingsWrong
        """
        declared = self.types[name].channel
        by_app = declared.settings_model.by_app
        if foreign := sorted(own.keys() - by_app):
            allowed = f"an app sets {', '.join(sorted(by_app))}" if by_app else "apps have no settings of their own here"
            raise SettingsWrong((field, allowed) for field in foreign)
        values = {field: value for field, value in self.given.get(name, {}).items() if field not in by_app} | dict(own)
        try:
            return declared(declared.settings_model.model_validate(values), webhook_url=webhook_url)
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            raise SettingsWrong(
                (
                    str(fault["loc"][0]) if fault["loc"] else "",
                    _redact(fault["msg"].removeprefix("Value error, "), values.values()),
                )
                for fault in faults
            ) from None
        except Exception as error:
            raise SettingsWrong([("", f"building failed: {_describe(error, values.values())}")]) from None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Registry]:
        """Open every built channel and hand out the registry of those that did; the others have become obstacles."""
        opened: dict[str, Channel] = {}
        obstacles = dict(self.obstacles)
        async with AsyncExitStack() as stack:
            for name, channel in self.channels.items():
                try:
                    opened[name] = await enter(channel, stack)
                except OpeningFailed as error:
                    obstacles[name] = (str(error),)
            yield replace(self, channels=opened, obstacles=obstacles)


class OpeningFailed(Exception):
    """A channel cannot be opened; the text says why, without its settings' values."""


async def enter(channel: Channel, stack: AsyncExitStack) -> Channel:
    """Open a channel for as long as the stack.

    Raises:
        OpeningFailed
    """
    try:
        async with asyncio.timeout(OPEN_SECONDS):
            return await stack.enter_async_context(channel)
    except Exception as error:
        raise OpeningFailed(f"opening failed: {_describe(error, _reveal_values(channel.settings))}") from None


def discover_channels(
    *, extra: Iterable[type[Channel]] = (), allowed: frozenset[str] | None = None, group: str = hookspecs.PROJECT
) -> Discovery:
    """Find the channels of every installed distribution; of two with one name the first, by distribution, is taken.

    Args:
        extra: classes that are taken without being installed, before all others.
        allowed: the names to keep; None keeps all.
        group: the entry-point group.
    """
    types: dict[str, ChannelType] = {}
    problems: list[PluginProblem] = []

    def take(candidate: object, distribution: str, version: str, entry_point: str) -> None:
        def report(cause: str) -> None:
            problems.append(PluginProblem(distribution=distribution, entry_point=entry_point, cause=cause))

        try:
            found = compile_channel(candidate, distribution=distribution, version=version)
        except InvalidDeclaration as error:
            for fault in error.faults:
                report(f"{getattr(candidate, '__qualname__', 'channel')}: {fault}")
            return
        except Exception as error:
            report(_describe(error))
            return
        if allowed is not None and found.name not in allowed:
            return
        if found.name in types:
            report(f"channel {found.name!r} is already provided by {types[found.name].distribution}")
            return
        types[found.name] = found

    for channel in extra:
        take(channel, channel.__module__.partition(".")[0], "", "")
    for entry_point in sorted(entry_points(group=group), key=lambda point: (_name_distribution(point), point.name)):
        distribution = _name_distribution(entry_point)
        try:
            candidates = list(_load_candidates(entry_point))
        except (Exception, SystemExit) as error:
            problems.append(PluginProblem(distribution=distribution, entry_point=entry_point.name, cause=_describe(error)))
            continue
        for candidate in candidates:
            take(candidate, distribution, entry_point.dist.version if entry_point.dist else "", entry_point.name)
    return Discovery(types=types, problems=tuple(problems))


def build_registry(discovery: Discovery, environment: Mapping[str, str], *, webhook_base_url: str) -> Registry:
    """Build each channel from ``AFTERTOUCH_<CHANNEL>_<FIELD>``; one that lacks a setting gets obstacles instead.

    Args:
        environment: the process's environment. An empty value counts as unset. A name that begins like one of the channel's
            settings but is none of them is an obstacle, since it is a misspelt setting.
        webhook_base_url: what precedes ``/<channel>`` in the public address of a channel's webhooks.
    """
    channels: dict[str, Channel] = {}
    obstacles: dict[str, tuple[str, ...]] = {}
    given: dict[str, Mapping[str, str]] = {}
    prefixes = {name: name_setting(name, "") for name in discovery.types}
    for name, found in discovery.types.items():
        longer = tuple(prefix for prefix in prefixes.values() if len(prefix) > len(prefixes[name]))
        values = given[name] = {
            key.removeprefix(prefixes[name]).lower(): value
            for key, value in environment.items()
            if key.startswith(prefixes[name]) and not key.startswith(longer) and value
        }
        try:
            settings = found.channel.settings_model.model_validate(values)
            channels[name] = found.channel(settings, webhook_url=f"{webhook_base_url.rstrip('/')}/{name}")
        except ValidationError as error:
            obstacles[name] = tuple(_explain_settings(name, error, values))
        except Exception as error:
            obstacles[name] = (f"building failed: {_describe(error, values.values())}",)
    return Registry(types=discovery.types, channels=channels, obstacles=obstacles, problems=discovery.problems, given=given)


def name_setting(channel: str, field: str) -> str:
    """The environment name of a channel's setting."""
    return f"{hookspecs.PROJECT}_{channel.replace('-', '_')}_{field}".upper()


def _name_distribution(entry_point: EntryPoint) -> str:
    return entry_point.dist.name if entry_point.dist else "unknown distribution"


def _load_candidates(entry_point: EntryPoint) -> Iterator[object]:
    """Load one plugin and ask it for its channels. Imports foreign code."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(entry_point.load(), name=entry_point.name)
    manager.check_pending()
    hook = manager.hook.aftertouch_register_channels
    if not hook.get_hookimpls():
        raise LookupError(f"{entry_point.value} has no function {hook.name} marked with aftertouch.hookspecs.hookimpl")
    for answer in hook():
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise TypeError(f"{hook.name} returned {type(answer).__name__} where a list of channel classes is expected")
        yield from answer


def _explain_settings(channel: str, error: ValidationError, values: Mapping[str, str]) -> Iterator[str]:
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        name = name_setting(channel, str(fault["loc"][0]) if fault["loc"] else "*")
        match fault["type"]:
            case "missing":
                yield f"{name} is missing"
            case "extra_forbidden":
                yield f"{name} is not a setting of this channel"
            case _:
                yield f"{name}: {_redact(fault['msg'], values.values())}"


def _describe(error: BaseException, secrets: Iterable[str] = ()) -> str:
    """An exception in one line, with the place it comes from and without ``secrets``."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {_redact(' '.join(str(error).split()), secrets)}{place}"


def _redact(text: str, secrets: Iterable[str]) -> str:
    """Blank what an author's own message may quote; shorter values than 4 characters would blank ordinary words."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= 4:
            text = text.replace(secret, "…")
    return text


def _reveal_values(settings: Settings) -> list[str]:
    plain = (value.get_secret_value() if isinstance(value, SecretStr) else value for _, value in settings)
    return [value for value in plain if isinstance(value, str)]
