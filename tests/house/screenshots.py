"""`make screenshots`: pictures of the console for the documents, from a server of their own and its sandbox."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
import tempfile
from pathlib import Path

from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from playwright.async_api import Page, async_playwright, expect

from aftertouch.sandbox import SandboxSettings
from aftertouch.server import keep_house
from aftertouch.store.embedded import EmbeddedPostgres
from aftertouch.store.engine import open_engine
from aftertouch.store.migrate import migrate
from aftertouch.v1 import campaigns_pb2, retargeting_pb2
from tests.fix_console import CHROMIUM_OPTIONS, PASSWORD, create_user
from tests.fix_world import World, run_world

IMAGES = Path(__file__).parents[2] / "docs" / "images"
SIZES = {"wide": (1280, 800), "narrow": (400, 860)}
USER = "ana@acme.example"


async def fill(world: World) -> str:
    """Campaigns as a team would have them; the id of the one that is followed up."""
    await world.import_people()
    body = ["{{ first_name | default: 'there' }}"]
    sale = await world.create_campaign(
        "whatsapp", content=ParseDict({"template": "summer_sale", "language": "en_US", "body": body}, Struct())
    )
    await world.launch(sale.name)
    source = sale.name
    for channel, action in (("sms", "not_read"), ("push", "not_delivered")):
        selection = campaigns_pb2.RetargetSelection(source=source, action=action)
        made = await world.client.retargeting.CreateRetarget(
            retargeting_pb2.CreateRetargetRequest(selection=selection, channel=channel)
        )
        texts = {"sms": {"body": "The sale ends tonight"}, "push": {"title": "Last hours", "url": "https://shop.example"}}
        content = ParseDict(texts[channel], Struct())
        await world.client.campaigns.UpdateCampaign(
            campaigns_pb2.UpdateCampaignRequest(campaign=campaigns_pb2.Campaign(name=made.name, content=content))
        )
        await world.launch(made.name)
        source = made.name
    arrivals = await world.create_campaign("push", display_name="New arrivals")
    await world.launch(arrivals.name)
    await world.create_campaign("sms", display_name="October newsletter")
    return sale.name.rpartition("/")[2]


async def shoot(page: Page, base: str, sale: str, suffix: str) -> None:
    """The four pages; the draft that is made for them is deleted again."""

    async def save(name: str, *, is_whole: bool = False) -> None:
        await page.wait_for_load_state("networkidle")
        await page.screenshot(path=IMAGES / f"{name}-{suffix}.png", full_page=is_whole)

    await page.goto(f"{base}/campaigns")
    await save("campaigns")
    await page.click(f"#retarget-{sale}")
    await page.wait_for_selector("#funnel .drops")
    await page.click("label[for=where-sms]")
    await expect(page.locator(".htmx-request")).to_have_count(0)
    await expect(page.locator("#where-sms")).to_be_checked()
    await expect(page.locator("#funnel .drops")).to_be_visible()
    await save("retarget")
    await page.click("#make-draft")
    await page.wait_for_url("**/edit")
    await page.fill("#field-content-body", "Hi {{ first_name | default: 'there' }}, the sale ends tonight: shop.example/sale")
    await page.wait_for_selector("#preview .bubble")
    await save("composer")
    page.once("dialog", lambda question: question.accept())
    await page.click("text=Delete draft")
    await page.wait_for_url("**/campaigns")
    await page.goto(f"{base}/campaigns/{sale}")
    await save("campaign", is_whole=True)


async def main() -> None:
    path = shutil.which("chromium")
    if path is None:
        sys.exit("there is no Chromium; on Debian, `make browser` installs it")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="aftertouch-screenshots-") as directory:
        async with EmbeddedPostgres(Path(directory)) as postgres:
            await migrate(postgres.url)
            async with open_engine(postgres.url) as engine:
                await keep_house(engine)
            chosen = SandboxSettings(size=6000, time_scale=1)
            channels = frozenset({"push", "sms", "whatsapp"})
            async with run_world(postgres.url, chosen, allowed=channels) as world, async_playwright() as playwright:
                sale = await fill(world)
                await create_user(world, USER, "admin")
                browser = await playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS)
                base = f"http://{world.addresses.http}/console"
                for scheme, size in itertools.product(("light", "dark"), SIZES):
                    width, height = SIZES[size]
                    page = await browser.new_page(
                        color_scheme="dark" if scheme == "dark" else "light",
                        viewport={"width": width, "height": height},
                        locale="en-GB",
                        reduced_motion="reduce",
                    )
                    await page.goto(f"{base}/campaigns")
                    await page.fill("#email", USER)
                    await page.fill("#password", PASSWORD)
                    await page.press("#password", "Enter")
                    await page.wait_for_url("**/campaigns")
                    await shoot(page, base, sale, f"{scheme}-{size}")
                    await page.close()
                await browser.close()


if __name__ == "__main__":
    asyncio.run(main())
