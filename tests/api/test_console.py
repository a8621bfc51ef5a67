"""The console over HTTP: who gets in, who may see and change what, and what the pages say."""

from __future__ import annotations

import asyncio
import csv
import html
import io
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Any
from urllib.parse import parse_qsl, quote

import aiohttp
import aiohttp.web
import numpy as np
import pytest
from sqlalchemy import delete, select

import aftertouch.rpc.events
from aftertouch.console import provided
from aftertouch.console import settings as console_settings
from aftertouch.console.accounts import MOST_FAILURES
from aftertouch.console.app import PAGES
from aftertouch.console.lists import BATCH
from aftertouch.console.words import REASONS
from aftertouch.rolls.sql import write_roll
from aftertouch.rpc.values import to_struct, to_timestamp
from aftertouch.sandbox import SandboxSettings
from aftertouch.store.activity import read_activity
from aftertouch.store.engine import transaction
from aftertouch.store.tables import audit_entries, campaigns, sessions, sign_in_failures
from aftertouch.store.tables import users as users_table
from aftertouch.v1 import apps_pb2, campaigns_pb2, contacts_pb2, events_pb2, retargeting_pb2
from tests.fix_console import PASSWORD, Visitor, create_user
from tests.fix_database import clone_database
from tests.fix_world import OpenWorld, World, run_world
from tests.ports import find_free_port

HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;"
USERS = {"viewer": "vera@acme.example", "marketer": "max@acme.example", "admin": "ada@acme.example"}


@pytest.fixture(scope="module")
async def world(shared_world: World) -> World:
    for role, email in USERS.items():
        await create_user(shared_world, email, role)
    await create_user(shared_world, "eve@evil.example", "admin", "evil")
    return shared_world


@pytest.fixture
async def visitor(world: World) -> AsyncIterator[Visitor]:
    """Somebody who is not signed in."""
    async with Visitor(world) as opened:
        yield opened


@pytest.fixture
async def marketer(visitor: Visitor) -> Visitor:
    assert await visitor.sign_in(USERS["marketer"]) == 303
    return visitor


@pytest.fixture
async def admin(visitor: Visitor) -> Visitor:
    assert await visitor.sign_in(USERS["admin"]) == 303
    return visitor


@pytest.fixture(scope="module")
async def sent(world: World) -> campaigns_pb2.Campaign:
    """A campaign that was sent, with receipts."""
    made = await world.create_campaign("whatsapp")
    await world.launch(made.name)
    return await world.get_campaign(made.name)


def fill_path(path: str, campaign: str = "no-such") -> str:
    return path.format(campaign=campaign, number="1", key="0123456789ab", list="no-such", channel="sms")


def read_id(name: str) -> str:
    return name.rpartition("/")[2]


# Getting in


async def test_sign_in_leads_to_the_page_that_was_asked_for(visitor: Visitor) -> None:
    status, _ = await visitor.get("/contacts?q=a")
    assert status == 303
    response, _ = await visitor.request("GET", "/contacts?q=a")
    assert response.headers["location"] == "/console/sign-in?next=%2Fconsole%2Fcontacts%3Fq%3Da"
    data = {"app": "acme", "email": USERS["viewer"], "password": PASSWORD, "next": "/console/contacts?q=a"}
    response, _ = await visitor.request("POST", "/sign-in", data=data)
    assert (response.status, response.headers["location"]) == (303, "/console/contacts?q=a")


@pytest.mark.parametrize(
    "target",
    ["https://evil.example/", "//evil.example/console/", "/\\evil.example", "javascript:alert(1)", "/console/\\evil", "x\n"],
)
async def test_sign_in_leads_to_no_other_site(visitor: Visitor, target: str) -> None:
    data = {"app": "acme", "email": USERS["viewer"], "password": PASSWORD, "next": target}
    response, _ = await visitor.request("POST", "/sign-in", data=data)
    assert response.headers["location"] == "/console/campaigns"


async def test_sign_in_with_a_wrong_part_says_the_same_whatever_is_wrong(visitor: Visitor) -> None:
    texts = set()
    for app, email, password in (
        ("acme", USERS["viewer"], "not the password"),
        ("acme", "nobody@acme.example", PASSWORD),
        ("evil", USERS["viewer"], PASSWORD),
        ("nothing", USERS["viewer"], PASSWORD),
        ("ac\0me", "vera\0@acme.example", PASSWORD),
    ):
        data = {"app": app, "email": email, "password": password}
        response, text = await visitor.request("POST", "/sign-in", data=data)
        assert response.status == 403
        texts.add(re.search(r'role="alert">([^<]*)', text)[1])
    assert len(texts) == 1
    assert not visitor.cookie


async def test_sign_in_is_refused_after_too_many_failures_whether_the_account_exists_or_not(world: World) -> None:
    await create_user(world, "guessed@acme.example", "viewer")
    async with Visitor(world) as visitor:
        for email in ("guessed@acme.example", "unknown@acme.example"):
            statuses = [await visitor.sign_in(email, "a wrong password") for _ in range(MOST_FAILURES + 1)]
            assert statuses == [403] * MOST_FAILURES + [429]
        assert await visitor.sign_in("Guessed@ACME.example") == 429
        async with transaction(world.core.engine) as conn:
            await conn.execute(delete(sign_in_failures))
        assert await visitor.sign_in("guessed@acme.example") == 303


async def test_sign_in_is_refused_after_too_many_failures_side_by_side(world: World) -> None:
    await create_user(world, "stormed@acme.example", "viewer")
    try:
        async with AsyncExitStack() as stack:
            visitors = [await stack.enter_async_context(Visitor(world)) for _ in range(MOST_FAILURES * 3)]
            tries = (visitor.sign_in("stormed@acme.example", "a wrong password") for visitor in visitors)
            assert Counter(await asyncio.gather(*tries)) == {403: MOST_FAILURES, 429: MOST_FAILURES * 2}
    finally:
        async with transaction(world.core.engine) as conn:
            await conn.execute(delete(sign_in_failures))


async def test_session_cookie_is_for_this_site_and_no_script(visitor: Visitor) -> None:
    data = {"app": "acme", "email": USERS["viewer"], "password": PASSWORD}
    response, _ = await visitor.request("POST", "/sign-in", data=data)
    cookie = response.headers["set-cookie"].lower()
    assert all(part in cookie for part in ("httponly", "samesite=lax", "path=/"))
    assert "secure" not in cookie


async def test_session_planted_before_signing_in_is_worth_nothing_after_it(world: World, visitor: Visitor) -> None:
    """Fixation: somebody set the victim's cookie, and waits for the victim to sign in."""
    planted = "A" * 43
    visitor.session.cookie_jar.update_cookies({"aftertouch": planted}, aiohttp.client.URL(visitor.base))
    assert await visitor.sign_in(USERS["viewer"]) == 303
    assert visitor.cookie != planted
    async with Visitor(world) as attacker:
        attacker.session.cookie_jar.update_cookies({"aftertouch": planted}, aiohttp.client.URL(attacker.base))
        assert (await attacker.get("/campaigns"))[0] == 303


async def test_session_ends_with_signing_out_everywhere_it_is_known(world: World, marketer: Visitor) -> None:
    kept = marketer.cookie
    assert await marketer.post("/sign-out") == (303, "/console/sign-in?app=acme")
    marketer.session.cookie_jar.update_cookies({"aftertouch": kept}, aiohttp.client.URL(marketer.base))
    assert (await marketer.get("/campaigns"))[0] == 303


async def test_session_that_is_old_or_unused_is_over(world: World, visitor: Visitor) -> None:
    for change in ("create_time = now() - interval '8 days'", "use_time = now() - interval '25 hours'"):
        assert await visitor.sign_in(USERS["viewer"]) == 303
        async with transaction(world.core.engine) as conn:
            await conn.exec_driver_sql(f"UPDATE sessions SET {change}")
        assert (await visitor.get("/campaigns"))[0] == 303, change
        async with transaction(world.core.engine) as conn:
            await conn.execute(delete(sessions))


async def test_password_changed_ends_every_other_session(world: World) -> None:
    await create_user(world, "changing@acme.example", "viewer")
    async with Visitor(world) as here, Visitor(world) as elsewhere:
        for visitor in (here, elsewhere):
            assert await visitor.sign_in("changing@acme.example") == 303
        wrong = await here.post("/account", {"current": "not it", "password": "another good password"})
        assert (wrong[0], "is not your password" in wrong[1]) == (400, True)
        short = await here.post("/account", {"current": PASSWORD, "password": "short"})
        assert (short[0], "must have 12 to 256 characters" in short[1]) == (400, True)
        assert (await here.post("/account", {"current": PASSWORD, "password": "another good password"}))[0] == 303
        assert (await here.get("/campaigns"))[0] == 200
        assert (await elsewhere.get("/campaigns"))[0] == 303
        assert await elsewhere.sign_in("changing@acme.example") == 403
        assert await elsewhere.sign_in("changing@acme.example", "another good password") == 303


async def test_password_is_stored_as_argon2id(world: World) -> None:
    async with transaction(world.core.engine) as conn:
        hashes = (await conn.execute(select(users_table.c.password_hash))).scalars().all()
    assert all(found.startswith("$argon2id$") for found in hashes)


# Who may what


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.method} {page.path}")
async def test_page_without_a_session_leads_to_the_sign_in(visitor: Visitor, page: Any) -> None:
    response, _ = await visitor.request(page.method, fill_path(page.path), data={} if page.method == "POST" else None)
    assert (response.status, response.headers["location"].partition("?")[0]) == (303, "/console/sign-in")


ALLOWED = {"viewer": {"read"}, "marketer": {"read", "manage"}, "admin": {"read", "manage", "admin"}}


@pytest.mark.parametrize("role", USERS)
async def test_role_sees_and_changes_what_is_its_own_and_nothing_else(world: World, visitor: Visitor, role: str) -> None:
    await visitor.sign_in(USERS[role])
    for page in PAGES:
        path = fill_path(page.path)
        if page.scope not in ALLOWED[role]:
            answer = await (visitor.get(path) if page.method == "GET" else visitor.post(path))
            assert (answer[0], "Your role does not include this" in answer[1]) == (403, True), page
        elif page.method == "GET":
            assert (await visitor.get(path))[0] in (200, 400, 404), page


async def test_role_without_a_right_is_shown_no_button_for_it(visitor: Visitor, sent: campaigns_pb2.Campaign) -> None:
    await visitor.sign_in(USERS["viewer"])
    for path in ("/campaigns", f"/campaigns/{read_id(sent.name)}", f"/campaigns/{read_id(sent.name)}/row", "/contacts"):
        status, text = await visitor.get(path)
        assert status == 200
        assert not re.search(r"/retarget|/edit|/import|/new|/keys|/users", text), path


async def test_change_without_the_sessions_token_is_refused_on_every_page(world: World, admin: Visitor) -> None:
    async with Visitor(world) as other:
        await other.sign_in(USERS["marketer"])
        for page in PAGES:
            if page.method == "POST":
                for token in ("", "0" * 64, "é", other.csrf):
                    status, text = await admin.post(fill_path(page.path), {"csrf": token})
                    assert (status, "not asked for by a page of this session" in text) == (403, True), page
    assert (await admin.get("/account"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}, {"origin": "https://evil.example"}, {"origin": "null"}],
)
async def test_change_that_another_site_makes_is_refused_even_with_the_token(admin: Visitor, headers: dict[str, str]) -> None:
    assert (await admin.post("/keys", {"display_name": "x", "scope": "read"}, **headers))[0] == 403
    response, _ = await admin.request("POST", "/sign-in", data={"app": "acme"}, headers=headers)
    assert response.status == 403


async def test_change_by_reading_is_impossible(admin: Visitor) -> None:
    for page in PAGES:
        if page.method == "POST" and not any(p.path == page.path and p.method == "GET" for p in PAGES):
            assert (await admin.get(fill_path(page.path)))[0] == 405, page


async def test_campaign_of_another_app_does_not_exist_by_any_address(world: World, sent: campaigns_pb2.Campaign) -> None:
    async with Visitor(world) as eve:
        await eve.sign_in("eve@evil.example", app="evil")
        for page in PAGES:
            if "{campaign}" not in page.path:
                continue
            for campaign in (read_id(sent.name), f"..%2F..%2Facme%2Fcampaigns%2F{read_id(sent.name)}"):
                path = fill_path(page.path, campaign)
                status, text = await (
                    eve.get(path) if page.method == "GET" else eve.post(path, {"action": "read", "channel": "sms"})
                )
                assert status in (400, 404), page
                assert sent.display_name not in text
        status, text = await eve.get("/campaigns")
        assert sent.display_name not in text


async def test_people_keys_and_imports_of_another_app_do_not_exist(world: World, admin: Visitor) -> None:
    await admin.post("/keys", {"display_name": "ours", "scope": "read"})
    _, text = await admin.get("/keys")
    key = re.search(r"/keys/([0-9a-f]{12})/revoke", text)[1]
    assert (await admin.get("/contacts/person?id=user-000001"))[0] == 200
    async with Visitor(world) as eve:
        await eve.sign_in("eve@evil.example", app="evil")
        assert (await eve.get("/contacts/person?id=user-000001"))[0] == 404
        assert "user-000001" not in (await eve.get("/contacts"))[1]
        assert (await eve.post(f"/keys/{key}/revoke"))[0] == 404
        assert (await eve.post("/users/change", {"email": USERS["viewer"], "do": "delete"}))[0] == 404
        assert USERS["viewer"] not in (await eve.get("/users"))[1]
        assert "ada@" not in (await eve.get("/audit"))[1]
    assert f"/keys/{key}/revoke" in (await admin.get("/keys"))[1]


# What pages carry


async def list_pages(visitor: Visitor, campaign: str) -> AsyncIterator[tuple[str, aiohttp.ClientResponse, str]]:
    for page in PAGES:
        if page.method == "GET":
            path = fill_path(page.path, campaign)
            yield path, *await visitor.request("GET", path)


async def test_pages_allow_no_script_but_the_files(admin: Visitor, sent: campaigns_pb2.Campaign) -> None:
    pages = [page async for page in list_pages(admin, read_id(sent.name))]
    pages.append(("/sign-in", *await admin.request("GET", "/sign-in")))
    for path, response, text in pages:
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'" in policy, path
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        if "html" in response.headers.get("content-type", ""):
            assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", text), path
            assert not re.search(r'(?:src|href|action)="(?!/console/|#)', text), path


async def test_text_from_outside_is_text_on_every_page(world: World, admin: Visitor) -> None:
    """A contact's id and attributes, a campaign's name and content, a provider's code, a file's name and a wrong address."""
    contact = contacts_pb2.Contact(external_id=HOSTILE, attributes=to_struct({HOSTILE: HOSTILE, "first_name": HOSTILE}))
    contact.subscriptions.add(channel="sms", address=to_struct({"phone": "+34600000001"}))
    client = world.client
    await client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=[contact]))
    given = campaigns_pb2.Audience()
    given.given_contacts.contacts.append(f"{client.parent}/contacts/{HOSTILE}")
    made = await world.create_campaign("sms", audience=given, display_name=HOSTILE, content=to_struct({"body": HOSTILE}))
    async with transaction(world.core.engine) as conn:
        await conn.execute(campaigns.update().where(campaigns.c.display_name == HOSTILE).values(state_reason=HOSTILE))
    campaign = read_id(made.name)
    await world.launch(made.name)
    event = events_pb2.Event(signal="failed", reason_code=HOSTILE[:60])
    event.recipient.campaign, event.recipient.external_id = made.name, HOSTILE
    event.time.GetCurrentTime()
    await client.events.IngestEvents(events_pb2.IngestEventsRequest(parent=client.parent, events=[event]))
    draft = await world.create_campaign(
        "sms", audience=given, display_name=HOSTILE, content=to_struct({"body": "{{ first_name }}"})
    )
    await admin.post("/keys", {"display_name": HOSTILE, "scope": "read"})
    form = aiohttp.FormData()
    form.add_field("csrf", admin.csrf)
    form.add_field("file", f"external_id\n{HOSTILE}/\n".encode(), filename=HOSTILE, content_type="text/csv")
    response, _ = await admin.request("POST", "/contacts/import", data=form)
    imported = response.headers["location"].removeprefix("/console")
    await wait_for_import(admin, imported)
    paths = [fill_path(page.path, campaign) for page in PAGES if page.method == "GET" and "people.csv" not in page.path]
    paths += [imported, f"/campaigns/{read_id(draft.name)}/edit?as={quote(HOSTILE)}"]
    seen = 0
    for path in paths:
        _, text = await admin.get(path)
        assert "<img" not in text, path
        seen += "&lt;img src=x onerror" in text
    asked = dict.fromkeys(("id", "q", "channel"), HOSTILE)
    for path in ("/contacts/person", "/contacts", "/campaigns"):
        response, text = await admin.request("GET", path, params=asked)
        assert (response.status in (200, 400), "<img" in text) == (True, False)
        seen += "&lt;img src=x onerror" in text
    assert seen >= 6


async def wait_for_import(visitor: Visitor, path: str) -> str:
    async with asyncio.timeout(120):
        # There is nothing to wait on but the answer of the next request.
        while "Importing" in (text := (await visitor.get(path))[1]):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return text


async def test_error_of_ours_says_nothing_but_a_number(world: World, admin: Visitor) -> None:
    async with transaction(world.core.engine) as conn:
        await conn.exec_driver_sql("ALTER TABLE audit_entries RENAME COLUMN actor TO away")
    try:
        status, text = await admin.get("/audit")
    finally:
        async with transaction(world.core.engine) as conn:
            await conn.exec_driver_sql("ALTER TABLE audit_entries RENAME COLUMN away TO actor")
    assert status == 500
    assert re.search(r"A defect of ours. Tell your operator this number: [0-9a-f]{32}\.", text)
    assert "audit_entries" not in text


async def test_form_above_the_limit_is_refused_before_it_is_read(admin: Visitor) -> None:
    body = io.BytesIO(b"display_name=" + b"x" * 1_100_000)
    response, _ = await admin.request("POST", "/keys", data=body)
    assert response.status == 413
    response, _ = await admin.request("POST", "/sign-in", data={"password": "x" * 20_000})
    assert response.status == 413


# Campaigns


async def test_list_searches_filters_and_pages(world: World, marketer: Visitor) -> None:
    for number in range(27):
        await world.create_campaign("push", display_name=f"Paged 100% {number:02}")
    status, text = await marketer.get("/campaigns?q=paged+100%25&channel=push&state=DRAFT")
    shown = re.findall(r"Paged 100% (\d\d)</a>", text)
    assert (status, shown) == (200, [f"{number:02}" for number in range(26, 1, -1)])
    older = re.search(r'href="/console(/campaigns\?[^"]*after=[^"]*)"', text)[1].replace("&amp;", "&")
    _, text = await marketer.get(older)
    assert re.findall(r"Paged 100% (\d\d)</a>", text) == ["01", "00"]
    for query in ("q=paged_100", "channel=sms&q=paged", "state=SENT&q=paged"):
        assert "No campaign matches" in (await marketer.get(f"/campaigns?{query}"))[1]


async def test_campaign_page_has_the_same_counts_as_the_api(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    _, text = await marketer.get(f"/campaigns/{read_id(sent.name)}")
    plain = re.sub(r"<[^>]+>|\s+", " ", text)
    campaign = await world.get_campaign(sent.name)
    for label, signal in (("Sent", "sent"), ("Delivered", "delivered"), ("Read", "read")):
        assert re.search(rf"{label} +{campaign.counts.signals[signal]} ", plain), label
    for reason in campaign.counts.reasons:
        assert reason.reason_code in plain


def read_chart(text: str) -> tuple[str, dict[str, int]]:
    """What a column of a campaign's chart spans, and the events of each line."""
    lines = re.findall(r'</svg>([\w ]+) <span class="num muted">([\d,]+) events</span>', text)
    return re.search(r"Events in ([\w ]+),", text)[1], {label: int(count.replace(",", "")) for label, count in lines}


async def launch_long_ago(
    world: World, name: str, times: list[datetime], channel: str = "sms", signal: str = "delivered", code: str = ""
) -> str:
    """The id of a campaign to one person, as if it had been sent at the first of these times; each has a receipt."""
    made = await world.create_campaign(channel, display_name=name)
    async with transaction(world.core.engine) as conn:
        where = campaigns.c.campaign == read_id(made.name)
        values = {"state": "SENT", "recipients": 1, "launch_time": times[0], "finish_time": times[0]}
        launched = await conn.execute(campaigns.update().where(where).values(values).returning(campaigns.c.campaign_id))
        await write_roll(conn, launched.scalar_one(), np.array([0]))
    (person,) = await world.read_recipients(made.name)
    events = [
        events_pb2.Event(
            recipient=events_pb2.RecipientTarget(campaign=made.name, external_id=person),
            signal=signal,
            reason_code=code,
            time=to_timestamp(time),
        )
        for time in times
    ]
    request = events_pb2.IngestEventsRequest(parent="apps/acme", events=events)
    assert (await world.client.events.IngestEvents(request)).accepted_count == len(times)
    return read_id(made.name)


async def test_chart_of_a_month_has_all_events_and_asks_for_no_more_than_it_draws(
    world: World, marketer: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    async def count_rows(*arguments: Any) -> Any:
        found = await read_activity(*arguments)
        asked.append(len(found))
        return found

    monkeypatch.setattr(aftertouch.rpc.events, "read_activity", count_rows)
    now = datetime.now(UTC)
    times = [now - timedelta(hours=hours) for hours in range(29 * 24, 0, -1)]
    campaign = await launch_long_ago(world, "All month", times)
    _, text = await marketer.get(f"/campaigns/{campaign}")
    assert read_chart(text) == ("12 hours", {"Delivered": len(times)})
    assert len(asked) == 1
    assert asked[0] <= 60


@pytest.mark.parametrize("hours", [0, 3, 23, 100])
async def test_chart_ends_with_the_last_event(world: World, marketer: Visitor, hours: int) -> None:
    launch_time = (datetime.now(UTC) - timedelta(days=29)).replace(minute=20, second=30)
    times = [launch_time + timedelta(hours=hours) * part for part in (0, 0.5, 1)]
    campaign = await launch_long_ago(world, f"Over after {hours}", times)
    _, text = await marketer.get(f"/campaigns/{campaign}")
    assert read_chart(text)[1] == {"Delivered": 3}
    (points,) = re.findall(r'points="([^"]+)"', text)
    assert 12 <= len(points.split()) / 2 <= 60
    start, end = re.search(r"Events over time, from (.{16}) to (.{16}) UTC", text).groups()
    shown = datetime.fromisoformat(end) - datetime.fromisoformat(start)
    assert max(timedelta(hours=hours), timedelta(minutes=12)) <= shown <= timedelta(hours=hours * 1.1, minutes=12)


async def read_csv(visitor: Visitor, path: str) -> list[dict[str, str]]:
    """The rows of an export."""
    response, text = await visitor.request("GET", path)
    assert response.status == 200, text
    assert response.headers["content-disposition"].endswith('.csv"')
    return list(csv.DictReader(io.StringIO(text)))


def find_exports(page: str) -> dict[str, int]:
    """Where a page's CSV links lead, each with the number that stands before it."""
    found = {}
    for link in re.finditer(
        r'<a class="quiet" href="/console(/[^"]*people\.csv[^"]*)" aria-label="Export [^"]+ as CSV">CSV</a>', page
    ):
        before = re.sub(r"<[^>]+>", " ", page[: link.start()])
        numbers = re.findall(r"(?<![\w.,/])\d[\d,]*(?![\d.,]*%|[\w.,/])", before)
        found[html.unescape(link[1])] = int(numbers[-1].replace(",", ""))
    return found


async def test_every_number_of_a_campaign_leads_to_its_people(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    """Of those who were counted apart, of whom nothing was heard, or who failed in all, the page had only the number."""
    asked = set()
    made = [await world.create_campaign(channel) for channel in ("sms", "push")]
    for campaign in made:
        await world.launch(campaign.name)
    for campaign in (sent, *made):
        people = await world.read_recipients(campaign.name)
        exports = find_exports((await marketer.get(f"/campaigns/{read_id(campaign.name)}"))[1])
        assert f"/campaigns/{read_id(campaign.name)}/people.csv?signal=sent" in exports
        for path, count in exports.items():
            rows = await read_csv(marketer, path)
            assert len(rows) == count, path
            asked |= {name for name, _ in parse_qsl(path.partition("?")[2])}
            for row in rows:
                person = people[row["external_id"]]
                assert {name for name, value in row.items() if value == "yes"} == set(person.signals), path
                assert row["reasons"].split() == list(person.reasons)
        everybody = await read_csv(marketer, f"/campaigns/{read_id(campaign.name)}/people.csv")
        assert [row["external_id"] for row in everybody] == list(people)
    assert asked == {"signal", "action", "apart", "pending", "reason"}


async def test_export_has_the_people_of_an_action(world: World, marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    people, path = await world.read_recipients(sent.name), f"/campaigns/{read_id(sent.name)}/people.csv"
    unread = {name for name, person in people.items() if "delivered" in person.signals and "read" not in person.signals}
    assert {row["external_id"] for row in await read_csv(marketer, f"{path}?action=not_read")} == unread
    for query in ("action=nothing", "signal=nothing", "apart=1", "action=read&apart=1"):
        assert (await marketer.get(f"{path}?{query}"))[0] == 400, query


async def test_every_number_of_a_funnel_leads_to_its_people(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    """Who is not reached was a number with a reason: whom a campaign lost, nobody could say."""
    people = await world.read_recipients(sent.name)
    listed = await world.client.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent="apps/acme", page_size=1000))
    with_phone = {one.external_id for one in listed.contacts if any(s.channel == "sms" for s in one.subscriptions)}
    read = {name for name, person in people.items() if "read" in person.signals}
    failed = {name for name, person in people.items() if {"failed", "delivered"} & set(person.signals) == {"failed"}}
    groups: dict[str, str] = {}
    for query, chosen in (("action=failed&channel=whatsapp", failed), ("action=read&channel=sms", read)):
        _, text = await marketer.get(f"/campaigns/{read_id(sent.name)}/retarget/funnel?{query}")
        exports = find_exports(text)
        groups = {path.rpartition("group=")[2]: path for path in exports}
        found = {}
        for group, path in groups.items():
            rows = await read_csv(marketer, path)
            assert len(rows) == exports[path], group
            found[group] = {row["external_id"] for row in rows}
        assert found.pop("MATCHED") == chosen != set()
        assert sum(map(len, found.values())) == len(chosen)
        assert set().union(*found.values()) == chosen
    assert found["DROPPED&reason=NO_SUBSCRIPTION"] == read - with_phone
    for bad in ("group=ALL", "group=DROPPED", "group=DROPPED&reason=NO_REASON", "group=MATCHED&reason=HELD"):
        assert (await marketer.get(groups["MATCHED"].replace("group=MATCHED", bad)))[0] == 400, bad


async def test_every_number_of_a_drafts_review_leads_to_its_people(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    both = [campaigns_pb2.RetargetSelection(source=sent.name, action=action) for action in ("read", "failed")]
    audience = campaigns_pb2.Audience()
    audience.retarget.any_of.selections.extend(both)
    draft = await world.create_campaign("sms", audience=audience)
    exports = find_exports((await marketer.get(f"/campaigns/{read_id(draft.name)}/review"))[1])
    groups = {path.rpartition("group=")[2]: path for path in exports}
    assert {"MATCHED", "AUDIENCE", "DROPPED&reason=NO_SUBSCRIPTION"} <= groups.keys()
    found = {group: {row["external_id"] for row in await read_csv(marketer, path)} for group, path in groups.items()}
    assert {group: len(people) for group, people in found.items()} == {group: exports[path] for group, path in groups.items()}
    await world.launch(draft.name)
    assert set(await world.read_recipients(draft.name)) == found["AUDIENCE"]


async def test_chain_shows_what_each_wave_added(world: World, marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    selection = campaigns_pb2.RetargetSelection(source=sent.name, action="not_read")
    wave = await world.create_campaign(
        "push", audience=campaigns_pb2.Audience(retarget=selection), display_name="A wave", holdout_percent=30
    )
    await world.launch(wave.name)
    report = await world.client.retargeting.GetChainReport(retargeting_pb2.GetChainReportRequest(name=wave.name))
    for campaign in (sent, wave):
        status, text = await marketer.get(f"/campaigns/{read_id(campaign.name)}/chain")
        assert status == 200
        plain = re.sub(r"<[^>]+>|\s+", " ", text)
        assert f"{report.people.reached} of {report.people.recipients} people reached" in re.sub(" +", " ", plain)
        found = next(found for found in report.campaigns if found.campaign == wave.name)
        item = rf'<span class="what"><a href="[^"]*{read_id(wave.name)}".*?</li>\s*</ul>'
        row = re.search(item, text, re.S)
        added = re.sub(r"<[^>]+>|\s+", " ", row[0])
        assert re.search(rf"{found.people.recipients} +recipients", added)
        assert re.search(rf"\+{found.added.signals['confirmed']} +confirmed delivery", added)
        assert re.search(rf"{found.holdout_count} +held out", added)
        assert re.search(rf"Held out +of +{found.holdout_count} ", plain)
    alone = await world.create_campaign("sms")
    assert (await marketer.get(f"/campaigns/{read_id(alone.name)}/chain"))[1].strip() == ""


async def test_failed_people_are_retargeted_by_their_reason(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    lost = [person for person in (await world.read_recipients(sent.name)).values() if "failed" in person.signals]
    # Who got it after all did not fail.
    lost = [person for person in lost if "delivered" not in person.signals]
    classes = Counter(reason.partition("/")[0] for person in lost for reason in person.reasons)
    ((chosen, count), *_) = classes.most_common()
    path = f"/campaigns/{read_id(sent.name)}"
    _, text = await marketer.get(path)
    assert f'href="/console{path}/retarget?action=failed&amp;reason_class={chosen}"' in text
    _, text = await marketer.get(f"{path}/retarget?action=failed&reason_class={chosen}")
    assert f"Only for this reason: {REASONS[chosen][0].lower()}" in text
    _, text = await marketer.get(f"{path}/retarget/funnel?action=failed&reason_class={chosen}&channel=sms")
    assert f'<span>Chosen</span><span class="num">{count}</span>' in text
    # Who read has no reason; choosing them leaves it behind.
    _, text = await marketer.get(f"{path}/retarget?action=read&reason_class={chosen}")
    assert "Only for this reason" not in text
    fields = {"action": "failed", "reason_class": chosen, "channel": "sms", "again": "1"}
    _, place = await marketer.post(f"{path}/retarget", fields)
    _, text = await marketer.get(place.removeprefix("/console"))
    assert f"Failed ({REASONS[chosen][0].lower()}) · Summer Sale" in text


async def test_failures_of_a_channel_without_an_action_for_them_are_not_retargeted_by_their_reason(
    world: World, marketer: Visitor
) -> None:
    """Retarget led to "Outcome unknown", which asks for no reason, and was refused."""
    now = datetime.now(UTC)
    campaign = await launch_long_ago(world, "Gone", [now - timedelta(hours=1), now], "push", "failed", "http_410")
    _, text = await marketer.get(f"/campaigns/{campaign}")
    assert ('id="failures-title"' in text, "reason_class" in text) == (True, False)


LINKS = ("https://shop.example/sale?size=1&colour=red", "https://shop.example/{{ external_id }}", f"https://x.example/{'y' * 90}")


@pytest.fixture(scope="module")
async def clicked(world: World) -> str:
    """The id of a campaign with three links; two people clicked the first, one of them the second, and nobody the third."""
    made = await world.create_campaign("sms", display_name="Linked", content=to_struct({"body": " or ".join(LINKS)}))
    await world.launch(made.name)
    people = [name for name, person in (await world.read_recipients(made.name)).items() if "delivered" in person.signals]
    for person, code in ((0, "0"), (1, "0"), (1, "1"), (0, "javascript:alert(1)"), (0, HOSTILE[:60])):
        event = events_pb2.Event(signal="clicked", reason_code=code)
        event.recipient.campaign, event.recipient.external_id = made.name, people[person]
        event.time.GetCurrentTime()
        await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=[event]))
    return read_id(made.name)


async def test_links_are_told_with_who_clicked_them_and_apart_from_failures(marketer: Visitor, clicked: str) -> None:
    _, text = await marketer.get(f"/campaigns/{clicked}")
    (card,) = re.findall(r'<section class="card" aria-labelledby="links-title">.*?</section>', text, re.S)
    rows = re.findall(r'<bdi [^>]*title="([^"]*)">([^<]*)</bdi></th><td class="right num">(\d+)</td>', card)
    told = [(html.unescape(shown), int(count)) for _, shown, count in rows]
    assert told[:3] == list(zip(LINKS, (2, 1, 0), strict=True))
    assert dict(told[3:]) == {"javascript:alert(1)": 1, HOSTILE[:60]: 1}
    assert all(whole == shown for whole, shown, _ in rows)
    assert "<img" not in text
    assert all(address.startswith("/console/") for address in re.findall(r'href="([^"]*)"', card))
    failures = re.findall(r'aria-labelledby="failures-title">.*?</section>', text, re.S)
    assert not any("clicked" in found for found in failures)


async def test_campaign_without_failures_has_no_card_of_failures(world: World, marketer: Visitor) -> None:
    """Its clicks were shown there."""
    now = datetime.now(UTC)
    campaign = await launch_long_ago(world, "All well", [now - timedelta(hours=1), now])
    (person,) = await world.read_recipients(f"apps/acme/campaigns/{campaign}")
    event = events_pb2.Event(signal="clicked", reason_code="0", time=to_timestamp(now))
    event.recipient.campaign, event.recipient.external_id = f"apps/acme/campaigns/{campaign}", person
    await world.client.events.IngestEvents(events_pb2.IngestEventsRequest(parent="apps/acme", events=[event]))
    _, text = await marketer.get(f"/campaigns/{campaign}")
    assert ('id="links-title"' in text, 'id="failures-title"' in text) == (True, False)


async def test_people_who_clicked_a_link_are_exported_and_retargeted(world: World, marketer: Visitor, clicked: str) -> None:
    _, text = await marketer.get(f"/campaigns/{clicked}")
    path = f"/campaigns/{clicked}"
    assert f'href="/console{path}/people.csv?signal=clicked&amp;reason=link%2F0"' in text
    _, table = await marketer.get(f"{path}/people.csv?reason=link/0")
    assert len(list(csv.DictReader(io.StringIO(table)))) == 2
    assert f'href="/console{path}/retarget?action=clicked&amp;reason_code=0"' in text
    asked = f"{path}/retarget?action=clicked&reason_code=0"
    _, text = await marketer.get(asked, **{"hx-request": "true"})
    assert f"Only people who clicked <bdi>{escape(LINKS[0])}</bdi>." in text
    assert '<input type="hidden" name="reason_code" value="0">' in text
    _, funnel = await marketer.get(f"{path}/retarget/funnel?action=clicked&reason_code=0&channel=push")
    assert '<span>Chosen</span><span class="num">2</span>' in funnel
    (chosen,) = [exported for exported in find_exports(funnel) if exported.endswith("&group=MATCHED")]
    assert len(await read_csv(marketer, chosen)) == 2
    # Who did anything else did it with no link; choosing them leaves it behind.
    _, text = await marketer.get(f"{path}/retarget?action=delivered&reason_code=0")
    assert "Only people who clicked" not in text
    assert '<input type="hidden" name="reason_code" value="">' in text
    status, place = await marketer.post(f"{path}/retarget", {"action": "clicked", "reason_code": "0", "channel": "push"})
    assert status == 303
    draft = await world.get_campaign(f"apps/acme{place.removeprefix('/console').removesuffix('/edit')}")
    assert (draft.audience.retarget.action, draft.audience.retarget.reason_codes) == ("clicked", ["0"])
    _, text = await marketer.get(place.removeprefix("/console"))
    assert f"Clicked a link ({escape(LINKS[0])}) · Linked" in text


async def test_role_without_the_right_sees_links_and_cannot_retarget_them(visitor: Visitor, clicked: str) -> None:
    await visitor.sign_in(USERS["viewer"])
    _, text = await visitor.get(f"/campaigns/{clicked}")
    assert (escape(LINKS[0]) in text, "/retarget" in text) == (True, False)


async def test_export_makes_no_formulas(world: World, marketer: Visitor) -> None:
    client = world.client
    contact = contacts_pb2.Contact(external_id="=1+1")
    contact.subscriptions.add(channel="sms", address=to_struct({"phone": "+34600000002"}))
    await client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=[contact]))
    audience = campaigns_pb2.Audience()
    audience.given_contacts.contacts.append(f"{client.parent}/contacts/=1+1")
    made = await world.create_campaign("sms", audience=audience)
    await world.launch(made.name)
    _, text = await marketer.get(f"/campaigns/{read_id(made.name)}/people.csv")
    assert text.splitlines()[1].startswith("'=1+1,")


async def make_draft(visitor: Visitor, channel: str, **fields: str) -> str:
    """A draft made by the form; where its composer is."""
    status, place = await visitor.post(
        "/campaigns/new", {"display_name": "Made by hand", "channel": channel, "audience": "all", **fields}
    )
    assert status == 303
    return place.removeprefix("/console").removesuffix("/edit")


async def test_new_campaign_is_refused_at_its_fields(marketer: Visitor) -> None:
    status, text = await marketer.post("/campaigns/new", {"display_name": "", "channel": "", "audience": "given", "contacts": ""})
    assert (status, len(re.findall(r'class="fault"', text)) >= 1) == (400, True)
    status, text = await marketer.post("/campaigns/new", {"display_name": "x", "channel": "fax", "audience": "all"})
    assert (status, "no channel &#39;fax&#39; is installed" in text) == (400, True)


async def test_draft_left_incomplete_is_there_when_somebody_comes_back(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "push")
    status, text = await marketer.post(f"{draft}/save", {"display_name": "Half", "content.title": "Only a title"})
    assert (status, "Kept. Missing or wrong: Url" in text) == (200, True)
    _, text = await marketer.get(f"{draft}/edit")
    assert 'value="Only a title"' in text
    status, text = await marketer.post(
        f"{draft}/save",
        {"display_name": "Whole", "content.title": "Hello {{ first_name | default: 'you' }}", "content.url": "https://x.example"},
    )
    assert (status, ">Saved<" in text, "Hello " in text) == (200, True, True)
    _, text = await marketer.get(f"{draft}/edit")
    assert "Whole" in text
    assert "Only a title" not in text


async def test_draft_renamed_before_its_message_is_complete_has_the_new_name(world: World, marketer: Visitor) -> None:
    draft = await make_draft(marketer, "push")
    _, text = await marketer.get(f"{draft}/edit")
    etag = re.search(r'name="etag" value="(\d+)"', text)[1]
    for name in ("Spring", "Spring Sale"):
        status, text = await marketer.post(f"{draft}/save", {"etag": etag, "display_name": name, "content.title": "Half"})
        assert (status, "Kept. Missing or wrong: Url" in text) == (200, True)
        etag = re.search(r'name="etag" value="(\d+)"', text)[1]
    _, text = await marketer.get(f"{draft}/edit")
    assert ('value="Spring Sale"' in text, 'value="Half"' in text) == (True, True)
    assert (await world.get_campaign(f"apps/acme{draft}")).display_name == "Spring Sale"


async def test_test_of_an_incomplete_message_with_a_new_name_makes_no_conflict(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "push")
    await marketer.get(f"{draft}/edit")
    _, text = await marketer.post(f"{draft}/test", {"display_name": "Renamed", "content.title": "Half", "as": "user-000000"})
    etag = re.search(r'name="etag" value="(\d+)"', text)[1]
    assert (await marketer.post(f"{draft}/save", {"etag": etag, "display_name": "Renamed", "content.title": "More"}))[0] == 200


async def test_launch_that_is_refused_shows_the_name_that_was_typed(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "push")
    for name in ("Renamed", "x" * 201):
        status, text = await marketer.post(f"{draft}/launch", {"display_name": name, "content.title": "Half"})
        assert (status, f'name="display_name" type="text" value="{name}"' in text) == (400, True)


async def test_launch_that_is_refused_leaves_a_page_that_still_saves(marketer: Visitor) -> None:
    """It was told that somebody else had changed the draft: it was stored, and the page had the etag from before."""
    draft = await make_draft(marketer, "sms")
    fields = {"display_name": "Later", "content.body": "Hello"}
    status, text = await marketer.post(f"{draft}/launch", fields | {"when": "later"})
    etag = re.search(r'name="etag" value="(\d+)"', text)[1]
    assert (status, 'id="schedule_time-fault"' in text) == (400, True)
    assert (await marketer.post(f"{draft}/save", fields | {"etag": etag}))[0] == 200


async def test_draft_begins_with_the_message_of_another_campaign(
    marketer: Visitor, sent: campaigns_pb2.Campaign, world: World
) -> None:
    draft = await make_draft(marketer, "whatsapp")
    _, text = await marketer.get(f"{draft}/edit")
    # Of campaigns with the same message only the last is offered.
    offered = re.findall(r'<option value="(c-[^"]+)">Summer Sale</option>', text)
    assert len(offered) == 1
    status, text = await marketer.post(f"{draft}/form", {"copy": offered[0]}, **{"hx-request": "true"})
    assert (status, 'name="content.template" type="text" value="summer_sale"' in text) == (200, True)
    assert (await marketer.post(f"{draft}/form", {"copy": "no-such"}))[0] == 404


async def test_templates_of_the_provider_are_offered_and_shown_in_their_words(
    open_world: OpenWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provided, "PATIENCE", 60.0)
    kept = {"summer_sale": f"Hello {{{{1}}}}, {HOSTILE} {{% {{{{x", "winter_sale": "Hello"}
    async with open_world(SandboxSettings(size=5, templates=kept, template_statuses={"winter_sale": "PAUSED"})) as world:
        await world.import_people()
        await create_user(world, USERS["marketer"], "marketer")
        async with Visitor(world) as marketer:
            await marketer.sign_in(USERS["marketer"])
            draft = await make_draft(marketer, "whatsapp")
            assert f'hx-get="/console{draft}/templates"' in (await marketer.get(f"{draft}/edit"))[1]
            status, text = await marketer.get(f"{draft}/templates?as=")
            assert (status, text.count("<option")) == (200, 3)
            assert '<option value="summer_sale/en_US">summer_sale · en_US</option>' in text
            assert '<option value="winter_sale/en_US" disabled>winter_sale · en_US · paused</option>' in text
            assert "preview" not in text
            _, text = await marketer.post(f"{draft}/form", {"template": "summer_sale/en_US"}, **{"hx-request": "true"})
            assert 'name="content.template" type="text" value="summer_sale"' in text
            assert 'name="content.body.0" type="text" value=""' in text
            assert (await marketer.post(f"{draft}/form", {"template": "no_sale/en_US"}))[0] == 404
            content = {"content.template": "summer_sale", "content.language": "en_US", "content.body.0": "{{ external_id }}"}
            shown = f"Hello user-000000, {escape(HOSTILE)} {{% {{{{x"
            _, text = await marketer.post(f"{draft}/save", {"display_name": "x", "as": "user-000000", **content})
            assert shown in html.unescape(text).replace(HOSTILE, escape(HOSTILE))
            assert "<img" not in text
            status, text = await marketer.get(f"{draft}/templates?as=user-000000")
            assert '<option value="summer_sale/en_US" selected>' in text
            assert '<div id="preview" hx-swap-oob="true">' in text
            assert "Hello user-000000" in text
            assert "<img" not in text
            # What is typed and not complete has no preview.
            await marketer.post(f"{draft}/save", {"display_name": "x", "content.template": "No such name"})
            assert "preview" not in (await marketer.get(f"{draft}/templates"))[1]


async def test_templates_that_cannot_be_listed_are_told_of_and_the_name_can_be_typed(
    marketer: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provided, "PATIENCE", 60.0)
    draft = await make_draft(marketer, "whatsapp")
    status, text = await marketer.get(f"{draft}/templates")
    assert (status, "<select" in text) == (200, False)
    assert "The templates cannot be listed: the setting business_account_id is missing" in text
    assert (await marketer.get((await make_draft(marketer, "sms")) + "/edit"))[1].count("/templates") == 0


async def test_review_says_what_a_message_would_be_billed_as(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "sms", audience="given", contacts="user-000000\nuser-000001\nuser-000002")
    await marketer.post(f"{draft}/save", {"display_name": "Priced", "content.body": "x" * 200})
    _, text = await marketer.get(f"{draft}/review")
    people = int(re.search(r"Launch to (\d+) (?:person|people)", text)[1])
    assert f"{people} messages are billed as about {2 * people} segments" in text


async def test_preview_is_as_long_as_what_arrives_and_says_where_its_links_lead(world: World, marketer: Visitor) -> None:
    """It showed the address of the content, and people got a shorter one."""
    body = "Hi {{ first_name | default: 'x' }}: https://shop.example/sale?a=1&b=2. {% if nobody %}https://x.example/{% endif %}"
    content = {"body": f"{body} Or https://shop.example/{{{{ external_id }}}}?{'y' * 60}"}
    known = len(world.sandbox.truth.entries)
    await world.launch((await world.create_campaign("sms", content=to_struct(content))).name)
    entry = next(entry for entry in world.sandbox.truth.entries[known:] if entry.person)
    made = await world.create_campaign("sms", content=to_struct(content))
    _, text = await marketer.get(f"/campaigns/{read_id(made.name)}/edit?as={entry.person.external_id}")
    shown, arrived = html.unescape(re.search(r'<p class="bubble">([^<]*)</p>', text)[1]), str(entry.content)
    assert len(shown) == len(arrived)
    assert re.sub(r"/l/[\w-]{24}", "", shown) == re.sub(r"/l/[\w-]{24}", "", arrived)
    targets = [html.unescape(address) for address in re.findall(r"<dd><bdi>([^<]*)</bdi>", text)]
    assert targets == ["https://shop.example/sale?a=1&b=2", f"https://shop.example/{entry.person.external_id}?{'y' * 60}"]


async def test_preview_without_tracked_links_shows_the_addresses_themselves(world: World, marketer: Visitor) -> None:
    content = to_struct({"body": "Now https://shop.example/sale"})
    made = await world.create_campaign("sms", content=content, track_links=False)
    _, text = await marketer.get(f"/campaigns/{read_id(made.name)}/edit?as=user-000003")
    assert '<p class="bubble">Now https://shop.example/sale</p>' in text
    assert " leads to</dt>" not in text


async def test_preview_of_a_notification_has_its_buttons_and_a_place_for_each_picture(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "push")
    content = {
        "content.title": "Last hours",
        "content.url": "https://shop.example/sale",
        "content.icon": "https://cdn.example/a/logo.png?v=3",
        "content.image": f"https://cdn.example/{HOSTILE}",
        "content.badge": "https://cdn.example/",
        "content.actions.0.action": "left",
        "content.actions.0.title": "What is left",
        "content.actions.0.url": "https://shop.example/left",
        "content.actions.0.icon": "https://cdn.example/clock.png",
        "content.actions.1.action": "later",
        "content.actions.1.title": "Later",
    }
    _, text = await marketer.post(f"{draft}/save", {"display_name": "x", "as": "user-000003", **content})
    pictures = re.findall(r'<span class="picture \S+" title="[^"]*">(\w+) <bdi>([^<]*)</bdi></span>', text)
    assert [(label, html.unescape(name)) for label, name in pictures] == [
        ("Badge", "cdn.example"),
        ("Icon", "logo.png"),
        ("Image", HOSTILE),
        ("Icon", "clock.png"),
    ]
    assert "<img" not in text
    buttons = re.search(r'<ul class="pressed">.*?</ul>', text, re.S)[0]
    assert re.findall(r">(What is left|Later)<", buttons) == ["What is left", "Later"]
    leading = re.findall(r"<dt>([^<]*)</dt><dd><bdi>([^<]*)</bdi>", text)
    assert leading == [("A click leads to", "https://shop.example/sale"), ("What is left", "https://shop.example/left")]


async def test_preview_of_a_template_has_a_place_for_its_media(open_world: OpenWorld) -> None:
    async with open_world(SandboxSettings(size=5, templates={"summer_sale": "Hello {{1}}"})) as world:
        await world.import_people()
        await create_user(world, USERS["marketer"], "marketer")
        async with Visitor(world) as marketer:
            await marketer.sign_in(USERS["marketer"])
            content = {"template": "summer_sale", "language": "en_US", "body": ["you"]}
            content["header"] = {"type": "video", "link": "https://cdn.example/a/summer.mp4"}
            made = await world.create_campaign("whatsapp", content=to_struct(content))
            _, text = await marketer.get(f"/campaigns/{read_id(made.name)}/templates")
            assert "Hello you" in text
            assert re.search(r'<span class="picture image" title="[^"]*">Video <bdi>summer.mp4</bdi></span>', text)
            assert not re.search(r'<p class="title">', text)


async def test_draft_changed_by_somebody_else_is_not_overwritten_by_saving(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "sms")
    _, text = await marketer.get(f"{draft}/edit")
    etag = re.search(r'name="etag" value="(\d+)"', text)[1]
    assert (await marketer.post(f"{draft}/save", {"etag": etag, "display_name": "A", "content.body": "first"}))[0] == 200
    status, text = await marketer.post(
        f"{draft}/save", {"etag": etag, "display_name": "B", "content.body": "second"}, **{"hx-request": "true"}
    )
    assert (status, "Somebody else changed this meanwhile" in text) == (409, True)


async def test_launch_is_refused_at_the_field_that_is_wrong_and_sends_nothing(world: World, marketer: Visitor) -> None:
    draft = await make_draft(marketer, "sms")
    status, text = await marketer.post(f"{draft}/launch", {"display_name": "x", "content.body": "{{ first_name"})
    assert (status, "Nothing was sent" in text, 'id="field-content-body-fault"' in text) == (400, True, True)
    assert "{{ first_name</textarea>" in text
    campaign = await world.get_campaign(f"apps/acme{draft}")
    assert campaign.state == campaigns_pb2.Campaign.DRAFT


async def test_launch_pressed_twice_launches_once_and_is_on_record(world: World, marketer: Visitor) -> None:
    draft = await make_draft(marketer, "sms")
    fields = {"display_name": "Twice", "content.body": "Hello"}
    answers = await asyncio.gather(*(marketer.post(f"{draft}/launch", fields) for _ in range(2)))
    assert (303, f"/console{draft}") in answers
    await world.wait_until_sent(f"apps/acme{draft}")
    async with transaction(world.core.engine) as conn:
        entries = await conn.execute(select(audit_entries).where(audit_entries.c.resource == f"apps/acme{draft}"))
        found = [(entry.actor, entry.method) for entry in entries if entry.method == "Campaigns/LaunchCampaign"]
    assert found == [(f"users/{USERS['marketer']}", "Campaigns/LaunchCampaign")]


async def test_launch_to_nobody_says_so(marketer: Visitor) -> None:
    draft = await make_draft(marketer, "sms", audience="given", contacts="user-none")
    status, text = await marketer.post(f"{draft}/launch", {"display_name": "x", "content.body": "Hello"})
    assert (status, "Nobody of this audience can be reached" in text) == (400, True)


async def test_retarget_shows_counts_and_makes_one_draft(world: World, marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    _, text = await marketer.get(f"{path}?action=not_read&channel=sms", **{"hx-request": "true"})
    assert "<html" not in text
    request_id = re.search(r'name="request_id" value="([0-9a-f-]{36})"', text)[1]
    fields = {"action": "not_read", "channel": "sms", "request_id": request_id}
    answers = {await marketer.post(path, fields) for _ in range(2)}
    assert len(answers) == 1
    ((status, place),) = answers
    assert status == 303
    _, text = await marketer.get(place.removeprefix("/console"))
    assert "Retarget: Summer Sale (not read)" in text


def read_when(text: str) -> dict[str, str]:
    """What a composer's page says of when."""
    return {
        "when": re.search(r'name="when" value="(\w+)" checked', text)[1],
        "delay": re.search(r'name="delay"[^>]* value="([^"]*)"', text)[1],
        "time": (re.search(r'data-utc="([^"]+)"', text) or [""])[0],
    }


async def test_retarget_after_a_delay_is_launched_so_long_after_the_source_was_sent(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    fields = {"action": "replied", "channel": "sms", "when": "delay", "delay": "36", "delay_unit": "hours", "again": "1"}
    status, place = await marketer.post(path, fields)
    assert status == 303
    _, text = await marketer.get(place.removeprefix("/console"))
    assert read_when(text) == {"when": "delay", "delay": "36", "time": ""}
    draft = place.removeprefix("/console").removesuffix("/edit")
    content = {"display_name": "Later", "content.body": "Hello", "when": "delay", "delay": "2", "delay_unit": "days"}
    await marketer.post(f"{draft}/save", content)
    _, text = await marketer.get(place.removeprefix("/console"))
    assert read_when(text)["delay"] == "2"
    assert await marketer.post(f"{draft}/launch", content) == (303, f"/console{draft}")
    wave = await world.get_campaign(f"apps/acme{draft}")
    assert wave.state == campaigns_pb2.Campaign.SCHEDULED
    assert wave.schedule_time.ToDatetime() == sent.finish_time.ToDatetime() + timedelta(days=2)


async def test_retarget_at_a_time_keeps_it_in_the_viewers_zone_and_inside_the_window(
    marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    chosen = (datetime.now(UTC) + timedelta(days=3)).strftime("%Y-%m-%dT%H:%M")
    fields = {"action": "replied", "channel": "push", "when": "later", "time_zone": "Asia/Tokyo", "again": "1"}
    _, place = await marketer.post(path, fields | {"schedule_time": chosen})
    _, text = await marketer.get(place.removeprefix("/console"))
    in_tokyo = datetime.fromisoformat(chosen) - timedelta(hours=9)
    assert read_when(text)["time"] == f'data-utc="{in_tokyo.isoformat()}+00:00"'
    for wrong, fault, kept in (
        ({"schedule_time": (datetime.now(UTC) + timedelta(days=40)).strftime("%Y-%m-%dT%H:%M")}, "Choose a time until ", "24"),
        ({"when": "delay", "delay": "40", "delay_unit": "days"}, "Choose a time until ", "40"),
        ({"when": "delay", "delay": "soon"}, 'id="delay-fault"', "soon"),
        ({}, 'id="schedule_time-fault"', ""),
        ({"schedule_time": "tomorrow"}, 'id="schedule_time-fault"', "tomorrow"),
    ):
        status, text = await marketer.post(path, fields | wrong)
        assert (status, fault in text) == (400, True), wrong
        assert (read_when(text)["when"], f'value="{kept}"' in text) == ((fields | wrong)["when"], True), wrong


async def test_launch_after_a_delay_that_is_mistyped_does_not_become_a_launch_now(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    _, place = await marketer.post(path, {"action": "replied", "channel": "sms", "again": "1"})
    draft = place.removeprefix("/console").removesuffix("/edit")
    fields = {"display_name": "Later", "content.body": "Hello", "when": "delay", "delay": "", "delay_unit": "days"}
    status, text = await marketer.post(f"{draft}/launch", fields)
    assert (status, 'id="delay-fault"' in text, read_when(text)["delay"]) == (400, True, "")
    mistyped = {"when": "delay", "delay": "1.5", "delay_unit": "days"}
    status, text = await marketer.post(f"{draft}/launch", {"display_name": "Later", "content.body": "Hello", **mistyped})
    assert (status, 'id="delay-fault"' in text) == (400, True)
    assert read_when(text) == {"when": "delay", "delay": "1.5", "time": ""}
    assert "<option selected>days</option>" in text
    _, text = await marketer.get(f"{draft}/edit")
    assert read_when(text) == {"when": "delay", "delay": "1.5", "time": ""}
    assert (await world.get_campaign(f"apps/acme{draft}")).state == campaigns_pb2.Campaign.DRAFT


async def test_delay_that_is_mistyped_is_no_fault_of_a_launch_now(marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    _, place = await marketer.post(path, {"action": "read", "channel": "sms", "again": "1"})
    draft = place.removeprefix("/console").removesuffix("/edit")
    fields = {"display_name": "At once", "content.body": "Hello", "when": "now", "delay": "1.5"}
    assert await marketer.post(f"{draft}/launch", fields) == (303, f"/console{draft}")


async def test_deadline_of_a_launch_at_a_time_is_none_of_a_launch_now(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    _, place = await marketer.post(path, {"action": "read", "channel": "sms", "again": "1"})
    draft = place.removeprefix("/console").removesuffix("/edit")
    fields = {"display_name": "At once", "content.body": "Hello", "send_by_time": "2020-01-01T00:00"}
    status, _ = await marketer.post(f"{draft}/launch", fields | {"when": "later", "schedule_time": "2099-01-01T00:00"})
    assert status == 400
    assert await marketer.post(f"{draft}/launch", fields | {"when": "now"}) == (303, f"/console{draft}")
    assert not (await world.get_campaign(f"apps/acme{draft}")).HasField("send_by_time")


async def test_retarget_counted_again_keeps_a_delay_that_is_mistyped(marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    asked = "action=not_read&channel=push&when=delay&delay=1.5&delay_unit=days"
    path = f"/campaigns/{read_id(sent.name)}/retarget?{asked}"
    status, text = await marketer.get(path, **{"hx-request": "true"})
    assert (status, 'id="delay-fault"' in text) == (200, True)
    assert read_when(text) == {"when": "delay", "delay": "1.5", "time": ""}


async def wait_for_state(world: World, name: str, state: int) -> campaigns_pb2.Campaign:
    async with asyncio.timeout(120):
        while (campaign := await world.get_campaign(name)).state != state:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return campaign


async def test_delay_after_a_campaign_that_is_still_being_sent_waits_until_it_is(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    _, place = await marketer.post(path, {"action": "read", "channel": "sms", "again": "1"})
    draft = place.removeprefix("/console").removesuffix("/edit")
    async with transaction(world.core.engine) as conn:
        source = campaigns.c.campaign == read_id(sent.name)
        kept = (await conn.execute(select(campaigns.c.finish_time).where(source))).scalar_one()
        await conn.execute(campaigns.update().where(source).values(finish_time=None, state="PAUSED"))
    try:
        fields = {"display_name": "x", "content.body": "Hello", "when": "delay", "delay": "0", "delay_unit": "hours"}
        assert await marketer.post(f"{draft}/launch", fields) == (303, f"/console{draft}")
        waiting = await world.get_campaign(f"apps/acme{draft}")
        _, text = await marketer.get(draft)
    finally:
        async with transaction(world.core.engine) as conn:
            await conn.execute(campaigns.update().where(source).values(finish_time=kept, state="SENT"))
    assert (waiting.state, waiting.HasField("schedule_time")) == (campaigns_pb2.Campaign.SCHEDULED, False)
    assert waiting.follow_up.source == sent.name
    assert "goes out as soon as Summer Sale is sent" in text
    launched = await wait_for_state(world, waiting.name, campaigns_pb2.Campaign.SENT)
    assert launched.schedule_time == sent.finish_time


async def make_follow_up(world: World, delay: int = 86_400) -> campaigns_pb2.Campaign:
    """A follow-up that waits for a draft named "First"."""
    first = await world.create_campaign("whatsapp", display_name="First")
    step = retargeting_pb2.FollowUpStep(
        selection=campaigns_pb2.RetargetSelection(action="not_read"), channel="sms", content=to_struct({"body": "Hello"})
    )
    step.delay.seconds = delay
    request = retargeting_pb2.CreateFollowUpsRequest(source=first.name, steps=[step])
    return (await world.client.retargeting.CreateFollowUps(request)).campaigns[0]


def read_etag(text: str) -> str:
    return re.search(r'id="etag" name="etag" value="([^"]*)"', text)[1]


async def test_follow_up_that_waits_is_shown_with_its_rule(world: World, marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    waiting = await make_follow_up(world)
    page = f"/campaigns/{read_id(waiting.name)}"
    for path in (page, f"{page}/row", f"{page}/chain", f"{page}/edit", "/campaigns?q=First"):
        status, text = await marketer.get(path)
        assert (status, "a day after First is sent" in text) == (200, True), path
    assert f'href="/console{page}/edit"' in (await marketer.get(f"{page}/row"))[1]
    _, text = await marketer.get(f"{page}/review")
    assert "They are counted once First is sent." in text
    step = retargeting_pb2.FollowUpStep(
        selection=campaigns_pb2.RetargetSelection(action="not_read"), channel="sms", content=to_struct({"body": "Hello"})
    )
    step.delay.seconds = 90_060
    request = retargeting_pb2.CreateFollowUpsRequest(source=sent.name, steps=[step])
    (timed,) = (await world.client.retargeting.CreateFollowUps(request)).campaigns
    time = sent.finish_time.ToDatetime() + timedelta(seconds=90_060)
    for path in ("", "/row", "/edit"):
        _, text = await marketer.get(f"/campaigns/{read_id(timed.name)}{path}")
        assert "1501 minutes after Summer Sale was sent" in text
        assert f'datetime="{time.isoformat(timespec="seconds")}+00:00"' in text
    _, text = await marketer.get(f"/campaigns/{read_id(timed.name)}/review")
    assert '<span class="num">' in text
    await world.client.campaigns.CancelCampaign(campaigns_pb2.CancelCampaignRequest(name=timed.name))


async def test_follow_up_that_waits_is_changed_and_stays_scheduled(world: World, marketer: Visitor) -> None:
    waiting = await make_follow_up(world)
    page = f"/campaigns/{read_id(waiting.name)}"
    _, text = await marketer.get(f"{page}/edit")
    assert ('id="save"' in text, 'id="launch"' in text, "Delete draft" in text) == (True, False, False)
    assert re.search(r'name="delay"[^>]* value="1"', text)
    assert "<option selected>days</option>" in text
    fields = {"display_name": "Changed", "content.body": "Other", "when": "delay", "delay": "2", "delay_unit": "hours"}
    etag = read_etag(text)
    for wrong, fault in (
        ({"delay": "1.5"}, 'id="delay-fault"'),
        ({"delay": "40", "delay_unit": "days"}, 'id="delay-fault"'),
        ({"content.body": ""}, 'id="field-content-body-fault"'),
        ({"display_name": ""}, 'id="display_name-fault"'),
    ):
        status, text = await marketer.post(f"{page}/save", fields | wrong | {"etag": etag})
        assert (status, fault in text, "Nothing was saved." in text) == (400, True, True), wrong
        assert await world.get_campaign(waiting.name) == waiting, wrong
    assert await marketer.post(f"{page}/save", fields | {"etag": etag}) == (303, f"/console{page}")
    changed = await world.get_campaign(waiting.name)
    assert (changed.display_name, changed.content["body"], changed.follow_up.delay.seconds) == ("Changed", "Other", 7200)
    assert (changed.state, changed.follow_up.source) == (campaigns_pb2.Campaign.SCHEDULED, waiting.follow_up.source)
    status, text = await marketer.post(f"{page}/save", fields | {"etag": etag, "content.body": "Too late"})
    assert (status, "Somebody else changed this meanwhile" in text, "Too late" in text) == (400, True, True)
    assert await marketer.post(f"{page}/save", fields | {"etag": read_etag(text)}) == (303, f"/console{page}")
    # A tab in which it is still a draft saves while somebody types.
    status, _ = await marketer.post(f"{page}/save", fields | {"etag": etag, "content.body": "Too l"}, **{"hx-request": "true"})
    assert (status, (await world.get_campaign(waiting.name)).content["body"]) == (409, "Other")
    async with transaction(world.core.engine) as conn:
        launched = campaigns.c.campaign == read_id(waiting.name)
        await conn.execute(campaigns.update().where(launched).values(state="SENT"))
    status, text = await marketer.post(f"{page}/save", fields)
    assert (status, "This campaign is sent, so this cannot be done any more." in text) == (409, True)


async def test_follow_up_that_becomes_a_draft_keeps_its_delay_and_waits_again(world: World, marketer: Visitor) -> None:
    waiting = await make_follow_up(world, 7200)
    page = f"/campaigns/{read_id(waiting.name)}"
    _, text = await marketer.get(page)
    asked = "Make a draft of this follow-up? It no longer goes out by itself, 2 hours after First is sent, until you launch it."
    assert f'value="unschedule" data-confirm="{asked}"' in text
    assert 'value="cancel" data-confirm="Cancel this follow-up for good?' in text
    assert await marketer.post(f"{page}/state", {"do": "unschedule"}) == (303, f"/console{page}")
    assert not (await world.get_campaign(waiting.name)).HasField("follow_up")
    _, text = await marketer.get(f"{page}/edit")
    assert (read_when(text), "<option selected>hours</option>" in text) == ({"when": "delay", "delay": "2", "time": ""}, True)
    _, text = await marketer.get(f"{page}/review")
    assert ("They are counted once First is sent." in text, "disabled" in text) == (True, False)
    fields = {"display_name": "Again", "content.body": "Hello", "when": "delay", "delay": "3", "delay_unit": "hours"}
    assert await marketer.post(f"{page}/launch", fields) == (303, f"/console{page}")
    again = await world.get_campaign(waiting.name)
    assert (again.state, again.follow_up.delay.seconds) == (campaigns_pb2.Campaign.SCHEDULED, 3 * 3600)
    await marketer.post(f"{page}/state", {"do": "cancel"})
    assert (await world.get_campaign(waiting.name)).state == campaigns_pb2.Campaign.CANCELED


async def test_follow_up_is_not_changed_by_the_form_of_the_draft_that_it_was(world: World, marketer: Visitor) -> None:
    """A test from a tab that was open since before gave it the delay of a hidden field, and words that were half typed."""
    waiting = await make_follow_up(world, 3 * 86_400)
    page = f"/campaigns/{read_id(waiting.name)}"
    _, text = await marketer.get(f"{page}/edit")
    etag = read_etag(text)
    stale = {"display_name": "x", "content.body": "Hel", "delay": "24", "delay_unit": "hours", "as": "user-000000"}
    for fields in ({"when": "now", "etag": etag}, {"when": "delay", "etag": "1.1"}, {"when": "delay", "delay": "", "etag": etag}):
        for path in ("save", "test"):
            await marketer.post(f"{page}/{path}", stale | fields)
            assert await world.get_campaign(waiting.name) == waiting, (fields, path)


async def test_form_that_is_refused_does_not_take_what_somebody_else_saved(world: World, marketer: Visitor) -> None:
    """It came back with the etag of the other's change, and the next save undid that."""
    waiting = await make_follow_up(world)
    page = f"/campaigns/{read_id(waiting.name)}"
    fields = {"display_name": "x", "content.body": "Mine", "when": "delay", "delay": "2", "delay_unit": "hours"}
    _, text = await marketer.get(f"{page}/edit")
    etag = read_etag(text)
    assert await marketer.post(f"{page}/save", fields | {"content.body": "Theirs", "etag": etag}) == (303, f"/console{page}")
    status, text = await marketer.post(f"{page}/save", fields | {"delay": "abc", "etag": etag})
    assert (status, read_etag(text)) == (400, etag)
    _, text = await marketer.post(f"{page}/test", fields | {"delay": "abc", "etag": etag, "as": "user-000000"})
    assert f'value="{etag}"' in text
    status, text = await marketer.post(f"{page}/save", fields | {"etag": etag})
    assert (status, "Somebody else changed this meanwhile" in text) == (400, True)
    assert (await world.get_campaign(waiting.name)).content["body"] == "Theirs"


async def test_follow_up_of_a_combination_that_becomes_a_draft_keeps_its_delay(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    """Its form had no delay to choose, so a launch of it was one at once."""
    selection = campaigns_pb2.RetargetSelection()
    selection.any_of.selections.extend(
        campaigns_pb2.RetargetSelection(source=sent.name, action=action) for action in ("replied", "not_received")
    )
    draft = await world.create_campaign("sms", audience=campaigns_pb2.Audience(retarget=selection))
    request = campaigns_pb2.LaunchCampaignRequest(name=draft.name)
    request.delay.seconds = 7 * 86_400
    await world.client.campaigns.LaunchCampaign(request)
    page = f"/campaigns/{read_id(draft.name)}"
    await marketer.get(page)
    await marketer.post(f"{page}/state", {"do": "unschedule"})
    _, text = await marketer.get(f"{page}/edit")
    assert read_when(text) == {"when": "delay", "delay": "7", "time": ""}


async def test_launch_after_a_campaign_that_was_canceled_says_which_one_is_in_the_way(world: World, marketer: Visitor) -> None:
    waiting = await make_follow_up(world)
    page = f"/campaigns/{read_id(waiting.name)}"
    await marketer.get(page)
    await marketer.post(f"{page}/state", {"do": "unschedule"})
    async with transaction(world.core.engine) as conn:
        first = campaigns.c.campaign == read_id(waiting.follow_up.source)
        await conn.execute(campaigns.update().where(first).values(state="CANCELED"))
    fields = {"display_name": "x", "content.body": "Hello", "when": "delay", "delay": "3", "delay_unit": "hours"}
    status, text = await marketer.post(f"{page}/launch", fields)
    assert (status, "The campaign before this one is canceled, so nothing can wait for it." in text) == (400, True)
    assert read_when(text)["when"] == "delay"


async def test_retarget_shows_who_is_held_and_leaves_out_who_was_not_heard_of(
    marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    funnel = f"/campaigns/{read_id(sent.name)}/retarget/funnel?action=not_received&channel=whatsapp"
    _, text = await marketer.get(funnel)
    assert "are held back by the provider for now" in text
    assert re.search(r"The provider holds back \d+ (person|people) here, until <time [^>]*>[^<]*</time> at the latest", text)

    def read_chosen(text: str) -> int:
        return int(re.search(r'<span>Chosen</span><span class="num">(\d+)<', text)[1])

    everybody = read_chosen(text)
    _, text = await marketer.get(f"/campaigns/{read_id(sent.name)}/retarget?action=not_received")
    silent = int(re.search(r"Leave out (\d+) (?:person|people) of whom", text)[1])
    _, text = await marketer.get(f"{funnel}&heard=1")
    assert read_chosen(text) == everybody - silent


async def test_retarget_of_what_cannot_be_retargeted_says_why(world: World, marketer: Visitor) -> None:
    draft = await make_draft(marketer, "sms")
    status, text = await marketer.get(f"{draft}/retarget")
    assert (status, "was not launched yet" in text) == (409, True)
    # Where the dialog was to open there is no half of one.
    status, text = await marketer.get(f"{draft}/retarget", **{"hx-request": "true"})
    assert (status, "was not launched yet" in text, "dialog-title" in text) == (409, True, False)


# People


async def test_contact_is_found_by_id_and_shown(marketer: Visitor) -> None:
    _, text = await marketer.get("/contacts?q=user-000003")
    assert "/console/contacts/person?id=user-000003" in text
    _, text = await marketer.get("/contacts?q=USER-000003")
    assert "Nobody is found" in text
    _, text = await marketer.get("/contacts/person?id=user-000003")
    assert "first_name" in text


async def upload(visitor: Visitor, content: bytes, name: str = "people.csv") -> tuple[int, str]:
    form = aiohttp.FormData()
    form.add_field("csrf", visitor.csrf)
    form.add_field("file", content, filename=name, content_type="text/csv")
    response, text = await visitor.request("POST", "/contacts/import", data=form)
    return response.status, response.headers.get("location", text)


async def test_import_reports_each_rejected_row_with_its_line(marketer: Visitor) -> None:
    lines = ["external_id,time_zone,sms.phone,city", *(f"imported-{i},,+3460011{i:04},Madrid" for i in range(2500))]
    lines[7] = "imported-bad,,not a number,Madrid"
    status, place = await upload(marketer, "\n".join(lines).encode())
    assert status == 303
    text = re.sub(r"<[^>]+>|\s+", " ", await wait_for_import(marketer, place.removeprefix("/console")))
    assert re.search(r"Rows +2,500 +New +2,499 +Updated +0 +Rejected +1 ", text)
    assert re.search(r" 8 +imported-bad +subscriptions\[0\]\.address\.phone", text)


async def test_import_goes_on_after_a_row_that_cannot_be_read(marketer: Visitor) -> None:
    rows = [
        "external_id,city,sms.phone",
        "odd-1,Madrid,",
        "odd-2,Madrid, Spain,+34600110001",
        "odd-3,Madrid,nonsense",
        "odd-4,x,",
    ]
    _, place = await upload(marketer, "\n".join(rows).encode())
    text = re.sub(r"<[^>]+>|\s+", " ", await wait_for_import(marketer, place.removeprefix("/console")))
    assert re.search(r"Done .*Rows +4 +New +2 +Updated +0 +Rejected +2 ", text)
    assert re.search(r" 3 +odd-2 +has more cells than the header", text)
    assert re.search(r" 4 +odd-3 +subscriptions\[0\]\.address\.phone", text)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "no column external_id"),
        (b"name\nx\n", "no column external_id"),
        (b"external_id,a,a\n", "is there twice"),
        ("external_id,ciudad\nx,Málaga\n".encode("utf-16"), "not CSV in UTF-8"),
    ],
)
async def test_import_of_a_file_that_cannot_be_read_is_refused_at_once(marketer: Visitor, content: bytes, fault: str) -> None:
    status, text = await upload(marketer, content)
    assert (status, fault in text) == (400, True)


async def test_import_that_breaks_in_the_middle_says_where(marketer: Visitor) -> None:
    status, place = await upload(marketer, b"external_id,city\n" + b"ok-1,x\n" * 10_000 + b"bad,\xff\xfe\n")
    assert status == 303
    assert 'role="alert"' in await wait_for_import(marketer, place.removeprefix("/console"))


async def test_contact_is_found_by_the_beginning_of_the_id_and_by_phone_number(world: World, marketer: Visitor) -> None:
    _, text = await marketer.get("/contacts?q=user-00002")
    assert re.findall(r"person\?id=(user-\d+)", text) == [f"user-{number:06}" for number in range(20, 30)]
    contact = contacts_pb2.Contact(external_id="by-phone")
    contact.subscriptions.add(channel="sms", address=to_struct({"phone": "+34600999888"}))
    request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=[contact])
    await world.client.contacts.UpsertContacts(request)
    _, text = await marketer.get("/contacts?q=%2B34%20600%20999%20888")
    assert re.findall(r"person\?id=([\w-]+)", text) == ["by-phone"]


async def test_contact_is_found_by_the_id_that_a_provider_gave_a_message(
    world: World, marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    """Somebody of the provider's support names it, and nothing else."""
    for external_id in list(await world.read_recipients(sent.name))[:3]:
        request = contacts_pb2.ExplainContactRequest(name=world.client.name("contacts", external_id), campaign=sent.name)
        said = await world.client.contacts.ExplainContact(request)
        (message_id,) = (attempt.message_id for attempt in said.attempts)
        _, text = await marketer.get(f"/contacts?q={quote(message_id)}")
        assert re.findall(r"person\?id=([\w-]+)", text) == [external_id]
    for text in ("wamid.unknown", "x" * 300):
        assert "Nobody is found" in (await marketer.get(f"/contacts?q={text}"))[1]


async def test_contact_shows_campaigns_and_why(world: World, marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    people = await world.read_recipients(sent.name)
    name = next(name for name, person in people.items() if "read" in person.signals)
    _, text = await marketer.get(f"/contacts/person?id={name}")
    assert re.search(rf'/campaigns/{read_id(sent.name)}">Summer Sale</a></th><td>Read', text)
    status, text = await marketer.get(f"/contacts/explain?id={name}&campaign={read_id(sent.name)}")
    assert (status, "What was decided" in text, "<td>Read" in text) == (200, True, True)
    # Its times are shown in the viewer's zone, also inside a sentence.
    decided = re.search(r"What was decided.*?</p>", text, re.S)[0]
    assert re.search(r'took the message at <time datetime="[0-9T:+-]+">', decided)


async def test_contact_who_was_not_in_a_campaign_is_told_why(world: World, marketer: Visitor) -> None:
    made = await world.create_campaign("whatsapp")
    await world.launch(made.name)
    people = await world.read_recipients(made.name)
    name = next(f"user-{number:06}" for number in range(60) if f"user-{number:06}" not in people)
    _, text = await marketer.get(f"/contacts/person?id={name}")
    assert f'<option value="{read_id(made.name)}">Summer Sale</option>' in text
    status, text = await marketer.get(f"/contacts/explain?id={name}&campaign={read_id(made.name)}")
    assert (status, "Not messaged" in text) == (200, True)


async def test_contact_is_erased_only_when_the_id_was_typed_and_named_in_no_log(world: World, marketer: Visitor) -> None:
    contact = contacts_pb2.Contact(external_id="to-be-erased")
    request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=[contact])
    await world.client.contacts.UpsertContacts(request)
    status, text = await marketer.post("/contacts/person/erase", {"id": "to-be-erased", "again": "to-be"})
    assert (status, "Type the id exactly" in text) == (400, True)
    answer = await marketer.post("/contacts/person/erase", {"id": "to-be-erased", "again": "to-be-erased"})
    assert answer == (303, "/console/contacts?erased=1")
    assert (await marketer.get("/contacts/person?id=to-be-erased"))[0] == 404
    async with transaction(world.core.engine) as conn:
        found = (await conn.execute(select(audit_entries).where(audit_entries.c.method == "Contacts/EraseContact"))).all()
    assert [entry.resource for entry in found] == ["apps/acme/contacts"]


async def test_list_is_made_from_a_file_and_used(world: World, marketer: Visitor) -> None:
    form = aiohttp.FormData()
    for name, value in (("csrf", marketer.csrf), ("display_name", "Gold"), ("list_id", "gold")):
        form.add_field(name, value)
    form.add_field("file", b"name,external_id\na,user-000001\nb,user-000002\nc,nobody\n", filename="gold.csv")
    _, text = await marketer.request("POST", "/lists", data=form)
    plain = re.sub(r"<[^>]+>|\s+", " ", text)
    assert re.search(r"Added +2 +In it already +0 +Left out +1 .*nobody", plain), plain
    _, text = await marketer.get("/contacts?list=gold")
    assert set(re.findall(r"person\?id=(user-\d+)", text)) == {"user-000001", "user-000002"}
    draft = await make_draft(marketer, "sms", audience="list", list="apps/acme/lists/gold")
    assert (await world.get_campaign(f"apps/acme{draft}")).audience.list == "apps/acme/lists/gold"
    status, text = await marketer.post("/lists/gold/delete")
    assert (status, "not launched yet is for this list" in text) == (400, True)
    await marketer.post(f"{draft}/delete")
    assert await marketer.post("/lists/gold/delete") == (303, "/console/lists")


async def change_list(visitor: Visitor, path: str, file: str | bytes, **fields: str) -> dict[str, int]:
    """Send a form with a file; the figures of the answer, none when it was refused."""
    form = aiohttp.FormData()
    for name, value in {"csrf": visitor.csrf, **fields}.items():
        form.add_field(name, value)
    form.add_field("file", file.encode() if isinstance(file, str) else file, filename="people.csv")
    _, text = await visitor.request("POST", path, data=form)
    return {label: int(count) for label, count in re.findall(r"<dt>([^<]+)</dt><dd>(\d+)</dd>", text)}


async def test_list_is_cleaned_of_those_who_failed(world: World, marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    """People came into a list by its form, and only the API took them out."""
    people = await world.read_recipients(sent.name)
    _, everybody = await marketer.get(f"/campaigns/{read_id(sent.name)}/people.csv")
    figures = await change_list(marketer, "/lists", everybody, display_name="To clean", list_id="to-clean")
    assert figures == {"Added": len(people), "In it already": 0, "Left out": 0}
    exports = find_exports((await marketer.get(f"/campaigns/{read_id(sent.name)}"))[1])
    (gone,) = [path for path in exports if path.endswith("?signal=failed&reason=recipient_gone%2F131026")]
    _, failed = await marketer.get(gone)
    for taken_out in (exports[gone], 0):
        figures = await change_list(marketer, "/lists/to-clean/remove", failed)
        assert figures == {"Taken out": taken_out, "Not in it, or named twice": exports[gone] - taken_out}
    left = {name for name, person in people.items() if "recipient_gone/131026" not in person.reasons}
    row = re.search(
        r'list=to-clean">.*?class="right num">(\d+)<.*?href="/console(/[^"]*people.csv)"', (await marketer.get("/lists"))[1]
    )
    assert int(row[1]) == len(left) < len(people)
    assert {person["external_id"] for person in await read_csv(marketer, row[2])} == left
    one, other = sorted(left)[:2]
    _, text = await marketer.post("/lists/to-clean/remove", {"contacts": f"{one}\n{other}, nobody"})
    assert re.search(r"Taken out</dt><dd>2<.*Not in it, or named twice</dt><dd>1<", text)
    assert (await marketer.post("/lists/no-such/remove", {"contacts": one}))[0] == 404
    assert await marketer.post("/lists/to-clean/delete") == (303, "/console/lists")


async def test_ids_that_a_spreadsheet_would_compute_come_back_as_they_are(world: World, marketer: Visitor) -> None:
    """Phone numbers as ids: what was exported of them named nobody in the form that it was given to."""
    ids = ["+34600000003", "-1", "'=1+1", "''@x", "'plain", 'a=b, "c"']
    contacts = [contacts_pb2.Contact(external_id=external_id) for external_id in ids]
    request = contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=contacts)
    await world.client.contacts.UpsertContacts(request)
    # What somebody else wrote, and what we did: the two that look computed to us have to be as we write them.
    given = ["external_id", "+34600000003", "-1", "''=1+1", "'''@x", "'plain", '"a=b, ""c"""']
    figures = await change_list(marketer, "/lists", "\n".join(given), display_name="Computed", list_id="computed")
    assert figures == {"Added": len(ids), "In it already": 0, "Left out": 0}
    _, text = await marketer.get("/lists/computed/people.csv")
    assert text.splitlines() == ["external_id", "'+34600000003", "'-1", "''=1+1", "'''@x", "'plain", '"a=b, ""c"""']
    assert await change_list(marketer, "/lists/computed/remove", text) == {"Taken out": len(ids), "Not in it, or named twice": 0}
    # What somebody types is meant as it is.
    await marketer.post("/lists/computed/add", {"contacts": "-1"})
    await marketer.post("/lists/computed/remove", {"contacts": "'-1"})
    _, text = await marketer.get("/lists/computed/people.csv")
    assert text.splitlines() == ["external_id", "'-1"]
    assert await marketer.post("/lists/computed/delete") == (303, "/console/lists")


async def test_file_that_breaks_off_takes_nobody_out(world: World, marketer: Visitor) -> None:
    ids = [f"broken-{number}" for number in range(BATCH + 1)]
    contacts = [contacts_pb2.Contact(external_id=external_id) for external_id in ids[:2]]
    await world.client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=world.client.parent, contacts=contacts))
    await change_list(marketer, "/lists", "\n".join(ids[:2]), display_name="Broken", list_id="broken")
    assert await change_list(marketer, "/lists/broken/remove", "\n".join(ids).encode() + b"\n\xff") == {}
    _, text = await marketer.get("/lists/broken/people.csv")
    assert text.splitlines()[1:] == ids[:2]
    assert await marketer.post("/lists/broken/delete") == (303, "/console/lists")


async def test_list_is_refused_at_its_fields(marketer: Visitor) -> None:
    status, text = await marketer.post("/lists", {"display_name": "", "list_id": "Not An Id"})
    assert (status, 'id="list_id-fault"' in text or 'id="display_name-fault"' in text) == (400, True)


async def test_rules_are_changed_and_refused_at_their_fields(world: World, admin: Visitor) -> None:
    good = {"start": "22:00", "end": "08:00", "default_time_zone": "Europe/Madrid", "messages": "3", "hours": "24"}
    assert await admin.post("/rules", good) == (303, "/console/rules?saved=1")
    _, text = await admin.get("/rules")
    assert all(f'value="{value}"' in text for value in good.values())
    for change, fault in (
        ({"messages": "many"}, "messages-fault"),
        ({"end": ""}, "end-fault"),
        ({"hours": "10000"}, "hours-fault"),
    ):
        status, text = await admin.post("/rules", good | change)
        assert (status, f'id="{fault}"' in text) == (400, True), fault
    assert (await admin.post("/rules", dict.fromkeys(good, "")))[0] == 303
    app = await world.client.apps.GetApp(apps_pb2.GetAppRequest(name="apps/acme"))
    assert not app.HasField("quiet_hours")
    assert not app.HasField("frequency_cap")


async def test_retarget_made_twice_leads_to_the_draft_that_is_there(marketer: Visitor, sent: campaigns_pb2.Campaign) -> None:
    path = f"/campaigns/{read_id(sent.name)}/retarget"
    fields = {"action": "failed", "channel": "push"}
    _, place = await marketer.post(path, fields)
    status, text = await marketer.post(path, fields)
    assert (status, f'href="{place}"' in text) == (409, True)
    assert (await marketer.post(path, fields | {"again": "1"}))[0] == 303


async def test_campaign_is_paused_resumed_and_canceled_only_when_it_can_be(
    marketer: Visitor, sent: campaigns_pb2.Campaign
) -> None:
    for what in ("pause", "resume", "cancel", "unschedule"):
        status, text = await marketer.post(f"/campaigns/{read_id(sent.name)}/state", {"do": what})
        assert (status, "This campaign is sent" in text) == (409, True), what
    assert (await marketer.post(f"/campaigns/{read_id(sent.name)}/state", {"do": "explode"}))[0] == 400


# Keys and users


async def test_key_is_shown_once_and_works_until_it_is_revoked(world: World, admin: Visitor) -> None:
    status, text = await admin.post("/keys", {"display_name": "from the console", "scope": "read"})
    secret = re.search(r'value="(at_[^"]+)"', text)[1]
    assert (status, secret in (await admin.get("/keys"))[1]) == (200, False)
    async with world.connect("acme", secret) as client:
        await client.campaigns.ListCampaigns(campaigns_pb2.ListCampaignsRequest(parent="apps/acme"))
    key = secret.split("_")[1]
    assert await admin.post(f"/keys/{key}/revoke") == (303, "/console/keys")
    assert f"/keys/{key}/revoke" not in (await admin.get("/keys"))[1]


async def test_key_without_name_or_scope_is_refused_at_the_field(admin: Visitor) -> None:
    status, text = await admin.post("/keys", {"display_name": ""})
    assert (status, 'id="display_name-fault"' in text) == (400, True)


async def test_user_made_by_an_admin_signs_in_and_follows_their_role(world: World, admin: Visitor) -> None:
    status, text = await admin.post("/users", {"email": "New@Acme.example", "role": "viewer"})
    password = re.search(r'aria-label="Password" readonly value="([^"]+)"', text)[1]
    again = await admin.post("/users", {"email": "new@acme.example", "role": "viewer"})
    assert (again[0], "is a user of this app already" in again[1]) == (400, True)
    async with Visitor(world) as new:
        assert await new.sign_in("new@acme.example", password) == 303
        assert (await new.get("/campaigns/new"))[0] == 403
        await admin.post("/users/change", {"email": "new@acme.example", "role": "marketer", "do": "role"})
        assert (await new.get("/campaigns/new"))[0] == 200
        await admin.post("/users/change", {"email": "new@acme.example", "do": "password"})
        assert (await new.get("/campaigns"))[0] == 303
        await admin.post("/users/change", {"email": "new@acme.example", "do": "delete"})
        assert await new.sign_in("new@acme.example", password) == 403
    assert status == 200


async def test_user_who_is_the_only_admin_stays_one(admin: Visitor) -> None:
    for fields in ({"role": "viewer", "do": "role"}, {"do": "delete"}):
        status, text = await admin.post("/users/change", {"email": USERS["admin"], **fields})
        assert (status, "is the only admin" in text) == (400, True)


async def test_user_is_refused_at_the_field(admin: Visitor) -> None:
    for fields, fault in (
        ({"email": "nobody", "role": "viewer"}, "email-fault"),
        ({"email": "a@b.example", "role": "god"}, "must be one of"),
    ):
        status, text = await admin.post("/users", fields)
        assert (status, fault in text) == (400, True)


async def test_audit_log_has_changes_by_key_and_in_the_console(world: World, admin: Visitor) -> None:
    made = await world.create_campaign("sms", display_name="On record")
    _, text = await admin.get("/audit")
    assert "Campaigns/CreateCampaign" in text
    assert made.name in text
    assert re.search(r"apiKeys/[0-9a-f]{12}", text)
    await admin.post("/keys", {"display_name": "on record", "scope": "read"})
    assert f"users/{USERS['admin']}" in (await admin.get("/audit"))[1]


# Channels


async def test_channels_show_health_and_where_providers_report_to(
    world: World, marketer: Visitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console_settings, "CHECK_SECONDS", 60.0)
    _, text = await marketer.get("/channels")
    assert f'value="{world.addresses.public_url}/v1/webhooks/sms"' in text
    assert "AFTERTOUCH_CONSOLE_URL is missing" in text
    status, text = await marketer.post("/channels/check")
    assert (status, "All 3 addresses lead here." in text, text.count("Reachable")) == (200, True, 3)


async def test_channels_tell_of_an_address_that_leads_elsewhere(
    postgres_url: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy that does not pass on what is below /v1/webhooks answers for itself; or nobody does."""
    monkeypatch.setattr(console_settings, "CHECK_SECONDS", 60.0)
    app = aiohttp.web.Application()
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    site = aiohttp.web.TCPSite(runner, "127.0.0.1", find_free_port())
    await site.start()
    elsewhere = "http://{}:{}".format(*runner.addresses[0])
    async with clone_database(postgres_url, template) as url, run_world(url, public_url=elsewhere) as world:
        await create_user(world, USERS["admin"], "admin")
        async with Visitor(world) as visitor:
            await visitor.sign_in(USERS["admin"])
            _, text = await visitor.post("/channels/check")
            assert "3 of 3 addresses do not lead here." in text
            assert text.count("Somebody else answers there, with 404") == 3
            await runner.cleanup()
            _, text = await visitor.post("/channels/check")
            assert text.count("Nobody answers there") == 3


async def test_admin_sets_an_account_of_the_apps_own_and_goes_back(world: World, admin: Visitor) -> None:
    _, text = await admin.get("/channels/sms/own")
    assert 'name="own.auth_token" type="password"' in text
    assert "own.api_url" not in text
    wrong = {"own.account_sid": "AC-hush-hush", "own.auth_token": "a-token-of-ours", "own.sender": "+15005550009"}
    status, text = await admin.post("/channels/sms/own", wrong)
    assert status == 400
    assert 'aria-invalid="true"' in text
    assert "hush" not in text
    right = wrong | {"own.account_sid": "AC" + "1" * 32}
    assert await admin.post("/channels/sms/own", right) == (303, "/console/channels/sms/own?saved=1")
    _, text = await admin.get("/channels/sms/own")
    own_address = f"{world.addresses.public_url}/v1/apps/acme/webhooks/sms"
    assert own_address in text
    assert not any(value in text for value in right.values())
    assert f'value="{own_address}"' in (await admin.get("/channels"))[1]
    assert "Channels/UpdateChannelSettings" in (await admin.get("/audit"))[1]
    # What is left empty stays, what is to be forgotten goes, and a whole that does not fit is refused.
    assert "Also the key of the webhooks" in text
    assert re.findall(r'name="forget" value="(\w+)"', text) == ["sender"]
    status, text = await admin.post("/channels/sms/own", {"forget": "sender"})
    assert (status, "Set either messaging_service_sid or sender." in text) == (400, True)
    change = {"own.messaging_service_sid": "MG" + "1" * 32, "forget": "sender"}
    assert (await admin.post("/channels/sms/own", change))[0] == 303
    _, text = await admin.get("/channels/sms/own")
    assert re.findall(r'name="forget" value="(\w+)"', text) == ["messaging_service_sid"]
    assert await admin.post("/channels/sms/own/delete") == (303, "/console/channels")
    assert own_address not in (await admin.get("/channels"))[1]


async def test_console_leaves_the_rest_of_the_address_to_the_webhooks(world: World) -> None:
    async with aiohttp.ClientSession() as session:
        for path, status in (("/healthz", 200), ("/consolex", 404), ("/v1/webhooks/fax", 404), ("/", 307), ("/console", 307)):
            async with session.get(world.addresses.public_url + path, allow_redirects=False) as response:
                assert response.status == status, path
