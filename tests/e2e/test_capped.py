"""People whom a provider holds back: left alone on that channel until it may be tried again, and then sent to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import timedelta
from typing import cast

import pytest
from sqlalchemy import text

from aftertouch.channels import Accepted, Outcome, Refused
from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.e2e.pigeons import Loft, Messages, Nest, PigeonChannel, accept_all, open_loft
from tests.fix_database import clone_database
from tests.fix_world import OpenWorld, World, run_world

SENT = campaigns_pb2.Campaign.State.SENT


@pytest.fixture(scope="module")
async def world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world in which nobody sends but the tests."""
    async with clone_database(postgres_url, template) as url, run_world(url, extra=[PigeonChannel], send_units=0) as world:
        yield world


@pytest.fixture
async def loft(world: World) -> AsyncIterator[Loft]:
    async with open_loft(world, PigeonChannel) as loft:
        yield loft


async def pass_holds(world: World, duration: timedelta) -> None:
    """Let holds be so much nearer to their end."""
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("UPDATE subscriptions SET held_until = held_until - :duration"), {"duration": duration})


def refuse_with(refusal: Refused, *, person: str) -> Callable[[Messages], Awaitable[Sequence[Outcome]]]:
    async def answer(messages: Messages) -> Sequence[Outcome]:
        return [refusal if cast("Nest", message.address).tree == f"{person}-0" else Accepted() for message in messages]

    return answer


@pytest.mark.parametrize(
    ("refusal", "held_for"),
    [
        (Refused(code="tired"), timedelta(hours=24)),
        (Refused(code="asleep"), timedelta(hours=8)),
        (Refused(code="asleep", retry_after=timedelta(hours=2)), timedelta(hours=2)),
    ],
    ids=["by default", "for this code", "as the provider asked"],
)
async def test_person_who_is_capped_is_skipped_by_other_campaigns_until_it_ends(
    loft: Loft, refusal: Refused, held_for: timedelta
) -> None:
    loft.channel.script = refuse_with(refusal, person="p1")
    first = await loft.launch(3)
    await loft.send()
    people = await loft.read_recipients(first)
    assert (list(people["p1"].reasons), (await loft.get_campaign(first)).state) == ([f"capped/{refusal.code}"], SENT)
    loft.channel.script = accept_all
    for wait, is_held in [(held_for - timedelta(minutes=1), True), (timedelta(minutes=1), False)]:
        await pass_holds(loft.world, wait)
        later = await loft.relaunch()
        await loft.send()
        people = await loft.read_recipients(later)
        assert list(people["p1"].reasons) == (["capped/held"] if is_held else [])
        assert all("sent" in people[person].signals for person in ("p0", "p2"))
        assert (await loft.get_campaign(later)).state == SENT


async def test_person_whom_a_receipt_calls_capped_is_skipped_too(open_world: OpenWorld) -> None:
    shares = Shares(whatsapp_capped=1, whatsapp_gone=0, whatsapp_opted_out=0)
    async with open_world(SandboxSettings(size=20, time_scale=0.02, shares=shares)) as world:
        await world.import_people()
        reasons = []
        for wait in (timedelta(0), timedelta(0), timedelta(hours=24)):
            await pass_holds(world, wait)
            name = (await world.create_campaign("whatsapp")).name
            await world.launch(name)
            people = await world.read_recipients(name)
            reasons.append({reason for recipient in people.values() for reason in recipient.reasons})
        assert reasons == [{"capped/131049"}, {"capped/held"}, {"capped/131049"}]
