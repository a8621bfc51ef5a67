"""The Campaigns service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import Struct
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Accepted, Outcome, ReasonClass, Unclear
from aftertouch.declarations import ChannelType
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.control import cancel, check_state, pause, resume, settle
from aftertouch.delivery.estimates import Bill, estimate_campaign
from aftertouch.delivery.follow_ups import Wait, plan_delay
from aftertouch.delivery.launch import check_content, launch, plan_launch, prepare_launch, schedule, unschedule
from aftertouch.delivery.render import find_template_errors
from aftertouch.delivery.trial import send_test
from aftertouch.errors import (
    AlreadyExists,
    AudienceEmpty,
    ContentMissing,
    EtagMismatch,
    FieldsInvalid,
    NotFound,
    ServerStopping,
    Violation,
)
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.watch import rest
from aftertouch.plugins import Registry
from aftertouch.retargeting.audiences import (
    AllSubscribers,
    Audience,
    GivenContacts,
    ListMembers,
    Prepared,
    decode_audience,
    decode_frozen,
    prepare_audience,
)
from aftertouch.retargeting.copies import Copies
from aftertouch.retargeting.report import Recipient, Wanted, count_campaign, find_group, list_recipients
from aftertouch.retargeting.selections import Combination, Question, find_sources, list_questions
from aftertouch.retargeting.settling import Unsettled, find_unsettled
from aftertouch.rolls.chunks import Numbers, count_bits
from aftertouch.rolls.sql import delete_roll, write_roll
from aftertouch.rpc.exports import begin_export
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import check_parent, make_campaign_id, read_name
from aftertouch.rpc.pages import fill_page, make_page_token, read_page_token, size_page
from aftertouch.rpc.selections import check_settled, read_selection, to_selection, to_unsettled
from aftertouch.rpc.values import read_delay, read_timestamp, to_struct, to_timestamp
from aftertouch.store import campaigns as store
from aftertouch.store.engine import snapshot, transaction
from aftertouch.store.lists import find_list
from aftertouch.store.units import has_units
from aftertouch.v1 import campaigns_pb2, campaigns_pb2_grpc

_SETTINGS = ("display_name", "messages_per_second", "transactional", "holdout_percent")
"""Fields that are stored as they are given."""
_DELAY = "follow_up.delay"
_CHANGEABLE = (*_SETTINGS, "content", "audience", "track_links", _DELAY)
_CHANGEABLE_BEFORE_SENDING = frozenset({"messages_per_second"})
"""In a campaign that is SCHEDULED or PAUSED."""
WATCH_SECONDS = 1.0
TESTS_AT_ONCE = 5
"""Of those with a request_id."""
_LARGEST_CONTENT = 65_536
"""Bytes of a campaign's content as it is sent to us."""


class Campaigns(campaigns_pb2_grpc.CampaignsServicer):
    """The campaigns of the caller's app."""

    def __init__(
        self, registry: Registry, ledger: Ledger, context: MessageContext, copies: Copies, stopping: asyncio.Event
    ) -> None:
        self._registry = registry
        self._ledger = ledger
        self._context = context
        self._copies = copies
        self._tests = asyncio.Semaphore(TESTS_AT_ONCE)
        self._stopping = stopping

    async def CreateCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.CreateCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        check_parent(call, request.parent)
        given = request.campaign
        if given.channel not in self._registry.types:
            known = ", ".join(sorted(self._registry.types))
            raise FieldsInvalid([Violation("campaign.channel", f"no channel {given.channel!r} is installed; there are {known}")])
        found = self._registry.types[given.channel]
        values: dict[str, Any] = {"channel": given.channel} | {name: getattr(given, name) for name in _SETTINGS}
        values |= _read_parts(given, found, ("content", "track_links"))
        prepared = await self._prepare_audience(call, given, found)
        await _hold_list(call, given)
        return await to_campaign(call, await create_draft(call, request.campaign_id, values | prepared.values, prepared.roll))

    async def GetCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.GetCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        return await self._to_counted(call, await find(call, request.name))

    async def ListCampaigns(  # type: ignore[override]
        self, request: campaigns_pb2.ListCampaignsRequest, call: Call
    ) -> campaigns_pb2.ListCampaignsResponse:
        check_parent(call, request.parent)
        size = size_page(request.page_size)
        where = _read_filter(call, request.filter)
        question = f"{request.parent}/campaigns {where}"
        before = read_page_token(request.page_token, question, int)
        found = await store.list_campaigns(await call.begin(), call.app.app_id, before, size + 1, where)
        named = {number for campaign in found[:size] for number in (campaign.root_id, campaign.source_id) if number is not None}
        known = await store.read_campaigns(await call.begin(), sorted(named))
        page = fill_page([await to_campaign(call, campaign, known) for campaign in found[:size]])
        return campaigns_pb2.ListCampaignsResponse(
            campaigns=page,
            next_page_token=make_page_token(question, found[len(page) - 1].campaign_id) if len(found) > len(page) else "",
        )

    async def UpdateCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.UpdateCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        given = request.campaign
        paths = _read_mask(request)
        prepared = None
        if "audience" in paths and given.audience.evaluation == campaigns_pb2.Audience.AT_CREATION:
            draft = await self._find_changeable(call, request, paths)
            # The people are read on another connection.
            await call.commit()
            prepared = await self._prepare_audience(call, given, self._registry.types[draft.channel], draft)
        campaign = await self._find_changeable(call, request, paths, lock=True)
        found = self._registry.types[campaign.channel]
        values: dict[str, Any] = {name: getattr(given, name) for name in _SETTINGS if name in paths}
        values |= _read_parts(given, found, paths)
        if campaign.state == "SCHEDULED" and values.get("content", campaign.content) is None:
            raise ContentMissing(given.name)
        conn = await call.begin()
        if _DELAY in paths and campaign.source_id is not None:
            values |= vars(await _plan_delay(call, given, campaign))
        if "audience" in paths:
            prepared = prepared or await self._prepare_audience(call, given, found, campaign)
            await _hold_list(call, given)
            await delete_roll(conn, campaign.campaign_id)
            if prepared.roll is not None:
                await write_roll(conn, campaign.campaign_id, prepared.roll)
            values |= prepared.values
        changed = await store.update_campaign(conn, campaign.campaign_id, **values)
        message = await to_campaign(call, changed)
        if changed.source_id is not None and not {_DELAY, "audience"}.isdisjoint(paths):
            wait = Wait(changed.schedule_time, changed.source_id, changed.delay_seconds)
            message.unsettled.extend(to_unsettled(call, await self._find_unsettled(conn, call, changed, wait)))
        return message

    async def _find_changeable(
        self, call: Call, request: campaigns_pb2.UpdateCampaignRequest, paths: tuple[str, ...], *, lock: bool = False
    ) -> store.Campaign:
        """The campaign of an update, when these fields of it can be changed to what is given."""
        given = request.campaign
        campaign = await find(call, given.name, field="campaign.name", lock=lock)
        _check_etag(given.name, campaign, given.etag)
        is_pace_only = bool(paths) and _CHANGEABLE_BEFORE_SENDING.issuperset(paths)
        is_waiting = campaign.source_id is not None
        check_state(
            call.app,
            campaign,
            "DRAFT",
            *(("SCHEDULED",) if is_pace_only or is_waiting else ()),
            *(("PAUSED",) if is_pace_only else ()),
        )
        if "channel" in paths and given.channel != campaign.channel:
            raise FieldsInvalid(
                [Violation("campaign.channel", f"cannot be changed from {campaign.channel}; make a new campaign")]
            )
        if "display_name" in paths and not given.display_name:
            raise FieldsInvalid([Violation("campaign.display_name", "is required")])
        if campaign.channel not in self._registry.types:
            raise NotFound(f"channels/{campaign.channel}")
        if is_waiting and "audience" in paths:
            await _check_source_kept(call, given, campaign)
        if not is_waiting and _DELAY in paths and given.follow_up.HasField("delay"):
            raise FieldsInvalid([Violation(f"campaign.{_DELAY}", "is of a SCHEDULED follow-up; launch this with a delay")])
        return campaign

    async def DeleteCampaign(self, request: campaigns_pb2.DeleteCampaignRequest, call: Call) -> Empty:  # type: ignore[override]
        campaign = await find(call, request.name, lock=True)
        _check_etag(request.name, campaign, request.etag)
        check_state(call.app, campaign, "DRAFT")
        await store.delete_campaign(await call.begin(), campaign.campaign_id)
        return Empty()

    async def LaunchCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.LaunchCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        await self._check_content(call, read_name(call, request.name, "campaigns", "name"))
        campaign = await find(call, request.name, lock=True)
        _check_etag(request.name, campaign, request.etag)
        conn = await call.begin()
        check_state(call.app, campaign, "DRAFT")
        schedule_time, send_by_time = read_timestamp(request, "schedule_time"), read_timestamp(request, "send_by_time")
        delay = read_delay(request, "delay", "delay")
        wait = await plan_launch(conn, call.app, campaign, schedule_time, delay, send_by_time)
        if request.validate_only:
            message = await to_campaign(call, campaign)
            people = await prepare_launch(conn, self._registry, call.app, campaign, wait)
            message.counts.recipients, message.holdout_count = len(people.roll), len(people.held_out)
            if not message.counts.recipients and wait is None:
                raise AudienceEmpty(request.name)
            declared = self._registry.types[campaign.channel]
            channel = self._context.accounts.build(await self._context.accounts.choose(conn, call.app, campaign.channel))
            bill = await estimate_campaign(conn, self._context, call.app, campaign, declared, channel, people.roll)
            if bill is not None:
                message.estimate.CopyFrom(_to_estimate(bill))
        elif wait is not None:
            message = await to_campaign(call, await schedule(conn, self._registry, call.app, campaign, wait, send_by_time))
        else:
            message = await to_campaign(call, await launch(conn, self._registry, call.app, campaign, send_by_time))
        unsettled = await self._find_unsettled(conn, call, campaign, wait)
        # What was done above is undone by a refusal.
        check_settled(call, unsettled, is_required=request.require_settled)
        message.unsettled.extend(to_unsettled(call, unsettled))
        return message

    async def _find_unsettled(
        self, conn: AsyncConnection, call: Call, campaign: store.Campaign, wait: Wait | None
    ) -> list[Unsettled]:
        """Where a launch asks too early, now or after a wait; of a frozen audience that was said when it was frozen."""
        audience = decode_audience(campaign.audience) if campaign.audience else None
        if campaign.audience is None or not isinstance(audience, Question | Combination) or decode_frozen(campaign.audience):
            return []
        is_follow_up = wait is not None and wait.source_id is not None
        sources = await find_sources(conn, call.app, self._registry.types, audience, "audience.retarget", may_wait=is_follow_up)
        now = datetime.now(UTC)
        return await find_unsettled(conn, call.app, sources, audience, now, max(wait.earliest, now) if wait else now)

    async def _check_content(self, call: Call, name: str) -> None:
        """Have a draft's content checked by its channel. Whatever else is wrong with it, launching says."""
        accounts = self._context.accounts
        async with transaction(call.engine) as conn:
            draft = await store.find_campaign(conn, call.app.app_id, name)
            if draft is None or draft.state != "DRAFT" or draft.content is None:
                return
            choice = await accounts.choose(conn, call.app, draft.channel)
        with accounts.hold(await accounts.open(choice)) as channel:
            await check_content(channel, draft)

    async def UnscheduleCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.UnscheduleCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        campaign = await find(call, request.name, lock=True)
        _check_etag(request.name, campaign, request.etag)
        return await to_campaign(call, await unschedule(await call.begin(), call.app, campaign))

    async def PauseCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.PauseCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        campaign = await find(call, request.name, lock=True)
        _check_etag(request.name, campaign, request.etag)
        paused = await pause(await call.begin(), call.app, campaign)
        await call.commit()
        return await to_campaign(call, await settle(call.engine, paused))

    async def CancelCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.CancelCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        campaign = await find(call, request.name, lock=True)
        _check_etag(request.name, campaign, request.etag)
        canceled = await cancel(await call.begin(), call.app, campaign)
        await call.commit()
        return await to_campaign(call, await settle(call.engine, canceled))

    async def ResumeCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.ResumeCampaignRequest, call: Call
    ) -> campaigns_pb2.Campaign:
        campaign = await find(call, request.name, lock=True)
        _check_etag(request.name, campaign, request.etag)
        return await to_campaign(call, await resume(await call.begin(), call.app, campaign))

    async def WatchCampaign(  # type: ignore[override]
        self, request: campaigns_pb2.WatchCampaignRequest, call: Call
    ) -> AsyncIterator[campaigns_pb2.Campaign]:
        last = None
        while not self._stopping.is_set():
            campaign = await find(call, request.name)
            message = await self._to_counted(call, campaign)
            is_over = campaign.state in ("SENT", "CANCELED", "FAILED") and not await has_units(
                await call.begin(), campaign.campaign_id
            )
            await call.commit()
            if message != last:
                yield message
            if is_over:
                return
            last = message
            await rest(self._stopping, WATCH_SECONDS)
        raise ServerStopping

    async def SendTest(  # type: ignore[override]
        self, request: campaigns_pb2.SendTestRequest, call: Call
    ) -> campaigns_pb2.SendTestResponse:
        external_id = read_name(call, request.contact, "contacts", "contact")
        # What took a request_id holds its connection until the provider has answered, so that two at once send one test.
        async with self._tests if call.has_request_id else nullcontext():
            campaign = await find(call, request.name)
            if not call.has_request_id:
                await call.commit()
            trial = await send_test(*(call.engine, self._ledger, self._registry, self._context, call.app, campaign, external_id))
        return campaigns_pb2.SendTestResponse(
            content=to_struct(trial.content),
            outcomes=[_to_outcome(outcome, reason_class) for outcome, reason_class in trial.outcomes],
            estimate=_to_estimate(trial.bill) if trial.bill else None,
        )

    async def ListRecipients(  # type: ignore[override]
        self, request: campaigns_pb2.ListRecipientsRequest, call: Call
    ) -> campaigns_pb2.ListRecipientsResponse:
        campaign = await find(call, request.parent, field="parent")
        size = size_page(request.page_size)
        question = f"{request.parent}/recipients"
        start = read_page_token(request.page_token, question, int) or 0
        people = await list_recipients(
            await call.begin(), campaign, self._registry.types.get(campaign.channel), start, start + size
        )
        return campaigns_pb2.ListRecipientsResponse(
            recipients=[_to_recipient(call, person) for person in people],
            next_page_token=make_page_token(question, start + size) if start + size < campaign.recipients else "",
        )

    async def ExportRecipients(  # type: ignore[override]
        self, request: campaigns_pb2.ExportRecipientsRequest, call: Call
    ) -> AsyncIterator[campaigns_pb2.ExportRecipientsResponse]:
        name, given = read_name(call, request.parent, "campaigns", "parent"), request.filter
        wanted = Wanted(given.signal, given.reason, given.action, given.apart, given.pending)
        pages = begin_export(f"{request.parent} {wanted}", request.resume_token)
        async with snapshot(call.engine) as (conn, as_of_time):
            campaign = await store.find_campaign(conn, call.app.app_id, name)
            if campaign is None:
                raise NotFound(request.parent)
            channel = self._registry.types.get(campaign.channel)
            group = await find_group(conn, self._copies, campaign, channel, wanted, "filter")
        total = count_bits(group.positions)
        for positions, token in pages(group.positions):
            async with transaction(call.engine) as conn:
                people = await group.read(conn, positions)
            yield campaigns_pb2.ExportRecipientsResponse(
                recipients=[_to_recipient(call, person) for person in people],
                total_count=total,
                as_of_time=to_timestamp(as_of_time),
                resume_token=token,
            )

    async def _to_counted(self, call: Call, campaign: store.Campaign) -> campaigns_pb2.Campaign:
        message = await to_campaign(call, campaign)
        if campaign.launch_time:
            counted = await count_campaign(await call.begin(), self._copies, campaign, self._registry.types.get(campaign.channel))
            message.counts.recipients = campaign.recipients
            message.counts.unclear = counted.unclear
            message.counts.signals.update(counted.signals)
            for kind, count in counted.reasons:
                message.counts.reasons.add(
                    signal=kind.signal, reason_class=kind.reason_class, reason_code=kind.reason_code, count=count
                )
        return message

    async def _prepare_audience(
        self, call: Call, given: campaigns_pb2.Campaign, found: ChannelType, draft: store.Campaign | None = None
    ) -> Prepared:
        """The audience of a message; an empty one is stored as none."""
        if not given.HasField("audience"):
            return Prepared({"audience": None, "root_id": None, "recipients": 0}, None)
        prepare = partial(
            prepare_audience,
            copies=self._copies,
            app=call.app,
            channels=self._registry.types,
            audience=read_audience(call, given.audience),
            path="campaign.audience",
            channel=found.name,
            draft=draft,
        )
        if given.audience.evaluation != campaigns_pb2.Audience.AT_CREATION:
            return await prepare(await call.begin())
        async with snapshot(call.engine) as (conn, as_of_time):
            return await prepare(conn, as_of_time=as_of_time)


def _read_parts(given: campaigns_pb2.Campaign, found: ChannelType, paths: tuple[str, ...]) -> dict[str, Any]:
    """Content and tracking as they are stored, as far as the paths name them; an empty content is stored as none."""
    values: dict[str, Any] = {}
    if "content" in paths:
        values["content"] = read_content(found, given.content, "campaign.content") if given.HasField("content") else None
    if "track_links" in paths:
        values["track_links"] = given.track_links or not given.HasField("track_links")
    return values


async def _hold_list(call: Call, given: campaigns_pb2.Campaign) -> None:
    """Have the list of an audience stay until the call is committed.

    Raises:
        NotFound: it is gone.
    """
    if given.audience.WhichOneof("kind") == "list":
        name = read_name(call, given.audience.list, "lists", "campaign.audience.list")
        if not await find_list(await call.begin(), call.app.app_id, name, hold=True):
            raise NotFound(given.audience.list)


async def _find_awaited(call: Call, follow_up: store.Campaign, path: str) -> store.Campaign:
    """The campaign that a follow-up waits for.

    Raises:
        FieldsInvalid: it was deleted; the path is to what cannot be changed any more.
    """
    assert follow_up.source_id is not None, "it is a follow-up"
    source = await store.read_campaign(await call.begin(), follow_up.source_id)
    if source is None:
        raise FieldsInvalid([Violation(path, "cannot be changed: the source was deleted, so the follow-up is skipped")])
    return source


async def _check_source_kept(call: Call, given: campaigns_pb2.Campaign, follow_up: store.Campaign) -> None:
    """Raise ``FieldsInvalid`` unless the audience that a follow-up is to get asks the campaign that it waits for alone."""
    source = await _find_awaited(call, follow_up, "campaign.audience")
    audience = read_audience(call, given.audience)
    asked = list_questions(audience) if isinstance(audience, Question | Combination) else ()
    if {question.source for question, _ in asked} != {source.campaign}:
        name = f"{call.app.name}/campaigns/{source.campaign}"
        text = f"must ask {name} alone, which the follow-up waits for; UnscheduleCampaign makes a draft that can have any"
        raise FieldsInvalid([Violation("campaign.audience", text)])


async def _plan_delay(call: Call, given: campaigns_pb2.Campaign, follow_up: store.Campaign) -> Wait:
    """What a follow-up waits for once it has another delay.

    Raises:
        FieldsInvalid, or what ``plan_delay`` raises.
    """
    path = f"campaign.{_DELAY}"
    delay = read_delay(given.follow_up, "delay", path)
    if delay is None:
        raise FieldsInvalid([Violation(path, "is required of a follow-up; UnscheduleCampaign makes a draft of it")])
    wait = plan_delay(call.app, await _find_awaited(call, follow_up, path), delay, path)
    if follow_up.send_by_time is not None and follow_up.send_by_time <= wait.earliest:
        raise FieldsInvalid([Violation(path, "would be over after send_by_time")])
    return wait


async def create_draft(call: Call, campaign_id: str, values: Mapping[str, Any], roll: Numbers | None = None) -> store.Campaign:
    """Make a draft under the chosen id, or one of ours, with the people of an audience that is frozen."""
    conn = await call.begin()
    try:
        campaign = await store.create_campaign(conn, call.app.app_id, campaign_id or make_campaign_id(), values)
    except AlreadyExists as error:
        raise AlreadyExists(f"{call.app.name}/{error.metadata['resource']}") from error
    if roll is not None:
        await write_roll(conn, campaign.campaign_id, roll)
    return campaign


async def find(call: Call, name: str, *, field: str = "name", lock: bool = False) -> store.Campaign:
    """The campaign of this resource name.

    Raises:
        FieldsInvalid, NotFound.
    """
    campaign = await store.find_campaign(
        await call.begin(), call.app.app_id, read_name(call, name, "campaigns", field), lock=lock
    )
    if campaign is None:
        raise NotFound(name)
    return campaign


def _read_filter(call: Call, wanted: campaigns_pb2.CampaignFilter) -> store.CampaignFilter:
    return store.CampaignFilter(
        state=campaigns_pb2.Campaign.State.Name(wanted.state) if wanted.state else None,
        channel=wanted.channel or None,
        root=read_name(call, wanted.root, "campaigns", "filter.root") if wanted.root else None,
        text=wanted.text or None,
    )


def _check_etag(name: str, campaign: store.Campaign, etag: str) -> None:
    if etag and etag != str(campaign.version):
        raise EtagMismatch(name)


def _read_mask(request: campaigns_pb2.UpdateCampaignRequest) -> tuple[str, ...]:
    """The fields to change (AIP-134): those that are set without a mask, all with "*"."""
    paths = tuple(request.update_mask.paths)
    if not paths:
        paths = tuple(field.name for field, _ in request.campaign.ListFields())
        return tuple(path for path in map(_name_change, paths) if path in (*_CHANGEABLE, "channel"))
    if "*" in paths:
        return (*_CHANGEABLE, "channel") if request.campaign.channel else _CHANGEABLE
    known = campaigns_pb2.Campaign.DESCRIPTOR.fields_by_name
    unknown = [path for path in paths if path not in known and path not in (_DELAY, "follow_up.source")]
    if unknown:
        raise FieldsInvalid(
            Violation("update_mask", f"{path!r} is not a field that can be named; name one of {', '.join(_CHANGEABLE)}")
            for path in unknown
        )
    return tuple(map(_name_change, paths))


def _name_change(path: str) -> str:
    """What can be changed at a path."""
    return _DELAY if path == "follow_up" else path


def read_content(found: ChannelType, given: Struct, path: str) -> dict[str, Any]:
    """A content as it is stored, when the channel takes it; ``path`` leads to it, for errors."""
    # First, so that nobody has us parse megabytes of Liquid.
    if given.ByteSize() > _LARGEST_CONTENT:
        raise FieldsInvalid([Violation(path, f"is larger than {_LARGEST_CONTENT} bytes")])
    content: dict[str, Any] = json_format.MessageToDict(given)
    violations = [Violation(place, text) for place, text in find_template_errors(content, path)]
    try:
        found.channel.content_model.model_validate(content)
    except ValidationError as error:
        violations += [
            Violation(".".join([path, *map(str, fault["loc"])]), fault["msg"])
            for fault in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    if violations:
        raise FieldsInvalid(violations)
    return content


def read_audience(call: Call, audience: campaigns_pb2.Audience) -> Audience:
    """The audience of a message, names checked to be of the caller's app."""
    match audience.WhichOneof("kind"):
        case "given_contacts":
            names = audience.given_contacts.contacts
            field = "campaign.audience.given_contacts.contacts"
            ids = [read_name(call, name, "contacts", f"{field}[{index}]") for index, name in enumerate(names)]
            return GivenContacts(tuple(dict.fromkeys(ids)))
        case "retarget":
            return read_selection(call, audience.retarget, "campaign.audience.retarget")
        case "list":
            return ListMembers(read_name(call, audience.list, "lists", "campaign.audience.list"))
        case _:
            return AllSubscribers()


async def to_campaign(
    call: Call, campaign: store.Campaign, known: Mapping[int, store.Campaign] | None = None
) -> campaigns_pb2.Campaign:
    """A campaign as a message, without its counts.

    Args:
        known: every campaign that it names, by number, where they were read for many at once.
    """
    named = [number for number in (campaign.root_id, campaign.source_id) if number is not None]
    if known is None:
        known = await store.read_campaigns(await call.begin(), named) if named else {}
    message = campaigns_pb2.Campaign(
        name=f"{call.app.name}/campaigns/{campaign.campaign}",
        display_name=campaign.display_name,
        channel=campaign.channel,
        state=campaigns_pb2.Campaign.State.Value(campaign.state),
        state_reason=campaign.state_reason,
        etag=str(campaign.version),
        messages_per_second=campaign.messages_per_second,
        transactional=campaign.transactional,
        track_links=campaign.track_links,
        links=campaign.links,
        create_time=to_timestamp(campaign.create_time),
        update_time=to_timestamp(campaign.update_time),
        schedule_time=to_timestamp(campaign.schedule_time),
        send_by_time=to_timestamp(campaign.send_by_time),
        launch_time=to_timestamp(campaign.launch_time),
        finish_time=to_timestamp(campaign.finish_time),
        holdout_percent=campaign.holdout_percent,
        holdout_count=campaign.holdout_count,
    )
    if campaign.content is not None:
        message.content.CopyFrom(to_struct(campaign.content))
    if campaign.audience is not None:
        message.audience.CopyFrom(_to_audience(call, campaign.audience))
    if campaign.root_id is not None and (root := known.get(campaign.root_id)):
        message.root = f"{call.app.name}/campaigns/{root.campaign}"
    if campaign.source_id is not None and campaign.delay_seconds is not None:
        message.follow_up.delay.seconds = campaign.delay_seconds
        if source := known.get(campaign.source_id):
            message.follow_up.source = f"{call.app.name}/campaigns/{source.campaign}"
    return message


def _to_recipient(call: Call, person: Recipient) -> campaigns_pb2.Recipient:
    return campaigns_pb2.Recipient(
        contact=f"{call.app.name}/contacts/{person.external_id}" if person.external_id else "",
        signals=person.signals,
        reasons=person.reasons,
    )


def _to_estimate(bill: Bill) -> campaigns_pb2.Estimate:
    return campaigns_pb2.Estimate(
        messages=bill.messages,
        units=bill.units,
        unit=bill.unit,
        cost="" if bill.cost is None else f"{bill.cost:.2f}",
        currency=bill.currency if bill.cost is not None else "",
        sampled=bill.sampled,
    )


def _to_outcome(outcome: Outcome, reason_class: ReasonClass | None) -> campaigns_pb2.SendTestResponse.Outcome:
    results = campaigns_pb2.SendTestResponse.Result
    match outcome:
        case Accepted():
            return campaigns_pb2.SendTestResponse.Outcome(result=results.ACCEPTED, message_id=outcome.message_id)
        case Unclear():
            return campaigns_pb2.SendTestResponse.Outcome(result=results.UNCLEAR, reason_code=outcome.detail)
        case _:
            return campaigns_pb2.SendTestResponse.Outcome(
                result=results.REFUSED, reason_code=outcome.code, reason_class=reason_class or ""
            )


def _to_audience(call: Call, stored: Mapping[str, Any]) -> campaigns_pb2.Audience:
    message = _to_kind(call, decode_audience(stored))
    if (frozen := decode_frozen(stored)) is not None:
        message.evaluation = campaigns_pb2.Audience.AT_CREATION
        message.frozen.as_of_time.FromDatetime(frozen.as_of_time)
        message.frozen.count, message.frozen.checksum = frozen.count, frozen.checksum
    return message


def _to_kind(call: Call, audience: Audience) -> campaigns_pb2.Audience:
    match audience:
        case AllSubscribers():
            return campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
        case GivenContacts():
            names = [f"{call.app.name}/contacts/{external_id}" for external_id in audience.external_ids]
            return campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=names))
        case ListMembers():
            return campaigns_pb2.Audience(list=f"{call.app.name}/lists/{audience.list}")
        case _:
            return campaigns_pb2.Audience(retarget=to_selection(call, audience))
