"""New campaigns: the form of a draft with its preview and its review, saved while somebody types, and the launch."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format
from google.protobuf.field_mask_pb2 import FieldMask
from starlette.datastructures import FormData
from starlette.responses import Response

from aftertouch.console import previews, provided, words
from aftertouch.console.campaigns import Standing, State, describe, list_leaves, read, read_plain, retargetable_until
from aftertouch.console.contents import Field, make_form, read_form
from aftertouch.console.plans import Plan
from aftertouch.console.retargets import Funnel, read_funnel
from aftertouch.console.visits import Visit, name_faults, read_id
from aftertouch.declarations import ChannelType
from aftertouch.errors import AftertouchError, EtagMismatch, FieldsInvalid, NotFound, Violation
from aftertouch.rpc.values import to_struct
from aftertouch.store import unfinished
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2, lists_pb2

_LOOKED_AT, _EXAMPLES = 50, 10
"""Campaigns, to find some with different contents."""
_EXTERNAL_IDS = re.compile(r"[^\n,;]+")


@dataclass(frozen=True)
class Review:
    """Whom a draft would reach now, or why nobody."""

    funnel: Funnel | None
    """Of a wave."""
    recipients: int
    """-1 when they are not counted yet."""
    problem: str
    estimate: campaigns_pb2.Estimate | None = None
    """What it would be billed as, on channels that know."""
    awaited: str = ""
    """The display name of a wave's source that is not launched yet, so that nobody can be counted."""


# Making one


async def show_new(visit: Visit) -> Response:
    """Name, channel and audience of a new campaign."""
    return await _render_new(visit, {"audience": "all"}, name_faults())


async def _render_new(visit: Visit, values: Mapping[str, str], faults: Mapping[str, str]) -> Response:
    channels = [(name, found.channel.label, is_ready) for name, found, is_ready in await visit.list_channels()]
    request = lists_pb2.ListListsRequest(parent=visit.parent, page_size=1000)
    lists = (await visit.client.lists.ListLists(request)).lists
    return visit.render("new.html", 400 if faults else 200, values=values, faults=faults, channels=channels, lists=lists)


async def create(visit: Visit) -> Response:
    """Make the draft and go on with its content."""
    form = await visit.read_form()
    values = {name: str(form.get(name, "")) for name in ("display_name", "channel", "audience", "contacts", "list")}
    audience = campaigns_pb2.Audience()
    if values["audience"] == "given":
        names = [visit.name("contacts", found[0].strip()) for found in _EXTERNAL_IDS.finditer(values["contacts"])]
        audience.given_contacts.contacts.extend(names)
    elif values["audience"] == "list":
        audience.list = values["list"]
    else:
        audience.all_subscribers.SetInParent()
    campaign = campaigns_pb2.Campaign(display_name=values["display_name"], channel=values["channel"], audience=audience)
    request = campaigns_pb2.CreateCampaignRequest(parent=visit.parent, campaign=campaign)
    try:
        made = await visit.client.campaigns.CreateCampaign(request)
    except FieldsInvalid as error:
        places = [Violation(_name_place(found.field), found.description) for found in error.violations]
        return await _render_new(visit, values, name_faults(places))
    return visit.redirect(f"/campaigns/{read_id(made.name)}/edit")


def _name_place(path: str) -> str:
    """The field of the form that a violation is about."""
    name = path.removeprefix("campaign.")
    if name.startswith("audience.list"):
        return "list"
    return "contacts" if name.startswith("audience") else name


# Composing it


async def show(visit: Visit) -> Response:
    """The form of a draft, with what was typed when somebody left it, or of a follow-up that waits."""
    standing = await read(visit)
    if not _is_open(standing):
        return visit.redirect(f"/campaigns/{standing.id}")
    content, plan, is_stored = await _read_draft(visit, standing)
    return await _render(visit, standing, standing.message.display_name, content, plan, is_stored=is_stored)


def _is_open(standing: Standing) -> bool:
    return standing.message.state == State.DRAFT or standing.is_waiting


async def _read_draft(visit: Visit, standing: Standing) -> tuple[Mapping[str, Any], Plan, bool]:
    """A draft's content and plan as they were typed last, and whether that is a content that its channel takes.

    What a follow-up that waits says and waits for is all stored with it.
    """
    if standing.is_waiting:
        plan = Plan.wait_for(standing.message.follow_up.delay.ToTimedelta())
        return json_format.MessageToDict(standing.message.content), plan, True
    async with transaction(visit.console.engine) as conn:
        kept = await unfinished.find_unfinished(conn, visit.app.app_id, standing.id)
    stored = json_format.MessageToDict(standing.message.content)
    plan = Plan.load(kept.plan) if kept.plan else Plan()
    return (stored, plan, bool(stored)) if kept.content is None else (kept.content, plan, False)


async def _render(
    visit: Visit,
    standing: Standing,
    name: str,
    content: Mapping[str, Any],
    plan: Plan,
    *,
    is_stored: bool,
    violations: Sequence[Violation] = (),
    problem: str = "",
) -> Response:
    found = _find_type(visit, standing)
    has_templates = found.channel.capabilities.templates
    source = await find_source(visit, standing)
    contact = await previews.find_contact(visit, standing.message.channel, visit.query("as"))
    preview = None
    # A provider's words come by themselves, after the page.
    if contact and is_stored and not has_templates:
        preview = await previews.draw(visit, found, standing.message, content, contact)
    return visit.render(
        "compose.html",
        400 if problem or violations else 200,
        campaign=standing,
        name=name,
        form=_make_form(found, content, violations),
        faults=name_faults([*plan.violations, *violations], "campaign."),
        plan=plan,
        examples=await _list_examples(visit, standing),
        source=source,
        last_time=retargetable_until(visit, source) if source else None,
        contact=contact,
        attributes=previews.list_attributes(contact),
        preview=preview,
        has_templates=has_templates,
        saved="Saved" if is_stored and not standing.is_waiting else "",
        problem=problem,
    )


async def _list_examples(visit: Visit, standing: Standing) -> list[tuple[str, str]]:
    """Ids and names of the last campaigns with a content of their own on the same channel, to begin with instead of typing."""
    wanted = campaigns_pb2.CampaignFilter(channel=standing.message.channel)
    request = campaigns_pb2.ListCampaignsRequest(parent=visit.parent, page_size=_LOOKED_AT, filter=wanted)
    found: dict[str, tuple[str, str]] = {}
    for campaign in (await visit.client.campaigns.ListCampaigns(request)).campaigns:
        if campaign.HasField("content") and campaign.name != standing.message.name:
            content = json_format.MessageToJson(campaign.content, sort_keys=True)
            found.setdefault(content, (read_id(campaign.name), campaign.display_name))
    return list(found.values())[:_EXAMPLES]


async def find_source(visit: Visit, standing: Standing) -> Standing | None:
    """The one campaign whose people a wave asks; None of other campaigns, when it asks several, and when it was deleted."""
    sources = {leaf.source for leaf in list_leaves(standing.message.audience.retarget)}
    try:
        return await read_plain(visit, read_id(sources.pop())) if len(sources) == 1 else None
    except NotFound:
        return None


def _find_type(visit: Visit, standing: Standing) -> ChannelType:
    found = visit.console.registry.types.get(standing.message.channel)
    if found is None:
        raise NotFound(f"channels/{standing.message.channel}")
    return found


def _make_form(found: ChannelType, content: Mapping[str, Any], violations: Iterable[Violation] = ()) -> Field:
    ours = [violation for violation in violations if violation.field.removeprefix("campaign.").startswith("content")]
    return make_form(found.channel.content_model.model_json_schema(), content, ours)


def _read_values(form: FormData) -> dict[str, str]:
    return {name: value for name, value in form.multi_items() if isinstance(value, str)}


def _read_content(found: ChannelType, form: FormData) -> dict[str, Any]:
    return read_form(found.channel.content_model.model_json_schema(), _read_values(form))


async def change_form(visit: Visit) -> Response:
    """The form with one more or one fewer item, another kind of value, or another campaign's content, as was chosen."""
    form = await visit.read_form()
    standing = await read(visit)
    found = _find_type(visit, standing)
    schema = found.channel.content_model.model_json_schema()
    values = _read_values(form)
    if source := values.get("copy", ""):
        request = campaigns_pb2.GetCampaignRequest(name=visit.name("campaigns", source))
        content = json_format.MessageToDict((await visit.client.campaigns.GetCampaign(request)).content)
        return _begin_with(visit, schema, content)
    if chosen := values.get("template", ""):
        template = await provided.find_chosen(visit, found.name, chosen)
        return _begin_with(visit, schema, json_format.MessageToDict(template.content))
    if path := values.get("add", ""):
        content = read_form(schema, values | {f"{path}.9999": "", f"{path}.9999.key": ""})
    elif path := values.get("remove", ""):
        kept = {name: value for name, value in values.items() if name != path and not name.startswith((f"{path}.", f"{path}@"))}
        content = read_form(schema, kept)
    else:
        content = read_form(schema, values)
    return visit.render("content_form.html", form=make_form(schema, content, values=values))


def _begin_with(visit: Visit, schema: Mapping[str, Any], content: Mapping[str, Any]) -> Response:
    """The form with this content, which is saved at once."""
    response = visit.render("content_form.html", form=make_form(schema, content))
    response.headers["hx-trigger-after-swap"] = "copied"
    return response


async def show_templates(visit: Visit) -> Response:
    """The provider's templates to choose from, and the message in their words: parts of the page that come after the rest."""
    standing = await read(visit)
    found = _find_type(visit, standing)
    offer = await provided.list_offer(visit, found.name)
    content, _, is_stored = await _read_draft(visit, standing)
    contact = await previews.find_contact(visit, found.name, visit.query("as"))
    return visit.render(
        "templates_part.html",
        campaign=standing,
        label=found.channel.label,
        offer=offer,
        used=provided.find_used(offer.templates, content),
        name_choice=provided.name_choice,
        contact=contact,
        preview=await previews.draw(visit, found, standing.message, content, contact) if contact and is_stored else None,
    )


async def _read_form(visit: Visit) -> tuple[FormData, Standing]:
    """A form and its campaign, of the version that was seen: whoever is refused does not get another one's etag."""
    form = await visit.read_form()
    standing = await read(visit)
    standing.message.etag = str(form.get("etag", ""))
    return form, standing


async def save(visit: Visit) -> Response:
    """Save what was typed of a draft, whether it is complete or not, and show it as somebody would get it.

    A follow-up that waits is saved as a whole and on demand only: what somebody is in the middle of typing might go out.
    """
    form, standing = await _read_form(visit)
    if standing.is_waiting and not visit.is_partial:
        return await _change(visit, standing, form)
    found = _find_type(visit, standing)
    contact = await previews.find_contact(visit, standing.message.channel, str(form.get("as", "")))
    content = _read_content(found, form)
    try:
        await _store(visit, standing, form, content)
    except FieldsInvalid as error:
        labels = [field.label for field in _make_form(found, content, error.violations).faulty]
        status = f"Kept. Missing or wrong: {', '.join(labels or ['Name'])}"
        return visit.render("saved_part.html", etag=standing.message.etag, preview=None, contact=contact, status=status)
    preview = await previews.draw(visit, found, standing.message, content, contact) if contact else None
    response = visit.render("saved_part.html", etag=standing.message.etag, preview=preview, contact=contact, status="Saved")
    # Only of a complete message it can be asked whom it would go to, and what it would cost.
    response.headers["hx-trigger"] = "reviewed"
    return response


async def _change(visit: Visit, standing: Standing, form: FormData) -> Response:
    content = _read_content(_find_type(visit, standing), form)
    try:
        await _store(visit, standing, form, content)
    except AftertouchError as error:
        return await _refuse(visit, standing, form, content, error, "Nothing was saved.")
    return visit.redirect(f"/campaigns/{standing.id}")


async def _refuse(
    visit: Visit, standing: Standing, form: FormData, content: Mapping[str, Any], error: AftertouchError, outcome: str
) -> Response:
    """The form with what was typed, and what is wrong with it; whatever it cannot show is raised again."""
    violations: Sequence[Violation] = ()
    if isinstance(error, FieldsInvalid):
        violations, problem = error.violations, f"Something is missing or wrong. {outcome}"
    elif error.code in ("FAILED_PRECONDITION", "ABORTED"):
        problem = words.explain(error, standing.message.name)
        standing = (await describe(visit, [await visit.client.campaigns.GetCampaign(_get(standing))]))[0]
    else:
        raise error
    if not _is_open(standing):
        raise error
    name = str(form.get("display_name", ""))
    return await _render(visit, standing, name, content, Plan.read(form), is_stored=False, violations=violations, problem=problem)


async def _store(
    visit: Visit, standing: Standing, form: FormData, content: Mapping[str, Any], *, is_forced: bool = False
) -> None:
    """Store name and content with the draft; content that is refused is kept beside it, and so is when it is to be launched.

    Of a follow-up that waits, all is stored or nothing. ``standing`` has afterwards what is stored, and its etag.

    Args:
        is_forced: whatever was stored of a draft since it was seen.

    Raises:
        FieldsInvalid, EtagMismatch, CampaignStateWrong.
    """
    app_id, plan = visit.app.app_id, Plan.read(form)
    campaign = campaigns_pb2.Campaign(
        name=standing.message.name,
        display_name=str(form.get("display_name", "")),
        content=to_struct(content),
        etag="" if is_forced and not standing.is_waiting else standing.message.etag,
    )

    async def update(*paths: str) -> None:
        request = campaigns_pb2.UpdateCampaignRequest(campaign=campaign, update_mask=FieldMask(paths=paths))
        standing.message.CopyFrom(await visit.client.campaigns.UpdateCampaign(request))

    if standing.is_waiting:
        if plan.when != "delay":
            # A draft's form, of before it was launched with a delay.
            raise EtagMismatch(campaign.name)
        plan.check()
        campaign.follow_up.delay.FromTimedelta(plan.wait)
        await update("display_name", "content", "follow_up.delay")
        return
    try:
        await update("display_name", "content")
    except FieldsInvalid as error:
        async with transaction(visit.console.engine) as conn:
            await unfinished.keep_unfinished(conn, app_id, standing.id, content, plan.store())
        is_name_right = all(violation.field.startswith("campaign.content") for violation in error.violations)
        if is_name_right and campaign.display_name != standing.message.display_name:
            await update("display_name")
        raise
    async with transaction(visit.console.engine) as conn:
        await unfinished.keep_unfinished(conn, app_id, standing.id, None, plan.store())


async def show_review(visit: Visit) -> Response:
    """Whom it would reach if it were launched now: a part of the page that comes after the rest."""
    standing = await read(visit)
    return visit.render("review.html", campaign=standing, review=await _review(visit, standing))


async def _review(visit: Visit, standing: Standing) -> Review:
    audience, funnel, count, awaited = standing.message.audience, None, -1, ""
    _, plan, _ = await _read_draft(visit, standing)
    try:
        if audience.HasField("retarget"):
            source = await find_source(visit, standing)
            if source and not source.launch_time:
                awaited = source.message.display_name
            else:
                people = f"/campaigns/{standing.id}/review/people.csv?"
                funnel = await read_funnel(visit, source or standing, audience.retarget, standing.message.channel, people)
                count = funnel.preview.audience_count
            if not count and plan.when == "now":
                return Review(funnel, 0, words.explain_empty())
        if standing.is_waiting or not standing.message.HasField("content"):
            return Review(funnel, count, "", awaited=awaited)
        # Everything that the launch asks, the provider's templates included.
        request = campaigns_pb2.LaunchCampaignRequest(name=standing.message.name, validate_only=True)
        if plan.when == "delay" and not plan.violations:
            request.delay.FromTimedelta(plan.wait)
        asked = await visit.client.campaigns.LaunchCampaign(request)
        estimate = asked.estimate if asked.HasField("estimate") else None
        return Review(funnel, count if funnel or awaited else asked.counts.recipients, "", estimate, awaited)
    except FieldsInvalid as error:
        form = _make_form(_find_type(visit, standing), json_format.MessageToDict(standing.message.content), error.violations)
        told = [f"{field.label} {fault}" for field in form.faulty for fault in field.faults]
        return Review(funnel, max(count, 0), "; ".join(told) + "." if told else words.explain(error))
    except AftertouchError as error:
        return Review(funnel, max(count, 0), words.explain(error, standing.message.name))


async def launch(visit: Visit) -> Response:
    """Save and launch; whatever is refused is shown at its field."""
    form, standing = await _read_form(visit)
    if standing.message.state != State.DRAFT:
        # Pressed twice: the first press launched it.
        return visit.redirect(f"/campaigns/{standing.id}")
    content = _read_content(_find_type(visit, standing), form)
    try:
        # What is seen is what is sent: a save that is still on its way makes no conflict.
        await _store(visit, standing, form, content, is_forced=True)
        request = campaigns_pb2.LaunchCampaignRequest(name=standing.message.name, etag=standing.message.etag)
        Plan.read(form).fill(request)
        await visit.client.campaigns.LaunchCampaign(request)
    except AftertouchError as error:
        return await _refuse(visit, standing, form, content, error, "Nothing was sent.")
    return visit.redirect(f"/campaigns/{standing.id}")


async def send_test(visit: Visit) -> Response:
    """Save what was typed, and send it to one contact now."""
    form, standing = await _read_form(visit)
    name = visit.name("contacts", str(form.get("as", "")))

    def answer(outcomes: Sequence[tuple[str, str, str]] = (), problem: str = "") -> Response:
        return visit.render("test_part.html", etag=standing.message.etag, outcomes=outcomes, problem=problem)

    try:
        await _store(visit, standing, form, _read_content(_find_type(visit, standing), form), is_forced=True)
        request = campaigns_pb2.SendTestRequest(name=standing.message.name, contact=name, request_id=str(uuid.uuid4()))
        sent = await visit.client.campaigns.SendTest(request)
    except FieldsInvalid as error:
        return answer(problem="; ".join(violation.description for violation in error.violations))
    except AftertouchError as error:
        return answer(problem=words.explain(error))
    results = campaigns_pb2.SendTestResponse.Result
    outcomes = [
        (results.Name(one.result).lower(), words.REASONS.get(one.reason_class, (one.reason_class, ""))[0], one.reason_code)
        for one in sent.outcomes
    ]
    return answer(outcomes)


def _get(standing: Standing) -> campaigns_pb2.GetCampaignRequest:
    return campaigns_pb2.GetCampaignRequest(name=standing.message.name)


async def delete(visit: Visit) -> Response:
    """Delete the draft."""
    name = visit.name("campaigns", visit.param("campaign"))
    await visit.client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=name))
    return visit.redirect("/campaigns")
