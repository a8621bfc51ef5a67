"""The WhatsApp channel keeps the contract of all channels."""

import hashlib
import hmac
import json
from urllib.parse import urlencode

from aftertouch_whatsapp import WhatsAppChannel
from twilio.request_validator import RequestValidator  # type: ignore[import-untyped]

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
        "timeout_seconds": "2",
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


AUTH_TOKEN = "token-that-nobody-sees-either"


class TestWhatsAppOverTwilio(ChannelContract):
    channel = WhatsAppChannel
    settings = {
        "provider": "twilio",
        "account_sid": "AC" + "0" * 32,
        "auth_token": AUTH_TOKEN,
        "sender": "+15005550006",
        "twilio_api_url": "{provider}",
        "twilio_content_url": "{provider}",
        "timeout_seconds": "2",
    }
    address = {"phone": "+16502530000"}
    content = {"template": "summer_sale_2026", "language": "en_US", "body": ["Words for Ada only"]}
    refusals = ("21211", "63024", "20003", "63016")
    reported = ("sent", "delivered", "read", "failed")
    samples = "samples_twilio"
    signature_header = "x-twilio-signature"

    def accept(self, request: ProviderRequest) -> Response:
        if request.method == "GET":
            return self.list_templates()
        token = request.read_form()["StatusCallback"].partition("?t=")[2].partition("#")[0]
        return Response.from_json({"sid": f"MM{token.encode().hex()[:32]}", "status": "queued"}, status=201)

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        if request.method == "GET":
            return self.list_templates()
        return Response.from_json({"code": int(code), "message": "No", "status": 400}, status=400)

    def list_templates(self) -> Response:
        body = {"twilio/text": {"body": "Dear {{1}}, the sale ends tonight"}}
        approval = {"name": "summer_sale_2026", "status": "approved", "content_type": "twilio/text"}
        listed = [{"sid": "HX" + "3" * 32, "language": "en_US", "types": body, "approval_requests": approval}]
        return Response.from_json({"contents": listed, "meta": {"next_page_url": None}})

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        url = f"{channel.webhook_url}?t={token}"
        form = {"MessageSid": "MM" + "2" * 32, "MessageStatus": status, "To": "whatsapp:+16502530000", "ChannelInstallSid": ""}
        if status == "failed":
            form["ErrorCode"] = "63024"
        signature = RequestValidator(AUTH_TOKEN).compute_signature(url, form)
        return WebhookRequest(
            method="POST", url=url, path="", headers={"x-twilio-signature": signature}, body=urlencode(form).encode()
        )
