"""`make bench-console`: how long pages of a campaign to ten million people take, from the request to the last byte.

Server and database are processes of this machine; the visitor is a plain HTTP client, signed in once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from statistics import median
from typing import Any

import aiohttp

from aftertouch.console.accounts import Accounts
from aftertouch.store.engine import transaction
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
        await make_campaign(bench.engine, bench.app_id, "large", people, contacts)
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


async def clock(session: aiohttp.ClientSession, url: str) -> float:
    """The median time of a page, in milliseconds; the first request is not counted."""
    times = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        async with session.get(url) as response:
            text = await response.text()
            assert response.status == 200, text
        times.append((time.perf_counter() - began) * 1e3)
    return round(median(times[1:]), 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.console", description=__doc__)
    parser.add_argument("--people", type=int, default=LARGE)
    print(json.dumps(asyncio.run(measure(parser.parse_args().people))))


if __name__ == "__main__":
    main()
