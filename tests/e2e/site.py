"""A site: a sandbox and a server as processes of their own, so that either can be killed while the other goes on."""

from __future__ import annotations

import asyncio
import json
import os
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aftertouch.client import Client
from aftertouch.contact_files import read_contacts
from aftertouch.delivery.leases import LEASE
from aftertouch.demo import SANDBOX_READY, SERVER_READY, ask_sandbox
from aftertouch.processes import Child
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import Population, SandboxSettings
from aftertouch.store import apps as store
from aftertouch.store.embedded import find_running_url
from aftertouch.store.engine import open_engine, transaction
from aftertouch.v1 import campaigns_pb2
from tests.e2e.spools import wait_until_drained
from tests.fix_world import CONTENT, SECRET_KEY
from tests.ports import keep_port

_State = campaigns_pb2.Campaign.State


@dataclass
class Site:
    """Where everything of a site is. ``server`` may be killed and started again; then ``connect`` again."""

    directory: Path
    environment: dict[str, str]
    sandbox_url: str
    server: Child
    population: Population
    secret: str = field(default="", repr=False)

    @property
    def log(self) -> str:
        """What the server has logged so far."""
        return (self.directory / "server.log").read_text()

    @property
    def database_url(self) -> str:
        """The database, which is the running server's own unless one was given."""
        url = self.environment.get("AFTERTOUCH_DATABASE_URL") or find_running_url(self.directory / "data")
        assert url is not None
        return url

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[Client]:
        """A client of the app ``acme``, which is made with all people at the first time."""
        if not self.secret:
            async with open_engine(self.database_url, pool_size=1) as engine, transaction(engine) as conn:
                app = await store.create_app(conn, "acme", "Acme")
                _, self.secret = await store.create_api_key(conn, app.app_id, "test", ["admin"])
            async with self.connect() as client:
                await client.import_contacts(read_contacts(self.population.list_rows()))
        async with Client(self.server.found[0], api_key=self.secret, app="acme") as client:
            yield client

    async def ask(self, path: str, *, method: str = "GET", body: Any = None) -> str:
        """Ask the sandbox's control."""
        return await asyncio.to_thread(ask_sandbox, self.sandbox_url, path, method=method, body=body)

    async def count_messages(self) -> int:
        """How many messages the sandbox was handed so far."""
        return int(json.loads(await self.ask("/sandbox/stats"))["last_sequence"])

    async def wait_for_messages(self, count: int) -> None:
        """Wait until the sandbox was handed so many messages."""
        async with asyncio.timeout(120):
            while await self.count_messages() < count:  # noqa: ASYNC110 - nothing to wait on but the answer of the next call
                await asyncio.sleep(0.01)

    async def read_entries(self) -> dict[str, list[dict[str, Any]]]:
        """What the sandbox was handed, by channel, once every receipt was answered for and is in the database."""
        await self.ask("/sandbox/drain?timeout=300", method="POST")
        await wait_until_drained(self.directory / "data")
        entries: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for line in (await self.ask("/sandbox/truth")).splitlines():
            entry = json.loads(line)
            entries[entry["channel"]].append(entry)
        return entries

    async def expire_leases(self, killed_at: datetime) -> None:
        """Let the leases of a server that was killed then run out now; those taken since are longer."""
        async with open_engine(self.database_url, pool_size=1) as engine, transaction(engine) as conn:
            await conn.exec_driver_sql(
                "UPDATE send_units SET lease_until = now() WHERE lease_until <= %(until)s", {"until": killed_at + LEASE}
            )

    async def crash(self) -> None:
        """kill -9 the server, and start it again."""
        await self.server.kill()
        killed_at = datetime.now(UTC)
        await self.server.start()
        await self.expire_leases(killed_at)


@asynccontextmanager
async def open_site(directory: Path, *, people: int, time_scale: float = 0.1, **settings: str) -> AsyncIterator[Site]:
    """A site that runs meanwhile.

    Args:
        settings: the server's, by their lower-case names without AFTERTOUCH_.
    """
    async with AsyncExitStack() as stack:
        # Callbacks name the server's port, so it stays the same from one start to the next.
        http = stack.enter_context(keep_port())
        arguments = ["--port=0", f"--people={people}", f"--time-scale={time_scale}"]
        arguments.append(f"--webhook-url=http://{http}/v1/webhooks/whatsapp")
        sandbox = Child("sandbox", *arguments, environment={}, ready=SANDBOX_READY, log=directory / "sandbox.log")
        await stack.enter_async_context(sandbox)
        (url,) = sandbox.found
        world = SandboxSettings(size=people)
        environment = world.environment(url) | {
            "AFTERTOUCH_DATA_DIR": str(directory / "data"),
            "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
            "AFTERTOUCH_HTTP_ADDRESS": http,
            "AFTERTOUCH_PUBLIC_URL": f"http://{http}",
            "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
            "AFTERTOUCH_LOG_FORMAT": "json",
            **{f"AFTERTOUCH_{name.upper()}": value for name, value in settings.items()},
        }
        server = Child("serve", environment=environment, ready=SERVER_READY, log=directory / "server.log")
        await stack.enter_async_context(server)
        yield Site(directory, environment, url, server, Population(world.seed, people, url, world.shares))


async def launch_campaigns(client: Client, *channels: str, pace: int = 0, **times: Any) -> dict[str, str]:
    """Launch a campaign to everybody on each of the channels, and return their names by channel.

    Args:
        pace: of each, in messages a second; without one they may be over before anything can happen to them.
        times: of the launch, as its request takes them.
    """
    names: dict[str, str] = {}
    for channel in channels:
        draft = await client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(
                parent=client.parent,
                campaign=campaigns_pb2.Campaign(
                    display_name="Summer Sale",
                    channel=channel,
                    content=to_struct(CONTENT[channel]),
                    audience=campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers()),
                    messages_per_second=pace,
                ),
            )
        )
        names[channel] = draft.name
    for name in names.values():
        await client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name, **times))
    return names


async def wait_until_sent(client: Client, name: str) -> campaigns_pb2.Campaign:
    """Wait until a campaign is no longer being sent, and return it."""
    async with asyncio.timeout(240):
        while True:
            campaign = await client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
            if campaign.state != _State.SENDING:
                return campaign
            await asyncio.sleep(0.05)


async def read_recipients(client: Client, name: str) -> dict[str, set[str]]:
    """The signals of all recipients of a campaign of at most 1,000, by external_id."""
    page = await client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=name, page_size=1000))
    assert not page.next_page_token
    return {recipient.contact.rpartition("/")[2]: set(recipient.signals) for recipient in page.recipients}


def is_running(pid: int) -> bool:
    """True while there is such a process that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def read_postgres_pid(directory: Path) -> int:
    """The process of the embedded PostgreSQL of a site."""
    return int((directory / "data/pg/postmaster.pid").read_text().splitlines()[0])


def kill(pid: int) -> None:
    """kill -9."""
    os.kill(pid, 9)
