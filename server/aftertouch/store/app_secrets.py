"""Secrets of apps, sealed: with which a site's backend signs identities, and keys that a channel has for each app."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping

import structlog
from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Channel
from aftertouch.store.tables import app_secrets, apps
from aftertouch.vault import SealBroken, Vault

log = structlog.get_logger()

IDENTITY = "identity"
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
        await conn.execute(select(apps.c.app_id).where(apps.c.app_id == app_id).with_for_update())
        if not (found := await _read(conn, vault, app_id, name, 1)):
            found = [json.dumps(channel.make_app_keys())]
            await _store(conn, vault, app_id, name, found[0])
    keys: Mapping[str, str] = json.loads(found[0])
    return keys


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
