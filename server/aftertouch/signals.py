"""Signals, what they imply, and boolean expressions over them; pure, and the same for numpy, SQL and plain integers.

An expression that is false for somebody of whom nothing is known can be evaluated on bits without knowing who exists:
padding bits and people who were never sent to stay false. ``parse`` therefore refuses every other expression.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

CORE_IMPLICATIONS: Mapping[str, tuple[str, ...]] = {
    "attempted": (),
    "sent": ("attempted",),
    "failed": ("attempted",),
    "skipped": (),
}
"""The signals that every channel has, and what they imply."""

PRICED = "priced"
"""No signal that anybody can ask for, but kept like one: what somebody's messages cost, as currency and amount."""

RESERVED = frozenset({*CORE_IMPLICATIONS, "refused", PRICED})
"""Names that no channel may give a signal of its own."""

_TOKEN = re.compile(r"\s*(?:([a-z][a-z0-9_]*)|([&|~()]))")


class ExpressionError(ValueError):
    """An expression cannot be used; the text says why and where."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression: a signal's name, or an operator over expressions."""

    operator: str
    """``name``, ``&``, ``|`` or ``~``."""
    operands: tuple[Expression, ...] = ()
    name: str = ""

    @property
    def names(self) -> frozenset[str]:
        """Every signal that the expression mentions."""
        if self.operator == "name":
            return frozenset((self.name,))
        return frozenset().union(*(operand.names for operand in self.operands))

    def evaluate(self, value_of: Callable[[str], Any]) -> Any:
        """Compute the expression with ``&``, ``|`` and ``~`` on whatever ``value_of`` returns: packed numpy bits, integers."""
        if self.operator == "name":
            return value_of(self.name)
        values = [operand.evaluate(value_of) for operand in self.operands]
        if self.operator == "~":
            return ~values[0]
        return reduce((lambda a, b: a & b) if self.operator == "&" else (lambda a, b: a | b), values)

    def compile_sql(self, column_of: Callable[[str], str]) -> str:
        """Write the expression for PostgreSQL bit strings of one length, one non-null column per signal."""
        if self.operator == "name":
            return column_of(self.name)
        parts = [operand.compile_sql(column_of) for operand in self.operands]
        if self.operator == "~":
            return f"(~ {parts[0]})"
        return "(" + f" {self.operator} ".join(parts) + ")"

    def __str__(self) -> str:
        return self.compile_sql(lambda name: name)


def parse(text: str, known: Iterable[str]) -> Expression:
    """Parse ``text`` over the ``known`` signals; ``~`` binds closest, then ``&``, then ``|``.

    Raises:
        ExpressionError: a syntax error, a name that is not known, or an expression that is true of somebody of whom nothing
            is known.
    """
    tokens = _tokenize(text)
    known = frozenset(known)

    def parse_or() -> Expression:
        return _parse_chain("|", parse_and)

    def parse_and() -> Expression:
        return _parse_chain("&", parse_not)

    def _parse_chain(operator: str, parse_operand: Callable[[], Expression]) -> Expression:
        operands = [parse_operand()]
        while tokens and tokens[0] == operator:
            tokens.pop(0)
            operands.append(parse_operand())
        return operands[0] if len(operands) == 1 else Expression(operator, tuple(operands))

    def parse_not() -> Expression:
        if not tokens:
            raise ExpressionError(f"{text!r} ends where a signal is expected")
        token = tokens.pop(0)
        if token == "~":
            return Expression("~", (parse_not(),))
        if token == "(":
            inner = parse_or()
            if not tokens or tokens.pop(0) != ")":
                raise ExpressionError(f"{text!r} lacks a closing parenthesis")
            return inner
        if token in "&|)":
            raise ExpressionError(f"{text!r} has {token!r} where a signal is expected")
        if token not in known:
            raise ExpressionError(f"{text!r} names the signal {token!r}; known are {', '.join(sorted(known))}")
        return Expression("name", name=token)

    expression = parse_or()
    if tokens:
        raise ExpressionError(f"{text!r} goes on with {tokens[0]!r} where it should end")
    if expression.evaluate(lambda _: 0) & 1:
        raise ExpressionError(f"{text!r} is true of people who were never sent to; begin it with what must be true of them")
    return expression


def _tokenize(text: str) -> list[str]:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ExpressionError(f"{text!r} has the unknown character {text[at:].strip()[0]!r}")
        tokens.append(match[1] or match[2])
        at = match.end()
    return tokens


def close_implications(implies: Mapping[str, Iterable[str]]) -> dict[str, frozenset[str]]:
    """For each signal, the signals that are evidence of it: itself and all that imply it, directly or not.

    Raises:
        ExpressionError: an implication names a signal that is not declared.
    """
    unknown = {target for targets in implies.values() for target in targets} - implies.keys()
    if unknown:
        raise ExpressionError(f"implied but not declared: {', '.join(sorted(unknown))}")
    evidence = {name: {name} for name in implies}
    changed = True
    while changed:
        changed = False
        for name, targets in implies.items():
            for target in targets:
                if not evidence[name] <= evidence[target]:
                    evidence[target] |= evidence[name]
                    changed = True
    return {name: frozenset(names) for name, names in evidence.items()}
