"""Web push in Debian's Chromium: our script and our service worker on a site of its own, against a whole server.

What is real: the page, the worker, its events, notifications and calls. What is not: Chromium subscribes at Google's push
service only, so ``PushManager.subscribe`` asks the sandbox's instead, which gets, checks and decrypts what the server sends; the
test hands the text to the worker by DevTools, as the browser would. Nobody can click on a notification of a browser without a
screen, so that event is made in the worker.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from sqlalchemy import func

from aftertouch.client import sign_identity
from aftertouch.sandbox import SandboxSettings
from aftertouch.store.engine import transaction
from aftertouch.store.tables import paces
from aftertouch.v1 import apps_pb2, campaigns_pb2, contacts_pb2
from tests.e2e.chromium import PROGRAM, Chromium, Device, run_chromium
from tests.fix_world import OpenWorld, World

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="there is no chromium on this machine"),
]

# In the page and in the worker: a push service that answers on loopback, in place of the browser's own.
SHIM = """
const shim = { current: null };
const decode = (text) => Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (c) => c.charCodeAt(0)).buffer;
function wrap(json, key) {
  return {
    endpoint: json.endpoint,
    options: { applicationServerKey: decode(key) },
    toJSON: () => json,
    unsubscribe: async () => { shim.current = null; await fetch(json.endpoint, { method: "DELETE" }); return true; },
  };
}
PushManager.prototype.getSubscription = async () => shim.current;
PushManager.prototype.subscribe = async ({ applicationServerKey }) => {
  const body = JSON.stringify({ applicationServerKey });
  const json = await (await fetch("SANDBOX/push/visitors", { method: "POST", body })).json();
  return (shim.current = wrap(json, applicationServerKey));
};
"""
PAGE = '<!doctype html><title>Shop</title><script>{shim}</script><script src="{server}/v1/browsers/aftertouch.js"></script>'
WORKER = '{shim}\nimportScripts("{server}/v1/browsers/aftertouch-worker.js");'


@dataclass
class Site:
    """A shop's site, with a server behind it and browsers before it."""

    world: World
    origin: str
    secret: str
    browser: Chromium

    async def open_device(self) -> Device:
        device = await self.browser.open_device(f"{self.origin}/", self.origin)
        await device.run(f"globalThis.push = new Aftertouch({{server: '{self.world.addresses.public_url}', app: 'acme'}}); 0")
        return device

    def sign(self, external_id: str) -> str:
        return sign_identity(self.secret, external_id, datetime.now(UTC) + timedelta(hours=1))

    async def subscribe(self, device: Device, external_id: str) -> None:
        assert await device.run(f"push.subscribe({self.sign(external_id)!r})") == "subscribed"

    async def read_states(self, external_id: str) -> list[str]:
        name = self.world.client.name("contacts", external_id)
        contact = await self.world.client.contacts.GetContact(contacts_pb2.GetContactRequest(name=name))
        return sorted(contacts_pb2.Subscription.State.Name(subscription.state) for subscription in contact.subscriptions)

    async def wait_until_shown(self, device: Device, count: int) -> None:
        """Wait until a device shows so many notifications."""
        async with asyncio.timeout(120):
            while await device.run_in_worker("registration.getNotifications().then((all) => all.length)") != count:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def read_messages(self, device: Device) -> list[dict[str, Any]]:
        """What the push service keeps for a device, decrypted."""
        endpoint = await device.run("shim.current.endpoint")
        async with aiohttp.ClientSession() as session, session.get(endpoint) as answer:
            return [json.loads(text) for text in await answer.json()]

    async def wait_for(self, name: str, signal: str, count: int) -> campaigns_pb2.Campaign:
        async with asyncio.timeout(120):
            while (campaign := await self.world.get_campaign(name)).counts.signals[signal] != count:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        return campaign


@asynccontextmanager
async def serve_site(world: World) -> AsyncIterator[str]:
    """The site's pages, at another origin than the server's."""
    shim = SHIM.replace("SANDBOX", world.sandbox.url)
    given = {"shim": shim, "server": world.addresses.public_url}

    async def answer(request: web.Request) -> web.Response:
        if request.path == "/aftertouch-worker.js":
            return web.Response(text=WORKER.format(**given), content_type="text/javascript")
        return web.Response(text=PAGE.format(**given), content_type="text/html")

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    async with TestServer(app, host="127.0.0.1") as server:
        yield f"http://localhost:{server.port}"


@pytest.fixture
async def site(open_world: OpenWorld, tmp_path: Path) -> AsyncIterator[Site]:
    settings = SandboxSettings(size=1, vapid_private_key=None)
    async with open_world(settings) as world, serve_site(world) as origin, run_chromium(tmp_path) as browser:
        app = apps_pb2.App(name="apps/acme", web_origins=[origin])
        await world.client.apps.UpdateApp(apps_pb2.UpdateAppRequest(app=app))
        made = await world.client.apps.CreateIdentitySecret(apps_pb2.CreateIdentitySecretRequest(parent="apps/acme"))
        yield Site(world, origin, made.secret, browser)


async def test_browser_subscribes_shows_and_reports(site: Site) -> None:
    phone, laptop = await site.open_device(), await site.open_device()
    assert await phone.run("push.state()") == "unsubscribed"
    await site.subscribe(phone, "ada")
    await site.subscribe(laptop, "ada")
    assert await site.read_states("ada") == ["ACTIVE", "ACTIVE"]

    content = {
        "title": "Sale",
        "body": "Ends tonight",
        "url": "https://shop.example/sale",
        "image": f"{site.origin}/sale.png",
        "badge": f"{site.origin}/badge.png",
        "actions": [{"action": "later", "title": "Later", "url": "https://shop.example/later"}],
    }
    sale = await site.world.create_campaign("push", content=content)
    await site.world.launch(sale.name)
    ((message,), (other,)) = await site.read_messages(phone), await site.read_messages(laptop)
    assert message["t"] == other["t"]
    await phone.push(json.dumps(message))
    await laptop.push(json.dumps(other))
    await site.wait_for(sale.name, "confirmed", 1)
    # Either of the two may have been the one that confirmed.
    for device in (phone, laptop):
        await site.wait_until_shown(device, 1)
    shown = await phone.run_in_worker(
        "registration.getNotifications().then((all) => all.map(({title, body, actions}) => [title, body, actions[0].action]))"
    )
    assert shown == [["Sale", "Ends tonight", "later"]]

    # Without a click of a person no window may be opened; that the worker asks for it is what can be seen.
    await phone.run_in_worker(
        "globalThis.opened = []; clients.constructor.prototype.openWindow = async (url) => { opened.push(url); return null; };"
        "registration.getNotifications().then(([notification]) => "
        "dispatchEvent(new NotificationEvent('notificationclick', {notification, action: 'later'})))"
    )
    campaign = await site.wait_for(sale.name, "clicked", 1)
    assert await phone.run_in_worker("opened") == [message["actions"][0]["url"]]
    await site.wait_until_shown(phone, 0)
    assert campaign.counts.signals["dismissed"] == 0

    await laptop.run_in_worker(
        "registration.getNotifications().then(([notification]) => "
        "dispatchEvent(new NotificationEvent('notificationclose', {notification})))"
    )
    await site.wait_for(sale.name, "dismissed", 1)

    assert await laptop.run("push.unsubscribe()") == "unsubscribed"
    assert await site.read_states("ada") == ["ACTIVE", "OPTED_OUT"]
    await site.world.launch((await site.world.create_campaign("push")).name)
    assert len(await site.read_messages(phone)) == 2


async def test_browser_that_changes_hands_belongs_to_one_person(site: Site) -> None:
    device = await site.open_device()
    await site.subscribe(device, "ada")
    assert await device.run(f"push.refresh({site.sign('bob')!r})") == "subscribed"
    assert (await site.read_states("ada"), await site.read_states("bob")) == (["INVALID"], ["ACTIVE"])
    with pytest.raises(Exception, match="IDENTITY_INVALID"):
        await device.run(f"push.refresh({site.sign('ada')[:-2] + 'AA'!r})")


async def test_subscription_that_the_browser_changes_is_renewed(site: Site) -> None:
    device = await site.open_device()
    await site.subscribe(device, "ada")
    first = await device.run("shim.current.endpoint")
    # Chromium makes no such event on command; its listener has only the kept subscription to go by, as with a null one.
    await device.run_in_worker("dispatchEvent(new ExtendableEvent('pushsubscriptionchange')); 0")
    async with asyncio.timeout(120):
        while await site.read_states("ada") != ["ACTIVE", "INVALID"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    second = await device.run_in_worker("shim.current.endpoint")
    assert second != first
    await site.world.launch((await site.world.create_campaign("push")).name)
    async with aiohttp.ClientSession() as session, session.get(second) as answer:
        assert len(await answer.json()) == 1


async def change_subscription(device: Device) -> None:
    """What the browser does when it changes the subscription by itself, until the worker is done with it."""
    await device.run_in_worker(
        "globalThis.change = new ExtendableEvent('pushsubscriptionchange'); change.oldSubscription = shim.current;"
        "change.waitUntil = (renewal) => { change.renewal = renewal; }; dispatchEvent(change); change.renewal"
    )


async def read_kept(device: Device) -> str:
    """The endpoint that the worker and the page keep, to be vouched for by."""
    script = "caches.match('/aftertouch-subscription').then((kept) => kept.json()).then((kept) => kept.endpoint)"
    return str(await device.run(script))


async def test_renewal_that_is_refused_leaves_the_endpoint_that_vouches(site: Site) -> None:
    """The one that the server had refused was kept instead: nobody vouched for it, and nothing arrived until the next login."""
    device = await site.open_device()
    await site.subscribe(device, "ada")
    first = await device.run("shim.current.endpoint")
    await device.run("push.refresh()")
    async with transaction(site.world.core.engine) as conn:
        await conn.execute(paces.update().values(free_time=func.now() + timedelta(hours=1)))
    await change_subscription(device)
    assert await read_kept(device) == first
    async with transaction(site.world.core.engine) as conn:
        await conn.execute(paces.delete())
    await change_subscription(device)
    assert await site.read_states("ada") == ["ACTIVE", "INVALID"]
    assert await read_kept(device) == await device.run_in_worker("shim.current.endpoint")


async def test_page_renews_what_the_worker_could_not(site: Site) -> None:
    """It let the new endpoint vouch for itself, of which the server had not heard."""
    device = await site.open_device()
    await site.subscribe(device, "ada")
    await device.run(
        "navigator.serviceWorker.ready.then(({ pushManager }) => "
        "pushManager.subscribe({ applicationServerKey: encode(shim.current.options.applicationServerKey) })).then(() => 0)"
    )
    assert await device.run("push.refresh()") == "subscribed"
    assert await site.read_states("ada") == ["ACTIVE", "INVALID"]


async def test_page_subscribes_again_when_the_browser_ended_a_subscription_in_an_outage(site: Site) -> None:
    """The worker cannot even ask for the key then; the page took the browser for one that had never subscribed."""
    device = await site.open_device()
    await site.subscribe(device, "ada")
    await device.run("shim.current = null; 0")
    assert await device.run("push.refresh()") == "subscribed"
    assert await site.read_states("ada") == ["ACTIVE", "INVALID"]


async def test_person_who_unsubscribes_after_the_browser_ended_the_subscription_stays_unsubscribed(site: Site) -> None:
    device = await site.open_device()
    await site.subscribe(device, "ada")
    await device.run("shim.current = null; 0")
    assert await device.run("push.unsubscribe()") == "unsubscribed"
    assert await device.run("push.refresh()") == "unsubscribed"


async def test_page_subscribes_again_under_a_new_key(site: Site) -> None:
    device = await site.open_device()
    await site.subscribe(device, "ada")
    old = await device.run("shim.current.endpoint")
    await device.run("shim.current.options.applicationServerKey = new Uint8Array(65).buffer; 0")
    assert await device.run(f"push.refresh({site.sign('ada')!r})") == "subscribed"
    assert await device.run("shim.current.endpoint") != old
    assert await site.read_states("ada") == ["ACTIVE", "INVALID"]
