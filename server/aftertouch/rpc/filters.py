"""Filters of lists: ``field = value`` and ``field : text`` joined by AND, the part of AIP-160 that a list documents.

Whatever else AIP-160 allows is refused with the place where reading stopped, so that no condition is silently ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from aftertouch.errors import FieldsInvalid, Violation

_CONDITION = re.compile(r'\s*([a-z_]+)\s*([=:])\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"]+))\s*')
_AND = re.compile(r"AND\b")


def read_filter(text: str, operators: Mapping[str, str]) -> dict[str, str]:
    """The value of each field that is named.

    Args:
        operators: by field, the one that it is asked with: ``=`` equals, ``:`` contains.

    Raises:
        FieldsInvalid: the filter cannot be read, or names a field twice or one that the list does not have.
    """
    values: dict[str, str] = {}
    at = 0
    while text.strip():
        condition = _CONDITION.match(text, at)
        if condition is None:
            raise _refuse(f"cannot be read from {text[at : at + 40]!r} on; write conditions like state = SENT, joined by AND")
        field, operator, quoted, bare = condition.groups()
        if operators.get(field) != operator:
            known = ", ".join(f"{name} {sign}" for name, sign in operators.items())
            raise _refuse(f"has no condition {field} {operator}; there are {known}")
        if field in values:
            raise _refuse(f"names {field} twice")
        values[field] = bare if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        at = condition.end()
        if at == len(text):
            break
        joined = _AND.match(text, at)
        if joined is None:
            raise _refuse(f"has {text[at : at + 40]!r} where AND is expected")
        at = joined.end()
    return values


def quote(value: str) -> str:
    """A value as it stands in a filter."""
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _refuse(text: str) -> FieldsInvalid:
    return FieldsInvalid([Violation("filter", text)])
