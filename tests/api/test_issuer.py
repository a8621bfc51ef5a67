"""Signing in to the console by an OpenID Connect issuer: what it takes, and everything that is refused."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from html import unescape
from typing import Any

import pytest
from joserfc.jwk import OctKey, RSAKey

from aftertouch.config import ConfigError, load_config
from aftertouch.processes import isolate
from tests.fix_console import Visitor, create_user
from tests.fix_database import clone_database
from tests.fix_issuer import CLIENT, Issuer, run_issuer
from tests.fix_world import World, run_world

USER = "max@acme.example"


@pytest.fixture(scope="module")
async def issued(postgres_url: str, template: str) -> AsyncIterator[tuple[World, Issuer]]:
    """A world whose users may sign in by an issuer of ours."""
    async with (
        run_issuer() as issuer,
        clone_database(postgres_url, template) as url,
        run_world(url, oidc_issuer=issuer.url, **CLIENT) as world,
    ):
        await create_user(world, USER, "marketer")
        yield world, issuer


@pytest.fixture
async def visitor(issued: tuple[World, Issuer]) -> AsyncIterator[Visitor]:
    async with Visitor(issued[0]) as opened:
        yield opened


@pytest.fixture
def issuer(issued: tuple[World, Issuer]) -> Issuer:
    """The issuer, as one that answers rightly."""
    issuer = issued[1]
    fresh = Issuer()
    fresh.url, fresh.key, fresh.signing_key = issuer.url, issuer.key, issuer.key
    issuer.__dict__.update(vars(fresh))
    return issuer


async def go_there(visitor: Visitor, app: str = "acme", **fields: str) -> str:
    """Press the button of the sign-in page; where the issuer is asked."""
    response, text = await visitor.request("POST", "/sign-in/issuer", data={"app": app, **fields})
    assert response.status == 200, text
    address = unescape(re.search(r'href="(http[^"]+)"', text)[1])
    assert response.headers["refresh"] == f"0;url={address}"
    return address


async def come_back(visitor: Visitor, address: str) -> tuple[int, str]:
    """Be signed in at the issuer, and follow it back; status and where that leads, or the text."""
    async with visitor.session.get(address, allow_redirects=False) as response:
        back = response.headers["location"]
    async with visitor.session.get(back, allow_redirects=False) as response:
        return response.status, response.headers.get("location") or await response.text()


async def test_issuer_signs_in_the_user_whose_email_it_vouches_for(visitor: Visitor, issuer: Issuer) -> None:
    _, text = await visitor.get("/sign-in")
    assert f"Sign in with {issuer.url.removeprefix('http://')}" in text
    address = await go_there(visitor, email="max@acme.example", next="/console/contacts?q=a")
    assert await come_back(visitor, address) == (303, "/console/contacts?q=a")
    assert (issuer.asked["scope"], issuer.asked["login_hint"]) == ("openid email", "max@acme.example")
    status, text = await visitor.get("/account")
    assert (status, "Marketer of Acme" in text) == (200, True)


async def test_issuer_may_tell_the_email_at_its_userinfo_and_want_the_secret_as_a_field(visitor: Visitor, issuer: Issuer) -> None:
    issuer.userinfo = {"sub": "1", "email": USER, "email_verified": True}
    issuer.metadata = {"token_endpoint_auth_methods_supported": ["client_secret_post"]}
    assert (await come_back(visitor, await go_there(visitor)))[0] == 303


async def test_issuer_brings_nobody_in_who_is_no_user_of_the_app(visitor: Visitor, issuer: Issuer) -> None:
    issuer.email = {"email": "stranger@acme.example", "email_verified": True}
    status, text = await come_back(visitor, await go_there(visitor))
    assert (status, "stranger@acme.example is no user of this app" in text, visitor.cookie) == (403, True, "")
    issuer.email = {"email": USER, "email_verified": True}
    status, text = await come_back(visitor, await go_there(visitor, app="evil"))
    assert (status, "is no user of this app" in text, visitor.cookie) == (403, True, "")


def change(**attributes: Any) -> Callable[[Issuer], None]:
    return lambda issuer: issuer.__dict__.update(attributes)


WRONG: dict[str, Callable[[Issuer], None]] = {
    "the email is not verified": change(email={"email": USER, "email_verified": False}),
    "it says nothing of the email's owner": change(email={"email": USER}),
    "no email": change(email={}, userinfo={"sub": "1"}),
    "userinfo is about somebody else": change(userinfo={"sub": "2", "email": USER, "email_verified": True}),
    "another issuer's token": change(claims={"iss": "https://evil.example"}),
    "another client's token": change(claims={"aud": "another"}),
    "a token that another client asked for": change(claims={"aud": ["aftertouch", "another"], "azp": "another"}),
    "another sign-in's token": change(claims={"nonce": "0" * 64}),
    "a token without a nonce": change(claims={"nonce": None}),
    "a token that ran out": change(claims={"exp": 1_700_000_000}),
    "a token that never runs out": change(claims={"exp": None}),
    "a token of the future": change(claims={"iat": 4_000_000_000, "exp": 4_000_000_300}),
    "another key's signature": change(signing_key=RSAKey.generate_key(2048, {"kid": "ours"})),
    "a signature with the client's secret": change(
        signing_key=OctKey.import_key("a secret: of 5% and long enough to sign"), algorithm="HS256"
    ),
    "another issuer's addresses": change(metadata={"issuer": "https://evil.example"}),
    "addresses without TLS": change(metadata={"token_endpoint": "http://issuer.example/token"}),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_issuer_that_proves_nothing_signs_nobody_in(visitor: Visitor, issued: Any, issuer: Issuer, wrong: str) -> None:
    WRONG[wrong](issuer)
    response, text = await visitor.request("POST", "/sign-in/issuer", data={"app": "acme"})
    if response.status == 200:
        status, text = await come_back(visitor, unescape(re.search(r'href="(http[^"]+)"', text)[1]))
        assert (status, "did not say who you are" in text) == (403, True)
    else:
        assert (response.status, "cannot be asked now" in text) == (503, True)
    assert not visitor.cookie


async def test_answer_that_the_browser_did_not_ask_for_is_worth_nothing(
    issued: tuple[World, Issuer], visitor: Visitor, issuer: Issuer
) -> None:
    """Somebody sends the victim the address with which the issuer answered themselves."""
    address = await go_there(visitor)
    async with visitor.session.get(address, allow_redirects=False) as response:
        back = response.headers["location"]
    async with Visitor(issued[0]) as victim:
        async with victim.session.get(back, allow_redirects=False) as response:
            assert response.status == 403
        await go_there(victim)
        async with victim.session.get(back, allow_redirects=False) as response:
            assert response.status == 403
        assert not victim.cookie
    refused = back.partition("?")[0] + "?error=access_denied&state=" + issuer.asked["state"]
    async with visitor.session.get(refused, allow_redirects=False) as response:
        assert response.status == 403
    async with visitor.session.get(back.replace("iss=", "iss=https%3A%2F%2Fevil.example&x="), allow_redirects=False) as response:
        assert response.status == 403


async def test_way_to_the_issuer_begins_at_our_page_only(visitor: Visitor) -> None:
    headers = {"sec-fetch-site": "cross-site"}
    response, _ = await visitor.request("POST", "/sign-in/issuer", data={"app": "acme"}, headers=headers)
    assert response.status == 403


async def test_issuer_leads_to_no_other_site(visitor: Visitor, issuer: Issuer) -> None:
    address = await go_there(visitor, next="https://evil.example/")
    assert await come_back(visitor, address) == (303, "/console/campaigns")


async def test_cookie_of_the_way_is_for_this_site_and_no_script(visitor: Visitor) -> None:
    response, _ = await visitor.request("POST", "/sign-in/issuer", data={"app": "acme"})
    cookie = response.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("aftertouch-trip=", "httponly", "samesite=lax", "max-age=600"))


async def test_console_without_an_issuer_has_no_way_to_one(shared_world: World) -> None:
    async with Visitor(shared_world) as visitor:
        assert "Sign in with" not in (await visitor.get("/sign-in"))[1]
        assert (await visitor.request("POST", "/sign-in/issuer", data={}))[0].status == 404
        assert (await visitor.request("GET", "/sign-in/return?code=a&state=b"))[0].status == 404


async def test_issuer_of_other_people_signs_in(postgres_url: str, template: str) -> None:
    """With a provider that others wrote, on Authlib: discovery, code, client authentication, keys and claims are theirs."""
    claims = json.dumps({"sub": "max", "email": USER, "email_verified": True})
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "oidc_provider_mock", "--port=0", "--require-nonce", f"--user-claims={claims}"),
        env=isolate({}),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(120):
            while not (found := re.search(rb"running on http://127\.0\.0\.1:(\d+)", line := await process.stdout.readline())):
                assert line, "it ended"
        # Whatever it writes must not fill the pipe.
        reading = asyncio.create_task(process.stdout.read())
        url = f"http://127.0.0.1:{int(found[1])}"
        async with clone_database(postgres_url, template) as database, run_world(database, oidc_issuer=url, **CLIENT) as world:
            await create_user(world, USER, "viewer")
            async with Visitor(world) as visitor:
                address = await go_there(visitor)
                async with visitor.session.post(address, data={"sub": "max"}, allow_redirects=False) as response:
                    back = response.headers["location"]
                async with visitor.session.get(back, allow_redirects=False) as response:
                    assert (response.status, response.headers.get("location")) == (303, "/console/campaigns")
                assert (await visitor.get("/campaigns"))[0] == 200
                async with visitor.session.get(back, allow_redirects=False) as response:
                    assert response.status == 403, "a code is good once"
    finally:
        process.terminate()
        await process.wait()
    await reading


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"AFTERTOUCH_OIDC_ISSUER": "https://login.example.com"}, "are needed together"),
        ({"AFTERTOUCH_OIDC_CLIENT_SECRET": "x"}, "are needed together"),
        ({"AFTERTOUCH_OIDC_ISSUER": "http://login.example.com"}, "must be like https://"),
    ],
)
def test_settings_of_an_issuer_that_are_incomplete_or_unsafe_are_refused(settings: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(settings, [])
