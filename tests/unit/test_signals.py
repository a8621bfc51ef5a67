"""Expressions over signals: what is parsed, what is refused, and that every way of computing one agrees."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from aftertouch.signals import CORE_IMPLICATIONS, Expression, ExpressionError, close_implications, parse

NAMES = ("sent", "delivered", "read", "failed")

expressions: st.SearchStrategy[Expression] = st.recursive(
    st.sampled_from(NAMES).map(lambda name: Expression("name", name=name)),
    lambda inner: st.one_of(
        inner.map(lambda operand: Expression("~", (operand,))),
        st.tuples(st.sampled_from("&|"), st.lists(inner, min_size=2, max_size=3)).map(lambda p: Expression(p[0], tuple(p[1]))),
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("sent", "sent"),
        (" sent&~read ", "(sent & (~ read))"),
        ("failed | sent & ~delivered", "(failed | (sent & (~ delivered)))"),
        ("(failed | sent) & ~delivered", "((failed | sent) & (~ delivered))"),
        ("~~sent", "(~ (~ sent))"),
        ("sent & delivered & read", "(sent & delivered & read)"),
    ],
)
def test_parse_binds_not_then_and_then_or(text: str, meaning: str) -> None:
    assert str(parse(text, NAMES)) == meaning


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("", "ends where a signal is expected"),
        ("sent &", "ends where a signal is expected"),
        ("& sent", "has '&' where a signal is expected"),
        ("()", "has ')' where a signal is expected"),
        ("(sent", "lacks a closing parenthesis"),
        ("(sent read)", "lacks a closing parenthesis"),
        ("sent read", "goes on with 'read'"),
        ("sent)", "goes on with ')'"),
        ("sent + read", "unknown character '+'"),
        ("Sent", "unknown character 'S'"),
        ("clicked", "names the signal 'clicked'; known are delivered, failed, read, sent"),
        ("~read", "true of people who were never sent to"),
        ("sent | ~read", "true of people who were never sent to"),
        ("~(sent & read)", "true of people who were never sent to"),
    ],
)
def test_parse_says_why_an_expression_cannot_be_used(text: str, cause: str) -> None:
    with pytest.raises(ExpressionError, match=re.escape(cause)):
        parse(text, NAMES)


@given(expressions)
def test_parse_reads_back_what_str_writes(expression: Expression) -> None:
    assume(not expression.evaluate(lambda _: 0) & 1)
    again = parse(str(expression), NAMES)
    assert again.names == expression.names
    for bits in itertools.product((0, -1), repeat=len(NAMES)):
        values = dict(zip(NAMES, bits, strict=True))
        assert again.evaluate(values.__getitem__) == expression.evaluate(values.__getitem__)


@given(expressions)
def test_evaluate_works_on_every_bit_apart(expression: Expression) -> None:
    """Sixteen people, one of each possible history, in four integers: the same as asking for each person alone."""
    columns = {name: sum(((person >> at) & 1) << person for person in range(16)) for at, name in enumerate(NAMES)}
    together = expression.evaluate(columns.__getitem__)
    for person in range(16):
        alone = expression.evaluate(lambda name, person=person: (columns[name] >> person) & 1)
        assert (together >> person) & 1 == alone & 1


@given(expressions)
def test_compile_sql_computes_what_evaluate_does(expression: Expression) -> None:
    """PostgreSQL's bit operators bind as Python's do inside the parentheses that are written, so Python can run the text."""
    for bits in itertools.product((0, -1), repeat=len(NAMES)):
        values = dict(zip(NAMES, bits, strict=True))
        assert eval(expression.compile_sql(lambda name: f"{name}"), {}, values) == expression.evaluate(values.__getitem__)


@given(expressions)
def test_parsed_expression_is_false_of_people_never_sent_to(expression: Expression) -> None:
    try:
        parsed = parse(str(expression), NAMES)
    except ExpressionError:
        assert expression.evaluate(lambda _: 0) & 1
    else:
        assert not parsed.evaluate(lambda _: 0) & 1


def test_implications_are_transitive() -> None:
    evidence = close_implications({**CORE_IMPLICATIONS, "delivered": ("sent",), "read": ("delivered",)})
    assert evidence["read"] == {"read"}
    assert evidence["delivered"] == {"delivered", "read"}
    assert evidence["sent"] == {"sent", "delivered", "read"}
    assert evidence["attempted"] == {"attempted", "sent", "failed", "delivered", "read"}
    assert evidence["skipped"] == {"skipped"}


def test_implication_of_an_undeclared_signal_is_refused() -> None:
    with pytest.raises(ExpressionError, match="implied but not declared: delivered"):
        close_implications({"read": ("delivered",)})


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.sampled_from("abcdef"), max_size=3)))
def test_evidence_is_what_reaches_a_signal(implies: dict[str, list[str]]) -> None:
    graph = {name: [target for target in targets if target in implies] for name, targets in implies.items()}

    def reach(name: str) -> set[str]:
        seen, ahead = set(), [name]
        while ahead:
            here = ahead.pop()
            if here not in seen:
                seen.add(here)
                ahead.extend(graph[here])
        return seen

    expected = {target: {name for name in graph if target in reach(name)} for target in graph}
    assert close_implications(graph) == expected
