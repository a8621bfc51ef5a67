"""The Events service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

import numpy as np

from aftertouch.errors import FieldsInvalid, NotFound, PositionOutOfOrder, StreamNotOpened, Violation
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.reports import Rejection, Reports
from aftertouch.ingest.watch import watch_events
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.validation import check_message
from aftertouch.rpc.values import to_timestamp
from aftertouch.store.engine import transaction
from aftertouch.store.logs import MICROSECONDS
from aftertouch.store.producers import Stream, open_stream
from aftertouch.v1 import events_pb2, events_pb2_grpc

LARGEST_BATCH = 10_000
WINDOW = 64
"""Batches of one stream that may wait for their commit; then the client is held back by HTTP/2's flow control. With the
largest batches, 640,000 events; the batcher holds all streams of a process to fewer."""
_LONGEST_TEXT = 256


class Events(events_pb2_grpc.EventsServicer):
    """What happened to messages, from callers."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def IngestEvents(  # type: ignore[override]
        self, request: events_pb2.IngestEventsRequest, call: Call
    ) -> events_pb2.IngestEventsResponse:
        check_parent(call, request.parent)
        reports = read_reports(call, request.events)
        if call.is_begun:
            # With a request_id: in the transaction that stores the answer, so that the log gets it once.
            rejections = await self._ledger.ingest_reports_within(await call.begin(), call.app, reports)
        else:
            rejections = await self._ledger.ingest_reports(call.app, reports)
        return events_pb2.IngestEventsResponse(
            accepted_count=len(reports) - len(rejections), rejections=[_to_rejected(rejection) for rejection in rejections]
        )

    async def StreamEvents(  # type: ignore[override]
        self, requests: AsyncIterator[events_pb2.StreamEventsRequest], call: Call
    ) -> AsyncIterator[events_pb2.StreamEventsResponse]:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("kind") != "open":
            raise StreamNotOpened
        check_message(first)
        check_parent(call, first.open.parent)
        async with transaction(call.engine) as conn:
            stream, position = await open_stream(conn, call.app.app_id, first.open.producer)
        yield events_pb2.StreamEventsResponse(committed_position=position)
        window: asyncio.Queue[_Pending | None] = asyncio.Queue(WINDOW)
        reading = asyncio.create_task(self._read_batches(requests, call, stream, position, window))
        try:
            while (pending := await window.get()) is not None:
                ready = [pending]
                await pending.durable
                # What has become durable meanwhile is acknowledged together.
                while not window.empty() and (following := window.get_nowait()) is not None:
                    ready.append(following)
                    await following.durable
                yield events_pb2.StreamEventsResponse(
                    committed_position=ready[-1].position,
                    rejections=[
                        events_pb2.RejectedBatch(position=p.position, events=[_to_rejected(r) for r in p.rejections])
                        for p in ready
                        if p.rejections
                    ],
                )
            await reading
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read_batches(
        self,
        requests: AsyncIterator[events_pb2.StreamEventsRequest],
        call: Call,
        stream: Stream,
        position: int,
        window: asyncio.Queue[_Pending | None],
    ) -> None:
        try:
            async for request in requests:
                if request.WhichOneof("kind") != "batch":
                    raise StreamNotOpened
                position += 1
                if request.batch.position != position:
                    raise PositionOutOfOrder(stream.producer, position, request.batch.position)
                if len(request.batch.events) > LARGEST_BATCH:
                    raise FieldsInvalid([Violation("batch.events", f"has more than {LARGEST_BATCH} events")])
                batch, rejections = await self._ledger.place(call.app, read_reports(call, request.batch.events))
                durable = await self._ledger.append(stream, position, batch)
                await window.put(_Pending(position, durable, rejections))
        finally:
            await window.put(None)

    async def WatchEvents(  # type: ignore[override]
        self, request: events_pb2.WatchEventsRequest, call: Call
    ) -> AsyncIterator[events_pb2.WatchEventsResponse]:
        check_parent(call, request.parent)
        campaign = None
        if request.campaign:
            campaign_id = read_name(call, request.campaign, "campaigns", "campaign")
            campaign = (await self._ledger.lookups.find_launched(call.app.app_id, [campaign_id])).get(campaign_id)
            if campaign is None:
                raise NotFound(request.campaign)
        pages = watch_events(
            call.engine, self._ledger.lookups, call.app, campaign, frozenset(request.signals), request.resume_token
        )
        async for page in pages:
            yield events_pb2.WatchEventsResponse(
                events=[
                    events_pb2.WatchedEvent(
                        campaign=f"{call.app.name}/campaigns/{event.campaign.campaign}",
                        contact=f"{call.app.name}/contacts/{event.external_id}" if event.external_id else "",
                        signal=event.kind.signal,
                        reason=event.kind.reason,
                        time=to_timestamp(event.time),
                        arrive_time=to_timestamp(event.arrive_time),
                    )
                    for event in page.events
                ],
                resume_token=page.resume_token,
            )


@dataclass(frozen=True)
class _Pending:
    """A batch on its way to being durable."""

    position: int
    durable: asyncio.Future[None]
    rejections: Sequence[Rejection]


def _to_rejected(rejection: Rejection) -> events_pb2.RejectedEvent:
    return events_pb2.RejectedEvent(
        index=rejection.index,
        reason=events_pb2.RejectedEvent.Reason.Value(rejection.reason),
        description=rejection.description,
    )


def read_reports(call: Call, events: Sequence[events_pb2.Event]) -> Reports:
    """Events as columns; one comprehension a field, which is what reading a message in Python costs least."""
    signals = [event.signal for event in events]
    codes = [event.reason_code for event in events]
    stamps = [event.time for event in events]
    times = np.fromiter((stamp.seconds for stamp in stamps), np.int64, len(events)) * MICROSECONDS
    times += np.fromiter((stamp.nanos for stamp in stamps), np.int64, len(events)) // 1_000
    tokens = [event.token for event in events]
    malformed = np.zeros(len(events), np.bool_)
    if not all(signals) or max(map(len, signals), default=0) > 64 or max(map(len, codes), default=0) > 64:
        malformed |= [not 0 < len(signal) <= 64 or len(code) > 64 for signal, code in zip(signals, codes, strict=True)]
    named: dict[str, list[str]] = {}
    if not all(tokens):
        recipients = [event.recipient for event in events]
        messages = [event.message for event in events]
        named = {
            "campaigns": [_read_campaign_id(call, recipient.campaign) for recipient in recipients],
            "external_ids": [recipient.external_id for recipient in recipients],
            "channels": [message.channel for message in messages],
            "message_ids": [message.message_id for message in messages],
        }
        malformed |= [
            not (token or (campaign and external_id) or (channel and message_id))
            or len(external_id) > _LONGEST_TEXT
            or "\0" in external_id + campaign + message_id
            for token, campaign, external_id, channel, message_id in zip(tokens, *named.values(), strict=True)
        ]
    return Reports(
        signals=signals,
        reason_codes=codes if any(codes) else [],
        times=times,
        tokens=tokens if any(tokens) else [],
        malformed=malformed if malformed.any() else None,
        **{name: column if any(column) else [] for name, column in named.items()},
    )


def _read_campaign_id(call: Call, name: str) -> str:
    """The id in a campaign's name; something that no campaign is called, for a name that is not of the caller's app."""
    prefix = f"{call.app.name}/campaigns/"
    return name.removeprefix(prefix) if name.startswith(prefix) else name and "?"
