"""The console in Chromium, on a whole server and its sandbox: the way to a follow-up, by mouse and by keyboard, for everybody."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from playwright.async_api import Browser, ConsoleMessage, Dialog, Page, Request, Route, expect
from sqlalchemy import func

from aftertouch.rpc.values import to_struct
from aftertouch.sandbox import SandboxSettings
from aftertouch.store import tables
from aftertouch.store.engine import transaction
from aftertouch.v1 import campaigns_pb2, contacts_pb2, events_pb2, retargeting_pb2
from tests.fix_console import PASSWORD, PATIENCE_MS, create_user
from tests.fix_database import clone_database
from tests.fix_issuer import CLIENT, run_issuer
from tests.fix_world import OpenWorld, World, run_world

pytestmark = pytest.mark.e2e

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
ADMIN = "ada@acme.example"


class Tab:
    """A browser's tab that notes what must not happen: a request to elsewhere, an error on the console, a script's exception."""

    def __init__(self, page: Page, base: str) -> None:
        self.page = page
        self.base = base
        self.faults: list[str] = []
        # htmx calls it an error when a page is left while one of its requests is under way; a refusal has a message of its own.
        self.expected = ["htmx:afterRequest", "htmx:sendError", "htmx:sendAbort"]
        self.clicks = 0
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", self._note_request)
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self.faults.append(str(error)))

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not any(text in message.text for text in self.expected):
            self.faults.append(message.text)

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith(f"{self.base}/"):
            self.faults.append(request.url)

    async def open(self, path: str) -> None:
        """Go to a page of the console, and wait until its parts are there."""
        await self.page.goto(f"{self.base}/console{path}")
        await self.page.wait_for_load_state("networkidle")

    async def click(self, selector: str) -> None:
        """Click, and count it."""
        self.clicks += 1
        await self.page.click(selector)

    async def sign_in(self) -> None:
        """Sign in by the form."""
        await self.open("/campaigns")
        await self.page.fill("#email", ADMIN)
        await self.page.fill("#password", PASSWORD)
        await self.page.press("#password", "Enter")
        await self.page.wait_for_url("**/console/campaigns")

    async def find_violations(self) -> list[str]:
        """What axe finds against WCAG 2.2 A and AA and its best practices."""
        await self.page.evaluate(AXE)
        found = await self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{violation['id']}: {node['html']} {node['failureSummary']}"
            for violation in found["violations"]
            for node in violation["nodes"]
        ]


@pytest.fixture(scope="module")
async def world(shared_world: World) -> World:
    await create_user(shared_world, ADMIN, "admin")
    made = await shared_world.create_campaign("whatsapp")
    await shared_world.launch(made.name)
    wave = await shared_world.create_campaign(
        "sms",
        audience=campaigns_pb2.Audience(retarget=campaigns_pb2.RetargetSelection(source=made.name, action="not_read")),
        display_name="Retarget: Summer Sale (not read)",
    )
    await shared_world.launch(wave.name)
    await send_links(shared_world)
    await draw_pictures(shared_world)
    await make_follow_up(shared_world, made.name, "waiting")
    return shared_world


LINK = f"https://shop.example/{'sale-' * 40}"


async def send_links(world: World) -> None:
    """A campaign named ``linked`` with two links, the first of which three people clicked."""
    content = to_struct({"body": f"Now {LINK} or https://shop.example/{{{{ external_id }}}}"})
    campaign = campaigns_pb2.Campaign(display_name="With links", channel="sms", content=content)
    campaign.audience.all_subscribers.SetInParent()
    request = campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=campaign, campaign_id="linked")
    made = await world.client.campaigns.CreateCampaign(request)
    await world.launch(made.name)
    clicks = [events_pb2.Event(signal="clicked", reason_code="0") for _ in range(3)]
    for click, person in zip(clicks, await world.read_recipients(made.name), strict=False):
        click.recipient.campaign, click.recipient.external_id = made.name, person
        click.time.GetCurrentTime()
    await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent=world.client.parent, events=clicks))


async def draw_pictures(world: World) -> None:
    """A draft named ``pictured`` of a notification with everything in it."""
    names = {name: f"https://cdn.example/{'a' * 50}/{name}-{'long-' * 9}.png" for name in ("icon", "image", "badge")}
    actions = [{"action": name, "title": f"Look at {name}", "url": LINK, "icon": names["icon"]} for name in ("this", "that")]
    content = to_struct({"title": "Last hours", "body": "Only tonight", "url": LINK, "actions": actions, **names})
    campaign = campaigns_pb2.Campaign(display_name="With pictures", channel="push", content=content)
    campaign.audience.all_subscribers.SetInParent()
    request = campaigns_pb2.CreateCampaignRequest(parent=world.client.parent, campaign=campaign, campaign_id="pictured")
    await world.client.campaigns.CreateCampaign(request)


async def make_follow_up(world: World, source: str, campaign_id: str) -> campaigns_pb2.Campaign:
    """A follow-up that waits for a day after its source was sent."""
    step = retargeting_pb2.FollowUpStep(
        selection=campaigns_pb2.RetargetSelection(action="not_clicked"),
        channel="sms",
        content=to_struct({"body": "Hello"}),
        campaign_id=campaign_id,
    )
    step.delay.seconds = 86_400
    request = retargeting_pb2.CreateFollowUpsRequest(source=source, steps=[step])
    return (await world.client.retargeting.CreateFollowUps(request)).campaigns[0]


@pytest.fixture(scope="module")
async def campaign(world: World) -> str:
    """The id of a campaign that was sent."""
    listed = await world.client.campaigns.ListCampaigns(
        campaigns_pb2.ListCampaignsRequest(
            parent=world.client.parent, filter=campaigns_pb2.CampaignFilter(channel="whatsapp", state="SENT")
        )
    )
    return listed.campaigns[-1].name.rpartition("/")[2]


@pytest.fixture(params=["light", "dark"])
async def themed(request: pytest.FixtureRequest, browser: Browser, world: World) -> AsyncIterator[Tab]:
    async with open_tab(browser, world, color_scheme=request.param) as tab:
        yield tab


@pytest.fixture
async def tab(browser: Browser, world: World) -> AsyncIterator[Tab]:
    async with open_tab(browser, world) as opened:
        yield opened


@asynccontextmanager
async def open_tab(browser: Browser, world: World, **options: Any) -> AsyncIterator[Tab]:
    """A tab of somebody who is signed in; leaving it fails when something happened that must not."""
    context = await browser.new_context(reduced_motion="reduce", **options)
    try:
        tab = Tab(await context.new_page(), f"http://{world.addresses.http}")
        await tab.sign_in()
        yield tab
        assert tab.faults == []
    finally:
        await context.close()


async def make_draft(tab: Tab) -> None:
    """Press the dialog's button, and once more where a test before made a draft for the same people."""
    page = tab.page
    await page.click("#make-draft")
    again = page.locator("input[name=again]")
    await expect(again.or_(page.locator("#composer")).first).to_be_attached()
    if await again.count():
        tab.faults.clear()
        await page.click("#make-draft")
    await page.wait_for_url("**/edit")


@asynccontextmanager
async def break_down(tab: Tab, address: str) -> AsyncIterator[None]:
    """Meanwhile a proxy says of these addresses that there is no server behind it."""
    body = "<html><head><title>503</title></head><body><h1>Service Unavailable</h1></body></html>"
    is_down = True

    async def answer(route: Route) -> None:
        await (route.fulfill(status=503, content_type="text/html", body=body) if is_down else route.fallback())

    tab.expected.append("503")
    # It stays as long as the page: where interception was turned off and on again, a request was seen to get no answer.
    await tab.page.route(address, answer)
    yield
    is_down = False


async def list_pages(tab: Tab, campaign: str) -> list[str]:
    """Every page of the console that has an address; the last one is a draft's."""
    await tab.open("/contacts/import")
    file = {"name": "people.csv", "mimeType": "text/csv", "buffer": b"external_id,sms.phone\nby-file,no number\n"}
    await tab.page.set_input_files("#file", files=[file])
    await tab.page.click("main .foot button")
    await expect(tab.page.locator("main table")).to_contain_text("by-file")
    imported = tab.page.url.rpartition("/console")[2]
    await tab.open(f"/campaigns/{campaign}/retarget?channel=push")
    await make_draft(tab)
    draft = tab.page.url.rpartition("/console")[2]
    return [
        imported,
        "/campaigns",
        "/campaigns?q=nothing-is-called-so",
        "/campaigns/new",
        f"/campaigns/{campaign}",
        "/campaigns/waiting",
        "/campaigns/waiting/edit",
        f"/campaigns/{campaign}/retarget",
        f"/campaigns/{campaign}/retarget?action=failed&reason_class=recipient_gone&when=delay",
        "/campaigns/linked",
        "/campaigns/linked/retarget?action=clicked&reason_code=0",
        "/campaigns/pictured/edit",
        "/contacts",
        "/contacts/person?id=user-000001",
        f"/contacts/explain?id=user-000001&campaign={campaign}",
        "/contacts/import",
        "/lists",
        "/rules",
        "/channels",
        "/channels/sms/own",
        "/keys",
        "/users",
        "/audit",
        "/account",
        draft,
    ]


async def test_follow_up_takes_four_clicks_and_the_message(tab: Tab, world: World, campaign: str) -> None:
    page = tab.page
    await tab.open("/campaigns")
    await tab.click(f"#retarget-{campaign}")
    await tab.click("label[for=who-not_read]")
    await expect(page.locator("dialog .result")).to_contain_text("Retarget: Summer Sale (not read)")
    await tab.click("#make-draft")
    await page.wait_for_url("**/edit")
    await expect(page.locator("#display_name")).to_have_value("Retarget: Summer Sale (not read)")
    await page.fill("#field-content-template", "summer_sale")
    await page.fill("#field-content-language", "en_US")
    await page.wait_for_selector("#preview .bubble")
    await tab.click("#launch")
    await page.wait_for_url(f"{tab.base}/console/campaigns/c-*")
    await expect(page.locator("#live .badge")).to_have_text("Sent")
    assert tab.clicks == 4
    wave = await world.get_campaign(f"apps/acme/campaigns/{page.url.rpartition('/')[2]}")
    source = await world.read_recipients(f"apps/acme/campaigns/{campaign}")
    unread = {name for name, person in source.items() if "delivered" in person.signals and "read" not in person.signals}
    assert set(await world.read_recipients(wave.name)) <= unread
    assert wave.audience.retarget.action == "not_read"


async def test_people_who_clicked_a_link_are_followed_up_from_the_campaigns_page(tab: Tab, world: World) -> None:
    page = tab.page
    await tab.open("/campaigns/linked")
    await expect(page.locator("tr", has_text=LINK).locator(".num").first).to_have_text("3")
    await page.click("#retarget-link-1")
    await expect(page.locator("dialog .note")).to_contain_text(f"Only people who clicked {LINK}.")
    await expect(page.locator("dialog .drops li").first).to_have_text(re.compile(r"Chosen\s*3"))
    # Another channel is another count of the same people.
    await page.click("dialog label[for=where-whatsapp]")
    await expect(page.locator("#where-whatsapp")).to_be_checked()
    await expect(page.locator(".htmx-request")).to_have_count(0)
    await expect(page.locator("dialog .drops li").first).to_have_text(re.compile(r"Chosen\s*3"))
    await page.click("dialog .note a")
    await expect(page.locator("dialog .note")).to_have_count(0)
    await page.keyboard.press("Escape")
    await page.click("#retarget-link-1")
    await page.click("dialog label[for=where-push]")
    await expect(page.locator("#where-push")).to_be_checked()
    await expect(page.locator("#funnel .drops")).to_be_visible()
    await make_draft(tab)
    await expect(page.locator(".meta")).to_contain_text("Clicked a link (https://shop.example/sale-")
    draft = await world.get_campaign(f"apps/acme/campaigns/{page.url.removesuffix('/edit').rpartition('/')[2]}")
    assert (draft.audience.retarget.action, draft.audience.retarget.reason_codes) == ("clicked", ["0"])


async def test_follow_up_is_made_by_keyboard_alone(tab: Tab, world: World, campaign: str) -> None:
    page, keys = tab.page, tab.page.keyboard
    await tab.open("/campaigns")
    await tab_to(page, f"#retarget-{campaign}")
    await keys.press("Enter")
    await page.wait_for_selector("dialog[open] form")
    # The dialog has the focus, and keeps it (between its last and its first control the browser's own bar has a turn).
    for _ in range(12):
        await keys.press("Tab")
        assert await page.evaluate("document.activeElement.matches('dialog, dialog *, body')")
    await keys.press("Escape")
    await expect(page.locator(f"#retarget-{campaign}")).to_be_focused()
    await keys.press("Enter")
    await page.wait_for_selector("dialog[open] form")
    await tab_to(page, "#who-not_read")
    await tab_to(page, "input[name=channel]:checked")
    while (chosen := await page.evaluate("document.activeElement.value")) != "sms":
        await keys.press("ArrowUp")
        moved = "value => document.activeElement.value !== value && !document.querySelector('.htmx-request')"
        await page.wait_for_function(moved, arg=chosen)
    await expect(page.locator("#where-sms")).to_be_checked()
    await tab_to(page, "#make-draft")
    await keys.press("Enter")
    await page.wait_for_url("**/edit")
    await tab_to(page, "#field-content-body")
    await keys.type("Hello {{ first_name | default: 'you' }}")
    await page.wait_for_selector("#preview .bubble")
    await tab_to(page, "#launch")
    await keys.press("Enter")
    await page.wait_for_url(f"{tab.base}/console/campaigns/c-*")
    await expect(page.locator("#live .badge")).to_have_text("Sent")


async def tab_to(page: Page, selector: str) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(80):
        await page.keyboard.press("Tab")
        if await page.evaluate("selector => document.activeElement?.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} is not reached by Tab")


FOCUSABLE = "a[href], button:not([disabled]), input:not([type=hidden]):not([disabled]), select, textarea"


async def test_every_page_is_operable_by_keyboard(tab: Tab, campaign: str) -> None:
    """Tab reaches every control, in one round, and shows where it is."""
    for path in await list_pages(tab, campaign):
        await tab.open(path)
        wanted = await tab.page.evaluate(
            """selector => {
                const found = [...document.querySelectorAll(selector)].filter(e => e.checkVisibility());
                // Of a group of radio buttons only one is a stop.
                const groups = new Map();
                return found.filter(e => e.type !== 'radio' || (!groups.has(e.name) && groups.set(e.name, e))).length;
            }""",
            FOCUSABLE,
        )
        await tab.page.evaluate("document.activeElement.blur()")
        seen: set[int] = set()
        # A time has several stops in one field.
        times = await tab.page.locator("input[type=time]").count()
        for _ in range(wanted + 2 + 5 * times):
            await tab.page.keyboard.press("Tab")
            found = await tab.page.evaluate(
                """selector => {
                    const e = document.activeElement, place = [...document.querySelectorAll(selector)].indexOf(e);
                    const isSeen = e.type === 'radio' || getComputedStyle(e).outlineStyle !== 'none';
                    return [place, isSeen, e.outerHTML];
                }""",
                FOCUSABLE,
            )
            if found[0] >= 0:
                seen.add(found[0])
                assert found[1], f"{path}: no focus to be seen on {found[2]}"
        assert len(seen) >= wanted, path


async def test_no_page_has_a_barrier(themed: Tab, campaign: str) -> None:
    for path in await list_pages(themed, campaign):
        await themed.open(path)
        assert await themed.find_violations() == [], path
    await themed.open("/campaigns")
    await themed.page.click(f"#retarget-{campaign}")
    await themed.page.wait_for_selector("dialog[open] form")
    await themed.page.wait_for_selector("#funnel .drops")
    assert await themed.find_violations() == [], "the dialog"
    await themed.page.check("#when-delay")
    assert await themed.find_violations() == [], "the dialog with a delay"


async def test_no_answer_to_a_form_has_a_barrier(themed: Tab, world: World, campaign: str) -> None:
    """What is not seen at an address: refusals, what was just made, and a draft with its preview and everything wrong."""
    page = themed.page

    async def check(what: str) -> None:
        await page.wait_for_load_state("networkidle")
        assert await themed.find_violations() == [], what
        themed.faults = [fault for fault in themed.faults if "status of 40" not in fault]

    for path in ("/campaigns/no-such", "/contacts/person?id=no-such"):
        await themed.open(path)
        await check(path)
    await themed.open("/keys")
    await page.fill("#display_name", "a key")
    await page.check("#scope-read")
    await page.click("text=Make key")
    await page.wait_for_selector("#secret")
    await check("a key that was made")
    await themed.open("/users")
    await page.fill("#email", "not-an-email@")
    await page.evaluate("for (const form of document.forms) form.noValidate = true")
    await page.click("text=Make user")
    await page.wait_for_selector("#email-fault")
    await check("a user that was refused")
    await themed.open("/channels")
    await page.click("text=Check the webhook addresses")
    await page.wait_for_selector("p.good")
    await check("channels that were checked")
    await themed.open("/lists")
    await page.fill("#display_name", "Some")
    await page.fill("#list_id", f"some-{await page.evaluate('Date.now()')}")
    await page.fill("#contacts", "user-000001\nnobody-of-this-name")
    await page.click("text=Make list")
    await expect(page.locator("main")).to_contain_text("nobody-of-this-name")
    await check("a list that was filled")
    await themed.open("/rules")
    await page.fill("#messages", "many")
    await page.click("main .foot button")
    await page.wait_for_selector("#messages-fault")
    await check("rules that were refused")
    await themed.open(f"/campaigns/{campaign}/retarget?channel=sms")
    await make_draft(themed)
    await page.fill("#field-content-body", "{{ first_name")
    await page.check("#when-later")
    await page.click("#launch")
    await page.wait_for_selector(".fault")
    await check("a launch that was refused")
    await page.fill("#field-content-body", f"Hello {{{{ first_name | default: 'you' }}}}: {LINK}")
    await expect(page.locator("#preview .targets")).to_contain_text(LINK)
    await expect(page.locator("#review")).to_contain_text("segments")
    await check("a draft with its preview and its review")
    await page.fill("#schedule_time", (datetime.now(UTC) + timedelta(days=2)).strftime("%Y-%m-%dT%H:%M"))
    await page.click("#launch")
    await expect(page.locator("#live .badge")).to_have_text("Scheduled")
    await check("a campaign that is scheduled")


async def test_sign_in_has_no_barrier(browser: Browser, world: World) -> None:
    context = await browser.new_context()
    tab = Tab(await context.new_page(), f"http://{world.addresses.http}")
    await tab.open("/sign-in")
    assert await tab.find_violations() == []
    await context.close()


async def test_issuer_is_reached_from_the_sign_in_and_leads_back(browser: Browser, postgres_url: str, template: str) -> None:
    """The policy lets our forms lead nowhere else, so it takes a real browser to show that this one does."""
    async with (
        run_issuer() as issuer,
        clone_database(postgres_url, template) as url,
        run_world(url, oidc_issuer=issuer.url, **CLIENT) as world,
    ):
        await create_user(world, "max@acme.example", "marketer")
        context = await browser.new_context()
        page = await context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        messages: list[str] = []
        page.on("console", lambda message: messages.append(message.text))
        await page.goto(f"http://{world.addresses.http}/console/contacts")
        await page.click("text=Sign in with")
        await page.wait_for_url("**/console/contacts")
        await expect(page.locator(".me .who")).to_have_text("max@acme.example")
        assert messages == []
        await context.close()


@pytest.mark.parametrize("width", [320, 400, 768])
async def test_no_page_is_wider_than_a_narrow_screen(browser: Browser, world: World, campaign: str, width: int) -> None:
    async with open_tab(browser, world, viewport={"width": width, "height": 800}) as tab:
        for path in await list_pages(tab, campaign):
            await tab.open(path)
            wide = await tab.page.evaluate(
                """width => document.documentElement.scrollWidth <= width ? [] : [...document.querySelectorAll('main *')]
                    .filter(e => e.getBoundingClientRect().right > width).map(e => e.outerHTML.slice(0, 200))""",
                width,
            )
            assert wide == [], path


async def test_pages_work_without_scripts(browser: Browser, world: World, campaign: str) -> None:
    async with open_tab(browser, world, java_script_enabled=False) as tab:
        page = tab.page
        await tab.open("/campaigns")
        await page.click(f"#retarget-{campaign}")
        await page.check("#where-sms")
        await make_draft(tab)
        await page.fill("#field-content-body", "Hello")
        await page.click("#launch")
        await expect(page.locator("h1")).to_have_text("Retarget: Summer Sale (not read)")
        await expect(page.locator("#live .badge")).to_have_text(re.compile("Sen"))


async def test_times_are_the_viewers(browser: Browser, world: World, campaign: str) -> None:
    async with open_tab(browser, world, timezone_id="Asia/Tokyo", locale="en-GB") as tab:
        await tab.open(f"/campaigns/{campaign}")
        launched = (await world.get_campaign(f"apps/acme/campaigns/{campaign}")).launch_time.ToDatetime()
        shown = await tab.page.locator(".meta time").inner_text()
        assert shown.endswith(f"{(launched.hour + 9) % 24:02}:{launched.minute:02}")


async def test_times_of_a_refusal_are_the_viewers(browser: Browser, world: World, campaign: str) -> None:
    last_time = (await world.get_campaign(f"apps/acme/campaigns/{campaign}")).launch_time.ToDatetime(UTC) + timedelta(days=30)
    told = f"{last_time.astimezone(ZoneInfo('Asia/Tokyo')):%H:%M}: what people did is kept no longer."
    too_late = f"{last_time + timedelta(days=2):%Y-%m-%dT%H:%M}"
    async with open_tab(browser, world, timezone_id="Asia/Tokyo", locale="en-GB") as tab:
        page = tab.page
        tab.expected.append("400")
        await tab.open(f"/campaigns/{campaign}/retarget?channel=sms")
        await page.check("#when-later")
        await page.fill("#schedule_time", too_late)
        await page.click("#make-draft")
        await expect(page.locator("#schedule_time-fault")).to_contain_text(told)
        await expect(page.locator("p.alert")).to_contain_text(told)
        await page.check("#when-now")
        await make_draft(tab)
        await page.fill("#field-content-body", "Too late")
        await page.check("#when-later")
        await page.fill("#schedule_time", too_late)
        await page.click("#launch")
        await expect(page.locator("p.alert")).to_contain_text(told)


async def test_time_in_the_reason_of_a_state_is_the_viewers(browser: Browser, world: World) -> None:
    source = await world.create_campaign("sms", display_name="Long ago")
    await world.launch(source.name)
    asked = campaigns_pb2.RetargetSelection(source=source.name, action="sent")
    wave = await world.create_campaign("push", campaigns_pb2.Audience(retarget=asked), display_name="Too late")
    request = campaigns_pb2.LaunchCampaignRequest(name=wave.name)
    request.schedule_time.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    await world.client.campaigns.LaunchCampaign(request)
    launch_time = datetime.now(UTC) - timedelta(days=40)
    async with transaction(world.core.engine) as conn:
        await conn.execute(tables.apps.update().values(retargetable_since=launch_time))
        for name, values in ((source.name, {"launch_time": launch_time}), (wave.name, {"schedule_time": func.now()})):
            found = tables.campaigns.c.campaign == name.rpartition("/")[2]
            await conn.execute(tables.campaigns.update().where(found).values(values))
    async with asyncio.timeout(120):
        # There is nothing to wait on but the answer of the next call.
        while (await world.get_campaign(wave.name)).state != campaigns_pb2.Campaign.FAILED:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    async with open_tab(browser, world, timezone_id="Asia/Tokyo", locale="en-GB") as tab:
        told = f"{(launch_time + timedelta(days=30)).astimezone(ZoneInfo('Asia/Tokyo')):%H:%M}"
        await tab.open("/campaigns?q=Too+late")
        await expect(tab.page.locator("td .sub time")).to_contain_text(told)
        await tab.open(f"/campaigns/{wave.name.rpartition('/')[2]}")
        await expect(tab.page.locator("#live .state")).to_contain_text(re.compile(rf"could be retargeted until .*{told}$"))


async def test_launch_is_scheduled_in_the_viewers_zone_and_taken_back(browser: Browser, world: World, campaign: str) -> None:
    async with open_tab(browser, world, timezone_id="Asia/Tokyo") as tab:
        page = tab.page
        await tab.open(f"/campaigns/{campaign}/retarget?channel=sms")
        await make_draft(tab)
        await page.fill("#field-content-body", "Tomorrow")
        await page.check("#when-later")
        tomorrow = (datetime.now(UTC) + timedelta(days=1)).replace(second=0, microsecond=0)
        await page.fill("#schedule_time", (tomorrow + timedelta(hours=9)).strftime("%Y-%m-%dT%H:%M"))
        await page.click("#launch")
        await expect(page.locator("#live .badge")).to_have_text("Scheduled")
        name = f"apps/acme/campaigns/{page.url.rpartition('/')[2]}"
        assert (await world.get_campaign(name)).schedule_time.ToDatetime(UTC) == tomorrow
        await page.click("text=Back to draft")
        await page.wait_for_url("**/edit")
        assert (await world.get_campaign(name)).state == campaigns_pb2.Campaign.DRAFT


async def test_delay_that_is_chosen_in_the_dialog_is_what_the_launch_waits_for(tab: Tab, world: World, campaign: str) -> None:
    page = tab.page
    await tab.open("/campaigns")
    await page.click(f"#retarget-{campaign}")
    await page.click("label[for=when-delay]")
    await page.fill("#delay", "36")
    # Choosing whom and where counts again, and leaves the rest of the dialog as it is.
    await page.click("label[for=where-push]")
    await expect(page.locator(".htmx-request")).to_have_count(0)
    await expect(page.locator("#where-push")).to_be_checked()
    await expect(page.locator("#funnel .drops")).to_be_visible()
    await expect(page.locator("#delay")).to_have_value("36")
    await make_draft(tab)
    await expect(page.locator("#when-delay")).to_be_checked()
    await expect(page.locator("#delay")).to_have_value("36")
    await page.fill("#field-content-title", "Last hours")
    await page.fill("#field-content-url", "https://shop.example/")
    await page.fill("#delay", "48")
    await page.click("#launch")
    await expect(page.locator("#live .badge")).to_have_text("Scheduled")
    wave = await world.get_campaign(f"apps/acme/campaigns/{page.url.rpartition('/')[2]}")
    source = await world.get_campaign(f"apps/acme/campaigns/{campaign}")
    assert wave.schedule_time.ToDatetime() == source.finish_time.ToDatetime() + timedelta(hours=48)


async def test_follow_up_that_waits_is_changed_made_a_draft_and_canceled(tab: Tab, world: World) -> None:
    page = tab.page
    slow = await world.create_campaign("sms", display_name="Still on its way")
    waiting = await make_follow_up(world, slow.name, "changed")
    await tab.open(f"/campaigns?q={slow.display_name}")
    await expect(page.locator("#row-changed")).to_contain_text("a day after Still on its way is sent")
    await page.click("#edit-changed")
    await expect(page.locator("#preview .bubble")).to_have_text("Hello")
    await expect(page.locator("#review")).to_contain_text("They are counted once Still on its way is sent.")
    assert await tab.find_violations() == []
    await page.fill("#field-content-body", "Good evening")
    await page.fill("#delay", "36")
    await page.select_option("[name=delay_unit]", "hours")
    # Nothing of it is saved while somebody types.
    assert (await world.get_campaign(waiting.name)).content["body"] == "Hello"
    await page.click("#save")
    await expect(page.locator("#live .badge")).to_have_text("Scheduled")
    await expect(page.locator(".meta")).to_contain_text("goes out 36 hours after Still on its way is sent")
    await expect(page.locator(".tree")).to_contain_text("36 hours after Still on its way is sent")
    assert await tab.find_violations() == []
    changed = await world.get_campaign(waiting.name)
    assert (changed.content["body"], changed.follow_up.delay.seconds) == ("Good evening", 36 * 3600)
    asked: list[str] = []

    async def answer(question: Dialog) -> None:
        asked.append(question.message)
        await (question.accept() if len(asked) > 1 else question.dismiss())

    page.on("dialog", answer)
    await page.click("text=Back to draft")
    await expect(page.locator("#live .badge")).to_have_text("Scheduled")
    assert (await world.get_campaign(waiting.name)).state == campaigns_pb2.Campaign.SCHEDULED
    await page.click("text=Back to draft")
    await page.wait_for_url("**/edit")
    await expect(page.locator("#when-delay")).to_be_checked()
    await expect(page.locator("#delay")).to_have_value("36")
    await page.click("#launch")
    await expect(page.locator("#live .badge")).to_have_text("Scheduled")
    await page.click("button[value=cancel]")
    await expect(page.locator("#live .badge")).to_have_text("Canceled")
    assert [question.partition("?")[0] for question in asked] == [
        "Make a draft of this follow-up",
        "Make a draft of this follow-up",
        "Cancel this follow-up for good",
    ]
    # The list's first page is looked at by others.
    await world.client.campaigns.DeleteCampaign(campaigns_pb2.DeleteCampaignRequest(name=slow.name))


async def test_earlier_message_is_begun_with_and_saved(tab: Tab, campaign: str) -> None:
    page = tab.page
    await tab.open(f"/campaigns/{campaign}/retarget?channel=whatsapp&action=read")
    await make_draft(tab)
    await page.select_option("#copy", label="Summer Sale")
    await expect(page.locator("#field-content-template")).to_have_value("summer_sale")
    await expect(page.locator("#saved")).to_have_text("Saved")
    await page.wait_for_selector("#preview .bubble")
    await page.reload()
    await expect(page.locator("#field-content-template")).to_have_value("summer_sale")


async def test_template_is_chosen_and_read_before_it_is_sent(browser: Browser, open_world: OpenWorld) -> None:
    """WhatsApp from an empty draft to the phones without typing a template's name, and what is seen is what is sent."""
    kept = {"summer_sale": "Hello {{1}}, our sale ends on Sunday.", "welcome_back": "Hi {{first_name}}!", "spring_sale": "Hello"}
    settings = SandboxSettings(size=20, time_scale=0.05, templates=kept, template_statuses={"spring_sale": "PENDING"})
    async with open_world(settings) as world:
        await world.import_people()
        await create_user(world, ADMIN, "admin")
        async with open_tab(browser, world) as tab:
            page = tab.page
            await tab.open("/campaigns/new")
            await page.fill("#display_name", "By template")
            await page.click("label[for=channel-whatsapp]")
            await page.click("main .foot button.primary")
            await page.wait_for_url("**/edit")
            await expect(page.locator("#template option:disabled")).to_have_text("spring_sale · en_US · pending")
            await page.select_option("#template", "welcome_back/en_US")
            await expect(page.locator("[name='content.body.0.key']")).to_have_value("first_name")
            await expect(page.locator("#preview .words")).to_have_text("Hi [first_name]!")
            await page.select_option("#template", "summer_sale/en_US")
            await expect(page.locator("#preview .words")).to_have_text("Hello [1], our sale ends on Sunday.")
            # Nobody gets a hole.
            await expect(page.locator("#review")).to_contain_text("Body 1 is empty.")
            await page.fill("#field-content-body-0", "{{ external_id }}")
            await expect(page.locator("#preview .words")).to_have_text("Hello user-000000, our sale ends on Sunday.")
            assert await tab.find_violations() == []
            await page.reload()
            await expect(page.locator("#preview .words")).to_have_text("Hello user-000000, our sale ends on Sunday.")
            await expect(page.locator("#template")).to_have_value("summer_sale/en_US")
            await page.click("#launch")
            await page.wait_for_url("**/campaigns/c-*")
        name = f"apps/acme/campaigns/{page.url.rpartition('/')[2]}"
        assert (await world.wait_until_sent(name)).counts.signals["sent"] > 0


async def test_message_is_sent_to_one_person_as_a_test(tab: Tab, world: World, campaign: str) -> None:
    page = tab.page
    await tab.open(f"/campaigns/{campaign}/retarget?channel=sms")
    await make_draft(tab)
    await page.fill("#field-content-body", "Only a test")
    await page.click("#send-test")
    await expect(page.locator("#test")).to_contain_text("The provider took the test message.")
    await page.fill("#as", "nobody")
    await page.click("#send-test")
    await expect(page.locator("#test .alert")).to_be_visible()


async def test_list_is_cleaned_of_those_who_failed_with_nothing_but_the_console(tab: Tab, world: World, campaign: str) -> None:
    page = tab.page
    people = await world.read_recipients(f"apps/acme/campaigns/{campaign}")
    failed = {external_id for external_id, person in people.items() if "failed" in person.signals}
    assert failed

    async def download(what: str) -> Path:
        await tab.open(f"/campaigns/{campaign}")
        async with page.expect_download() as download:
            await page.locator(f"[aria-label='Export {what} as CSV']").first.click()
        return await (await download.value).path()

    file = await download("Recipients")
    await tab.open("/lists")
    await page.fill("#display_name", "To clean")
    await page.fill("#list_id", "to-clean")
    await page.set_input_files("#file", files=file)
    await page.click("text=Make list")
    await expect(page.locator("main .figures")).to_contain_text(f"Added{len(people)}")
    file = await download("Failed")
    await tab.open("/lists")
    await page.click("summary:text('To clean')")
    await page.set_input_files("#file-to-clean", files=file)
    await page.click("text=Take out of To clean")
    await expect(page.locator("main .figures")).to_contain_text(f"Taken out{len(failed)}")
    assert await tab.find_violations() == []
    wanted = contacts_pb2.ContactFilter(list="apps/acme/lists/to-clean")
    request = contacts_pb2.ListContactsRequest(parent="apps/acme", page_size=1000, filter=wanted)
    left = {contact.external_id for contact in (await world.client.contacts.ListContacts(request)).contacts}
    assert left == people.keys() - failed


async def test_list_is_searched_while_typing(tab: Tab) -> None:
    await tab.open("/campaigns")
    await tab.page.fill("#q", "summer")
    await tab.page.wait_for_url("**q=summer**")
    await expect(tab.page.locator("#campaigns tbody tr").first).to_contain_text("Summer")
    await tab.page.fill("#q", "nothing is called so")
    await expect(tab.page.locator("#campaigns")).to_contain_text("No campaign matches")


async def test_search_by_enter_finds_and_goes_on(tab: Tab) -> None:
    """Enter took the list's form for one that is left: nothing was found any more, by typing neither."""
    page = tab.page
    await tab.open("/campaigns")
    await page.fill("#q", "summer")
    await page.press("#q", "Enter")
    await page.wait_for_url("**q=summer**")
    await page.fill("#q", "nothing is called so")
    await expect(page.locator("#campaigns")).to_contain_text("No campaign matches")
    await page.fill("#q", "summer")
    await page.press("#q", "Enter")
    await expect(page.locator("#campaigns tbody tr").first).to_contain_text("Summer")


async def test_delay_that_is_mistyped_is_seen_and_nothing_is_sent(tab: Tab, world: World, campaign: str) -> None:
    """The page had Now chosen after the refusal, and pressing again sent to everybody at once."""
    page = tab.page
    tab.expected.append("status of 400")
    await tab.open("/campaigns?channel=whatsapp&state=SENT")
    await page.click(f"#retarget-{campaign}")
    await page.click("label[for=when-delay]")
    await page.fill("#delay", "1.5")
    await page.click("label[for=where-sms]")
    await expect(page.locator("#delay-fault")).to_be_visible()
    await expect(page.locator("#when-delay")).to_be_checked()
    await expect(page.locator("#delay")).to_have_value("1.5")
    await page.fill("#delay", "24")
    await make_draft(tab)
    await page.fill("#field-content-body", "Not yet")
    await page.fill("#delay", "1.5")
    for _ in range(2):
        async with page.expect_navigation():
            await page.click("#launch")
        await expect(page.locator("#delay-fault")).to_be_visible()
        await expect(page.locator("#when-delay")).to_be_checked()
        await expect(page.locator("#delay")).to_have_value("1.5")
    draft = page.url.removesuffix("/launch").rpartition("/")[2]
    assert (await world.get_campaign(f"apps/acme/campaigns/{draft}")).state == campaigns_pb2.Campaign.DRAFT


async def test_part_that_fails_is_told_of_each_time_until_one_succeeds(tab: Tab, campaign: str) -> None:
    """The first failure took the notice's place: it stayed for good, and of the next ones nothing was to be seen."""
    page = tab.page
    await tab.open(f"/campaigns/{campaign}/retarget?channel=push")
    await make_draft(tab)
    await page.wait_for_load_state("networkidle")
    title = await page.title()
    for text in ("once", "twice"):
        async with break_down(tab, "**/save"):
            await page.fill("#field-content-title", text)
            await expect(page.locator("#notice[role=alert]")).to_have_text("Service Unavailable")
        assert await page.title() == title
        await page.fill("#field-content-title", f"{text} more")
        await expect(page.locator("#notice")).to_be_empty()


async def test_part_of_the_dialog_that_fails_is_told_of_inside(tab: Tab, campaign: str) -> None:
    """It was told behind the dialog, where nobody could read it."""
    page = tab.page
    await tab.open("/campaigns?channel=whatsapp&state=SENT")
    await page.click(f"#retarget-{campaign}")
    await page.wait_for_selector("dialog[open] form")
    async with break_down(tab, "**/retarget?*"):
        await page.click("label[for=where-sms]")
        await expect(page.locator("dialog [role=alert]")).to_have_text("Service Unavailable")
        assert await page.evaluate("document.querySelector('dialog [role=alert]').checkVisibility()")
        await expect(page.locator("#notice")).to_be_empty()
    assert await tab.find_violations() == []
    await page.click("label[for=where-push]")
    await expect(page.locator("dialog [role=alert]")).to_be_empty()
    await expect(page.locator("#where-push")).to_be_checked()
    # With the dialog what was told in it goes.
    async with break_down(tab, "**/retarget?*"):
        await page.click("label[for=where-sms]")
        await expect(page.locator("dialog [role=alert]")).to_have_text("Service Unavailable")
    await page.keyboard.press("Escape")
    async with break_down(tab, "**/retarget"):
        await page.click(f"#retarget-{campaign}")
        await expect(page.locator("#notice")).to_have_text("Service Unavailable")
    await page.click(f"#retarget-{campaign}")
    await page.wait_for_selector("dialog[open] form")
    await expect(page.locator("[role=alert]:not(:empty)")).to_have_count(0)


async def test_refusal_is_not_hidden_by_what_the_page_asks_for_by_itself(tab: Tab, world: World) -> None:
    page = tab.page
    made = await world.create_campaign("sms", display_name="Moving")
    await world.launch(made.name)
    identifier = made.name.rpartition("/")[2]
    async with transaction(world.core.engine) as conn:
        moving = tables.campaigns.update().where(tables.campaigns.c.campaign == identifier)
        await conn.execute(moving.values(finish_time=func.now() + timedelta(minutes=10)))
    await page.clock.install()
    await tab.open("/campaigns?q=Moving")
    async with break_down(tab, "**/retarget"):
        await page.click(f"#retarget-{identifier}")
        await expect(page.locator("#notice")).to_have_text("Service Unavailable")
    async with page.expect_response(f"**/campaigns/{identifier}/row") as answer:
        await page.clock.run_for(10_000)
    assert (await answer.value).ok
    await expect(page.locator(f"#row-{identifier}")).to_be_visible()
    await expect(page.locator("#notice")).to_have_text("Service Unavailable")
    await page.click(f"#retarget-{identifier}")
    await page.wait_for_selector("dialog[open] form")
    await expect(page.locator("#notice")).to_be_empty()


@pytest.mark.parametrize("part", ["row", "live", "import"])
async def test_page_that_is_watched_through_an_outage_goes_on(tab: Tab, world: World, part: str) -> None:
    """One answer that failed was the last that the page asked for; it showed the same progress for ever."""
    page = tab.page
    if part == "import":
        await tab.open("/contacts/import")
        file = {"name": "people.csv", "mimeType": "text/csv", "buffer": b"external_id\nwatched\n"}
        await page.set_input_files("#file", files=[file])
        await page.click("main .foot button")
        await expect(page.locator("#import")).to_contain_text("Done")
        path, asked, place = page.url.rpartition("/console")[2], "**/contacts/imports/*", "#import"
        where = tables.contact_imports.c.import_id == int(path.rpartition("/")[2])
        # It would be taken for lost when it said nothing for a minute, which a crowded machine's browser may take.
        said = func.now() + timedelta(minutes=10)
        moving = tables.contact_imports.update().where(where).values(state="RUNNING", update_time=said)
        over = tables.contact_imports.update().where(where).values(state="DONE")
    else:
        made = await world.create_campaign("sms", display_name="Watched")
        await world.launch(made.name)
        identifier = made.name.rpartition("/")[2]
        path, place = ("/campaigns?q=Watched", f"#row-{identifier}") if part == "row" else (f"/campaigns/{identifier}", "#live")
        asked = f"**/campaigns/{identifier}/{part}"
        where = tables.campaigns.c.campaign == identifier
        moving = tables.campaigns.update().where(where).values(finish_time=func.now())
        over = tables.campaigns.update().where(where).values(finish_time=func.now() - timedelta(hours=1))
    async with transaction(world.core.engine) as conn:
        await conn.execute(moving)
    await page.clock.install()
    await tab.open(path)
    tab.expected.append("ERR_CONNECTION_REFUSED")
    await page.route(asked, lambda route: route.abort("connectionrefused"))
    async with page.expect_event("requestfailed"):
        await page.clock.run_for(10_000)
    await expect(page.locator("#notice")).to_be_empty()
    await page.unroute(asked)
    async with break_down(tab, asked):
        await page.clock.run_for(10_000)
        await expect(page.locator("#notice")).to_have_text("Service Unavailable")
    async with transaction(world.core.engine) as conn:
        await conn.execute(over)
    await page.clock.run_for(10_000)
    await expect(page.locator(place)).not_to_have_attribute("hx-get", re.compile(""))
    await expect(page.locator("#notice")).to_be_empty()
    # What is over is asked for no more, by the element before neither.
    requests: list[Request] = []
    page.on("request", lambda request: requests.append(request))
    await page.clock.run_for(60_000)
    assert requests == []


async def test_draft_is_there_when_somebody_comes_back(tab: Tab, campaign: str) -> None:
    await tab.open(f"/campaigns/{campaign}/retarget?channel=push")
    await make_draft(tab)
    await tab.page.fill("#field-content-title", "Half a message")
    await expect(tab.page.locator("#saved")).to_contain_text("Kept")
    draft = tab.page.url
    await tab.open("/campaigns")
    await tab.page.goto(draft)
    await expect(tab.page.locator("#field-content-title")).to_have_value("Half a message")


async def test_lists_of_a_content_grow_and_shrink(tab: Tab, campaign: str) -> None:
    page = tab.page
    await tab.open(f"/campaigns/{campaign}/retarget?channel=whatsapp")
    await make_draft(tab)
    await page.fill("#field-content-template", "summer_sale")
    for place in range(2):
        await page.click("text=Add body")
        await page.fill(f"#field-content-body-{place}", f"value {place}")
    await page.click("[aria-label='Remove Body 1']")
    await expect(page.locator("#field-content-body-0")).to_have_value("value 1")
    await page.select_option("[name='content.header@']", label="Media")
    await expect(page.locator("#field-content-header-link")).to_be_visible()
    await expect(page.locator("#field-content-template")).to_have_value("summer_sale")
