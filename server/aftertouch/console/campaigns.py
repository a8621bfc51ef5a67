"""The list of campaigns, and a campaign's page while it is sent and afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.charts import read_chart
from aftertouch.console.plans import Plan
from aftertouch.console.visits import Visit, is_recent, read_id, to_time
from aftertouch.errors import AftertouchError, FieldsInvalid, NotFound, Violation
from aftertouch.store.campaigns import find_campaigns, read_campaigns
from aftertouch.store.engine import transaction
from aftertouch.store.lists import find_list
from aftertouch.store.unfinished import keep_unfinished
from aftertouch.v1 import campaigns_pb2, retargeting_pb2

PAGE_SIZE = 25

State = campaigns_pb2.Campaign.State
LAUNCHED = frozenset({State.SENDING, State.PAUSED, State.SENT, State.CANCELED})


@dataclass(frozen=True)
class Step:
    """One bar of a funnel."""

    signal: str
    """Empty of the whole roll."""
    label: str
    count: int
    share: str
    width: float
    """In per cent of the whole."""


@dataclass(frozen=True)
class ClickedLink:
    """A tracked link of a campaign, and who clicked it."""

    code: str
    """Of the clicks on it, as a retarget is narrowed to them."""
    address: str
    """As it stands in the content; what was reported with the click where that is no link of the campaign's."""
    count: int


@dataclass(frozen=True)
class Standing:
    """A campaign and what is known of it, as its row and its page show it."""

    id: str
    message: campaigns_pb2.Campaign
    channel: str
    """For people."""
    audience: str
    root: str
    """The display name of the chain's root, of a wave."""
    rule: str
    """Of a follow-up that waits: after what it goes out, as in "2 hours after Summer Sale is sent"."""
    launch_time: datetime | None
    finish_time: datetime | None
    create_time: datetime | None
    schedule_time: datetime | None
    send_by_time: datetime | None

    @property
    def state(self) -> str:
        """The state's name."""
        return State.Name(self.message.state)

    @property
    def is_launched(self) -> bool:
        """True when it has recipients, who can be retargeted."""
        return self.message.state in LAUNCHED and bool(self.launch_time)

    @property
    def is_waiting(self) -> bool:
        """True when it is a follow-up that can still be changed."""
        return bool(self.rule)

    @property
    def is_moving(self) -> bool:
        """True when its numbers change while somebody looks."""
        return self.message.state == State.SENDING or is_recent(self.finish_time, 600)

    @property
    def recipients(self) -> int:
        """How many people are on its roll."""
        return self.message.counts.recipients

    @property
    def done(self) -> int:
        """How many of them were dealt with."""
        signals = self.message.counts.signals
        if self.message.state == State.SENT:
            return self.recipients
        return min(signals["attempted"] + signals["skipped"], self.recipients)


async def describe(visit: Visit, campaigns: list[campaigns_pb2.Campaign]) -> list[Standing]:
    """Campaigns with the names of what they refer to."""
    sources = {read_id(leaf.source) for c in campaigns for leaf in list_leaves(c.audience.retarget)}
    others = {read_id(name) for c in campaigns for name in (c.root, c.follow_up.source) if name}
    lists = sorted({read_id(c.audience.list) for c in campaigns if c.audience.list})
    async with transaction(visit.console.engine) as conn:
        named = await find_campaigns(conn, visit.app.app_id, sorted(sources | others))
        listed = {name: await find_list(conn, visit.app.app_id, name) for name in lists}
    types = visit.console.registry.types

    def describe_selection(selection: campaigns_pb2.RetargetSelection) -> str:
        match selection.WhichOneof("combination"):
            case "any_of":
                return " or ".join(map(describe_selection, selection.any_of.selections))
            case "all_of":
                return " and ".join(map(describe_selection, selection.all_of.selections))
            case "all_but":
                return f"{describe_selection(selection.all_but.all)} but not {describe_selection(selection.all_but.but)}"
        source = named.get(read_id(selection.source))
        found = types.get(source.channel) if source else None
        action = found.actions.get(selection.action) if found else None
        label = action.action.label if action else selection.action
        links = name_links(source.links if source else [])
        narrowed = [words.REASONS.get(name, (name,))[0].lower() for name in selection.reason_classes]
        narrowed += [words.shorten(links.get(code, code)) for code in selection.reason_codes]
        if narrowed:
            label += f" ({' or '.join(narrowed)})"
        return f"{label} \u00b7 {source.display_name}" if source else label

    def describe_audience(audience: campaigns_pb2.Audience) -> str:
        match audience.WhichOneof("kind"):
            case "all_subscribers":
                return "All subscribers"
            case "given_contacts":
                return words.count_people(len(audience.given_contacts.contacts))
            case "list":
                found = listed[read_id(audience.list)]
                return f"List {found.display_name}" if found else "A list that was deleted"
            case "retarget":
                return describe_selection(audience.retarget)
            case _:
                return "No audience"

    def describe_rule(campaign: campaigns_pb2.Campaign) -> str:
        if campaign.state != State.SCHEDULED or not campaign.HasField("follow_up"):
            return ""
        source = named.get(read_id(campaign.follow_up.source))
        delay = campaign.follow_up.delay.ToTimedelta()
        name = source.display_name if source else "a campaign that was deleted"
        after = f"{words.span(delay)} after" if delay else "as soon as"
        return f"{after} {name} {'was' if campaign.HasField('schedule_time') else 'is'} sent"

    return [
        Standing(
            id=read_id(campaign.name),
            message=campaign,
            channel=types[campaign.channel].channel.label if campaign.channel in types else campaign.channel,
            audience=describe_audience(campaign.audience),
            root=found.display_name if (found := named.get(read_id(campaign.root))) else "",
            rule=describe_rule(campaign),
            launch_time=to_time(campaign.launch_time),
            finish_time=to_time(campaign.finish_time),
            create_time=to_time(campaign.create_time),
            schedule_time=to_time(campaign.schedule_time),
            send_by_time=to_time(campaign.send_by_time),
        )
        for campaign in campaigns
    ]


def list_leaves(selection: campaigns_pb2.RetargetSelection) -> Iterator[campaigns_pb2.RetargetSelection]:
    """The questions that a selection combines; nothing of an empty one."""
    match selection.WhichOneof("combination"):
        case "all_but":
            operands = [selection.all_but.all, selection.all_but.but]
        case None:
            operands = []
        case operator:
            operands = list(getattr(selection, operator).selections)
    if selection.source:
        yield selection
    for operand in operands:
        yield from list_leaves(operand)


async def read(visit: Visit) -> Standing:
    """The campaign that the address names, with its counts."""
    name = visit.name("campaigns", visit.param("campaign"))
    campaign = await visit.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
    return (await describe(visit, [campaign]))[0]


async def read_plain(visit: Visit, identifier: str = "") -> Standing:
    """A campaign, the one that the address names unless said otherwise, without its counts.

    Raises:
        NotFound.
    """
    identifier = identifier or visit.param("campaign")
    async with transaction(visit.console.engine) as conn:
        found = await find_campaigns(conn, visit.app.app_id, [identifier])
        roots = await read_campaigns(conn, [stored.root_id for stored in found.values() if stored.root_id])
    name = visit.name("campaigns", identifier)
    if not found:
        raise NotFound(name)
    ((_, stored),) = found.items()
    message = campaigns_pb2.Campaign(
        name=name,
        display_name=stored.display_name,
        channel=stored.channel,
        state=State.Value(stored.state),
        links=stored.links,
    )
    for root in roots.values():
        message.root = visit.name("campaigns", root.campaign)
    for field in ("launch_time", "finish_time"):
        if time := getattr(stored, field):
            getattr(message, field).FromDatetime(time)
    return (await describe(visit, [message]))[0]


async def show_list(visit: Visit) -> Response:
    """Campaigns, newest first. Their counts come with each row's own request, so that no large one delays the page."""
    text, state, channel = visit.query("q"), visit.query("state"), visit.query("channel")
    wanted = campaigns_pb2.CampaignFilter(channel=channel, text=text)
    if state in words.STATES:
        wanted.state = State.Value(state)
    request = campaigns_pb2.ListCampaignsRequest(
        parent=visit.parent, page_size=PAGE_SIZE, page_token=visit.query("after"), filter=wanted
    )
    listed = await visit.client.campaigns.ListCampaigns(request)
    return visit.render(
        "campaigns_part.html" if visit.is_partial else "campaigns.html",
        campaigns=await describe(visit, list(listed.campaigns)),
        text=text,
        state=state,
        channel=channel,
        after=visit.query("after"),
        next=listed.next_page_token,
        channels={name: found.channel.label for name, found in sorted(visit.console.registry.types.items())},
    )


async def show_row(visit: Visit) -> Response:
    """One row of the list, with its counts."""
    standing = await read(visit)
    return visit.render("campaign_row.html", campaign=standing, rates=list_rates(visit, standing, asked=True), is_counted=True)


def list_signals(visit: Visit, channel: str, *, asked: bool = False) -> list[tuple[str, str]]:
    """The channel's own signals with their labels, in its order; those that its actions ask for, or all."""
    found = visit.console.registry.types.get(channel)
    if found is None:
        return []
    names = {name for action in found.actions.values() for name in action.expression.names}
    return [(signal.name, signal.label) for signal in found.channel.signals if signal.name in names or not asked]


def list_rates(visit: Visit, standing: Standing, *, asked: bool = False) -> list[tuple[str, str]]:
    """What a channel knows of a campaign's people, as shares of those that it was sent to."""
    signals = standing.message.counts.signals
    known = list_signals(visit, standing.message.channel, asked=asked)
    return [(label, words.share(signals[name], signals["sent"])) for name, label in known]


def list_steps(visit: Visit, standing: Standing) -> list[Step]:
    """The funnel: from the roll through what every channel knows to the channel's own signals."""
    counts = standing.message.counts
    steps = [
        ("", "Recipients", counts.recipients),
        ("attempted", "Attempted", counts.signals["attempted"]),
        ("sent", "Sent", counts.signals["sent"]),
        *((name, label, counts.signals[name]) for name, label in list_signals(visit, standing.message.channel, asked=True)),
    ]
    return [
        Step(signal, label, count, words.share(count, counts.recipients), round(100 * count / max(counts.recipients, 1), 2))
        for signal, label, count in steps
    ]


async def show(visit: Visit) -> Response:
    """A campaign's page; a draft's is its form."""
    standing = await read(visit)
    if standing.message.state == State.DRAFT and visit.may("manage"):
        return visit.redirect(f"/campaigns/{standing.id}/edit")
    return visit.render("campaign.html", **await _read_page(visit, standing))


async def show_live(visit: Visit) -> Response:
    """The part of a campaign's page that changes while it is sent."""
    return visit.render("campaign_live.html", **await _read_page(visit, await read(visit)))


async def _read_page(visit: Visit, standing: Standing) -> dict[str, Any]:
    async def count_actions() -> tuple[retargeting_pb2.ListActionsResponse | None, str]:
        request = retargeting_pb2.ListActionsRequest(parent=standing.message.name)
        try:
            return await visit.client.retargeting.ListActions(request), ""
        except AftertouchError as error:
            return None, words.explain(error)

    actions, refusal, chart = None, "", None
    if standing.is_launched:
        (actions, refusal), chart = await asyncio.gather(count_actions(), read_chart(visit, standing.message))
    return {
        "campaign": standing,
        "steps": list_steps(visit, standing),
        "rates": list_rates(visit, standing),
        "actions": actions,
        "refusal": refusal,
        "last_time": retargetable_until(visit, standing),
        "chart": chart,
        "failures": [reason for reason in standing.message.counts.reasons if reason.signal in ("failed", "skipped")],
        "failing": find_narrowed(visit, standing.message.channel, "failed"),
        "links": list_links(standing),
        "clicking": find_narrowed(visit, standing.message.channel, "clicked"),
    }


def name_links(links: Sequence[str]) -> dict[str, str]:
    """The tracked links of a campaign by the codes of the clicks on them."""
    return {str(number): link for number, link in enumerate(links)}


def list_links(standing: Standing) -> list[ClickedLink]:
    """The campaign's tracked links in the content's order, also those that nobody clicked, and what else was clicked."""
    counts = {reason.reason_code: reason.count for reason in standing.message.counts.reasons if reason.signal == "clicked"}
    addresses = name_links(standing.message.links)
    codes = dict.fromkeys([*addresses, *counts])
    return [ClickedLink(code, addresses.get(code, code), counts.get(code, 0)) for code in codes]


def find_narrowed(visit: Visit, channel: str, signal: str) -> str:
    """The simplest action that can be narrowed to a signal's reasons, by which who failed for one is retargeted, or who clicked
    a link; empty where there is none."""
    found = visit.console.registry.types.get(channel)
    actions = found.actions if found else {}
    asking = [name for name, action in actions.items() if action.reasoned == signal]
    return min(asking, key=lambda name: len(actions[name].expression.names), default="")


def retargetable_until(visit: Visit, standing: Standing) -> datetime | None:
    """When what people did is forgotten."""
    return standing.launch_time and standing.launch_time + timedelta(days=visit.app.retention_days)


async def change_state(visit: Visit) -> Response:
    """Pause, resume, cancel or unschedule, as the pressed button says."""
    name, client = visit.name("campaigns", visit.param("campaign")), visit.client.campaigns
    match (await visit.read_form()).get("do"):
        case "pause":
            await client.PauseCampaign(campaigns_pb2.PauseCampaignRequest(name=name))
        case "resume":
            await client.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=name))
        case "cancel":
            await client.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=name))
        case "unschedule":
            waiting = await client.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
            await client.UnscheduleCampaign(campaigns_pb2.UnscheduleCampaignRequest(name=name))
            if waiting.HasField("follow_up"):
                # The draft's form still has the delay, for the next launch.
                plan = Plan.wait_for(waiting.follow_up.delay.ToTimedelta()).store()
                async with transaction(visit.console.engine) as conn:
                    await keep_unfinished(conn, visit.app.app_id, read_id(name), None, plan)
        case _:
            raise FieldsInvalid([Violation("do", "is none of pause, resume, cancel and unschedule")])
    return visit.redirect(f"/campaigns/{visit.param('campaign')}")
