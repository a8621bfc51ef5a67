"""Content forms, made from a channel's JSON Schema: its fields, and a filled-in form as content again.

A field's name is its path in the content (``buttons.0.value``), which is also what a refusal names it by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aftertouch.errors import Violation

_LONG = frozenset({"body", "text", "message", "description"})
"""Names of strings that get several lines."""


@dataclass
class Field:
    """One place in a content."""

    path: str
    label: str
    kind: str
    """text, long, number, choice, flag; or list, map, group with ``parts``."""
    value: Any = None
    is_required: bool = False
    hint: str = ""
    choices: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    """What else could stand here, as labels; ``variant`` is the one that does."""
    variant: int = 0
    parts: list[Field] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def item_label(self) -> str:
        """What one part of a list is called."""
        return self.label.removesuffix("s")

    @property
    def faulty(self) -> list[Field]:
        """The innermost fields that something is wrong with."""
        inner = [found for part in self.parts for found in part.faulty]
        return inner + ([self] if self.faults else [])

    @property
    def id(self) -> str:
        """As an element's id."""
        return "field-" + re.sub(r"[^a-z0-9]+", "-", self.path.lower())


def make_form(
    schema: Mapping[str, Any],
    content: Mapping[str, Any],
    violations: Iterable[Violation] = (),
    values: Mapping[str, str] | None = None,
) -> Field:
    """The fields of a content, with its values and with what is wrong with them.

    Args:
        values: of a form that somebody is filling in: a kind of value is chosen there before there is a value.
    """
    form = _Maker(schema, values or {}).make(schema, "content", dict(content), is_required=True)
    for violation in violations:
        path = re.sub(r"\[(\d+)\]", r".\1", violation.field.removeprefix("campaign."))
        _find_nearest(form, path).faults.append(violation.description)
    return form


def read_form(schema: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """The content that a filled-in form stands for; what was left empty is left out."""
    content = _read_value(schema, schema, "content", values)
    return content if isinstance(content, dict) else {}


def _resolve(root: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in schema:
        found: Mapping[str, Any] = root["$defs"][schema["$ref"].rpartition("/")[2]]
        schema = {**found, **{key: value for key, value in schema.items() if key != "$ref"}}
    return schema


def _list_variants(root: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What may stand at a place, without null: that is the field left empty."""
    given = schema.get("anyOf") or schema.get("oneOf") or [schema]
    resolved = [_resolve(root, option) for option in given]
    return [option for option in resolved if option.get("type") != "null"]


def _name_variant(schema: Mapping[str, Any]) -> str:
    match schema.get("type"):
        case "string":
            return "Text"
        case "array":
            return "In order"
        case "object" if "properties" not in schema:
            return "By name"
        case kind:
            return str(schema.get("title") or kind or "Value")


def _fits(schema: Mapping[str, Any], value: Any) -> bool:
    match schema.get("type"):
        case "object":
            return isinstance(value, Mapping)
        case "array":
            return isinstance(value, list)
        case "string":
            return isinstance(value, str)
        case _:
            return not isinstance(value, Mapping | list)


class _Maker:
    """Makes the fields of one form."""

    def __init__(self, root: Mapping[str, Any], values: Mapping[str, str]) -> None:
        self._root = root
        self._values = values

    def make(self, schema: Mapping[str, Any], path: str, value: Any, *, is_required: bool = False, label: str = "") -> Field:
        """The field of a schema at a path, with its parts."""
        schema = _resolve(self._root, schema)
        variants = _list_variants(self._root, schema)
        index = _read_variant(self._values, path, variants)
        if index is None:
            index = next((i for i, variant in enumerate(variants) if value is not None and _fits(variant, value)), 0)
        chosen = variants[index]
        if value is not None and not _fits(chosen, value):
            value = None
        name = path.rpartition(".")[2]
        made = Field(
            path,
            label or str(schema.get("title") or name.replace("_", " ").capitalize()),
            "text",
            value,
            is_required,
            # Descriptions are docstrings: code has backticks there.
            str(schema.get("description") or chosen.get("description") or "").replace("``", ""),
            variants=tuple(map(_name_variant, variants)) if len(variants) > 1 else (),
            variant=index,
        )
        match chosen.get("type"):
            case "object" if "properties" in chosen:
                made.kind = "group"
                required = chosen.get("required", ())
                made.parts = [
                    self.make(part, f"{path}.{key}", (value or {}).get(key, part.get("default")), is_required=key in required)
                    for key, part in chosen["properties"].items()
                ]
            case "object":
                made.kind = "map"
                made.parts = [_make_pair(f"{path}.{place}", *pair) for place, pair in enumerate((value or {}).items())]
            case "array":
                made.kind = "list"
                made.parts = [
                    self.make(chosen.get("items", {}), f"{path}.{place}", item, label=f"{made.item_label} {place + 1}")
                    for place, item in enumerate(value or [])
                ]
            case "integer" | "number":
                made.kind = "number"
            case "boolean":
                made.kind = "flag"
            case _ if "enum" in chosen:
                made.kind, made.choices = "choice", tuple(map(str, chosen["enum"]))
            case _ if name in _LONG:
                made.kind = "long"
        return made


def _read_variant(values: Mapping[str, str], path: str, variants: Sequence[Any]) -> int | None:
    """Which of the kinds of value somebody chose for a field; None when nobody chose."""
    given = values.get(f"{path}@", "")
    return int(given) if given.isdecimal() and int(given) < len(variants) else None


def _make_pair(path: str, key: str, text: Any) -> Field:
    parts = [Field(f"{path}.key", "Name", "text", key), Field(f"{path}.value", "Value", "text", text)]
    return Field(path, key or "Parameter", "group", parts=parts)


def _find_nearest(form: Field, path: str) -> Field:
    """The innermost field on a path; a refusal's path may have a variant's name in it (``header.Media.link``)."""
    found = form
    while True:
        rest = path.removeprefix(found.path).lstrip(".").split(".")
        if found.kind == "map" and (pair := next((part for part in found.parts if part.label == rest[0]), None)):
            return pair
        inner = next(
            (part for part in found.parts for at, _ in enumerate(rest) if ".".join([found.path, rest[at]]) == part.path), None
        )
        if inner is None:
            return found
        path = ".".join([inner.path, *rest[rest.index(inner.path.rpartition(".")[2]) + 1 :]])
        found = inner


def _read_value(root: Mapping[str, Any], schema: Mapping[str, Any], path: str, values: Mapping[str, str]) -> Any:
    schema = _resolve(root, schema)
    variants = _list_variants(root, schema)
    chosen = variants[_read_variant(values, path, variants) or 0]
    text = values.get(path, "")
    match chosen.get("type"):
        case "object" if "properties" in chosen:
            parts = {key: _read_value(root, part, f"{path}.{key}", values) for key, part in chosen["properties"].items()}
            return {key: part for key, part in parts.items() if part is not None} or None
        case "object":
            pairs = {values.get(f"{path}.{i}.key", ""): values.get(f"{path}.{i}.value", "") for i in _list_places(values, path)}
            return pairs or None
        case "array":
            items = [_read_value(root, chosen.get("items", {}), f"{path}.{i}", values) for i in _list_places(values, path)]
            return ["" if item is None else item for item in items] or None
        case "integer" | "number" if text:
            try:
                return int(text) if chosen["type"] == "integer" else float(text)
            except ValueError:
                return text
        case "boolean":
            return path in values
        case _:
            return text or None


def _list_places(values: Mapping[str, str], path: str) -> list[int]:
    """The places of a list that a form has fields for, in order."""
    found = {
        int(match[1]) for name in values if (match := re.match(re.escape(path) + r"\.(\d{1,4})(?:[.@]|$)", name)) is not None
    }
    return sorted(found)
