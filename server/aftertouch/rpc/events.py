"""The Events service."""

from __future__ import annotations

from datetime import UTC

from aftertouch.ingest.ledger import Ledger, ReportedEvent
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_app_name, read_name
from aftertouch.v1 import events_pb2, events_pb2_grpc


class Events(events_pb2_grpc.EventsServicer):
    """What happened to messages, from callers."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def IngestEvents(  # type: ignore[override]
        self, request: events_pb2.IngestEventsRequest, call: Call
    ) -> events_pb2.IngestEventsResponse:
        check_app_name(call, request.parent)
        events = [_read_event(call, event, index) for index, event in enumerate(request.events)]
        rejections = await self._ledger.ingest_events(call.app.app_id, events)
        return events_pb2.IngestEventsResponse(
            accepted_count=len(events) - len(rejections),
            rejections=[
                events_pb2.IngestEventsResponse.Rejection(
                    index=rejection.index,
                    reason=events_pb2.IngestEventsResponse.Reason.Value(rejection.reason),
                    description=rejection.description,
                )
                for rejection in rejections
            ],
        )


def _read_event(call: Call, event: events_pb2.Event, index: int) -> ReportedEvent:
    recipient = event.recipient
    has_token = event.WhichOneof("target") == "token"
    return ReportedEvent(
        signal=event.signal,
        token=event.token if has_token else None,
        campaign="" if has_token else read_name(call, recipient.campaign, "campaigns", f"events[{index}].recipient.campaign"),
        external_id=recipient.external_id,
        reason_code=event.reason_code,
        time=event.time.ToDatetime(UTC) if event.HasField("time") else None,
    )
