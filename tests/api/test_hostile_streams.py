"""Streams of events from callers who do not keep to the protocol, and what a stream says of events that it leaves out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from aftertouch.v1 import campaigns_pb2, events_pb2
from tests.fix_world import World
from tests.refusals import refuse

Reason = events_pb2.RejectedEvent.Reason
_numbers = itertools.count(1)


def new_producer() -> str:
    return f"producer-{next(_numbers)}"


def open_stream(producer: str, parent: str = "apps/acme") -> events_pb2.StreamEventsRequest:
    return events_pb2.StreamEventsRequest(open=events_pb2.OpenStream(parent=parent, producer=producer))


def write_batch(position: int, *events: events_pb2.Event) -> events_pb2.StreamEventsRequest:
    return events_pb2.StreamEventsRequest(batch=events_pb2.EventsBatch(position=position, events=events))


async def converse(world: World, *requests: events_pb2.StreamEventsRequest) -> list[events_pb2.StreamEventsResponse]:
    return [answer async for answer in world.client.events.StreamEvents(iter(requests))]


NOWHERE = events_pb2.Event(token="A" * 24, signal="delivered")


async def test_stream_goes_on_after_the_position_that_it_answers(shared_world: World) -> None:
    producer = new_producer()
    first = await converse(shared_world, open_stream(producer), write_batch(1, NOWHERE), write_batch(2))
    again = await converse(shared_world, open_stream(producer), write_batch(3, NOWHERE))
    assert (first[0].committed_position, first[-1].committed_position) == (0, 2)
    assert (again[0].committed_position, again[-1].committed_position) == (2, 3)


@pytest.mark.parametrize("position", [0, 2, -1, (1 << 63) - 1])
async def test_batch_out_of_order_is_refused_and_not_stored(shared_world: World, position: int) -> None:
    producer = new_producer()
    refusal = await refuse(converse(shared_world, open_stream(producer), write_batch(position, NOWHERE)))
    assert refusal.reason == "POSITION_OUT_OF_ORDER"
    assert (await converse(shared_world, open_stream(producer)))[0].committed_position == 0


async def test_stream_that_is_not_opened_is_refused(shared_world: World) -> None:
    empty = events_pb2.StreamEventsRequest()
    for requests in ([write_batch(1, NOWHERE)], [], [empty]):
        assert (await refuse(converse(shared_world, *requests))).reason == "STREAM_NOT_OPENED"
    twice = open_stream(new_producer())
    assert (await refuse(converse(shared_world, twice, twice))).reason == "STREAM_NOT_OPENED"


@pytest.mark.parametrize("producer", ["", "Upper", "-a", "a-", "a b", "a\0", "é", "x" * 64])
async def test_producer_of_another_form_is_refused(shared_world: World, producer: str) -> None:
    assert "open.producer" in (await refuse(converse(shared_world, open_stream(producer)))).fields


async def test_batch_of_too_many_events_is_refused(shared_world: World) -> None:
    many = write_batch(1, *[NOWHERE] * 10_001)
    assert (await refuse(converse(shared_world, open_stream(new_producer()), many))).reason == "FIELDS_INVALID"


HOSTILE: dict[str, Any] = {
    "nothing": {},
    "no signal": {"token": "A" * 24},
    "no target": {"signal": "delivered"},
    "nul in the token": {"token": "\0" * 24, "signal": "delivered"},
    "nul in the signal": {"token": "A" * 24, "signal": "\0"},
    "nul in the code": {"token": "A" * 24, "signal": "failed", "reason_code": "\0"},
    "nul in the external_id": {"recipient": {"campaign": "apps/acme/campaigns/x", "external_id": "\0"}, "signal": "delivered"},
    "nul in the campaign": {"recipient": {"campaign": "apps/acme/campaigns/\0", "external_id": "x"}, "signal": "delivered"},
    "nul in the channel": {"message": {"channel": "sms\0", "message_id": "x"}, "signal": "delivered"},
    "nul in the message": {"message": {"channel": "sms", "message_id": "\0"}, "signal": "delivered"},
    "huge channel": {"message": {"channel": "s" * 100_000, "message_id": "x"}, "signal": "delivered"},
    "huge signal": {"token": "A" * 24, "signal": "s" * 100_000},
    "huge external_id": {"recipient": {"campaign": "apps/acme/campaigns/x", "external_id": "x" * 100_000}, "signal": "delivered"},
    "odd token": {"token": "é" * 24, "signal": "delivered"},
    "padded token": {"token": "A" * 22 + "==", "signal": "delivered"},
    "time without an end": {"token": "A" * 24, "signal": "delivered", "time": {"seconds": (1 << 63) - 1}},
    "time before all": {"token": "A" * 24, "signal": "delivered", "time": {"seconds": -(1 << 63)}},
    "nanos below zero": {"token": "A" * 24, "signal": "delivered", "time": {"nanos": -(1 << 31)}},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE.keys())
async def test_hostile_event_is_left_out_and_the_stream_goes_on(shared_world: World, fields: dict[str, Any]) -> None:
    hostile = events_pb2.Event(**fields)
    answers = await converse(
        shared_world, open_stream(new_producer()), write_batch(1, hostile), write_batch(2, NOWHERE, hostile, NOWHERE)
    )
    rejected = {batch.position: [event.index for event in batch.events] for answer in answers for batch in answer.rejections}
    assert answers[-1].committed_position == 2
    assert rejected == {1: [0], 2: [0, 1, 2]}


async def test_time_that_overflows_is_out_of_range_for_a_real_recipient(shared_world: World) -> None:
    """Seconds whose microseconds wrap around to now: 2^64 microseconds later."""
    draft = await shared_world.create_campaign("push")
    await shared_world.launch(draft.name)
    person = next(iter(await shared_world.read_recipients(draft.name)))
    launched = (await shared_world.get_campaign(draft.name)).launch_time.seconds
    recipient = events_pb2.RecipientTarget(campaign=draft.name, external_id=person)
    for seconds in (launched + (1 << 58), (1 << 64) // 10**6 + launched + 60, -((1 << 64) // 10**6) + launched + 60):
        event = events_pb2.Event(recipient=recipient, signal="clicked", time={"seconds": seconds})
        answers = await converse(shared_world, open_stream(new_producer()), write_batch(1, event))
        reasons = [Reason.Name(found.reason) for answer in answers for batch in answer.rejections for found in batch.events]
        assert reasons == ["TIME_OUT_OF_RANGE"], seconds


@pytest.mark.parametrize("token", ["x", "é", "AAAA", "\0", "x" * 100_000])
async def test_resume_token_that_was_made_up_is_refused(shared_world: World, token: str) -> None:
    request = events_pb2.WatchEventsRequest(parent="apps/acme", resume_token=token)
    assert (await refuse(shared_world.client.events.WatchEvents(request).read())).reason == "FIELDS_INVALID"


async def test_watching_a_campaign_that_was_not_launched_is_refused(shared_world: World) -> None:
    draft: campaigns_pb2.Campaign = await shared_world.create_campaign("sms")
    for name in (draft.name, "apps/acme/campaigns/none", "apps/other/campaigns/none"):
        request = events_pb2.WatchEventsRequest(parent="apps/acme", campaign=name)
        assert (await refuse(shared_world.client.events.WatchEvents(request).read())).reason == "RESOURCE_NOT_FOUND"
