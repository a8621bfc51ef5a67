"""Errors on the wire: every one a google.rpc.Status with our ErrorReason, translated in the same way for all classes."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from aftertouch.errors import AftertouchError, FieldsInvalid

DOMAIN = "aftertouch"


def to_status(error: AftertouchError) -> grpc.Status:
    """The status with ErrorInfo, and BadRequest, RetryInfo, ResourceInfo or PreconditionFailure where they fit."""
    details = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=dict(error.metadata))]
    extra = []
    if isinstance(error, FieldsInvalid):
        extra.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=violation.field, description=violation.description)
                    for violation in error.violations
                ]
            )
        )
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(error.retry_after)
        extra.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if "resource" in error.metadata:
        extra.append(error_details_pb2.ResourceInfo(resource_name=error.metadata["resource"], description=str(error)))
    if error.code == "FAILED_PRECONDITION":
        subject = error.metadata.get("campaign", "")
        extra.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(type=error.reason, subject=subject, description=str(error))
                ]
            )
        )
    packed = []
    for detail in [*details, *extra]:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    code = grpc.StatusCode[error.code].value[0]
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code, message=str(error), details=packed))
    return status
