"""A sender to the sandbox's browsers, made of pywebpush and py_vapid: other people's encryption and signatures."""

from __future__ import annotations

import asyncio
import json
import time
from base64 import urlsafe_b64encode
from typing import Any

import requests
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from py_vapid import Vapid02
from pywebpush import WebPusher, webpush

from aftertouch.sandbox import Sandbox

SUBJECT = "mailto:ops@example.com"


def get_subscription(sandbox: Sandbox, index: int) -> dict[str, Any]:
    point = sandbox.population.derive_push_key(index).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return {
        "endpoint": sandbox.population.get_endpoint(index),
        "keys": {
            "p256dh": urlsafe_b64encode(point).rstrip(b"=").decode(),
            "auth": urlsafe_b64encode(sandbox.population.derive_push_secret(index)).rstrip(b"=").decode(),
        },
    }


def sign(sandbox: Sandbox, *, key: str | None = None, **claims: Any) -> str:
    """An Authorization header."""
    vapid = Vapid02.from_string(key or sandbox.settings.vapid_private_key or "")
    given = {"aud": sandbox.url, "exp": int(time.time()) + 3600, "sub": SUBJECT, **claims}
    return str(vapid.sign(given)["Authorization"])


def encrypt(sandbox: Sandbox, index: int, payload: bytes | dict[str, Any]) -> bytes:
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return bytes(WebPusher(get_subscription(sandbox, index)).encode(data, content_encoding="aes128gcm")["body"])


async def push(sandbox: Sandbox, index: int, payload: dict[str, Any], **more: Any) -> requests.Response:
    """Send with ``pywebpush.webpush``, which raises when it is refused."""

    def send() -> requests.Response:
        with requests.Session() as session:
            response = webpush(
                get_subscription(sandbox, index),
                json.dumps(payload),
                vapid_private_key=sandbox.settings.vapid_private_key,
                vapid_claims={"sub": SUBJECT},
                ttl=more.get("ttl", 60),
                headers=more.get("headers"),
                timeout=60,
                requests_session=session,
            )
        assert isinstance(response, requests.Response)
        return response

    return await asyncio.to_thread(send)
