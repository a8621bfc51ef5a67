"""A channel whose provider is the test: it does whatever the test's script says, and keeps every message it was handed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import text

from aftertouch.channels import (
    Accepted,
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    Message,
    Outcome,
    ReasonClass,
    Settings,
    Signal,
)
from aftertouch.cli import stream
from aftertouch.delivery.sender import LEASE, Sender
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
    actions = (Action(name="delivered", label="Delivered", short_name="delivered", expression="delivered"),)
    reasons: Mapping[str, ReasonClass] = {
        "storm": ReasonClass.TRANSIENT,
        "no_tree": ReasonClass.RECIPIENT_GONE,
        "stop": ReasonClass.OPTED_OUT,
        "hawks": ReasonClass.RATE,
    }

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


async def accept_all(messages: Messages) -> Sequence[Outcome]:
    """The script to begin with."""
    return [Accepted() for _ in messages]


@dataclass
class Loft:
    """A world with pigeons, in which units are sent when the test says so."""

    world: World
    name: str
    """Of the channel."""

    @property
    def channel(self) -> Any:
        """The channel object that sends."""
        return self.world.core.registry.channels[self.name]

    async def launch(self, people: int, *, trees: int = 1, note: str = "Hi", attributes: Mapping[str, Any] | None = None) -> str:
        """Make people p0, p1, … with so many addresses each, launch a campaign to them, and return its name."""
        contacts = []
        for index in range(people):
            contact = contacts_pb2.Contact(external_id=f"p{index}")
            contact.attributes.update(dict(attributes or {}))
            for tree in range(trees):
                contact.subscriptions.add(channel=self.name, address=to_struct({"tree": f"p{index}-{tree}"}))
            contacts.append(contact)
        await self.world.client.import_contacts(stream(iter(contacts)))
        return await self.relaunch(note)

    async def relaunch(self, note: str = "Hi") -> str:
        """Launch one more campaign to everybody."""
        client = self.world.client
        draft = await client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(
                parent=client.parent,
                campaign=campaigns_pb2.Campaign(
                    display_name="Note",
                    channel=self.name,
                    content=to_struct({"text": note}),
                    audience=campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers()),
                ),
            )
        )
        await client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=draft.name))
        return str(draft.name)

    async def claim(self) -> Unit:
        """Take a unit that is free, as a worker does."""
        async with transaction(self.world.core.engine) as conn:
            unit = await claim_unit(conn, [self.name], LEASE)
        assert unit is not None
        return unit

    async def pass_time(self, duration: timedelta = LEASE) -> None:
        """Let leases and back-offs be so much nearer to their end."""
        async with transaction(self.world.core.engine) as conn:
            await conn.execute(text("UPDATE send_units SET lease_until = lease_until - :duration"), {"duration": duration})

    def make_sender(self, unit: Unit) -> Sender:
        """Somebody who sends a claimed unit."""
        core = self.world.core
        return Sender(core.engine, core.ledger, core.registry.types[self.name], self.channel, unit)

    async def send(self) -> None:
        """Claim a unit and send it until it is done or has to wait."""
        await self.make_sender(await self.claim()).run()

    async def read_signals(self, name: str) -> dict[str, set[str]]:
        """The signals of a campaign's people."""
        return {person: set(found.signals) for person, found in (await self.world.read_recipients(name)).items()}
