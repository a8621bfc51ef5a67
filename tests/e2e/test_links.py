"""Tracked links through a whole server: who clicked on which, where it leads, and where it does not."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from aftertouch.rpc.values import to_struct
from aftertouch.v1 import apps_pb2, campaigns_pb2, contacts_pb2, retargeting_pb2
from tests.e2e.spools import wait_until_drained
from tests.e2e.test_spool import take_away
from tests.fix_world import OpenWorld, World
from tests.refusals import refuse

PERSON = "Mozilla/5.0 (Linux; Android 16) AppleWebKit/537.36 Chrome/156.0.0.0 Mobile Safari/537.36"
BODY = "Sale https://shop.example/sale?a=1#top or {{ first_name | default: 'x' }} https://shop.example/me/{{ external_id }}"


class Visitor:
    """Somebody with a browser, who follows no redirect."""

    def __init__(self, world: World, http: aiohttp.ClientSession) -> None:
        self.world = world
        self._http = http

    async def visit(self, link: str, method: str = "GET", agent: str = PERSON, **headers: str) -> tuple[int, str | None]:
        """Status and Location."""
        path = re.sub(r"^https?://[^/]+", "", link)
        url = f"http://{self.world.addresses.http}{path}"
        given = {"allow_redirects": False, "headers": {"User-Agent": agent, **headers}}
        async with self._http.request(method, url, **given) as answer:
            return answer.status, answer.headers.get("location")

    async def send(self, body: str = BODY, **fields: Any) -> tuple[str, dict[str, list[str]]]:
        """Send an SMS to everybody; the campaign's name, and the links that each person got (by address: strangers)."""
        first = len(self.world.sandbox.truth.entries)
        campaign = await self.world.create_campaign("sms", content={"body": body}, **fields)
        await self.world.launch(campaign.name)
        entries = self.world.sandbox.truth.entries[first:]
        taken = (entry for entry in entries if entry.refused is None and "delivered" in entry.signals)
        return campaign.name, {
            entry.person.external_id if entry.person else entry.address: re.findall(r"https?://\S+", str(entry.content))
            for entry in taken
        }


@pytest.fixture
async def visitor(shared_world: World) -> AsyncIterator[Visitor]:
    async with aiohttp.ClientSession() as http:
        yield Visitor(shared_world, http)


async def test_click_leads_on_and_is_known_by_person_and_link(visitor: Visitor) -> None:
    name, links = await visitor.send()
    (ada, ada_links), (bob, bob_links), (eve, eve_links), *_ = links.items()
    assert all(re.fullmatch(rf"{visitor.world.addresses.public_url}/l/[\w-]{{24}}[01]", link) for link in ada_links)
    assert await visitor.visit(ada_links[0]) == (302, "https://shop.example/sale?a=1#top")
    assert await visitor.visit(ada_links[0]) == (302, "https://shop.example/sale?a=1#top")
    assert await visitor.visit(bob_links[1]) == (302, f"https://shop.example/me/{bob}")
    assert (await visitor.visit(eve_links[0], "HEAD"))[0] == 302
    assert (await visitor.visit(eve_links[0], agent="WhatsApp/2.26 A"))[0] == 302
    assert (await visitor.visit(eve_links[0], **{"Sec-Purpose": "prefetch"}))[0] == 302

    campaign = await visitor.world.get_campaign(name)
    assert list(campaign.links) == ["https://shop.example/sale?a=1#top", "https://shop.example/me/{{ external_id }}"]
    assert (campaign.counts.signals["clicked"], campaign.counts.signals["scanned"]) == (2, 1)
    clicks = {reason.reason_code: reason.count for reason in campaign.counts.reasons if reason.signal == "clicked"}
    assert clicks == {"0": 1, "1": 1}
    people = await visitor.world.read_recipients(name)
    assert "clicked" in people[ada].signals
    assert list(people[bob].reasons) == ["link/1"]
    assert "clicked" not in people[eve].signals


async def test_people_who_clicked_on_one_link_are_retargeted(visitor: Visitor) -> None:
    name, links = await visitor.send()
    for number, own in enumerate(list(links.values())[:5]):
        await visitor.visit(own[number % 2])
    await visitor.world.wait_until_stored()
    client = visitor.world.client.retargeting

    async def count(action: str, *codes: str) -> int:
        selection = campaigns_pb2.RetargetSelection(source=name, action=action, reason_codes=codes)
        request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="sms")
        return (await client.PreviewRetarget(request)).matched_count

    assert [await count("clicked"), await count("clicked", "0"), await count("clicked", "1")] == [5, 3, 2]
    assert await count("clicked", "0", "1", "7") == 5
    refusal = await refuse(count("not_clicked", "0"))
    assert list(refusal.fields) == ["selection.reason_codes"]


async def test_link_leads_nowhere_else(visitor: Visitor) -> None:
    name, links = await visitor.send()
    link = next(iter(links.values()))[0]
    other_name, other = await visitor.send("no link")
    assert not any(other.values())
    base, token = link[: -len(link.rpartition("/")[2])], link.rpartition("/")[2][:24]
    changed = token[:-1] + ("A" if token[-1] != "A" else "B")
    for spoiled in (
        f"{token}2",
        f"{token}99",
        f"{token}100",
        token,
        f"{changed}0",
        f"{token}0/",
        f"{token}0/https://evil.example",
    ):
        assert await visitor.visit(base + spoiled) == (404, None)
    for query in ("?url=https://evil.example", "?0=//evil.example"):
        assert await visitor.visit(f"{link}{query}") == (302, "https://shop.example/sale?a=1#top")
    assert (await visitor.visit(link, "POST"))[0] == 405
    assert (await visitor.world.get_campaign(other_name)).counts.signals["clicked"] == 0
    assert (await visitor.world.get_campaign(name)).counts.signals["clicked"] == 1


async def test_attribute_cannot_lead_to_another_site(visitor: Visitor) -> None:
    people = [contacts_pb2.Contact(external_id="mallory", attributes=to_struct({"path": "\r\nSet-Cookie: x"}))]
    sms = people[0].subscriptions.add(channel="sms")
    sms.address.update({"phone": "+34600000001"})
    await visitor.world.client.contacts.UpsertContacts(
        contacts_pb2.UpsertContactsRequest(parent=visitor.world.client.parent, contacts=people)
    )
    given = campaigns_pb2.GivenContacts(contacts=[f"{visitor.world.client.parent}/contacts/mallory"])
    audience = campaigns_pb2.Audience(given_contacts=given)
    _, links = await visitor.send("https://shop.example/{{ path }}", audience=audience)
    assert await visitor.visit(links["+34600000001"][0]) == (302, "https://shop.example/%0ASet-Cookie:%20x")


async def test_person_who_was_erased_gets_the_front_page(visitor: Visitor) -> None:
    people = [contacts_pb2.Contact(external_id="forgotten")]
    people[0].subscriptions.add(channel="sms").address.update({"phone": "+34600000002"})
    client = visitor.world.client
    await client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=people))
    name = client.name("contacts", "forgotten")
    audience = campaigns_pb2.Audience(given_contacts=campaigns_pb2.GivenContacts(contacts=[name]))
    _, links = await visitor.send("https://shop.example/{{ external_id }}", audience=audience)
    await client.contacts.EraseContact(contacts_pb2.EraseContactRequest(name=name))
    assert await visitor.visit(links["+34600000002"][0]) == (302, "https://shop.example/")


async def test_links_stay_where_the_campaign_says_so(visitor: Visitor) -> None:
    name, links = await visitor.send("See https://shop.example/sale", track_links=False)
    assert set(map(tuple, links.values())) == {("https://shop.example/sale",)}
    campaign = await visitor.world.get_campaign(name)
    assert (campaign.track_links, list(campaign.links)) == (False, [])


async def test_tracking_is_on_unless_it_is_turned_off(visitor: Visitor) -> None:
    draft = await visitor.world.create_campaign("sms")
    assert draft.track_links
    update = campaigns_pb2.Campaign(name=draft.name, track_links=False)
    assert not (
        await visitor.world.client.campaigns.UpdateCampaign(campaigns_pb2.UpdateCampaignRequest(campaign=update))
    ).track_links


async def test_links_lead_by_the_apps_own_domain(visitor: Visitor) -> None:
    async def set_link_url(url: str) -> None:
        request = apps_pb2.UpdateAppRequest(app=apps_pb2.App(name="apps/acme", link_url=url))
        request.update_mask.paths.append("link_url")
        await visitor.world.client.apps.UpdateApp(request)

    await set_link_url("https://go.shop.example")
    try:
        _, links = await visitor.send("https://shop.example/")
    finally:
        await set_link_url("")
    link = next(iter(links.values()))[0]
    assert link.startswith("https://go.shop.example/l/")
    assert await visitor.visit(link) == (302, "https://shop.example/")


async def test_link_of_a_test_send_works_and_counts_nothing(visitor: Visitor) -> None:
    draft = await visitor.world.create_campaign("sms", content={"body": BODY})
    person = next(person for person in visitor.world.sandbox.population if "sms" in person.channels)
    request = campaigns_pb2.SendTestRequest(name=draft.name, contact=visitor.world.client.name("contacts", person.external_id))
    sent = await visitor.world.client.campaigns.SendTest(request)
    links = re.findall(r"https?://\S+", sent.content["body"])
    assert await visitor.visit(links[0]) == (302, "https://shop.example/sale?a=1#top")
    assert await visitor.visit(links[1]) == (302, "https://shop.example/")


async def test_button_of_a_whatsapp_template_gets_the_end_of_the_link(visitor: Visitor) -> None:
    first = len(visitor.world.sandbox.truth.entries)
    button = {"type": "url", "index": 0, "value": "https://shop.example/vip"}
    draft = await visitor.world.create_campaign("whatsapp", content={"buttons": [button]})
    await visitor.world.launch(draft.name)
    entry = next(one for one in visitor.world.sandbox.truth.entries[first:] if one.refused is None)
    parts = {part["type"]: part for part in entry.content["components"]}
    end = parts["button"]["parameters"][0]["text"]
    assert end == f"{entry.token}0"
    assert await visitor.visit(f"/l/{end}") == (302, "https://shop.example/vip")

    untracked = await visitor.world.create_campaign("whatsapp", content={"buttons": [button]}, track_links=False)
    await visitor.world.launch(untracked.name)
    reasons = {reason.reason_code for reason in (await visitor.world.get_campaign(untracked.name)).counts.reasons}
    assert "button_not_tracked" in reasons


async def test_click_leads_on_while_the_database_is_away_and_is_counted_afterwards(
    open_world: OpenWorld, database_url: str, tmp_path: Path
) -> None:
    async with open_world(data_dir=tmp_path) as world, aiohttp.ClientSession() as http:
        await world.import_people()
        visitor = Visitor(world, http)
        name, links = await visitor.send()
        own = list(links.values())[:4]
        async with take_away(database_url):
            answers = [await visitor.visit(links[0]) for links in own]
            # Whom it was made for is in the database.
            assert (await visitor.visit(own[0][1]))[0] == 503
        assert answers == [(302, "https://shop.example/sale?a=1#top")] * 4
        await wait_until_drained(tmp_path)
        assert (await world.get_campaign(name)).counts.signals["clicked"] == 4
