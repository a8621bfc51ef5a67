"""The Retargeting service."""

from __future__ import annotations

from datetime import UTC, datetime

from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.plugins import Registry
from aftertouch.retargeting.audiences import encode_audience, find_source
from aftertouch.retargeting.selections import (
    Selection,
    check_source,
    count_actions,
    preview,
    select_numbers,
    title_wave,
)
from aftertouch.rpc.campaigns import create_draft, find, read_selection
from aftertouch.rpc.channels import to_action
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.values import to_timestamp
from aftertouch.v1 import campaigns_pb2, retargeting_pb2, retargeting_pb2_grpc

_Drop = retargeting_pb2.PreviewRetargetResponse.Drop
_Reason = retargeting_pb2.PreviewRetargetResponse.Reason


class Retargeting(retargeting_pb2_grpc.RetargetingServicer):
    """From one campaign to the audience of the next."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    async def ListActions(  # type: ignore[override]
        self, request: retargeting_pb2.ListActionsRequest, call: Call
    ) -> retargeting_pb2.ListActionsResponse:
        source = await find(call, request.parent, field="parent")
        check_source(call.app, source)
        if source.channel not in self._registry.types:
            raise NotFound(f"channels/{source.channel}")
        found = self._registry.types[source.channel]
        now = datetime.now(UTC)
        return retargeting_pb2.ListActionsResponse(
            actions=[
                retargeting_pb2.ActionCount(
                    action=to_action(found, counted.action), count=counted.count, apart_count=counted.apart_count
                )
                for counted in await count_actions(await call.begin(), source, found)
            ],
            recipients=source.recipients,
            as_of_time=to_timestamp(now),
        )

    async def PreviewRetarget(  # type: ignore[override]
        self, request: retargeting_pb2.PreviewRetargetRequest, call: Call
    ) -> retargeting_pb2.PreviewRetargetResponse:
        selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        conn = await call.begin()
        now = datetime.now(UTC)
        source, source_channel = await find_source(conn, call.app, self._registry.types, selection, "selection")
        numbers = await select_numbers(conn, source, source_channel, selection)
        shown = await preview(conn, call.app, numbers, request.channel)
        return retargeting_pb2.PreviewRetargetResponse(
            matched_count=shown.matched,
            drops=[
                _Drop(reason=_Reason.NO_SUBSCRIPTION, count=shown.no_subscription),
                _Drop(reason=_Reason.OPTED_OUT, count=shown.opted_out),
                _Drop(reason=_Reason.INVALID, count=shown.invalid),
            ],
            audience_count=shown.audience,
            as_of_time=to_timestamp(now),
            display_name=title_wave(source, source_channel, selection),
        )

    async def CreateRetarget(  # type: ignore[override]
        self, request: retargeting_pb2.CreateRetargetRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        selection: Selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        source, source_channel = await find_source(await call.begin(), call.app, self._registry.types, selection, "selection")
        return await create_draft(
            call,
            request.campaign_id,
            {
                "display_name": request.display_name or title_wave(source, source_channel, selection),
                "channel": request.channel,
                "audience": encode_audience(selection),
                "root_id": source.root_id or source.campaign_id,
            },
        )

    def _check_target(self, channel: str) -> None:
        if channel not in self._registry.types:
            known = ", ".join(sorted(self._registry.types))
            raise FieldsInvalid([Violation("channel", f"no channel {channel!r} is installed; there are {known}")])
