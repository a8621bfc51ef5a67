"""What a campaign's messages are made with besides its content: the app's keys for the channel, and where its links lead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.delivery.render import ContentTemplate
from aftertouch.ingest.accounts import Accounts
from aftertouch.links import LINKS, Tracked, track_links
from aftertouch.store.app_secrets import ensure_app_keys
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign
from aftertouch.vault import Vault


@dataclass(frozen=True)
class MessageContext:
    """What all messages of a server have in common."""

    vault: Vault
    accounts: Accounts
    public_url: str
    """Where the server's HTTP address is reached, without a slash at the end."""

    async def read_app_keys(self, conn: AsyncConnection, app: App, declared: ChannelType) -> Mapping[str, str]:
        """The app's keys on a channel."""
        return await ensure_app_keys(conn, self.vault, app.app_id, declared.channel)

    def compile_content(self, app: App, campaign: Campaign, declared: ChannelType) -> ContentTemplate:
        """The campaign's content, with its links tracked where the campaign and its channel want that."""
        tracked = track_content(campaign.content, declared, is_wanted=campaign.track_links)
        return ContentTemplate(tracked.content, declared.channel.content_model, begin_links(app, self.public_url))


def begin_links(app: App, public_url: str) -> str:
    """What the app's tracked links begin with, before the token."""
    return f"{app.link_url or public_url}{LINKS}/"


def track_content(content: Mapping[str, Any] | None, declared: ChannelType, *, is_wanted: bool) -> Tracked:
    """A content with its links tracked, where that is wanted and the channel has such links."""
    return track_links(content or {}, declared.channel.capabilities.tracked_links if is_wanted else ())


def find_links(campaign: Campaign, declared: ChannelType) -> list[str]:
    """The links of a campaign that are tracked, by their numbers."""
    return list(track_content(campaign.content, declared, is_wanted=campaign.track_links).links)
