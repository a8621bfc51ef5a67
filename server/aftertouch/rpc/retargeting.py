"""The Retargeting service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.delivery.follow_ups import plan_follow_up
from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.plugins import Registry
from aftertouch.retargeting.audiences import Prepared, filter_selection, prepare_selection
from aftertouch.retargeting.chains import REACHED, Comparison, Costs, Link, Tally, find_chain, report_chain
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.funnel import Funnel, Reason
from aftertouch.retargeting.matching import ActionCount, count_matrix
from aftertouch.retargeting.selections import Question, Selection, Source, Sources, find_source, find_sources, root_of, title_wave
from aftertouch.retargeting.settling import find_unsettled
from aftertouch.rolls.chunks import Bits, count_bits
from aftertouch.rpc.campaigns import create_draft, find, read_content, to_campaign
from aftertouch.rpc.channels import to_action
from aftertouch.rpc.exports import begin_export, stream_contacts
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import read_name
from aftertouch.rpc.selections import check_settled, read_selection, to_unsettled
from aftertouch.rpc.values import read_delay, to_timestamp
from aftertouch.store import campaigns as store
from aftertouch.store.engine import snapshot
from aftertouch.v1 import campaigns_pb2, retargeting_pb2, retargeting_pb2_grpc

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
            check_settled(call, unsettled, is_required=request.require_settled)
            funnel = await self._filter(conn, call, request, sources, selection)
        return _Response(
            matched_count=count_bits(funnel.matched),
            drops=[_to_drop(funnel, reason) for reason in funnel.drops],
            audience_count=count_bits(funnel.audience),
            as_of_time=to_timestamp(as_of_time),
            display_name=title_wave(selection, sources),
            unsettled=to_unsettled(call, unsettled),
        )

    async def ListRetargetContacts(  # type: ignore[override]
        self, request: retargeting_pb2.ListRetargetContactsRequest, call: Call
    ) -> AsyncIterator[retargeting_pb2.ListRetargetContactsResponse]:
        selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        question = "/".join(
            map(str, (call.app.name, request.selection, request.channel, request.group, request.reason, request.holdout_percent))
        )
        pages = begin_export(question, request.resume_token)
        async with snapshot(call.engine) as (conn, as_of_time):
            sources = await find_sources(conn, call.app, self._registry.types, selection, "selection")
            people = _choose_group(await self._filter(conn, call, request, sources, selection), request)
        respond = retargeting_pb2.ListRetargetContactsResponse
        async for response in stream_contacts(call, respond, people, as_of_time, pages):
            yield response

    async def CreateRetarget(  # type: ignore[override]
        self, request: retargeting_pb2.CreateRetargetRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        selection = read_selection(call, request.selection, "selection")
        self._check_target(request.channel)
        is_frozen = request.evaluation == campaigns_pb2.Audience.AT_CREATION
        async with snapshot(call.engine) as (conn, now):
            sources = await find_sources(conn, call.app, self._registry.types, selection, "selection")
            unsettled = await find_unsettled(conn, call.app, sources, selection, now)
            check_settled(call, unsettled, is_required=request.require_settled)
            prepared = await prepare_selection(
                conn,
                self._copies,
                call.app,
                sources,
                selection,
                request.channel,
                as_of_time=now if is_frozen else None,
            )
        draft = None if request.allow_duplicate else await _find_existing(call, prepared, request.channel)
        is_existing = draft is not None
        if draft is None:
            values = {
                "display_name": request.display_name or title_wave(selection, sources),
                "channel": request.channel,
                "holdout_percent": request.holdout_percent,
            }
            draft = await create_draft(call, request.campaign_id, values | prepared.values, prepared.roll)
        message = await to_campaign(call, draft)
        message.existing = is_existing
        message.unsettled.extend(to_unsettled(call, unsettled))
        return message

    async def CreateFollowUps(  # type: ignore[override]
        self, request: retargeting_pb2.CreateFollowUpsRequest, call: Call
    ) -> retargeting_pb2.CreateFollowUpsResponse:
        source = await find(call, request.source, field="source")
        conn = await call.begin()
        made = []
        for index, step in enumerate(request.steps):
            path = f"steps[{index}]"
            question = _read_step(call, step, source, path)
            self._check_target(step.channel, f"{path}.channel")
            values: dict[str, Any] = {
                "channel": step.channel,
                "content": read_content(self._registry.types[step.channel], step.content, f"{path}.content"),
                "holdout_percent": step.holdout_percent,
            }
            delay = read_delay(step, "delay", f"{path}.delay") or timedelta()
            values |= plan_follow_up(call.app, self._registry.types, source, question, delay, path)
            if step.display_name:
                values["display_name"] = step.display_name
            draft = await create_draft(call, step.campaign_id, values)
            now = datetime.now(UTC)
            asked = {source.campaign: Source(source, self._registry.types[source.channel])}
            at = (source.finish_time or now) + delay
            unsettled = await find_unsettled(conn, call.app, asked, question, now, max(at, now))
            check_settled(call, unsettled, is_required=request.require_settled)
            source = await store.update_campaign(conn, draft.campaign_id, state="SCHEDULED")
            message = await to_campaign(call, source)
            message.unsettled.extend(to_unsettled(call, unsettled))
            made.append(message)
        return retargeting_pb2.CreateFollowUpsResponse(campaigns=made)

    async def GetChainReport(  # type: ignore[override]
        self, request: retargeting_pb2.GetChainReportRequest, call: Call
    ) -> retargeting_pb2.ChainReport:
        name = read_name(call, request.name, "campaigns")
        async with snapshot(call.engine) as (conn, as_of_time):
            campaign = await self._find(conn, call, name)
            campaigns = await find_chain(conn, call.app, campaign)
            report = await report_chain(conn, self._copies, self._registry.types, campaigns)
        return retargeting_pb2.ChainReport(
            root=next(
                (f"{call.app.name}/campaigns/{found.campaign}" for found in campaigns if found.campaign_id == root_of(campaign)),
                "",
            ),
            campaigns=[_to_chain_campaign(call, link) for link in report.links],
            people=_to_chain_counts(report.people),
            costs=_to_costs(report.costs),
            comparisons=[_to_comparison(call, comparison) for comparison in report.comparisons],
            as_of_time=to_timestamp(as_of_time),
        )

    async def _filter(
        self,
        conn: AsyncConnection,
        call: Call,
        request: retargeting_pb2.PreviewRetargetRequest | retargeting_pb2.ListRetargetContactsRequest,
        sources: Sources,
        selection: Selection,
    ) -> Funnel:
        return await filter_selection(
            conn,
            self._copies,
            call.app,
            sources,
            selection,
            request.channel,
            holdout_percent=request.holdout_percent,
        )

    async def _find_source(self, conn: AsyncConnection, call: Call, name: str) -> Source:
        return find_source(call.app, self._registry.types, await self._find(conn, call, name))

    @staticmethod
    async def _find(conn: AsyncConnection, call: Call, name: str) -> store.Campaign:
        found = await store.find_campaign(conn, call.app.app_id, name)
        if found is None:
            raise NotFound(f"{call.app.name}/campaigns/{name}")
        return found

    def _check_target(self, channel: str, path: str = "channel") -> None:
        if channel not in self._registry.types:
            known = ", ".join(sorted(self._registry.types))
            raise FieldsInvalid([Violation(path, f"no channel {channel!r} is installed; there are {known}")])


async def _find_existing(call: Call, prepared: Prepared, channel: str) -> store.Campaign | None:
    """The same retarget, when it was made already and not launched; two calls at once take their turns."""
    values = prepared.values
    return await store.find_draft(await call.begin(), call.app.app_id, values["root_id"], channel, values["audience"])


def _read_step(call: Call, step: retargeting_pb2.FollowUpStep, source: store.Campaign, path: str) -> Question:
    """What a follow-up asks of the campaign before it."""
    given = step.selection
    set_fields = ["source"] if given.source else []
    if (combination := given.WhichOneof("combination")) is not None:
        set_fields.append(combination)
    violations = [
        Violation(f"{path}.selection.{field}", "must be empty: a step asks the people of the campaign before it")
        for field in set_fields
    ]
    if violations:
        raise FieldsInvalid(violations)
    asked = campaigns_pb2.RetargetSelection()
    asked.CopyFrom(given)
    asked.source = f"{call.app.name}/campaigns/{source.campaign}"
    question = read_selection(call, asked, f"{path}.selection")
    assert isinstance(question, Question), "it has a source"
    return question


def _choose_group(funnel: Funnel, request: retargeting_pb2.ListRetargetContactsRequest) -> Bits:
    if request.group != _Request.DROPPED:
        if request.reason:
            raise FieldsInvalid([Violation("reason", "is for the group DROPPED only")])
        return funnel.matched if request.group == _Request.MATCHED else funnel.audience
    reason = _Response.Reason.Name(request.reason)
    if reason not in funnel.drops:
        raise FieldsInvalid([Violation("reason", f"is required for the group DROPPED: one of {', '.join(funnel.drops)}")])
    return funnel.drops[Reason(reason)]


def _to_drop(funnel: Funnel, reason: Reason) -> retargeting_pb2.PreviewRetargetResponse.Drop:
    earliest, latest = funnel.ends.get(reason, (None, None))
    return _Response.Drop(
        reason=_Response.Reason.Value(reason),
        count=count_bits(funnel.drops[reason]),
        earliest_end_time=to_timestamp(earliest),
        latest_end_time=to_timestamp(latest),
    )


def _to_chain_counts(tally: Tally) -> retargeting_pb2.ChainCounts:
    signals = dict(tally.signals)
    return retargeting_pb2.ChainCounts(recipients=tally.recipients, reached=signals.pop(REACHED, 0), signals=signals)


def _to_chain_campaign(call: Call, link: Link) -> retargeting_pb2.ChainCampaign:
    campaign = link.campaign
    return retargeting_pb2.ChainCampaign(
        campaign=f"{call.app.name}/campaigns/{campaign.campaign}",
        sources=[f"{call.app.name}/campaigns/{source}" for source in link.sources],
        display_name=campaign.display_name,
        channel=campaign.channel,
        state=campaigns_pb2.Campaign.State.Value(campaign.state),
        launch_time=to_timestamp(campaign.launch_time),
        people=_to_chain_counts(link.people),
        added=_to_chain_counts(link.added),
        holdout_count=campaign.holdout_count,
        costs=_to_costs(link.costs),
    )


def _to_costs(costs: Costs) -> list[retargeting_pb2.Cost]:
    return [
        retargeting_pb2.Cost(currency=currency, amount=f"{cost.amount.normalize():f}", recipient_count=cost.recipients)
        for currency, cost in costs.items()
    ]


def _to_comparison(call: Call, comparison: Comparison) -> retargeting_pb2.HoldoutComparison:
    return retargeting_pb2.HoldoutComparison(
        campaign=f"{call.app.name}/campaigns/{comparison.campaign.campaign}",
        recipients=comparison.campaign.recipients,
        holdout_count=comparison.campaign.holdout_count,
        differences=[
            retargeting_pb2.HoldoutComparison.Difference(
                signal=found.signal,
                recipient_count=found.recipients,
                holdout_count=found.held_out,
                difference=found.difference,
                lower_bound=found.lower,
                upper_bound=found.upper,
            )
            for found in comparison.differences
        ],
    )


def _to_action_count(source: Source, counted: ActionCount) -> retargeting_pb2.ActionCount:
    return retargeting_pb2.ActionCount(
        action=to_action(source.channel, counted.action),
        count=counted.count,
        apart_count=counted.apart_count,
        pending_count=counted.pending_count,
    )
