"""Tracked links: which of a content's addresses they stand for, found in its text before anything is rendered.

A link is known by its place in the content, so the same one has the same number for everybody, whatever a condition leaves out.
Only a link whose scheme and host are written out in the content is tracked: where it leads was the campaign's author's choice
alone, never that of whoever wrote an attribute, or of whoever changed the link. So a click leads to no other site.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

LINKS = "/l"
"""The path below which tracked links lead: ``/l/<token><number>``."""
VARIABLE = "aftertouch_link"
"""Liquid's name for what precedes the number in a tracked link; no attribute can take its place."""
MOST_LINKS = 50
"""Of one content; further ones stay as they are."""

_LINK = re.compile(
    r"\{\{[^{}]*\}\}|\{%[^{}]*%\}"  # an address inside of Liquid's own code is a value there
    r"|(?<![\w.+-])(?P<link>https?://[a-z0-9][a-z0-9.-]*+(?::\d{1,5})?+(?![\w:@{%-])"
    r"(?:\{\{[^{}]*\}\}|[^\s\"'<>{}|\\^`\x00-\x20])*+)"
    # After a tag may come more of the address, or not, as its condition is; then nobody can say what the link is.
    r"(?!\{)|(?<![\w.+-])(?P<before_tag>https?://[a-z0-9][a-z0-9.-]*+(?::\d{1,5})?+(?![\w:@%-]|\{\{)"
    r"(?:\{\{[^{}]*\}\}|[^\s\"'<>{}|\\^`\x00-\x20])*+)(?=(?:\{%[^{}]*%\})+(?:\s|$|https?://))",
    re.IGNORECASE,
)
_VERBATIM = re.compile(r"\{%-?\s*(raw|comment)\b")
"""Tags between which Liquid's code is none."""
_AT_THE_END = ".,;:!?'\")]*_"
"""What follows an address in a sentence more often than it ends one."""


@dataclass(frozen=True)
class Tracked:
    """A content with its links replaced, and the links by their numbers; they may hold Liquid."""

    content: Mapping[str, Any]
    links: Sequence[str]


def track_links(content: Mapping[str, Any], paths: Sequence[str]) -> Tracked:
    """Replace the links in the texts at these paths (``body``, ``buttons.url``) of a content that is not rendered yet."""
    links: list[str] = []

    def replace(match: re.Match[str]) -> str:
        found = match["link"] or match["before_tag"]
        if found is None:
            return match[0]
        link = _trim(found)
        if len(links) == MOST_LINKS:
            return match[0]
        links.append(link)
        return f"{{{{ {VARIABLE} }}}}{len(links) - 1}{found[len(link) :]}"

    def walk(value: Any, path: Sequence[str]) -> Any:
        match value:
            case list() | tuple():
                return [walk(item, path) for item in value]
            case dict() if path and path[0] in value:
                return {**value, path[0]: walk(value[path[0]], path[1:])}
            case dict() if not path:
                return {key: walk(item, path) for key, item in value.items()}
            case str() if not path and not _VERBATIM.search(value):
                return _LINK.sub(replace, value)
            case _:
                return value

    changed = dict(content)
    for path in paths:
        changed = walk(changed, path.split("."))
    return Tracked(changed, links)


def _trim(link: str) -> str:
    """The link without the sentence's punctuation; a bracket that it opened itself belongs to it."""
    while link and link[-1] in _AT_THE_END and not (link[-1] == ")" and link.count("(") >= link.count(")")):
        link = link[:-1]
    return link


def find_front_page(link: str) -> str:
    """Scheme and host of a link, as they are written out in it."""
    scheme, _, rest = link.partition("://")
    host = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    return f"{scheme}://{host}/".lower()


def is_same_site(link: str, rendered: str) -> bool:
    """True when a rendered link leads to the host that is written out in the content."""
    return find_front_page(rendered) == find_front_page(link)


def write_location(link: str) -> str:
    """The link as a header can hold it."""
    return quote(link, safe="!#$%&'()*+,/:;=?@[]~-._")
