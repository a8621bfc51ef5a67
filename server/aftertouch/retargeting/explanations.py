"""Explanations: why one person was, or was not, messaged, from the same receipts and rules that decided it.

Nothing is written down for this. Whoever is on a roll was in the audience when it was evaluated, and the receipts say what
became of them; whoever is not is asked again, by what is true now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.channels import Action
from aftertouch.declarations import ChannelType, CompiledAction
from aftertouch.errors import AftertouchError
from aftertouch.retargeting.audiences import (
    AllSubscribers,
    Audience,
    GivenContacts,
    ListMembers,
    decode_audience,
    decode_frozen,
)
from aftertouch.retargeting.history import Known, find_evidence, weigh_kinds
from aftertouch.retargeting.holdouts import find_held_out, find_shares
from aftertouch.retargeting.matching import find_pending
from aftertouch.retargeting.selections import (
    Combination,
    Question,
    Selection,
    find_root,
    find_sources,
    list_questions,
    root_of,
)
from aftertouch.rolls.chunks import count_chunks, find_members, holdout_of
from aftertouch.rolls.sql import read_sets
from aftertouch.signals import Expression
from aftertouch.store.apps import App
from aftertouch.store.campaigns import Campaign, find_campaign, find_campaigns, list_open_waves, list_waves_at
from aftertouch.store.contacts import STANDINGS, Contact
from aftertouch.store.kinds import Kind, load_kinds
from aftertouch.store.lists import find_list
from aftertouch.store.paces import read_full_until
from aftertouch.store.recipients import Logged, Place, Tried, find_places, read_logged, read_tried, read_true_kinds

LONGEST_LOOK = timedelta(seconds=3)
"""Into the event log, for one explanation."""
EARLIEST = timedelta(minutes=5)
"""How long before the launch an event may have arrived: clocks differ."""

_REFUSALS = frozenset({"FAILED_PRECONDITION", "NOT_FOUND", "INVALID_ARGUMENT"})
"""What ``find_sources`` says of a wave that cannot be launched: also one whose source's plugin is gone, or has no such action."""
_NOTHING = weigh_kinds((), {})
_HELD_OUT = "is held out of the chain, so that messaging can be compared with not messaging"


@dataclass(frozen=True)
class Step:
    """Something that an audience asks for."""

    check: str
    """A name of ``ContactExplanation.Check``."""
    passed: bool
    text: str


@dataclass(frozen=True)
class ActionTruth:
    """An action, and whether it is true of the person."""

    action: Action
    matches: bool
    is_apart: bool


@dataclass(frozen=True)
class Findings:
    """What is known of a person in a campaign, with everything that the logs have."""

    known: Known = _NOTHING
    actions: Sequence[ActionTruth] = ()
    events: Sequence[tuple[Kind, Logged]] = ()
    events_incomplete: bool = False
    attempts: Sequence[tuple[Kind, Tried]] = ()


@dataclass(frozen=True)
class Explanation:
    """Why a person was, or was not, messaged."""

    campaign: Campaign
    decision: str
    """A name of ``ContactExplanation.Decision``."""
    text: str
    steps: Sequence[Step] = ()
    findings: Findings = field(default_factory=Findings)


async def explain_campaign(
    conn: AsyncConnection,
    app: App,
    channels: Mapping[str, ChannelType],
    campaign: Campaign,
    contact: Contact,
    look: timedelta = LONGEST_LOOK,
) -> Explanation:
    """Why this person was, or was not, messaged by a campaign, or would be if it were launched now.

    Args:
        look: how long to look into the event log at the most.

    Raises:
        what ``find_sources`` raises, for a wave that is not launched yet.
    """
    audience = decode_audience(campaign.audience) if campaign.audience else None
    if campaign.launch_time is None:
        if campaign.state in ("CANCELED", "FAILED"):
            reason = f": {campaign.state_reason}" if campaign.state_reason else ""
            text = f"Not messaged: the campaign is {campaign.state}, and was never launched{reason}."
            return Explanation(campaign, "WOULD_NOT_BE_MESSAGED", text)
        roots, asked = await _find_chains(conn, app, audience)
        if isinstance(audience, Question | Combination):
            await find_sources(conn, app, channels, audience, "audience.retarget")
        waves: list[Campaign] = []
        if campaign.audience and (frozen := decode_frozen(campaign.audience)):
            is_in = bool(await find_places(conn, contact.number, [campaign.campaign_id]))
            text = f"is {'' if is_in else 'not '}one of {frozen.count:,} people as of {_tell(frozen.as_of_time)}"
            steps = [Step("IN_AUDIENCE", is_in, text), _ask_standing(contact, campaign.channel)]
        else:
            steps = await _ask_audience(conn, app, channels, audience, campaign.channel, contact)
            waves = await list_open_waves(conn, roots)
        steps += await _ask_pace(conn, app, campaign.channel, contact, transactional=campaign.transactional)
        steps += await _ask_waves(conn, waves, asked | {campaign.campaign_id}, contact, "is")
        steps += await _ask_holdout(conn, roots, root_of(campaign), campaign.holdout_percent, contact)
        return Explanation(campaign, *_foretell(steps), steps)
    places = await find_places(conn, contact.number, [campaign.campaign_id])
    if places:
        findings = await _look_up(conn, channels, campaign, places[0], look)
        return Explanation(campaign, *_judge(campaign, findings, find_evidence(channels, campaign)), (), findings)
    if campaign.holdout_count and await find_places(conn, contact.number, [holdout_of(campaign.campaign_id)]):
        text = f"Not messaged: was in the audience at the launch at {_tell(campaign.launch_time)}, and was held out."
        return Explanation(campaign, "HELD_OUT", text, [Step("NOT_HELD_OUT", False, _HELD_OUT)])
    steps = await _ask_audience(conn, app, channels, audience, campaign.channel, contact)
    roots, asked = await _find_chains(conn, app, audience)
    steps += await _ask_waves(conn, await list_waves_at(conn, roots, campaign.launch_time), asked, contact, "was")
    if contact.create_time is not None and contact.create_time > campaign.launch_time:
        text = f"was made at {_tell(contact.create_time)}, after the launch at {_tell(campaign.launch_time)}"
        steps.insert(0, Step("CONTACT_MADE_IN_TIME", False, text))
    missed = next((step for step in steps if not step.passed), None)
    if missed:
        text = f"Not messaged: was not in the audience at the launch at {_tell(campaign.launch_time)}, and now {missed.text}."
        if missed.check == "CONTACT_MADE_IN_TIME":
            text = f"Not messaged: {missed.text}."
        elif missed.check == "NOT_IN_OPEN_WAVE":
            text = f"Not messaged: at the launch at {_tell(campaign.launch_time)} {missed.text}."
    else:
        text = (
            f"Not messaged: was not in the audience at the launch at {_tell(campaign.launch_time)}. By what is true now the"
            " person would be, so something changed since."
        )
    return Explanation(campaign, "NOT_IN_AUDIENCE", text, steps)


async def explain_chain(
    conn: AsyncConnection,
    app: App,
    channels: Mapping[str, ChannelType],
    campaigns: Sequence[Campaign],
    contact: Contact,
) -> list[Explanation]:
    """The same for each campaign of a chain. A wave that could not be launched now is told as such, and ends nothing."""
    explanations = []
    for campaign in campaigns:
        try:
            explained = await explain_campaign(conn, app, channels, campaign, contact, LONGEST_LOOK / len(campaigns))
        except AftertouchError as error:
            if error.code not in _REFUSALS:
                raise
            explained = Explanation(campaign, "WOULD_NOT_BE_MESSAGED", f"Would not be messaged now: {error}.")
        explanations.append(explained)
    return explanations


async def explain_retarget(
    conn: AsyncConnection,
    app: App,
    channels: Mapping[str, ChannelType],
    selection: Selection,
    target: str,
    contact: Contact,
) -> Explanation:
    """Whether a retarget would message this person, and why, with what is known of them in the source that is named first.

    Raises:
        what ``find_sources`` raises.
    """
    sources = await find_sources(conn, app, channels, selection, "retarget.selection")
    source = next(iter(sources.values())).campaign
    steps = await _ask_audience(conn, app, channels, selection, target, contact)
    steps += await _ask_pace(conn, app, target, contact, transactional=False)
    roots, asked = await _find_chains(conn, app, selection)
    steps += await _ask_waves(conn, await list_open_waves(conn, roots), asked, contact, "is")
    steps += await _ask_holdout(conn, roots, find_root(sources), 0, contact)
    places = await find_places(conn, contact.number, [source.campaign_id])
    findings = await _look_up(conn, channels, source, places[0], LONGEST_LOOK) if places else Findings()
    return Explanation(source, *_foretell(steps), steps, findings)


async def _look_up(
    conn: AsyncConnection, channels: Mapping[str, ChannelType], campaign: Campaign, place: Place, look: timedelta
) -> Findings:
    """Everything that is known of the person at a place."""
    known = await _read_known(conn, channels, campaign, place)
    # Read after the receipts: a kind that is new since has its number by now.
    logged, is_complete = await read_logged(conn, place, (campaign.launch_time or campaign.create_time) - EARLIEST, look)
    tried = await read_tried(conn, place)
    numbered = await load_kinds(conn)
    channel = channels.get(campaign.channel)
    return Findings(
        known,
        [ActionTruth(compiled.action, *_match(compiled, known)) for compiled in channel.actions.values()] if channel else (),
        [(numbered[event.kind], event) for event in logged],
        not is_complete,
        [(numbered[attempt.kind], attempt) for attempt in tried],
    )


async def _read_known(conn: AsyncConnection, channels: Mapping[str, ChannelType], campaign: Campaign, place: Place) -> Known:
    kinds = await read_true_kinds(conn, [place])
    numbered = await load_kinds(conn)
    return weigh_kinds((numbered[kind] for kind in kinds.get(place, ())), find_evidence(channels, campaign))


def _is_true(expression: Expression, known: Known) -> bool:
    return bool(expression.evaluate(lambda name: -1 if name in known.signals else 0) & 1)


def _match(compiled: CompiledAction, known: Known) -> tuple[bool, bool]:
    """Whether somebody matches an action, and whether the answer cannot be known (yet); then they do not match."""
    is_apart = compiled.apart is not None and _is_true(compiled.apart, known)
    return _is_true(compiled.expression, known) and not is_apart, is_apart


def _judge(campaign: Campaign, findings: Findings, evidence: Mapping[str, frozenset[str]]) -> tuple[str, str]:
    """What was decided about a recipient, and the same in words."""
    known = findings.known
    signals = [kind.signal for kind in known.kinds]
    tries, refusals = signals.count("attempted"), signals.count("refused")
    reasons = " and ".join(known.reasons)
    heard = sorted(set(known.signals) - {"attempted", "sent", "failed", "skipped"})
    proves_arrival = (evidence["sent"] - {"sent"}) & set(signals)
    when = f" at {_tell(findings.attempts[-1][1].arrive_time)}" if findings.attempts else ""
    cut_off = _find_cut_off(findings)
    lost = "".join(f" Try {number}, begun at {_tell(at)}, was cut off: its outcome is not on record." for number, at in cut_off)
    if "failed" in known.signals and not proves_arrival:
        return "NOT_DELIVERED", f"Was in the audience; the message failed: {reasons}.{lost}"
    if "sent" in known.signals:
        since = f"Known since: {', '.join(heard)}." if heard else "Nothing was heard of it since."
        return "MESSAGED", f"Was messaged: the provider took the message{when}. {since}{lost}"
    if "skipped" in known.signals:
        return "SKIPPED", f"Was in the audience, and was skipped when the turn came: {reasons}.{lost}"
    if tries > refusals and cut_off and cut_off[-1][0] == tries:
        begun = f"try {tries} began at {_tell(cut_off[-1][1])}, and its outcome is not on record"
        text = f"{begun}: it is under way, or was cut off, and nobody knows whether the provider took the message"
        return "UNCLEAR", f"Was in the audience; {text}."
    if tries > refusals:
        text = f"Was in the audience; the message was handed to the provider, and nobody knows what became of it.{lost}"
        return "UNCLEAR", text
    if tries:
        return "TO_BE_TRIED_AGAIN", f"Was in the audience; the provider refused {tries} times, and will be tried again."
    return "WAITING", f"Is in the audience; the turn is still to come. The campaign is {campaign.state}."


def _find_cut_off(findings: Findings) -> list[tuple[int, datetime]]:
    """The tries that the event log has the beginning of, and no log an outcome: their numbers and when they began."""
    begun = {int(kind.reason_code): event for kind, event in findings.events if kind.signal == "attempted"}
    refused = {kind.reason_code for kind, _ in findings.events if kind.signal == "refused"}
    cut_off = []
    for number, event in sorted(begun.items()):
        # The next try begins after the outcome of this one is on record.
        end = begun[number + 1].arrive_time if number + 1 in begun else datetime.max.replace(tzinfo=UTC)
        has_outcome = any(event.arrive_time <= tried.arrive_time < end for _, tried in findings.attempts)
        if not has_outcome and str(number) not in refused:
            cut_off.append((number, event.time))
    return cut_off


def _foretell(steps: Sequence[Step]) -> tuple[str, str]:
    missed = next((step for step in steps if not step.passed), None)
    if missed:
        return "WOULD_NOT_BE_MESSAGED", f"Would not be messaged now: {missed.text}."
    return "WOULD_BE_MESSAGED", f"Would be messaged now: {', and '.join(step.text for step in steps)}."


async def _ask_audience(
    conn: AsyncConnection,
    app: App,
    channels: Mapping[str, ChannelType],
    audience: Audience | None,
    target: str,
    contact: Contact,
) -> list[Step]:
    """What an audience asks of a person, and what it finds now."""
    match audience:
        case None:
            steps = [Step("IN_AUDIENCE", False, "the campaign has no audience")]
        case AllSubscribers():
            steps = [Step("IN_AUDIENCE", True, "the audience is everybody who can be reached")]
        case GivenContacts():
            is_named = contact.external_id in audience.external_ids
            text = "is one of the given contacts" if is_named else f"is not one of {len(audience.external_ids):,} given contacts"
            steps = [Step("IN_AUDIENCE", is_named, text)]
        case ListMembers():
            steps = [await _ask_list(conn, app, audience, contact)]
        case Question() | Combination():
            steps = await _ask_selection(conn, app, channels, audience, contact)
    steps.append(_ask_standing(contact, target))
    return steps


async def _ask_list(conn: AsyncConnection, app: App, audience: ListMembers, contact: Contact) -> Step:
    found = await find_list(conn, app.app_id, audience.list)
    if found is None:
        return Step("IN_AUDIENCE", False, f"the list {audience.list} was deleted")
    blocks = count_chunks(contact.number + 1)
    sets = await read_sets(conn, app.app_id, [found.set_name], blocks, within=np.array([blocks - 1], np.int64))
    is_member = find_members(sets[found.set_name], np.array([contact.number], np.int64))[0]
    return Step("IN_AUDIENCE", bool(is_member), f"is {'' if is_member else 'not '}in the list {audience.list}")


async def _ask_selection(
    conn: AsyncConnection, app: App, channels: Mapping[str, ChannelType], selection: Selection, contact: Contact
) -> list[Step]:
    if isinstance(selection, Question):
        return await _ask_question(conn, app, channels, selection, contact)
    asked = [await _ask_selection(conn, app, channels, operand, contact) for operand in selection.operands]
    are_true = [all(step.passed for step in steps) for steps in asked]
    texts = [", and ".join(step.text for step in steps) for steps in asked]
    match selection.operator:
        case "any_of":
            return [Step("IN_AUDIENCE", any(are_true), f"[{'] or ['.join(texts)}]: any is enough")]
        case "all_of":
            return [Step("IN_AUDIENCE", all(are_true), f"[{'] and ['.join(texts)}]: all are needed")]
        case "all_but":
            return [Step("IN_AUDIENCE", are_true == [True, False], f"[{texts[0]}], but not who [{texts[1]}]")]


async def _ask_question(
    conn: AsyncConnection, app: App, channels: Mapping[str, ChannelType], question: Question, contact: Contact
) -> list[Step]:
    source = await find_campaign(conn, app.app_id, question.source)
    channel = channels.get(source.channel) if source else None
    compiled = channel.actions.get(question.action) if channel else None
    if source is None or channel is None or compiled is None:
        return [Step("IN_AUDIENCE", False, f"the action {question.action} of {question.source} is no longer there")]
    places = await find_places(conn, contact.number, [source.campaign_id])
    if not places:
        return [Step("RECIPIENT_OF_SOURCE", False, f"is not a recipient of {question.source}")]
    known = await _read_known(conn, channels, source, places[0])
    is_true, is_apart = _match(compiled, known)
    matches = is_true or (is_apart and question.include_apart)
    text = f'"{compiled.action.label}" asks for {compiled.expression}, and of the person {_list(known.signals)} true'
    if is_apart:
        kept = "taken in" if question.include_apart else "left out"
        text += f"; {compiled.action.apart_label}: whom that is true of is {kept}"
    if matches and question.leave_out_pending and _is_true(find_pending(channel), known):
        matches = False
        text += "; nothing was heard since the message was sent, and whom that is true of is left out"
    if matches and (question.reason_codes or question.reason_classes):
        matches = any(
            kind.signal == compiled.reasoned
            and (kind.reason_code in question.reason_codes or kind.reason_class in question.reason_classes)
            for kind in known.kinds
        )
        asked = ", ".join((*question.reason_codes, *question.reason_classes))
        text += f"; only {compiled.reasoned} for {asked} counts, and the person's {_list(known.reasons)}"
    return [
        Step("RECIPIENT_OF_SOURCE", True, f"is a recipient of {question.source}"),
        Step("IN_AUDIENCE", matches, text),
    ]


def _ask_standing(contact: Contact, channel: str) -> Step:
    """Whether somebody can be reached on a channel: by the best of their subscriptions."""
    held = [subscription for subscription in contact.subscriptions if subscription.channel == channel]
    if not held:
        return Step("REACHABLE", False, f"has no subscription on {channel}")
    best = min(held, key=lambda subscription: STANDINGS.index(subscription.state or STANDINGS[0]))
    since = f" since {_tell(best.update_time)}" if best.update_time else ""
    reason = f" ({best.reason})" if best.reason else ""
    match best.state:
        case "active":
            return Step("REACHABLE", True, f"can be reached on {channel}{since}")
        case "opted_out":
            return Step("REACHABLE", False, f"has opted out on {channel}{since}{reason}")
        case _:
            return Step("REACHABLE", False, f"has only addresses on {channel} that do not work{since}{reason}")


async def _ask_pace(conn: AsyncConnection, app: App, channel: str, contact: Contact, *, transactional: bool) -> list[Step]:
    """What would hold a message back although its person is in the audience; nothing where nothing does."""
    steps = []
    active = [one for one in contact.subscriptions if one.channel == channel and one.state == "active"]
    holds = [one.held_until for one in active if one.held_until is not None and one.held_until > datetime.now(UTC)]
    if holds and len(holds) == len(active):
        steps.append(Step("NOT_HELD", False, f"the provider asks to leave the person alone until {_tell(min(holds))}"))
    if app.cap_messages and app.cap_hours and not transactional:
        window = timedelta(hours=app.cap_hours)
        full_until = await read_full_until(conn, app.app_id, contact.number, app.cap_messages, window)
        if full_until is not None:
            had = f"{app.cap_messages} of {app.cap_messages} messages that the app allows within {app.cap_hours} hours"
            text = f"has had {had}; the next may go out at {_tell(full_until)}"
            steps.append(Step("BELOW_FREQUENCY_CAP", False, text))
    return steps


async def _find_chains(conn: AsyncConnection, app: App, audience: Audience | None) -> tuple[frozenset[int], frozenset[int]]:
    """The roots of the chains that a selection asks, and the campaigns; of another audience nothing."""
    if not isinstance(audience, Question | Combination):
        return frozenset(), frozenset()
    names = sorted({question.source for question, _ in list_questions(audience)})
    found = (await find_campaigns(conn, app.app_id, names)).values()
    return frozenset(map(root_of, found)), frozenset(campaign.campaign_id for campaign in found)


async def _ask_waves(
    conn: AsyncConnection, waves: Collection[Campaign], asked: Collection[int], contact: Contact, verb: str
) -> list[Step]:
    """Whether somebody is on the way in another wave of a chain; nothing where they are not.

    Args:
        waves: those that are still being sent, or were.
        asked: campaigns that are not in the way.
        verb: "is" or "was".
    """
    others = {wave.campaign_id: wave.campaign for wave in waves if wave.campaign_id not in asked}
    places = await find_places(conn, contact.number, list(others))
    if not places:
        return []
    text = f"{verb} a recipient of {others[places[0].campaign_id]}, another wave of the chain that {verb} still being sent"
    return [Step("NOT_IN_OPEN_WAVE", False, text)]


async def _ask_holdout(conn: AsyncConnection, roots: Collection[int], root: int, percent: int, contact: Contact) -> list[Step]:
    """Whether somebody is left alone so that the others can be compared with them; nothing where they are not."""
    shares = await find_shares(conn, roots, root, percent)
    if not find_held_out(shares, np.array([contact.number], np.int64))[0]:
        return []
    return [Step("NOT_HELD_OUT", False, _HELD_OUT)]


def _list(words: Sequence[str]) -> str:
    if not words:
        return "nothing is"
    return f"{', '.join(words)} {'is' if len(words) == 1 else 'are'}"


def _tell(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
