"""/metrics: what a process counts, for whoever is paged, and that it needs no database to say that there is none."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from aftertouch import metrics
from aftertouch.config import Config
from aftertouch.supervisor import _list_metrics_addresses
from aftertouch.web import metrics as web_metrics
from tests.e2e.test_spool import click, launch_push, lock_receipts, take_away
from tests.fix_world import OpenWorld, World
from tests.refusals import refuse

pytestmark = pytest.mark.e2e

Samples = dict[tuple[str, ...], float]


async def scrape(world: World) -> Samples:
    """Every sample, by its name and the values of its labels in the order of their names."""
    async with aiohttp.ClientSession() as http, http.get(f"http://{world.addresses.metrics}/metrics") as response:
        assert response.status == 200
        families = text_string_to_metric_families(await response.text())
        return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


async def scrape_until(world: World, name: str, is_right: Callable[[float], bool]) -> None:
    """Wait until a metric without labels has a value that is right."""
    async with asyncio.timeout(120):
        # There is nothing to wait on but the next answer.
        while not is_right((await scrape(world))[name,]):  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_what_happened_is_counted(open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_metrics, "COUNT_SECONDS", 30)
    async with open_world(metrics_address="127.0.0.1:0") as world:
        await world.import_people()
        before = await scrape(world)

        def grew(after: Samples, *key: str) -> float:
            return after.get(key, 0) - before.get(key, 0)

        campaign = await world.create_campaign("sms")
        await world.launch(campaign.name)
        await refuse(world.get_campaign("apps/acme/campaigns/nothing"))
        async with aiohttp.ClientSession() as http:
            await http.post(f"{world.addresses.public_url}/v1/webhooks/sms", data={"MessageSid": "SM1"})
            assert (await http.get(f"http://{world.addresses.metrics}/")).status == 404
        counts = (await world.get_campaign(campaign.name)).counts
        after = await scrape(world)
        handed = {outcome: grew(after, "aftertouch_messages_total", "sms", outcome) for outcome in ("accepted", "refused")}
        assert handed["accepted"] == counts.signals["sent"] > 0
        assert sum(handed.values()) >= counts.recipients
        assert grew(after, "aftertouch_webhooks_total", "sms", "403") == 1
        assert grew(after, "aftertouch_webhooks_total", "sms", "204") >= counts.signals["delivered"] > 0
        assert grew(after, "aftertouch_events_total") >= counts.signals["delivered"]
        assert grew(after, "aftertouch_commit_seconds_count") > 0
        assert grew(after, "aftertouch_call_seconds_count", "OK", "Campaigns/LaunchCampaign") == 1
        assert grew(after, "aftertouch_call_seconds_count", "NOT_FOUND", "Campaigns/GetCampaign") == 1
        assert after["aftertouch_campaigns", "SENT"] == 1
        assert after["aftertouch_campaigns", "PAUSED"] == 0
        assert after["aftertouch_database_up",] == 1
        assert after["aftertouch_spooled_webhooks", "aside"] == 0


async def test_database_that_is_away_or_hangs_is_told_of(
    open_world: OpenWorld, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_metrics, "COUNT_SECONDS", 30)
    async with open_world(metrics_address="127.0.0.1:0") as world:
        async with take_away(database_url):
            assert (await scrape(world))["aftertouch_database_up",] == 0
        # Two that scrape at once are answered from one count.
        assert [found["aftertouch_database_up",] for found in await asyncio.gather(*(scrape(world) for _ in range(5)))] == [1] * 5
        monkeypatch.setattr(web_metrics, "COUNT_SECONDS", 0.3)
        async with world.core.engine.begin() as conn:
            await conn.exec_driver_sql("LOCK TABLE campaigns")
            assert [(await scrape(world))["aftertouch_database_up",] for _ in range(3)] == [0, 0, 0]
        # To connect again may take longer.
        monkeypatch.setattr(web_metrics, "COUNT_SECONDS", 30)
        await scrape_until(world, "aftertouch_database_up", lambda number: number == 1)


async def test_events_that_wait_for_the_database_are_told_of(open_world: OpenWorld, database_url: str) -> None:
    async with open_world(metrics_address="127.0.0.1:0") as world:
        _, tokens = await launch_push(world)
        await scrape_until(world, "aftertouch_events_waiting", lambda number: number == 0)
        async with lock_receipts(database_url), asyncio.TaskGroup() as tasks:
            tasks.create_task(click(world.addresses.http, tokens))
            await scrape_until(world, "aftertouch_events_waiting", lambda number: number > 0)
        await scrape_until(world, "aftertouch_events_waiting", lambda number: number == 0)


async def test_connections_in_use_are_told_of(open_world: OpenWorld) -> None:
    async with open_world(metrics_address="127.0.0.1:0") as world, world.core.engine.connect():
        assert (await scrape(world))["aftertouch_database_connections",] >= 1


def test_each_of_several_processes_has_a_port_of_its_own() -> None:
    config = Config(processes=3, metrics_address="[::1]:7072")
    assert _list_metrics_addresses(config) == ["[::1]:7072", "[::1]:7073", "[::1]:7074"]
    assert _list_metrics_addresses(Config(processes=2)) == ["", ""]


def test_operations_tells_what_each_metric_is_for() -> None:
    defined = {metric._name for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)}
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    assert {name.removesuffix("_total") for name in re.findall(r"`(aftertouch_[a-z_]+)[`{]", page)} == defined
