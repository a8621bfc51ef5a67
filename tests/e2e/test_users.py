"""Users of the console from the command line."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

from aftertouch.store.apps import find_caller
from aftertouch.store.audit import list_entries
from aftertouch.store.engine import open_engine, transaction
from tests.fix_world import SECRET_KEY

pytestmark = pytest.mark.e2e


async def run(database_url: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of ``aftertouch`` on a database, without a terminal."""
    environment = {**os.environ, "AFTERTOUCH_DATABASE_URL": database_url, "AFTERTOUCH_SECRET_KEY": SECRET_KEY}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aftertouch", *arguments),
        env=environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_user_is_made_with_a_password_that_is_printed_once(database_url: str) -> None:
    await run(database_url, "apps", "create", "acme")
    code, out, _ = await run(database_url, "users", "create", "acme", "Ana@Acme.example", "--role", "admin")
    assert (code, len(out.strip())) == (0, 16)
    _, listed, _ = await run(database_url, "users", "list", "acme")
    assert "ana@acme.example" in listed
    code, _, err = await run(database_url, "users", "create", "acme", "ana@acme.example")
    assert (code, "exists already" in err) == (1, True)
    code, again, _ = await run(database_url, "users", "create", "acme", "ana@acme.example", "--role", "viewer", "--reset")
    assert (code, again != out) == (0, True)
    assert "viewer" in (await run(database_url, "users", "list", "acme"))[1]


async def test_user_of_an_unknown_app_or_role_is_refused(database_url: str) -> None:
    await run(database_url, "apps", "create", "acme")
    for arguments, text in (
        (("nothing", "a@b.example"), "apps/nothing does not exist"),
        (("acme", "a@b.example", "--role", "god"), "must be one of viewer, marketer, admin"),
        (("acme", "nobody"), "must be an email address"),
    ):
        code, _, err = await run(database_url, "users", "create", *arguments)
        assert (code, text in err) == (1, True), err


async def test_key_is_listed_without_its_secret_and_revoked(database_url: str) -> None:
    await run(database_url, "apps", "create", "acme")
    _, secret, _ = await run(database_url, "keys", "create", "acme", "--scope", "read", "--display-name", "[red]checkout")
    key = secret.split("_")[1]
    code, listed, _ = await run(database_url, "keys", "list", "acme")
    assert (code, key in listed, "[red]checkout" in listed, secret.strip() in listed) == (0, True, True, False)
    assert (await run(database_url, "keys", "revoke", "acme", "no-such"))[:2] == (1, "")
    code, out, _ = await run(database_url, "keys", "revoke", "acme", key)
    assert (code, out) == (0, f"apps/acme/apiKeys/{key} is revoked\n")
    async with open_engine(database_url) as engine, transaction(engine) as conn:
        assert await find_caller(conn, secret.strip()) is None
        entries = await list_entries(conn, 1, None, 10)
    assert [(entry.actor, entry.method) for entry in entries] == [
        ("command line", "Apps/RevokeApiKey"),
        ("command line", "Apps/CreateApiKey"),
    ]
