"""A channel whose provider is the test: it does whatever the test's script says, and keeps every message it was handed."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import text

from aftertouch.channels import (
    Accepted,
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    Finding,
    Limit,
    Message,
    Outcome,
    ReasonClass,
    Settings,
    Signal,
    Unclear,
)
from aftertouch.client import Client
from aftertouch.delivery.breaker import Breaker, BreakerSettings
from aftertouch.delivery.leases import LEASE, Lease
from aftertouch.delivery.pace import Pacer
from aftertouch.delivery.sender import Sender
from aftertouch.rpc.values import to_struct
from aftertouch.store.engine import transaction
from aftertouch.store.units import Unit, claim_unit
from aftertouch.v1 import campaigns_pb2, contacts_pb2
from tests.fix_world import World

Messages = Sequence[Message[Address, Content]]


class Nest(Address):
    tree: str

    @property
    def key(self) -> str:
        return self.tree


class Note(Content):
    text: str


class PigeonChannel(Channel):
    """Sends may reach a person twice, so nobody may be sent to twice."""

    name = "pigeon"
    label = "Pigeon post"
    address_model = Nest
    content_model = Note
    settings_model = Settings
    capabilities = Capabilities(webhooks=False, batch_size=4)
    signals = (Signal(name="delivered", label="Delivered", implies=("sent",)),)
    actions = (
        Action(name="delivered", label="Delivered", short_name="delivered", expression="delivered"),
        Action(name="not_delivered", label="Not delivered", short_name="not delivered", expression="sent & ~delivered"),
    )
    reasons: Mapping[str, ReasonClass] = {
        "storm": ReasonClass.TRANSIENT,
        "no_tree": ReasonClass.RECIPIENT_GONE,
        "stop": ReasonClass.OPTED_OUT,
        "hawks": ReasonClass.RATE,
        "too_heavy": ReasonClass.CONTENT,
        "tired": ReasonClass.CAPPED,
        "asleep": ReasonClass.CAPPED,
    }
    capped_for: Mapping[str, timedelta] = {"asleep": timedelta(hours=8)}

    def __init__(self, settings: Settings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        self.handed: list[Message[Any, Any]] = []
        self.script: Callable[[Messages], Awaitable[Sequence[Outcome]]] = accept_all

    async def send(self, messages: Messages) -> Sequence[Outcome]:
        self.handed += messages
        return await self.script(messages)

    @property
    def copies(self) -> Counter[tuple[str, str]]:
        """How often each address was handed each token."""
        return Counter((message.address.tree, message.token) for message in self.handed)


class HomingChannel(PigeonChannel):
    """The same token twice reaches the person once."""

    name = "homing"
    capabilities = Capabilities(webhooks=False, batch_size=4, idempotent_sends=True)


class WoodsChannel(PigeonChannel):
    """Trees stand in woods, and each wood has weather of its own."""

    name = "woods"

    def __init__(self, settings: Settings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        self.woods: dict[str, str] = {}
        """By person; whoever is not there lives in the middle."""

    def find_wood(self, message: Message[Any, Any]) -> str:
        return self.woods.get(message.address.tree.partition("-")[0], "middle")

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return (Limit(key=self.find_wood(message)),)


class OwlChannel(PigeonChannel):
    """Owls can be asked whether they took a message."""

    name = "owl"
    capabilities = Capabilities(webhooks=False, batch_size=4, look_up=True)

    def __init__(self, settings: Settings, *, webhook_url: str) -> None:
        super().__init__(settings, webhook_url=webhook_url)
        self.asked: list[str] = []
        self.findings: dict[str, Finding] = {}
        """By address; what is not there is unclear."""

    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        trees = [cast("Nest", message.address).tree for message in messages]
        self.asked += trees
        return [self.findings.get(tree, Unclear(detail="silence")) for tree in trees]


async def accept_all(messages: Messages) -> Sequence[Outcome]:
    """The script to begin with."""
    return [Accepted() for _ in messages]


@dataclass
class Loft:
    """A world with pigeons, in which units are sent when the test says so."""

    world: World
    client: Client
    """Of an app of its own."""
    name: str
    """Of the channel."""
    pacer: Pacer
    breaker: Breaker

    @property
    def channel(self) -> Any:
        """The channel object that sends."""
        return self.world.core.registry.channels[self.name]

    async def import_people(
        self,
        people: int,
        *,
        trees: int = 1,
        attributes: Mapping[str, Any] | None = None,
        time_zones: Mapping[str, str] | None = None,
    ) -> None:
        """Make people p0, p1, … with so many addresses each."""
        contacts = []
        for index in range(people):
            contact = contacts_pb2.Contact(external_id=f"p{index}", time_zone=(time_zones or {}).get(f"p{index}", ""))
            contact.attributes.update(dict(attributes or {}))
            for tree in range(trees):
                contact.subscriptions.add(channel=self.name, address=to_struct({"tree": f"p{index}-{tree}"}))
            contacts.append(contact)
        await self.client.import_contacts(contacts)

    async def create(self, note: str = "Hi", **fields: Any) -> str:
        """Make a draft for everybody, and return its name."""
        client = self.client
        everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
        fields.setdefault("audience", everybody)
        draft = await client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(
                parent=client.parent,
                campaign=campaigns_pb2.Campaign(
                    display_name="Note",
                    channel=self.name,
                    content=to_struct({"text": note}),
                    **fields,
                ),
            )
        )
        return str(draft.name)

    async def draft(self, people: int, note: str = "Hi", **fields: Any) -> str:
        """Make people, and a draft for them."""
        await self.import_people(people)
        return await self.create(note, **fields)

    async def launch(
        self,
        people: int,
        *,
        trees: int = 1,
        note: str = "Hi",
        attributes: Mapping[str, Any] | None = None,
        time_zones: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> str:
        """Make people, launch a campaign to them, and return its name."""
        await self.import_people(people, trees=trees, attributes=attributes, time_zones=time_zones)
        return await self.relaunch(note, **fields)

    async def relaunch(self, note: str = "Hi", **fields: Any) -> str:
        """Launch one more campaign to everybody."""
        name = await self.create(note, **fields)
        await self.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
        return name

    async def claim(self) -> Unit:
        """Take a unit that is free, as a worker does."""
        async with transaction(self.world.core.engine) as conn:
            unit = await claim_unit(conn, self.name, LEASE)
        assert unit is not None
        return unit

    async def pass_time(self, duration: timedelta = timedelta(minutes=2)) -> None:
        """Let leases and back-offs be so much nearer to their end."""
        async with transaction(self.world.core.engine) as conn:
            await conn.execute(
                text(
                    "UPDATE send_units SET lease_until = lease_until - :duration, ready_time = ready_time - :duration,"
                    " unclear_since = unclear_since - :duration"
                ),
                {"duration": duration},
            )
            await conn.execute(text("UPDATE paces SET free_time = free_time - :duration"), {"duration": duration})

    def make_sender(self, unit: Unit) -> Sender:
        """Somebody who sends a claimed unit."""
        core = self.world.core
        lease = Lease(unit, time.monotonic())
        return Sender(
            *(core.engine, core.ledger, core.context, self.pacer, self.breaker),
            *(core.registry.types, self.channel, lease),
        )

    async def send(self) -> None:
        """Claim a unit and send it until it is done or has to wait."""
        await self.make_sender(await self.claim()).run()

    async def get_campaign(self, name: str) -> campaigns_pb2.Campaign:
        """A campaign with its counts."""
        return await self.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))

    async def read_recipients(self, name: str) -> dict[str, campaigns_pb2.Recipient]:
        """The people of a campaign of at most 1,000, by external_id."""
        page = await self.client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=name, page_size=1000))
        return {recipient.contact.rpartition("/")[2]: recipient for recipient in page.recipients}

    async def opt_out(self, person: str) -> None:
        """Let somebody with one address say stop."""
        contact = contacts_pb2.Contact(external_id=person)
        subscription = contact.subscriptions.add(channel=self.name, state=contacts_pb2.Subscription.State.OPTED_OUT)
        subscription.address.update({"tree": f"{person}-0"})
        await self.client.contacts.UpsertContacts(
            contacts_pb2.UpsertContactsRequest(parent=self.client.parent, contacts=[contact])
        )


_numbers = itertools.count()


@asynccontextmanager
async def open_loft(world: World, channel: type[PigeonChannel]) -> AsyncIterator[Loft]:
    """A loft of its own in a world that many share."""
    async with transaction(world.core.engine) as conn:
        await conn.execute(text("DELETE FROM send_units"))
        await conn.execute(text("DELETE FROM paces"))
    app = f"loft-{next(_numbers)}"
    async with world.connect(app, await world.create_key(app, "admin")) as client:
        loft = Loft(world, client, channel.name, Pacer(world.core.engine), Breaker(BreakerSettings()))
        loft.channel.handed.clear()
        loft.channel.script = accept_all
        yield loft
