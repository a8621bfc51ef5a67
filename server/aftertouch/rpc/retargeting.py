"""The Retargeting service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.errors import DraftExists, FieldsInvalid, NotFound, SelectionUnsettled, Violation
from aftertouch.plugins import Registry
from aftertouch.retargeting.audiences import Prepared, filter_selection, prepare_selection
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.funnel import Funnel, Reason
from aftertouch.retargeting.matching import ActionCount, count_matrix
from aftertouch.retargeting.selections import Source, find_source, find_sources, title_wave
from aftertouch.retargeting.settling import Unsettled, find_unsettled
from aftertouch.rolls.chunks import Bits, count_bits, list_numbers
from aftertouch.rpc.campaigns import create_draft
from aftertouch.rpc.channels import to_action
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import read_name
from aftertouch.rpc.pages import make_page_token, read_page_token
from aftertouch.rpc.selections import read_selection
from aftertouch.rpc.values import to_timestamp
from aftertouch.store import campaigns as store
from aftertouch.store.contacts import find_external_ids
from aftertouch.store.engine import snapshot, transaction
from aftertouch.v1 import campaigns_pb2, retargeting_pb2, retargeting_pb2_grpc

_CONTACTS_IN_A_RESPONSE = 1_000

_Response = retargeting_pb2.PreviewRetargetResponse
_Request = retargeting_pb2.ListRetargetContactsRequest


class Retargeting(retargeting_pb2_grpc.RetargetingServicer):
    """From one campaign to the audience of the next."""

    def __init__(self, registry: Registry, copies: Copies) -> None:
        self._registry = registry
        self._copies = copies

    async def ListActions(  # type: ignore[override]
        self, request: retargeting_pb2.ListActionsRequest, call: Call
    ) -> retargeting_pb2.ListActionsResponse:
        name = read_name(call, request.parent, "campaigns", "parent")
        async with snapshot(call.engine) as (conn, as_of_time):
            source = await self._find_source(conn, call, name)
            counted = await count_matrix(conn, self._copies, source)
        return retargeting_pb2.ListActionsResponse(
            actions=[_to_action_count(source, action) for action in counted.actions],
            recipients=source.campaign.recipients,
            as_of_time=to_timestamp(as_of_time),
            pending_count=counted.pending,
            unclear_count=counted.unclear,
        )

    async def GetMatrix(  # type: ignore[override]
        self, request: retargeting_pb2.GetMatrixRequest, call: Call
    ) -> retargeting_pb2.Matrix:
        name = read_name(call, request.name, "campaigns")
        async with snapshot(call.engine) as (conn, as_of_time):
            source = await self._find_source(conn, call, name)
            counted = await count_matrix(conn, self._copies, source, sorted(self._registry.types))
        return retargeting_pb2.Matrix(
            channel=source.campaign.channel,
            rows=[
                retargeting_pb2.MatrixRow(
                    action_count=_to_action_count(source, action),
                    cells=[
                        retargeting_pb2.MatrixCell(channel=channel, reachable_count=count)
                        for channel, count in action.reachable.items()
                    ],
                )
                for action in counted.actions
            ],
            recipients=source.campaign.recipients,
            as_of_time=to_timestamp(as_of_time),
            pending_count=counted.pending,
            unclear_count=counted.unclear,
        )

    async def PreviewRetarget(  # type: ignore[override]
        self, request: retargeting_pb2.PreviewRetargetRequest, call: Call
    ) -> retargeting_pb2.PreviewRetargetResponse:
        selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        async with snapshot(call.engine) as (conn, as_of_time):
            sources = await find_sources(conn, call.app, self._registry.types, selection, "selection")
            unsettled = await find_unsettled(conn, call.app, sources, selection, as_of_time)
            _check_settled(call, unsettled, is_required=request.require_settled)
            funnel = await filter_selection(conn, self._copies, call.app, sources, selection, request.channel)
        return _Response(
            matched_count=count_bits(funnel.matched),
            drops=[
                _Response.Drop(reason=_Response.Reason.Value(reason), count=count_bits(dropped))
                for reason, dropped in funnel.drops.items()
            ],
            audience_count=count_bits(funnel.audience),
            as_of_time=to_timestamp(as_of_time),
            display_name=title_wave(selection, sources),
            unsettled=_to_unsettled(call, unsettled),
        )

    async def ListRetargetContacts(  # type: ignore[override]
        self, request: retargeting_pb2.ListRetargetContactsRequest, call: Call
    ) -> AsyncIterator[retargeting_pb2.ListRetargetContactsResponse]:
        selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        question = f"{call.app.name}/{request.selection}/{request.channel}/{request.group}/{request.reason}"
        after = read_page_token(request.resume_token, question, int, "resume_token")
        async with snapshot(call.engine) as (conn, as_of_time):
            sources = await find_sources(conn, call.app, self._registry.types, selection, "selection")
            funnel = await filter_selection(conn, self._copies, call.app, sources, selection, request.channel)
        numbers = await asyncio.to_thread(list_numbers, _choose_group(funnel, request))
        first = 0 if after is None else int(np.searchsorted(numbers, after, side="right"))
        # One response at least says how many there are.
        for start in range(first, max(len(numbers), first + 1), _CONTACTS_IN_A_RESPONSE):
            chosen = numbers[start : start + _CONTACTS_IN_A_RESPONSE]
            async with transaction(call.engine) as conn:
                names = await find_external_ids(conn, call.app.app_id, chosen)
            yield retargeting_pb2.ListRetargetContactsResponse(
                contacts=[f"{call.app.name}/contacts/{names[number]}" for number in chosen.tolist() if number in names],
                total_count=len(numbers),
                as_of_time=to_timestamp(as_of_time),
                resume_token=make_page_token(question, int(chosen[-1])) if len(chosen) else request.resume_token,
            )

    async def CreateRetarget(  # type: ignore[override]
        self, request: retargeting_pb2.CreateRetargetRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        is_frozen = request.evaluation == campaigns_pb2.Audience.AT_CREATION
        async with snapshot(call.engine) as (conn, now):
            sources = await find_sources(conn, call.app, self._registry.types, selection, "selection")
            unsettled = await find_unsettled(conn, call.app, sources, selection, now)
            _check_settled(call, unsettled, is_required=request.require_settled)
            prepared = await prepare_selection(
                conn,
                self._copies,
                call.app,
                sources,
                selection,
                request.channel,
                as_of_time=now if is_frozen else None,
            )
        if not request.allow_duplicate:
            await _check_new(call, prepared, request.channel)
        title = {"display_name": request.display_name or title_wave(selection, sources), "channel": request.channel}
        draft = await create_draft(call, request.campaign_id, title | prepared.values, prepared.roll)
        draft.unsettled.extend(_to_unsettled(call, unsettled))
        return draft

    async def _find_source(self, conn: AsyncConnection, call: Call, name: str) -> Source:
        found = await store.find_campaign(conn, call.app.app_id, name)
        if found is None:
            raise NotFound(f"{call.app.name}/campaigns/{name}")
        return find_source(call.app, self._registry.types, found)

    def _check_target(self, channel: str) -> None:
        if channel not in self._registry.types:
            known = ", ".join(sorted(self._registry.types))
            raise FieldsInvalid([Violation("channel", f"no channel {channel!r} is installed; there are {known}")])


async def _check_new(call: Call, prepared: Prepared, channel: str) -> None:
    """Raise ``DraftExists`` when the same retarget was drafted already; two calls at once take their turns."""
    values = prepared.values
    draft = await store.find_draft(await call.begin(), call.app.app_id, values["root_id"], channel, values["audience"])
    if draft is not None:
        raise DraftExists(f"{call.app.name}/campaigns/{draft.campaign}")


def _check_settled(call: Call, unsettled: Sequence[Unsettled], *, is_required: bool) -> None:
    if is_required and unsettled:
        worst = max(unsettled, key=lambda found: found.settle_time)
        raise SelectionUnsettled(
            f"{call.app.name}/campaigns/{worst.source.campaign}",
            worst.signal,
            worst.delay,
            worst.measured_events,
            worst.settle_time.isoformat(),
        )


def _choose_group(funnel: Funnel, request: retargeting_pb2.ListRetargetContactsRequest) -> Bits:
    if request.group != _Request.DROPPED:
        if request.reason:
            raise FieldsInvalid([Violation("reason", "is for the group DROPPED only")])
        return funnel.matched if request.group == _Request.MATCHED else funnel.audience
    reason = _Response.Reason.Name(request.reason)
    if reason not in funnel.drops:
        raise FieldsInvalid([Violation("reason", f"is required for the group DROPPED: one of {', '.join(funnel.drops)}")])
    return funnel.drops[Reason(reason)]


def _to_action_count(source: Source, counted: ActionCount) -> retargeting_pb2.ActionCount:
    return retargeting_pb2.ActionCount(
        action=to_action(source.channel, counted.action),
        count=counted.count,
        apart_count=counted.apart_count,
        pending_count=counted.pending_count,
    )


def _to_unsettled(call: Call, unsettled: Sequence[Unsettled]) -> list[campaigns_pb2.Unsettled]:
    messages = []
    for found in unsettled:
        message = campaigns_pb2.Unsettled(
            source=f"{call.app.name}/campaigns/{found.source.campaign}",
            signal=found.signal,
            measured_events=found.measured_events,
            settle_time=to_timestamp(found.settle_time),
        )
        message.delay.FromTimedelta(found.delay)
        messages.append(message)
    return messages
