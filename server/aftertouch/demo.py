"""``aftertouch demo``: the main job in a world of its own, every set of people compared with what really happened.

Two processes of ours run meanwhile, a sandbox and a server with an embedded database in a temporary directory; this one
is only a client, and everything it knows of the campaigns it learns over gRPC.

A channel that is installed beside the sandbox's three, and set up in the environment, is a guest: nobody plays its provider here,
so nothing is sent by it, but every second person gets an address there, and whom it would reach is compared like everything else.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from aftertouch.channels import Address
from aftertouch.client import Client
from aftertouch.contact_files import read_contacts
from aftertouch.declarations import ChannelType
from aftertouch.plugins import discover_channels, name_setting
from aftertouch.processes import Child, run_command
from aftertouch.sandbox import CHANNELS, Person, Population, SandboxSettings
from aftertouch.v1 import campaigns_pb2, channels_pb2, retargeting_pb2

SERVER_READY = r"gRPC on (\S+), webhooks on (\S+)"
SANDBOX_READY = r"the sandbox answers on (\S+)"
SEND_SECONDS = 120.0
USER = "you@example.com"
"""Who signs in to the console."""

People = frozenset[str]
_State = campaigns_pb2.Campaign.State
_READY = channels_pb2.Channel.State.READY


class Difference(Exception):
    """What the server says is not what happened."""


def run_demo(people: int) -> int:
    """Run it with so many people, and return the exit code: 0 when everything agreed."""
    console = Console(highlight=False)
    try:
        with tempfile.TemporaryDirectory(prefix="aftertouch-demo-") as directory:
            asyncio.run(Demo(console, Path(directory), people).run())
    except Difference as error:
        console.print(f"[bold red]different:[/] {error}")
        return 1
    return 0


@dataclass(frozen=True)
class Told:
    """What the sandbox decided about one campaign's messages: people by signal."""

    since: int
    """The messages are those on the channel after this sequence number …"""
    until: int
    """… up to this one."""
    messaged: People
    signals: dict[str, People]

    def __getitem__(self, signal: str) -> People:
        return self.signals.get(signal, frozenset())


@dataclass(frozen=True)
class Guest:
    """A channel whose provider nobody plays here."""

    channel: str
    label: str
    column: str
    """Of its addresses, in a file of contacts."""
    addresses: Mapping[str, str]
    """By external_id."""


def make_guests(types: Mapping[str, ChannelType], population: Population) -> list[Guest]:
    """Channels with an address of every second person, where one can be made up."""
    guests = []
    for name, found in sorted(types.items()):
        model = found.channel.address_model
        required = [field for field, info in model.model_fields.items() if info.is_required()]
        if len(required) == 1:
            made = {p.external_id: _make_address(model, required[0], p) for p in population if p.index % 2 == 0}
            addresses = {external_id: address for external_id, address in made.items() if address}
            guests.append(Guest(name, found.channel.label, f"{name}.{required[0]}", addresses))
    return guests


def _make_address(model: type[Address], field: str, person: Person) -> str:
    """What of a person a channel takes for an address; empty when it takes nothing."""
    for text in (person.phone, person.external_id, f"{person.external_id}@example.com"):
        with suppress(ValidationError):
            model.model_validate({field: text})
            return text
    return ""


def ask_sandbox(url: str, path: str, *, method: str = "GET", body: Any = None) -> str:
    """One request to the sandbox's control."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url + path, data=data, method=method), timeout=600) as answer:
        text: str = answer.read().decode()
    return text


def read_truth(url: str, channel: str, since: int, until: int = sys.maxsize) -> Told:
    """What happened, so far, to the messages on a channel in a range of sequence numbers.

    Raises:
        Difference: somebody was messaged twice.
    """
    messaged: list[str] = []
    signals: dict[str, set[str]] = {}
    last = since
    for line in ask_sandbox(url, f"/sandbox/truth?channel={channel}&since={since}").splitlines():
        entry = json.loads(line)
        if entry["sequence"] > until:
            break
        last = entry["sequence"]
        person = entry["external_id"]
        messaged.append(person)
        signals.setdefault("sent" if entry["refused"] is None else "failed", set()).add(person)
        for signal in entry["signals"]:
            signals.setdefault(signal, set()).add(person)
    if len(messaged) != len(set(messaged)):
        raise Difference(f"{len(messaged) - len(set(messaged))} messages on {channel} were sent twice")
    return Told(since, last, frozenset(messaged), {name: frozenset(people) for name, people in signals.items()})


def answer_actions(channel: str, told: Told) -> dict[str, People]:
    """Who matches each action, by the words of the channels' documents, in plain sets. The outcome of every message is known."""
    return _answer_own(channel, told) | {"unclear": frozenset()}


def _answer_own(channel: str, told: Told) -> dict[str, People]:
    match channel:
        case "whatsapp":
            read = told["read"] | told["replied"] | told["clicked"]
            delivered = told["delivered"] | read
            return {
                "not_read": delivered - read,
                "not_received": (told["failed"] | told["sent"]) - delivered,
                "read": read,
                "failed": told["failed"] - delivered,
                "replied": told["replied"],
                "not_replied": delivered - told["replied"],
                "clicked": told["clicked"],
                "not_clicked": delivered - told["clicked"],
            }
        case "sms":
            delivered = told["delivered"] | told["clicked"]
            return {
                "delivered": delivered,
                "not_delivered": told["failed"] - delivered,
                "sent": told.messaged,
                "replied": told["replied"],
                "not_replied": delivered - told["replied"],
                "clicked": told["clicked"],
                "not_clicked": delivered - told["clicked"],
            }
        case _:
            sent = told["sent"]
            confirmed = told["confirmed"] | told["clicked"] | told["dismissed"]
            return {
                "clicked": told["clicked"],
                "not_clicked": sent - told["clicked"],
                "confirmed": confirmed,
                "not_confirmed": sent - confirmed - told["unconfirmable"],
                "sent": sent,
            }


class Demo:
    """One run."""

    def __init__(self, console: Console, directory: Path, people: int) -> None:
        self._console = console
        self._directory = directory
        self._size = people
        self._checked = 0
        self._began = time.monotonic()

    async def run(self) -> None:
        """Do all of it.

        Raises:
            Difference: at the first difference.
        """
        self._say("a sandbox of Twilio, Meta and a push service, and a server with an embedded PostgreSQL")
        log = self._directory / "log.txt"
        async with Child(
            "sandbox", "--port=0", f"--people={self._size}", environment={}, ready=SANDBOX_READY, log=log
        ) as sandbox:
            (self._sandbox,) = sandbox.found
            settings = SandboxSettings(size=self._size)
            self._population = Population(settings.seed, self._size, self._sandbox, settings.shares)
            others = {name: found for name, found in discover_channels().types.items() if name not in CHANNELS}
            given = tuple(name_setting(name, "") for name in others)
            environment = {name: value for name, value in os.environ.items() if name.startswith(given)}
            environment |= settings.environment(self._sandbox) | {
                "AFTERTOUCH_DATA_DIR": str(self._directory / "data"),
                "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
                "AFTERTOUCH_HTTP_ADDRESS": "127.0.0.1:0",
                "AFTERTOUCH_LOG_LEVEL": "warning",
                # What was answered is in the database then, and can be compared.
                "AFTERTOUCH_SPOOL_MEGABYTES": "0",
            }
            async with Child("serve", environment=environment, ready=SERVER_READY, log=log) as server:
                address, webhooks = server.found
                hook = {"url": f"{webhooks}/v1/webhooks/whatsapp"}
                await asyncio.to_thread(ask_sandbox, self._sandbox, "/sandbox/whatsapp-webhook", method="PUT", body=hook)
                await run_command("apps", "create", "demo", environment=environment)
                key = (await run_command("keys", "create", "demo", environment=environment)).strip()
                async with Client(address, api_key=key, app="demo") as client:
                    self._client = client
                    listed = await client.channels.ListChannels(channels_pb2.ListChannelsRequest(page_size=1000))
                    ready = {channel.name.rpartition("/")[2] for channel in listed.channels if channel.state == _READY}
                    guests = {name: found for name, found in others.items() if name in ready}
                    self._guests = make_guests(guests, self._population)
                    await self._play()
                self._say(f"[bold green]{self._checked} sets of people compared, all equal[/]")
                if sys.stdin.isatty() and self._console.is_terminal:
                    await self._offer_console(webhooks, environment)
        self._console.print("  `aftertouch serve --sandbox` keeps such a world running, with its console", style="dim")

    async def _offer_console(self, url: str, environment: dict[str, str]) -> None:
        """Let somebody look at this world in the console, until they press Enter."""
        password = (await run_command("users", "create", "demo", USER, "--role=admin", environment=environment)).strip()
        self._console.print(f"\n  Look at it in the console: {url}/console", soft_wrap=True)
        self._console.print(f"  as {USER} with {password}. Enter ends it all.", soft_wrap=True)
        pressed = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin, pressed.set)
        try:
            await pressed.wait()
        finally:
            loop.remove_reader(sys.stdin)
        sys.stdin.readline()

    async def _play(self) -> None:
        self._say(f"{self._size:,} people: some on one channel, some on all")
        imported = await self._client.import_contacts(read_contacts(self._list_rows()))
        self._compare("people", imported.created_count, self._size)
        self._unreachable: dict[str, set[str]] = {"sms": set(), "whatsapp": set(), "push": set()}
        template = {"language": "en_US", "body": ["{{ first_name | default: 'there' }}"]}
        alert = {"title": "Summer Sale", "body": "It ends today", "url": "https://shop.example/"}
        sale = await self._client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(
                parent=self._client.parent,
                campaign_id="summer-sale",
                campaign=campaigns_pb2.Campaign(
                    display_name="Summer Sale",
                    channel="whatsapp",
                    content=ParseDict({**template, "template": "summer_sale"}, Struct()),
                    audience=campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers()),
                ),
            )
        )
        told = await self._send(sale, self._list_people("whatsapp"))
        by_sms = await self._follow(
            sale, "not_read", told, "sms", {"body": "Hi {{ first_name | default: 'there' }}, it ends today"}
        )
        by_push = await self._follow(sale, "not_read", told, "push", {**alert, "title": "Hello {{ first_name }}"})
        await self._follow(by_sms[0], "not_delivered", by_sms[1], "push", alert)
        await self._follow(by_push[0], "not_clicked", by_push[1], "sms", {"body": "Last chance, {{ first_name }}"})
        await self._follow(by_push[0], "clicked", by_push[1], "whatsapp", {**template, "template": "vip_offer"})
        if self._guests:
            await self._show_guests([(sale, told), by_sms, by_push])

    def _list_rows(self) -> Iterator[dict[str, str]]:
        for row in self._population.list_rows():
            yield row | {guest.column: guest.addresses.get(row["external_id"], "") for guest in self._guests}

    async def _show_guests(self, sources: Iterable[tuple[campaigns_pb2.Campaign, Told]]) -> None:
        """The columns of the guests: whom of each campaign's people they would reach."""
        labels = [guest.label for guest in self._guests]
        self._say(f"[bold]{' and '.join(labels)}[/], installed beside: whom a follow-up there would reach; nothing is sent")
        table = Table("", "action", "people", *labels, box=None, pad_edge=False)
        for source, told in sources:
            answers = answer_actions(source.channel, await self._hear(source.channel, told.since, told.until))
            matrix = await self._client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=source.name))
            for row in matrix.rows:
                people = answers[row.action_count.action.action]
                reached = {cell.channel: cell.reachable_count for cell in row.cells}
                for guest in self._guests:
                    what = f"people of {row.action_count.action.action} to reach on {guest.channel}"
                    self._compare(what, reached[guest.channel], len(people & guest.addresses.keys()))
                counts = [f"{reached[guest.channel]:,}" for guest in self._guests]
                table.add_row(source.channel, row.action_count.action.display_name, f"{len(people):,}", *counts)
        self._console.print(table)

    async def _follow(
        self, source: campaigns_pb2.Campaign, action: str, told: Told, channel: str, content: dict[str, Any]
    ) -> tuple[campaigns_pb2.Campaign, Told]:
        """Retarget a campaign on a channel, and send the wave to exactly the right people."""
        told = await self._hear(source.channel, told.since, told.until)
        selection = campaigns_pb2.RetargetSelection(source=source.name, action=action)
        shown = await self._client.retargeting.PreviewRetarget(
            retargeting_pb2.PreviewRetargetRequest(selection=selection, channel=channel)
        )
        matching = answer_actions(source.channel, told)[action]
        expected = (matching & self._list_people(channel)) - self._unreachable[channel]
        self._compare(f"people who match {action}", shown.matched_count, len(matching))
        self._compare(f"people to reach on {channel}", shown.audience_count, len(expected))
        self._compare("the funnel's sum", shown.matched_count - sum(drop.count for drop in shown.drops), shown.audience_count)
        draft = await self._client.retargeting.CreateRetarget(
            retargeting_pb2.CreateRetargetRequest(selection=selection, channel=channel)
        )
        wave = await self._client.campaigns.UpdateCampaign(
            campaigns_pb2.UpdateCampaignRequest(
                campaign=campaigns_pb2.Campaign(name=draft.name, content=ParseDict(content, Struct()))
            )
        )
        return wave, await self._send(wave, expected)

    async def _send(self, campaign: campaigns_pb2.Campaign, expected: People) -> Told:
        """Launch a campaign, wait until it is sent and heard of, and compare everything with the truth."""
        self._say(f"[bold]{campaign.display_name}[/] on {campaign.channel} to {len(expected):,} people")
        since = json.loads(ask_sandbox(self._sandbox, "/sandbox/stats"))["last_sequence"]
        await self._client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=campaign.name))
        began = time.monotonic()
        await self._wait_until_sent(campaign.name)
        seconds = time.monotonic() - began
        told = await self._hear(campaign.channel, since)
        people = await self._read_recipients(campaign.name)
        skipped = frozenset(person for person, recipient in people.items() if "skipped" in recipient.signals)
        nameless = frozenset(person.external_id for person in self._population if not person.first_name)
        has_default = "first_name }}" not in str(campaign.content)
        self._compare("recipients", frozenset(people), expected)
        self._compare("people left out for want of a name", skipped, frozenset() if has_default else expected & nameless)
        self._compare("people messaged", told.messaged, expected - skipped)
        heard = {
            signal: frozenset(person for person, recipient in people.items() if signal in recipient.signals)
            for signal in ("failed", "clicked", "read", "confirmed", "delivered")
        }
        self._compare("people who failed", heard["failed"], told["failed"])
        self._compare("people who read", heard["read"], told["read"])
        self._compare("people who clicked", heard["clicked"], told["clicked"])
        answers = answer_actions(campaign.channel, told)
        listed = await self._client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=campaign.name))
        table = Table("action", "people", "of", "cannot be known", box=None, pad_edge=False)
        for counted in listed.actions:
            self._compare(f"people of {counted.action.action}", counted.count, len(answers[counted.action.action]))
            table.add_row(counted.action.display_name, f"{counted.count:,}", f"{listed.recipients:,}", f"{counted.apart_count:,}")
        for person, recipient in people.items():
            if any(reason.startswith(("recipient_gone/", "opted_out/", "capped/")) for reason in recipient.reasons):
                self._unreachable[campaign.channel].add(person)
        self._console.print(table)
        self._console.print(
            f"  sent in {seconds:.1f} s, {len(told.messaged) / seconds:,.0f}/s; every set as it happened", style="dim"
        )
        return told

    async def _hear(self, channel: str, since: int, until: int = sys.maxsize) -> Told:
        """What happened to a campaign's messages, once no receipt is on its way any more."""
        await asyncio.to_thread(ask_sandbox, self._sandbox, "/sandbox/drain?timeout=120", method="POST")
        told = await asyncio.to_thread(read_truth, self._sandbox, channel, since, until)
        if channel == "push":
            silent = frozenset(person.external_id for person in self._population if not person.push_confirms)
            told.signals["unconfirmable"] = told["sent"] & silent
        return told

    async def _wait_until_sent(self, name: str) -> None:
        async with asyncio.timeout(SEND_SECONDS):
            while True:
                campaign = await self._client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
                if campaign.state != _State.SENDING:
                    break
                await asyncio.sleep(0.1)
        self._compare("the state", _State.Name(campaign.state), "SENT")

    async def _read_recipients(self, name: str) -> dict[str, campaigns_pb2.Recipient]:
        people: dict[str, campaigns_pb2.Recipient] = {}
        token = ""
        while True:
            page = await self._client.campaigns.ListRecipients(
                campaigns_pb2.ListRecipientsRequest(parent=name, page_size=1000, page_token=token)
            )
            people |= {recipient.contact.rpartition("/")[2]: recipient for recipient in page.recipients}
            token = page.next_page_token
            if not token:
                return people

    def _list_people(self, channel: str) -> People:
        return frozenset(person.external_id for person in self._population if channel in person.channels)

    def _compare(self, what: str, found: Any, expected: Any) -> None:
        self._checked += 1
        if found == expected:
            return
        if isinstance(found, Iterable) and not isinstance(found, str):
            extra, missing = sorted(found - expected), sorted(expected - found)
            raise Difference(f"{what}: {len(extra)} too many {extra[:5]}, {len(missing)} missing {missing[:5]}")
        raise Difference(f"{what}: {found}, and it should be {expected}")

    def _say(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._began:4.0f} s[/] {text}", soft_wrap=True)
