"""The Events service."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from aftertouch.errors import FieldsInvalid, NotFound, PositionOutOfOrder, ServerStopping, StreamNotOpened, Violation
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.reports import Rejection, Reports
from aftertouch.ingest.watch import watch_events
from aftertouch.rpc.campaigns import find
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.reports import MOST_EVENTS, read_batch, read_reports
from aftertouch.rpc.validation import check_message
from aftertouch.rpc.values import to_timestamp
from aftertouch.signals import PRICED
from aftertouch.store.activity import read_activity
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import load_kinds
from aftertouch.store.producers import Progress, Stream, open_stream
from aftertouch.v1 import events_pb2, events_pb2_grpc

WINDOW = 256
"""Batches of one stream that may wait for their commit; then the client is held back by HTTP/2's flow control. With the
usual 1,000 events in each a stream can fill two commits; the batcher bounds all streams of a process together."""
MOST_REJECTIONS = 10_000
"""Events left out that a stream's batches in the window may have before it takes no more: a client that reads no answers keeps
no more of them here. An answer has no more either, or those of one batch: 10,000 take 650 kB of the 4 MB that gRPC's clients
take by default."""

MOST_BUCKETS = 2_000
"""In one answer about activity."""
LONGEST_BUCKET = timedelta(days=366)
MINUTE = timedelta(minutes=1)


class Events(events_pb2_grpc.EventsServicer):
    """What happened to messages, from callers."""

    def __init__(self, ledger: Ledger, stopping: asyncio.Event) -> None:
        self._ledger = ledger
        self._stopping = stopping

    async def IngestEvents(  # type: ignore[override]
        self, request: events_pb2.IngestEventsRequest, call: Call
    ) -> events_pb2.IngestEventsResponse:
        check_parent(call, request.parent)
        reports = read_reports(call.app.name, request.events)
        if call.has_request_id:
            # In the transaction that stores the answer, so that the log gets it once.
            rejections = await self._ledger.ingest_reports_within(call.begin, call.app, reports)
        else:
            rejections = await self._ledger.ingest_reports(call.app, reports)
        return events_pb2.IngestEventsResponse(
            accepted_count=len(reports) - len(rejections), rejections=[_to_rejected(rejection) for rejection in rejections]
        )

    async def StreamEvents(  # type: ignore[override]
        self, requests: AsyncIterator[bytes], call: Call
    ) -> AsyncIterator[events_pb2.StreamEventsResponse]:
        first: Any = call.parse(await anext(aiter(requests), b""))
        if first.WhichOneof("kind") != "open":
            raise StreamNotOpened
        check_message(first)
        check_parent(call, first.open.parent)
        opening = first.open
        if opening.resume and not opening.session:
            raise FieldsInvalid([Violation("open.session", "is needed to resume")])
        async with transaction(call.engine) as conn:
            stream, progress = await open_stream(
                conn, call.app.app_id, opening.producer, opening.session, is_resumption=opening.resume
            )
        yield _to_progress(progress)
        window = _Window()
        reading = asyncio.create_task(self._read_batches(requests, call, stream, progress.position, window))
        # What was read until then is still acknowledged.
        stopping = asyncio.create_task(self._stopping.wait())
        stopping.add_done_callback(lambda _: reading.cancel())
        try:
            while ready := await window.take():
                for pending in ready:
                    await pending.durable
                    progress = Progress(
                        pending.position, progress.accepted + pending.accepted, progress.rejected + len(pending.rejections)
                    )
                yield _to_progress(progress, ready)
            await reading
        finally:
            stopping.cancel()
            reading.cancel()
            window.drop()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read_batches(
        self, requests: AsyncIterator[bytes], call: Call, stream: Stream, position: int, window: _Window
    ) -> None:
        try:
            async for data in requests:
                given, reports = read_batch(call.app.name, data) or _parse_batch(call, data)
                position += 1
                if given != position:
                    raise PositionOutOfOrder(stream.producer, position, given)
                batch, rejections = await self._ledger.place(call.app, reports)
                durable = await self._ledger.append(stream, position, batch, len(rejections))
                await window.put(_Pending(position, durable, len(batch), rejections))
        except asyncio.CancelledError:
            if not self._stopping.is_set():
                raise
            raise ServerStopping from None
        finally:
            window.close()

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
            call.engine,
            self._ledger.lookups,
            call.app,
            campaign,
            frozenset(request.signals),
            request.resume_token,
            self._stopping,
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

    async def GetActivity(self, request: events_pb2.GetActivityRequest, call: Call) -> events_pb2.Activity:  # type: ignore[override]
        campaign = await find(call, request.campaign, field="campaign")
        start, end, bucket = _read_span(request, campaign.launch_time or campaign.create_time)
        conn = await call.begin()
        found = await read_activity(conn, campaign.campaign_id, start, end, bucket)
        # Read afterwards: a kind that is new since has its number by now.
        numbered = await load_kinds(conn)
        counts: dict[str, dict[datetime, int]] = defaultdict(lambda: defaultdict(int))
        for time, kind, count in found:
            if numbered[kind].signal != PRICED:
                counts[numbered[kind].signal][time] += count
        answer = events_pb2.Activity(start_time=to_timestamp(start), end_time=to_timestamp(end))
        answer.bucket.FromTimedelta(bucket)
        for signal in sorted(counts):
            series = answer.series.add(signal=signal)
            for time, count in counts[signal].items():
                series.buckets.add(start_time=to_timestamp(time), count=count)
        return answer


def _read_span(request: events_pb2.GetActivityRequest, launch_time: datetime) -> tuple[datetime, datetime, timedelta]:
    """From when, until when, and in buckets of what length.

    Raises:
        FieldsInvalid.
    """
    start = request.start_time.ToDatetime(UTC) if request.HasField("start_time") else launch_time
    start = start.replace(second=0, microsecond=0)
    end = request.end_time.ToDatetime(UTC) if request.HasField("end_time") else datetime.now(UTC)
    if end <= start:
        raise FieldsInvalid([Violation("end_time", "is not after start_time")])
    if not request.HasField("bucket"):
        return start, end, -((start - end) // MOST_BUCKETS // MINUTE) * MINUTE
    seconds = request.bucket.seconds
    if request.bucket.nanos or seconds % 60 or not 60 <= seconds <= LONGEST_BUCKET.total_seconds():
        raise FieldsInvalid([Violation("bucket", f"is not a number of whole minutes up to {LONGEST_BUCKET.days} days")])
    bucket = timedelta(seconds=seconds)
    if end - start > MOST_BUCKETS * bucket:
        raise FieldsInvalid(
            [Violation("bucket", f"makes more than {MOST_BUCKETS:,} buckets; ask for longer ones, or for less time")]
        )
    return start, end, bucket


def _parse_batch(call: Call, data: bytes) -> tuple[int, Reports]:
    request: Any = call.parse(data)
    if request.WhichOneof("kind") != "batch":
        raise StreamNotOpened
    if len(request.batch.events) > MOST_EVENTS:
        raise FieldsInvalid([Violation("batch.events", f"has more than {MOST_EVENTS} events")])
    return request.batch.position, read_reports(call.app.name, request.batch.events)


@dataclass(frozen=True)
class _Pending:
    """A batch on its way to being durable."""

    position: int
    durable: asyncio.Future[None]
    accepted: int
    rejections: Sequence[Rejection]


class _Window:
    """The batches of a stream that wait for their commit, or for the client to read that they are durable."""

    def __init__(self) -> None:
        self._waiting: deque[_Pending] = deque()
        self._rejections = 0
        self._is_closed = False
        self._changed = asyncio.Event()

    async def put(self, pending: _Pending) -> None:
        """Add a batch when there is room."""
        while len(self._waiting) >= WINDOW or self._rejections >= MOST_REJECTIONS:
            await self._wait()
        self._waiting.append(pending)
        self._rejections += len(pending.rejections)
        self._changed.set()

    async def take(self) -> list[_Pending]:
        """The batches that wait now, one at least: they are acknowledged together. Empty when there will be no more."""
        while not self._waiting and not self._is_closed:
            await self._wait()
        taken: list[_Pending] = []
        count = 0
        while self._waiting and (not taken or count + len(self._waiting[0].rejections) <= MOST_REJECTIONS):
            taken.append(self._waiting.popleft())
            count += len(taken[-1].rejections)
        self._rejections -= count
        self._changed.set()
        return taken

    def close(self) -> None:
        """Say that there will be no more."""
        self._is_closed = True
        self._changed.set()

    def drop(self) -> None:
        """Give up what waits."""
        for pending in self._waiting:
            pending.durable.cancel()

    async def _wait(self) -> None:
        self._changed.clear()
        await self._changed.wait()


def _to_progress(progress: Progress, batches: Sequence[_Pending] = ()) -> events_pb2.StreamEventsResponse:
    return events_pb2.StreamEventsResponse(
        committed_position=progress.position,
        accepted_count=progress.accepted,
        rejected_count=progress.rejected,
        rejections=[
            events_pb2.RejectedBatch(position=batch.position, events=[_to_rejected(r) for r in batch.rejections])
            for batch in batches
            if batch.rejections
        ],
    )


def _to_rejected(rejection: Rejection) -> events_pb2.RejectedEvent:
    return events_pb2.RejectedEvent(
        index=rejection.index,
        reason=events_pb2.RejectedEvent.Reason.Value(rejection.reason),
        description=rejection.description,
    )
