"""Retarget selections as messages: read with every name checked, and written back; and where they were asked too early."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from aftertouch.errors import FieldsInvalid, SelectionUnsettled, Violation
from aftertouch.retargeting.selections import DEEPEST, MOST_QUESTIONS, Combination, Question, Selection, list_questions
from aftertouch.retargeting.settling import Unsettled
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.names import read_name
from aftertouch.rpc.values import to_timestamp
from aftertouch.v1 import campaigns_pb2

_QUESTION_FIELDS = ("source", "action", "reason_codes", "reason_classes", "include_apart", "leave_out_pending")


def read_selection(call: Call, message: campaigns_pb2.RetargetSelection, path: str) -> Selection:
    """The selection of a message.

    Raises:
        FieldsInvalid, or NotFound for a campaign of another app.
    """
    if faults := list(_find_faults(message, path, 1)):
        raise FieldsInvalid(faults)
    selection = _read(call, message, path)
    if (count := sum(1 for _ in list_questions(selection))) > MOST_QUESTIONS:
        raise FieldsInvalid([Violation(path, f"has {count} actions, more than {MOST_QUESTIONS}")])
    return selection


def _list_operands(message: campaigns_pb2.RetargetSelection) -> list[tuple[str, campaigns_pb2.RetargetSelection]]:
    """What a combination combines, each with its path from the selection; nothing for a question."""
    operator = message.WhichOneof("combination")
    if operator is None:
        return []
    if operator == "all_but":
        return [("all_but.all", message.all_but.all), ("all_but.but", message.all_but.but)]
    operands = getattr(message, operator).selections
    return [(f"{operator}.selections[{index}]", operand) for index, operand in enumerate(operands)]


def _find_faults(message: campaigns_pb2.RetargetSelection, path: str, depth: int) -> Iterator[Violation]:
    if depth > DEEPEST:
        yield Violation(path, f"is combined more than {DEEPEST} deep")
        return
    operator = message.WhichOneof("combination")
    if operator is None:
        for field in ("source", "action"):
            if not getattr(message, field):
                yield Violation(f"{path}.{field}", "is required, unless the selection is any_of, all_of or all_but")
        if message.source and message.source.split("/")[2:3] not in ([], ["campaigns"]):
            yield Violation(
                f"{path}.source", "must be a campaign: a retarget selection asks campaigns only, and mixes with no other audience"
            )
        return
    for field in _QUESTION_FIELDS:
        if getattr(message, field):
            yield Violation(f"{path}.{field}", f"cannot stand beside {operator}: a selection is one action or one combination")
    for place, operand in _list_operands(message):
        yield from _find_faults(operand, f"{path}.{place}", depth + 1)


def _read(call: Call, message: campaigns_pb2.RetargetSelection, path: str) -> Selection:
    match message.WhichOneof("combination"):
        case "any_of" | "all_of" | "all_but" as operator:
            operands = tuple(_read(call, operand, f"{path}.{place}") for place, operand in _list_operands(message))
            return Combination(operator, operands)
        case _:
            return Question(
                source=read_name(call, message.source, "campaigns", f"{path}.source"),
                action=message.action,
                reason_codes=tuple(message.reason_codes),
                reason_classes=tuple(message.reason_classes),
                include_apart=message.include_apart,
                leave_out_pending=message.leave_out_pending,
            )


def to_selection(call: Call, selection: Selection) -> campaigns_pb2.RetargetSelection:
    """A selection as a message."""
    if isinstance(selection, Question):
        return campaigns_pb2.RetargetSelection(
            source=f"{call.app.name}/campaigns/{selection.source}",
            action=selection.action,
            reason_codes=selection.reason_codes,
            reason_classes=selection.reason_classes,
            include_apart=selection.include_apart,
            leave_out_pending=selection.leave_out_pending,
        )
    operands = [to_selection(call, operand) for operand in selection.operands]
    match selection.operator:
        case "any_of":
            return campaigns_pb2.RetargetSelection(any_of=campaigns_pb2.RetargetSelections(selections=operands))
        case "all_of":
            return campaigns_pb2.RetargetSelection(all_of=campaigns_pb2.RetargetSelections(selections=operands))
        case "all_but":
            all_but = campaigns_pb2.RetargetSelection.AllBut(all=operands[0], but=operands[1])
            return campaigns_pb2.RetargetSelection(all_but=all_but)


def check_settled(call: Call, unsettled: Sequence[Unsettled], *, is_required: bool) -> None:
    """Raise ``SelectionUnsettled`` where nothing unsettled is wanted."""
    if is_required and unsettled:
        worst = max(unsettled, key=lambda found: found.settle_time)
        raise SelectionUnsettled(
            f"{call.app.name}/campaigns/{worst.source.campaign}",
            worst.signal,
            worst.delay,
            worst.measured_events,
            worst.settle_time,
        )


def to_unsettled(call: Call, unsettled: Sequence[Unsettled]) -> list[campaigns_pb2.Unsettled]:
    """What was asked too early, as messages."""
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
