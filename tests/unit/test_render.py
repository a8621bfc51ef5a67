"""Rendering: nobody is greeted with a hole, and no template holds a worker."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from liquid.exceptions import LiquidError

from aftertouch.channels import Content
from aftertouch.delivery import render as rendering
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
        ("{%" + "x" * 60_000, "expected '%}'"),
        ("{% if a %}{% endif %}{% " + "x" * 60_000, "expected '%}'"),
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


NAMES = ["a", "b", "now", "today", "size", "first", "empty", "true", "nil", "external_id", "a-b", "ä"]
QUOTED = st.tuples(st.sampled_from("'\""), st.text(st.characters(exclude_characters="'\"\\"))).map(
    lambda q: f"{q[0]}{q[1]}{q[0]}"
)
VARIABLES = st.one_of(
    st.sampled_from(NAMES),
    st.builds("{} | default: {}".format, st.sampled_from(NAMES), QUOTED | st.sampled_from(NAMES)),
    st.sampled_from(["a | upcase", "a.b", "a['b']", "a[b]", "'x'", "5", "a | default", "a | default: 1"]),
    st.sampled_from(["a | default: '', allow_false: true"]),
)
TAGS = ["{", "}}", "{%", "{% if a %}x{% endif %}", "{% assign a = 'x' %}", "{# x #}"]
PIECES = st.one_of(
    st.text(),
    st.sampled_from([*TAGS, "\r\n", "\n", " ", "x" * 40_000]),
    st.builds("{{{{{} {} {}}}}}".format, st.sampled_from(["", "-"]), VARIABLES, st.sampled_from(["", "-"])),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["", " ", "\r", "é", "\ud800"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["b", "size"]), inner, max_size=2),
    max_leaves=4,
)


@given(st.lists(PIECES, max_size=5).map("".join), st.dictionaries(st.sampled_from(NAMES), VALUES))
def test_text_that_is_compiled_is_what_liquid_renders(text: str, attributes: dict[str, Any]) -> None:
    try:
        template = rendering._parse(text)
    except LiquidError:
        return

    def attempt(render: rendering.Render) -> object:
        try:
            # What time it is, and at midnight what day, depends on when it was asked.
            return re.sub(r"\d{4}-\d\d-\d\d( \d\d:\d\d:[0-9.]+)?", "now", render(attributes))
        except Exception as error:
            return type(error)

    assert attempt(rendering._compile_text(template)) == attempt(template.render)


@pytest.mark.parametrize("text", ["Hi", "Hi {{ a }}", "{{ a | default: 'there' }}, {{- b -}} !"])
def test_text_with_plain_variables_is_not_left_to_liquid(text: str) -> None:
    template = rendering._parse(text)
    assert rendering._compile_text(template) != template.render
