"""The Apps service."""

from __future__ import annotations

from datetime import UTC, datetime

from google.protobuf.empty_pb2 import Empty

from aftertouch.errors import NotFound
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.pages import make_page_token, read_page_token, size_page
from aftertouch.rpc.values import to_timestamp
from aftertouch.store import apps as store
from aftertouch.v1 import apps_pb2, apps_pb2_grpc, options_pb2


class Apps(apps_pb2_grpc.AppsServicer):
    """The caller's app and its keys."""

    async def GetApp(self, request: apps_pb2.GetAppRequest, call: Call) -> apps_pb2.App:  # type: ignore[override]
        check_parent(call, request.name, "name")
        return apps_pb2.App(
            name=call.app.name,
            display_name=call.app.display_name,
            create_time=to_timestamp(call.app.create_time),
            retargeting_enabled=call.app.retargeting_enabled,
            retargetable_since=to_timestamp(call.app.retargetable_since),
            retention_days=call.app.retention_days,
        )

    async def CreateApiKey(  # type: ignore[override]
        self, request: apps_pb2.CreateApiKeyRequest, call: Call
    ) -> apps_pb2.ApiKey:
        check_parent(call, request.parent)
        scopes = [options_pb2.Scope.Name(scope).removeprefix("SCOPE_").lower() for scope in request.api_key.scopes]
        key, secret = await store.create_api_key(await call.begin(), call.app.app_id, request.api_key.display_name, scopes)
        return _to_api_key(call, key, secret)

    async def ListApiKeys(  # type: ignore[override]
        self, request: apps_pb2.ListApiKeysRequest, call: Call
    ) -> apps_pb2.ListApiKeysResponse:
        check_parent(call, request.parent)
        size = size_page(request.page_size)
        question = f"{request.parent}/apiKeys"
        after = read_page_token(request.page_token, question, str)
        keys = await store.list_api_keys(await call.begin(), call.app.app_id, after, size + 1)
        return apps_pb2.ListApiKeysResponse(
            api_keys=[_to_api_key(call, key) for key in keys[:size]],
            next_page_token=make_page_token(question, keys[size - 1].api_key) if len(keys) > size else "",
        )

    async def DeleteApiKey(self, request: apps_pb2.DeleteApiKeyRequest, call: Call) -> Empty:  # type: ignore[override]
        key = read_name(call, request.name, "apiKeys")
        if not await store.revoke_api_key(await call.begin(), call.app.app_id, key, datetime.now(UTC)):
            raise NotFound(request.name)
        return Empty()


def _to_api_key(call: Call, key: store.ApiKey, secret: str = "") -> apps_pb2.ApiKey:
    return apps_pb2.ApiKey(
        name=f"{call.app.name}/apiKeys/{key.api_key}",
        display_name=key.display_name,
        scopes=[options_pb2.Scope.Value(f"SCOPE_{scope.upper()}") for scope in key.scopes],
        create_time=to_timestamp(key.create_time),
        revoke_time=to_timestamp(key.revoke_time),
        secret=secret,
    )
