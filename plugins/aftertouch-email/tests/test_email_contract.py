"""The email channel keeps the contract of all channels, with an SMTP server as its provider."""

from __future__ import annotations

import base64
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from aftertouch_email import EmailChannel
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from aftertouch.channels import Channel, WebhookRequest
from aftertouch.testing import ChannelContract, ProviderRequest, Response

sys.path.insert(0, str(Path(__file__).parent))
from smtp import SmtpProvider

KEY = ec.derive_private_key(0xE3A11, ec.SECP256R1())
WEBHOOK_KEY = base64.b64encode(KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).decode()
SIGNATURE, TIMESTAMP = "x-twilio-email-event-webhook-signature", "x-twilio-email-event-webhook-timestamp"
EVENTS = {
    "delivered": {"event": "delivered", "response": "250 OK"},
    "opened": {"event": "open", "useragent": "Mozilla/5.0"},
    "clicked": {"event": "click", "url": "https://shop.example/"},
    "complained": {"event": "spamreport"},
    "unsubscribed": {"event": "unsubscribe"},
    "failed": {"event": "bounce", "type": "bounce", "status": "5.1.1", "reason": "550 5.1.1 unknown"},
}
REPLIES = {
    "5.1.1": "550 5.1.1 User unknown",
    "4.3.0": "451 4.3.0 Try again later",
    "5.7.8": "535 5.7.8 Authentication failed",
    "552": "552 Too large",
}


def sign_events(channel: Channel, *events: Mapping[str, object]) -> WebhookRequest:
    """A webhook as SendGrid makes it."""
    body = json.dumps(list(events)).encode()
    signature = base64.b64encode(KEY.sign(b"1700000000" + body, ec.ECDSA(SHA256()))).decode()
    headers = {SIGNATURE: signature, TIMESTAMP: "1700000000", "content-type": "application/json"}
    return WebhookRequest(method="POST", url=channel.webhook_url, path="", headers=headers, body=body)


class TestEmail(ChannelContract):
    channel = EmailChannel
    provider_type = SmtpProvider
    settings = {
        "host": "127.0.0.1",
        "port": "{provider}",
        "security": "none",
        "sender": "Shop <news@shop.example>",
        "unsubscribe_secret": "a secret that nobody sees, 32 characters",
        "webhook_key": WEBHOOK_KEY,
        "timeout_seconds": "2",
    }
    address = {"email": "ada.lovelace@private.example"}
    content = {"subject": "A subject for Ada only", "text": "Words for Ada only", "html": "<p>Words for Ada only</p>"}
    refusals = tuple(REPLIES)
    reported = tuple(EVENTS)
    signature_header = SIGNATURE
    samples = "samples"

    def build(self, provider_url: str = "9") -> Channel:
        """The provider's URL is a port."""
        return super().build(provider_url.removeprefix("http://127.0.0.1:"))

    def accept(self, request: ProviderRequest) -> Response:
        return Response(status=250, body=f"2.0.0 Ok: queued as {len(request.body)}")

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        status, _, body = REPLIES[code].partition(" ")
        return Response(status=int(status), body=body)

    def throttle(self, request: ProviderRequest, retry_after: str | None) -> Response:
        return Response(status=421, body="4.7.28 Our system has detected an unusual rate of mail")

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        event = EVENTS.get(status, {"event": status})
        return sign_events(channel, {"aftertouch_token": token, "timestamp": 1700000000, "email": "ada@private.example", **event})

    def forge(self, request: WebhookRequest) -> Mapping[str, WebhookRequest]:
        older = replace(request, headers={**request.headers, TIMESTAMP: "1600000000"})
        return {**super().forge(request), "another timestamp": older}

    async def test_send_throttled_keeps_the_delay(self) -> None:
        """SMTP has no word for a delay."""

    async def test_send_to_a_failing_provider_is_transient(self) -> None:
        """A server's own trouble is a 4xx in SMTP, and among the refusals."""

    def test_webhook_of_another_operator_is_refused(self) -> None:
        """SendGrid's key is public; that another one is refused is in the channel's own tests."""
