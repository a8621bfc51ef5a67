"""Identities: what a site's backend signs, so that a page can say who its visitor is and nobody can say to be somebody else.

An identity is ``v1.<expiry>.<external_id>.<signature>``: seconds since 1970, base64url and the HMAC-SHA256 of everything
before it under the app's identity secret. It is what a page holds, so it names one person, for a time. Standard library
only: backends of sites import it.
"""

from __future__ import annotations

import hmac
from base64 import b64decode, urlsafe_b64encode
from collections.abc import Iterable
from datetime import UTC, datetime

LONGEST = 2_000
"""Characters of an identity; an external_id of 200 characters takes 1,066 at most."""
_VERSION = "v1"


class InvalidIdentity(Exception):
    """It is no identity, it was not signed with the secret, or its time is over; the text says which."""


def sign_identity(secret: str, external_id: str, expires: datetime) -> str:
    """Sign who a visitor is, for the page to hand to ``subscribe`` or ``identify``.

    Args:
        secret: what ``CreateIdentitySecret`` returned; keep it on the backend.
        external_id: who is logged in there.
        expires: aware; as long as the session at most.
    """
    if expires.tzinfo is None:
        raise ValueError("expires must be aware, as datetime.now(UTC) + timedelta(hours=1) is")
    name = urlsafe_b64encode(external_id.encode()).rstrip(b"=").decode()
    signed = f"{_VERSION}.{int(expires.timestamp())}.{name}"
    return f"{signed}.{_sign(secret, signed)}"


def read_identity(secrets: Iterable[str], identity: str, now: datetime | None = None) -> str:
    """The external_id of an identity that one of the secrets signed.

    Raises:
        InvalidIdentity: it proves nothing.
    """
    signed, _, signature = identity.rpartition(".")
    parts = signed.split(".")
    if len(identity) > LONGEST or len(parts) != 3 or parts[0] != _VERSION or not identity.isascii():
        raise InvalidIdentity("it is no identity that sign_identity made")
    # All are tried: which secret fits must not show in the time that it takes.
    if not any([hmac.compare_digest(_sign(secret, signed), signature) for secret in secrets]):
        raise InvalidIdentity("it was not signed with the app's identity secret")
    if not parts[1].isdecimal():
        raise InvalidIdentity("its expiry is no whole number of seconds since 1970")
    if int(parts[1]) <= (now or datetime.now(UTC)).timestamp():
        raise InvalidIdentity("it has expired")
    try:
        # Strictly: what is left out of a name names somebody else.
        return b64decode(parts[2] + "=" * (-len(parts[2]) % 4), b"-_", validate=True).decode()
    except ValueError as error:
        raise InvalidIdentity("its external_id is no base64url of UTF-8") from error


def _sign(secret: str, signed: str) -> str:
    return urlsafe_b64encode(hmac.digest(secret.encode(), signed.encode(), "sha256")).rstrip(b"=").decode()
