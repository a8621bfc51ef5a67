"""The SMS channel keeps the contract of all channels."""

from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import format_datetime
from urllib.parse import urlencode

from aftertouch_sms import SmsChannel
from twilio.request_validator import RequestValidator  # type: ignore[import-untyped]

from aftertouch.channels import Address, Channel, Content, Message, WebhookRequest
from aftertouch.testing import ChannelContract, ProviderRequest, Response

AUTH_TOKEN = "token-that-nobody-sees"


class TestSms(ChannelContract):
    channel = SmsChannel
    settings = {
        "account_sid": "AC" + "0" * 32,
        "auth_token": AUTH_TOKEN,
        "messaging_service_sid": "MG" + "1" * 32,
        "api_url": "{provider}",
        "timeout_seconds": "2",
    }
    address = {"phone": "+16502530000"}
    content = {"body": "Words for Ada only"}
    refusals = ("21211", "21610", "20003", "30007")
    reported = ("sent", "delivered", "failed")
    signature_header = "x-twilio-signature"
    samples = "samples"

    def accept(self, request: ProviderRequest) -> Response:
        token = request.read_form()["StatusCallback"].partition("?t=")[2].partition("#")[0]
        return Response.from_json({"sid": f"SM{token.encode().hex()[:32]}", "status": "accepted"}, status=201)

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        return Response.from_json({"code": int(code), "message": "No", "status": 400}, status=400)

    def report_taken(self, request: ProviderRequest, taken: Sequence[Message[Address, Content]]) -> Response:
        listed = [
            {
                "sid": "SM" + "2" * 32,
                "body": message.content.model_dump()["body"],
                "direction": "outbound-api",
                "messaging_service_sid": self.settings["messaging_service_sid"],
                "date_created": format_datetime(datetime.now(UTC)),
            }
            for message in taken
        ]
        return Response.from_json({"messages": listed, "next_page_uri": None})

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        url = f"{channel.webhook_url}?t={token}"
        form = {"MessageSid": "SM" + "2" * 32, "MessageStatus": status, "To": "+16502530000", "RawDlrDoneDate": ""}
        if status == "failed":
            form["ErrorCode"] = "30005"
        signature = RequestValidator(AUTH_TOKEN).compute_signature(url, form)
        return WebhookRequest(
            method="POST", url=url, path="", headers={"x-twilio-signature": signature}, body=urlencode(form).encode()
        )
