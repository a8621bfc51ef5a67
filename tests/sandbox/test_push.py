import time
from base64 import urlsafe_b64decode
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from pywebpush import WebPushException

from aftertouch.sandbox import Sandbox, SandboxSettings
from aftertouch.sandbox.push import decrypt

from .browser import encrypt, push, sign
from .conftest import CERTAIN, Receiver

TOKEN = "AbCdEfGhIjKlMnOpQrStUvWx"
OTHER_KEY = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"


def make_payload(receiver: Receiver, **changes: Any) -> dict[str, Any]:
    return {"t": TOKEN, "b": f"{receiver.url}/push", "title": "Summer Sale", "body": "30 % off, só hoje", **changes}


async def post(sandbox: Sandbox, http: aiohttp.ClientSession, body: bytes, **headers: str | None) -> aiohttp.ClientResponse:
    given = {"TTL": "60", "Content-Encoding": "aes128gcm", "Authorization": sign(sandbox)}
    given.update({name.replace("_", "-"): value for name, value in headers.items()})  # type: ignore[misc]
    sent = {name: value for name, value in given.items() if value is not None}
    async with http.post(sandbox.population.get_endpoint(1), data=body, headers=sent) as response:
        await response.read()
        return response


async def test_message_of_pywebpush_is_decrypted_shown_and_confirmed(sandbox: Sandbox, receiver: Receiver) -> None:
    response = await push(sandbox, 1, make_payload(receiver))
    assert (response.status_code, response.headers["ttl"]) == (201, "60")
    assert response.headers["location"].startswith(f"{sandbox.url}/push/messages/")
    await sandbox.outbox.drain()
    beacons = {(request.method, request.url) for request in receiver.requests}
    assert beacons == {("POST", f"{receiver.url}/push/{kind}?t={TOKEN}") for kind in ("confirmed", "clicked")}
    (entry,) = sandbox.truth.entries
    assert entry.content == make_payload(receiver)
    assert entry.token == TOKEN
    assert set(entry.signals) == {"shown", "confirmed", "clicked"}
    assert entry.signals["confirmed"].acknowledged


def test_decryption_is_that_of_the_example_in_rfc_8291() -> None:
    body = urlsafe_b64decode(
        "DGv6ra1nlYgDCS1FRnbzlwAAEABBBP4z9KsN6nGRTbVYI_c7VJSPQTBtkgcy27ml"
        "mlMoZIIgDll6e3vCYLocInmYWAmS6TlzAC8wEqKK6PBru3jl7A_yl95bQpu6cVPT"
        "pK4Mqgkf1CXztLVBSt2Ks3oZwbuwXPXLWyouBWLVWGNWQexSgSxsj_Qulcy4a-fN"
    )
    number = int.from_bytes(urlsafe_b64decode("q1dXpw3UpT5VOmu_cf_v6ih07Aems3njxI-JWgLcM94="), "big")
    secret = urlsafe_b64decode("BTBZMqHH6r4Tts7J_aSIgg==")
    text = decrypt(body, ec.derive_private_key(number, ec.SECP256R1()), secret)
    assert text == b"When I grow up, I want to be a watermelon"


@pytest.mark.parametrize(
    ("headers", "status", "errno"),
    [
        ({"TTL": None}, 400, 111),
        ({"TTL": "-1"}, 400, 111),
        ({"Topic": "x" * 33}, 400, 113),
        ({"Topic": "not base64url"}, 400, 113),
        ({"Urgency": "immediate"}, 400, 110),
        ({"Content_Encoding": "aesgcm"}, 400, 110),
        ({"Content_Encoding": None}, 400, 110),
        ({"Authorization": None}, 401, 109),
        ({"Authorization": "vapid t=a.b.c, k=d"}, 401, 109),
        ({"Authorization": "vapid garbage"}, 401, 109),
    ],
)
async def test_header_is_refused(
    sandbox: Sandbox, http: aiohttp.ClientSession, headers: dict[str, str | None], status: int, errno: int
) -> None:
    response = await post(sandbox, http, encrypt(sandbox, 1, {}), **headers)
    assert response.status == status
    assert (await response.json())["errno"] == errno
    assert sandbox.truth.entries == []


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({"aud": "https://push.example.com"}, 401),
        ({"exp": int(time.time()) - 5}, 401),
        ({"exp": int(time.time()) + 48 * 3600}, 401),
        ({"sub": "mailto: <ops@example.com>"}, 403),
        ({"key": OTHER_KEY}, 403),
    ],
)
async def test_vapid_claim_is_refused(sandbox: Sandbox, http: aiohttp.ClientSession, claims: dict[str, Any], status: int) -> None:
    response = await post(sandbox, http, encrypt(sandbox, 1, {}), Authorization=sign(sandbox, **claims))
    assert response.status == status


async def test_signature_of_another_key_is_refused(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    token = sign(sandbox, key=OTHER_KEY).partition(",")[0]
    header = f"{token},k={sandbox.settings.vapid_public_key}"
    response = await post(sandbox, http, encrypt(sandbox, 1, {}), Authorization=header)
    assert response.status == 401


async def test_largest_message_is_taken_and_a_larger_one_is_not(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    largest = encrypt(sandbox, 1, b"x" * 3993)
    assert len(largest) == 4096
    assert (await post(sandbox, http, largest)).status == 201
    assert (await post(sandbox, http, largest + b"x")).status == 413


async def test_message_for_another_browser_is_taken_and_never_shown(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    assert (await post(sandbox, http, encrypt(sandbox, 2, {"t": TOKEN}))).status == 201
    (entry,) = sandbox.truth.entries
    assert entry.signals["undecryptable"].code == "the tag does not fit"


async def test_unknown_endpoint_is_404_and_a_gone_one_410(
    make_settings: Callable[..., SandboxSettings], http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, push_gone=1.0))) as sandbox:
        with pytest.raises(WebPushException) as gone:
            await push(sandbox, 1, {"t": TOKEN})
        assert gone.value.status_code == 410
        assert [entry.refused for entry in sandbox.truth.entries] == ["410"]
        headers = {"TTL": "60", "Content-Encoding": "aes128gcm", "Authorization": sign(sandbox)}
        async with http.post(f"{sandbox.url}/push/{'x' * 24}", data=b"", headers=headers) as response:
            assert response.status == 404


async def test_waiting_message_is_replaced_by_its_topic_and_shown_when_the_browser_returns(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver
) -> None:
    async with Sandbox(make_settings(size=400, shares=replace(CERTAIN, push_offline=0.5))) as sandbox:
        fates = set()
        for person in sandbox.population:
            for number in range(3):
                topic = {"Topic": "sale"} if number < 2 else {}
                await push(sandbox, person.index, make_payload(receiver, t=f"{person.index}-{number}"), headers=topic)
            first, second, third = (tuple(entry.signals) for entry in sandbox.truth.entries[-3:])
            assert ("replaced" in first) == ("shown" not in first)
            assert "shown" in second or "shown" not in third
            fates.add(("shown" in first, "shown" in second, "shown" in third))
            if len(fates) == 6:
                break
        assert (False, True, True) in fates
        assert (False, False, False) in fates


async def test_offline_message_without_ttl_expires(make_settings: Callable[..., SandboxSettings], receiver: Receiver) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, push_offline=1.0))) as sandbox:
        await push(sandbox, 1, make_payload(receiver), ttl=0)
        assert set(sandbox.truth.entries[0].signals) == {"expired"}


async def test_silent_browser_shows_and_confirms_nothing(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, push_silent=1.0))) as sandbox:
        assert not sandbox.population.get_person(1).push_confirms
        await push(sandbox, 1, make_payload(receiver))
        await sandbox.outbox.drain()
        assert receiver.requests == []
        assert set(sandbox.truth.entries[0].signals) == {"shown"}
