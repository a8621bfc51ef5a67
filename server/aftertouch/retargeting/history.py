"""A person's history: the campaigns that they are a recipient of, and what is true of them in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncConnection

from aftertouch.declarations import ChannelType
from aftertouch.retargeting.report import CORE_EVIDENCE
from aftertouch.store.campaigns import Campaign, list_launched, read_campaigns
from aftertouch.store.kinds import Kind, load_kinds
from aftertouch.store.recipients import Place, find_places, read_true_kinds

LOOKED_THROUGH = 100
"""Campaigns whose rolls are looked through in one statement."""


@dataclass(frozen=True)
class Known:
    """What is known of one person in one campaign."""

    kinds: frozenset[Kind]
    signals: tuple[str, ...]
    """What is true, implied signals included, sorted."""
    reasons: tuple[str, ...]
    """Why they failed or were skipped, sorted."""


@dataclass(frozen=True)
class Participation:
    """A campaign that a person is a recipient of."""

    campaign: Campaign
    known: Known


@dataclass(frozen=True)
class HistoryPage:
    """Some of a person's campaigns, the last made first."""

    participations: list[Participation]
    before: int | None
    """The campaign number to go on before; None when there are no more."""


def weigh_kinds(kinds: Iterable[Kind], evidence: Mapping[str, frozenset[str]]) -> Known:
    """What kinds that are true of a person mean on a channel."""
    found = frozenset(kinds)
    reported = {kind.signal for kind in found}
    return Known(
        found,
        tuple(sorted(signal for signal, proving in evidence.items() if proving & reported)),
        tuple(sorted(kind.reason for kind in found if kind.signal in ("failed", "skipped") and kind.reason)),
    )


async def page_history(
    conn: AsyncConnection,
    app_id: int,
    channels: Mapping[str, ChannelType],
    number: int,
    before: int | None,
    *,
    size: int,
    most_campaigns: int,
) -> HistoryPage:
    """A person's campaigns that were made before the one with the number ``before``.

    Args:
        size: how many at the most.
        most_campaigns: how many launched campaigns are looked through at the most.
    """
    places: list[Place] = []
    left = most_campaigns
    while left and len(places) < size:
        wanted = min(left, LOOKED_THROUGH)
        candidates = await list_launched(conn, app_id, before, wanted)
        places += (await find_places(conn, number, candidates))[: size - len(places)]
        before = places[-1].campaign_id if len(places) == size else candidates[-1] if len(candidates) == wanted else None
        if before is None:
            break
        left -= wanted
    found = await read_campaigns(conn, [place.campaign_id for place in places])
    kinds = await read_true_kinds(conn, places)
    # Read afterwards: a kind that is new since has its number by now.
    numbered = await load_kinds(conn)
    return HistoryPage(
        [
            Participation(
                campaign := found[place.campaign_id],
                weigh_kinds((numbered[kind] for kind in kinds.get(place, ())), find_evidence(channels, campaign)),
            )
            for place in places
        ],
        before,
    )


def find_evidence(channels: Mapping[str, ChannelType], campaign: Campaign) -> Mapping[str, frozenset[str]]:
    """What proves each signal of a campaign's channel; of one whose plugin is gone, what every channel has."""
    channel = channels.get(campaign.channel)
    return channel.evidence if channel else CORE_EVIDENCE
