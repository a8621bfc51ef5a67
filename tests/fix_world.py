"""Whole worlds: a sandbox of the providers, a server, and clients of an app in it; all in the test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from aftertouch.channels import Channel
from aftertouch.client import Client
from aftertouch.config import Config
from aftertouch.contact_files import read_contacts
from aftertouch.delivery import lookup, sender
from aftertouch.plugins import discover_channels
from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import Sandbox, SandboxSettings
from aftertouch.server import Addresses, Core, serve
from aftertouch.store import apps as store
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2
from aftertouch.web.server import bind
from tests.e2e.spools import wait_until_drained
from tests.fix_database import clone_database

SECRET_KEY = "a secret key of the tests, 32 characters or more"

CONTENT: dict[str, dict[str, Any]] = {
    "sms": {"body": "Hi {{ first_name | default: 'there' }}"},
    "whatsapp": {"template": "summer_sale", "language": "en_US", "body": ["{{ first_name | default: 'there' }}"]},
    "push": {"title": "Hi {{ first_name | default: 'there' }}", "body": "Sale", "url": "https://shop.example/"},
}
"""A content for each channel that can be rendered for everybody."""


@dataclass
class World:
    """A running server with its sandbox, and a client of its app ``acme`` that may do everything."""

    sandbox: Sandbox
    core: Core
    addresses: Addresses
    client: Client
    secret: str
    data_dir: Path

    async def create_key(self, app: str, *scopes: str) -> str:
        """A key of an app, which is made when it is new."""
        async with transaction(self.core.engine) as conn:
            found = await store.find_app(conn, app) or await store.create_app(conn, app, app.capitalize())
            _, secret = await store.create_api_key(conn, found.app_id, "test", scopes)
        return secret

    def make_worker_environment(self, directory: Path) -> dict[str, str]:
        """The settings of ``aftertouch worker`` beside this world's server."""
        return self.sandbox.environment | {
            "AFTERTOUCH_DATABASE_URL": self.core.engine.url.set(drivername="postgresql").render_as_string(hide_password=False),
            "AFTERTOUCH_DATA_DIR": str(directory),
            "AFTERTOUCH_PUBLIC_URL": self.addresses.public_url,
            "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
        }

    async def expire_leases(self) -> None:
        """Let every unit be taken over now, as if the holders' leases had run out."""
        async with transaction(self.core.engine) as conn:
            await conn.execute(text("UPDATE send_units SET lease_until = now() WHERE lease_until > now()"))

    def connect(self, app: str, secret: str) -> Client:
        """A client with another key; enter it."""
        return Client(self.addresses.grpc, api_key=secret, app=app)

    async def import_people(self) -> None:
        """Everybody of the sandbox becomes a contact of ``acme``."""
        imported = await self.client.import_contacts(read_contacts(self.sandbox.population.list_rows()))
        assert imported.rejected_count == 0, imported.rejections

    async def create_campaign(self, channel: str, audience: campaigns_pb2.Audience | None = None, **fields: Any) -> Any:
        """A draft with content, to all subscribers unless said otherwise."""
        everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
        campaign = campaigns_pb2.Campaign(
            display_name="Summer Sale", channel=channel, content=to_struct(CONTENT[channel]), audience=audience or everybody
        )
        campaign.MergeFrom(campaigns_pb2.Campaign(**fields))
        return await self.client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(parent=self.client.parent, campaign=campaign)
        )

    async def launch(self, name: str) -> None:
        """Launch a campaign, and wait until it is sent and every receipt has arrived."""
        await self.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
        await self.wait_until_sent(name)
        await self.hear_all()

    async def hear_all(self) -> None:
        """Wait until every receipt has arrived, and is in the database."""
        await self.sandbox.outbox.drain()
        await self.wait_until_stored()

    async def wait_until_stored(self) -> None:
        """Wait for what was answered from the spool, where a crowded machine's database took longer than a provider waits."""
        await wait_until_drained(self.data_dir)

    async def wait_until_sent(self, name: str, seconds: float = 120) -> campaigns_pb2.Campaign:
        """Wait until a campaign is no longer being sent, and return it."""
        async with asyncio.timeout(seconds):
            # There is nothing to wait on but the answer of the next call.
            while (campaign := await self.get_campaign(name)).state == campaigns_pb2.Campaign.State.SENDING:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        return campaign

    async def get_campaign(self, name: str) -> campaigns_pb2.Campaign:
        """A campaign with its counts, in which everything is that was answered for."""
        await self.wait_until_stored()
        return await self.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))

    async def read_recipients(self, name: str) -> dict[str, campaigns_pb2.Recipient]:
        """All recipients of a campaign by external_id, with everything that was answered for."""
        await self.wait_until_stored()
        found: dict[str, campaigns_pb2.Recipient] = {}
        token = ""
        while True:
            page = await self.client.campaigns.ListRecipients(
                campaigns_pb2.ListRecipientsRequest(parent=name, page_size=1000, page_token=token)
            )
            found |= {recipient.contact.rpartition("/")[2]: recipient for recipient in page.recipients}
            token = page.next_page_token
            if not token:
                return found


@asynccontextmanager
async def run_world(
    database_url: str,
    settings: SandboxSettings | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    extra: Iterable[type[Channel]] = (),
    allowed: frozenset[str] | None = None,
    **config: Any,
) -> AsyncIterator[World]:
    """A world on a database that has the schema.

    Args:
        settings: of the sandbox.
        environment: settings of channels, besides those that lead to the sandbox.
        extra: channels, besides those that are installed.
        allowed: the channels to keep; None keeps all.
        config: settings of the server.
    """
    listener = bind("127.0.0.1:0")
    hook = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/webhooks/whatsapp"
    chosen = settings or SandboxSettings(size=60, time_scale=0.05)
    sandboxed = SandboxSettings(**{**vars(chosen), "whatsapp_webhook_url": hook})
    with TemporaryDirectory(prefix="aftertouch-") as directory:
        async with Sandbox(sandboxed) as sandbox:
            values = {"grpc_address": "127.0.0.1:0", "data_dir": directory, **config}
            loaded = Config(database_url=SecretStr(database_url), secret_key=SecretStr(SECRET_KEY), **values)
            given = sandbox.environment | dict(environment or {})
            async with serve(loaded, discover_channels(extra=extra, allowed=allowed), given, asyncio.Event(), listener) as (
                core,
                addresses,
            ):
                async with transaction(core.engine) as conn:
                    app = await store.create_app(conn, "acme", "Acme")
                    _, secret = await store.create_api_key(conn, app.app_id, "test", ["admin"])
                async with Client(addresses.grpc, api_key=secret, app="acme") as client:
                    yield World(sandbox, core, addresses, client, secret, loaded.data_dir)


OpenWorld = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def open_world(database_url: str) -> OpenWorld:
    """Open a world: ``async with open_world(SandboxSettings(size=50)) as world``; what ``run_world`` takes, by keyword."""
    return partial(run_world, database_url)


@pytest.fixture
async def world(open_world: OpenWorld) -> AsyncIterator[World]:
    """A world of 60 people who are not imported yet."""
    async with open_world() as opened:
        yield opened


@pytest.fixture
def _look_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sandbox answers at once, so whether it took a message is known after a second."""
    for module in (lookup, sender):
        monkeypatch.setattr(module, "LOOK_UP_AFTER", timedelta(seconds=1))


@pytest.fixture(scope="module")
async def shared_world(postgres_url: str, template: str) -> AsyncIterator[World]:
    """A world of 60 contacts for all tests of a module; each works under names of its own."""
    async with clone_database(postgres_url, template) as url, run_world(url) as opened:
        await opened.import_people()
        yield opened
