"""Streams of events over gRPC: positions, rejections, crashes of either side, and who wins."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import numpy as np
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.client import Client, EventStream, read_reason
from aftertouch.ingest import batcher
from aftertouch.rolls.sql import write_roll
from aftertouch.rpc import events as events_service
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.partitions import create_partitions
from aftertouch.v1 import campaigns_pb2, campaigns_pb2_grpc, events_pb2, events_pb2_grpc
from tests.fix_database import CUT_CONNECTIONS
from tests.fix_world import OpenWorld, World

PEOPLE = 1_000
Reason = events_pb2.RejectedEvent.Reason


async def launch_on(engine: AsyncEngine, people: int, name: str = "sale", **fields: Any) -> None:
    """A campaign of ``acme`` that was sent to the first contacts, without sending anything."""
    async with transaction(engine) as conn:
        app_id = (await conn.execute(text("SELECT app_id FROM apps WHERE app = 'acme'"))).scalar_one()
        campaign = await create_campaign(conn, app_id, name, {"display_name": name, "channel": "sms"})
        await write_roll(conn, campaign.campaign_id, np.arange(people))
        now = datetime.now(UTC) - timedelta(minutes=4)
        values = {"state": "SENT", "recipients": people, "launch_time": now, "finish_time": now, **fields}
        await update_campaign(conn, campaign.campaign_id, **values)


async def launch_quietly(world: World, name: str, people: int = PEOPLE, **fields: Any) -> str:
    """The same in a world; returns the campaign's name."""
    await launch_on(world.core.engine, people, name, **fields)
    return f"apps/acme/campaigns/{name}"


async def make_tokens(world: World, campaign: str, count: int = PEOPLE) -> list[str]:
    """The tokens of the first people of a campaign."""
    name = campaign.rpartition("/")[2]
    async with transaction(world.core.engine) as conn:
        found = await conn.execute(text("SELECT campaign_id FROM campaigns WHERE campaign = :name"), {"name": name})
        return world.core.ledger.tokens.make(found.scalar_one(), np.arange(count))


async def count_log(world: World) -> int:
    async with transaction(world.core.engine) as conn:
        return int((await conn.execute(text("SELECT count(*) FROM events"))).scalar_one())


async def read_log(world: World) -> Counter[tuple[int, int, int]]:
    """How often each (slot, position, kind) is in the log."""
    async with transaction(world.core.engine) as conn:
        return Counter((row.slot, row.position, row.kind) for row in await conn.execute(text("SELECT * FROM events")))


async def read_bits(world: World) -> dict[tuple[int, str], bytes]:
    """All receipts by slot and signal."""
    statement = text("SELECT slot, signal, bits FROM receipts JOIN kinds USING (kind) ORDER BY slot, signal")
    async with transaction(world.core.engine) as conn:
        return {(row.slot, row.signal): row.bits for row in await conn.execute(statement)}


def delivered(tokens: Sequence[str], signal: str = "delivered") -> list[events_pb2.Event]:
    return [events_pb2.Event(token=token, signal=signal) for token in tokens]


def opening(producer: str = "importer", parent: str = "apps/acme") -> events_pb2.StreamEventsRequest:
    return events_pb2.StreamEventsRequest(open=events_pb2.OpenStream(parent=parent, producer=producer))


def batch(position: int, events: Sequence[events_pb2.Event]) -> events_pb2.StreamEventsRequest:
    return events_pb2.StreamEventsRequest(batch=events_pb2.EventsBatch(position=position, events=events))


class Stream:
    """A stream by hand, on a connection of its own."""

    def __init__(self, call: Any) -> None:
        self.call = call

    async def send(self, *requests: events_pb2.StreamEventsRequest) -> None:
        """Send, up to where the stream is refused; reading then says why."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for request in requests:
                await self.call.write(request)

    async def open(self, producer: str = "importer") -> int:
        """Open it, and return where it goes on."""
        await self.send(opening(producer))
        return (await self.read()).committed_position

    async def read(self) -> events_pb2.StreamEventsResponse:
        async with asyncio.timeout(60):
            response = await self.call.read()
        if response is grpc.aio.EOF:
            raise AssertionError(f"the stream ended: {await self.call.code()} {await self.call.details()}")
        return response

    async def read_until(self, position: int) -> list[events_pb2.StreamEventsResponse]:
        """All answers until this position is durable."""
        responses = [await self.read()]
        while responses[-1].committed_position < position:
            responses.append(await self.read())
        return responses

    async def fail(self) -> tuple[grpc.StatusCode, str]:
        """Read to the end, which is a refusal: its status and reason."""
        try:
            async with asyncio.timeout(60):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
        except grpc.aio.AioRpcError as error:
            return error.code(), read_reason(error)[0]
        raise AssertionError("the stream ended without a refusal")


@asynccontextmanager
async def connect(world: World, secret: str | None = None) -> AsyncIterator[Stream]:
    """A stream on a connection of its own; leaving closes the connection without a word."""
    async with grpc.aio.insecure_channel(world.addresses.grpc, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = events_pb2_grpc.EventsStub(channel)
        yield Stream(stub.StreamEvents(metadata=(("authorization", f"Bearer {secret or world.secret}"),)))


async def test_new_producer_begins_at_zero_and_an_old_one_where_it_was(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as stream:
        assert await stream.open() == 0
        await stream.send(batch(1, delivered(tokens[:10])), batch(2, delivered(tokens[10:20])))
        await stream.read_until(2)
    async with connect(world) as stream:
        assert await stream.open() == 2
    async with connect(world) as stream:
        assert await stream.open("another") == 0


async def test_streams_are_told_that_the_server_stops(open_world: OpenWorld) -> None:
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(open_world())
        campaign = await launch_quietly(world, "sale")
        tokens = await make_tokens(world, campaign)
        address, header = world.addresses.grpc, (("authorization", f"Bearer {world.secret}"),)
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = events_pb2_grpc.EventsStub(channel)
            stream = Stream(stub.StreamEvents(metadata=header))
            await stream.open()
            await stream.send(batch(1, delivered(tokens)))
            await stream.read_until(1)
            watch = Stream(stub.WatchEvents(events_pb2.WatchEventsRequest(parent="apps/acme"), metadata=header))
            assert (await watch.call.read()).resume_token
            await stack.aclose()
            assert await stream.fail() == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
            assert await watch.fail() == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")


async def test_watch_of_a_draft_is_told_that_the_server_stops(open_world: OpenWorld) -> None:
    """It used up the time that calls have to end in, and was cut off without a word."""
    async with AsyncExitStack() as stack:
        world = await stack.enter_async_context(open_world())
        draft = await world.create_campaign("sms")
        address, header = world.addresses.grpc, (("authorization", f"Bearer {world.secret}"),)
        async with grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = campaigns_pb2_grpc.CampaignsStub(channel)
            watch = Stream(stub.WatchCampaign(campaigns_pb2.WatchCampaignRequest(name=draft.name), metadata=header))
            assert (await watch.call.read()).name == draft.name
            await stack.aclose()
            assert await watch.fail() == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")


async def test_batches_are_acknowledged_in_order_and_counted(world: World) -> None:
    campaign = await launch_quietly(world, "sale")
    tokens = await make_tokens(world, campaign)
    async with connect(world) as stream:
        await stream.open()
        await stream.send(*(batch(place + 1, delivered(tokens[place * 10 : place * 10 + 10])) for place in range(50)))
        positions = [response.committed_position for response in await stream.read_until(50)]
    assert positions == sorted(set(positions))
    assert positions[-1] == 50
    assert (await world.get_campaign(campaign)).counts.signals["delivered"] == 500


async def test_half_closed_stream_ends_after_its_last_acknowledgement(world: World) -> None:
    """A client that closed its side while a batch was under way waited for ever."""
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as stream:
        await stream.open()
        await stream.send(*(batch(place, delivered(tokens)) for place in (1, 2, 3)))
        await stream.call.done_writing()
        await stream.read_until(3)
        async with asyncio.timeout(60):
            assert await stream.call.read() is grpc.aio.EOF
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_rejections_name_batch_index_and_reason_and_the_rest_is_stored(world: World) -> None:
    await world.import_people()
    async with transaction(world.core.engine) as conn:
        ids = {row.number: row.external_id for row in await conn.execute(text("SELECT * FROM contact_ids"))}
    campaign = await launch_quietly(world, "sale", people=10)
    long_ago = datetime.now(UTC) - timedelta(days=400)
    old = await launch_quietly(world, "old", people=10, launch_time=long_ago)
    tokens = await make_tokens(world, campaign, 10)
    (old_token,) = await make_tokens(world, old, 1)
    (forged,) = world.core.ledger.tokens.make(77_777, np.array([1]))
    now = int(datetime.now(UTC).timestamp())

    def by_name(campaign: str, external_id: str) -> events_pb2.Event:
        return events_pb2.Event(recipient={"campaign": campaign, "external_id": external_id}, signal="delivered")  # type: ignore[arg-type]

    def at(seconds: int) -> events_pb2.Event:
        event = events_pb2.Event(token=tokens[0], signal="delivered")
        event.time.seconds = seconds
        return event

    wrong = {
        Reason.TOKEN_INVALID: [
            events_pb2.Event(token="A" * 24, signal="delivered"),
            events_pb2.Event(token="no token", signal="delivered"),
            events_pb2.Event(token=forged, signal="delivered"),
        ],
        Reason.CAMPAIGN_UNKNOWN: [by_name("apps/acme/campaigns/none", ids[0]), by_name("apps/other/campaigns/sale", ids[0])],
        Reason.CONTACT_UNKNOWN: [by_name(campaign, "nobody")],
        Reason.NOT_A_RECIPIENT: [by_name(campaign, ids[20])],
        Reason.SIGNAL_UNKNOWN: [
            *delivered(tokens[:1], "levitated"),
            *delivered(tokens[:1], "attempted"),
            *delivered(tokens[:1], "skipped"),
        ],
        Reason.TIME_OUT_OF_RANGE: [at(now - 3600), at(now + 3600), at(2**62)],
        Reason.MALFORMED: [
            events_pb2.Event(token=tokens[0]),
            events_pb2.Event(signal="delivered"),
            events_pb2.Event(token=tokens[0], signal="x" * 65),
        ],
        Reason.MESSAGE_UNKNOWN: [events_pb2.Event(message={"channel": "sms", "message_id": "SM0"}, signal="delivered")],  # type: ignore[arg-type]
        Reason.CAMPAIGN_TOO_OLD: [events_pb2.Event(token=old_token, signal="delivered")],
    }
    expected = [(place, reason) for place, reason in enumerate(reason for reason, events in wrong.items() for _ in events)]
    mixed: list[events_pb2.Event] = []
    for event, token in zip([event for events in wrong.values() for event in events], tokens * 2, strict=False):
        mixed += [event, *delivered([token], "sent")]
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, delivered(tokens)), batch(2, mixed))
        rejections = [rejected for response in await stream.read_until(2) for rejected in response.rejections]
    assert [rejected.position for rejected in rejections] == [2]
    found = [(rejected.index, rejected.reason) for rejected in rejections[0].events]
    assert found == [(2 * place, reason) for place, reason in expected]
    assert all(rejected.description for rejected in rejections[0].events)
    assert await count_log(world) == 10 + len(mixed) - len(expected)


async def test_token_of_another_app_is_rejected(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    secret = await world.create_key("other", "ingest")
    async with connect(world, secret) as stream:
        await stream.send(opening(parent="apps/other"))
        await stream.read()
        await stream.send(batch(1, delivered(tokens[:1])))
        ((rejected,),) = [response.rejections for response in await stream.read_until(1)]
    assert [event.reason for event in rejected.events] == [Reason.TOKEN_INVALID]
    assert await count_log(world) == 0


async def test_stream_for_another_app_is_refused(world: World) -> None:
    async with connect(world) as stream:
        await stream.send(opening(parent="apps/other"))
        assert await stream.fail() == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")


@pytest.mark.parametrize("positions", [[2], [0], [1, 3], [1, 1], [1, 2, 1], [-1]], ids=str)
async def test_position_out_of_order_ends_the_stream_and_keeps_what_was_in_order(world: World, positions: list[int]) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as stream:
        await stream.open()
        await stream.send(*(batch(position, delivered(tokens[:1])) for position in positions))
        assert await stream.fail() == (grpc.StatusCode.FAILED_PRECONDITION, "POSITION_OUT_OF_ORDER")
    async with connect(world) as stream:
        assert await stream.open() == len(positions) - 1


@pytest.mark.parametrize("is_opened", [False, True])
async def test_open_comes_first_and_once(world: World, is_opened: bool) -> None:
    async with connect(world) as stream:
        if is_opened:
            await stream.open()
        await stream.send(opening() if is_opened else batch(1, []))
        assert await stream.fail() == (grpc.StatusCode.FAILED_PRECONDITION, "STREAM_NOT_OPENED")


async def test_stream_that_says_nothing_is_refused(world: World) -> None:
    async with connect(world) as stream:
        await stream.call.done_writing()
        assert await stream.fail() == (grpc.StatusCode.FAILED_PRECONDITION, "STREAM_NOT_OPENED")


@pytest.mark.parametrize("producer", ["", "Importer", "a" * 64, "-a", "a b"])
async def test_name_of_a_producer_is_checked(world: World, producer: str) -> None:
    async with connect(world) as stream:
        await stream.send(opening(producer))
        assert await stream.fail() == (grpc.StatusCode.INVALID_ARGUMENT, "FIELDS_INVALID")


async def test_newer_stream_of_a_producer_wins(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as older, connect(world) as newer:
        await older.open()
        await older.send(batch(1, delivered(tokens[:10])))
        await older.read_until(1)
        assert await newer.open() == 1
        await older.send(batch(2, delivered(tokens[10:20])))
        assert await older.fail() == (grpc.StatusCode.ABORTED, "STREAM_SUPERSEDED")
        await newer.send(batch(2, delivered(tokens[20:30])))
        await newer.read_until(2)
    assert await count_log(world) == 20


async def test_superseded_stream_ends_however_much_it_has_sent(world: World) -> None:
    """With a full window the older stream was never answered, and its reader stayed for ever."""
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as older, connect(world) as newer:
        await older.open()
        await newer.open()
        pouring = asyncio.create_task(older.send(*(batch(place + 1, delivered(tokens[:50])) for place in range(600))))
        # gRPC's client may meet the reset of its own unfinished messages before the status, and then says INTERNAL itself.
        assert await older.fail() in {(grpc.StatusCode.ABORTED, "STREAM_SUPERSEDED"), (grpc.StatusCode.INTERNAL, "")}
        await asyncio.gather(pouring, return_exceptions=True)
        await newer.send(batch(1, delivered(tokens[:1])))
        await newer.read_until(1)
    assert await count_log(world) == 1


async def test_client_that_pours_into_a_superseded_stream_is_told_so(world: World) -> None:
    """gRPC's client may say INTERNAL when it was writing as the refusal came; ours opens the stream again to learn the reason."""
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))

    async def pour() -> None:
        async with world.client.stream_events("importer") as older, connect(world) as newer:
            await newer.open()
            for _ in range(600):
                await older.send(delivered(tokens[:50]))

    for _ in range(5):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pour()
        assert (caught.value.code(), read_reason(caught.value)[0]) == (grpc.StatusCode.ABORTED, "STREAM_SUPERSEDED")
    assert await count_log(world) == 0


def reopening(session: str, *, resume: bool = True) -> events_pb2.StreamEventsRequest:
    opening = events_pb2.OpenStream(parent="apps/acme", producer="importer", session=session, resume=resume)
    return events_pb2.StreamEventsRequest(open=opening)


async def test_stream_is_resumed_by_its_own_session_only(world: World) -> None:
    """Two that went on after every broken connection took the name from each other for ever."""
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    mine, theirs = "6c1d3c86-74c1-4b8f-9a53-0242ac120002", "6c1d3c86-74c1-4b8f-9a53-0242ac120003"
    for session in (mine, theirs):
        async with connect(world) as stream:
            await stream.send(reopening(session, resume=False))
            position = (await stream.read()).committed_position
            await stream.send(batch(position + 1, delivered(tokens[:1])))
            await stream.read_until(position + 1)
    async with connect(world) as stream:
        await stream.send(reopening(mine))
        assert await stream.fail() == (grpc.StatusCode.ABORTED, "STREAM_SUPERSEDED")
    for _ in range(2):
        async with connect(world) as stream:
            await stream.send(reopening(theirs))
            assert (await stream.read()).committed_position == 2
    async with connect(world) as stream:
        await stream.send(reopening(mine, resume=False))
        assert (await stream.read()).committed_position == 2


@pytest.mark.parametrize("session", ["", "x"])
async def test_stream_is_resumed_with_a_session_that_is_one(world: World, session: str) -> None:
    async with connect(world) as stream:
        await stream.send(reopening(session))
        assert await stream.fail() == (grpc.StatusCode.INVALID_ARGUMENT, "FIELDS_INVALID")


async def test_batch_after_one_that_could_not_be_stored_is_not_stored_either(world: World) -> None:
    """The position went past what was lost, and the client, told so when it opened the stream again, never sent it again."""
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with transaction(world.core.engine) as conn:
        # What a full disk would do, to the second batch only.
        await conn.execute(text("ALTER TABLE events ADD CONSTRAINT broken CHECK (position <> 1)"))
    ledger = world.core.ledger
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, delivered(tokens[:1])))
        await stream.read_until(1)
        async with transaction(world.core.engine) as conn:
            # Whoever writes an event waits; so what comes meanwhile is not of the same transaction.
            await conn.execute(text("LOCK TABLE events IN SHARE MODE"))
            await stream.send(batch(2, delivered(tokens[1:2])))
            await wait_until(lambda: len(ledger._batcher._commits) == 1)
            await stream.send(batch(3, delivered(tokens[2:3])), batch(4, delivered(tokens[3:4])))
            await wait_until(lambda: ledger._batcher._backlog == 3)
        assert await stream.fail() == (grpc.StatusCode.INTERNAL, "INTERNAL")
    await wait_until(lambda: ledger._batcher._backlog == 0)
    async with connect(world) as stream:
        assert await stream.open() == 1
        await stream.send(batch(2, delivered(tokens[2:4])))
        await stream.read_until(2)
    assert await count_log(world) == 3


async def wait_until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not holds():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_events_left_out_are_told_in_answers_that_clients_take(world: World) -> None:
    """Those of 30 batches in one answer were more than the 4 MB that a client takes, which ended the stream."""
    nothing = [events_pb2.Event()] * 10_000
    async with connect(world) as stream:
        await stream.open()
        sending = asyncio.create_task(stream.send(*(batch(place, nothing) for place in range(1, 31))))
        answers = await stream.read_until(30)
        await sending
        found = [rejected for answer in answers for rejected in answer.rejections]
    assert [rejected.position for rejected in found] == list(range(1, 31))
    assert all(len(rejected.events) == 10_000 for rejected in found)
    assert (answers[-1].accepted_count, answers[-1].rejected_count) == (0, 300_000)


async def test_client_that_reads_no_rejections_keeps_few_of_them_in_the_server(world: World) -> None:
    nothing = [events_pb2.Event()] * 10_000
    ledger = world.core.ledger
    async with connect(world) as stream:
        await stream.open()
        pouring = asyncio.create_task(stream.send(*(batch(place, nothing) for place in range(1, 1_001))))
        seen, looks = 0, 0
        async with asyncio.timeout(240):
            # It comes no further: not because it is slow, but for some seconds in which there is nothing to be stored.
            while looks < 3:
                await asyncio.sleep(1)
                position = await read_position(world)
                looks = looks + 1 if position == seen > 0 and not ledger._batcher._backlog else 0
                seen = position
        # What fills gRPC's windows for answers, of 650 kB each, what waits here, and what is in hand.
        assert position < 50
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)


async def read_position(world: World) -> int:
    async with transaction(world.core.engine) as conn:
        return int((await conn.execute(text("SELECT position FROM producers"))).scalar_one())


async def test_events_are_counted_with_the_position_over_all_streams_of_a_producer(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    good, bad = delivered(tokens[:7]), delivered(["wrong"])
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, good), batch(2, [*good, *bad, *bad]), batch(3, []))
        *_, last = await stream.read_until(3)
        assert (last.accepted_count, last.rejected_count) == (14, 2)
    async with connect(world) as stream:
        await stream.send(opening())
        first = await stream.read()
        assert (first.committed_position, first.accepted_count, first.rejected_count) == (3, 14, 2)
        await stream.send(batch(4, bad))
        (last,) = await stream.read_until(4)
        assert (last.accepted_count, last.rejected_count) == (14, 3)
    async with world.client.stream_events("importer") as own:
        await own.send(good)
        await own.flush()
        assert (own.accepted_count, own.rejected_count) == (21, 3)


async def test_superseded_client_that_leaves_takes_nobody_with_it(world: World) -> None:
    """Its future was cancelled by then; the batcher stumbled over it, and the process took no event any more."""
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    for _ in range(10):
        async with connect(world) as older, connect(world) as newer:
            await older.open()
            await newer.open()
            await older.send(*(batch(place + 1, delivered(tokens[:5])) for place in range(20)))
            older.call.cancel()
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, delivered(tokens[:1])))
        await stream.read_until(1)


async def test_broken_connection_is_resumed_with_every_event_in_the_log_once(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    batches = [batch(place + 1, delivered(tokens[place * 5 : place * 5 + 5])) for place in range(200)]
    chance = random.Random(1)
    position, rounds = 0, 0
    while position < len(batches):
        rounds += 1
        async with connect(world) as stream:
            position = await stream.open()
            for request in batches[position : position + chance.randrange(1, 60)]:
                await stream.send(request)
            if chance.random() < 0.5 and position < len(batches):
                await stream.read()
    assert rounds > 2
    log = await read_log(world)
    assert len(log) == 1_000
    assert set(log.values()) == {1}


async def test_batch_of_too_many_events_is_refused(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, delivered(tokens * 10)), batch(2, delivered(tokens * 10 + tokens[:1])))
        assert await stream.fail() == (grpc.StatusCode.INVALID_ARGUMENT, "FIELDS_INVALID")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.client.events.IngestEvents(
            events_pb2.IngestEventsRequest(parent="apps/acme", events=delivered(tokens * 10 + tokens[:1]))
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await count_log(world) == 10_000


async def test_message_over_four_megabytes_is_refused(world: World) -> None:
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, [events_pb2.Event(token="x" * 5_000, signal="sent")] * 1_000))
        assert await stream.fail() == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")


async def test_message_that_is_none_is_refused(world: World) -> None:
    async with grpc.aio.insecure_channel(world.addresses.grpc) as channel:
        call = channel.stream_stream("/aftertouch.v1.Events/StreamEvents")(
            metadata=(("authorization", f"Bearer {world.secret}"),)
        )
        stream = Stream(call)
        await call.write(opening().SerializeToString())
        await call.read()
        await call.write(b"\x12\x05nope!")
        assert await stream.fail() == (grpc.StatusCode.INVALID_ARGUMENT, "FIELDS_INVALID")


async def test_stream_without_the_scope_is_refused(world: World) -> None:
    secret = await world.create_key("acme", "read")
    async with connect(world, secret) as stream:
        await stream.send(opening())
        assert await stream.fail() == (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_INSUFFICIENT")


async def test_client_that_reads_no_acknowledgement_delays_nobody(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with connect(world) as slow, connect(world) as other:
        await slow.send(opening("slow"))

        async def pour() -> None:
            for place in range(2_000):
                await slow.send(batch(place + 1, delivered(tokens[:5])))

        pouring = asyncio.create_task(pour())
        await other.open("other")
        for place in range(1, 51):
            await other.send(batch(place, delivered(tokens[:5])))
            await other.read_until(place)
        pouring.cancel()
        await asyncio.gather(pouring, return_exceptions=True)


async def test_client_that_pours_is_held_back_and_the_backlog_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the database does not answer a pouring client comes as far as the window, and then waits for room."""
    monkeypatch.setattr(batcher, "LARGEST_BACKLOG", 20_000)
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    message = batch(1, delivered(tokens))
    sent = 0
    async with connect(world) as stream, transaction(world.core.engine) as conn:
        await stream.open()
        # The row that every commit of the stream locks.
        await conn.execute(text("SELECT * FROM producers FOR UPDATE"))

        async def pour() -> None:
            nonlocal sent
            for place in range(1_000):
                message.batch.position = place + 1
                await stream.send(message)
                sent += 1

        pouring = asyncio.create_task(pour())
        await wait_until(lambda: world.core.ledger._batcher._backlog >= 16_000)
        seen = -1
        while seen != sent:
            seen = sent
            await asyncio.sleep(0.5)
        held = world.core.ledger._batcher._backlog
        assert 16_000 <= held < 18_000
        # What is on its way between client and server: HTTP/2's window and one message in each hand.
        assert sent < 250
        await conn.rollback()
        async with asyncio.timeout(400):
            await stream.read_until(1_000)
        await pouring
    assert events_service.WINDOW * 1_000 < batcher.LARGEST_BACKLOG or await count_log(world) == 1_000_000


async def test_transactions_beside_each_other_lose_and_double_nothing_when_they_break(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connections are ended and partitions made while two commits are under way, one of which waits for the other."""
    monkeypatch.setattr(batcher, "LARGEST_COMMIT", 60)
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    commits = world.core.ledger._batcher._commits
    most = 0

    async def trouble() -> None:
        nonlocal most
        for day in range(8):
            async with asyncio.timeout(120):
                while len(commits) < 2:  # noqa: ASYNC110 - the batcher wakes nobody
                    await asyncio.sleep(0)
            most = max(most, len(commits))
            async with transaction(world.core.engine) as conn:
                await create_partitions(conn, datetime.now(UTC).date() + timedelta(days=30 + 10 * day))
            async with transaction(world.core.engine) as conn:
                name = (await conn.execute(text("SELECT current_database()"))).scalar_one()
                await conn.exec_driver_sql(CUT_CONNECTIONS, (name,))

    async def pour(stream: EventStream) -> None:
        nonlocal sent
        while not troubling.done():
            await stream.send(delivered([tokens[(sent + place) % PEOPLE] for place in range(20)]))
            sent += 20

    sent = 0
    async with world.client.stream_events("one") as one, world.client.stream_events("other") as other:
        troubling = asyncio.create_task(trouble())
        await asyncio.gather(pour(one), pour(other), troubling)
    assert most == 2
    assert (await read_log(world)).total() == sent
    async with transaction(world.core.engine) as conn:
        assert (await conn.execute(text("SELECT sum(accepted) FROM producers"))).scalar_one() == sent
        counted = await conn.execute(text("SELECT minutes, sum(events) FROM activity GROUP BY minutes"))
        assert dict(counted.all()) == {1: sent, 60: sent}


async def test_call_is_answered_before_what_a_stream_has_poured_in(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "LARGEST_COMMIT", 1_000)
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    waiting = world.core.ledger._batcher
    async with connect(world) as stream:
        await stream.open()
        async with transaction(world.core.engine) as conn:
            # The row that every commit of the stream locks.
            await conn.execute(text("SELECT * FROM producers FOR UPDATE"))
            await stream.send(*(batch(place, delivered(tokens)) for place in range(1, 31)))
            await wait_until(lambda: waiting._backlog == 30_000)
            request = events_pb2.IngestEventsRequest(parent="apps/acme", events=delivered(tokens[:1], "sent"))
            calling = asyncio.ensure_future(world.client.events.IngestEvents(request))
            await wait_until(lambda: waiting._backlog == 30_001)
        await calling
        await stream.read_until(30)
    async with transaction(world.core.engine) as conn:
        statement = (
            "SELECT count(*) FROM events WHERE commit_id < (SELECT commit_id FROM events JOIN kinds USING (kind)"
            " WHERE signal = 'sent')"
        )
        # Those of the two transactions that were under way.
        assert (await conn.execute(text(statement))).scalar_one() <= 2_000


async def test_calls_that_find_no_room_are_told_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call holds its request: as many as come would fill the memory while the database hangs."""
    monkeypatch.setattr(batcher, "LARGEST_BACKLOG", 1_000)
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    request = events_pb2.IngestEventsRequest(parent="apps/acme", events=delivered(tokens))
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("LOCK TABLE receipts"))
        calling = asyncio.ensure_future(world.client.events.IngestEvents(request))
        await wait_until(lambda: world.core.ledger._batcher._backlog == 1_000)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await world.client.events.IngestEvents(request)
        assert (caught.value.code(), read_reason(caught.value)[0]) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    assert (await calling).accepted_count == 1_000
    assert (await world.client.events.IngestEvents(request)).accepted_count == 1_000


async def test_request_id_puts_events_into_the_log_once(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    request = events_pb2.IngestEventsRequest(
        parent="apps/acme", events=delivered([*tokens[:5], "wrong"]), request_id="5f0b7c9e-2f1c-4c39-9a55-0242ac120002"
    )
    first = await world.client.events.IngestEvents(request)
    second = await world.client.events.IngestEvents(request)
    assert first == second
    assert first.accepted_count == 5
    assert [(rejected.index, rejected.reason) for rejected in first.rejections] == [(5, Reason.TOKEN_INVALID)]
    assert await count_log(world) == 5


async def test_calls_with_a_request_id_do_not_wait_for_each_other(world: World) -> None:
    """Each held a connection and wanted another to look messages up; with as many calls as connections all failed."""
    events = [events_pb2.Event(message={"channel": "sms", "message_id": "SM0"}, signal="delivered")]  # type: ignore[arg-type]
    requests = [
        events_pb2.IngestEventsRequest(parent="apps/acme", events=events, request_id=str(uuid.uuid4())) for _ in range(60)
    ]
    answers = await asyncio.gather(*map(world.client.events.IngestEvents, requests))
    assert {rejected.reason for answer in answers for rejected in answer.rejections} == {Reason.MESSAGE_UNKNOWN}


async def test_repeat_without_a_request_id_changes_no_receipt(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    request = events_pb2.IngestEventsRequest(parent="apps/acme", events=delivered(tokens[:5]))
    await world.client.events.IngestEvents(request)
    bits = await read_bits(world)
    await world.client.events.IngestEvents(request)
    assert await read_bits(world) == bits
    assert await count_log(world) == 10


async def test_event_by_the_providers_message_id_finds_the_person(world: World) -> None:
    await world.import_people()
    campaign = await world.create_campaign("sms")
    await world.launch(campaign.name)
    async with transaction(world.core.engine) as conn:
        statement = "SELECT slot, position, message_id FROM attempts WHERE message_id <> '' ORDER BY message_id"
        attempts = (await conn.execute(text(statement))).all()
    before = await read_log(world)
    events = [
        events_pb2.Event(message={"channel": "sms", "message_id": row.message_id}, signal="delivered")  # type: ignore[arg-type]
        for row in attempts
    ]
    events.append(events_pb2.Event(message={"channel": "whatsapp", "message_id": attempts[0].message_id}, signal="delivered"))  # type: ignore[arg-type]
    async with connect(world) as stream:
        await stream.open()
        await stream.send(batch(1, events))
        ((rejected,),) = [response.rejections for response in await stream.read_until(1)]
    assert [(event.index, event.reason) for event in rejected.events] == [(len(attempts), Reason.MESSAGE_UNKNOWN)]
    news = await read_log(world) - before
    assert {(slot, position) for slot, position, _ in news} == {(row.slot, row.position) for row in attempts}


async def test_any_interleaving_repeat_and_order_gives_the_same_receipts(world: World) -> None:
    """The same events, in order and then shuffled, doubled and spread over streams and calls, on campaigns of the same size."""
    chance = random.Random(7)
    chosen = [
        (person, chance.choice(["sent", "delivered", "failed"])) for person in (chance.randrange(PEOPLE) for _ in range(800))
    ]
    results = []
    for round_number in range(6):
        name = f"sale-{round_number}"
        tokens = await make_tokens(world, await launch_quietly(world, name))
        events = [events_pb2.Event(token=tokens[person], signal=signal) for person, signal in chosen]
        if round_number:
            events += chance.sample(events, chance.randrange(len(events)))
            chance.shuffle(events)
        await _spread(world, events, chance, name, ways=round_number * 2 + 1)
        async with transaction(world.core.engine) as conn:
            statement = (
                "SELECT signal, reason_code, slot & 1048575 AS chunk, bits FROM receipts AS r JOIN kinds USING (kind)"
                " JOIN campaigns AS c ON c.campaign_id = r.slot >> 20 WHERE c.campaign = :name ORDER BY 1, 2, 3"
            )
            results.append([tuple(row) for row in await conn.execute(text(statement), {"name": name})])
    assert results[0]
    assert all(result == results[0] for result in results)


async def _spread(world: World, events: list[events_pb2.Event], chance: random.Random, name: str, ways: int) -> None:
    """Send the events over several streams and calls at the same time, in batches of any size."""

    async def send_way(number: int, part: list[events_pb2.Event]) -> None:
        async with world.client.stream_events(f"{name}-{number}") as stream:
            while part:
                size = chance.randrange(1, 60)
                taken, part = part[:size], part[size:]
                if chance.random() < 0.5:
                    await stream.send(taken)
                else:
                    await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=taken))
            await stream.flush()
            assert not stream.rejections

    await asyncio.gather(*(send_way(number, events[number::ways]) for number in range(ways)))


async def test_client_streams_in_batches_and_tells_what_was_left_out(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))
    async with world.client.stream_events("importer") as stream:
        assert await stream.send(delivered(tokens[:10])) == 1
        assert await stream.send(delivered([*tokens[10:20], "wrong"])) == 2
        await stream.flush()
        assert stream.committed == 2
        assert [(rejected.position, rejected.events[0].index) for rejected in stream.rejections] == [(2, 10)]
        with pytest.raises(ValueError, match="at most 10000 events"):
            await stream.send(delivered(tokens * 11))
    told: list[int] = []
    async with world.client.stream_events("importer", lambda rejected: told.append(rejected.position)) as stream:
        assert stream.committed == 2
        await stream.send(delivered(["wrong"]))
    assert told == [3]


async def test_client_is_told_that_a_newer_stream_won(world: World) -> None:
    tokens = await make_tokens(world, await launch_quietly(world, "sale"))

    async def lose() -> None:
        async with world.client.stream_events("importer") as older, world.client.stream_events("importer") as newer:
            await newer.send(delivered(tokens[:1]))
            await newer.flush()
            await older.send(delivered(tokens[:1]))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await lose()
    assert read_reason(caught.value)[0] == "STREAM_SUPERSEDED"
    assert await count_log(world) == 1


async def test_client_without_a_server_or_a_key_is_told_at_once(world: World) -> None:
    async with Client("127.0.0.1:1", api_key="at_none", app="acme") as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with client.stream_events("importer"):
                pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with world.connect("acme", "at_wrong_wrong") as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with client.stream_events("importer"):
                pass
    assert read_reason(caught.value)[0] == "API_KEY_INVALID"
