"""A backup that is restored as docs/operations.md says, into a new PostgreSQL: what it would send, and who watches it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import psycopg
import pytest

from aftertouch.client import Client, read_reason
from aftertouch.demo import SERVER_READY
from aftertouch.processes import Child
from aftertouch.rpc.values import to_struct, to_timestamp
from aftertouch.v1 import campaigns_pb2, events_pb2, retargeting_pb2
from tests.e2e.site import Site, launch_campaigns, open_site, wait_until_sent
from tests.fix_world import CONTENT, SECRET_KEY

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BACKUPS = re.search(r"^## Backups\n(.*?)^## ", (ROOT / "docs/operations.md").read_text(), re.DOTALL | re.MULTILINE)
_State = campaigns_pb2.Campaign.State


def read_blocks() -> list[str]:
    """What the document has to be typed: the backup, the restore, and the statements before the restart."""
    assert BACKUPS is not None
    return re.findall(r"```\w+\n(.*?)```", BACKUPS[1], re.DOTALL)


async def run_shell(directory: Path, script: str) -> None:
    shell = await asyncio.create_subprocess_exec("bash", "-euc", script, cwd=directory)
    assert await shell.wait() == 0


async def run_sql(data: Path, statements: str) -> None:
    async with await psycopg.AsyncConnection.connect((data / "url").read_text(), autocommit=True) as conn:
        await conn.execute(statements)


async def use_up_transactions(data: Path, count: int = 5_000) -> None:
    await run_sql(data, f"DO $$BEGIN FOR i IN 1..{count} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END$$")


@asynccontextmanager
async def open_backed_up_site(directory: Path) -> AsyncIterator[Site]:
    """A site whose directory is as the document takes it."""
    (directory / ".venv").symlink_to(sys.prefix)
    (directory / ".aftertouch").symlink_to("data")
    # So many that one a second takes longer than a backup.
    async with open_site(directory, people=200) as site:
        (directory / "data/secret.key").write_text(SECRET_KEY)
        yield site


@asynccontextmanager
async def restore(site: Site) -> AsyncIterator[Client]:
    """Lose a site's server after a backup, and go on from the backup, as the document says."""
    backup, restoring, hold = read_blocks()
    prepare, serve, fill = restoring.splitlines()
    assert "AFTERTOUCH_SEND_UNITS=0 .venv/bin/aftertouch serve" in serve
    await run_shell(site.directory, backup)
    await site.server.kill()
    await run_shell(site.directory, prepare)
    environment = site.environment | {"AFTERTOUCH_DATA_DIR": str(site.directory / "restored")}
    log = site.directory / "restored.log"
    async with Child("serve", environment=environment | {"AFTERTOUCH_SEND_UNITS": "0"}, ready=SERVER_READY, log=log):
        await run_shell(site.directory, f"{backup.splitlines()[0]}\n{fill}")
        await run_sql(site.directory / "restored", hold)
    async with (
        Child("serve", environment=environment, ready=SERVER_READY, log=log) as server,
        Client(server.found[0], api_key=site.secret, app="acme") as client,
    ):
        yield client


async def test_campaigns_that_went_on_after_the_backup_are_held(tmp_path: Path) -> None:
    """What was scheduled in a backup, and was launched and sent since, was launched again: everybody was messaged twice."""
    now, hour = datetime.now(UTC), timedelta(hours=1)
    async with open_backed_up_site(tmp_path) as site:
        async with site.connect() as client:
            (sending,) = (await launch_campaigns(client, "sms", pace=1)).values()
            times = {"schedule_time": to_timestamp(now + hour), "send_by_time": to_timestamp(now + 2 * hour)}
            (scheduled,) = (await launch_campaigns(client, "push", **times)).values()
            step = retargeting_pb2.FollowUpStep(channel="sms", content=to_struct(CONTENT["sms"]))
            step.selection.action = "not_clicked"
            made = await client.retargeting.CreateFollowUps(
                retargeting_pb2.CreateFollowUpsRequest(source=scheduled, steps=[step])
            )
            (follow_up,) = made.campaigns
        async with restore(site) as client:
            found = {
                name: await client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
                for name in (sending, scheduled, follow_up.name)
            }
    assert [campaign.state for campaign in found.values()] == [_State.PAUSED, _State.DRAFT, _State.DRAFT]
    assert {campaign.state_reason for campaign in found.values()} == {"restored from a backup"}
    for name in (scheduled, follow_up.name):
        for field in ("schedule_time", "send_by_time", "follow_up"):
            assert not found[name].HasField(field)


async def test_watch_begins_anew_in_a_restored_database_and_then_goes_on(tmp_path: Path) -> None:
    """Every resume was refused until the new cluster had as many transactions as the old one, which then came as news."""
    async with open_backed_up_site(tmp_path) as site:
        await use_up_transactions(tmp_path / "data")
        async with site.connect() as client:
            (name,) = (await launch_campaigns(client, "sms")).values()
            await wait_until_sent(client, name)
            # Or receipts would be brought again to the restored server, and be what is watched.
            await site.read_entries()
            async with aclosing(client.watch_events()) as watch:
                token = (await anext(watch)).resume_token
        dropped = "INSERT INTO dropped_days SELECT 'events', current_date - 90, max(commit_id) FROM events"
        await run_sql(tmp_path / "data", dropped)
        async with restore(site) as client:
            with pytest.raises(grpc.aio.AioRpcError, match="list what you need, then watch without a token") as caught:
                await anext(client.watch_events(resume_token=token))
            assert read_reason(caught.value)[0] == "RESUME_TOKEN_TOO_OLD"
            async with aclosing(client.watch_events()) as watch:
                token = (await anext(watch)).resume_token
            await use_up_transactions(tmp_path / "restored", 10_000)
            page = await client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=name))
            person = page.recipients[0].contact
            target = events_pb2.RecipientTarget(campaign=name, external_id=person.rpartition("/")[2])
            event = events_pb2.Event(recipient=target, signal="replied")
            await client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=[event]))
            async with asyncio.timeout(120), aclosing(client.watch_events(resume_token=token)) as watch:
                answer = await anext(watch)
    assert [(event.contact, event.signal) for event in answer.events] == [(person, "replied")]
