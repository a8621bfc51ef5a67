"""Apps and their API keys."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import AlreadyExists
from aftertouch.store.tables import api_keys, apps

DEFAULT_RETENTION_DAYS = 30
SCOPES = ("read", "ingest", "manage", "admin")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class App:
    """A tenant."""

    app_id: int
    app: str
    display_name: str
    retargeting_enabled: bool
    retargetable_since: datetime
    retention_days: int
    quiet_start: int | None
    """Of the quiet hours, in minutes after midnight; None when there are none."""
    quiet_end: int | None
    quiet_time_zone: str
    """Of contacts that have none of their own."""
    cap_messages: int | None
    """How many messages a contact may get within ``cap_hours``; None when there is no cap."""
    cap_hours: int | None
    web_origins: Sequence[str]
    """Of the pages that may subscribe browsers."""
    link_url: str
    """Where tracked links lead, without a slash at the end; empty for the server's own address."""
    create_time: datetime

    @property
    def name(self) -> str:
        """The resource name."""
        return f"apps/{self.app}"


@dataclass(frozen=True)
class ApiKey:
    """A caller's credential, without its secret."""

    api_key: str
    app_id: int
    display_name: str
    scopes: tuple[str, ...]
    create_time: datetime
    revoke_time: datetime | None


def _app(row: Row[Any]) -> App:
    return App(**row._mapping)


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(row.api_key, row.app_id, row.display_name, tuple(row.scopes), row.create_time, row.revoke_time)


def is_app_name(text: str) -> bool:
    """True for what an app can be called; a stranger's path is not looked up otherwise."""
    return _NAME.fullmatch(text) is not None


async def create_app(conn: AsyncConnection, app: str, display_name: str) -> App:
    """Make an app.

    Raises:
        AlreadyExists: its name is taken.
    """
    try:
        return _app((await conn.execute(insert(apps).values(app=app, display_name=display_name).returning(apps))).one())
    except IntegrityError as error:
        raise AlreadyExists(f"apps/{app}") from error


async def find_app(conn: AsyncConnection, app: str) -> App | None:
    """The app of this name."""
    row = (await conn.execute(select(apps).where(apps.c.app == app))).one_or_none()
    return _app(row) if row else None


async def read_app(conn: AsyncConnection, app_id: int) -> App:
    """The app of this number, which exists."""
    return _app((await conn.execute(select(apps).where(apps.c.app_id == app_id))).one())


async def update_app(conn: AsyncConnection, app_id: int, **values: Any) -> App:
    """Change an app."""
    return _app((await conn.execute(update(apps).where(apps.c.app_id == app_id).values(**values).returning(apps))).one())


async def list_apps(conn: AsyncConnection) -> list[App]:
    """All apps, oldest first."""
    return [_app(row) for row in await conn.execute(select(apps).order_by(apps.c.app_id))]


async def set_retargeting(conn: AsyncConnection, app_id: int, *, enabled: bool, since: datetime) -> None:
    """Say whether the plan includes retargeting. Gaining it counts from ``since``: earlier campaigns stay out."""
    values: dict[str, Any] = {"retargeting_enabled": enabled}
    if enabled:
        values["retargetable_since"] = since
    await conn.execute(update(apps).where(apps.c.app_id == app_id, apps.c.retargeting_enabled != enabled).values(values))


def _hash(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


async def create_api_key(conn: AsyncConnection, app_id: int, display_name: str, scopes: Iterable[str]) -> tuple[ApiKey, str]:
    """Make a key and return it with its secret, which is nowhere else: only its hash is stored."""
    public, private = secrets.token_hex(6), secrets.token_urlsafe(32)
    secret = f"at_{public}_{private}"
    statement = (
        insert(api_keys)
        .values(api_key=public, app_id=app_id, display_name=display_name, scopes=sorted(set(scopes)), secret_hash=_hash(secret))
        .returning(api_keys)
    )
    return _api_key((await conn.execute(statement)).one()), secret


async def find_caller(conn: AsyncConnection, secret: str) -> tuple[App, ApiKey] | None:
    """The app and key of a secret; None when there is none or it was revoked."""
    public = secret.removeprefix("at_").partition("_")[0]
    row = (
        await conn.execute(select(api_keys).where(api_keys.c.api_key == public, api_keys.c.revoke_time.is_(None)))
    ).one_or_none()
    if row is None or not secrets.compare_digest(row.secret_hash, _hash(secret)):
        return None
    app = (await conn.execute(select(apps).where(apps.c.app_id == row.app_id))).one()
    return _app(app), _api_key(row)


async def list_api_keys(conn: AsyncConnection, app_id: int, after: str | None, limit: int) -> list[ApiKey]:
    """Keys in the order in which they were made, those after the key with this id."""
    statement = (
        select(api_keys).where(api_keys.c.app_id == app_id).order_by(api_keys.c.create_time, api_keys.c.api_key).limit(limit)
    )
    if after is not None:
        time = select(api_keys.c.create_time).where(api_keys.c.app_id == app_id, api_keys.c.api_key == after).scalar_subquery()
        statement = statement.where(tuple_(api_keys.c.create_time, api_keys.c.api_key) > tuple_(time, after))
    return [_api_key(row) for row in await conn.execute(statement)]


async def revoke_api_key(conn: AsyncConnection, app_id: int, api_key: str, time: datetime) -> bool:
    """Revoke a key from now on; False when the app has none of this id. Revoking again keeps the first time."""
    found = await conn.execute(select(api_keys.c.revoke_time).where(api_keys.c.app_id == app_id, api_keys.c.api_key == api_key))
    if found.one_or_none() is None:
        return False
    await conn.execute(
        update(api_keys).where(api_keys.c.api_key == api_key, api_keys.c.revoke_time.is_(None)).values(revoke_time=time)
    )
    return True
