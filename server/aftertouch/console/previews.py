"""What a person would get: a draft's content filled in for one contact, by the code that sends it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from google.protobuf import json_format

from aftertouch.console import provided, words
from aftertouch.console.visits import Visit
from aftertouch.declarations import ChannelType
from aftertouch.delivery.context import begin_links, track_content
from aftertouch.delivery.render import ContentTemplate, RenderError, render_link
from aftertouch.errors import FieldsInvalid, NotFound
from aftertouch.ingest.tokens import SPECIMEN
from aftertouch.v1 import campaigns_pb2, contacts_pb2

_TRIED = 50
"""How many contacts are looked at to find one who can be reached on the channel."""


@dataclass(frozen=True)
class Preview:
    """One message, or why there is none."""

    shape: str
    """How to draw it: notification, bubble, template or fields."""
    content: Mapping[str, Any]
    problem: str = ""
    words: Mapping[str, Any] | None = None
    """Of the provider's template that the content fills in: header, body, footer and buttons."""
    targets: Mapping[str, str] = field(default_factory=dict)
    """Where each tracked link in the message leads this person, by the link as it arrives."""


async def draw(
    visit: Visit,
    found: ChannelType,
    campaign: campaigns_pb2.Campaign,
    content: Mapping[str, Any],
    contact: contacts_pb2.Contact,
) -> Preview:
    """The message of a draft for a contact, whose content is valid; its tracked links are as long as those that arrive."""
    attributes = json_format.MessageToDict(contact.attributes)
    tracked = track_content(content, found, is_wanted=campaign.track_links)
    begin = begin_links(visit.app, visit.console.public_url)
    try:
        template = ContentTemplate(tracked.content, found.channel.content_model, begin)
        rendered = template.render(contact.external_id, attributes, SPECIMEN)
    except RenderError as error:
        return Preview("none", {}, words.SKIPS.get(error.code, error.code))
    filled = rendered.model_dump(mode="json", exclude_none=True)
    words_filled = await provided.read_words(visit, found.name, filled) if found.channel.capabilities.templates else None
    # A condition may have left some out.
    seen = set(map(int, re.findall(rf"{re.escape(f'{begin}{SPECIMEN}')}(\d+)", json.dumps(filled, ensure_ascii=False))))
    targets = {
        f"{begin}{SPECIMEN}{number}": render_link(link, contact.external_id, attributes)
        for number, link in enumerate(tracked.links)
        if number in seen
    }
    return Preview(_choose_shape(filled), filled, words=words_filled, targets=targets)


def _choose_shape(content: Mapping[str, Any]) -> str:
    """Any channel's content is drawn by what is in it, so a new channel needs no code here."""
    if "template" in content:
        return "template"
    if isinstance(content.get("title"), str):
        return "notification"
    if isinstance(content.get("body"), str):
        return "bubble"
    return "fields"


async def find_contact(visit: Visit, channel: str, external_id: str) -> contacts_pb2.Contact | None:
    """The contact of this id, or any who can be reached on the channel; None when there is none."""
    if external_id:
        try:
            name = visit.name("contacts", external_id)
            return await visit.client.contacts.GetContact(contacts_pb2.GetContactRequest(name=name))
        except (NotFound, FieldsInvalid):
            return None
    request = contacts_pb2.ListContactsRequest(parent=visit.parent, page_size=_TRIED)
    listed = (await visit.client.contacts.ListContacts(request)).contacts
    active = contacts_pb2.Subscription.ACTIVE
    return next(
        (
            contact
            for contact in listed
            if any(subscription.channel == channel and subscription.state == active for subscription in contact.subscriptions)
        ),
        listed[0] if listed else None,
    )


def list_attributes(contact: contacts_pb2.Contact | None) -> list[str]:
    """What a message can be filled in with, by this contact's example."""
    return sorted(contact.attributes.fields) if contact else []
