"""What can be said of a request by its message alone: required fields and the rules in the protos."""

from __future__ import annotations

from collections.abc import Iterator

import protovalidate
from google.api import field_behavior_pb2
from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from aftertouch.errors import FieldsInvalid, Violation

_NUL = "contains the character U+0000, which PostgreSQL cannot store"


def check_message(message: Message) -> None:
    """Drop what is output only, then raise ``FieldsInvalid`` with everything that is wrong with the request."""
    # An update names a part of its resource, so what the whole resource requires is not asked of it.
    is_update = "update_mask" in message.DESCRIPTOR.fields_by_name
    faults = [violation for violation in _find_faults(message, "") if not (is_update and "." in violation.field)]
    if faults:
        raise FieldsInvalid(faults)
    found = protovalidate.collect_violations(message)
    if found:
        raise FieldsInvalid(Violation(_join_path(violation.proto), violation.proto.message) for violation in found)


def _find_faults(message: Message, path: str) -> Iterator[Violation]:
    for field in message.DESCRIPTOR.fields:
        behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        place = f"{path}{field.name}"
        if field_behavior_pb2.OUTPUT_ONLY in behaviors:
            message.ClearField(field.name)
        elif field_behavior_pb2.REQUIRED in behaviors and not _is_set(message, field.name):
            yield Violation(place, "is required")
        else:
            values = getattr(message, field.name)
            for index, value in enumerate(values) if field.is_repeated else ((None, values),):
                inner = place if index is None else f"{place}[{index}]"
                if isinstance(value, Message) and (index is not None or message.HasField(field.name)):
                    yield from _find_nul(value, inner) if isinstance(value, Struct) else _find_faults(value, f"{inner}.")
                elif isinstance(value, str) and "\0" in value:
                    yield Violation(inner, _NUL)


def _find_nul(struct: Struct, path: str) -> Iterator[Violation]:
    if r"\u0000" in json_format.MessageToJson(struct):
        yield Violation(path, _NUL)


def _is_set(message: Message, name: str) -> bool:
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence:
        return message.HasField(name)
    return bool(getattr(message, name))


def _join_path(violation: protovalidate.ViolationPb) -> str:
    path = ""
    for element in violation.field.elements if violation.field else ():
        path += f".{element.field_name}" if path else element.field_name
        if element.subscript is not None and element.subscript.field == "index":
            path += f"[{element.subscript.value}]"
    return path
