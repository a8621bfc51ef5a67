"""Two push services, of which one is in trouble: its people wait and are not written off, and everybody else's message leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import pytest
from sqlalchemy import text

from aftertouch.contact_files import read_contacts
from aftertouch.delivery import pace
from aftertouch.delivery import sender as sending
from aftertouch.delivery.outcomes import MOST_TRIES
from aftertouch.sandbox import Sandbox, SandboxSettings, Shares
from aftertouch.sandbox.faults import Fault, Mode
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.fix_world import OpenWorld, World

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

SENT = campaigns_pb2.Campaign.State.SENT
EVERYBODY = Shares(all_channels=1.0, push_gone=0)


@dataclass
class Lands:
    """A world whose people have their browsers at two push services."""

    world: World
    far: Sandbox
    """Of which only the push service is spoken to."""
    near_people: set[str]
    far_people: set[str]

    async def launch(self, people: set[str]) -> str:
        """Launch a campaign to these people, and return its name."""
        names = [self.world.client.name("contacts", person) for person in sorted(people)]
        given = campaigns_pb2.GivenContacts(contacts=names)
        name = str((await self.world.create_campaign("push", campaigns_pb2.Audience(given_contacts=given))).name)
        await self.world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
        return name

    async def find_sent(self, name: str) -> set[str]:
        return {person for person, found in (await self.world.read_recipients(name)).items() if "sent" in found.signals}

    async def wait_for_near_people(self, name: str) -> None:
        async with asyncio.timeout(60):
            while await self.find_sent(name) != self.near_people:  # noqa: ASYNC110 - there is only the next call to wait on
                await asyncio.sleep(0.05)

    async def check_books(self, campaigns: Mapping[str, set[str]]) -> None:
        """These people were sent these campaigns, which were the only ones, and each message was taken once."""
        for name, people in campaigns.items():
            campaign = await self.world.wait_until_sent(name)
            assert (campaign.state, campaign.counts.signals.get("failed", 0)) == (SENT, 0), campaign.state_reason
            assert await self.find_sent(name) == people
        for sandbox, land in ((self.world.sandbox, self.near_people), (self.far, self.far_people)):
            taken = Counter(entry.token for entry in sandbox.truth.entries)
            assert (set(taken.values()), len(taken)) == ({1}, sum(len(people & land) for people in campaigns.values()))


@pytest.fixture
async def lands(open_world: OpenWorld) -> AsyncIterator[Lands]:
    near, far = (SandboxSettings(seed=seed, size=size, shares=EVERYBODY) for seed, size in ((1, 30), (2, 2)))
    async with open_world(near, send_units=2) as world, Sandbox(far) as away:
        no_phones = {"sms.phone": "", "whatsapp.phone": ""}
        rows = [row | no_phones for row in world.sandbox.population.list_rows()]
        far_rows = [row | no_phones | {"external_id": f"far-{row['external_id']}"} for row in away.population.list_rows()]
        imported = await world.client.import_contacts(read_contacts([*rows, *far_rows]))
        assert imported.rejected_count == 0, imported.rejections
        near_people, far_people = ({row["external_id"] for row in some} for some in (rows, far_rows))
        yield Lands(world, away, near_people, far_people)


async def test_rest_that_one_push_service_asks_for_holds_up_no_other(lands: Lands) -> None:
    """One 429 with half an hour held every browser."""
    lands.far.faults.set(Fault(channel="push", mode="429_retry_after", retry_after=1800))
    everybody = lands.near_people | lands.far_people
    campaigns = {}
    for _ in range(2):
        name = await lands.launch(everybody)
        campaigns[name] = everybody
        await lands.wait_for_near_people(name)
    assert lands.far.faults.strikes["push 429_retry_after"] <= len(lands.far_people), "it was asked again"
    lands.far.faults.clear()
    async with transaction(lands.world.core.engine) as conn:
        # Half an hour passes.
        await conn.execute(text("DELETE FROM paces"))
        await conn.execute(text("UPDATE send_units SET ready_time = now()"))
    await lands.check_books(campaigns)


@pytest.mark.parametrize("mode", ["500", "503"])
async def test_outage_of_one_push_service_writes_nobody_off_while_another_goes_on(
    lands: Lands, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five minutes without Apple all of its people had failed, since Google's took what they were sent."""
    for module in (pace, sending):
        monkeypatch.setattr(module, "back_off", lambda tries: timedelta(milliseconds=20))
    lands.far.faults.set(Fault(channel="push", mode=mode, retry_after=0))
    everybody = lands.near_people | lands.far_people
    first = await lands.launch(everybody)
    campaigns = {first: everybody}
    async with asyncio.timeout(300):
        while lands.far.faults.strikes[f"push {mode}"] <= (MOST_TRIES + 1) * len(lands.far_people):
            name = await lands.launch(lands.near_people)
            campaigns[name] = lands.near_people
            await lands.wait_for_near_people(name)
    assert await lands.find_sent(first) == lands.near_people
    lands.far.faults.clear()
    await lands.check_books(campaigns)
