"""Content forms: fields from a schema, and a filled-in form as content again."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from aftertouch.console.contents import Field as FormField
from aftertouch.console.contents import make_form, read_form
from aftertouch.errors import Violation


class Media(BaseModel):
    kind: Literal["image", "video"]
    link: str


class Button(BaseModel):
    place: int
    value: str


class Content(BaseModel):
    """One of every kind of field that a channel may declare."""

    title: str = Field(description="What stands on top.")
    body: str = ""
    header: str | Media | None = None
    words: list[str] | dict[str, str] = []
    buttons: list[Button] = []
    urgency: Literal["low", "high"] | None = None
    is_silent: bool = False


SCHEMA = Content.model_json_schema()


def list_fields(form: FormField) -> dict[str, FormField]:
    found = {form.path: form}
    for part in form.parts:
        found |= list_fields(part)
    return found


def fill(content: dict[str, Any]) -> dict[str, str]:
    """What a browser sends for the form of a content."""
    values = {}
    for field in list_fields(make_form(SCHEMA, content)).values():
        if field.variants:
            values[f"{field.path}@"] = str(field.variant)
        if field.kind == "flag":
            values |= {field.path: "1"} if field.value else {}
        elif field.kind in ("text", "long", "number", "choice"):
            values[field.path] = "" if field.value is None else str(field.value)
    return values


def test_form_has_a_field_for_each_kind() -> None:
    fields = list_fields(make_form(SCHEMA, {}))
    kinds = {path.removeprefix("content").lstrip("."): field.kind for path, field in fields.items()}
    assert kinds == {
        "": "group",
        "title": "text",
        "body": "long",
        "header": "text",
        "words": "list",
        "buttons": "list",
        "urgency": "choice",
        "is_silent": "flag",
    }
    assert (fields["content.title"].is_required, fields["content.body"].is_required) == (True, False)
    assert fields["content.title"].hint == "What stands on top."
    assert fields["content.header"].variants == ("Text", "Media")
    assert fields["content.urgency"].choices == ("low", "high")


def test_form_filled_in_is_the_content_again() -> None:
    contents: list[dict[str, Any]] = [
        {"title": "Sale"},
        {"title": "Sale", "header": "Today", "words": ["a", "b"], "urgency": "high", "is_silent": True},
        {"title": "Sale", "header": {"kind": "image", "link": "https://x.example/a.png"}, "words": {"name": "Ana"}},
        {"title": "Sale", "buttons": [{"place": 0, "value": "x"}, {"place": 1, "value": "y"}]},
    ]
    for content in contents:
        read = read_form(SCHEMA, fill(content))
        assert Content.model_validate(read) == Content.model_validate(content)


def test_form_left_empty_says_nothing() -> None:
    assert read_form(SCHEMA, fill({})) == {"is_silent": False}


def test_form_with_another_variant_chosen_takes_it() -> None:
    values = {"content.title": "Sale", "content.header@": "1", "content.header": "lost", "content.header.link": "x"}
    assert read_form(SCHEMA, values) == {"title": "Sale", "header": {"link": "x"}, "is_silent": False}


def test_form_keeps_a_number_that_is_none_for_the_channel_to_refuse() -> None:
    assert read_form(SCHEMA, {"content.buttons.0.place": "one"})["buttons"] == [{"place": "one"}]


def test_form_shows_a_refusal_at_the_innermost_field_that_it_is_about() -> None:
    content = {"header": {"kind": "image"}, "buttons": [{"value": "{{"}], "words": ["a"]}
    places = {
        "campaign.content.title": "content.title",
        "campaign.content.header.Media.link": "content.header.link",
        "campaign.content.buttons.0.place": "content.buttons.0.place",
        "campaign.content.buttons[0].value": "content.buttons.0.value",
        "campaign.content.words.list[str].0": "content.words.0",
        "campaign.content.nothing": "content",
    }
    for path, place in places.items():
        form = make_form(SCHEMA, content, [Violation(path, "is wrong")])
        assert [field.path for field in form.faulty] == [place], path


def test_form_of_a_hostile_size_reads_no_endless_list() -> None:
    values = {f"content.words.{index}": "x" for index in (0, 9999, 123456789)}
    assert read_form(SCHEMA, values)["words"] == ["x", "x"]


def test_form_names_the_parameter_that_a_refusal_is_about() -> None:
    schema = {
        "type": "object",
        "properties": {"body": {"type": "object"}, "note": {"type": "string", "description": "As in ``x``."}},
    }
    violation = Violation("campaign.content.body.voucher", "is empty")
    form = make_form(schema, {"body": {"first_name": "Ada", "voucher": ""}}, [violation])
    assert [(field.label, field.faults) for field in form.faulty] == [("voucher", ["is empty"])]
    assert form.parts[1].hint == "As in x."
