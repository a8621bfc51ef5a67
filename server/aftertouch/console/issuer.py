"""Signing in by an OpenID Connect issuer: the way there and back, and what its answer has to prove.

The issuer says whose email it is; which app somebody belongs to and what they may do is said here, by the users of the app.
The code flow with PKCE (RFC 7636), a state and a nonce, all three derived from one secret that only the visitor's browser keeps,
so nothing is stored, and an answer that this browser did not ask for is worth nothing. ID tokens are proven with joserfc.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import aiohttp
from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet

from aftertouch.config import Config, is_safe_address

RETURN_PATH = "/console/sign-in/return"
"""Where the issuer sends a visitor back to."""
TIMEOUT_SECONDS = 10.0
"""For each request to the issuer."""
LARGEST_ANSWER = 1 << 20
AT_ONCE = 4
"""Visitors for whom the issuer is asked: anybody may press the button, and it must not hear of all of them together."""
LEEWAY_SECONDS = 60
"""By how much the issuer's clock may differ from ours."""

_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
"""With a key pair only: a token that is signed with what a client also knows proves nothing."""
_KEY_TYPES = frozenset({"RSA", "EC"})


class IssuerFailed(Exception):
    """Nobody can be signed in by this answer, or by this issuer now; the text is for the log."""


@dataclass(frozen=True)
class Trip:
    """One visitor's way to the issuer and back, as their browser keeps it in a cookie."""

    secret: str
    app: str
    """Which app they asked for."""
    next: str
    """The page to go to afterwards."""

    @classmethod
    def begin(cls, app: str, next: str) -> Trip:
        """A new one."""
        return cls(secrets.token_urlsafe(32), app[:100], next[:1000])

    @classmethod
    def read(cls, cookie: str) -> Trip | None:
        """From the cookie; None when it is none of ours."""
        try:
            secret, app, target = json.loads(base64.urlsafe_b64decode(cookie.encode()))
        except (ValueError, TypeError):
            return None
        return cls(secret, app, target) if all(isinstance(text, str) for text in (secret, app, target)) else None

    def write(self) -> str:
        """As the cookie."""
        return base64.urlsafe_b64encode(json.dumps([self.secret, self.app, self.next]).encode()).decode()

    def derive(self, purpose: str) -> str:
        """What goes along for a purpose: 64 characters, from which neither the secret nor another purpose's can be guessed."""
        return hashlib.sha256(f"{purpose}\n{self.secret}".encode()).hexdigest()


class Issuer:
    """The issuer that the settings name."""

    def __init__(self, url: str, client_id: str, client_secret: str, return_url: str) -> None:
        self.url = url
        self.host = urlsplit(url).netloc
        """How visitors know it."""
        self._client_id = client_id
        self._client_secret = client_secret
        self._return_url = return_url
        self._turn = asyncio.Semaphore(AT_ONCE)

    async def lead_there(self, trip: Trip, email: str) -> str:
        """The address at which the issuer asks who somebody is.

        Raises:
            IssuerFailed.
        """
        verifier = hashlib.sha256(trip.derive("verifier").encode()).digest()
        query = {
            "response_type": "code",
            "client_id": self._client_id,
            "redirect_uri": self._return_url,
            "scope": "openid email",
            "state": trip.derive("state"),
            "nonce": trip.derive("nonce"),
            "code_challenge": base64.urlsafe_b64encode(verifier).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        async with self._turn, self._open() as session:
            address = _find_address(await self._describe(session), "authorization_endpoint")
        return address + ("&" if "?" in address else "?") + urlencode(query | ({"login_hint": email} if email else {}))

    async def read_email(self, trip: Trip, answer: Mapping[str, str]) -> str:
        """Whose email the issuer vouches for, in lower case.

        Args:
            answer: the query with which it sent the visitor back.

        Raises:
            IssuerFailed: it vouches for none, or this is no answer to what the visitor's browser asked.
        """
        if not secrets.compare_digest(answer.get("state", "").encode(), trip.derive("state").encode()):
            raise IssuerFailed("the state is not the one that this browser was sent with")
        # RFC 9207: which issuer answered, where it says so.
        if answer.get("iss", self.url).rstrip("/") != self.url:
            raise IssuerFailed("another issuer answered")
        if "error" in answer or not answer.get("code"):
            raise IssuerFailed(f"the issuer refused: {answer.get('error', 'no code')[:100]}")
        async with self._turn, self._open() as session:
            issuer = await self._describe(session)
            tokens = await self._redeem(session, issuer, answer["code"], trip.derive("verifier"))
            claims = await self._prove(session, issuer, str(tokens.get("id_token", "")), trip.derive("nonce"))
            if "email" not in claims:
                # OpenID Connect Core 5.4: with the code flow the email may be told at this address alone.
                claims = await self._ask_about(session, issuer, str(tokens.get("access_token", "")), claims)
        email = claims.get("email")
        if not isinstance(email, str) or not email:
            raise IssuerFailed("the issuer tells no email")
        # Some write the word.
        if claims.get("email_verified") not in (True, "true"):
            raise IssuerFailed("the issuer does not vouch for the email (email_verified)")
        return email.strip().lower()

    def _open(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        return aiohttp.ClientSession(timeout=timeout, cookie_jar=aiohttp.DummyCookieJar())

    async def _describe(self, session: aiohttp.ClientSession) -> Mapping[str, Any]:
        """What the issuer says of itself (OpenID Connect Discovery)."""
        told = await self._request(session, "GET", f"{self.url}/.well-known/openid-configuration")
        # It may write itself with a slash at the end.
        if str(told.get("issuer", "")).rstrip("/") != self.url:
            raise IssuerFailed(f"{self.url} calls itself {str(told.get('issuer'))[:200]}")
        return told

    async def _redeem(
        self, session: aiohttp.ClientSession, issuer: Mapping[str, Any], code: str, verifier: str
    ) -> Mapping[str, Any]:
        fields = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self._return_url,
            "code_verifier": verifier,
        }
        address = _find_address(issuer, "token_endpoint")
        methods = issuer.get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if "client_secret_basic" in methods:
            # RFC 6749 2.3.1: both are encoded as in a form first.
            authorization = aiohttp.encode_basic_auth(quote(self._client_id, safe=""), quote(self._client_secret, safe=""))
            return await self._request(session, "POST", address, data=fields, headers={"authorization": authorization})
        proof = {"client_id": self._client_id, "client_secret": self._client_secret}
        return await self._request(session, "POST", address, data=fields | proof)

    async def _prove(
        self, session: aiohttp.ClientSession, issuer: Mapping[str, Any], token: str, nonce: str
    ) -> Mapping[str, Any]:
        """The claims of an ID token (OpenID Connect Core 3.1.3.7)."""
        told = await self._request(session, "GET", _find_address(issuer, "jwks_uri"))
        keys = [
            key
            for key in told.get("keys") or ()
            if isinstance(key, dict) and key.get("kty") in _KEY_TYPES and key.get("use", "sig") == "sig"
        ]
        wanted = jwt.JWTClaimsRegistry(
            leeway=LEEWAY_SECONDS,
            iss={"essential": True, "value": issuer["issuer"]},
            aud={"essential": True, "value": self._client_id},
            sub={"essential": True},
            exp={"essential": True},
            iat={"essential": True},
            nonce={"essential": True, "value": nonce},
        )
        try:
            claims = jwt.decode(token, KeySet.import_key_set({"keys": keys}), algorithms=_ALGORITHMS).claims
            wanted.validate(claims)
        except (JoseError, ValueError, TypeError, KeyError) as error:
            raise IssuerFailed(f"the ID token proves nothing: {type(error).__name__} {error}") from error
        if claims.get("azp", self._client_id) != self._client_id:
            raise IssuerFailed("the ID token was made for another client")
        return claims

    async def _ask_about(
        self, session: aiohttp.ClientSession, issuer: Mapping[str, Any], token: str, claims: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        address = _find_address(issuer, "userinfo_endpoint")
        told = await self._request(session, "GET", address, headers={"authorization": f"Bearer {token}"})
        if told.get("sub") != claims["sub"]:
            raise IssuerFailed("the issuer tells of somebody else than its ID token")
        return told

    async def _request(self, session: aiohttp.ClientSession, method: str, url: str, **options: Any) -> Mapping[str, Any]:
        """The JSON object that an address answers with."""
        try:
            async with session.request(method, url, allow_redirects=False, **options) as response:
                body = await response.content.read(LARGEST_ANSWER + 1)
                while not response.content.at_eof() and len(body) <= LARGEST_ANSWER:
                    body += await response.content.read(LARGEST_ANSWER)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise IssuerFailed(f"{url} did not answer: {type(error).__name__}") from error
        try:
            told = json.loads(body) if len(body) <= LARGEST_ANSWER else None
        except ValueError:
            told = None
        if response.status != 200 or not isinstance(told, dict):
            reason = told.get("error") if isinstance(told, dict) else "no JSON object"
            raise IssuerFailed(f"{url} answered {response.status}: {str(reason)[:100]}")
        return told


def find_issuer(config: Config, public_url: str) -> Issuer | None:
    """The issuer of the settings; None when there is none."""
    if config.oidc_issuer is None or config.oidc_client_id is None or config.oidc_client_secret is None:
        return None
    secret = config.oidc_client_secret.get_secret_value()
    return Issuer(config.oidc_issuer, config.oidc_client_id, secret, f"{public_url}{RETURN_PATH}")


def _find_address(issuer: Mapping[str, Any], name: str) -> str:
    """One of the issuer's addresses."""
    address = issuer.get(name)
    if not isinstance(address, str) or not is_safe_address(address):
        raise IssuerFailed(f"its {name} is missing, or reached without TLS")
    return address
