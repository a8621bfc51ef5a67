"""Users of the console from the command line."""

from __future__ import annotations

import asyncio
import os
import sys

import pytest

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
