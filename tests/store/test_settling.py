"""Settling: the delay of a signal is measured from the app's own campaigns, and decides what is asked too early."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
from aftertouch_whatsapp import WhatsAppChannel
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aftertouch.declarations import compile_channel
from aftertouch.retargeting.selections import Question, find_sources
from aftertouch.retargeting.settling import UNMEASURED_DELAY, Unsettled, find_unsettled
from aftertouch.rolls.chunks import slot_range
from aftertouch.rolls.sql import write_roll
from aftertouch.store.apps import App, create_app
from aftertouch.store.campaigns import create_campaign, update_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.kinds import Kind, intern_kinds
from aftertouch.store.logs import MICROSECONDS, EventBatch, store_events

TYPES = {"whatsapp": compile_channel(WhatsAppChannel, distribution="test", version="1")}
NOW = datetime.now(UTC).replace(microsecond=0)
UNREAD = Question("asked", "not_read")


async def make_campaign(conn: AsyncConnection, app: App, name: str, sent: datetime, reads: list[timedelta]) -> None:
    """A campaign that was sent within a minute, and its reads, each so long after."""
    made = await create_campaign(conn, app.app_id, name, {"display_name": name, "channel": "whatsapp"})
    people = max(len(reads), 1)
    await write_roll(conn, made.campaign_id, np.arange(people))
    await update_campaign(conn, made.campaign_id, state="SENT", recipients=people, launch_time=sent, finish_time=sent)
    kinds = await intern_kinds(conn, [Kind("sent"), Kind("read")])
    for kind, delays in ((Kind("sent"), [timedelta(0)] * people), (Kind("read"), reads)):
        if delays:
            times = [int((sent + delay).timestamp() * MICROSECONDS) for delay in delays]
            batch = EventBatch(
                slots=np.full(len(times), slot_range(made.campaign_id)[0]),
                positions=np.arange(len(times), dtype=np.int32),
                members=np.full(len(times), people, np.int32),
                kinds=np.full(len(times), kinds[kind], np.int32),
                times=np.array(times, np.int64),
            )
            await store_events(conn, batch)


async def ask(engine: AsyncEngine, app: App, at: datetime) -> list[Unsettled]:
    async with transaction(engine) as conn:
        return await find_unsettled(conn, app, await find_sources(conn, app, TYPES, UNREAD, ""), UNREAD, at)


async def make_app(conn: AsyncConnection) -> App:
    app = await create_app(conn, "acme", "Acme")
    return App(**{**vars(app), "retargetable_since": NOW - timedelta(days=29)})


async def test_delay_is_the_one_that_95_of_100_reads_of_older_campaigns_kept(engine: AsyncEngine) -> None:
    minutes = [timedelta(minutes=5)] * 94 + [timedelta(minutes=90)] * 6
    async with transaction(engine) as conn:
        app = await make_app(conn)
        await make_campaign(conn, app, "ripe", NOW - timedelta(days=3), minutes)
        await make_campaign(conn, app, "young", NOW - timedelta(hours=5), [timedelta(minutes=1)] * 400)
        await make_campaign(conn, app, "asked", NOW - timedelta(minutes=30), [timedelta(minutes=1)] * 400)
    (unsettled,) = await ask(engine, app, NOW)
    assert (unsettled.signal, unsettled.measured_events) == ("read", 100)
    assert timedelta(minutes=90) <= unsettled.delay <= timedelta(minutes=92)
    assert unsettled.settle_time == NOW - timedelta(minutes=30) + unsettled.delay
    assert await ask(engine, app, unsettled.settle_time) == []
    assert len(await ask(engine, app, unsettled.settle_time - timedelta(seconds=1))) == 1


async def test_young_campaigns_are_measured_where_there_are_no_others(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        app = await make_app(conn)
        await make_campaign(conn, app, "young", NOW - timedelta(hours=5), [timedelta(minutes=10)] * 20)
        await make_campaign(conn, app, "asked", NOW - timedelta(minutes=1), [])
    (unsettled,) = await ask(engine, app, NOW)
    assert timedelta(minutes=10) <= unsettled.delay <= timedelta(minutes=12)


async def test_day_is_assumed_where_too_little_was_measured(engine: AsyncEngine) -> None:
    async with transaction(engine) as conn:
        app = await make_app(conn)
        await make_campaign(conn, app, "few", NOW - timedelta(days=3), [timedelta(minutes=1)] * 19)
        await make_campaign(conn, app, "asked", NOW - timedelta(hours=23), [timedelta(minutes=1)] * 400)
    (unsettled,) = await ask(engine, app, NOW)
    assert (unsettled.delay, unsettled.measured_events) == (UNMEASURED_DELAY, 19)
    assert await ask(engine, app, NOW + timedelta(hours=1)) == []
