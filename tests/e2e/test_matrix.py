"""Every action of every channel, followed up on every channel: the set of people is the one that the sandbox knows of.

Half of all receipts come twice and a third come late, and what is expected is computed from the sandbox's own decisions, by
the words of the actions and in plain sets: nothing here knows the server's signals or expressions.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import aiohttp
import pytest

from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings, Shares
from aftertouch.sandbox.truth import Decision
from aftertouch.v1 import campaigns_pb2, retargeting_pb2
from tests.fix_database import clone_database
from tests.fix_world import CONTENT, World, run_world
from tests.refusals import refuse

CHANNELS = ("push", "sms", "whatsapp")
UNREACHABLE = {"sms": {"21610", "21211"}, "whatsapp": {"131026", "131050", "131049"}, "push": {"410"}}
"""The providers' codes for "this will never arrive", "this person said stop" and "not for a day": nobody is written to after
them."""
LINKED = {
    "sms": {"body": "Hi {{ first_name | default: 'there' }}, see https://shop.example/sale."},
    "whatsapp": {"body": ["{{ first_name | default: 'there' }}", "https://shop.example/sale"]},
    "push": {},
}

Story = frozenset[str]
"""What happened to one person in one campaign: ``asked`` (handed over), ``taken`` or ``turned down``, and what followed."""


def _was_delivered(story: Story) -> bool:
    return bool(story & {"delivered", "read", "clicked"})


def _did_read(story: Story) -> bool:
    return bool(story & {"read", "clicked", "replied"})


def _did_confirm(story: Story) -> bool:
    return bool(story & {"confirmed", "clicked", "dismissed"})


ACTIONS: dict[str, dict[str, Callable[[Story], bool]]] = {
    "whatsapp": {
        "not_read": lambda story: _was_delivered(story) and not _did_read(story),
        "not_received": lambda story: bool(story & {"sent", "failed"}) and not _was_delivered(story),
        "read": lambda story: _did_read(story),
        "failed": lambda story: "failed" in story and not _was_delivered(story),
        "replied": lambda story: "replied" in story,
        "not_replied": lambda story: _was_delivered(story) and "replied" not in story,
        "clicked": lambda story: "clicked" in story,
        "not_clicked": lambda story: _was_delivered(story) and "clicked" not in story,
    },
    "sms": {
        "delivered": lambda story: _was_delivered(story),
        "not_delivered": lambda story: bool(story & {"undelivered", "turned down"}) and not _was_delivered(story),
        "sent": lambda story: "asked" in story,
        "replied": lambda story: "replied" in story,
        "not_replied": lambda story: _was_delivered(story) and "replied" not in story,
        "clicked": lambda story: "clicked" in story,
        "not_clicked": lambda story: _was_delivered(story) and "clicked" not in story,
    },
    "push": {
        "clicked": lambda story: "clicked" in story,
        "not_clicked": lambda story: "taken" in story and "clicked" not in story,
        "confirmed": _did_confirm,
        "not_confirmed": lambda story: "taken" in story and not _did_confirm(story) and "cannot confirm" not in story,
        "sent": lambda story: "taken" in story,
    },
}


@dataclass(frozen=True)
class Launched:
    """A campaign that was sent, and which of the sandbox's entries are its messages."""

    name: str
    channel: str
    first: int
    last: int


class Played:
    """A world in which one campaign was sent on each channel."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sources: dict[str, Launched] = {}

    async def launch(self, name: str, channel: str) -> Launched:
        first = len(self.world.sandbox.truth.entries)
        await self.world.launch(name)
        return Launched(name, channel, first, len(self.world.sandbox.truth.entries))

    async def click_links(self) -> None:
        """Every third person who got a message with a link clicks on it, and a machine looks at every second link."""
        async with aiohttp.ClientSession() as http:
            for number, entry in enumerate(self.world.sandbox.truth.entries):
                link = re.search(rf"{self.world.addresses.public_url}/l/[\w-]+", str(entry.content))
                if link is None or "delivered" not in entry.signals or entry.channel == "push":
                    continue
                visits = [("GET", "Mozilla/5.0 (Linux; Android 16) Chrome/156.0 Mobile Safari/537.36")] if number % 3 == 0 else []
                visits += [("HEAD", ""), ("GET", "WhatsApp/2.26.1 A")] if number % 2 == 0 else []
                for method, agent in visits:
                    given = {"allow_redirects": False, "headers": {"User-Agent": agent}}
                    async with http.request(method, link[0], **given) as answer:
                        assert (answer.status, answer.headers["location"]) == (302, "https://shop.example/sale")
                if number % 3 == 0:
                    entry.signals["clicked"] = Decision(acknowledged=True)

    def tell_stories(self, launched: Launched) -> dict[str, Story]:
        """What happened, by now, to each person to whom a campaign's message was handed over; once each."""
        stories: dict[str, Story] = {}
        for entry in self.world.sandbox.truth.entries[launched.first : launched.last]:
            assert entry.channel == launched.channel
            assert entry.person is not None
            assert entry.person.external_id not in stories, "messaged twice"
            told = {"asked", "taken" if entry.refused is None else "turned down", *entry.signals}
            if launched.channel == "sms" and entry.refused is None and "failed" in entry.signals:
                told.add("undelivered")
            if launched.channel == "push" and not entry.person.push_confirms:
                told.add("cannot confirm")
            stories[entry.person.external_id] = frozenset(told)
        return stories

    def list_reachable(self, channel: str) -> set[str]:
        """Everybody with the channel whom its provider has not ruled out, in whatever campaign."""
        people = {person.external_id for person in self.world.sandbox.population if channel in person.channels}
        for entry in self.world.sandbox.truth.entries:
            failed = entry.signals.get("failed")
            if entry.person and entry.channel == channel and failed and failed.code in UNREACHABLE[channel]:
                people.discard(entry.person.external_id)
        return people

    def find_matching(self, launched: Launched, action: str) -> set[str]:
        """Of whom the action is true, by the sandbox's account."""
        is_true = ACTIONS[launched.channel][action]
        return {person for person, story in self.tell_stories(launched).items() if is_true(story)}

    async def follow(self, source: Launched, action: str, channel: str) -> Launched | None:
        """Preview, make and launch the wave, and compare every set on the way; None when nobody who matches is left."""
        await self.world.hear_all()
        client = self.world.client
        selection = campaigns_pb2.RetargetSelection(source=source.name, action=action)
        matching = self.find_matching(source, action)
        expected = matching & self.list_reachable(channel)
        assert matching, "an empty wave would prove nothing"
        shown = await client.retargeting.PreviewRetarget(
            retargeting_pb2.PreviewRetargetRequest(selection=selection, channel=channel)
        )
        assert (shown.matched_count, shown.audience_count) == (len(matching), len(expected))
        draft = await client.retargeting.CreateRetarget(
            retargeting_pb2.CreateRetargetRequest(selection=selection, channel=channel)
        )
        await client.campaigns.UpdateCampaign(
            campaigns_pb2.UpdateCampaignRequest(
                campaign=campaigns_pb2.Campaign(name=draft.name, content=to_struct(CONTENT[channel]))
            )
        )
        if not expected:
            refusal = await refuse(client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=draft.name)))
            assert refusal.reason == "AUDIENCE_EMPTY"
            return None
        wave = await self.launch(draft.name, channel)
        assert (await self.world.get_campaign(draft.name)).state == campaigns_pb2.Campaign.State.SENT
        assert set(await self.world.read_recipients(draft.name)) == expected
        assert set(self.tell_stories(wave)) == expected
        return wave


@pytest.fixture(scope="module")
async def played(postgres_url: str, template: str) -> AsyncIterator[Played]:
    shares = Shares(
        sms_unreachable=0.15,
        push_beacon_lost=0.3,
        whatsapp_switched_off=0.1,
        whatsapp_failed_first=0.05,
    )
    settings = SandboxSettings(seed=7, size=300, time_scale=0.03, duplicate_share=0.5, late_share=0.3, shares=shares)
    async with clone_database(postgres_url, template) as url, run_world(url, settings) as world:
        await world.import_people()
        played = Played(world)
        for channel in CHANNELS:
            draft = await world.create_campaign(channel, content=LINKED[channel])
            played.sources[channel] = await played.launch(draft.name, channel)
        await played.click_links()
        yield played


CELLS = [(source, action, target) for source, actions in ACTIONS.items() for action in actions for target in CHANNELS]


@pytest.mark.parametrize("channel", CHANNELS)
async def test_actions_are_all_known_and_counted_as_they_happened(played: Played, channel: str) -> None:
    await played.world.hear_all()
    source = played.sources[channel]
    listed = await played.world.client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=source.name))
    counts = {counted.action.action: counted.count for counted in listed.actions}
    assert counts == {action: len(played.find_matching(source, action)) for action in ACTIONS[channel]} | {"unclear": 0}


@pytest.mark.parametrize(("source", "action", "target"), CELLS)
async def test_retarget_messages_exactly_the_people_it_happened_to(played: Played, source: str, action: str, target: str) -> None:
    wave = await played.follow(played.sources[source], action, target)
    # Whoever fails on WhatsApp is gone, said stop, or is held for a day.
    assert (wave is None) == ((source, action, target) == ("whatsapp", "failed", "whatsapp"))


async def test_wave_of_a_wave_messages_exactly_the_people_it_happened_to(played: Played) -> None:
    unread = await played.follow(played.sources["whatsapp"], "not_read", "push")
    assert unread is not None
    unclicked = await played.follow(unread, "not_clicked", "sms")
    assert unclicked is not None
    await played.follow(unclicked, "delivered", "whatsapp")
