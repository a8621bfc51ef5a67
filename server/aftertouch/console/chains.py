"""The chain that a campaign belongs to, as a tree with what each wave added, and what messaging did beside who was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.campaigns import describe, read_plain
from aftertouch.console.visits import Visit, read_id
from aftertouch.errors import AftertouchError
from aftertouch.signals import CORE_IMPLICATIONS
from aftertouch.v1 import campaigns_pb2, retargeting_pb2

State = campaigns_pb2.Campaign.State


@dataclass(frozen=True)
class Member:
    """A campaign of a chain, at its depth."""

    id: str
    depth: int
    campaign: retargeting_pb2.ChainCampaign
    channel: str
    """For people."""
    signals: Sequence[tuple[str, int]]
    """The channel's own signals, and of how many people they are true who had done so in no campaign before."""
    rule: str
    """Of a follow-up that waits: after what it goes out."""

    @property
    def state(self) -> str:
        """The state's name."""
        return State.Name(self.campaign.state)


async def show(visit: Visit) -> Response:
    """The part of a campaign's page that shows its chain; empty when it has none."""
    source = await read_plain(visit)
    root = source.message.root or source.message.name
    wanted = campaigns_pb2.CampaignFilter(root=root)
    request = campaigns_pb2.ListCampaignsRequest(parent=visit.parent, page_size=1, filter=wanted)
    if not (await visit.client.campaigns.ListCampaigns(request)).campaigns:
        return visit.render("chain.html", refusal="", members=[])
    try:
        report = await visit.client.retargeting.GetChainReport(retargeting_pb2.GetChainReportRequest(name=source.message.name))
    except AftertouchError as error:
        return visit.render("chain.html", refusal=words.explain(error), members=[])
    wanted.state = State.SCHEDULED
    request = campaigns_pb2.ListCampaignsRequest(parent=visit.parent, page_size=1000, filter=wanted)
    waiting = await describe(visit, list((await visit.client.campaigns.ListCampaigns(request)).campaigns))
    members = arrange(visit, report, {standing.message.name: standing.rule for standing in waiting})
    telling = {
        name
        for kind in visit.console.registry.types.values()
        for action in kind.actions.values()
        for name in action.expression.names
    }
    telling = (telling - CORE_IMPLICATIONS.keys()) | {""}
    return visit.render(
        "chain.html",
        refusal="",
        campaign=source,
        members=members,
        people=report.people,
        comparisons=[
            (
                names[compared.campaign],
                compared,
                [(_name_signal(visit, found.signal), found) for found in compared.differences if found.signal in telling],
            )
            for names in [{member.campaign.campaign: member for member in members}]
            for compared in report.comparisons
        ],
    )


def arrange(visit: Visit, report: retargeting_pb2.ChainReport, rules: Mapping[str, str]) -> list[Member]:
    """The campaigns of a chain, each after what it asks first, in the order of the branches.

    Args:
        rules: of those that wait, by name.
    """
    campaigns = {found.campaign: found for found in report.campaigns}
    members: list[Member] = []

    def walk(name: str, depth: int) -> None:
        found = campaigns.pop(name)
        kind = visit.console.registry.types.get(found.channel)
        own = [(signal.label, signal.name) for signal in kind.channel.signals] if kind else []
        news = [(label, found.added.signals[signal]) for label, signal in own if found.added.signals[signal]]
        channel = kind.channel.label if kind else found.channel
        members.append(Member(read_id(name), depth, found, channel, news, rules.get(name, "")))
        for wave in list(campaigns.values()):
            if wave.campaign in campaigns and next((source for source in wave.sources if source in known), "") == name:
                walk(wave.campaign, depth + 1)

    known = set(campaigns)
    if report.root in campaigns:
        walk(report.root, 0)
    # What asked a campaign that was deleted, or one outside of the chain.
    while campaigns:
        walk(next(iter(campaigns)), 1)
    return members


def _name_signal(visit: Visit, signal: str) -> str:
    """A signal as some channel calls it; whoever a message arrived at was reached."""
    if not signal:
        return "Reached"
    labels = (own.label for kind in visit.console.registry.types.values() for own in kind.channel.signals if own.name == signal)
    return next(labels, signal.capitalize())
