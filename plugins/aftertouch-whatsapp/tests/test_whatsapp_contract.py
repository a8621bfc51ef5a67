"""The WhatsApp channel keeps the contract of all channels."""

import hashlib
import hmac
import json

from aftertouch_whatsapp import WhatsAppChannel

from aftertouch.channels import Channel, WebhookRequest
from aftertouch.testing import ChannelContract, ProviderRequest, Response

APP_SECRET = "secret-that-nobody-sees"


class TestWhatsApp(ChannelContract):
    channel = WhatsAppChannel
    settings = {
        "phone_number_id": "106540352242922",
        "access_token": "token-that-nobody-sees",
        "app_secret": APP_SECRET,
        "verify_token": "word-that-nobody-sees",
        "api_url": "{provider}",
        "timeout_seconds": "0.3",
    }
    address = {"phone": "+16502530000"}
    content = {"template": "summer_sale_2026", "language": "en_US", "body": ["Words for Ada only"]}
    refusals = ("131026", "131049", "131050", "190", "132000")
    reported = ("sent", "delivered", "read", "failed")
    signature_header = "x-hub-signature-256"
    samples = "samples"

    def accept(self, request: ProviderRequest) -> Response:
        return Response.from_json({"messages": [{"id": f"wamid.{request.read_json()['biz_opaque_callback_data']}"}]})

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        return Response.from_json({"error": {"code": int(code), "message": "No", "type": "OAuthException"}}, status=400)

    def throttle(self, request: ProviderRequest, retry_after: str | None) -> Response:
        """Meta says it by its code; Retry-After may be there."""
        headers = {} if retry_after is None else {"Retry-After": retry_after}
        return Response.from_json({"error": {"code": 130429}}, status=400, headers=headers)

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        item = {"id": "wamid.1", "status": status, "timestamp": "1772354400", "biz_opaque_callback_data": token}
        if status == "failed":
            item["errors"] = [{"code": 131026, "title": "Message undeliverable"}]  # type: ignore[assignment]
        update = {"entry": [{"id": "0", "changes": [{"field": "messages", "value": {"statuses": [item]}}]}]}
        body = json.dumps(update).encode()
        signature = f"sha256={hmac.new(APP_SECRET.encode(), body, hashlib.sha256).hexdigest()}"
        return WebhookRequest(
            method="POST", url=channel.webhook_url, path="", headers={"x-hub-signature-256": signature}, body=body
        )
