"""Reconciliation: people of whom nobody knows whether they were messaged are looked up at the provider."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest

from aftertouch.channels import Accepted, NotTaken, Outcome, Unclear
from aftertouch.delivery.lookup import LOOK_UP_AFTER, LOOK_UP_FOR
from aftertouch.delivery.outcomes import MOST_TRIES
from aftertouch.store.app_secrets import delete_own_settings, put_own_settings
from aftertouch.store.apps import find_app
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from tests.e2e.pigeons import Loft, Messages, OwlChannel, accept_all, open_loft
from tests.fix_database import clone_database
from tests.fix_world import World, run_world

State = campaigns_pb2.Campaign.State


@pytest.fixture(scope="module")
async def world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world in which nobody sends but the tests."""
    async with clone_database(postgres_url, template) as url, run_world(url, extra=[OwlChannel], send_units=0) as world:
        yield world


@pytest.fixture
async def owls(world: World) -> AsyncIterator[Loft]:
    async with open_loft(world, OwlChannel) as loft:
        loft.channel.asked.clear()
        loft.channel.findings.clear()
        yield loft


async def crash_in_a_call(owls: Loft) -> None:
    """A sender dies after the provider was handed the first messages, at most four batches of them."""
    reached = asyncio.Event()

    async def hang(messages: Messages) -> Sequence[Outcome]:
        reached.set()
        return await asyncio.get_running_loop().create_future()

    owls.channel.script = hang
    crashing = asyncio.create_task(owls.make_sender(await owls.claim()).run())
    await reached.wait()
    crashing.cancel()
    await asyncio.gather(crashing, return_exceptions=True)
    owls.channel.script = accept_all
    await owls.pass_time()


async def test_looked_up_people_are_sent_or_sent_again_or_stay_unclear(owls: Loft) -> None:
    name = await owls.launch(3)
    await crash_in_a_call(owls)
    owls.channel.findings |= {"p0-0": Accepted(message_id="owl-1"), "p1-0": NotTaken()}
    await owls.send()
    assert not owls.channel.asked, "the provider's list may not have them yet"
    await owls.pass_time(LOOK_UP_AFTER)
    await owls.send()
    assert sorted(owls.channel.asked) == ["p0-0", "p1-0", "p2-0"]
    by_person = {tree.partition("-")[0]: copies for (tree, _), copies in owls.channel.copies.items()}
    assert by_person == {"p0": 1, "p1": 2, "p2": 1}
    campaign = await owls.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], campaign.counts.unclear) == (State.SENDING, 2, 1)
    # What was sent again was unclear for a moment, so the time in which the rest is looked up began anew.
    await owls.pass_time(LOOK_UP_AFTER)
    await owls.send()
    assert (await owls.get_campaign(name)).state == State.SENDING
    await owls.pass_time(LOOK_UP_FOR)
    await owls.send()
    campaign = await owls.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], campaign.counts.unclear) == (State.SENT, 2, 1)
    assert len(owls.channel.handed) == 4


@pytest.mark.parametrize("is_other_app", [False, True])
async def test_message_of_another_campaign_is_not_taken_for_one_that_was_cut_off(
    is_other_app: bool, world: World, owls: Loft
) -> None:
    """The same words had gone to the same people a moment before, and whoever was never sent these was counted as sent."""
    prefix = owls.client.parent

    async def name_each(messages: Messages) -> Sequence[Outcome]:
        return [Accepted(message_id=f"{prefix}-{message.address.key}") for message in messages]

    owls.channel.script = name_each
    await owls.launch(2)
    await owls.send()
    async with AsyncExitStack() as stack:
        # Apps without an account of their own share the server's.
        later = await stack.enter_async_context(open_loft(world, OwlChannel)) if is_other_app else owls
        name = await later.launch(2)
        await crash_in_a_call(later)
        later.channel.findings |= {f"p{index}-0": Accepted(message_id=f"{prefix}-p{index}-0") for index in range(2)}
        await later.send()
        await later.pass_time(LOOK_UP_AFTER)
        await later.send()
        counts = (await later.get_campaign(name)).counts
    assert (counts.signals["sent"], counts.unclear) == (0, 2)


async def test_people_of_whom_nothing_can_be_asked_any_more_hold_up_no_campaign(owls: Loft) -> None:
    """A message is told by its address; whoever unsubscribed since has none."""
    name = await owls.launch(2)
    await crash_in_a_call(owls)
    owls.channel.findings |= {"p1-0": Accepted(message_id="owl-2")}
    await owls.opt_out("p0")
    await owls.send()
    for _ in range(2):
        assert (await owls.get_campaign(name)).state == State.SENDING
        await owls.pass_time(LOOK_UP_AFTER)
        await owls.send()
    campaign = await owls.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], campaign.counts.unclear) == (State.SENT, 1, 1)
    assert owls.channel.asked == ["p1-0"]


async def test_what_may_have_gone_by_another_account_is_not_asked_of_the_new_one(owls: Loft) -> None:
    name = await owls.launch(2)
    await crash_in_a_call(owls)
    handed = list(owls.channel.handed)
    # Whoever asked the account that the app has now would hear that it never took them.
    owls.channel.findings |= {"p0-0": NotTaken(), "p1-0": NotTaken()}
    core = owls.world.core
    async with transaction(core.engine) as conn:
        app = await find_app(conn, owls.client.parent.removeprefix("apps/"))
        assert app is not None
        await put_own_settings(conn, core.context.vault, app.app_id, "owl", {})
        assert await delete_own_settings(conn, app.app_id, "owl")
    await owls.pass_time(LOOK_UP_AFTER)
    await owls.send()
    assert (owls.channel.asked, owls.channel.handed) == ([], handed)
    campaign = await owls.get_campaign(name)
    assert (campaign.state, campaign.counts.unclear) == (State.SENT, 2)


async def test_message_found_late_is_sent(owls: Loft) -> None:
    name = await owls.launch(1)
    await crash_in_a_call(owls)
    await owls.send()
    for _ in range(3):
        await owls.pass_time(LOOK_UP_AFTER)
        await owls.send()
    assert (await owls.get_campaign(name)).state == State.SENDING
    owls.channel.findings["p0-0"] = Accepted()
    await owls.pass_time(LOOK_UP_AFTER)
    await owls.send()
    campaign = await owls.get_campaign(name)
    assert (campaign.state, campaign.counts.signals["sent"], len(owls.channel.handed)) == (State.SENT, 1, 1)


async def test_resumed_campaign_is_not_looked_up_too_early(owls: Loft) -> None:
    name = await owls.launch(1)
    await crash_in_a_call(owls)
    owls.channel.findings["p0-0"] = NotTaken()
    await owls.send()
    await owls.client.campaigns.PauseCampaign(campaigns_pb2.PauseCampaignRequest(name=name))
    await owls.client.campaigns.ResumeCampaign(campaigns_pb2.ResumeCampaignRequest(name=name))
    await owls.send()
    assert not owls.channel.asked
    assert len(owls.channel.handed) == 1
    await owls.pass_time(LOOK_UP_AFTER)
    await owls.send()
    assert ((await owls.get_campaign(name)).state, len(owls.channel.handed)) == (State.SENT, 2)


async def test_crash_after_a_look_up_waits_again_before_the_next(owls: Loft) -> None:
    """The holder that died may have been cut off only from us, and its call still be under way."""
    await owls.launch(1)
    await crash_in_a_call(owls)
    owls.channel.findings["p0-0"] = NotTaken()
    await owls.send()
    await owls.pass_time(LOOK_UP_AFTER)
    await crash_in_a_call(owls)
    assert len(owls.channel.handed) == 2
    owls.channel.asked.clear()
    await owls.send()
    assert not owls.channel.asked
    await owls.pass_time(LOOK_UP_AFTER)
    await owls.send()
    assert len(owls.channel.handed) == 3


async def test_message_that_is_never_taken_fails_in_the_end(owls: Loft) -> None:
    name = await owls.launch(1)
    owls.channel.findings["p0-0"] = NotTaken()

    async def lose(messages: Messages) -> Sequence[Outcome]:
        return [Unclear(detail="silence") for _ in messages]

    owls.channel.script = lose
    for _ in range(2 * MOST_TRIES + 2):
        if (await owls.get_campaign(name)).state == State.SENT:
            break
        await owls.send()
        await owls.pass_time(LOOK_UP_AFTER + timedelta(minutes=1))
    assert (await owls.read_recipients(name))["p0"].reasons == ["transient/not_taken"]
    assert len(owls.channel.handed) == MOST_TRIES
