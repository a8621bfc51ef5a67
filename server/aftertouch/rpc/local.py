"""Calls from within the process: the generated stubs on a channel that leads straight to the servicers.

Who calls is known by other means than a key, and everything else is as it is for a caller from outside: scopes, the rules
in the protos, request_ids, one transaction, and the servicer's own checks. Refusals are raised as they are.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, cast

import grpc
from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.rpc.interceptor import Call, Caller, Method, answer_unary
from aftertouch.rpc.validation import check_message
from aftertouch.v1 import (
    apps_pb2_grpc,
    campaigns_pb2_grpc,
    channels_pb2_grpc,
    contacts_pb2_grpc,
    events_pb2_grpc,
    lists_pb2_grpc,
    retargeting_pb2_grpc,
)

Servicers = Mapping[str, object]
"""By the service's name, as in ``Campaigns``."""

_methods: dict[str, Method] = {}


class LocalClient:
    """The services as one caller has them."""

    def __init__(self, engine: AsyncEngine, servicers: Servicers, caller: Caller) -> None:
        channel = cast("grpc.aio.Channel", _LocalChannel(engine, servicers, caller))
        self.apps = apps_pb2_grpc.AppsStub(channel)
        self.channels = channels_pb2_grpc.ChannelsStub(channel)
        self.contacts = contacts_pb2_grpc.ContactsStub(channel)
        self.lists = lists_pb2_grpc.ListsStub(channel)
        self.events = events_pb2_grpc.EventsStub(channel)
        self.campaigns = campaigns_pb2_grpc.CampaignsStub(channel)
        self.retargeting = retargeting_pb2_grpc.RetargetingStub(channel)


class _LocalChannel:
    """What the generated stubs ask of a channel."""

    def __init__(self, engine: AsyncEngine, servicers: Servicers, caller: Caller) -> None:
        self._engine = engine
        self._servicers = servicers
        self._caller = caller

    def _find(self, path: str) -> tuple[Method, Callable[..., Any]]:
        if path not in _methods:
            _methods[path] = Method(path)
        method = _methods[path]
        service, _, name = method.short_name.partition("/")
        return method, getattr(self._servicers[service], name)

    def unary_unary(self, path: str, **_: Any) -> Callable[[Message], Awaitable[Message]]:
        async def call(request: Message) -> Message:
            method, serve = self._find(path)
            async with AsyncExitStack() as stack:
                return await answer_unary(Call(self._engine, self._caller, method, stack), serve, request)

        return call

    def stream_unary(self, path: str, **_: Any) -> Callable[[AsyncIterator[Message]], Awaitable[Message]]:
        async def call(requests: AsyncIterator[Message]) -> Message:
            method, serve = self._find(path)
            async with AsyncExitStack() as stack:
                response: Message = await serve(requests, Call(self._engine, self._caller, method, stack))
            return response

        return call

    def unary_stream(self, path: str, **_: Any) -> Callable[[Message], AsyncIterator[Message]]:
        async def call(request: Message) -> AsyncIterator[Message]:
            method, serve = self._find(path)
            async with AsyncExitStack() as stack:
                admitted = Call(self._engine, self._caller, method, stack)
                check_message(request)
                async with aclosing(serve(request, admitted)) as responses:
                    async for response in responses:
                        yield response

        return call

    def stream_stream(self, path: str, **_: Any) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            raise NotImplementedError(f"{path} is for callers from outside: its servicer reads bytes")

        return call
