"""Enrolment: browsers that register themselves, for the person whom the site's backend vouches for.

An address belongs to one person of an app: whoever logs in on a shared device takes it over, so that nobody's messages appear
on another one's screen. A browser that renews its subscription by itself has no identity at hand; that it knows the endpoint
before, which only the push service and we know, is proof enough to put another in its place.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.channels import Address, Channel
from aftertouch.errors import FieldsInvalid, IdentityInvalid, NotFound, TooManyRequests, Violation
from aftertouch.identity import InvalidIdentity, read_identity
from aftertouch.ingest.accounts import Accounts
from aftertouch.kept import Kept
from aftertouch.plugins import Registry
from aftertouch.rolls.chunks import block_of
from aftertouch.rolls.sql import lock_blocks
from aftertouch.store.app_secrets import ensure_app_keys, read_identity_secrets
from aftertouch.store.apps import App, find_app, is_app_name
from aftertouch.store.contacts import (
    Contact,
    Subscriber,
    Subscription,
    find_numbers,
    find_subscribers,
    hash_address,
    list_surplus,
    lock_addresses,
    mark_heard,
    put_subscriptions,
    set_states,
    upsert_contacts,
)
from aftertouch.store.engine import transaction
from aftertouch.store.paces import take_room
from aftertouch.vault import Vault

MOST_DEVICES = 20
"""Active browsers of one person on a channel; the one that was heard of least recently makes room."""
EVERY, AHEAD = timedelta(seconds=6), timedelta(seconds=54)
"""A person, or an unknown browser, may change subscriptions ten times in a minute, over all server processes."""
KEEP_SECONDS = 1.0
"""How long an app's settings are remembered; strangers' calls cost no query of the database more often."""


@dataclass(frozen=True)
class Site:
    """What an app's pages are told, and what their calls are checked by."""

    app: App
    channel: Channel
    identity_secrets: tuple[str, ...]
    told: Mapping[str, str]
    """The channel's public keys."""


class Enrolment:
    """Takes what browsers say of themselves."""

    def __init__(self, engine: AsyncEngine, registry: Registry, accounts: Accounts, vault: Vault) -> None:
        self._engine = engine
        self._registry = registry
        self._accounts = accounts
        self._vault = vault
        self._sites: Kept[tuple[str, str], tuple[float, Site | None]] = Kept(10_000)

    async def find_site(self, channel_name: str, app_name: str, now: float) -> Site:
        """The app and channel that a page names; ``now`` is of any clock that only goes on.

        Raises:
            NotFound, ChannelNotReady, DatabaseUnavailable.
        """
        found = self._registry.types.get(channel_name)
        if found is None or not found.channel.capabilities.browsers or not is_app_name(app_name):
            raise NotFound(f"apps/{app_name[:63]} on the channel {channel_name[:32]}")
        kept = self._sites.get((channel_name, app_name))
        if kept is None or kept[0] <= now:
            kept = now + KEEP_SECONDS, await self._read_site(channel_name, app_name)
            self._sites.put((channel_name, app_name), kept)
        if kept[1] is None:
            raise NotFound(f"apps/{app_name}")
        return kept[1]

    async def _read_site(self, channel_name: str, app_name: str) -> Site | None:
        async with transaction(self._engine) as conn:
            app = await find_app(conn, app_name)
            if app is None:
                return None
            secrets = await read_identity_secrets(conn, self._vault, app.app_id)
            channel = self._accounts.build(await self._accounts.choose(conn, app, channel_name))
            keys = await ensure_app_keys(conn, self._vault, app.app_id, type(channel))
        return Site(app, channel, tuple(secrets), channel.describe_app_keys(keys))

    async def subscribe(self, site: Site, address: Address, identity: str, previous: Address | None) -> None:
        """Give an address to the person of an identity, or to those who had the ``previous`` one.

        Raises:
            IdentityInvalid: the site's backend did not sign it.
            NotFound: there is no identity, and nobody had the previous address.
            TooManyRequests, DatabaseUnavailable.
        """
        external_id = _read_external_id(site, identity) if identity else None
        app_id, channel, key = site.app.app_id, site.channel.name, hash_address(address.key)
        before = key if previous is None else hash_address(previous.key)
        async with transaction(self._engine) as conn:
            await _take_room(conn, site, external_id or (previous or address).key)
            await lock_addresses(conn, [key, before])
            if external_id is not None:
                await upsert_contacts(conn, app_id, [Contact(external_id, {})])
                numbers = list((await find_numbers(conn, app_id, [external_id])).values())
            else:
                numbers = await _find_renewable(conn, site, before) if previous is not None else []
            if not numbers:
                raise NotFound("a subscription with the previous endpoint")
            ended = [(one.number, key, "moved") for one in await _find_holders(conn, site, key) if one.number not in numbers]
            if before != key:
                ended += [(one.number, before, "replaced") for one in await _find_holders(conn, site, before)]
            # All at once and in order: two calls that hand over in opposite directions would wait for each other.
            await lock_blocks(conn, [block_of(app_id, number) for number in [*numbers, *(number for number, _, _ in ended)]])
            await set_states(conn, app_id, [(number, channel, other, "invalid", reason) for number, other, reason in ended])
            given = Subscription(channel, address.model_dump(mode="json"), address.key, "active")
            await put_subscriptions(conn, app_id, [(number, given) for number in numbers])
            await mark_heard(conn, app_id, channel, key, numbers)
            surplus = await list_surplus(conn, app_id, channel, numbers, MOST_DEVICES)
            await set_states(
                conn, app_id, [(number, channel, other, "invalid", "too many browsers") for number, other in surplus]
            )

    async def unsubscribe(self, site: Site, address: Address) -> None:
        """End an address's subscription, whoever's it is. One that nobody has is ended already.

        Raises:
            TooManyRequests, DatabaseUnavailable.
        """
        async with transaction(self._engine) as conn:
            await _take_room(conn, site, address.key)
            await lock_addresses(conn, [key := hash_address(address.key)])
            holders = await _find_holders(conn, site, key)
            changes = [(one.number, site.channel.name, key, "opted_out", "unsubscribed in the browser") for one in holders]
            await set_states(conn, site.app.app_id, changes)


def _read_external_id(site: Site, identity: str) -> str:
    try:
        external_id = read_identity(site.identity_secrets, identity)
    except InvalidIdentity as error:
        raise IdentityInvalid(str(error)) from error
    if not is_external_id(external_id):
        text = "must be 1 to 200 characters, with no slash, no control characters and no blanks at the ends"
        raise FieldsInvalid([Violation("identity.external_id", text)])
    return external_id


def is_external_id(text: str) -> bool:
    """True for what the API takes as an external_id; ``contacts.proto`` has the same rule as an expression."""

    def is_blank(character: str) -> bool:
        return character.isspace() or unicodedata.category(character).startswith("Z")

    if not 0 < len(text) <= 200 or is_blank(text[0]) or is_blank(text[-1]):
        return False
    return not any(character == "/" or unicodedata.category(character) == "Cc" for character in text)


async def _take_room(conn: AsyncConnection, site: Site, who: str) -> None:
    key = f"browsers/{site.app.app_id}/{hashlib.blake2b(who.encode(), digest_size=16).hexdigest()}"
    ((is_taken, wait),) = (await take_room(conn, {key: EVERY}, AHEAD)).values()
    if not is_taken:
        raise TooManyRequests(wait - AHEAD)


async def _find_holders(conn: AsyncConnection, site: Site, address_hash: bytes) -> list[Subscriber]:
    """Whose address it is: everybody's who had it and neither unsubscribed nor lost it to another person."""
    found = await find_subscribers(conn, site.channel.name, address_hash, site.app.app_id)
    return [one for one in found if one.state != "opted_out" and one.reason != "moved"]


async def _find_renewable(conn: AsyncConnection, site: Site, address_hash: bytes) -> list[int]:
    """For whom a browser may renew its subscription: who is active there, or else whoever else it is of."""
    holders = await _find_holders(conn, site, address_hash)
    return [one.number for one in holders if one.state == "active"] or [one.number for one in holders]
