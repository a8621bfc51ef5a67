"""Secrets of apps, sealed: with which a site's backend signs identities, and keys and settings that an app has on a channel."""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog
from sqlalchemy import ColumnElement, delete, exists, insert, literal, select
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Channel
from aftertouch.store.tables import app_secrets, apps, campaigns
from aftertouch.vault import SealBroken, Vault

log = structlog.get_logger()

IDENTITY = "identity"
_SETTINGS = "settings/"
_CHANGED = "changed/"
"""Without a secret: when an app came to another account on a channel, also where it has none any more."""
_SPREAD = timedelta(minutes=1)
"""How much earlier than its commit a change may be dated, and how much longer a batch may be under way by the account before."""
VALID_IDENTITY_SECRETS = 2
"""The newest, and the one before it: a site can change over without an hour in which nobody is known."""


async def create_identity_secret(conn: AsyncConnection, vault: Vault, app_id: int) -> str:
    """Make a secret to sign identities with, and return it; of the earlier ones only the last stays valid."""
    secret = f"is_{secrets.token_urlsafe(32)}"
    await _store(conn, vault, app_id, IDENTITY, secret)
    return secret


async def read_identity_secrets(conn: AsyncConnection, vault: Vault, app_id: int) -> list[str]:
    """The secrets that are valid, newest first."""
    return await _read(conn, vault, app_id, IDENTITY, VALID_IDENTITY_SECRETS)


async def ensure_app_keys(conn: AsyncConnection, vault: Vault, app_id: int, channel: type[Channel]) -> Mapping[str, str]:
    """The keys that an app has on a channel; made by the channel at first use."""
    if not channel.capabilities.browsers:
        return {}
    name = f"keys/{channel.name}"
    if not (found := await _read(conn, vault, app_id, name, 1)):
        # Whoever waits here for another one's keys then finds them: browsers subscribe with one key or the other.
        await _lock(conn, app_id)
        if not (found := await _read(conn, vault, app_id, name, 1)):
            found = [json.dumps(channel.make_app_keys())]
            await _store(conn, vault, app_id, name, found[0])
    keys: Mapping[str, str] = json.loads(found[0])
    return keys


@dataclass(frozen=True)
class OwnSettings:
    """What an app set for itself on a channel."""

    version: int
    """Grows with every change."""
    values: Mapping[str, str] | None
    """By field, as they would stand in the environment; None when they cannot be opened with this secret key."""
    update_time: datetime

    def require_values(self) -> Mapping[str, str]:
        """The values.

        Raises:
            SealBroken: they cannot be opened.
        """
        if self.values is None:
            raise SealBroken("settings")
        return self.values


async def merge_own_settings(
    conn: AsyncConnection, vault: Vault, app_id: int, channel: str, changes: Mapping[str, str]
) -> dict[str, str]:
    """What an app's settings of a channel would be with these changes; an empty text takes one away.

    To be put in the same transaction, which holds them. What cannot be opened any more is begun anew.
    """
    await _lock(conn, app_id)
    stored = await read_own_settings(conn, vault, app_id, channel)
    changed = {**((stored.values if stored else None) or {}), **changes}
    return {field: value for field, value in changed.items() if value}


async def put_own_settings(conn: AsyncConnection, vault: Vault, app_id: int, channel: str, values: Mapping[str, str]) -> None:
    """Take these for an app's settings of a channel, in place of all that it had."""
    await delete_own_settings(conn, app_id, channel)
    await _store(conn, vault, app_id, _name_settings(channel), json.dumps(dict(values)))
    await _note_change(conn, app_id, channel)


async def delete_own_settings(conn: AsyncConnection, app_id: int, channel: str) -> bool:
    """Forget an app's settings of a channel; False when it had none."""
    columns = app_secrets.c
    await _lock(conn, app_id)
    gone = delete(app_secrets).where(columns.app_id == app_id, columns.name == _name_settings(channel))
    if not (await conn.execute(gone)).rowcount:
        return False
    await _note_change(conn, app_id, channel)
    return True


async def has_changed_since(conn: AsyncConnection, app_id: int, channel: str, time: datetime) -> bool:
    """True when something that an app sent on a channel since then may have gone by another account than it has now."""
    columns = app_secrets.c
    changed = exists().where(
        columns.app_id == app_id, columns.name == f"{_CHANGED}{channel}", columns.create_time > time - _SPREAD
    )
    return bool((await conn.execute(select(changed))).scalar())


async def _note_change(conn: AsyncConnection, app_id: int, channel: str) -> None:
    name = f"{_CHANGED}{channel}"
    await conn.execute(delete(app_secrets).where(app_secrets.c.app_id == app_id, app_secrets.c.name == name))
    await conn.execute(insert(app_secrets).values(app_id=app_id, name=name, sealed=b""))


async def read_own_settings(conn: AsyncConnection, vault: Vault, app_id: int, channel: str) -> OwnSettings | None:
    """An app's settings of a channel; None when it has none of its own, which are then the server's."""
    columns, name = app_secrets.c, _name_settings(channel)
    statement = select(columns.secret_id, columns.sealed, columns.create_time)
    row = (await conn.execute(statement.where(columns.app_id == app_id, columns.name == name))).one_or_none()
    if row is None:
        return None
    try:
        values = json.loads(vault.open(app_id, name, row.sealed))
    except SealBroken:
        # Never the server's account instead: an app's people are not to hear from a stranger.
        values = None
    return OwnSettings(row.secret_id, values, row.create_time)


async def list_own_channels(conn: AsyncConnection, app_id: int) -> list[str]:
    """The channels that an app has settings of its own for."""
    columns = app_secrets.c
    rows = await conn.execute(
        select(columns.name)
        .where(columns.app_id == app_id, columns.name.startswith(_SETTINGS, autoescape=True))
        .order_by(columns.name)
    )
    return [row.name.removeprefix(_SETTINGS) for row in rows]


async def read_versions(conn: AsyncConnection, app_ids: Collection[int]) -> dict[tuple[int, str], int]:
    """The versions of the settings that these apps have of their own, by app and channel."""
    columns = app_secrets.c
    rows = await conn.execute(
        select(columns.app_id, columns.name, columns.secret_id).where(
            columns.app_id.in_(app_ids), columns.name.startswith(_SETTINGS, autoescape=True)
        )
    )
    return {(row.app_id, row.name.removeprefix(_SETTINGS)): row.secret_id for row in rows}


async def list_owners(conn: AsyncConnection, channel: str) -> set[int]:
    """The apps that have settings of their own for a channel."""
    rows = await conn.execute(select(app_secrets.c.app_id).where(app_secrets.c.name == _name_settings(channel)))
    return {row.app_id for row in rows}


def is_of_owner() -> ColumnElement[bool]:
    """True of campaigns of apps that have settings of their own for its channel."""
    columns = app_secrets.c
    return exists().where(columns.app_id == campaigns.c.app_id, columns.name == literal(_SETTINGS) + campaigns.c.channel)


async def _lock(conn: AsyncConnection, app_id: int) -> None:
    """Have others who change secrets of the app wait: its row stands for all of them."""
    await conn.execute(select(apps.c.app_id).where(apps.c.app_id == app_id).with_for_update())


def _name_settings(channel: str) -> str:
    return f"{_SETTINGS}{channel}"


async def _store(conn: AsyncConnection, vault: Vault, app_id: int, name: str, secret: str) -> None:
    await conn.execute(insert(app_secrets).values(app_id=app_id, name=name, sealed=vault.seal(app_id, name, secret)))


async def _read(conn: AsyncConnection, vault: Vault, app_id: int, name: str, limit: int) -> list[str]:
    columns = app_secrets.c
    rows = await conn.execute(
        select(columns.sealed).where(columns.app_id == app_id, columns.name == name).order_by(columns.secret_id.desc())
    )
    found = []
    for row in rows:
        try:
            found.append(vault.open(app_id, name, row.sealed))
        except SealBroken as error:
            # Under another secret key an app goes on with new keys, and with the old ones again when that comes back.
            log.error("a secret of an app cannot be opened", action="open_secret", app_id=app_id, name=name, cause=str(error))
    return found[:limit]
