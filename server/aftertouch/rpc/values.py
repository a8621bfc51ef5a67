"""Times and structs on their way into messages."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import available_timezones

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp

from aftertouch.errors import FieldsInvalid, Violation

TIME_ZONES = available_timezones()
"""Read once: each call reads the whole directory of zones, which took 5 ms a contact."""


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """A time as a message; None stays unset."""
    if time is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def read_timestamp(message: Message, field: str) -> datetime | None:
    """The time in a field of a message; None when it is not set."""
    if not message.HasField(field):
        return None
    time: datetime = getattr(message, field).ToDatetime(tzinfo=UTC)
    return time


def read_delay(message: Message, field: str, path: str) -> timedelta | None:
    """The whole seconds in a field of a message; None when it is not set.

    Args:
        path: to the field, for errors.

    Raises:
        FieldsInvalid: there are fractions.
    """
    if not message.HasField(field):
        return None
    delay: Duration = getattr(message, field)
    if delay.nanos:
        raise FieldsInvalid([Violation(path, "must be whole seconds")])
    return timedelta(seconds=delay.seconds)


def to_struct(values: Mapping[str, Any]) -> Struct:
    """A JSON object as a message."""
    struct = Struct()
    struct.update(dict(values))
    return struct
