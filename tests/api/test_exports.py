"""Exports over gRPC: every number of a campaign leads to exactly the people whom an oracle in plain Python finds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from aftertouch.retargeting import report
from aftertouch.rolls.chunks import CHUNK, Numbers
from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.signals import parse
from aftertouch.v1 import campaigns_pb2, contacts_pb2, events_pb2, retargeting_pb2
from tests.api.test_streams import delivered, launch_quietly, make_tokens
from tests.fix_database import clone_database
from tests.fix_world import World, run_world
from tests.refusals import refuse

CHANNELS = ("sms", "whatsapp", "push")
Recipients = dict[str, campaigns_pb2.Recipient]


@pytest.fixture(scope="module")
async def shared_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world in which much goes wrong and many stay silent."""
    troubled = Shares(
        sms_opted_out=0.1, sms_unreachable=0.2, sms_no_report=0.3, whatsapp_gone=0.15, whatsapp_switched_off=0.2, push_silent=0.3
    )
    settings = SandboxSettings(size=90, time_scale=0.05, shares=troubled)
    async with clone_database(postgres_url, template) as url, run_world(url, settings) as world:
        await world.import_people()
        yield world


@pytest.fixture(scope="module")
async def sources(shared_world: World) -> dict[str, campaigns_pb2.Campaign]:
    """A campaign that was sent on each channel."""
    made = {channel: await shared_world.create_campaign(channel) for channel in CHANNELS}
    for campaign in made.values():
        await shared_world.launch(campaign.name)
    return {channel: await shared_world.get_campaign(campaign.name) for channel, campaign in made.items()}


def start(world: World, name: str, resume_token: str = "", **wanted: Any) -> Any:
    request = campaigns_pb2.ExportRecipientsRequest(
        parent=name, filter=campaigns_pb2.RecipientFilter(**wanted), resume_token=resume_token
    )
    return world.client.campaigns.ExportRecipients(request)


async def export(world: World, name: str, **wanted: Any) -> Recipients:
    """The people who are wanted, of whom each response has said how many they are."""
    found: Recipients = {}
    totals = set()
    async for page in start(world, name, **wanted):
        assert len(page.recipients) <= 1_000
        found |= {recipient.contact.rpartition("/")[2]: recipient for recipient in page.recipients}
        totals.add(page.total_count)
    assert totals == {len(found)}
    return found


def match(people: Recipients, channel: Any, expression: str) -> set[str]:
    """The oracle: of whom an expression is true, by what ListRecipients says of each."""
    known = parse(expression, {signal.name for signal in channel.signals} | {"attempted", "sent", "failed", "skipped"})
    return {
        name
        for name, person in people.items()
        if known.evaluate(lambda signal, has=frozenset(person.signals): -1 if signal in has else 0)
    }


@pytest.mark.parametrize("channel", CHANNELS)
async def test_every_number_leads_to_its_people(
    shared_world: World, sources: dict[str, campaigns_pb2.Campaign], channel: str
) -> None:
    campaign, kind = sources[channel], shared_world.core.registry.types[channel].channel
    people = await shared_world.read_recipients(campaign.name)

    async def check(count: int, names: set[str], **wanted: Any) -> None:
        found = await export(shared_world, campaign.name, **wanted)
        assert (len(found), found) == (count, {name: people[name] for name in found}), wanted
        assert found.keys() == names, wanted

    await check(campaign.counts.recipients, set(people))
    for signal, count in campaign.counts.signals.items():
        await check(count, {name for name, person in people.items() if signal in person.signals}, signal=signal)
    assert campaign.counts.reasons
    for reason in campaign.counts.reasons:
        code = f"{reason.reason_class}/{reason.reason_code}"
        names = {name for name, person in people.items() if code in person.reasons}
        await check(reason.count, names, signal=reason.signal, reason=code)
        await check(reason.count, names, reason=code)

    listed = await shared_world.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=campaign.name))
    heard = " | ".join(["failed", *(signal.name for signal in kind.signals)])
    pending = match(people, kind, f"sent & ~({heard})")
    assert listed.pending_count or channel == "push"
    await check(listed.pending_count, pending, pending=True)
    for counted in listed.actions:
        action = counted.action
        apart = match(people, kind, action.apart_expression) if action.apart_expression else set()
        meant = match(people, kind, action.expression) - apart
        await check(counted.count, meant, action=action.action)
        await check(counted.pending_count, meant & pending, action=action.action, pending=True)
        if action.apart_expression:
            assert counted.apart_count
            await check(counted.apart_count, apart, action=action.action, apart=True)
    await check(0, set(), signal="sent", reason="recipient_gone/never heard of")


async def test_export_has_a_row_for_somebody_who_was_erased_and_no_name(shared_world: World) -> None:
    made = await shared_world.create_campaign("sms")
    await shared_world.launch(made.name)
    gone = next(iter(await shared_world.read_recipients(made.name)))
    request = contacts_pb2.EraseContactRequest(name=f"apps/acme/contacts/{gone}")
    await shared_world.client.contacts.EraseContact(request)
    found = await export(shared_world, made.name, signal="attempted")
    assert "" in found
    assert gone not in found


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"signal": "read"}, "filter.signal"),
        ({"signal": "priced"}, "filter.signal"),
        ({"action": "not_read"}, "filter.action"),
        ({"apart": True}, "filter.action"),
        ({"action": "delivered", "apart": True}, "filter.apart"),
    ],
)
async def test_export_of_what_the_channel_has_not_is_refused_at_the_field(
    shared_world: World, sources: dict[str, campaigns_pb2.Campaign], wanted: dict[str, Any], field: str
) -> None:
    assert list((await refuse(start(shared_world, sources["sms"].name, **wanted).read())).fields) == [field]


async def test_export_of_a_draft_is_nobody(shared_world: World) -> None:
    draft = await shared_world.create_campaign("sms")
    assert await export(shared_world, draft.name) == {}


async def test_export_goes_on_where_it_broke_and_tells_wrong_questions(world: World) -> None:
    source = await launch_quietly(world, "sale", 2_500)
    pages = [page async for page in start(world, source)]
    assert [len(page.recipients) for page in pages] == [1_000, 1_000, 500]
    for page, left in zip(pages, (1_500, 500, 0), strict=True):
        rest = [later async for later in start(world, source, page.resume_token)]
        assert sum(len(later.recipients) for later in rest) == left
        assert {later.total_count for later in rest} == {2_500}
    for token in (pages[0].resume_token, "x"):
        refusal = await refuse(start(world, source, token, signal="sent").read())
        assert list(refusal.fields) == ["resume_token"]


async def ingest(world: World, tokens: list[str], signal: str) -> None:
    for begin in range(0, len(tokens), 1_000):
        events = delivered(tokens[begin : begin + 1_000], signal)
        request = events_pb2.IngestEventsRequest(parent="apps/acme", events=events)
        assert not (await world.client.events.IngestEvents(request)).rejections


async def test_small_group_of_a_large_roll_costs_its_own_chunks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three people of millions: every page of the roll was read for them, and nothing was sent meanwhile."""
    asked: list[list[int]] = []

    async def read_numbers(conn: Any, campaign_id: int, positions: Numbers) -> Numbers:
        asked.append(positions.tolist())
        return await actual(conn, campaign_id, positions)

    actual = report.read_numbers
    monkeypatch.setattr(report, "read_numbers", read_numbers)
    source = await launch_quietly(world, "large", 6 * CHUNK)
    wanted = [5, 5 * CHUNK, 5 * CHUNK + 1]
    tokens = await make_tokens(world, source, 6 * CHUNK)
    await ingest(world, [tokens[position] for position in wanted], "delivered")
    pages = [page async for page in start(world, source, signal="delivered")]
    assert [len(page.recipients) for page in pages] == [3]
    assert asked == [wanted]


async def test_export_is_of_one_moment_whatever_is_heard_meanwhile(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    source = await launch_quietly(world, "busy", 2 * CHUNK)
    tokens = await make_tokens(world, source, 2 * CHUNK)
    first = np.arange(0, 2 * CHUNK, 5).tolist()
    await ingest(world, [tokens[position] for position in first], "delivered")
    is_begun, may_go_on = asyncio.Event(), asyncio.Event()
    actual = report.read_numbers

    async def read_numbers(conn: Any, campaign_id: int, positions: Numbers) -> Numbers:
        is_begun.set()
        await may_go_on.wait()
        return await actual(conn, campaign_id, positions)

    monkeypatch.setattr(report, "read_numbers", read_numbers)

    async def read() -> list[Any]:
        return [page async for page in start(world, source, signal="delivered")]

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        reading = group.create_task(read())
        await is_begun.wait()
        # Somebody is delivered to who was not, and all others click.
        await ingest(world, [tokens[1]], "delivered")
        await ingest(world, [tokens[position] for position in first[-1_000:]], "clicked")
        may_go_on.set()
    pages = reading.result()
    assert {page.total_count for page in pages} == {len(first)}
    people = [person for page in pages for person in page.recipients]
    assert len(people) == len(first)
    assert not any("clicked" in person.signals for person in people)
