"""The retarget dialog: who, where, and one press that makes the draft."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from markupsafe import Markup
from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.campaigns import Standing, State, read_plain, retargetable_until
from aftertouch.console.visits import Visit, read_id, to_time
from aftertouch.errors import AftertouchError
from aftertouch.v1 import campaigns_pb2, retargeting_pb2

_MINUTES = 60
_Reason = retargeting_pb2.PreviewRetargetResponse.Reason


@dataclass(frozen=True)
class Place:
    """A channel, and how many of the chosen people it reaches."""

    channel: str
    label: str
    is_ready: bool
    reachable: int


@dataclass(frozen=True)
class Funnel:
    """What becomes of the chosen people on the chosen channel."""

    preview: retargeting_pb2.PreviewRetargetResponse
    warnings: Sequence[Markup]

    @property
    def drops(self) -> list[tuple[str, int]]:
        """Who is not reached, and why."""
        names = [(_Reason.Name(drop.reason), drop.count) for drop in self.preview.drops if drop.count]
        return [(words.DROPS.get(name, name.lower()), count) for name, count in names]


def _select(visit: Visit, source: Standing) -> campaigns_pb2.RetargetSelection:
    """The people whom the address or the form names."""
    reason_class = visit.query("reason_class")
    return campaigns_pb2.RetargetSelection(
        source=source.message.name,
        action=visit.query("action"),
        include_apart=visit.query("apart") == "1",
        reason_classes=[reason_class] if reason_class else [],
    )


async def show(visit: Visit) -> Response:
    """The dialog, or as a page of its own; every choice shows its counts at once."""
    source = await read_plain(visit)
    return await _render(visit, source, visit.query("action"), visit.query("channel"), visit.query("apart") == "1")


async def _render(
    visit: Visit, source: Standing, action: str, channel: str, include_apart: bool, *, problem: str = "", existing: str = ""
) -> Response:
    """The dialog.

    Args:
        existing: the draft that somebody made of the same people and channel already.
    """
    template = "retarget_part.html" if visit.is_partial else "retarget.html"
    try:
        matrix = await visit.client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=source.message.name))
    except AftertouchError as error:
        return visit.render(template, words.STATUSES[error.code], campaign=source, refusal=words.explain(error))
    row = next((row for row in matrix.rows if row.action_count.action.action == action), matrix.rows[0])
    registry = visit.console.registry
    reached = {cell.channel: cell.reachable_count for cell in row.cells}
    places = [Place(name, found.channel.label, name in registry.channels, reached[name]) for name, found in visit.list_channels()]
    by_name = {place.channel: place for place in places}
    return visit.render(
        template,
        409 if existing else 400 if problem else 200,
        campaign=source,
        refusal="",
        problem=problem,
        existing=existing,
        recipients=matrix.recipients,
        actions=[row.action_count for row in matrix.rows],
        action=row.action_count,
        include_apart=include_apart,
        places=places,
        # The same channel first: nothing about these people's addresses is a guess there.
        place=by_name.get(channel) or by_name.get(source.message.channel) or places[0],
        reason_class=visit.query("reason_class"),
        request_id=str(uuid.uuid4()),
    )


async def show_funnel(visit: Visit) -> Response:
    """What becomes of the chosen people on the chosen channel: the dialog's lower part, which comes after the rest."""
    source = await read_plain(visit)
    return visit.render(
        "retarget_funnel.html", funnel=await read_funnel(visit, source, _select(visit, source), visit.query("channel"))
    )


async def read_funnel(visit: Visit, source: Standing, selection: campaigns_pb2.RetargetSelection, channel: str) -> Funnel:
    """Who of a selection is reached on a channel, and what matters before that."""
    request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel=channel)
    preview = await visit.client.retargeting.PreviewRetarget(request)
    return Funnel(preview, _list_warnings(visit, source, preview.unsettled))


def _list_warnings(visit: Visit, source: Standing, unsettled: Iterable[campaigns_pb2.Unsettled]) -> list[Markup]:
    """What matters before somebody retargets."""
    warnings = []
    if source.message.state == State.SENDING:
        warnings.append(Markup("This campaign is still being sent, so these numbers will change."))
    for early in unsettled:
        minutes = early.delay.seconds // _MINUTES
        after = f"{minutes} minutes" if minutes < 180 else f"{round(minutes / _MINUTES)} hours"
        text = Markup("Some may still answer: 95 of 100 do within {} ({}). From {} on these numbers hardly change.")
        warnings.append(text.format(after, early.signal, words.show_time(to_time(early.settle_time))))
    last_time = retargetable_until(visit, source)
    if last_time and (left := last_time - datetime.now(UTC)) < timedelta(days=3):
        hours = max(int(left.total_seconds() // 3600), 0)
        text = Markup("What people did is kept for {} more hours. Launch the follow-up before then.")
        warnings.append(text.format(hours))
    return warnings


async def create(visit: Visit) -> Response:
    """Make the draft and go on with its content."""
    form = await visit.read_form()
    source = await read_plain(visit)
    action, channel, include_apart = str(form.get("action", "")), str(form.get("channel", "")), form.get("apart") == "1"
    reason_class = str(form.get("reason_class", ""))
    request = retargeting_pb2.CreateRetargetRequest(
        selection=campaigns_pb2.RetargetSelection(
            source=source.message.name,
            action=action,
            include_apart=include_apart,
            reason_classes=[reason_class] if reason_class else [],
        ),
        channel=channel,
        request_id=str(form.get("request_id", "")),
        allow_duplicate=form.get("again") == "1",
    )
    try:
        made = await visit.client.retargeting.CreateRetarget(request)
    except AftertouchError as error:
        if error.reason == "FIELDS_INVALID":
            return await _render(visit, source, action, channel, include_apart, problem=str(error))
        raise
    if made.existing:
        return await _render(visit, source, action, channel, include_apart, existing=read_id(made.name))
    return visit.redirect(f"/campaigns/{read_id(made.name)}/edit")
