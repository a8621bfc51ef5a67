"""The push channel keeps the contract of all channels."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from aftertouch_push import PushChannel

from aftertouch.channels import Channel, InvalidWebhook, WebhookRequest
from aftertouch.testing import ChannelContract, ProviderRequest, Response

# RFC 8291, appendix A: the browser's and the server's keys of the example.
P256DH = "BCVxsr7N_eNgVRqvHtD0zTZsEc6-VV-JvLexhqUzORcxaOzi6-AYWXvTBHm4bjyPjs7Vd8pZGH6SRpkNtoIAiw4"
AUTH = "BTBZMqHH6r4Tts7J_aSIgg"
VAPID_PRIVATE_KEY = "yfWPiYE-n46HLnH0KqZOF1fJJU3MYrct3AELtAQ-oRw"


class TestPush(ChannelContract):
    channel = PushChannel
    settings = {
        "vapid_private_key": VAPID_PRIVATE_KEY,
        "vapid_subject": "mailto:ops@example.com",
        "allow_insecure_loopback": "true",
        "timeout_seconds": "2",
    }
    address = {"endpoint": "{provider}/push/adas-private-endpoint", "keys": {"p256dh": P256DH, "auth": AUTH}}
    content = {"title": "For Ada only", "body": "Words for Ada only", "url": "https://shop.example/ada-only"}
    refusals = ("http_404", "http_410", "http_413", "http_403")
    reported = ("confirmed", "clicked", "dismissed")
    samples = "samples"

    def accept(self, request: ProviderRequest) -> Response:
        return Response(status=201, headers={"Location": f"/messages/{request.headers['topic']}"})

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        return Response(status=int(code.removeprefix("http_")))

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        """A service worker can sign nothing: that it knows the token is the proof, which the server checks."""
        return WebhookRequest(method="POST", url=f"{channel.webhook_url}/{status}?t={token}", path=status, headers={}, body=b"")

    def forge(self, request: WebhookRequest) -> Mapping[str, WebhookRequest]:
        address = request.url.partition("?")[0]
        return {
            "no token": replace(request, url=address),
            "an empty token": replace(request, url=f"{address}?t="),
            "a token cut short": replace(request, url=request.url[:-1]),
            "a token with a strange character": replace(request, url=f"{request.url[:-1]}*"),
            "a GET": replace(request, method="GET"),
        }

    def test_webhook_of_an_unknown_status_is_kept(self) -> None:
        """Only service workers of ours call, so an unknown path is a caller's mistake and is told so."""
        channel = self.build()
        with pytest.raises(InvalidWebhook):
            channel.parse(self.sign(channel, "Contract-_Token-00000000", "unheard_of"))
