"""Clicks: a tracked link comes back, is recorded as an event, and turned into the address that it stands for.

The token names the campaign and the person, the number one of the links that the campaign had when it was launched: nothing else
can be the answer, so there is no open redirect. Whoever clicks is shown the page even when the click cannot be stored.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Mapping

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.channels import Receipt, Webhook
from aftertouch.delivery.context import find_links
from aftertouch.delivery.render import render_link
from aftertouch.errors import AftertouchError
from aftertouch.ingest.intake import Intake, TokenInvalid
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.spool import SpoolFull
from aftertouch.ingest.tokens import TEST_POSITION, TOKEN_LENGTH
from aftertouch.links import find_front_page
from aftertouch.plugins import Registry
from aftertouch.rolls.chunks import CHUNK, CHUNK_BITS, slot_of
from aftertouch.rolls.sql import read_roll_chunk
from aftertouch.store.campaigns import Campaign, read_campaign
from aftertouch.store.contacts import read_contacts
from aftertouch.store.engine import transaction

log = structlog.get_logger()

_LINK = re.compile(rf"(?P<token>[A-Za-z0-9_-]{{{TOKEN_LENGTH}}})(?P<number>[0-9]{{1,2}})", re.ASCII)
_MACHINES = re.compile(
    # Previews of messengers and networks: each names itself in its documentation for site owners.
    r"(?<!cu)bot\b|facebookexternalhit|facebot|whatsapp/|skypeuripreview|embedly|vkshare|viber|line-poker|kakaotalk-scrap|snapchat"
    r"|google-safety|googleimageproxy|google-pagerenderer|yahoo! slurp|preview|crawler|spider|scanner|monitor"
    # Scanners of mail and messages, and programs.
    r"|barracuda|mimecast|proofpoint|symantec|trendmicro|headlesschrome|curl/|wget/|python-|go-http-client|java/|okhttp/|libwww",
    re.IGNORECASE,
)


class Clicks:
    """Follows tracked links."""

    def __init__(self, engine: AsyncEngine, registry: Registry, ledger: Ledger, intake: Intake) -> None:
        self._engine = engine
        self._registry = registry
        self._ledger = ledger
        self._intake = intake

    async def follow(self, link: str, method: str, headers: Mapping[str, str]) -> str | None:
        """Where a link ``<token><number>`` leads; None when it is none of ours.

        Raises:
            DatabaseUnavailable: its campaign, or who it was made for, cannot be read now.
        """
        match = _LINK.fullmatch(link)
        if match is None:
            return None
        token, number = match["token"], int(match["number"])
        targets = self._ledger.tokens.read([token])
        if not targets.valid[0]:
            return None
        campaign_id, position = int(targets.campaigns[0]), int(targets.positions[0])
        if position == TEST_POSITION:
            return await self._follow_test(campaign_id, number)
        campaign = (await self._ledger.lookups.read_launched([campaign_id])).get(campaign_id)
        if campaign is None or position >= campaign.recipients or number >= len(campaign.links):
            return None
        found = campaign.links[number]
        address = found if "{" not in found else await self._render(campaign, position, found)
        await self._record(campaign, token, number, is_machine=is_machine(method, headers))
        return address

    async def _follow_test(self, campaign_id: int, number: int) -> str | None:
        """Where a link of a test send leads, as the campaign's content is now; it was made for nobody, and is counted nowhere."""
        async with transaction(self._engine) as conn:
            campaign = await read_campaign(conn, campaign_id)
        declared = campaign and self._registry.types.get(campaign.channel)
        links = find_links(campaign, declared) if campaign and declared else []
        if number >= len(links):
            return None
        return links[number] if "{" not in links[number] else find_front_page(links[number])

    async def _render(self, campaign: Campaign, position: int, link: str) -> str:
        """A link with attributes in it, for the person it was made for; the site's front page where that is not possible."""
        async with transaction(self._engine) as conn:
            roll = await read_roll_chunk(conn, slot_of(campaign.campaign_id, position >> CHUNK_BITS))
            contacts = await read_contacts(conn, campaign.app_id, [int(roll[position & (CHUNK - 1)])])
        return render_link(link, contacts[0].external_id, contacts[0].attributes) if contacts else find_front_page(link)

    async def _record(self, campaign: Campaign, token: str, number: int, *, is_machine: bool) -> None:
        declared = self._registry.types.get(campaign.channel)
        signal = "scanned" if is_machine else "clicked"
        if declared is None or signal not in declared.evidence:
            return
        receipt = Receipt(signal=signal, token=token, code="" if is_machine else str(number))
        try:
            await self._intake.take(campaign.channel, Webhook(receipts=(receipt,)))
        except (AftertouchError, SpoolFull, TokenInvalid, sqlite3.Error) as error:
            # The person wants to see the page, whatever becomes of our count.
            log.error(
                "a click was not stored", action="follow_link", campaign_id=campaign.campaign_id, cause=type(error).__name__
            )


def is_machine(method: str, headers: Mapping[str, str]) -> bool:
    """True for a preview, a scanner or a prefetch: nobody has clicked (yet)."""
    purposes = (headers.get(name, "") for name in ("sec-purpose", "purpose", "x-purpose", "x-moz"))
    if method == "HEAD" or any("prefetch" in purpose or "preview" in purpose for purpose in purposes):
        return True
    agent = headers.get("user-agent", "")
    return not agent or _MACHINES.search(agent) is not None
