"""What WhatsApp takes from a business: approved templates, and what fills them; the same over every provider."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from aftertouch.channels import Content, Problem, Template, write_words

PLACEHOLDER = re.compile(r"\{\{\s*(\w+)\s*\}\}")


class Media(BaseModel):
    """What a template's header shows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["image", "video", "document"]
    link: str


class Button(BaseModel):
    """What fills one of a template's buttons."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["url", "quick_reply", "copy_code"]
    index: int = Field(ge=0, le=9)
    """The button's place in the template, from 0."""
    value: str
    """The end of the URL, the payload of the reply, or the code to copy. For a template whose button leads to our tracked links
    (``https://<public URL>/l/{{1}}``) the whole address that a click is to lead to."""

    @property
    def is_address(self) -> bool:
        """True for a URL button with a whole address."""
        return self.type == "url" and self.value.startswith(("https://", "http://"))


class WhatsAppContent(Content):
    """An approved template and what fills it.

    Outside the 24 hours after a person's last message nothing but a template may be sent, so this channel sends nothing else.
    """

    template: str = Field(pattern=r"^[a-z0-9_]{1,512}$")
    language: str = Field(pattern=r"^[a-z]{2,3}(_[A-Za-z]{2,4})?$")
    """As the template was approved in: ``en_US``."""
    header: str | Media | None = None
    """A text header's parameter, or the media that the header shows."""
    body: list[str] | dict[Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")], str] = []
    """Parameters in order, or by name where the template has named ones."""
    buttons: list[Button] = []


class ButtonPart(BaseModel):
    """A button of a template."""

    type: str
    text: str = ""
    url: str = ""
    is_fixed: bool = False
    """True for a reply that the template has the payload of."""

    @property
    def takes_value(self) -> bool:
        """False for a button that is the same for everybody."""
        return PLACEHOLDER.search(self.url) is not None if self.type == "URL" else not self.is_fixed


class Part(BaseModel):
    """A part of a template, as the account has it."""

    type: str
    format: str = "TEXT"
    text: str = ""
    buttons: list[ButtonPart] = []


class WhatsAppTemplate(BaseModel):
    """A template of the account, in one language."""

    name: str
    language: str
    status: str
    parameter_format: str = "POSITIONAL"
    components: list[Part] = []


def find_problems(content: WhatsAppContent, templates: Sequence[WhatsAppTemplate]) -> list[Problem]:
    """Say what is wrong with a content, given the account's templates of its name."""
    if not templates:
        return [Problem(field="template", text=f"the account has no template {content.template!r}")]
    found = next((template for template in templates if template.language == content.language), None)
    if found is None:
        languages = ", ".join(sorted(template.language for template in templates))
        return [Problem(field="language", text=f"the template {content.template!r} exists in {languages} only")]
    if found.status != "APPROVED":
        return [Problem(field="template", text=f"the template {content.template!r} is {found.status}, not APPROVED")]
    return [*find_misfits(content, found), *_find_empty(content)]


def _find_empty(content: WhatsAppContent) -> Iterator[Problem]:
    # WhatsApp takes no empty parameter, and one without Liquid in it stays empty for everybody.
    texts = {f"body.{name}": text for name, text in content.body.items()} if isinstance(content.body, dict) else {}
    if isinstance(content.body, list):
        texts = {f"body[{place}]": text for place, text in enumerate(content.body)}
    if content.header is not None:
        texts["header"] = content.header.link if isinstance(content.header, Media) else content.header
    texts |= {f"buttons[{place}].value": button.value for place, button in enumerate(content.buttons)}
    return (Problem(field=field, text="is empty") for field, text in texts.items() if not text.strip())


def describe_template(template: WhatsAppTemplate) -> Template:
    """A template as somebody chooses it: a content that uses it, with nothing filled in, and its words over that."""
    parts = {part.type: part for part in template.components}
    body, header = parts.get("BODY", Part(type="BODY")), parts.get("HEADER", Part(type="HEADER"))
    content: dict[str, object] = {"template": template.name, "language": template.language}
    names = list_parameters(body.text)
    if template.parameter_format == "NAMED":
        content["body"] = dict.fromkeys(names, "")
        fields = {name: f"body['{name}']" for name in names}
    else:
        content["body"] = [""] * len(names)
        fields = {name: f"body[{place}]" for place, name in enumerate(names)}
    shown = write_words(header.text, PLACEHOLDER, dict.fromkeys(PLACEHOLDER.findall(header.text), "header"))
    if header.format in ("IMAGE", "VIDEO", "DOCUMENT", "MEDIA"):
        kind = "image" if header.format == "MEDIA" else header.format.lower()
        content["header"] = {"type": kind, "link": ""}
        shown = f"{{{{ header.link | default: '[{kind}]' }}}}"
    elif PLACEHOLDER.search(header.text):
        content["header"] = ""
    buttons = parts.get("BUTTONS", Part(type="BUTTONS")).buttons
    filled = [
        {"type": button.type.lower(), "index": index, "value": ""}
        for index, button in enumerate(buttons)
        if button.type == "COPY_CODE" or (button.type == "URL" and button.takes_value)
    ]
    if filled:
        content["buttons"] = filled
    return Template(
        name=template.name,
        language=template.language,
        status=template.status,
        is_usable=template.status == "APPROVED",
        content=content,
        header=shown,
        body=write_words(body.text, PLACEHOLDER, fields),
        footer=write_words(parts.get("FOOTER", Part(type="FOOTER")).text, PLACEHOLDER, {}),
        buttons=tuple(write_words(button.text or button.type, PLACEHOLDER, {}) for button in buttons),
    )


def list_parameters(text: str) -> list[str]:
    """The names of a text's parameters; numbers in their order, as they are filled in, which need not be the text's."""
    names = list(dict.fromkeys(PLACEHOLDER.findall(text)))
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def find_misfits(content: WhatsAppContent, template: WhatsAppTemplate) -> list[Problem]:
    """Say which parameters a template lacks, and which it does not take."""
    parts = {part.type: part for part in template.components}
    return [
        *_find_body_problems(content, parts.get("BODY", Part(type="BODY")), template.parameter_format == "NAMED"),
        *_find_header_problems(content, parts.get("HEADER", Part(type="HEADER"))),
        *_find_button_problems(content, parts.get("BUTTONS", Part(type="BUTTONS")).buttons),
    ]


def _find_body_problems(content: WhatsAppContent, body: Part, is_named: bool) -> Iterator[Problem]:
    wanted = list_parameters(body.text)
    if is_named and isinstance(content.body, dict):
        for name in wanted:
            if name not in content.body:
                yield Problem(field="body", text=f"lacks the template's parameter {name!r}")
        for name in content.body:
            if name not in wanted:
                yield Problem(field=f"body.{name}", text="the template has no such parameter")
    elif isinstance(content.body, dict) or (is_named and content.body):
        named, given = ("by name", "in order") if is_named else ("in order", "by name")
        yield Problem(field="body", text=f"has its parameters {given}; the template wants them {named}: {', '.join(wanted)}")
    elif len(content.body) != len(wanted):
        yield Problem(field="body", text=f"has {len(content.body)} parameters, and the template wants {len(wanted)}")


def _find_header_problems(content: WhatsAppContent, header: Part) -> Iterator[Problem]:
    given = content.header.type.upper() if isinstance(content.header, Media) else "TEXT" if content.header is not None else ""
    shown = header.format if header.format in ("IMAGE", "VIDEO", "DOCUMENT", "MEDIA") else ""
    if shown == "MEDIA" and isinstance(content.header, Media):
        return
    wanted = shown or ("TEXT" if PLACEHOLDER.search(header.text) else "")
    if given != wanted:
        text = f"the template's header wants {wanted.lower()}" if wanted else "the template's header takes no parameter"
        yield Problem(field="header", text=f"{text}, and has {given.lower() or 'nothing'}")


def _find_button_problems(content: WhatsAppContent, buttons: Sequence[ButtonPart]) -> Iterator[Problem]:
    given = {button.index: button for button in content.buttons}
    for index, button in enumerate(buttons):
        if button.type == "URL" and button.takes_value and index not in given:
            yield Problem(field="buttons", text=f"the template's button {index} wants the end of its URL")
        if button.type == "COPY_CODE" and index not in given:
            yield Problem(field="buttons", text=f"the template's button {index} wants the code to copy")
    for place, button_given in enumerate(content.buttons):
        kind = buttons[button_given.index].type if button_given.index < len(buttons) else "none"
        if kind == button_given.type.upper() and not buttons[button_given.index].takes_value:
            yield Problem(field=f"buttons[{place}]", text=f"button {button_given.index} of the template takes no value")
        if kind != button_given.type.upper():
            text = f"button {button_given.index} of the template is {kind.lower()}, not {button_given.type}"
            yield Problem(field=f"buttons[{place}]", text=text)
