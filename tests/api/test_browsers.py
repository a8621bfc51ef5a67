"""Browsers that register over HTTP: who may say what of whom, and what is refused before it costs anything."""

from __future__ import annotations

import asyncio
import hmac
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import text

from aftertouch.client import sign_identity
from aftertouch.ingest import enrolment
from aftertouch.sandbox import SandboxSettings
from aftertouch.store.engine import transaction
from aftertouch.v1 import apps_pb2, contacts_pb2
from tests.fix_world import OpenWorld, World
from tests.refusals import refuse

ORIGIN = "https://shop.example"
POINT = ec.derive_private_key(7, ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
KEYS = {"p256dh": urlsafe_b64encode(POINT).rstrip(b"=").decode(), "auth": "BTBZMqHH6r4Tts7J_aSIgg"}


class Caller:
    """A page of the app ``acme``."""

    def __init__(self, world: World, http: aiohttp.ClientSession, secret: str) -> None:
        self.world = world
        self.http = http
        self.secret = secret
        self.url = f"http://{world.addresses.http}/v1/browsers/push/acme"

    def sign(self, external_id: str, *, hours: float = 1) -> str:
        return sign_identity(self.secret, external_id, datetime.now(UTC) + timedelta(hours=hours))

    async def post(self, verb: str, body: Any, **headers: str) -> tuple[int, str]:
        """Status and reason of a call."""
        given = {"Origin": ORIGIN, **headers}
        async with self.http.post(f"{self.url}/{verb}", json=body, headers=given) as answer:
            is_json = answer.content_type == "application/json"
            return answer.status, (await answer.json())["reason"] if is_json else await answer.text()

    async def subscribe(self, external_id: str, subscription: Any, **more: Any) -> tuple[int, str]:
        return await self.post("subscribe", {"identity": self.sign(external_id), "subscription": subscription, **more})

    async def read_states(self, external_id: str) -> dict[str, str]:
        """The states of a person's subscriptions with their reasons, by endpoint."""
        name = self.world.client.name("contacts", external_id)
        contact = await self.world.client.contacts.GetContact(contacts_pb2.GetContactRequest(name=name))
        state = contacts_pb2.Subscription.State.Name
        return {one.address["endpoint"]: f"{state(one.state)} {one.reason}".strip() for one in contact.subscriptions}


def sign_parts(caller: Caller, expiry: str, name: str) -> str:
    """What a backend signs that writes its identities by itself, and not as ``sign_identity`` does."""
    signed = f"v1.{expiry}.{name}"
    digest = hmac.digest(caller.secret.encode(), signed.encode(), "sha256")
    return f"{signed}.{urlsafe_b64encode(digest).rstrip(b'=').decode()}"


def make_subscription() -> dict[str, Any]:
    return {"endpoint": f"https://fcm.googleapis.com/fcm/send/{uuid4().hex}", "expirationTime": None, "keys": KEYS}


@pytest.fixture
async def caller(shared_world: World, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Caller]:
    monkeypatch.setattr(enrolment, "KEEP_SECONDS", 0.0)
    client = shared_world.client
    await client.apps.UpdateApp(apps_pb2.UpdateAppRequest(app=apps_pb2.App(name="apps/acme", web_origins=[ORIGIN])))
    made = await client.apps.CreateIdentitySecret(apps_pb2.CreateIdentitySecretRequest(parent="apps/acme"))
    async with aiohttp.ClientSession() as http:
        yield Caller(shared_world, http, made.secret)


async def test_browser_is_subscribed_for_whom_the_backend_names(caller: Caller) -> None:
    subscription = make_subscription()
    assert await caller.subscribe("josé 1", subscription) == (204, "")
    assert await caller.subscribe("josé 1", subscription) == (204, "")
    assert await caller.read_states("josé 1") == {subscription["endpoint"]: "ACTIVE"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda caller: caller.sign("eve", hours=-1),
        lambda caller: caller.sign("eve").replace("v1.", "v2.", 1),
        lambda caller: caller.sign("eve")[:-4] + "AAAA",
        lambda caller: caller.sign("eve").rpartition(".")[0],
        lambda caller: (signed := caller.sign("eve")).replace(signed.split(".")[1], "9999999999"),
        lambda caller: sign_identity("another secret", "eve", datetime.now(UTC) + timedelta(hours=1)),
        lambda caller: "é.é.é.é",
        lambda caller: sign_parts(caller, "1e10", "ZXZl"),
        lambda caller: sign_parts(caller, "9999999999", "ZXZl!"),
        lambda caller: sign_parts(caller, "9999999999", "ZXZlZ"),
        lambda caller: sign_parts(caller, "9999999999", "_w"),
        lambda caller: "....",
        lambda caller: "x",
    ],
)
async def test_identity_that_proves_nothing_is_refused(caller: Caller, spoil: Any) -> None:
    body = {"identity": spoil(caller), "subscription": make_subscription()}
    assert await caller.post("subscribe", body) == (401, "IDENTITY_INVALID")


async def test_identity_of_another_app_is_refused(caller: Caller) -> None:
    async with caller.world.connect("other", await caller.world.create_key("other", "admin")) as other:
        made = await other.apps.CreateIdentitySecret(apps_pb2.CreateIdentitySecretRequest(parent="apps/other"))
        refusal = await refuse(other.apps.CreateIdentitySecret(apps_pb2.CreateIdentitySecretRequest(parent="apps/acme")))
    assert refusal.reason == "RESOURCE_NOT_FOUND"
    identity = sign_identity(made.secret, "eve", datetime.now(UTC) + timedelta(hours=1))
    body = {"identity": identity, "subscription": make_subscription()}
    assert await caller.post("subscribe", body) == (401, "IDENTITY_INVALID")


async def test_identity_secret_before_the_newest_is_still_taken(caller: Caller) -> None:
    request = apps_pb2.CreateIdentitySecretRequest(parent="apps/acme")
    await caller.world.client.apps.CreateIdentitySecret(request)
    assert (await caller.subscribe("rotated", make_subscription()))[0] == 204
    await caller.world.client.apps.CreateIdentitySecret(request)
    assert await caller.subscribe("rotated", make_subscription()) == (401, "IDENTITY_INVALID")


async def test_secrets_are_stored_sealed(caller: Caller) -> None:
    await caller.subscribe("sealed", make_subscription())
    async with transaction(caller.world.core.engine) as conn:
        rows = (await conn.execute(text("SELECT name, sealed FROM app_secrets"))).all()
    assert {row.name for row in rows} == {"identity", "keys/push"}
    for row in rows:
        assert caller.secret.encode() not in row.sealed
        assert b"vapid" not in row.sealed


@pytest.mark.parametrize("external_id", ["", " ada", "a/b", "a\nb", "x" * 201])
async def test_external_id_that_the_api_would_not_take_is_refused(caller: Caller, external_id: str) -> None:
    assert await caller.subscribe(external_id, make_subscription()) == (400, "FIELDS_INVALID")


@pytest.mark.parametrize(
    "change",
    [
        {"endpoint": "https://internal.example/send/1"},
        {"endpoint": "https://fcm.googleapis.com@evil.example/1"},
        {"endpoint": "http://169.254.169.254/latest/meta-data"},
        {"endpoint": "https://fcm.googleapis.com:8443/1"},
        {"endpoint": "file:///etc/passwd"},
        {"keys": {"p256dh": "AAAA", "auth": KEYS["auth"]}},
        {"more": 1},
    ],
)
async def test_subscription_that_may_not_be_sent_to_is_refused(caller: Caller, change: dict[str, Any]) -> None:
    assert await caller.subscribe("ssrf", make_subscription() | change) == (400, "FIELDS_INVALID")


@pytest.mark.parametrize("body", [[], {}, {"subscription": 1}, {"subscription": {}, "admin": True}, "x"])
async def test_body_that_makes_no_sense_is_refused(caller: Caller, body: Any) -> None:
    assert await caller.post("subscribe", body) == (400, "FIELDS_INVALID")


async def test_large_body_is_refused_unread(caller: Caller) -> None:
    status, _ = await caller.post("subscribe", {"subscription": make_subscription(), "identity": "x" * 20_000})
    assert status == 413


async def test_pages_of_other_origins_are_refused(caller: Caller) -> None:
    body = {"identity": caller.sign("ada"), "subscription": make_subscription()}
    assert await caller.post("subscribe", body, Origin="https://evil.example") == (403, "ORIGIN_NOT_ALLOWED")
    headers = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    async with caller.http.options(f"{caller.url}/subscribe", headers=headers) as answer:
        assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, ORIGIN)
        assert answer.headers["vary"] == "Origin"
    async with caller.http.options(f"{caller.url}/subscribe", headers=headers | {"Origin": "null"}) as answer:
        assert (answer.status, answer.headers.get("access-control-allow-origin")) == (403, None)


@pytest.mark.parametrize("path", ["push/nobody", "push/Bad%2fName", "sms/acme", "fax/acme", "push"])
async def test_unknown_apps_and_channels_are_not_found(caller: Caller, path: str) -> None:
    async with caller.http.get(f"http://{caller.world.addresses.http}/v1/browsers/{path}") as answer:
        assert answer.status == 404


async def test_browser_takes_over_and_gives_back(caller: Caller) -> None:
    subscription = make_subscription()
    for person, other in (("hand-a", "hand-b"), ("hand-b", "hand-a"), ("hand-a", "hand-b")):
        await caller.subscribe(person, subscription)
        states = await caller.read_states(person)
        assert states == {subscription["endpoint"]: "ACTIVE"}
        if person == "hand-b":
            assert await caller.read_states(other) == {subscription["endpoint"]: "INVALID moved"}


async def test_whoever_logs_in_on_a_kiosk_takes_it_from_the_one_before(caller: Caller) -> None:
    """The twenty-first went on getting messages, on the screen of the twenty-second: twenty who had left hid them."""
    subscription = make_subscription()
    people = [f"kiosk-{index}" for index in range(23)]
    for person in people:
        assert (await caller.subscribe(person, subscription))[0] == 204
    states = [(await caller.read_states(person))[subscription["endpoint"]] for person in people]
    assert states == ["INVALID moved"] * 22 + ["ACTIVE"]
    assert (await caller.post("unsubscribe", {"subscription": subscription}))[0] == 204
    states = [(await caller.read_states(person))[subscription["endpoint"]] for person in people]
    assert states == ["INVALID moved"] * 22 + ["OPTED_OUT unsubscribed in the browser"]


async def test_kiosk_can_be_renewed_for_who_is_logged_in(caller: Caller) -> None:
    first, second = make_subscription(), make_subscription()
    people = [f"renewed-{index}" for index in range(22)]
    for person in people:
        await caller.subscribe(person, first)
    assert (await caller.post("subscribe", {"subscription": second, "previous": first}))[0] == 204
    assert (await caller.read_states(people[-1]))[second["endpoint"]] == "ACTIVE"


async def test_browser_is_one_persons_when_several_log_in_at_once(caller: Caller) -> None:
    """Neither saw the other, and both were sent to on one screen."""
    people = [f"at-once-{index}" for index in range(6)]
    for _ in range(3):
        subscription = make_subscription()
        answers = await asyncio.gather(*(caller.subscribe(person, subscription) for person in people))
        assert answers == [(204, "")] * len(people)
        states = [(await caller.read_states(person))[subscription["endpoint"]] for person in people]
        assert sorted(states) == ["ACTIVE"] + ["INVALID moved"] * (len(people) - 1)


async def test_browsers_that_change_hands_in_opposite_directions_do_not_wait_for_each_other(caller: Caller) -> None:
    """Between people of two blocks, both ways: each call had the lock that the other one needed next."""
    low, high = ([f"{side}-{index}" for index in range(8)] for side in ("low", "high"))
    subscriptions = [make_subscription() for _ in range(16)]
    before = list(zip([*low, *high], subscriptions, strict=True))
    for index, (person, subscription) in enumerate(before):
        if index == len(low):
            async with transaction(caller.world.core.engine) as conn:
                await conn.execute(text("UPDATE contact_counters SET next_number = next_number + 8192"))
        assert (await caller.subscribe(person, subscription))[0] == 204
    for _ in range(2):
        await asyncio.gather(*(caller.subscribe(person, subscription) for person, subscription in before))
        after = zip([*high, *low], subscriptions, strict=True)
        answers = await asyncio.gather(*(caller.subscribe(person, subscription) for person, subscription in after))
        assert answers == [(204, "")] * len(subscriptions)


async def test_refresh_is_for_who_is_active_there(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody whose browser had made room got it back along with the person who had it by then."""
    monkeypatch.setattr(enrolment, "MOST_DEVICES", 1)
    subscription = make_subscription()
    await caller.subscribe("crowded", subscription)
    await caller.subscribe("crowded", make_subscription())
    await caller.subscribe("next one", subscription)
    assert (await caller.post("subscribe", {"subscription": subscription, "previous": subscription}))[0] == 204
    assert (await caller.read_states("crowded"))[subscription["endpoint"]] == "INVALID too many browsers"
    assert await caller.read_states("next one") == {subscription["endpoint"]: "ACTIVE"}


async def test_renewal_needs_the_endpoint_before(caller: Caller) -> None:
    first, second = make_subscription(), make_subscription()
    await caller.subscribe("renewing", first)
    assert await caller.post("subscribe", {"subscription": second}) == (404, "RESOURCE_NOT_FOUND")
    body = {"subscription": second, "previous": make_subscription()}
    assert await caller.post("subscribe", body) == (404, "RESOURCE_NOT_FOUND")
    assert (await caller.post("subscribe", {"subscription": second, "previous": first}))[0] == 204
    states = await caller.read_states("renewing")
    assert states == {first["endpoint"]: "INVALID replaced", second["endpoint"]: "ACTIVE"}


async def test_unsubscribed_browser_is_not_renewed_but_can_come_back(caller: Caller) -> None:
    subscription = make_subscription()
    await caller.subscribe("leaving", subscription)
    assert (await caller.post("unsubscribe", {"subscription": subscription}))[0] == 204
    assert await caller.read_states("leaving") == {subscription["endpoint"]: "OPTED_OUT unsubscribed in the browser"}
    renewal = {"subscription": make_subscription(), "previous": subscription}
    assert await caller.post("subscribe", renewal) == (404, "RESOURCE_NOT_FOUND")
    await caller.subscribe("leaving", subscription)
    assert await caller.read_states("leaving") == {subscription["endpoint"]: "ACTIVE"}


async def test_unsubscribing_what_nobody_has_is_no_error(caller: Caller) -> None:
    assert (await caller.post("unsubscribe", {"subscription": make_subscription()}))[0] == 204


async def test_person_can_change_subscriptions_ten_times_a_minute(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    # A hundred times as long, or a busy machine would have room again before it has made twelve calls.
    for name in ("EVERY", "AHEAD"):
        monkeypatch.setattr(enrolment, name, 100 * getattr(enrolment, name))
    statuses = [await caller.subscribe("busy", make_subscription()) for _ in range(12)]
    assert statuses == [(204, "")] * 10 + [(429, "TOO_MANY_REQUESTS")] * 2
    body = {"identity": caller.sign("busy"), "subscription": make_subscription()}
    async with caller.http.post(f"{caller.url}/subscribe", json=body, headers={"Origin": ORIGIN}) as answer:
        assert 1 <= int(answer.headers["retry-after"]) <= 100 * 6
    assert (await caller.subscribe("somebody else", make_subscription()))[0] == 204


async def test_oldest_browser_makes_room(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "MOST_DEVICES", 2)
    given = [make_subscription() for _ in range(3)]
    for subscription in given:
        await caller.subscribe("collector", subscription)
    states = await caller.read_states("collector")
    assert [states[one["endpoint"]] for one in given] == ["INVALID too many browsers", "ACTIVE", "ACTIVE"]


async def test_browser_in_daily_use_does_not_make_room(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of twenty was ended when a new one came, although its person opened the site in it every day."""
    monkeypatch.setattr(enrolment, "MOST_DEVICES", 2)
    daily, seldom, new = (make_subscription() for _ in range(3))
    for subscription in (daily, seldom, daily, new):
        await caller.subscribe("faithful", subscription)
    states = await caller.read_states("faithful")
    assert [states[one["endpoint"]] for one in (daily, seldom, new)] == ["ACTIVE", "INVALID too many browsers", "ACTIVE"]


async def test_visit_is_no_change_of_a_subscription(caller: Caller) -> None:
    """An explanation says since when somebody can be reached."""

    async def read_time() -> datetime:
        name = caller.world.client.name("contacts", "visitor")
        contact = await caller.world.client.contacts.GetContact(contacts_pb2.GetContactRequest(name=name))
        return contact.subscriptions[0].update_time.ToDatetime()

    subscription = make_subscription()
    await caller.subscribe("visitor", subscription)
    before = await read_time()
    await caller.subscribe("visitor", subscription)
    assert await read_time() == before


async def test_apps_have_keys_of_their_own(open_world: OpenWorld) -> None:
    async with open_world(SandboxSettings(size=1, vapid_private_key=None)) as world, aiohttp.ClientSession() as http:
        await world.create_key("other", "read")
        keys = []
        for app in ("acme", "acme", "other"):
            async with http.get(f"http://{world.addresses.http}/v1/browsers/push/{app}") as answer:
                keys.append((await answer.json())["application_server_key"])
    assert keys[0] == keys[1] != keys[2]
    assert all(len(key) == 87 for key in keys)


async def test_scripts_are_served_with_a_tag(caller: Caller) -> None:
    for name in ("aftertouch.js", "aftertouch-worker.js"):
        url = f"http://{caller.world.addresses.http}/v1/browsers/{name}"
        async with caller.http.get(url) as answer:
            assert (answer.status, answer.content_type) == (200, "text/javascript")
        async with caller.http.get(url, headers={"If-None-Match": answer.headers["etag"]}) as answer:
            assert answer.status == 304


@pytest.mark.parametrize(
    "origin", ["http://shop.example", "https://shop.example/", "https://*.example", "shop.example", "https://SHOP.example"]
)
async def test_web_origin_is_an_origin(caller: Caller, origin: str) -> None:
    app = apps_pb2.App(name="apps/acme", web_origins=[origin])
    refusal = await refuse(caller.world.client.apps.UpdateApp(apps_pb2.UpdateAppRequest(app=app)))
    assert list(refusal.fields) == ["app.web_origins[0]"]
