"""Activity over gRPC: a campaign's events by signal and time, and what cannot be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from sqlalchemy import update

from aftertouch.rpc.values import to_timestamp
from aftertouch.store.engine import transaction
from aftertouch.store.tables import campaigns
from aftertouch.v1 import events_pb2
from tests.fix_database import clone_database
from tests.fix_world import World, run_world
from tests.refusals import refuse

SENT = "apps/acme/campaigns/sent"


@pytest.fixture(scope="module")
async def shared_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world with a campaign that was launched ten days ago, as far as its row says."""
    async with clone_database(postgres_url, template) as url, run_world(url) as world:
        await world.import_people()
        draft = await world.create_campaign("sms")
        await world.launch(draft.name)
        async with transaction(world.core.engine) as conn:
            await conn.execute(update(campaigns).values(campaign="sent", launch_time=datetime.now(UTC) - timedelta(days=10)))
        yield world


async def get_activity(world: World, campaign: str = SENT, **fields: Any) -> events_pb2.Activity:
    given = {name: to_timestamp(value) if isinstance(value, datetime) else value for name, value in fields.items()}
    return await world.client.events.GetActivity(events_pb2.GetActivityRequest(campaign=campaign, **given))


def count(activity: events_pb2.Activity) -> dict[str, int]:
    return {series.signal: sum(bucket.count for bucket in series.buckets) for series in activity.series}


async def test_activity_counts_every_event_by_signal(shared_world: World) -> None:
    logged: Counter[str] = Counter()
    async with transaction(shared_world.core.engine) as conn:
        rows = await conn.exec_driver_sql("SELECT signal, count(*) FROM events JOIN kinds USING (kind) GROUP BY signal")
        logged.update(dict(rows.all()))
    assert count(await get_activity(shared_world)) == logged
    assert {"attempted", "sent", "delivered"} <= logged.keys()


async def test_activity_puts_events_into_the_bucket_of_their_time(shared_world: World) -> None:
    """Two days before now, so that nothing else happened then; in an hour that begins with the asked one."""
    start = (datetime.now(UTC) - timedelta(days=2)).replace(minute=0, second=0, microsecond=0)
    recipients = list(await shared_world.read_recipients(SENT))
    events = [
        events_pb2.Event(
            recipient=events_pb2.RecipientTarget(campaign=SENT, external_id=recipients[i % len(recipients)]),
            signal="delivered",
            time=to_timestamp(start + timedelta(minutes=minute, seconds=59)),
        )
        for i, minute in enumerate([0, 0, 1, 4, 5, 14, 59, 60])
    ]
    request = events_pb2.IngestEventsRequest(parent="apps/acme", events=events)
    assert (await shared_world.client.events.IngestEvents(request)).accepted_count == 8

    def unpack(activity: events_pb2.Activity) -> dict[int, int]:
        (series,) = activity.series
        assert series.signal == "delivered"
        return {int((b.start_time.ToDatetime(UTC) - start) / timedelta(minutes=1)): b.count for b in series.buckets}

    hour = {"start_time": start + timedelta(seconds=30), "end_time": start + timedelta(hours=1)}
    by_minute = await get_activity(shared_world, **hour)
    assert unpack(by_minute) == {0: 2, 1: 1, 4: 1, 5: 1, 14: 1, 59: 1}
    assert (by_minute.start_time.ToDatetime(UTC), by_minute.bucket.ToTimedelta()) == (start, timedelta(minutes=1))
    assert unpack(await get_activity(shared_world, **hour, bucket=Duration(seconds=300))) == {0: 4, 5: 1, 10: 1, 55: 1}
    assert unpack(await get_activity(shared_world, **hour, bucket=Duration(seconds=3600))) == {0: 7}
    hour["end_time"] = start + timedelta(minutes=61)
    assert unpack(await get_activity(shared_world, **hour, bucket=Duration(seconds=3600))) == {0: 7, 60: 1}


async def test_activity_chooses_buckets_for_the_whole_time(shared_world: World) -> None:
    activity = await get_activity(shared_world)
    span = activity.end_time.ToDatetime(UTC) - activity.start_time.ToDatetime(UTC)
    assert span > timedelta(days=9)
    assert activity.bucket.ToTimedelta() == timedelta(minutes=8)


async def test_activity_of_a_draft_is_empty(shared_world: World) -> None:
    draft = await shared_world.create_campaign("sms")
    assert not (await get_activity(shared_world, draft.name)).series


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"bucket": Duration(seconds=0)}, "bucket"),
        ({"bucket": Duration(seconds=-60)}, "bucket"),
        ({"bucket": Duration(seconds=90)}, "bucket"),
        ({"bucket": Duration(seconds=60, nanos=1)}, "bucket"),
        ({"bucket": Duration(seconds=367 * 86_400)}, "bucket"),
        ({"bucket": Duration(seconds=315_576_000_000)}, "bucket"),
        ({"bucket": Duration(seconds=60)}, "bucket"),
        ({"end_time": datetime(2020, 1, 1, tzinfo=UTC)}, "end_time"),
        ({"start_time": datetime(9000, 1, 1, tzinfo=UTC)}, "end_time"),
        ({"campaign": "x"}, "campaign"),
        ({"campaign": ""}, "campaign"),
    ],
)
async def test_faulty_question_is_refused_with_its_path(shared_world: World, fields: Any, path: str) -> None:
    assert list((await refuse(get_activity(shared_world, **fields))).fields) == [path]


async def test_activity_may_be_asked_of_all_time(shared_world: World) -> None:
    ends = {"start_time": datetime(1, 1, 1, tzinfo=UTC), "end_time": datetime(9999, 12, 31, tzinfo=UTC)}
    assert count(await get_activity(shared_world, **ends)) == count(await get_activity(shared_world))


async def test_activity_of_a_campaign_that_is_not_there_is_refused(shared_world: World) -> None:
    assert (await refuse(get_activity(shared_world, "apps/acme/campaigns/never"))).reason == "RESOURCE_NOT_FOUND"
