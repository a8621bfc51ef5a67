"""`make bench-console`: how long pages of a campaign to ten million people take, from the request to the last byte.

Server and database are processes of this machine; the visitor is a plain HTTP client, signed in once. The campaign was launched
29 days ago, a day before its people are forgotten, and in each minute since something of each kind happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

import aiohttp
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.console.accounts import Accounts
from aftertouch.rolls.chunks import slot_of
from aftertouch.store.campaigns import update_campaign
from aftertouch.store.engine import transaction
from aftertouch.store.tables import apps
from aftertouch.store.users import create_user
from tests.bench.ingest import open_bench
from tests.bench.retarget import LARGE, SPREAD, make_campaign, make_contacts

ROUNDS = 15
PAGES = {
    "list_ms": "/campaigns",
    "row_ms": "/campaigns/large/row",
    "campaign_ms": "/campaigns/large",
    "dialog_ms": "/campaigns/large/retarget?action=not_read",
}
PASSWORD = "a password of the bench"


async def measure(people: int) -> dict[str, Any]:
    """The median of each page."""
    async with open_bench() as bench:
        contacts = int(people * SPREAD)
        await make_contacts(bench.engine, bench.app_id, contacts)
        made = await make_campaign(bench.engine, bench.app_id, "large", people, contacts)
        await make_activity(bench.engine, made.campaign_id)
        async with bench.engine.connect() as conn:
            await (await conn.execution_options(isolation_level="AUTOCOMMIT")).exec_driver_sql("VACUUM ANALYZE")
        async with transaction(bench.engine) as conn:
            await create_user(conn, bench.app_id, "bench@example.com", "admin", await Accounts().hash(PASSWORD))
        async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
            form = {"app": "bench", "email": "bench@example.com", "password": PASSWORD}
            async with session.post(f"{bench.url}/console/sign-in", data=form) as response:
                assert response.status == 200
            times = {name: await clock(session, f"{bench.url}/console{path}") for name, path in PAGES.items()}
    return {"bench": "console", "people": people, **times}


async def make_activity(engine: AsyncEngine, campaign_id: int) -> None:
    """A month of a campaign's events, some of each kind in each minute: 334,000 rows, and 5,600 by hour."""
    launch_time = (datetime.now(UTC) - timedelta(days=29)).replace(second=0, microsecond=0)
    async with transaction(engine) as conn:
        await conn.execute(apps.update().values(retargetable_since=launch_time))
        await update_campaign(conn, campaign_id, launch_time=launch_time, finish_time=launch_time + timedelta(hours=1))
        await conn.execute(
            text(
                "INSERT INTO activity (slot, minutes, start_time, kind, events)"
                " SELECT :slot, minutes, date_bin(make_interval(mins => minutes), minute, 'epoch') AS start_time, kind,"
                " 30 * count(*) FROM generate_series(CAST(:launch_time AS timestamptz), now(), '1 minute') AS minute, kinds,"
                " (VALUES (1), (60)) AS spans (minutes) GROUP BY minutes, start_time, kind"
            ),
            {"slot": slot_of(campaign_id, 0), "launch_time": launch_time},
        )


async def clock(session: aiohttp.ClientSession, url: str) -> float:
    """The median time of a page, in milliseconds; the first request is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        async with session.get(url) as response:
            page = await response.text()
            assert response.status == 200, page
        times.append((time.perf_counter() - began) * 1e3)
    return round(median(times[1:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.console", description=__doc__)
    parser.add_argument("--people", type=int, default=LARGE)
    print(json.dumps(asyncio.run(measure(parser.parse_args().people))))


if __name__ == "__main__":
    main()
