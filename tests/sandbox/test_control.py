import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from aftertouch.sandbox import Sandbox, SandboxSettings, Shares

from . import test_meta, test_twilio
from .browser import encrypt, push, sign
from .conftest import Receiver
from .test_twilio import make_fields

PROVIDER_CODES = {
    "sms": {"429": 20429, "500": 20500, "503": 20503, "expired_token": 20003},
    "whatsapp": {"429": 130429, "500": 1, "503": 2, "expired_token": 190},
    "push": {"429": 429, "500": 500, "503": 503, "expired_token": 401},
}


async def set_fault(sandbox: Sandbox, http: aiohttp.ClientSession, **fault: Any) -> int:
    async with http.put(f"{sandbox.url}/sandbox/faults", json=fault) as response:
        return response.status


async def read_truth(sandbox: Sandbox, http: aiohttp.ClientSession, **query: str | int) -> list[dict[str, Any]]:
    async with http.get(f"{sandbox.url}/sandbox/truth", params=query) as response:
        assert response.content_type == "application/x-ndjson"
        return [json.loads(line) for line in (await response.text()).splitlines()]


async def send(sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession, channel: str) -> aiohttp.ClientResponse:
    settings, person = sandbox.settings, sandbox.population.get_person(1)
    headers: dict[str, str] = {}
    data: Any
    match channel:
        case "sms":
            url = f"{sandbox.url}/2010-04-01/Accounts/{settings.account_sid}/Messages.json"
            data = make_fields(sandbox, receiver)
            headers = test_twilio.authorize(settings.account_sid, settings.auth_token)
        case "whatsapp":
            url = f"{sandbox.url}/v25.0/{settings.phone_number_id}/messages"
            data = json.dumps(test_meta.make_message(sandbox))
            headers = {"Authorization": f"Bearer {settings.access_token}", "Content-Type": "application/json"}
        case _:
            url = sandbox.population.get_endpoint(person.index)
            data = encrypt(sandbox, person.index, {"t": "token"})
            headers = {"TTL": "60", "Content-Encoding": "aes128gcm", "Authorization": sign(sandbox)}
    async with http.post(url, data=data, headers=headers) as response:
        await response.read()
        return response


@pytest.mark.parametrize("channel", ["sms", "whatsapp", "push"])
@pytest.mark.parametrize("mode", ["429", "500", "503", "expired_token"])
async def test_fault_is_answered_in_the_providers_own_shape(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession, channel: str, mode: str
) -> None:
    assert await set_fault(sandbox, http, channel=channel, mode=mode, times=1) == 204
    response = await send(sandbox, receiver, http, channel)
    assert response.status == (401 if mode == "expired_token" else int(mode))
    body = await response.json()
    assert body.get("error", body)["code"] if channel == "whatsapp" else body["code"] == PROVIDER_CODES[channel][mode]
    assert sandbox.truth.entries == []
    assert (await send(sandbox, receiver, http, channel)).status < 300


async def test_rate_limit_says_when_to_come_back(sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession) -> None:
    await set_fault(sandbox, http, channel="push", mode="429_retry_after", retry_after=7)
    assert (await send(sandbox, receiver, http, "push")).headers["Retry-After"] == "7"
    await set_fault(sandbox, http, channel="push", mode=None)
    assert (await send(sandbox, receiver, http, "push")).status == 201


@pytest.mark.parametrize("channel", ["sms", "whatsapp", "push"])
@pytest.mark.parametrize("taken", [False, True])
async def test_reset_and_stall_leave_open_whether_the_message_was_taken(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession, channel: str, taken: bool
) -> None:
    await set_fault(sandbox, http, channel=channel, mode="reset", times=1, taken=taken)
    with pytest.raises(aiohttp.ClientOSError, match="reset"):
        await send(sandbox, receiver, http, channel)
    await set_fault(sandbox, http, channel=channel, mode="stall", times=1, taken=taken)
    sending = asyncio.create_task(send(sandbox, receiver, http, channel))
    async with asyncio.timeout(60):
        # The sandbox tells nobody, so this looks.
        while not sandbox.faults.strikes[f"{channel} stall"] or len(sandbox.truth.entries) < 2 * taken:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    done, _ = await asyncio.wait({sending}, timeout=0.5)
    assert not done
    sending.cancel()
    await asyncio.wait({sending})
    assert len(sandbox.truth.entries) == 2 * taken


async def test_fault_strikes_the_share_that_was_asked_for(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    await set_fault(sandbox, http, channel="sms", mode="500", share=0.5)
    statuses = Counter([(await send(sandbox, receiver, http, "sms")).status for _ in range(60)])
    assert statuses.keys() == {201, 500}
    assert sandbox.faults.strikes["sms 500"] == statuses[500]


@pytest.mark.parametrize("fault", [{"channel": "fax", "mode": "500"}, {"channel": "sms", "mode": "x"}, {"channel": "sms"}])
async def test_unknown_fault_is_refused(sandbox: Sandbox, http: aiohttp.ClientSession, fault: dict[str, str]) -> None:
    assert await set_fault(sandbox, http, **fault) == 400


async def test_truth_shows_double_sends_and_who_got_what(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    await send(sandbox, receiver, http, "sms")
    await send(sandbox, receiver, http, "sms")
    await send(sandbox, receiver, http, "whatsapp")
    await push(sandbox, 3, {"t": "xyz", "title": "Winter Sale"})
    async with http.post(f"{sandbox.url}/sandbox/drain") as response:
        stats = await response.json()
    first, second, third, fourth = await read_truth(sandbox, http)
    assert (first["sequence"], first["taken"], first["external_id"]) == (1, 2, "user-000001")
    assert first["message_id"] != second["message_id"]
    assert (first["token"], first["content"]) == (test_twilio.TOKEN, "Summer Sale")
    assert first["signals"].keys() == {"sent", "delivered"}
    assert (third["taken"], third["label"].split()[1:]) == (1, ["summer_sale", "en_US"])
    assert fourth["label"].endswith(" Winter Sale")
    assert stats["taken"] == {"sms": 2, "whatsapp": 1, "push": 1}
    assert stats["repeated"] == {"sms": 1, "whatsapp": 0, "push": 0}
    assert stats["receipts"]["pending"] == 0
    assert all(signal["acknowledged"] for entry in (first, second, third) for signal in entry["signals"].values())
    assert await read_truth(sandbox, http, since=3) == [fourth]
    assert await read_truth(sandbox, http, channel="whatsapp") == [third]
    assert await read_truth(sandbox, http, token_prefix="xy") == [fourth]


async def test_label_is_the_same_for_everybody_in_a_campaign(sandbox: Sandbox, receiver: Receiver) -> None:
    for index in range(5):
        name = sandbox.population.get_person(index).first_name
        await push(sandbox, index, {"t": f"token{index}", "title": f"Hi {name}, see /r/token{index}"})
    assert len({entry.label for entry in sandbox.truth.entries}) == 1


async def test_fates_depend_on_the_message_number_and_not_on_repetition(make_settings: Callable[..., SandboxSettings]) -> None:
    async def play() -> list[tuple[str, ...]]:
        async with Sandbox(make_settings(shares=Shares(all_channels=1.0))) as sandbox, aiohttp.ClientSession() as http:
            for token in ("first", "first", "second"):
                for person in sandbox.population:
                    message = test_meta.make_message(sandbox, to=person.phone, biz_opaque_callback_data=token)
                    await test_meta.post(sandbox, http, message)
            return [tuple(entry.signals) for entry in sandbox.truth.entries]

    fates = await play()
    assert fates == await play()
    first, repeated, second = fates[:100], fates[100:200], fates[200:]
    assert first == repeated != second
    assert {("sent", "delivered", "read"), ("sent", "delivered"), ("failed",)} <= set(first)


async def test_duplicate_receipts_are_counted(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(duplicate_share=1.0)) as sandbox:
        await send(sandbox, receiver, http, "sms")
        await sandbox.outbox.drain()
        assert len(receiver.requests) == 6
        assert sandbox.outbox.counts["duplicates"] == 3


async def test_drain_that_takes_too_long_says_so(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    receiver.status = 500
    async with Sandbox(make_settings()) as sandbox:
        await send(sandbox, receiver, http, "sms")
        async with http.post(f"{sandbox.url}/sandbox/drain?timeout=0.1") as response:
            assert (response.status, (await response.json())["receipts"]["pending"]) == (504, 3)


async def test_reset_forgets_everything(sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession) -> None:
    await send(sandbox, receiver, http, "sms")
    await set_fault(sandbox, http, channel="sms", mode="500")
    async with http.post(f"{sandbox.url}/sandbox/reset") as response:
        assert response.status == 204
    assert await read_truth(sandbox, http) == []
    assert sandbox.outbox.pending == 0
    assert (await send(sandbox, receiver, http, "sms")).status == 201
    assert [entry["sequence"] for entry in await read_truth(sandbox, http)] == [1]


async def test_webhook_address_can_be_set_later(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(whatsapp_webhook_url=None)) as sandbox:
        await send(sandbox, receiver, http, "whatsapp")
        await sandbox.outbox.drain()
        assert receiver.requests == []
        async with http.put(f"{sandbox.url}/sandbox/whatsapp-webhook", json={"url": receiver.url}) as response:
            assert response.status == 204
        await send(sandbox, receiver, http, "whatsapp")
        await sandbox.outbox.drain()
        assert receiver.requests


_PROGRAM = """
from aftertouch.sandbox import SandboxSettings, run
run(SandboxSettings(size=10), started=lambda sandbox: print(sandbox.url, flush=True))
"""


async def test_process_of_its_own_ends_with_sigterm(http: aiohttp.ClientSession) -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _PROGRAM, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    url = (await process.stdout.readline()).decode().strip()
    async with http.get(f"{url}/sandbox/stats") as response:
        assert (await response.json())["taken"] == {}
    process.terminate()
    await process.communicate()
    assert process.returncode == 0
