"""The server's books held against what the sandbox really took, campaign by campaign."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from sqlalchemy import text

from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.fix_world import World

SENT = campaigns_pb2.Campaign.State.SENT


async def check_books(world: World, names: Iterable[str], *, most_unclear: int) -> None:
    """Nobody was missed, nobody was texted twice, and whoever got two pushes got them with one token.

    Args:
        most_unclear: people of each campaign, on a channel whose sends are not idempotent, of whom nobody may know what became.
    """
    await world.hear_all()
    async with transaction(world.core.engine) as conn:
        rows = await conn.execute(text("SELECT campaign, campaign_id FROM campaigns"))
        numbers: dict[str, int] = {campaign: number for campaign, number in rows}
    entries = [entry for entry in world.sandbox.truth.entries if entry.token and entry.person and entry.refused is None]
    of = world.core.ledger.tokens.read([entry.token for entry in entries]).campaigns.tolist()
    for name in names:
        campaign = await world.get_campaign(name)
        assert campaign.state == SENT
        number = numbers[name.rpartition("/")[2]]
        own = [entry for entry, its in zip(entries, of, strict=True) if its == number]
        taken = Counter(entry.person.external_id for entry in own if entry.person)
        recipients = {person: set(r.signals) for person, r in (await world.read_recipients(name)).items()}
        unclear = {person for person, signals in recipients.items() if not signals & {"sent", "failed", "skipped"}}
        assert all(signals & {"attempted", "skipped"} for signals in recipients.values()), "somebody was missed"
        assert len(unclear) == campaign.counts.unclear
        assert {person for person, signals in recipients.items() if "sent" in signals} <= set(taken)
        assert set(taken) <= {person for person, signals in recipients.items() if "skipped" not in signals}
        assert not unclear & set(taken), "a receipt did not settle what became of somebody"
        if campaign.channel == "push":
            # A token is a person in a campaign: with it as Topic, the second message replaces the first.
            assert not unclear
            assert len({entry.token for entry in own}) == len(taken)
        else:
            assert max(taken.values(), default=0) <= 1, "somebody was texted twice"
            assert len(unclear) <= most_unclear
