"""The vault: seals what apps entrust to us, so that whoever reads the database alone cannot read it.

AES-256-GCM with a key that is derived from the server's secret key. App and name are authenticated along with each secret, so
one that is moved to another row does not open.
"""

from __future__ import annotations

import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_NONCE = 12


class SealBroken(Exception):
    """A secret cannot be opened: it was sealed with another secret key, or for somebody else."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the secret {name!r} of an app cannot be opened: is AFTERTOUCH_SECRET_KEY the one that it was made with?"
        )


class Vault:
    """Seals and opens with one server's key."""

    def __init__(self, secret_key: bytes) -> None:
        self._cipher = AESGCM(HKDF(SHA256(), length=32, salt=None, info=b"aftertouch vault v1").derive(secret_key))

    def seal(self, app_id: int, name: str, secret: str) -> bytes:
        """The secret as it is stored."""
        # Random nonces are good for 2^32 secrets (NIST SP 800-38D, section 8.3); an app has a handful.
        nonce = os.urandom(_NONCE)
        return nonce + self._cipher.encrypt(nonce, secret.encode(), _name(app_id, name))

    def open(self, app_id: int, name: str, sealed: bytes) -> str:
        """The secret itself.

        Raises:
            SealBroken: it is none of ours.
        """
        try:
            return self._cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], _name(app_id, name)).decode()
        except InvalidTag:
            raise SealBroken(name) from None


def _name(app_id: int, name: str) -> bytes:
    return f"{app_id}/{name}".encode()
