"""The retarget dialog: who, where, when, and one press that makes the draft."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from markupsafe import Markup
from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.campaigns import Standing, State, name_links, read_plain, retargetable_until
from aftertouch.console.plans import CHOICES, Plan
from aftertouch.console.visits import Visit, name_faults, read_id, to_time
from aftertouch.errors import FieldsInvalid, ScheduleTooLate, Violation
from aftertouch.store.engine import transaction
from aftertouch.store.unfinished import keep_unfinished
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
    people: str
    """The address of its people as CSV, to which a group is added."""

    @property
    def drops(self) -> list[tuple[str, str, int]]:
        """Who is not reached: the reason, in words too, and how many."""
        names = [(_Reason.Name(drop.reason), drop.count) for drop in self.preview.drops if drop.count]
        return [(name, words.DROPS.get(name, name.lower()), count) for name, count in names]


@dataclass(frozen=True)
class Choice:
    """Who, where and when, as the address or the form has it."""

    source: Standing
    fields: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field; empty when there is none."""
        return str(self.fields.get(name, ""))

    @property
    def selection(self) -> campaigns_pb2.RetargetSelection:
        """The people."""
        reason_class, reason_code = self.text("reason_class"), self.text("reason_code")
        return campaigns_pb2.RetargetSelection(
            source=self.source.message.name,
            action=self.text("action"),
            include_apart=self.text("apart") == "1",
            leave_out_pending=self.text("heard") == "1",
            reason_classes=[reason_class] if reason_class else [],
            reason_codes=[reason_code] if reason_code else [],
        )

    @property
    def plan(self) -> Plan:
        """When."""
        return Plan.read(self.fields)


async def show(visit: Visit) -> Response:
    """The dialog, or as a page of its own; every choice shows its counts at once."""
    return await _render(visit, Choice(await read_plain(visit), visit.request.query_params))


async def _render(visit: Visit, choice: Choice, *, violations: Sequence[Violation] = (), existing: str = "") -> Response:
    """The dialog.

    Args:
        existing: the draft that somebody made of the same people and channel already.
    """
    source, channel, plan = choice.source, choice.text("channel"), choice.plan
    matrix = await visit.client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=source.message.name))
    row = next((row for row in matrix.rows if row.action_count.action.action == choice.text("action")), matrix.rows[0])
    kind = visit.console.registry.types.get(source.message.channel)
    reasoned = kind.actions[row.action_count.action.action].reasoned if kind else None
    reason_code = choice.text("reason_code") if reasoned == "clicked" else ""
    reached = {cell.channel: cell.reachable_count for cell in row.cells}
    places = [Place(name, found.channel.label, is_ready, reached[name]) for name, found, is_ready in await visit.list_channels()]
    by_name = {place.channel: place for place in places}
    return visit.render(
        "retarget_part.html" if visit.is_partial else "retarget.html",
        409 if existing else 400 if violations else 200,
        campaign=source,
        problem=" ".join(found.description for found in violations),
        faults=name_faults([*plan.violations, *violations]),
        existing=existing,
        recipients=matrix.recipients,
        actions=[row.action_count for row in matrix.rows],
        action=row.action_count,
        include_apart=choice.text("apart") == "1",
        leave_out_pending=choice.text("heard") == "1",
        plan=plan,
        last_time=retargetable_until(visit, source),
        places=places,
        # The same channel first: nothing about these people's addresses is a guess there.
        place=by_name.get(channel) or by_name.get(source.message.channel) or places[0],
        # Only who failed has a reason to be narrowed to, and only who clicked a link.
        reason_class=choice.text("reason_class") if reasoned == "failed" else "",
        reason_code=reason_code,
        link=name_links(source.message.links).get(reason_code, reason_code),
        request_id=str(uuid.uuid4()),
    )


async def show_funnel(visit: Visit) -> Response:
    """What becomes of the chosen people on the chosen channel: the dialog's lower part, which comes after the rest."""
    choice = Choice(await read_plain(visit), visit.request.query_params)
    people = f"/campaigns/{choice.source.id}/retarget/people.csv?{visit.request.url.query}&"
    funnel = await read_funnel(visit, choice.source, choice.selection, choice.text("channel"), people)
    # Of a campaign that is still being sent there will be more.
    is_empty = not funnel.preview.audience_count and choice.source.message.state not in (State.SENDING, State.PAUSED)
    return visit.render("retarget_funnel.html", funnel=funnel, is_empty=is_empty)


async def read_funnel(
    visit: Visit, source: Standing, selection: campaigns_pb2.RetargetSelection, channel: str, people: str
) -> Funnel:
    """Who of a selection is reached on a channel, and what matters before that; ``people`` is where they are exported."""
    request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel=channel)
    preview = await visit.client.retargeting.PreviewRetarget(request)
    return Funnel(preview, _list_warnings(visit, source, preview), people)


def _list_warnings(visit: Visit, source: Standing, preview: retargeting_pb2.PreviewRetargetResponse) -> list[Markup]:
    """What matters before somebody retargets."""
    warnings = []
    for drop in preview.drops:
        if drop.reason == _Reason.HELD and drop.count:
            text = Markup(
                "The provider holds back {} here, until {} at the latest. They are reached on another channel, or later."
            )
            latest = words.show_time(to_time(drop.latest_end_time))
            warnings.append(text.format(words.count_people(drop.count), latest))
    if source.message.state == State.SENDING:
        warnings.append(Markup("This campaign is still being sent, so these numbers will change."))
    for early in preview.unsettled:
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
    choice = Choice(await read_plain(visit), await visit.read_form())
    source, plan = choice.source, choice.plan
    request = retargeting_pb2.CreateRetargetRequest(
        selection=choice.selection,
        channel=choice.text("channel"),
        request_id=choice.text("request_id"),
        allow_duplicate=choice.text("again") == "1",
    )
    try:
        # It is refused at the launch as well; here somebody still sees what it depends on.
        last_time, time = retargetable_until(visit, source), plan.find_time(source.finish_time or datetime.now(UTC))
        if last_time and time and time > last_time:
            raise ScheduleTooLate(source.message.name, visit.app.retention_days, time, last_time)
        made = await visit.client.retargeting.CreateRetarget(request)
    except FieldsInvalid as error:
        return await _render(visit, choice, violations=error.violations)
    except ScheduleTooLate as error:
        return await _render(visit, choice, violations=[Violation(CHOICES[plan.when][0], words.explain(error))])
    if made.existing:
        return await _render(visit, choice, existing=read_id(made.name))
    if plan != Plan():
        async with transaction(visit.console.engine) as conn:
            await keep_unfinished(conn, visit.app.app_id, read_id(made.name), None, plan.store())
    return visit.redirect(f"/campaigns/{read_id(made.name)}/edit")
