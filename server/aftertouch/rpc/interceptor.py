"""What happens around every call: who is it, may it, is it well formed, was it made before; then the servicer's method.

A unary method gets a ``Call`` instead of gRPC's context. ``call.begin()`` opens the call's one transaction, which is
committed before the answer leaves and rolled back with any error, so nothing is ever half done.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch import metrics
from aftertouch.errors import (
    AftertouchError,
    ApiKeyInvalid,
    ApiKeyMissing,
    FieldsInvalid,
    Internal,
    MessageTooLarge,
    MethodUnknown,
    NotFound,
    ScopeInsufficient,
    Violation,
)
from aftertouch.rpc.errors import to_status
from aftertouch.rpc.validation import check_message
from aftertouch.store.apps import App, find_caller
from aftertouch.store.audit import record_entry
from aftertouch.store.engine import transaction
from aftertouch.store.requests import begin_request, find_answer, finish_request
from aftertouch.v1 import options_pb2

log = structlog.get_logger()

LARGEST_REQUEST = 4 * 1024 * 1024
"""Bytes in one request message. gRPC itself lets four times as much through, so that larger ones get our reason."""

T = TypeVar("T")

_OPEN_SERVICES = ("/grpc.health.", "/grpc.reflection.", "/grpc.channelz.")
_INCLUDED = {
    "admin": frozenset({"admin", "manage", "ingest", "read"}),
    "manage": frozenset({"manage", "ingest", "read"}),
    "ingest": frozenset({"ingest"}),
    "read": frozenset({"read"}),
}
"""What each scope of a key allows."""


@dataclass(frozen=True)
class Caller:
    """Who calls, however that is known: a key, or a user who is signed in."""

    app: App
    scopes: tuple[str, ...]
    actor: str
    """What the audit log calls them, as in ``apiKeys/0123456789ab``."""

    def may(self, scope: str) -> bool:
        """True when one of the caller's scopes includes this one."""
        return any(scope in _INCLUDED[held] for held in self.scopes)


@dataclass(frozen=True)
class _Once:
    """A request_id, and what it was first used for."""

    request_id: str
    fingerprint: bytes


class _Answered(Exception):
    """The same request was answered in the meantime."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer


class Call:
    """One call: its app, and its transaction.

    Raises:
        ScopeInsufficient: the caller may not make it.
    """

    def __init__(self, engine: AsyncEngine, caller: Caller, method: Method, stack: AsyncExitStack) -> None:
        if not caller.may(method.scope.removeprefix("SCOPE_").lower()):
            raise ScopeInsufficient(method.path, method.scope)
        self.engine = engine
        self.app = caller.app
        self.actor = caller.actor
        self.method = method
        self.parse = method.parse
        """Reads a request from its bytes, which is what a method with streams in both directions is given."""
        self._transaction = AsyncExitStack()
        stack.push_async_exit(self._transaction)
        self._conn: AsyncConnection | None = None
        self._once: _Once | None = None

    @property
    def has_request_id(self) -> bool:
        """True when the answer is stored in the call's transaction, and so what was done has to be there as well."""
        return self._once is not None

    async def begin(self) -> AsyncConnection:
        """The call's connection, in its one transaction, which waits for others of the same request_id.

        Whoever holds it takes no second connection: all of them may be held by calls that do the same.
        """
        if self._conn is None:
            conn = await self._transaction.enter_async_context(transaction(self.engine))
            if self._once is not None:
                stored = await begin_request(conn, self.app.app_id, self._once.request_id, self._once.fingerprint)
                if stored is not None:
                    raise _Answered(stored)
            self._conn = conn
        return self._conn

    async def find_answer(self, request: Message) -> bytes | None:
        """What this request was answered with before, by its request_id; None for the first, whose ``begin`` takes the id.

        Raises:
            RequestIdReused.
        """
        if not (request_id := getattr(request, "request_id", "")):
            return None
        request.ClearField("request_id")
        asked = self.method.path.encode() + b"\n" + request.SerializeToString(deterministic=True)
        self._once = _Once(request_id, hashlib.sha256(asked).digest())
        async with transaction(self.engine) as conn:
            return await find_answer(conn, self.app.app_id, request_id, self._once.fingerprint)

    async def store_answer(self, answer: bytes) -> None:
        """Keep what the request_id is answered with, if there is one, in the call's transaction."""
        if self._once is not None:
            await finish_request(await self.begin(), self.app.app_id, self._once.request_id, answer)

    async def commit(self) -> None:
        """Commit the call's transaction now, where the answer has to wait for others who see it; never one with a request_id."""
        assert self._once is None, "the answer is stored in the transaction that took the request_id"
        self._conn = None
        await self._transaction.aclose()

    def check_app(self, app: str, resource: str) -> None:
        """Raise ``NotFound`` unless a resource's name begins with the caller's own app."""
        if app != self.app.app:
            raise NotFound(resource)


class Method:
    """What is declared of a method in the protos."""

    def __init__(self, path: str) -> None:
        service, _, name = path.lstrip("/").partition("/")
        found = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        scope = found.GetOptions().Extensions[options_pb2.required_scope]
        if not scope:
            raise TypeError(f"{path} declares no required_scope")
        self.path = path
        self.short_name = f"{found.containing_service.name}/{name}"
        self.scope = options_pb2.Scope.Name(scope)
        self.changes = self.scope in ("SCOPE_MANAGE", "SCOPE_ADMIN") and not name.startswith("List")
        self.request_class = GetMessageClass(found.input_type)
        self.response_class = GetMessageClass(found.output_type)

    def parse(self, data: bytes) -> Message:
        """The request in these bytes."""
        if len(data) > LARGEST_REQUEST:
            raise MessageTooLarge(LARGEST_REQUEST)
        try:
            return self.request_class.FromString(data)
        except DecodeError as error:
            text = "is not a valid message: wrong wire format, or a string that is not UTF-8"
            raise FieldsInvalid([Violation(self.request_class.DESCRIPTOR.name, text)]) from error


class Interceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of our services."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._methods: dict[str, Method] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of the call."""
        path = handler_call_details.method
        handler = await continuation(handler_call_details)
        if path.startswith(_OPEN_SERVICES):
            return handler
        if handler is None:
            return grpc.unary_unary_rpc_method_handler(self._refuse_unknown(path))
        if path not in self._methods:
            self._methods[path] = Method(path)
        method = self._methods[path]
        secret = _read_secret(handler_call_details)
        if handler.response_streaming:
            if handler.request_streaming:
                return grpc.stream_stream_rpc_method_handler(self._wrap_answers(method, handler.stream_stream, secret))
            return grpc.unary_stream_rpc_method_handler(self._wrap_answers(method, handler.unary_stream, secret))
        if handler.request_streaming:
            return grpc.stream_unary_rpc_method_handler(self._wrap_stream(method, handler.stream_unary, secret))
        return grpc.unary_unary_rpc_method_handler(self._wrap_unary(method, handler.unary_unary, secret))

    def _refuse_unknown(self, path: str) -> Any:
        async def refuse(_: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            await context.abort_with_status(to_status(MethodUnknown(path)))
            raise AssertionError

        return refuse

    def _wrap_unary(self, method: Method, serve: Any, secret: str) -> Any:
        async def answer(data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            async def work() -> bytes:
                with _measure(method):
                    async with AsyncExitStack() as stack:
                        call = await self._admit(method, secret, stack)
                        response = await answer_unary(call, serve, method.parse(data))
                        answered: bytes = response.SerializeToString()
                return answered

            return await _guard(method.path, work, context)

        return answer

    def _wrap_stream(self, method: Method, serve: Any, secret: str) -> Any:
        async def answer(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
            async def parsed() -> AsyncIterator[Message]:
                async for data in requests:
                    yield method.parse(data)

            async def work() -> bytes:
                async with AsyncExitStack() as stack:
                    call = await self._admit(method, secret, stack)
                    response = await serve(parsed(), call)
                    answered: bytes = response.SerializeToString()
                return answered

            return await _guard(method.path, work, context)

        return answer

    def _wrap_answers(self, method: Method, serve: Any, secret: str) -> Any:
        async def answer(received: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
            async def work() -> AsyncGenerator[bytes, None]:
                async with AsyncExitStack() as stack:
                    call = await self._admit(method, secret, stack)
                    request = received
                    if isinstance(received, bytes):
                        request = method.parse(received)
                        check_message(request)
                    async with aclosing(serve(request, call)) as responses:
                        async for response in responses:
                            yield response.SerializeToString()

            async with aclosing(work()) as answers:
                while (data := await _guard(method.path, partial(anext, answers, None), context)) is not None:
                    yield data

        return answer

    async def _admit(self, method: Method, secret: str, stack: AsyncExitStack) -> Call:
        if not secret:
            raise ApiKeyMissing
        async with transaction(self._engine) as conn:
            caller = await find_caller(conn, secret)
        if caller is None:
            raise ApiKeyInvalid
        app, key = caller
        return Call(self._engine, Caller(app, key.scopes, f"apiKeys/{key.api_key}"), method, stack)


async def answer_unary(call: Call, serve: Callable[[Any, Call], Awaitable[Message]], request: Message) -> Message:
    """Check a request and answer it; one with a request_id once, and one that changes something with an entry in the audit log.

    Whoever calls commits by leaving the call's stack, and rolls back by an error.
    """
    check_message(request)
    if (stored := await call.find_answer(request)) is None:
        try:
            response = await serve(request, call)
            await call.store_answer(_forget_secret(response))
        except _Answered as found:
            stored = found.answer
    if stored is not None:
        return call.method.response_class.FromString(stored)
    if call.method.changes and not getattr(request, "validate_only", False) and (resource := _name_resource(request, response)):
        await record_entry(await call.begin(), call.app.app_id, call.actor, call.method.short_name, resource)
    return response


def _name_resource(request: Message, response: Message) -> str:
    """What a call changed: the resource that it returned or named; empty for contacts poured in, which name none.

    Of a contact only that it was one: somebody who is erased is named nowhere any more.
    """
    for message in (response, request):
        if name := str(getattr(message, "name", "")):
            collection, is_contact, _ = name.partition("/contacts/")
            return f"{collection}/contacts" if is_contact else name
    return ""


def _forget_secret(response: Message) -> bytes:
    """The answer as it is stored for a repeat: a key's secret is shown once and stored nowhere."""
    if "secret" in response.DESCRIPTOR.fields_by_name:
        stored = type(response)()
        stored.CopyFrom(response)
        stored.ClearField("secret")
        return stored.SerializeToString()
    return response.SerializeToString()


def _read_secret(details: grpc.HandlerCallDetails) -> str:
    for name, value in details.invocation_metadata or ():
        if name == "authorization" and isinstance(value, str) and value[:7].lower() == "bearer ":
            return value[7:].strip()
    return ""


@contextmanager
def _measure(method: Method) -> Iterator[None]:
    """Count a call, by how it ends and how long it takes."""
    begun_at, code = time.monotonic(), "OK"
    try:
        yield
    except AftertouchError as error:
        code = error.code
        raise
    except asyncio.CancelledError:
        code = "CANCELLED"
        raise
    except Exception:
        code = "INTERNAL"
        raise
    finally:
        metrics.CALLS.labels(method.short_name, code).observe(time.monotonic() - begun_at)


async def _guard(path: str, work: Callable[[], Awaitable[T]], context: grpc.aio.ServicerContext[Any, Any]) -> T:
    """Run the work; whatever goes wrong leaves as a status with our reason."""
    try:
        return await work()
    except AftertouchError as error:
        status = to_status(error)
    except grpc.aio.AbortError:
        raise
    except Exception:
        request = uuid.uuid4().hex
        log.exception("a call failed", action="serve_call", method=path, request=request)
        status = to_status(Internal(request))
    await context.abort_with_status(status)
    raise AssertionError
