"""Rendering: nobody is greeted with a hole, and no template holds a worker."""

from __future__ import annotations

from typing import Any

import pytest

from aftertouch.channels import Content
from aftertouch.delivery.render import ContentTemplate, RenderError, find_template_errors


class Text(Content):
    body: str
    items: list[str] = []
    nested: dict[str, str] = {}


def render(body: str, **attributes: Any) -> str:
    rendered = ContentTemplate({"body": body}, Text).render("ada", attributes)
    assert isinstance(rendered, Text)
    return rendered.body


def fail(body: str, **attributes: Any) -> str:
    with pytest.raises(RenderError) as caught:
        render(body, **attributes)
    return caught.value.code


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("plain { text }", "plain { text }"),
        ("Hi {{ first_name }}", "Hi Zoë"),
        ("{{ first_name | upcase }} {{ n }} {{ external_id }}", "ZOË 3 ada"),
        ("{{ missing | default: 'there' }}", "there"),
        ("{{ hollow | default: 'there' }}{{ none | default: '!' }}", "there!"),
        ("{% if missing %}a{% else %}b{% endif %}", "b"),
        ("{% if first_name %}{{ first_name }}{% endif %}", "Zoë"),
        ("{{ address.city }}", "Madrid"),
        ("{% for tag in tags %}{{ tag }},{% endfor %}", "x,y,"),
        ("{{ html }}", "<b>&</b>"),
        ("{{ no }}", "false"),
    ],
)
def test_text_is_rendered_with_attributes(body: str, text: str) -> None:
    attributes = {"first_name": "Zoë", "n": 3, "hollow": "", "none": None, "no": False, "html": "<b>&</b>"}
    assert render(body, **attributes, address={"city": "Madrid"}, tags=["x", "y"]) == text


@pytest.mark.parametrize("body", ["{{ missing }}", "{{ hollow }}", "{{ none }}", "{{ missing.city }}", "{{ missing | upcase }}"])
def test_attribute_that_lacks_is_an_error(body: str) -> None:
    assert fail(body, hollow="", none=None) == "missing_attribute"


def test_attribute_inside_another_that_lacks_is_an_error() -> None:
    assert fail("{{ address.city }}", address={"street": "x"}) == "missing_attribute"


def test_own_id_cannot_be_hidden_by_nothing() -> None:
    assert render("{{ external_id }}", external_id=None) == "ada"


@pytest.mark.parametrize(
    "body",
    [
        "{% for i in (1..100000000) %}x{% endfor %}",
        "{% for i in (1..900) %}{% for j in (1..900) %}x{% endfor %}{% endfor %}",
        "{% for i in (1..900) %}" + "x" * 1000 + "{% endfor %}",
        "{{ 1 | divided_by: 0 }}",
    ],
)
def test_template_without_an_end_is_an_error(body: str) -> None:
    assert fail(body) == "template_error"


def test_content_that_the_channel_does_not_take_is_an_error() -> None:
    with pytest.raises(RenderError, match="invalid_content"):
        ContentTemplate({"body": "x", "more": "{{ external_id }}"}, Text).render("ada", {})


def test_lists_and_objects_are_rendered_inside() -> None:
    content = {"body": "{{ a }}", "items": ["{{ a }}", "b"], "nested": {"k": "{{ a }}!"}}
    rendered = ContentTemplate(content, Text).render("ada", {"a": "A"})
    assert rendered == Text(body="A", items=["A", "b"], nested={"k": "A!"})


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("{{ a", "expected"),
        ("{% if %}{% endif %}", ""),
        ("{% nonsense %}", "nonsense"),
        ("{{ a | nonsense }}", "there is no filter 'nonsense'"),
        ("{% include 'other' %}", "there is no template 'other'"),
    ],
)
def test_errors_of_templates_are_found_with_their_place(text: str, cause: str) -> None:
    ((path, found),) = find_template_errors({"body": "fine", "items": ["fine", {"k": text}], "n": 5})
    assert path == "content.items[1].k"
    assert cause in found


def test_errors_are_none_in_a_content_without_templates() -> None:
    assert list(find_template_errors({"a": "{ x }", "b": [1, None, True, {}]})) == []
