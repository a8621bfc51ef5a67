"""An OpenID Connect issuer of ours, which checks what it is asked and answers as a test wants: also wrongly."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

from aiohttp import web
from joserfc import jwt
from joserfc.jwk import OctKey, RSAKey

CLIENT = {"oidc_client_id": "aftertouch", "oidc_client_secret": "a secret: of 5%"}


class Issuer:
    """The issuer; whoever is sent to it is signed in at once."""

    def __init__(self) -> None:
        self.url = ""
        self.key = RSAKey.generate_key(2048, {"kid": "ours", "use": "sig"})
        self.signing_key: RSAKey | OctKey = self.key
        self.algorithm = "RS256"
        self.email: dict[str, Any] = {"email": "Max@acme.example", "email_verified": True}
        self.claims: dict[str, Any] = {}
        """Instead of the right ones; None leaves one out."""
        self.userinfo: dict[str, Any] | None = None
        """When it tells the email there alone."""
        self.metadata: dict[str, Any] = {}
        """Instead of the right addresses."""
        self.asked: dict[str, str] = {}
        """The query with which the last visitor came."""

    async def describe(self, _: web.Request) -> web.Response:
        addresses = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "userinfo_endpoint": f"{self.url}/userinfo",
        }
        return web.json_response(addresses | self.metadata)

    async def authorize(self, request: web.Request) -> web.Response:
        self.asked = dict(request.query)
        query = urlencode({"code": "a-code", "state": self.asked["state"], "iss": self.url})
        raise web.HTTPFound(f"{self.asked['redirect_uri']}?{query}")

    async def redeem(self, request: web.Request) -> web.Response:
        """Only for the client, and only with the verifier of the challenge."""
        fields = dict(parse_qsl(await request.text()))
        if "client_secret" in fields:
            client = fields["client_id"], fields["client_secret"]
        else:
            plain = base64.b64decode(request.headers["authorization"].removeprefix("Basic ")).decode()
            name, _, secret = plain.partition(":")
            client = unquote(name), unquote(secret)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(fields["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        is_right = (
            client == tuple(CLIENT.values())
            and challenge == self.asked["code_challenge"]
            and fields["redirect_uri"] == self.asked["redirect_uri"]
            and fields["code"] == "a-code"
        )
        if not is_right:
            return web.json_response({"error": "invalid_grant"}, status=400)
        now = int(time.time())
        claims = {"iss": self.url, "aud": "aftertouch", "sub": "1", "iat": now, "exp": now + 300, "nonce": self.asked["nonce"]}
        claims |= self.email if self.userinfo is None else {}
        claims = {name: value for name, value in (claims | self.claims).items() if value is not None}
        token = jwt.encode({"alg": self.algorithm, "kid": "ours"}, claims, self.signing_key, algorithms=[self.algorithm])
        return web.json_response({"access_token": "an-access-token", "token_type": "Bearer", "id_token": token})

    async def list_keys(self, _: web.Request) -> web.Response:
        return web.json_response({"keys": [self.key.as_dict(private=False), {"kty": "a new kind"}]})

    async def tell_of_user(self, request: web.Request) -> web.Response:
        assert request.headers["authorization"] == "Bearer an-access-token"
        return web.json_response(self.userinfo)


@asynccontextmanager
async def run_issuer() -> AsyncIterator[Issuer]:
    """One on a free port of this machine."""
    issuer = Issuer()
    app = web.Application()
    app.add_routes(
        [
            web.get("/.well-known/openid-configuration", issuer.describe),
            web.get("/authorize", issuer.authorize),
            web.post("/token", issuer.redeem),
            web.get("/keys", issuer.list_keys),
            web.get("/userinfo", issuer.tell_of_user),
        ]
    )
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        issuer.url = site.name if not site.name.endswith(":0") else "http://{}:{}".format(*runner.addresses[0])
        yield issuer
    finally:
        await runner.cleanup()
