"""Times and structs on their way into messages."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from google.protobuf.struct_pb2 import Struct
from google.protobuf.timestamp_pb2 import Timestamp


def to_timestamp(time: datetime | None) -> Timestamp | None:
    """A time as a message; None stays unset."""
    if time is None:
        return None
    timestamp = Timestamp()
    timestamp.FromDatetime(time)
    return timestamp


def to_struct(values: Mapping[str, Any]) -> Struct:
    """A JSON object as a message."""
    struct = Struct()
    struct.update(dict(values))
    return struct
