"""What an operator, or an app, says of its WhatsApp account: at Meta, or at Twilio."""

from __future__ import annotations

from typing import Literal

from aftertouch_twilio import ACCOUNT_SID, API_URL, SERVICE_SID
from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from aftertouch.channels import Settings


class WhatsAppSettings(Settings, validate_default=True):
    """Which provider carries the messages, and the account there."""

    by_app = frozenset(
        (
            *("provider", "phone_number_id", "business_account_id", "access_token", "app_secret", "verify_token"),
            *("account_sid", "auth_token", "sender", "messaging_service_sid"),
            *("messages_per_second", "seconds_between_messages"),
        )
    )

    provider: Literal["meta", "twilio"] = "meta"
    """Meta's own Cloud API, or Twilio's. Campaigns are the same over both."""
    phone_number_id: str = Field(default="", pattern=r"^[0-9]*$")
    """Meta: its id of the number that messages come from, which is not the number."""
    business_account_id: str = Field(default="", pattern=r"^[0-9]*$")
    """Meta: its id of the WhatsApp Business Account. With it the account's templates are listed, and a campaign's is looked up
    before the launch, for which the access token needs whatsapp_business_management as well."""
    access_token: SecretStr | None = None
    """Meta: of a system user that may use whatsapp_business_messaging."""
    app_secret: SecretStr | None = None
    """Meta: the key of the webhooks' signatures."""
    verify_token: SecretStr | None = None
    """Meta: a word of ours that it repeats when the webhook's address is registered."""
    api_url: str = Field(default="https://graph.facebook.com", pattern=API_URL)
    """Meta's Graph API, or a sandbox."""
    api_version: str = Field(default="v23.0", pattern=r"^v[0-9]+\.[0-9]+$")
    """Of the Graph API; Meta retires each about two years after it came out."""
    account_sid: str = Field(default="", pattern=f"^$|{ACCOUNT_SID}")
    """Twilio: the account."""
    auth_token: SecretStr | None = None
    """Twilio: also the key of the webhooks' signatures, so an API key cannot take its place."""
    sender: str = Field(default="", pattern=r"^(\+[1-9][0-9]{6,14})?$")
    """Twilio: the number of the WhatsApp sender, as in +15005550006."""
    messaging_service_sid: str = Field(default="", pattern=f"^$|{SERVICE_SID}")
    """Twilio: the Messaging Service that has WhatsApp senders, in place of one sender."""
    twilio_api_url: str = Field(default="https://api.twilio.com", pattern=API_URL)
    """Twilio's API, or a sandbox."""
    twilio_content_url: str = Field(default="https://content.twilio.com", pattern=API_URL)
    """Twilio's Content API, which has the templates."""
    messages_per_second: float = Field(default=80, gt=0, le=10_000)
    """Of the phone number: what Meta gives every number, and Twilio every sender. Meta raises it to 1,000 for some; 20 where the
    number is also in use with the WhatsApp Business app."""
    seconds_between_messages: float = Field(default=6, ge=0, le=3_600)
    """To one person. Meta's limit, from which a burst of 45 may borrow; campaigns that meet in one person can wait."""
    timeout_seconds: float = Field(default=15, gt=0)
    """For a whole request; the connection may take half of it. Keep it below 20, when a batch is given up and nobody knows what
    became of it."""

    @field_validator("phone_number_id", "access_token", "app_secret", "verify_token", "account_sid", "auth_token")
    @classmethod
    def _check_needed(cls, value: str | SecretStr | None, info: ValidationInfo) -> str | SecretStr | None:
        needed_by = "twilio" if info.field_name in ("account_sid", "auth_token") else "meta"
        # A secret of no length is one that everybody knows.
        if not value and info.data.get("provider") == needed_by:
            raise PydanticCustomError("missing", "needed with the provider {provider}", {"provider": needed_by})
        return value

    @field_validator("messaging_service_sid")
    @classmethod
    def _check_one_sender(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("provider") == "twilio" and bool(value) == bool(info.data.get("sender")):
            raise ValueError("set either this or the sender")
        return value
