import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import aiohttp
import pytest
from pywa.utils import webhook_updates_validator

from aftertouch.sandbox import Sandbox, SandboxSettings, webhooks

from .conftest import CERTAIN, Receiver, wait_for_retries

TOKEN = "AbCdEfGhIjKlMnOpQrStUvWx"


def make_parameter(text: str, **more: str) -> dict[str, str]:
    return {"type": "text", "text": text, **more}


def make_template(*parameters: dict[str, Any], **changes: Any) -> dict[str, Any]:
    components = [{"type": "body", "parameters": list(parameters)}] if parameters else []
    return {"name": "summer_sale", "language": {"code": "en_US"}, "components": components, **changes}


def make_message(sandbox: Sandbox, **changes: Any) -> dict[str, Any]:
    return {
        "messaging_product": "whatsapp",
        "recipient_type": "individual",
        "to": sandbox.population.get_person(1).phone,
        "type": "template",
        "template": make_template(make_parameter("Ann")),
        "biz_opaque_callback_data": TOKEN,
        **changes,
    }


async def post(sandbox: Sandbox, http: aiohttp.ClientSession, message: Any, **changes: Any) -> tuple[int, dict[str, Any]]:
    settings = sandbox.settings
    token = changes.get("access_token", settings.access_token)
    url = f"{sandbox.url}/v25.0/{changes.get('phone_number_id', settings.phone_number_id)}/messages"
    async with http.post(url, json=message, headers={"Authorization": f"Bearer {token}"}) as response:
        return response.status, await response.json()


def list_statuses(receiver: Receiver) -> list[dict[str, Any]]:
    return [
        status
        for request in receiver.requests
        for entry in json.loads(request.body)["entry"]
        for change in entry["changes"]
        for status in change["value"]["statuses"]
    ]


async def test_messages_are_reported_in_webhooks_that_pywa_accepts(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a busy machine messages come in so slowly that few reports fall due within one tick.
    monkeypatch.setattr(webhooks, "_TICK", 0.5)
    ids = {}
    for person in sandbox.population:
        status, answer = await post(sandbox, http, make_message(sandbox, to=person.phone))
        assert status == 200
        assert answer["contacts"] == [{"input": person.phone, "wa_id": person.phone[1:]}]
        assert answer["messages"][0]["message_status"] == "accepted"
        ids[answer["messages"][0]["id"]] = person.phone[1:]
    await sandbox.outbox.drain()
    for request in receiver.requests:
        assert webhook_updates_validator(sandbox.settings.app_secret, request.body, request.headers["X-Hub-Signature-256"])
        assert request.body.isascii()
    statuses = list_statuses(receiver)
    assert len(statuses) == 300
    assert len(receiver.requests) < 150
    assert {(status["id"], status["status"]) for status in statuses} == {
        (message_id, name) for message_id in ids for name in ("sent", "delivered", "read")
    }
    for status in statuses:
        assert status["biz_opaque_callback_data"] == TOKEN
        assert status["recipient_id"] == ids[status["id"]]


async def test_recipient_without_a_plus_sign_is_misdelivered_silently(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    status, answer = await post(sandbox, http, make_message(sandbox, to="600123456"))
    assert (status, answer["contacts"][0]["wa_id"]) == (200, "1600123456")
    (entry,) = sandbox.truth.entries
    assert (entry.address, entry.signals["failed"].code) == ("+1600123456", "131049")


async def test_free_form_text_fails_outside_the_window(sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession) -> None:
    status, answer = await post(sandbox, http, make_message(sandbox, type="text", text={"body": "Hello"}))
    assert status == 200
    assert "message_status" not in answer["messages"][0]
    await sandbox.outbox.drain()
    (report,) = list_statuses(receiver)
    assert (report["status"], report["errors"][0]["code"]) == ("failed", 131047)


@pytest.mark.parametrize(
    ("share", "code"), [("whatsapp_gone", "131026"), ("whatsapp_opted_out", "131050"), ("whatsapp_capped", "131049")]
)
async def test_person_is_not_reached(
    make_settings: Callable[..., SandboxSettings], http: aiohttp.ClientSession, share: str, code: str
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, **{share: 1.0}))) as sandbox:
        status, _ = await post(sandbox, http, make_message(sandbox))
        assert status == 200
        (entry,) = sandbox.truth.entries
        assert {name: decision.code for name, decision in entry.signals.items()} == {"failed": code}


async def test_person_without_whatsapp_is_undeliverable(
    make_settings: Callable[..., SandboxSettings], http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, all_channels=0, two_channels=0))) as sandbox:
        person = next(person for person in sandbox.population if "whatsapp" not in person.channels)
        await post(sandbox, http, make_message(sandbox, to=person.phone))
        assert sandbox.truth.entries[0].signals["failed"].code == "131026"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"messaging_product": "sms"}, 100),
        ({"to": ""}, 100),
        ({"to": "Ann"}, 131009),
        ({"type": "sticker"}, 131051),
        ({"type": "text"}, 100),
        ({"biz_opaque_callback_data": "x" * 513}, 100),
        ({"template": make_template(name="Summer Sale")}, 100),
        ({"template": make_template(language="en")}, 100),
        ({"template": make_template(make_parameter(""))}, 131008),
        ({"template": make_template(make_parameter("two\nlines"))}, 132018),
        ({"template": make_template(make_parameter("a\ttab"))}, 132018),
        ({"template": make_template(make_parameter("far     away"))}, 132018),
        ({"template": make_template(make_parameter("x" * 1025))}, 132005),
        ({"template": make_template(make_parameter("a", parameter_name="first_name"), make_parameter("b"))}, 100),
        ({"template": make_template({"type": "currency", "currency": {}})}, 132012),
        ({"template": make_template(components=[{"type": "button", "sub_type": "url", "index": 0}])}, 131009),
    ],
)
async def test_message_is_refused_with_metas_code(
    sandbox: Sandbox, http: aiohttp.ClientSession, changes: dict[str, Any], code: int
) -> None:
    status, answer = await post(sandbox, http, make_message(sandbox, **changes))
    assert status == 400
    assert (answer["error"]["code"], answer["error"]["type"]) == (code, "OAuthException")
    assert sandbox.truth.entries == []


@pytest.mark.parametrize(
    "parameters",
    [
        [make_parameter("four    spaces")],
        [make_parameter("Ann", parameter_name="first_name"), make_parameter("30 %", parameter_name="discount")],
        [{"type": "currency", "currency": {"fallback_value": "$1", "code": "USD", "amount_1000": 1000}}],
    ],
)
async def test_parameters_are_taken(sandbox: Sandbox, http: aiohttp.ClientSession, parameters: list[dict[str, Any]]) -> None:
    status, _ = await post(sandbox, http, make_message(sandbox, template=make_template(*parameters)))
    assert status == 200


async def test_approved_templates_are_held_to_their_parameters(
    make_settings: Callable[..., SandboxSettings], http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(templates={"summer_sale": "Hello {{first_name}}"})) as sandbox:
        named = make_parameter("Ann", parameter_name="first_name")
        for template, code in [
            (make_template(named), None),
            (make_template(), 132000),
            (make_template(make_parameter("Ann")), 100),
            (make_template(named, name="winter_sale"), 132001),
        ]:
            _, answer = await post(sandbox, http, make_message(sandbox, template=template))
            assert answer.get("error", {}).get("code") == code


async def test_wrong_token_number_and_body_are_refused(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    status, answer = await post(sandbox, http, make_message(sandbox), access_token="wrong")
    assert (status, answer["error"]["code"]) == (401, 190)
    status, answer = await post(sandbox, http, make_message(sandbox), phone_number_id="1")
    assert (status, answer["error"]["code"]) == (400, 33)
    status, answer = await post(sandbox, http, ["no object"])
    assert (status, answer["error"]["code"]) == (400, 100)


async def test_webhook_is_repeated_until_it_is_answered_200(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    receiver.status = 204
    await post(sandbox, http, make_message(sandbox))
    await wait_for_retries(sandbox, 4)
    assert sandbox.outbox.pending == 3
    receiver.status = 200
    await sandbox.outbox.drain()
    assert all(decision.acknowledged for decision in sandbox.truth.entries[0].signals.values())


async def test_nothing_goes_to_an_address_that_does_not_know_the_verify_token(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings()) as sandbox:
        receiver.verify_token = "another"
        await post(sandbox, http, make_message(sandbox))
        await wait_for_retries(sandbox, 3)
        assert receiver.requests == []
        receiver.verify_token = sandbox.settings.verify_token
        await sandbox.outbox.drain()
        assert len(list_statuses(receiver)) == 3
