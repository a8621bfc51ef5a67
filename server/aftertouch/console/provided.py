"""Templates that a channel's provider keeps: choosing one instead of typing its name, and the words that a content fills in."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from aftertouch.console.visits import Visit
from aftertouch.console.words import explain
from aftertouch.delivery.render import render_words
from aftertouch.errors import AftertouchError, NotFound
from aftertouch.v1 import channels_pb2

PATIENCE = 2.0
"""Seconds that a page waits for the words of a message; the provider may take longer, and is asked on."""


@dataclass(frozen=True)
class Offer:
    """What somebody can choose from."""

    templates: Sequence[channels_pb2.Template] = ()
    problem: str = ""
    """Why there is nothing to choose from."""


def name_choice(template: channels_pb2.Template) -> str:
    """What a form calls a template."""
    return f"{template.template}/{template.language}"


async def list_offer(visit: Visit, channel: str) -> Offer:
    """The account's templates, those that can be used first."""
    try:
        templates = await _list(visit, channel)
    except AftertouchError as error:
        return Offer(problem=explain(error))
    return Offer(sorted(templates, key=lambda template: not template.usable))


async def _list(visit: Visit, channel: str) -> list[channels_pb2.Template]:
    found: list[channels_pb2.Template] = []
    request = channels_pb2.ListTemplatesRequest(parent=visit.parent, channel=channel, page_size=1000)
    while True:
        listed = await visit.client.channels.ListTemplates(request)
        found += listed.templates
        if not listed.next_page_token:
            return found
        request.page_token = listed.next_page_token


async def find_chosen(visit: Visit, channel: str, choice: str) -> channels_pb2.Template:
    """The template that ``name_choice`` calls so.

    Raises:
        NotFound, TemplatesUnreadable.
    """
    for template in await _list(visit, channel):
        if name_choice(template) == choice:
            return template
    raise NotFound(f"templates/{choice}")


def find_used(templates: Sequence[channels_pb2.Template], content: Mapping[str, Any]) -> channels_pb2.Template | None:
    """The template that a content uses: whatever the template's own content gives besides empty texts, this one has as well."""
    for template in templates:
        given = {
            name: value for name, value in json_format.MessageToDict(template.content).items() if isinstance(value, str) and value
        }
        if given and given.items() <= content.items():
            return template
    return None


async def read_words(visit: Visit, channel: str, content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The words of the template that a content uses, filled in; None without one, or when the provider does not say in time."""
    try:
        async with asyncio.timeout(PATIENCE):
            templates = await _list(visit, channel)
    except (AftertouchError, TimeoutError):
        return None
    template = find_used(templates, content)
    if template is None:
        return None
    words = {"header": template.header, "body": template.body, "footer": template.footer, "buttons": list(template.buttons)}
    return render_words(words, content)
