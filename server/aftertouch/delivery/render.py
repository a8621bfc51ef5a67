"""Content with Liquid in it, compiled once a campaign and rendered once a message.

A variable that the contact lacks is an error unless the template gives a default, and null or an empty text counts as
lacking: nobody is ever greeted with a hole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import structlog
from liquid import BoundTemplate, Environment, FalsyStrictUndefined
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import Filter, FilteredExpression, Path, PositionalArgument, StringLiteral
from liquid.builtin.output import OutputNode
from liquid.exceptions import LiquidError, LiquidSyntaxError, TemplateNotFoundError, UndefinedError

from aftertouch.channels import Content
from aftertouch.links import VARIABLE, find_front_page, is_same_site

log = structlog.get_logger()


class _Missing(FalsyStrictUndefined):
    """False in a condition and replaced by the filter ``default``; an error wherever its value is needed."""

    force_liquid_default = True


class _Environment(Environment):
    # A template is a caller's text: bounded, so that one campaign cannot hold a worker. 1,000 steps and 64 kB are far beyond
    # any message (Web push takes 4 kB, SMS 1.6 kB).
    loop_iteration_limit = 1_000
    local_namespace_limit = 100_000
    output_stream_limit = 65_536


_LIQUID = _Environment(undefined=_Missing)

Render = Callable[[Mapping[str, Any]], Any]


class RenderError(Exception):
    """The content cannot be rendered for this contact; ``code`` says why, as a reason code."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def find_template_errors(content: Any, path: str = "content") -> Iterator[tuple[str, str]]:
    """The field path and text of every Liquid error in a content."""
    if isinstance(content, str):
        try:
            # Liquid meets a filter or template that does not exist only when it renders: everybody would be skipped.
            used = _parse(content).analyze().filters
        except TemplateNotFoundError as error:
            yield path, f"there is no template {str(error).splitlines()[0]!r}: a content cannot render or include another"
        except LiquidError as error:
            yield path, str(error).splitlines()[0]
        else:
            yield from ((path, f"there is no filter {name!r}") for name in used if name not in _LIQUID.filters)
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from find_template_errors(value, f"{path}.{key}")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from find_template_errors(value, f"{path}[{index}]")


def _parse(text: str) -> BoundTemplate:
    # Liquid's lexer tries every end of what follows a tag without one: 16 s for 16,000 characters.
    start = text.rfind("{%")
    if start >= 0 and "%}" not in text[start:]:
        raise LiquidSyntaxError("expected '%}' after the last '{%'", token=None)
    return _LIQUID.from_string(text)


class ContentTemplate:
    """A campaign's content, ready to be rendered for one contact after the other."""

    def __init__(self, content: Mapping[str, Any], model: type[Content], link_url: str = "") -> None:
        """Compile it; ``link_url`` is what tracked links begin with, before the token."""
        self._render = _compile(content)
        self._model = model
        self._link_url = link_url

    def render(self, external_id: str, attributes: Mapping[str, Any], token: str = "") -> Content:
        """The content for one contact.

        Raises:
            RenderError: an attribute is missing, or what came out is not what the channel takes.
        """
        known = {name: value for name, value in attributes.items() if value not in (None, "")}
        try:
            rendered = self._render({"external_id": external_id, **known, VARIABLE: f"{self._link_url}{token}"})
        except UndefinedError as error:
            raise RenderError("missing_attribute") from error
        except Exception as error:
            # Filters let through what Python raises over an odd attribute (``true | plus: 1`` is a decimal.InvalidOperation),
            # and one person's attributes must not hold up everybody behind them.
            raise RenderError("template_error") from error
        try:
            return self._model.model_validate(rendered)
        except ValueError as error:
            raise RenderError("invalid_content") from error


def render_words(words: Mapping[str, Any], content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """A template's words over a rendered content; None where they are no Liquid, or do not go with it."""
    try:
        rendered: Mapping[str, Any] = _compile(words)(content)
    except Exception as error:
        # They come from a plugin, and a filter raises whatever Python does.
        log.info("a template's words cannot be shown", action="render_words", cause=type(error).__name__)
        return None
    return rendered


def render_link(link: str, external_id: str, attributes: Mapping[str, Any]) -> str:
    """Where a link of a content leads for one contact: to its site's front page when it cannot be rendered (any more)."""
    known = {name: value for name, value in attributes.items() if value not in (None, "")}
    try:
        rendered = str(_compile(link)({"external_id": external_id, **known}))
    except Exception as error:
        # As in ``render``: an odd attribute raises whatever Python does over it.
        log.info("a link cannot be rendered", action="follow_link", cause=type(error).__name__)
        return find_front_page(link)
    return rendered if is_same_site(link, rendered) else find_front_page(link)


def _compile(value: Any) -> Render:
    if isinstance(value, str):
        if "{{" not in value and "{%" not in value:
            return lambda _: value
        return _compile_text(_parse(value))
    if isinstance(value, Mapping):
        fields = {key: _compile(inner) for key, inner in value.items()}
        return lambda attributes: {key: render(attributes) for key, render in fields.items()}
    if isinstance(value, list):
        items = [_compile(inner) for inner in value]
        return lambda attributes: [render(attributes) for render in items]
    return lambda _: value


class _Variable(NamedTuple):
    name: str
    default: str | None


_OWN_VARIABLES = frozenset(("now", "today"))
"""Defined in Liquid itself, whatever the attributes are."""


def _compile_text(template: BoundTemplate) -> Render:
    """What Liquid would render, in a tenth of its 20 µs where the template is text and plain variables, as nearly all are.

    It is read off Liquid's own parse tree, and whatever is not plain about a template or an attribute is left to Liquid.
    """
    parts: list[str | _Variable] = []
    for node in template.nodes:
        part = _simplify(node)
        if part is None:
            return template.render
        parts.append(part)

    def render(attributes: Mapping[str, Any]) -> str:
        texts = []
        for part in parts:
            if isinstance(part, _Variable):
                text = attributes.get(part.name, part.default)
                if type(text) is not str or not text:
                    return template.render(attributes)
                texts.append(text)
            else:
                texts.append(part)
        whole = "".join(texts)
        size = len(whole) if whole.isascii() else len(whole.encode())
        # Liquid has its own way with line breaks.
        if "\r" in whole or size > _Environment.output_stream_limit:
            return template.render(attributes)
        return whole

    return render


def _simplify(node: object) -> str | _Variable | None:
    """A node that is a text, or a variable with at most a text as its default; None for any other."""
    match node:
        case ContentNode(text=str(text)):
            return text
        case OutputNode(expression=FilteredExpression(left=Path(path=[str(name)]), filters=[])):
            return _Variable(name, None)
        case OutputNode(
            expression=FilteredExpression(
                left=Path(path=[str(name)]),
                filters=[Filter(name="default", args=[PositionalArgument(value=StringLiteral(value=str(default)))])],
            )
        ) if name not in _OWN_VARIABLES:
            return _Variable(name, default)
    return None
