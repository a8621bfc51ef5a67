"""The Python client: a channel with the API key on every call, and stubs of all services."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

from aftertouch.v1 import (
    apps_pb2_grpc,
    campaigns_pb2_grpc,
    channels_pb2_grpc,
    contacts_pb2,
    contacts_pb2_grpc,
    events_pb2_grpc,
    retargeting_pb2_grpc,
)

CallError = grpc.aio.AioRpcError
"""What a call that failed raises; ``read_reason`` says why in our words."""

Contacts = Iterable[contacts_pb2.Contact] | AsyncIterable[contacts_pb2.Contact]

IMPORT_SIZE = 500
"""Contacts in one message of an import."""


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


class _AuthorizeConversation(_Authorize, grpc.aio.StreamStreamClientInterceptor):
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
        kinds = (_AuthorizeUnary, _AuthorizeStream, _AuthorizeAnswers, _AuthorizeConversation)
        interceptors: Sequence[Any] = [kind(api_key) for kind in kinds]
        self._channel = (
            grpc.aio.secure_channel(address, credentials, interceptors=interceptors)
            if credentials
            else grpc.aio.insecure_channel(address, interceptors=interceptors)
        )
        self.apps = apps_pb2_grpc.AppsStub(self._channel)
        self.channels = channels_pb2_grpc.ChannelsStub(self._channel)
        self.contacts = contacts_pb2_grpc.ContactsStub(self._channel)
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
