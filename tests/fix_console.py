"""Visitors of the console: over plain HTTP, and in Debian's Chromium, which the fixture skips without."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from typing import Any, Self

import aiohttp
import pytest
from playwright.async_api import Browser, async_playwright, expect

from aftertouch.console.accounts import Accounts
from aftertouch.store import users as store
from aftertouch.store.apps import create_app, find_app
from aftertouch.store.engine import transaction
from tests.fix_world import World

PATIENCE_MS = 90_000
"""How long the browser waits for what a page is to show."""
PASSWORD = "three words and more"
_CSRF = re.compile(r'name="csrf" value="([0-9a-f]{64})"')

# Without the last ones Chromium looks its maker's servers up, and a test could not tell whether a page did.
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


async def create_user(world: World, email: str, role: str, app: str = "acme") -> None:
    """A user with the password that all have."""
    password_hash = await Accounts().hash(PASSWORD)
    async with transaction(world.core.engine) as conn:
        found = await find_app(conn, app) or await create_app(conn, app, app.capitalize())
        await store.create_user(conn, found.app_id, email, role, password_hash)


class Visitor:
    """A browser without a screen and without scripts: cookies, forms and what a page answers."""

    def __init__(self, world: World) -> None:
        self.base = f"http://{world.addresses.http}/console"
        self.csrf = ""

    async def __aenter__(self) -> Self:
        # Cookies of an address without a name are taken only so.
        self.session = aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.session.close()

    @property
    def cookie(self) -> str:
        """The session cookie; empty when there is none."""
        return next((cookie.value for cookie in self.session.cookie_jar if cookie.key == "aftertouch"), "")

    async def request(self, method: str, path: str, **options: Any) -> tuple[aiohttp.ClientResponse, str]:
        """An answer and its text; redirects are not followed."""
        async with self.session.request(method, self.base + path, allow_redirects=False, **options) as response:
            return response, await response.text()

    async def get(self, path: str, **headers: str) -> tuple[int, str]:
        """Status and text of a page; remembers the token that its forms carry."""
        response, text = await self.request("GET", path, headers=headers)
        if found := _CSRF.search(text):
            self.csrf = found[1]
        return response.status, text

    async def post(self, path: str, fields: dict[str, Any] | None = None, **headers: str) -> tuple[int, str]:
        """Send a form of the page that was read last; the text is where a redirect leads."""
        data = {"csrf": self.csrf, **(fields or {})}
        response, text = await self.request("POST", path, data=data, headers=headers)
        return response.status, response.headers.get("location", "") if response.status == 303 else text

    async def sign_in(self, email: str, password: str = PASSWORD, app: str = "acme") -> int:
        """The status of signing in, with the token of a page of the new session."""
        data = {"app": app, "email": email, "password": password}
        response, _ = await self.request("POST", "/sign-in", data=data)
        if response.status == 303:
            await self.get("/account")
        return response.status


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Debian's Chromium."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no Chromium; on Debian, `apt-get install chromium` brings it")
    # Five seconds are not enough on a crowded machine.
    expect.set_options(timeout=PATIENCE_MS)
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS, timeout=PATIENCE_MS)
        yield found
        await found.close()
