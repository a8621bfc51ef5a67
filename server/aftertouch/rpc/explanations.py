"""Explanations and histories of people, as messages."""

from __future__ import annotations

from datetime import datetime

from aftertouch.retargeting.explanations import Explanation
from aftertouch.retargeting.history import Participation
from aftertouch.rpc.interceptor import Call
from aftertouch.rpc.values import to_timestamp
from aftertouch.v1 import contacts_pb2

_Explanation = contacts_pb2.ContactExplanation


def to_contact_campaign(call: Call, participation: Participation) -> contacts_pb2.ContactCampaign:
    """A campaign of a person as a message."""
    campaign = participation.campaign
    return contacts_pb2.ContactCampaign(
        campaign=f"{call.app.name}/campaigns/{campaign.campaign}",
        display_name=campaign.display_name,
        channel=campaign.channel,
        launch_time=to_timestamp(campaign.launch_time),
        signals=participation.known.signals,
        reasons=participation.known.reasons,
    )


def to_explanation(call: Call, contact: str, explanation: Explanation, as_of_time: datetime) -> contacts_pb2.ContactExplanation:
    """An explanation as a message; ``contact`` is the person's resource name."""
    findings = explanation.findings
    message = _Explanation(
        contact=contact,
        campaign=f"{call.app.name}/campaigns/{explanation.campaign.campaign}",
        decision=_Explanation.Decision.Value(explanation.decision),
        text=explanation.text,
        signals=findings.known.signals,
        reasons=findings.known.reasons,
        events_incomplete=findings.events_incomplete,
        as_of_time=to_timestamp(as_of_time),
    )
    for step in explanation.steps:
        message.steps.add(check=_Explanation.Check.Value(step.check), passed=step.passed, text=step.text)
    for truth in findings.actions:
        message.actions.add(
            action=truth.action.name,
            display_name=truth.action.label,
            expression=truth.action.expression,
            matches=truth.matches,
            is_apart=truth.is_apart,
        )
    for kind, event in findings.events:
        message.events.add(
            signal=kind.signal,
            reason=kind.reason or kind.reason_code,
            time=to_timestamp(event.time),
            arrive_time=to_timestamp(event.arrive_time),
        )
    for kind, attempt in findings.attempts:
        message.attempts.add(
            outcome=kind.signal,
            reason=kind.reason,
            message_id=attempt.message_id,
            arrive_time=to_timestamp(attempt.arrive_time),
        )
    return message
