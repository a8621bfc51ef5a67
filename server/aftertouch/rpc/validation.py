"""What can be said of a request by its message alone: required fields and the rules in the protos."""

from __future__ import annotations

import math
from collections.abc import Iterator

import protovalidate
from google.api import field_behavior_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp

from aftertouch.errors import FieldsInvalid, Violation
from aftertouch.v1 import events_pb2

_NUL = "contains the character U+0000, which PostgreSQL cannot store"
TIMESTAMP_SECONDS = (-62_135_596_800, 253_402_300_799)
"""The first and the last second of google.protobuf.Timestamp: the years 1 to 9999."""
_DURATION_SECONDS = 315_576_000_000
"""The longest of google.protobuf.Duration: 10,000 years."""


def check_message(message: Message) -> None:
    """Drop what is output only, then raise ``FieldsInvalid`` with everything that is wrong with the request."""
    if faults := list(_find_faults(message, "")):
        raise FieldsInvalid(faults)
    found = protovalidate.collect_violations(message)
    if found:
        raise FieldsInvalid(Violation(_join_path(violation.proto), violation.proto.message) for violation in found)


def _find_faults(message: Message, path: str, *, is_part: bool = False) -> Iterator[Violation]:
    # An update names a part of its resource, so what the whole resource requires is not asked of it.
    is_update = "update_mask" in message.DESCRIPTOR.fields_by_name
    for field in message.DESCRIPTOR.fields:
        behaviors = field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        place = f"{path}{field.name}"
        if field_behavior_pb2.OUTPUT_ONLY in behaviors:
            message.ClearField(field.name)
        elif field_behavior_pb2.REQUIRED in behaviors and not _is_set(message, field.name) and not is_part:
            yield Violation(place, "is required")
        else:
            values = getattr(message, field.name)
            for index, value in enumerate(values) if field.is_repeated else ((None, values),):
                inner = place if index is None else f"{place}[{index}]"
                if isinstance(value, Message) and (index is not None or message.HasField(field.name)):
                    yield from _find_value_faults(value, inner, is_part=is_update)
                elif isinstance(value, str) and "\0" in value:
                    yield Violation(inner, _NUL)


def _find_value_faults(value: Message, path: str, *, is_part: bool) -> Iterator[Violation]:
    match value:
        case events_pb2.Event():
            # Judged one by one by the service: a bad one is left out, and the others are stored.
            return
        case Struct():
            yield from _find_struct_faults(value, path)
        case Timestamp():
            first, last = TIMESTAMP_SECONDS
            if not (first <= value.seconds <= last and 0 <= value.nanos < 1_000_000_000):
                yield Violation(path, "is not a time from the year 1 to 9999")
        case Duration():
            if abs(value.seconds) > _DURATION_SECONDS:
                yield Violation(path, "is longer than 10,000 years")
        case _:
            yield from _find_faults(value, f"{path}.", is_part=is_part)


def _find_struct_faults(struct: Struct, path: str) -> Iterator[Violation]:
    for name, value in struct.fields.items():
        if "\0" in name:
            yield Violation(path, _NUL)
        else:
            yield from _find_json_faults(value, f"{path}.{name}")


def _find_json_faults(value: Value, path: str) -> Iterator[Violation]:
    match value.WhichOneof("kind"):
        case "struct_value":
            yield from _find_struct_faults(value.struct_value, path)
        case "list_value":
            for index, item in enumerate(value.list_value.values):
                yield from _find_json_faults(item, f"{path}[{index}]")
        case "string_value" if "\0" in value.string_value:
            yield Violation(path, _NUL)
        case "number_value" if not math.isfinite(value.number_value):
            yield Violation(path, "is infinite or not a number, which JSON cannot say")


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
