"""Campaigns over gRPC: from a draft to everybody's signals."""

from __future__ import annotations

from aftertouch.v1 import campaigns_pb2
from tests.fix_world import World


async def test_launched_campaign_reaches_everybody_once(world: World) -> None:
    await world.import_people()
    draft = await world.create_campaign("sms")
    await world.launch(draft.name)
    sent = await world.get_campaign(draft.name)
    people = {person.external_id for person in world.sandbox.population if "sms" in person.channels}
    messaged = [entry.person.external_id for entry in world.sandbox.truth.entries if entry.person]
    assert sent.state == campaigns_pb2.Campaign.State.SENT
    assert sorted(messaged) == sorted(people)
    assert sent.counts.recipients == len(people)
