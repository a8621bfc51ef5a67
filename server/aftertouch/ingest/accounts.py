"""Accounts: with whose settings a channel speaks for an app, which are the server's, or the app's own.

An app's own channel is opened at its first use in a process, replaced when its settings change, and closed after its last use.
The settings are read in the caller's transaction, so whoever sends next sends by the newest; whoever is sending asks every few
seconds whether they still are. Opening comes after that transaction: it may wait for a provider, and connections are everybody's.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from weakref import WeakValueDictionary

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.channels import Channel
from aftertouch.errors import ChannelNotReady, DatabaseUnavailable
from aftertouch.kept import Kept
from aftertouch.plugins import OpeningFailed, Registry, SettingsWrong, enter
from aftertouch.store.app_secrets import OwnSettings, list_own_channels, read_own_settings, read_versions
from aftertouch.store.apps import App, find_app, is_app_name
from aftertouch.store.engine import transaction
from aftertouch.vault import Vault

log = structlog.get_logger()

APPS = "/v1/apps"
"""Below it the webhooks of apps with settings of their own."""
KEEP_SECONDS = 1.0
"""How long it is remembered where a path leads, or that it leads to no app; requests cost no query of the database more often."""
READ_SECONDS = 2.0
"""Then the database hangs."""
MOST_OPEN = 200
"""Channels of apps that stay open for their next use; each has connections to its provider."""
MOST_READS = 100
"""That wait for a database that hangs."""
_SEALED = "the app's own settings cannot be opened: is AFTERTOUCH_SECRET_KEY the one that they were set with?"


Own = tuple[Channel, int]
"""A channel with an app's own settings, and the app's id."""


@dataclass(eq=False)
class Account:
    """A channel with its settings, ready to use."""

    channel: Channel
    app_id: int | None = None
    """The one app whose own it is; None for the server's, which all others share."""
    version: int = 0
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack, repr=False)
    _users: int = 0
    _is_retired: bool = False

    @property
    def scope(self) -> str:
        """What its limits are named by: accounts share none."""
        return self.channel.name if self.app_id is None else f"{self.channel.name}/apps/{self.app_id}"


@dataclass(frozen=True)
class Choice:
    """By whose settings a channel speaks for an app, as of the transaction that read them."""

    name: str
    """The channel's."""
    app: App | None = None
    """The one whose own they are; None for the server's."""
    stored: OwnSettings | None = None
    """Where they are the app's own."""


class Accounts:
    """The channels that a process speaks through."""

    def __init__(self, engine: AsyncEngine, registry: Registry, vault: Vault, public_url: str) -> None:
        self._engine = engine
        self._registry = registry
        self._vault = vault
        self._public_url = public_url
        self._shared = {name: Account(channel) for name, channel in registry.channels.items()}
        self._own: OrderedDict[tuple[int, str], Account] = OrderedDict()
        """Open ones, the least recently used first."""
        self._built: Kept[tuple[int, str, int], Channel] = Kept(MOST_OPEN)
        """Never opened, by app, name and version."""
        self._opening: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()
        """Those that somebody holds or waits for."""
        self._closing: set[asyncio.Task[None]] = set()
        self._found: Kept[tuple[str, str], tuple[float, Own | None]] = Kept(10_000)
        self._reads: dict[tuple[str, str], asyncio.Task[Own | None]] = {}

    async def __aenter__(self) -> Accounts:
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close what apps have of their own; nobody uses it any more."""
        for read in self._reads.values():
            read.cancel()
        if self._reads:
            await asyncio.wait(list(self._reads.values()), timeout=READ_SECONDS)
        for key in list(self._own):
            self._retire(key)
        if self._closing:
            await asyncio.wait(self._closing)

    def name_webhook(self, app: App, channel: str) -> str:
        """Where the provider of an app's own account reports to."""
        return name_webhook(self._public_url, app, channel)

    async def choose(self, conn: AsyncConnection, app: App | None, name: str) -> Choice:
        """By whose settings a channel speaks for an app, or for those that share the server's.

        Raises:
            ChannelNotReady: by nobody's, and why.
        """
        stored = await read_own_settings(conn, self._vault, app.app_id, name) if app is not None else None
        if app is None or stored is None:
            if app is not None:
                self._retire((app.app_id, name))
            if name not in self._shared:
                raise ChannelNotReady(name, self._registry.obstacles.get(name, ("it is not installed",)))
            return Choice(name)
        if name not in self._registry.types:
            raise ChannelNotReady(name, ("it is not installed",))
        return Choice(name, app, stored)

    async def open(self, choice: Choice) -> Account:
        """The account that was chosen, ready to send. It may take half a minute: hold no connection meanwhile.

        Raises:
            ChannelNotReady: it cannot be opened, and why.
        """
        app, stored = choice.app, choice.stored
        if app is None or stored is None:
            return self._shared[choice.name]
        key = (app.app_id, choice.name)
        opening = self._opening.setdefault(key, asyncio.Lock())
        async with opening:
            account = self._own.get(key)
            # Whoever reads in an older transaction may have seen older settings.
            if account is None or account.version < stored.version:
                opened = await self._open(app, choice.name, stored)
                self._retire(key)
                account = self._own[key] = opened
            self._own.move_to_end(key)
            while len(self._own) > MOST_OPEN:
                self._retire(next(iter(self._own)))
            return account

    def build(self, choice: Choice) -> Channel:
        """The channel that was chosen, which may not be open: for what needs no provider, as addresses and webhooks.

        Raises:
            ChannelNotReady: the settings make none.
        """
        app, stored = choice.app, choice.stored
        if app is None or stored is None:
            return self._shared[choice.name].channel
        key = (app.app_id, choice.name, stored.version)
        if (built := self._built.get(key)) is None:
            built = self._build(app, choice.name, stored)
            self._built.put(key, built)
        return built

    async def list_outdated(self, conn: AsyncConnection, used: Collection[tuple[int, Account]]) -> list[tuple[int, Account]]:
        """Those of these apps with an account that have another one by now."""
        versions = await read_versions(conn, {app_id for app_id, _ in used})
        return [pair for pair in used if versions.get((pair[0], pair[1].channel.name), 0) != pair[1].version]

    async def list_ready(self, conn: AsyncConnection, app: App) -> Mapping[str, Channel]:
        """Every channel that an app can speak through, which may not be open."""
        ready = {name: account.channel for name, account in self._shared.items()}
        for name in await list_own_channels(conn, app.app_id):
            try:
                ready[name] = self.build(await self.choose(conn, app, name))
            except ChannelNotReady:
                ready.pop(name, None)
        return ready

    async def find_own(self, app_name: str, name: str, now: float) -> Own | None:
        """An app's own channel that a path names, which may not be open; None where it has none.

        ``now`` is of any clock that only goes on.

        While the database is away it is what it was: webhooks are verified and go into the spool.

        Raises:
            DatabaseUnavailable: and it was never looked at.
        """
        if name not in self._registry.types or not is_app_name(app_name):
            return None
        key = app_name, name
        kept = self._found.get(key)
        if kept is not None and kept[0] > now:
            return kept[1]
        if kept is not None:
            # Whoever comes meanwhile goes by it: a database that hangs holds up a request a second.
            self._found.put(key, (now + KEEP_SECONDS, kept[1]))
        if key not in self._reads:
            if len(self._reads) >= MOST_READS and kept is None:
                raise DatabaseUnavailable
            self._reads[key] = asyncio.create_task(self._read_own(app_name, name), name="read an app's account")
            self._reads[key].add_done_callback(partial(self._forget_read, key))
        read = self._reads[key]
        # Not cancelled when it hangs: psycopg would wait for the server's word on that.
        await asyncio.wait({read}, timeout=READ_SECONDS)
        if read.done():
            try:
                account = read.result()
            except DatabaseUnavailable:
                if kept is None:
                    raise
            else:
                self._found.put(key, (now + KEEP_SECONDS, account))
                return account
        if kept is None:
            raise DatabaseUnavailable
        return kept[1]

    def _forget_read(self, key: tuple[str, str], read: asyncio.Task[Own | None]) -> None:
        del self._reads[key]
        if not read.cancelled():
            # Whoever still waits gets it.
            read.exception()

    async def _read_own(self, app_name: str, name: str) -> Own | None:
        async with transaction(self._engine) as conn:
            app = await find_app(conn, app_name)
            if app is None:
                return None
            try:
                choice = await self.choose(conn, app, name)
                return (self.build(choice), app.app_id) if choice.app is not None else None
            except ChannelNotReady:
                return None

    @contextmanager
    def hold(self, account: Account) -> Iterator[Channel]:
        """Keep an account's channel open meanwhile, whatever becomes of its settings. Enter it without waiting after ``open``."""
        account._users += 1
        try:
            yield account.channel
        finally:
            account._users -= 1
            self._close_unused(account)

    def find_problems(self, app: App, name: str, stored: OwnSettings) -> list[str]:
        """Why an app's own settings make no channel, as far as that shows without opening it."""
        if name not in self._registry.types:
            return ["it is not installed"]
        if stored.values is None:
            return [_SEALED]
        try:
            self._registry.build_own(name, stored.values, self.name_webhook(app, name))
        except SettingsWrong as error:
            return error.texts
        return []

    def _build(self, app: App, name: str, stored: OwnSettings) -> Channel:
        if stored.values is None:
            raise ChannelNotReady(name, (_SEALED,))
        try:
            return self._registry.build_own(name, stored.values, self.name_webhook(app, name))
        except SettingsWrong as error:
            raise ChannelNotReady(name, (f"the app's own settings: {error}",)) from None

    async def _open(self, app: App, name: str, stored: OwnSettings) -> Account:
        built, stack = self._build(app, name, stored), AsyncExitStack()
        try:
            channel = await enter(built, stack)
        except OpeningFailed as error:
            raise ChannelNotReady(name, (f"the app's own settings: {error}",)) from None
        log.info("an app's own channel was opened", action="open_channel", app_id=app.app_id, channel=name)
        return Account(channel, app.app_id, stored.version, stack)

    def _retire(self, key: tuple[int, str]) -> None:
        if account := self._own.pop(key, None):
            account._is_retired = True
            self._close_unused(account)

    def _close_unused(self, account: Account) -> None:
        if account._is_retired and not account._users:
            task = asyncio.create_task(_close(account), name="close an app's channel")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def name_webhook(public_url: str, app: App, channel: str) -> str:
    """The public address of an app's own webhooks on a channel."""
    return f"{public_url}{APPS}/{app.app}/webhooks/{channel}"


async def _close(account: Account) -> None:
    try:
        await account._stack.aclose()
    except Exception:
        log.exception("a channel failed", action="close_channel", channel=account.channel.name, app_id=account.app_id)
