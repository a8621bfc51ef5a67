"""The Apps service."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from google.protobuf.empty_pb2 import Empty

from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, read_name
from aftertouch.rpc.pages import make_page_token, read_page_token, size_page
from aftertouch.rpc.values import TIME_ZONES, to_timestamp
from aftertouch.store import apps as store
from aftertouch.store.app_secrets import create_identity_secret
from aftertouch.v1 import apps_pb2, apps_pb2_grpc, options_pb2
from aftertouch.vault import Vault

_CHANGEABLE = ("display_name", "quiet_hours", "frequency_cap", "web_origins", "link_url")


class Apps(apps_pb2_grpc.AppsServicer):
    """The caller's app and its keys."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    async def GetApp(self, request: apps_pb2.GetAppRequest, call: Call) -> apps_pb2.App:  # type: ignore[override]
        check_parent(call, request.name, "name")
        return _to_app(call.app)

    async def UpdateApp(self, request: apps_pb2.UpdateAppRequest, call: Call) -> apps_pb2.App:  # type: ignore[override]
        given = request.app
        check_parent(call, given.name, "app.name")
        paths = _read_mask(request)
        values: dict[str, Any] = {}
        if "display_name" in paths:
            if not given.display_name:
                raise FieldsInvalid([Violation("app.display_name", "is required")])
            values["display_name"] = given.display_name
        if "quiet_hours" in paths:
            values |= _read_quiet_hours(given)
        if "frequency_cap" in paths:
            cap = given.frequency_cap if given.HasField("frequency_cap") else None
            values |= {"cap_messages": cap.messages if cap else None, "cap_hours": cap.hours if cap else None}
        if "web_origins" in paths:
            values["web_origins"] = list(given.web_origins)
        if "link_url" in paths:
            values["link_url"] = given.link_url
        return _to_app(await store.update_app(await call.begin(), call.app.app_id, **values) if values else call.app)

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

    async def CreateIdentitySecret(  # type: ignore[override]
        self, request: apps_pb2.CreateIdentitySecretRequest, call: Call
    ) -> apps_pb2.IdentitySecret:
        check_parent(call, request.parent)
        return apps_pb2.IdentitySecret(secret=await create_identity_secret(await call.begin(), self._vault, call.app.app_id))


def _read_mask(request: apps_pb2.UpdateAppRequest) -> tuple[str, ...]:
    """The fields to change (AIP-134): those that are set without a mask, all with "*"."""
    paths = tuple(request.update_mask.paths)
    if not paths:
        return tuple(field.name for field, _ in request.app.ListFields() if field.name in _CHANGEABLE)
    if "*" in paths:
        return _CHANGEABLE
    known = apps_pb2.App.DESCRIPTOR.fields_by_name
    if unknown := [path for path in paths if path not in known]:
        raise FieldsInvalid(
            Violation("update_mask", f"{path!r} is not a field that can be named; name one of {', '.join(_CHANGEABLE)}")
            for path in unknown
        )
    return paths


def _read_quiet_hours(given: apps_pb2.App) -> dict[str, Any]:
    if not given.HasField("quiet_hours"):
        return {"quiet_start": None, "quiet_end": None, "quiet_time_zone": "UTC"}
    hours = given.quiet_hours
    if hours.start == hours.end:
        raise FieldsInvalid([Violation("app.quiet_hours.end", "is the same as start: there would be no other hours")])
    if hours.default_time_zone and hours.default_time_zone not in TIME_ZONES:
        text = f"{hours.default_time_zone!r} is not an IANA time zone like Europe/Madrid"
        raise FieldsInvalid([Violation("app.quiet_hours.default_time_zone", text)])
    return {
        "quiet_start": _read_minutes(hours.start),
        "quiet_end": _read_minutes(hours.end),
        "quiet_time_zone": hours.default_time_zone or "UTC",
    }


def _read_minutes(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return int(hours) * 60 + int(minutes)


def _to_app(app: store.App) -> apps_pb2.App:
    message = apps_pb2.App(
        name=app.name,
        display_name=app.display_name,
        create_time=to_timestamp(app.create_time),
        retargeting_enabled=app.retargeting_enabled,
        retargetable_since=to_timestamp(app.retargetable_since),
        retention_days=app.retention_days,
        web_origins=app.web_origins,
        link_url=app.link_url,
    )
    if app.quiet_start is not None and app.quiet_end is not None:
        message.quiet_hours.start = "{:02d}:{:02d}".format(*divmod(app.quiet_start, 60))
        message.quiet_hours.end = "{:02d}:{:02d}".format(*divmod(app.quiet_end, 60))
        message.quiet_hours.default_time_zone = app.quiet_time_zone
    if app.cap_messages is not None and app.cap_hours is not None:
        message.frequency_cap.messages = app.cap_messages
        message.frequency_cap.hours = app.cap_hours
    return message


def _to_api_key(call: Call, key: store.ApiKey, secret: str = "") -> apps_pb2.ApiKey:
    return apps_pb2.ApiKey(
        name=f"{call.app.name}/apiKeys/{key.api_key}",
        display_name=key.display_name,
        scopes=[options_pb2.Scope.Value(f"SCOPE_{scope.upper()}") for scope in key.scopes],
        create_time=to_timestamp(key.create_time),
        revoke_time=to_timestamp(key.revoke_time),
        secret=secret,
    )
