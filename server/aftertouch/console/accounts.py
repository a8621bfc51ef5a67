"""Users and their passwords: what is asked of them, how they are proved, and how often one may guess.

A password is hashed with argon2id in a thread, two at a time: each takes 64 MB and some 50 ms, and a flood of tries to sign
in must not take the event loop or the memory from webhooks.
"""

from __future__ import annotations

import asyncio
import re
from datetime import timedelta

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.store import users as store
from aftertouch.store.apps import App, find_app
from aftertouch.store.engine import transaction

SHORTEST_PASSWORD, LONGEST_PASSWORD = 12, 256
FAILURE_WINDOW = timedelta(minutes=15)
MOST_FAILURES = 10
"""In the window and for one account, whether it exists or not; then the right password is refused as well."""

_EMAIL = re.compile(r"[^\s@/]{1,64}@[^\s@/]{1,189}")


class TooManyFailures(Exception):
    """Somebody guessed at this account's password too often; it has to wait."""


class Accounts:
    """Proves and changes passwords."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher()
        self._turn = asyncio.Semaphore(2)
        self._decoy = self._hasher.hash("what an account that does not exist is compared with, to take as long")

    async def hash(self, password: str, field: str = "password") -> str:
        """The hash of a new password.

        Raises:
            FieldsInvalid: it is too short or too long.
        """
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            text = f"must have {SHORTEST_PASSWORD} to {LONGEST_PASSWORD} characters; three or four words do well"
            raise FieldsInvalid([Violation(field, text)])
        async with self._turn:
            return await asyncio.to_thread(self._hasher.hash, password)

    async def is_right(self, password: str, password_hash: str) -> bool:
        """True when this is the password behind the hash."""
        async with self._turn:
            return await asyncio.to_thread(self._verify, password[: LONGEST_PASSWORD + 1], password_hash)

    def _verify(self, password: str, password_hash: str) -> bool:
        try:
            return self._hasher.verify(password_hash, password)
        except (VerificationError, InvalidHashError):
            return False

    async def sign_in(self, engine: AsyncEngine, app: str, email: str, password: str) -> str | None:
        """A new session's token; None when app, email and password do not belong together.

        Raises:
            TooManyFailures.
        """
        email = email.strip().lower()
        async with transaction(engine) as conn:
            if await store.count_failures(conn, app, email, FAILURE_WINDOW) >= MOST_FAILURES:
                raise TooManyFailures
            user = await find_account(conn, app, email)
        is_right = await self.is_right(password, user.password_hash if user else self._decoy)
        async with transaction(engine) as conn:
            # Others may have failed while this one waited for its turn.
            if await store.count_failures(conn, app, email, FAILURE_WINDOW, lock=True) >= MOST_FAILURES:
                raise TooManyFailures
            if user is None or not is_right:
                await store.record_failure(conn, app, email)
                return None
            return await store.create_session(conn, user.user_id)


async def find_account(conn: AsyncConnection, app: str, email: str) -> store.User | None:
    """The user of this email in the app of this id, whatever a stranger gave for them."""
    # PostgreSQL takes no U+0000.
    found = await find_app(conn, app) if "\0" not in app + email else None
    return await store.find_user(conn, found.app_id, email) if found else None


def check_user(email: str, role: str) -> str:
    """The email as it is stored.

    Raises:
        FieldsInvalid: it is none, or there is no such role.
    """
    email = email.strip().lower()
    violations = []
    if not _EMAIL.fullmatch(email):
        violations.append(Violation("email", "must be an email address"))
    if role not in store.ROLES:
        violations.append(Violation("role", f"must be one of {', '.join(store.ROLES)}"))
    if violations:
        raise FieldsInvalid(violations)
    return email


async def change_role(conn: AsyncConnection, app: App, email: str, role: str | None) -> None:
    """Give a user another role, or delete them with None.

    Raises:
        NotFound: there is no such user.
        FieldsInvalid: nobody would be left who may administer.
    """
    users = {user.email: user for user in await store.list_users(conn, app.app_id, lock=True)}
    if email not in users:
        raise NotFound(f"{app.name}/users/{email}")
    check_user(email, role or "viewer")
    admins = {user.email for user in users.values() if user.role == "admin"}
    if role != "admin" and admins == {email}:
        raise FieldsInvalid([Violation("role", f"{email} is the only admin; make somebody else one first")])
    if role is None:
        await store.delete_user(conn, users[email].user_id)
    else:
        await store.set_role(conn, users[email].user_id, role)
