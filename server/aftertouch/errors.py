"""The errors that a caller can meet; each class is one value of ErrorReason and knows its canonical code.

Nothing here knows gRPC: ``rpc.errors`` translates every class in the same way, so there is no table that could drift.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import ClassVar


def _stamp(time: datetime) -> str:
    """A time as all texts and metadata have it: in UTC, cut to whole seconds."""
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


class AftertouchError(Exception):
    """A refusal with a reason. ``metadata`` holds every variable of the text, as strings."""

    code: ClassVar[str]
    """The canonical status code's name, as in ``NOT_FOUND``."""
    reason: ClassVar[str]
    """The value's name in ``aftertouch.v1.ErrorReason``."""
    retry_after: timedelta | None = None

    def __init__(self, text: str, **metadata: str) -> None:
        super().__init__(text)
        self.metadata: Mapping[str, str] = metadata


class ApiKeyMissing(AftertouchError):
    code, reason = "UNAUTHENTICATED", "API_KEY_MISSING"

    def __init__(self) -> None:
        super().__init__("the call has no API key; send the metadata 'authorization: Bearer <key>'")


class ApiKeyInvalid(AftertouchError):
    code, reason = "UNAUTHENTICATED", "API_KEY_INVALID"

    def __init__(self) -> None:
        super().__init__("this API key does not exist or was revoked")


class ScopeInsufficient(AftertouchError):
    code, reason = "PERMISSION_DENIED", "SCOPE_INSUFFICIENT"

    def __init__(self, method: str, required_scope: str) -> None:
        super().__init__(f"this API key lacks the scope {required_scope}", method=method, required_scope=required_scope)


class NotFound(AftertouchError):
    code, reason = "NOT_FOUND", "RESOURCE_NOT_FOUND"

    def __init__(self, resource: str) -> None:
        super().__init__(f"{resource} does not exist", resource=resource)


class AlreadyExists(AftertouchError):
    code, reason = "ALREADY_EXISTS", "RESOURCE_ALREADY_EXISTS"

    def __init__(self, resource: str) -> None:
        super().__init__(f"{resource} exists already", resource=resource)


@dataclass(frozen=True)
class Violation:
    """One thing that is wrong with a request: the path of the field, and what is wrong with it."""

    field: str
    description: str


class FieldsInvalid(AftertouchError):
    code, reason = "INVALID_ARGUMENT", "FIELDS_INVALID"

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(violations)
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in self.violations[:10])
        if len(self.violations) > 10:
            text += f"; and {len(self.violations) - 10} more"
        super().__init__(text, fields=", ".join(violation.field for violation in self.violations[:10]))


class EtagMismatch(AftertouchError):
    code, reason = "ABORTED", "ETAG_MISMATCH"

    def __init__(self, resource: str) -> None:
        super().__init__(f"{resource} was changed since you read it; read it again", resource=resource)


class RequestIdReused(AftertouchError):
    code, reason = "ALREADY_EXISTS", "REQUEST_ID_REUSED"

    def __init__(self, request_id: str) -> None:
        super().__init__("this request_id was used for another request; make a new one", request_id=request_id)


class CampaignStateWrong(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "CAMPAIGN_STATE_WRONG"

    def __init__(self, campaign: str, state: str, required_state: str) -> None:
        super().__init__(
            f"{campaign} is {state}, and this needs {required_state}",
            campaign=campaign,
            state=state,
            required_state=required_state,
        )


class ContentMissing(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "CONTENT_MISSING"

    def __init__(self, campaign: str) -> None:
        super().__init__(f"{campaign} has no content; set it with UpdateCampaign", campaign=campaign)


class AudienceEmpty(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "AUDIENCE_EMPTY"

    def __init__(self, campaign: str) -> None:
        super().__init__(f"nobody of the audience of {campaign} can be reached on its channel", campaign=campaign)


class ChannelNotReady(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "CHANNEL_NOT_READY"

    def __init__(self, channel: str, problems: Iterable[str]) -> None:
        text = "; ".join(problems)
        super().__init__(f"the channel {channel} cannot send: {text}", channel=channel, problems=text)


class TemplatesUnreadable(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "TEMPLATES_UNREADABLE"

    def __init__(self, channel: str, cause: str) -> None:
        super().__init__(f"the templates of {channel} cannot be listed: {cause}", channel=channel, cause=cause)


class SourceNotSent(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "SOURCE_NOT_SENT"

    def __init__(self, campaign: str, state: str) -> None:
        super().__init__(f"{campaign} is {state}; launch it before you retarget it", campaign=campaign, state=state)


class SourceTooOld(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "SOURCE_TOO_OLD"

    def __init__(self, campaign: str, retention_days: int, last_time: datetime) -> None:
        super().__init__(
            f"{campaign} was sent more than {retention_days} days ago; it could be retargeted until {_stamp(last_time)}",
            campaign=campaign,
            retention_days=str(retention_days),
            last_time=_stamp(last_time),
        )


class RetargetingNotEnabled(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "RETARGETING_NOT_ENABLED"

    def __init__(self, app: str) -> None:
        super().__init__(f"the plan of {app} does not include retargeting", app=app)


class SourceBeforePlan(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "SOURCE_BEFORE_PLAN"

    def __init__(self, campaign: str, retargetable_since: datetime) -> None:
        super().__init__(
            f"{campaign} was sent before {_stamp(retargetable_since)}, when the app's plan began to include retargeting",
            campaign=campaign,
            retargetable_since=_stamp(retargetable_since),
        )


class SelectionUnsettled(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "SELECTION_UNSETTLED"

    def __init__(self, campaign: str, signal: str, delay: timedelta, measured_events: int, settle_time: datetime) -> None:
        # Up to the next whole second: whoever asks at the one that is told is not refused again.
        told = _stamp(settle_time + timedelta(microseconds=999_999))
        super().__init__(
            f"{campaign} was sent too recently to say who has not {signal}: 95 of 100 are reported within {delay}"
            f" ({measured_events} measured), so ask at {told}",
            campaign=campaign,
            signal=signal,
            delay_seconds=str(int(delay.total_seconds())),
            measured_events=str(measured_events),
            settle_time=told,
        )


class ScheduleTooLate(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "SCHEDULE_TOO_LATE"

    def __init__(self, campaign: str, retention_days: int, schedule_time: datetime, last_time: datetime) -> None:
        super().__init__(
            f"{campaign} can be retargeted for {retention_days} days after it was sent: schedule the wave until"
            f" {_stamp(last_time)}, not for {_stamp(schedule_time)}",
            campaign=campaign,
            retention_days=str(retention_days),
            schedule_time=_stamp(schedule_time),
            last_time=_stamp(last_time),
        )


class ChainTooLong(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "CHAIN_TOO_LONG"

    def __init__(self, campaign: str, limit: int) -> None:
        super().__init__(f"the chain of {campaign} has more than {limit} campaigns", campaign=campaign, limit=str(limit))


class MessageTooLarge(AftertouchError):
    code, reason = "RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE"

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"the request is larger than {limit_bytes} bytes; split it", limit_bytes=str(limit_bytes))


class DatabaseUnavailable(AftertouchError):
    code, reason = "UNAVAILABLE", "DATABASE_UNAVAILABLE"
    retry_after = timedelta(seconds=1)

    def __init__(self) -> None:
        super().__init__("the database does not answer; nothing was done, try again")


class ServerStopping(AftertouchError):
    code, reason = "UNAVAILABLE", "SERVER_STOPPING"
    retry_after = timedelta(seconds=1)

    def __init__(self) -> None:
        super().__init__("the server is stopping; connect again")


class Internal(AftertouchError):
    code, reason = "INTERNAL", "INTERNAL"

    def __init__(self, request: str) -> None:
        super().__init__(f"a defect of the server; its log has the trace under {request}", request=request)


class PositionOutOfOrder(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "POSITION_OUT_OF_ORDER"

    def __init__(self, producer: str, expected: int, position: int) -> None:
        super().__init__(
            f"batch {position} of {producer} came where {expected} was expected; open the stream again and go on from there",
            producer=producer,
            expected=str(expected),
            position=str(position),
        )


class StreamSuperseded(AftertouchError):
    code, reason = "ABORTED", "STREAM_SUPERSEDED"

    def __init__(self, producer: str) -> None:
        super().__init__(f"{producer} opened a newer stream; this one is over", producer=producer)


class StreamNotOpened(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "STREAM_NOT_OPENED"

    def __init__(self) -> None:
        super().__init__("the first message of a stream must open it, and no other may")


class ResumeTokenTooOld(AftertouchError):
    code, reason = "OUT_OF_RANGE", "RESUME_TOKEN_TOO_OLD"

    def __init__(self, kept_since: datetime) -> None:
        super().__init__(
            f"what came after this token is not known any more, only what came since {_stamp(kept_since)}:"
            " list what you need, then watch without a token",
            kept_since=_stamp(kept_since),
        )


class ListInUse(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "LIST_IN_USE"

    def __init__(self, contact_list: str, campaign: str) -> None:
        super().__init__(
            f"{campaign} is for {contact_list} and was not launched yet; give it another audience, or delete it",
            list=contact_list,
            campaign=campaign,
        )


class ListLimitReached(AftertouchError):
    code, reason = "FAILED_PRECONDITION", "LIST_LIMIT_REACHED"

    def __init__(self, app: str, limit: int) -> None:
        super().__init__(f"{app} has {limit} lists, as many as it may have; delete one", app=app, limit=str(limit))


class IdentityInvalid(AftertouchError):
    code, reason = "UNAUTHENTICATED", "IDENTITY_INVALID"

    def __init__(self, cause: str) -> None:
        super().__init__(f"the identity is not valid: {cause}", cause=cause)


class OriginNotAllowed(AftertouchError):
    code, reason = "PERMISSION_DENIED", "ORIGIN_NOT_ALLOWED"

    def __init__(self, origin: str) -> None:
        super().__init__(f"pages of {origin} are not among the app's web_origins", origin=origin)


class TooManyRequests(AftertouchError):
    code, reason = "RESOURCE_EXHAUSTED", "TOO_MANY_REQUESTS"

    def __init__(self, retry_after: timedelta) -> None:
        super().__init__("too many requests for the same person or browser; wait a while")
        self.retry_after = retry_after


class MethodUnknown(AftertouchError):
    code, reason = "UNIMPLEMENTED", "METHOD_UNKNOWN"

    def __init__(self, method: str) -> None:
        super().__init__(f"this server does not know {method}; it may be older than the client", method=method)
