"""What providers report over HTTP: suppressed subscriptions, repeats, and news that nobody understands."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from typing import Any

import aiohttp
from sqlalchemy import text

from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.store.engine import transaction
from aftertouch.v1 import contacts_pb2
from tests.fix_world import OpenWorld, World

_State = contacts_pb2.Subscription.State
CHANNELS = ("sms", "whatsapp", "push")
STATES = {
    **dict.fromkeys(("21610", "131050"), _State.OPTED_OUT),
    **dict.fromkeys(("21211", "131026", "410"), _State.INVALID),
}
"""What the providers' codes mean for the address that they are about."""


async def post_statuses(world: World, *statuses: dict[str, Any]) -> int:
    """Report WhatsApp statuses as Meta does, and return the answer's status."""
    value = {"messaging_product": "whatsapp", "statuses": list(statuses)}
    update = {"object": "whatsapp_business_account", "entry": [{"changes": [{"field": "messages", "value": value}]}]}
    body = json.dumps(update).encode()
    signature = hmac.new(world.sandbox.settings.app_secret.encode(), body, hashlib.sha256).hexdigest()
    url = f"http://{world.addresses.http}/v1/webhooks/whatsapp"
    headers = {"x-hub-signature-256": f"sha256={signature}"}
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as answer:
        return answer.status


async def read_unrecognized(world: World) -> list[str]:
    await world.wait_until_stored()
    async with transaction(world.core.engine) as conn:
        return list((await conn.execute(text("SELECT item FROM unrecognized_receipts ORDER BY id"))).scalars())


async def test_reports_of_gone_and_stopped_people_end_their_subscriptions(open_world: OpenWorld) -> None:
    shares = Shares(sms_opted_out=0.1, sms_gone=0.1, whatsapp_gone=0.1, whatsapp_opted_out=0.1, push_gone=0.1)
    async with open_world(SandboxSettings(size=90, time_scale=0.02, shares=shares)) as world:
        await world.import_people()
        for channel in CHANNELS:
            await world.launch((await world.create_campaign(channel)).name)
        expected = {
            (entry.person.external_id, entry.channel): STATES[failed.code or ""]
            for entry in world.sandbox.truth.entries
            if entry.person and (failed := entry.signals.get("failed")) and failed.code in STATES
        }
        found: dict[tuple[str, str], int] = {}
        for person in world.sandbox.population:
            request = contacts_pb2.GetContactRequest(name=f"{world.client.parent}/contacts/{person.external_id}")
            contact = await world.client.contacts.GetContact(request)
            for subscription in contact.subscriptions:
                if subscription.state != _State.ACTIVE:
                    found[person.external_id, subscription.channel] = subscription.state
        assert found == expected
        assert {(channel, state) for (_, channel), state in found.items()} == {
            ("sms", _State.OPTED_OUT),
            ("sms", _State.INVALID),
            ("whatsapp", _State.OPTED_OUT),
            ("whatsapp", _State.INVALID),
            ("push", _State.INVALID),
        }
        before = len(world.sandbox.truth.entries)
        for channel in CHANNELS:
            await world.launch((await world.create_campaign(channel)).name)
        again = {(entry.person.external_id, entry.channel) for entry in world.sandbox.truth.entries[before:] if entry.person}
        assert again
        assert not again & expected.keys()


async def test_same_report_twice_counts_once(world: World) -> None:
    await world.import_people()
    draft = await world.create_campaign("whatsapp")
    await world.launch(draft.name)
    before = Counter((await world.get_campaign(draft.name)).counts.signals)
    entry = next(entry for entry in world.sandbox.truth.entries if "sent" in entry.signals and "read" not in entry.signals)
    status = {"id": entry.message_id, "status": "read", "timestamp": "1", "biz_opaque_callback_data": entry.token}
    assert [await post_statuses(world, status, status) for _ in range(3)] == [200] * 3
    after = Counter((await world.get_campaign(draft.name)).counts.signals)
    assert after["read"] == before["read"] + 1


async def test_news_that_nobody_understands_is_kept_and_loses_no_other(world: World) -> None:
    await world.import_people()
    draft = await world.create_campaign("whatsapp")
    await world.launch(draft.name)
    before = (await world.get_campaign(draft.name)).counts.signals["read"]
    entry = next(entry for entry in world.sandbox.truth.entries if "sent" in entry.signals and "read" not in entry.signals)
    read = {"id": entry.message_id, "status": "read", "timestamp": "1", "biz_opaque_callback_data": entry.token}
    forged = "AQ" + entry.token[2:12] + "A" * 12
    strange = [
        {**read, "status": "teleported"},
        {**read, "status": "nul\u0000 and half a \ud83d"},
        {**read, "biz_opaque_callback_data": forged},
        {"status": "read"},
    ]
    assert await post_statuses(world, *strange, read) == 200
    assert (await world.get_campaign(draft.name)).counts.signals["read"] == before + 1
    kept = await read_unrecognized(world)
    assert any("teleported" in item for item in kept)
    assert len(kept) == len(strange)


async def test_odd_code_of_a_failure_is_kept(world: World) -> None:
    """A code that is text is none of Meta's, but Twilio's form could hold anything."""
    await world.import_people()
    draft = await world.create_campaign("whatsapp")
    await world.launch(draft.name)
    entry = next(entry for entry in world.sandbox.truth.entries if "sent" in entry.signals)
    status = {"id": entry.message_id, "status": "failed", "biz_opaque_callback_data": entry.token}
    assert await post_statuses(world, {**status, "errors": [{"code": 10**80}]}) == 200
    assert await post_statuses(world, {**status, "errors": [{"code": "x\u0000"}]}) == 200
    reasons = {reason.reason_code for reason in (await world.get_campaign(draft.name)).counts.reasons}
    assert {str(10**80)[:64], "unknown"} <= reasons
