"""The Python client: a channel with the API key on every call, stubs of all services, and streams that outlive connections."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from itertools import count, islice
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

from aftertouch.identity import sign_identity as sign_identity
from aftertouch.v1 import (
    apps_pb2_grpc,
    campaigns_pb2_grpc,
    channels_pb2_grpc,
    contacts_pb2,
    contacts_pb2_grpc,
    events_pb2,
    events_pb2_grpc,
    lists_pb2,
    lists_pb2_grpc,
    retargeting_pb2_grpc,
)

CallError = grpc.aio.AioRpcError
"""What a call that failed raises; ``read_reason`` says why in our words."""

Contacts = Iterable[contacts_pb2.Contact] | AsyncIterable[contacts_pb2.Contact]

IMPORT_SIZE = 500
"""Contacts in one message of an import."""
LIST_IMPORT_SIZE = 5_000
"""Contacts in one message of an import into a list."""
MOST_EVENTS = 10_000
"""Events in one batch; the server refuses more."""
MOST_UNACKNOWLEDGED = 64
"""Batches of one stream that are kept until they are durable; then ``send`` waits. With 1,000 events in each a server takes up
to a tenth of a second for them, far longer than an acknowledgement is under way."""
RECONNECT_SECONDS = 0.25
"""Before a broken stream is opened again; from the second time on gRPC itself waits for the server."""


class _Authorize:
    """Adds the API key to a call; gRPC wants one interceptor for each kind of call."""

    def __init__(self, api_key: str) -> None:
        self._metadata = ("authorization", f"Bearer {api_key}")

    def add_key(self, details: Any) -> Any:
        return details._replace(metadata=grpc.aio.Metadata(*(details.metadata or ()), self._metadata))


class _AuthorizeUnary(_Authorize, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add_key(client_call_details), request)


class _AuthorizeStream(_Authorize, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self.add_key(client_call_details), request_iterator)


class _AuthorizeAnswers(_Authorize, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add_key(client_call_details), request)


class _AuthorizeBoth(_Authorize, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(self.add_key(client_call_details), request_iterator)


class Client:
    """A connection to a server; use it as an async context manager, from one event loop.

    Args:
        address: ``host:port``.
        api_key: the secret that ``aftertouch keys create`` printed.
        app: the app's id, as in ``acme``.
        credentials: TLS credentials; none connects in clear text, for a server on this machine or behind a proxy.
    """

    def __init__(self, address: str, *, api_key: str, app: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.parent = f"apps/{app}"
        """What lists and creates take as ``parent``."""
        kinds = (_AuthorizeUnary, _AuthorizeStream, _AuthorizeAnswers, _AuthorizeBoth)
        interceptors: Sequence[Any] = [kind(api_key) for kind in kinds]
        # By default gRPC waits up to two minutes before it tries a server again that was away.
        options = [("grpc.initial_reconnect_backoff_ms", 250), ("grpc.max_reconnect_backoff_ms", 5_000)]
        self._channel = (
            grpc.aio.secure_channel(address, credentials, options, interceptors=interceptors)
            if credentials
            else grpc.aio.insecure_channel(address, options, interceptors=interceptors)
        )
        self.apps = apps_pb2_grpc.AppsStub(self._channel)
        self.channels = channels_pb2_grpc.ChannelsStub(self._channel)
        self.contacts = contacts_pb2_grpc.ContactsStub(self._channel)
        self.lists = lists_pb2_grpc.ListsStub(self._channel)
        self.campaigns = campaigns_pb2_grpc.CampaignsStub(self._channel)
        self.events = events_pb2_grpc.EventsStub(self._channel)
        self.retargeting = retargeting_pb2_grpc.RetargetingStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._channel.close()

    def name(self, collection: str, identifier: str) -> str:
        """A resource name of this app: ``apps/{app}/{collection}/{identifier}``."""
        return f"{self.parent}/{collection}/{identifier}"

    async def import_contacts(
        self,
        contacts: Contacts,
        on_sent: Callable[[int], None] = lambda _: None,
    ) -> contacts_pb2.ImportContactsResponse:
        """Import any number of contacts; ``on_sent`` is told how many have left after each message."""

        async def pack() -> AsyncIterator[contacts_pb2.ImportContactsRequest]:
            batch: list[contacts_pb2.Contact] = []
            sent = 0
            async for contact in _each(contacts):
                batch.append(contact)
                if len(batch) == IMPORT_SIZE:
                    yield contacts_pb2.ImportContactsRequest(parent=self.parent, contacts=batch)
                    sent += len(batch)
                    on_sent(sent)
                    batch = []
            yield contacts_pb2.ImportContactsRequest(parent=self.parent, contacts=batch)
            on_sent(sent + len(batch))

        return await self.contacts.ImportContacts(pack())

    async def import_list_contacts(
        self, name: str, contacts: Iterable[str], on_sent: Callable[[int], None] = lambda _: None
    ) -> lists_pb2.AddListContactsResponse:
        """Add any number of contacts to a list, each by external_id or name; ``on_sent`` is told how many have left so far."""

        async def pack() -> AsyncIterator[lists_pb2.ImportListContactsRequest]:
            yield lists_pb2.ImportListContactsRequest(name=name)
            sent = 0
            left = iter(contacts)
            while batch := list(islice(left, LIST_IMPORT_SIZE)):
                yield lists_pb2.ImportListContactsRequest(contacts=batch)
                sent += len(batch)
                on_sent(sent)

        return await self.lists.ImportListContacts(pack())

    def stream_events(self, producer: str, on_rejected: Callable[[events_pb2.RejectedBatch], None] | None = None) -> EventStream:
        """A stream of events from a producer; enter it.

        Args:
            producer: who sends. Only its newest stream goes on, so give each process that may run at the same time its own.
            on_rejected: told the events of a batch that were left out; without it they are kept in the stream's ``rejections``.
        """
        return EventStream(self.events, self.parent, producer, on_rejected)

    async def watch_events(
        self, *, campaign: str = "", signals: Sequence[str] = (), resume_token: str = ""
    ) -> AsyncIterator[events_pb2.WatchEventsResponse]:
        """Events as they become durable, each once, for ever; a connection that breaks is made again and goes on.

        Keep an answer's ``resume_token`` with what you made of its events: given here it goes on after them.

        Args:
            campaign: only this campaign's, by its name.
            signals: only these; all when empty.
        """
        while True:
            request = events_pb2.WatchEventsRequest(
                parent=self.parent, campaign=campaign, signals=signals, resume_token=resume_token
            )
            try:
                async for response in self.events.WatchEvents(request, wait_for_ready=bool(resume_token)):
                    resume_token = response.resume_token
                    yield response
            except grpc.aio.AioRpcError as error:
                if not (resume_token and _may_pass(error)):
                    raise
            await asyncio.sleep(RECONNECT_SECONDS)


class StreamDiverged(Exception):
    """The server's position of a producer is one that this stream cannot go on from; the text says which."""


class EventStream:
    """Events on their way into the log, each exactly once however often the connection breaks; an async context manager.

    Batches are kept until the server has said that they are durable. After a broken connection the stream is opened again, and
    those after the position that the server answers are sent again. Leaving the context waits until everything is durable,
    unless an exception leaves it. A refusal, STREAM_SUPERSEDED among them, ends the stream: every method then raises it. Going on
    after a broken connection never takes the name back from a stream that was opened since.
    """

    def __init__(
        self,
        stub: events_pb2_grpc.EventsAsyncStub,
        parent: str,
        producer: str,
        on_rejected: Callable[[events_pb2.RejectedBatch], None] | None = None,
    ) -> None:
        self.committed = 0
        """The last position that is durable."""
        self.rejections: list[events_pb2.RejectedBatch] = []
        """Events that were left out, unless a callback is told. What was left out just before a connection broke is not said
        again, but counted."""
        self.accepted_count = 0
        """Events of the producer that were stored, up to ``committed``, since its first stream."""
        self.rejected_count = 0
        """Those that were left out."""
        self._stub = stub
        opening = events_pb2.OpenStream(parent=parent, producer=producer, session=str(uuid.uuid4()))
        self._open = events_pb2.StreamEventsRequest(open=opening)
        self._on_rejected = on_rejected or self.rejections.append
        self._is_opened = False
        self._unacknowledged: deque[events_pb2.StreamEventsRequest] = deque()
        """The batches after ``committed``, one by one."""
        self._failure: Exception | None = None
        self._changed = asyncio.Condition()
        self._running: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run(), name="stream events")
        try:
            await self._wait(lambda: self._is_opened)
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                await self.flush()
        finally:
            await self._stop()

    async def send(self, events: Iterable[events_pb2.Event]) -> int:
        """Send a batch and return its position; waits while too many batches are not durable yet."""
        batch = events_pb2.EventsBatch(events=events)
        if len(batch.events) > MOST_EVENTS:
            raise ValueError(f"a batch has at most {MOST_EVENTS} events, and this one {len(batch.events)}")
        await self._wait(lambda: len(self._unacknowledged) < MOST_UNACKNOWLEDGED)
        batch.position = self._last + 1
        self._unacknowledged.append(events_pb2.StreamEventsRequest(batch=batch))
        await self._tell()
        return batch.position

    async def flush(self) -> None:
        """Return when everything that was sent is durable."""
        await self._wait(lambda: not self._unacknowledged)

    @property
    def _last(self) -> int:
        return self.committed + len(self._unacknowledged)

    async def _wait(self, is_true: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or is_true())
        if self._failure is not None:
            raise self._failure

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                try:
                    await self._exchange()
                except grpc.aio.AioRpcError as error:
                    if not (self._is_opened and (_may_pass(error) or _is_unexplained(error))):
                        raise
                self._open.open.resume = True
                await asyncio.sleep(RECONNECT_SECONDS)
        except Exception as error:
            self._failure = error
            await self._tell()

    async def _exchange(self) -> None:
        """Open the stream, then send and hear what is durable, until the connection breaks."""
        opened = asyncio.Event()

        async def send() -> AsyncIterator[events_pb2.StreamEventsRequest]:
            yield self._open
            await opened.wait()
            for position in count(self.committed + 1):
                yield await self._take(position)

        call = self._stub.StreamEvents(send(), wait_for_ready=self._is_opened)
        try:
            async for response in call:
                self._acknowledge(response)
                opened.set()
                await self._tell()
        finally:
            call.cancel()

    async def _take(self, position: int) -> events_pb2.StreamEventsRequest:
        await self._wait(lambda: self._last >= position)
        return self._unacknowledged[position - self.committed - 1]

    def _acknowledge(self, response: events_pb2.StreamEventsResponse) -> None:
        position = response.committed_position
        if not self._is_opened:
            self.committed = position
            self._is_opened = True
        if not self.committed <= position <= self._last:
            raise StreamDiverged(
                f"the server has {self._open.open.producer} at {position}, and this stream goes from {self.committed} to"
                f" {self._last}: somebody else uses the name, or an older database was restored"
            )
        while self.committed < position:
            self._unacknowledged.popleft()
            self.committed += 1
        self.accepted_count, self.rejected_count = response.accepted_count, response.rejected_count
        for rejected in response.rejections:
            self._on_rejected(rejected)


def read_reason(error: grpc.aio.AioRpcError) -> tuple[str, dict[str, str]]:
    """The ErrorReason's name and the metadata of an error of a call; empty when it is not one of ours."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return info.reason, dict(info.metadata)
    return "", {}


async def _each(
    contacts: Contacts,
) -> AsyncIterator[contacts_pb2.Contact]:
    if isinstance(contacts, AsyncIterable):
        async for contact in contacts:
            yield contact
    else:
        for contact in contacts:
            yield contact


def _may_pass(error: grpc.aio.AioRpcError) -> bool:
    """True when the connection broke or the server is away; nothing was refused."""
    return error.code() == grpc.StatusCode.UNAVAILABLE


def _is_unexplained(error: grpc.aio.AioRpcError) -> bool:
    """True when gRPC itself says INTERNAL: a write that fails hides why the stream ended (grpc issue 36066), be it a connection
    that broke or a refusal. Opening the stream again tells."""
    return error.code() == grpc.StatusCode.INTERNAL and not read_reason(error)[0]
