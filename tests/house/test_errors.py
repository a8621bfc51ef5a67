"""Errors are what errors.proto says: one class for each reason, with the code that its comment names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from aftertouch.errors import AftertouchError
from aftertouch.v1 import (
    apps_pb2,
    campaigns_pb2,
    channels_pb2,
    contacts_pb2,
    errors_pb2,
    events_pb2,
    lists_pb2,
    options_pb2,
    retargeting_pb2,
)

ROOT = Path(__file__).parents[2]
PROTOS = ROOT / "protos" / "aftertouch" / "v1"
VALUE = re.compile(r"(?P<comment>(?:^  //.*\n)+)  (?P<name>[A-Z_]+) = \d+;", re.MULTILINE)
COMMENTS = {match["name"]: match["comment"] for match in VALUE.finditer((PROTOS / "errors.proto").read_text())}
REASONS = set(errors_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
FILES = (apps_pb2, campaigns_pb2, channels_pb2, contacts_pb2, events_pb2, lists_pb2, retargeting_pb2)
METHODS = [
    pytest.param(method, id=f"{service.name}.{method.name}")
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
METHOD_COMMENT = re.compile(r"(?P<comment>(?:^  //.*\n)+)  rpc (?P<name>\w+)\(", re.MULTILINE)


def list_errors(base: type[AftertouchError] = AftertouchError) -> Iterator[type[AftertouchError]]:
    for kind in base.__subclasses__():
        yield kind
        yield from list_errors(kind)


ERRORS = list(list_errors())


def test_every_reason_has_one_class() -> None:
    assert sorted(kind.reason for kind in ERRORS) == sorted(REASONS)


@pytest.mark.parametrize("kind", ERRORS)
def test_comment_of_a_reason_begins_with_its_code(kind: type[AftertouchError]) -> None:
    assert COMMENTS[kind.reason].strip().startswith(f"// {kind.code} {{")


def test_every_file_of_the_protos_is_looked_at() -> None:
    looked_at = {Path(file.DESCRIPTOR.name).name for file in (*FILES, errors_pb2, options_pb2)}
    assert looked_at == {path.name for path in PROTOS.glob("*.proto")}


@pytest.mark.parametrize("method", METHODS)
def test_method_declares_a_scope(method) -> None:
    assert method.GetOptions().Extensions[options_pb2.required_scope] != options_pb2.SCOPE_UNSPECIFIED


@pytest.mark.parametrize("path", sorted(PROTOS.glob("*.proto")), ids=lambda path: path.name)
def test_comments_of_methods_name_reasons_that_exist(path: Path) -> None:
    states = {name for enum in (campaigns_pb2.Campaign.State, campaigns_pb2.Campaign) for name in dir(enum) if name.isupper()}
    for match in METHOD_COMMENT.finditer(path.read_text()):
        named = set(re.findall(r"\b[A-Z]{3,}(?:_[A-Z]+)+\b", match["comment"]))
        assert named <= REASONS | states, match["name"]
