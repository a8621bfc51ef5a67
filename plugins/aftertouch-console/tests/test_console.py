"""The console channel keeps the contract."""

import hashlib
import hmac
import json

from aftertouch_console import ConsoleChannel

from aftertouch.channels import Channel, WebhookRequest
from aftertouch.testing import ChannelContract, ProviderRequest, Response


# --8<-- [start:contract]
class TestConsole(ChannelContract):
    channel = ConsoleChannel
    settings = {
        "url": "{provider}/messages",
        "api_key": "key-that-nobody-sees",
        "webhook_secret": "secret-that-nobody-sees",
        "timeout_seconds": "2",
    }
    address = {"inbox": "adas-private-inbox"}
    content = {"text": "Words for Ada only"}
    refusals = ("no_such_inbox", "inbox_closed", "bad_key")
    reported = ("delivered", "read", "failed")
    signature_header = "x-console-signature"
    samples = "samples"

    def accept(self, request: ProviderRequest) -> Response:
        return Response.from_json({"id": f"message-{request.read_json()['reference']}"}, status=202)

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        return Response.from_json({"error": code}, status=422)

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        event = {"reference": token, "status": status, "time": "2026-03-01T09:30:00+01:00"}
        if status == "failed":
            event["error"] = "inbox_closed"
        body = json.dumps({"events": [event]}).encode()
        signature = hmac.new(b"secret-that-nobody-sees", body, hashlib.sha256).hexdigest()
        return WebhookRequest(
            method="POST", url=channel.webhook_url, path="", headers={"x-console-signature": signature}, body=body
        )


# --8<-- [end:contract]
