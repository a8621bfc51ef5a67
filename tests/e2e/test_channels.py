"""The house's channels in a whole world: what only shows with a provider, a server and a database together."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import text

from aftertouch.delivery.reconciliation import Reconciler
from aftertouch.sandbox import SandboxSettings
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.fix_world import OpenWorld, World
from tests.sandbox.conftest import CERTAIN

State = campaigns_pb2.Campaign.State


def read_settings(size: int = 5) -> SandboxSettings:
    """Everybody has everything and gets everything."""
    return SandboxSettings(size=size, time_scale=0.05, shares=CERTAIN, duplicate_share=0)


async def read_limits(world: World) -> dict[str, datetime]:
    """When each limit has room again."""
    async with transaction(world.core.engine) as conn:
        rows = await conn.execute(text("SELECT key, free_time FROM paces"))
    return {row.key: row.free_time for row in rows}


async def free_limits(world: World) -> None:
    """Let every limit have room at once, and look at what waits."""
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("UPDATE paces SET free_time = now()"))
        await conn.execute(text("UPDATE send_units SET ready_time = now()"))


async def test_second_message_to_a_person_on_whatsapp_waits_for_its_turn(open_world: OpenWorld) -> None:
    environment = {"AFTERTOUCH_WHATSAPP_SECONDS_BETWEEN_MESSAGES": "3600"}
    async with open_world(read_settings(), environment=environment) as world:
        await world.import_people()
        first, second = [await world.create_campaign("whatsapp") for _ in range(2)]
        await world.launch(first.name)
        limits = await read_limits(world)
        pairs = [key for key in limits if key.startswith("whatsapp/pair/")]
        assert len(pairs) == 5
        assert limits.keys() - set(pairs) == {f"whatsapp/number/{world.sandbox.settings.phone_number_id}"}
        await world.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=second.name))
        while not await is_put_off(world):  # noqa: ASYNC110 - nothing to wait on but the next look
            await asyncio.sleep(0.02)
        assert len(world.sandbox.truth.entries) == 5
        await free_limits(world)
        assert (await world.wait_until_sent(second.name)).state == State.SENT
        assert set(Counter(entry.address for entry in world.sandbox.truth.entries).values()) == {2}


async def is_put_off(world: World) -> bool:
    """True when no unit is under way and all wait for longer than a second."""
    async with transaction(world.core.engine) as conn:
        rows = await conn.execute(
            text("SELECT bool_and(lease_until IS NULL AND ready_time > now() + interval '1 minute') FROM send_units")
        )
    return bool(rows.scalar())


async def test_pace_of_an_sms_account_is_kept_by_all_its_campaigns(open_world: OpenWorld) -> None:
    async with open_world(read_settings(), environment={"AFTERTOUCH_SMS_MESSAGES_PER_SECOND": "200"}) as world:
        await world.import_people()
        campaigns = [await world.create_campaign("sms") for _ in range(2)]
        for campaign in campaigns:
            await world.launch(campaign.name)
        assert (await read_limits(world)).keys() == {"sms/account"}
        assert len(world.sandbox.truth.entries) == 10


async def test_receipts_whose_webhooks_were_lost_are_asked_for(open_world: OpenWorld) -> None:
    shares = replace(CERTAIN, sms_unreachable=0.3, sms_no_report=0.2)
    settings = replace(read_settings(30), shares=shares, strict_retries=True, duplicate_share=0)
    # Nobody answers there, so every callback is given up.
    async with open_world(settings, public_url="http://127.0.0.1:9") as world:
        await world.import_people()
        reconciler = Reconciler(world.core.engine, world.core.ledger, world.core.registry.channels, [timedelta(0)])
        await reconciler.check()
        campaign = await world.create_campaign("sms")
        await world.launch(campaign.name)
        signals = (await world.get_campaign(campaign.name)).counts.signals
        assert (signals["sent"], signals["delivered"], signals["failed"]) == (30, 0, 0)
        await reconciler.check()
        recipients = await world.read_recipients(campaign.name)
        entries = {entry.person.external_id: entry for entry in world.sandbox.truth.entries if entry.person}
        for external_id, recipient in recipients.items():
            truth = entries[external_id].signals.keys()
            assert set(recipient.signals) & {"delivered", "failed"} == truth - {"sent"}
            assert recipient.reasons == (["transient/30003"] if "failed" in truth else [])
        counted = (await world.get_campaign(campaign.name)).counts
        # Everybody who was heard of is not asked about again, and a second look changes nothing.
        await rewind_checkups(world)
        await reconciler.check()
        assert (await world.get_campaign(campaign.name)).counts == counted


async def rewind_checkups(world: World) -> None:
    """Look at everything once more."""
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("UPDATE checkups SET checked_until = checked_until - interval '1 hour', lease_until = NULL"))
