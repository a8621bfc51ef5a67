"""What a refused call carries, held to the form of every refusal: one ErrorInfo of ours, and BadRequest with field errors."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from aftertouch.v1 import errors_pb2


@dataclass(frozen=True)
class Refusal:
    """A refused call."""

    code: str
    reason: str
    metadata: Mapping[str, str]
    fields: Mapping[str, str]
    """Field paths with what is wrong with each."""


async def refuse(call: Awaitable[Any]) -> Refusal:
    """Await a call that must be refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return read_refusal(caught.value)


def read_refusal(error: grpc.aio.AioRpcError) -> Refusal:
    """Read the refusal of a call, and check its form."""
    status = rpc_status.from_call(error)
    assert status is not None, error
    infos, requests = [], []
    for detail in status.details:
        info, request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        infos += [info] if detail.Unpack(info) else []
        requests += [request] if detail.Unpack(request) else []
    (info,) = infos
    assert info.domain == "aftertouch"
    assert errors_pb2.ErrorReason.Value(info.reason) != errors_pb2.ErrorReason.ERROR_REASON_UNSPECIFIED
    assert len(requests) == (info.reason == "FIELDS_INVALID")
    violations = [violation for request in requests for violation in request.field_violations]
    assert all(violation.field and violation.description for violation in violations)
    assert status.message == error.details()
    return Refusal(
        error.code().name,
        info.reason,
        dict(info.metadata),
        {violation.field: violation.description for violation in violations},
    )
