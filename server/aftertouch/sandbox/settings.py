"""What a sandbox is configured with, and the settings a server needs to talk to it.

The defaults are well known on purpose: they are the credentials of providers that exist on loopback only.
"""

from __future__ import annotations

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat


@dataclass(frozen=True, kw_only=True)
class Shares:
    """How often things happen, each from 0 to 1. ``of …`` says among whom."""

    all_channels: float = 0.35
    two_channels: float = 0.30
    """The rest of the people have one channel."""
    no_first_name: float = 0.02

    sms_opted_out: float = 0.02
    """People: refused with 21610."""
    sms_gone: float = 0.01
    """People: refused with 21211."""
    sms_unreachable: float = 0.05
    """Messages: undelivered with 30003."""
    sms_no_report: float = 0.02
    """Messages: ``sent`` is the last word, as with carriers that report nothing."""

    sms_replied: float = 0.04
    """Of the delivered messages."""

    whatsapp_gone: float = 0.03
    """People: failed with 131026."""
    whatsapp_opted_out: float = 0.02
    """People: failed with 131050."""
    whatsapp_capped: float = 0.05
    """Messages: failed with 131049."""
    whatsapp_switched_off: float = 0.05
    """Messages: ``sent`` and nothing more."""
    whatsapp_read: float = 0.65
    """Of the delivered messages."""
    whatsapp_read_only: float = 0.1
    """Of the read messages: no ``delivered`` comes, because the chat was open."""
    whatsapp_failed_first: float = 0.005
    """Of the delivered messages: 131026 for one device, then delivered on another."""

    whatsapp_replied: float = 0.08
    """Of the read messages: with a quick reply, which names the message."""

    push_gone: float = 0.03
    """Browsers: answered 410."""
    push_silent: float = 0.08
    """Browsers: show the message and never confirm it (``push.confirms`` is false)."""
    push_offline: float = 0.08
    """Messages: wait at the push service."""
    push_beacon_lost: float = 0.04
    """Of the shown messages: no confirmation arrives."""
    push_clicked: float = 0.2
    """Of the shown messages."""
    push_dismissed: float = 0.3
    """Of the shown messages."""


@dataclass(frozen=True, kw_only=True)
class TwilioAccount:
    """One more account at Twilio, with a number of its own."""

    account_sid: str
    auth_token: str = field(repr=False)
    sender: str


@dataclass(frozen=True, kw_only=True)
class SandboxSettings:
    """A sandbox, as it is started. Equal seeds and sizes give equal people and equal fates."""

    seed: int = 1
    size: int = 10_000
    host: str = "127.0.0.1"
    port: int = 0
    """0 takes a free one."""

    account_sid: str = "AC5a4db0c05a4db0c05a4db0c05a4db0c0"
    auth_token: str = field(default="0c0bd4a50c0bd4a50c0bd4a50c0bd4a5", repr=False)
    messaging_service_sid: str = "MG5a4db0c05a4db0c05a4db0c05a4db0c0"
    sender: str = "+15005550006"
    """The one number that may be given as ``From``."""
    more_accounts: tuple[TwilioAccount, ...] = ()
    """Further accounts at Twilio, for texts."""

    whatsapp_provider: Literal["meta", "twilio"] = "meta"
    """Through whose API a server reaches people on WhatsApp; both answer in any case."""
    whatsapp_sender: str = "+14155238886"
    """The one WhatsApp number that may be given to Twilio as ``From``, after ``whatsapp:``."""

    phone_number_id: str = "106540352242922"
    display_phone_number: str = "15550783881"
    business_account_id: str = "102290129340398"
    access_token: str = field(default="sandbox-access-token", repr=False)
    app_secret: str = field(default="sandbox-app-secret", repr=False)
    verify_token: str = field(default="sandbox-verify-token", repr=False)
    whatsapp_webhook_url: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    """The approved templates by their names, with their texts: ``Hello {{1}}``, or ``Hello {{first_name}}``. Empty: at Meta every
    template is approved and takes what it is given; Twilio lists none, and takes every ContentSid."""

    template_statuses: Mapping[str, str] = field(default_factory=dict)
    """Of those that are not ``APPROVED`` after all, as it is listed."""

    vapid_private_key: str | None = field(default="c2FuZGJveC12YXBpZC1rZXktb25seS1sb29wYmFjayE", repr=False)
    """The key pair that the browsers subscribed with: 32 bytes in base64url. None: any key may send."""

    time_scale: float = 1.0
    """Multiplies every delay; 1.0 has nearly everything reported two seconds after the send."""
    duplicate_share: float = 0.03
    """Receipts that are sent twice."""
    late_share: float = 0.02
    """Receipts that may come up to three times as late."""
    patience: float = 300.0
    """Seconds for which a receipt that nobody takes is tried again."""
    strict_retries: bool = False
    """Give up as early as the real ones do: Twilio after what the URL's fragment asks for, a service worker at once. Receipts
    are then lost while the server is away. Meta is patient in either case."""
    shares: Shares = Shares()

    @property
    def vapid_public_key(self) -> str | None:
        """What the browsers subscribed with, as in ``k=`` of the Authorization header."""
        if self.vapid_private_key is None:
            return None
        number = int.from_bytes(urlsafe_b64decode(self.vapid_private_key + "="), "big")
        point = (
            ec.derive_private_key(number, ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
        )
        return urlsafe_b64encode(point).rstrip(b"=").decode()

    def environment(self, url: str) -> dict[str, str]:
        """The settings of a server that talks to the sandbox at ``url``."""
        environment = {
            "AFTERTOUCH_SMS_ACCOUNT_SID": self.account_sid,
            "AFTERTOUCH_SMS_AUTH_TOKEN": self.auth_token,
            "AFTERTOUCH_SMS_MESSAGING_SERVICE_SID": self.messaging_service_sid,
            "AFTERTOUCH_SMS_API_URL": url,
            "AFTERTOUCH_WHATSAPP_PHONE_NUMBER_ID": self.phone_number_id,
            "AFTERTOUCH_WHATSAPP_ACCESS_TOKEN": self.access_token,
            "AFTERTOUCH_WHATSAPP_APP_SECRET": self.app_secret,
            "AFTERTOUCH_WHATSAPP_VERIFY_TOKEN": self.verify_token,
            "AFTERTOUCH_WHATSAPP_API_URL": url,
            # The sandbox takes whatever comes, and nobody wants to wait for it.
            "AFTERTOUCH_WHATSAPP_MESSAGES_PER_SECOND": "10000",
            "AFTERTOUCH_WHATSAPP_SECONDS_BETWEEN_MESSAGES": "0",
            "AFTERTOUCH_PUSH_VAPID_SUBJECT": "mailto:sandbox@example.com",
            "AFTERTOUCH_PUSH_ALLOW_INSECURE_LOOPBACK": "true",
        }
        if self.whatsapp_provider == "twilio":
            environment |= {
                "AFTERTOUCH_WHATSAPP_PROVIDER": "twilio",
                "AFTERTOUCH_WHATSAPP_ACCOUNT_SID": self.account_sid,
                "AFTERTOUCH_WHATSAPP_AUTH_TOKEN": self.auth_token,
                "AFTERTOUCH_WHATSAPP_SENDER": self.whatsapp_sender,
                "AFTERTOUCH_WHATSAPP_TWILIO_API_URL": url,
                "AFTERTOUCH_WHATSAPP_TWILIO_CONTENT_URL": url,
            }
        if self.templates:
            environment["AFTERTOUCH_WHATSAPP_BUSINESS_ACCOUNT_ID"] = self.business_account_id
        if self.vapid_private_key is not None:
            environment["AFTERTOUCH_PUSH_VAPID_PRIVATE_KEY"] = self.vapid_private_key
        return environment


def list_parameters(text: str) -> tuple[str, ...]:
    """The names of a template's parameters, as they stand in its text."""
    return tuple(dict.fromkeys(re.findall(r"\{\{(\w+)\}\}", text)))
