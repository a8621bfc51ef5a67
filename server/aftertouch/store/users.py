"""The people who sign in to the console, their sessions, and their failed tries.

Neither a password nor a session's cookie is stored: only what proves them.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import AlreadyExists
from aftertouch.store.apps import App
from aftertouch.store.tables import apps, sessions, sign_in_failures, users

ROLES = ("viewer", "marketer", "admin")
SESSION_LIFETIME = timedelta(days=7)
SESSION_IDLE = timedelta(hours=24)
"""A session ends this long after it was last used."""
_SIGN_INS = 4
"""The class of the advisory locks on accounts that somebody signs in to; ``campaigns`` has 1 and 2, ``contacts`` 3."""
USE_STEP = timedelta(minutes=5)
"""A page polls every two seconds; a row is written at most this often."""


@dataclass(frozen=True)
class User:
    """Somebody who signs in to the console of one app."""

    user_id: int
    app_id: int
    email: str
    role: str
    password_hash: str = field(repr=False)
    create_time: datetime
    sign_in_time: datetime | None


def _user(row: Row[Any]) -> User:
    return User(**row._mapping)


async def create_user(conn: AsyncConnection, app_id: int, email: str, role: str, password_hash: str) -> User:
    """Make a user.

    Raises:
        AlreadyExists: the app has a user of this email.
    """
    statement = insert(users).values(app_id=app_id, email=email, role=role, password_hash=password_hash).returning(users)
    try:
        async with conn.begin_nested():
            return _user((await conn.execute(statement)).one())
    except IntegrityError as error:
        raise AlreadyExists(f"users/{email}") from error


async def find_user(conn: AsyncConnection, app_id: int, email: str) -> User | None:
    """The app's user of this email."""
    row = (await conn.execute(select(users).where(users.c.app_id == app_id, users.c.email == email))).one_or_none()
    return _user(row) if row else None


async def list_users(conn: AsyncConnection, app_id: int, *, lock: bool = False) -> list[User]:
    """The app's users by email; with ``lock``, nobody else changes them until the transaction ends."""
    statement = select(users).where(users.c.app_id == app_id).order_by(users.c.email)
    return [_user(row) for row in await conn.execute(statement.with_for_update() if lock else statement)]


async def set_role(conn: AsyncConnection, user_id: int, role: str) -> None:
    """Change what a user may do, from the next request on."""
    await conn.execute(update(users).where(users.c.user_id == user_id).values(role=role))


async def set_password_hash(conn: AsyncConnection, user_id: int, password_hash: str) -> None:
    """Change a user's password; whoever is signed in as them is signed out."""
    await conn.execute(update(users).where(users.c.user_id == user_id).values(password_hash=password_hash))
    await conn.execute(delete(sessions).where(sessions.c.user_id == user_id))


async def delete_user(conn: AsyncConnection, user_id: int) -> None:
    """Delete a user with their sessions."""
    await conn.execute(delete(users).where(users.c.user_id == user_id))


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


async def create_session(conn: AsyncConnection, user_id: int) -> str:
    """Sign a user in and return the session's token, which is nowhere else."""
    token = secrets.token_urlsafe(32)
    await conn.execute(insert(sessions).values(session_hash=_hash(token), user_id=user_id))
    await conn.execute(update(users).where(users.c.user_id == user_id).values(sign_in_time=func.now()))
    return token


async def find_session(conn: AsyncConnection, token: str) -> tuple[App, User] | None:
    """Who is signed in with this token; None when nobody is (any more). Notes that it was used."""
    row = (
        await conn.execute(
            select(users, sessions.c.use_time < func.now() - USE_STEP)
            .join(sessions, sessions.c.user_id == users.c.user_id)
            .where(
                sessions.c.session_hash == _hash(token),
                sessions.c.create_time > func.now() - SESSION_LIFETIME,
                sessions.c.use_time > func.now() - SESSION_IDLE,
            )
        )
    ).one_or_none()
    if row is None:
        return None
    *columns, is_stale = row
    user = User(*columns)
    if is_stale:
        await conn.execute(update(sessions).where(sessions.c.session_hash == _hash(token)).values(use_time=func.now()))
    app = (await conn.execute(select(apps).where(apps.c.app_id == user.app_id))).one()
    return App(**app._mapping), user


async def delete_session(conn: AsyncConnection, token: str) -> None:
    """Sign out."""
    await conn.execute(delete(sessions).where(sessions.c.session_hash == _hash(token)))


async def count_failures(conn: AsyncConnection, app: str, email: str, window: timedelta, *, lock: bool = False) -> int:
    """How many tries to sign in to this account failed within the window.

    Args:
        lock: have others who lock the account wait for this transaction's end.
    """
    failures, account_hash = sign_in_failures.c, _hash(f"{app}\n{email}")
    if lock:
        await conn.execute(select(func.pg_advisory_xact_lock(_SIGN_INS, int.from_bytes(account_hash[:4], signed=True))))
    statement = select(func.count()).where(failures.account_hash == account_hash, failures.time > func.now() - window)
    return int((await conn.execute(statement)).scalar_one())


async def record_failure(conn: AsyncConnection, app: str, email: str) -> None:
    """Note a failed try, of an account that exists or not."""
    await conn.execute(insert(sign_in_failures).values(account_hash=_hash(f"{app}\n{email}")))


async def forget_sessions(conn: AsyncConnection) -> None:
    """Delete what is over: sessions, and failed tries older than a day."""
    await conn.execute(
        delete(sessions).where(
            or_(sessions.c.create_time < func.now() - SESSION_LIFETIME, sessions.c.use_time < func.now() - SESSION_IDLE)
        )
    )
    await conn.execute(delete(sign_in_failures).where(sign_in_failures.c.time < func.now() - timedelta(days=1)))
