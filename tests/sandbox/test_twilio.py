import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import pytest
from twilio.base.exceptions import TwilioRestException
from twilio.http.http_client import TwilioHttpClient
from twilio.request_validator import RequestValidator
from twilio.rest import Client

from aftertouch.sandbox import Sandbox, SandboxSettings
from aftertouch.sandbox.faults import Fault
from aftertouch.sandbox.twilio import RetryRule, count_segments, sign_callback

from .conftest import CERTAIN, Receiver, wait_for_retries

TOKEN = "AbCdEfGhIjKlMnOpQrStUvWx"


def make_fields(sandbox: Sandbox, receiver: Receiver, **changes: str) -> dict[str, str]:
    return {
        "To": sandbox.population.get_person(1).phone,
        "MessagingServiceSid": sandbox.settings.messaging_service_sid,
        "Body": "Summer Sale",
        "StatusCallback": f"{receiver.url}/sms?t={TOKEN}#rc=5&rp=all",
        **changes,
    }


def authorize(name: str, secret: str) -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(name, secret)}


async def post(sandbox: Sandbox, http: aiohttp.ClientSession, fields: dict[str, str]) -> tuple[int, dict[str, Any]]:
    settings = sandbox.settings
    url = f"{sandbox.url}/2010-04-01/Accounts/{settings.account_sid}/Messages.json"
    async with http.post(url, data=fields, headers=authorize(settings.account_sid, settings.auth_token)) as response:
        return response.status, await response.json()


async def test_message_is_reported_in_callbacks_that_twilios_own_validator_accepts(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    status, answer = await post(sandbox, http, make_fields(sandbox, receiver))
    assert (status, answer["status"], answer["num_segments"]) == (201, "accepted", "0")
    await sandbox.outbox.drain()
    validator = RequestValidator(sandbox.settings.auth_token)
    statuses = set()
    for request in receiver.requests:
        assert request.url == f"{receiver.url}/sms?t={TOKEN}"
        parameters = dict(parse_qsl(request.body.decode()))
        assert validator.validate(request.url, parameters, request.headers["X-Twilio-Signature"])
        assert parameters["MessageSid"] == answer["sid"]
        statuses.add(parameters["MessageStatus"])
    assert statuses == {"queued", "sent", "delivered"}


def test_signature_is_that_of_the_published_example() -> None:
    parameters = {
        "CallSid": "CA1234567890ABCDE",
        "Caller": "+14158675309",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
    }
    signature = sign_callback("12345", "https://mycompany.com/myapp.php?foo=1&bar=2", parameters)
    assert signature == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


def make_client(sandbox: Sandbox) -> Client:
    http_client = TwilioHttpClient(timeout=60, pool_connections=False)
    client = Client(sandbox.settings.account_sid, sandbox.settings.auth_token, http_client=http_client)
    client.api.base_url = sandbox.url
    return client


async def test_twilios_own_client_lists_page_by_page(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(time_scale=100_000.0)) as sandbox:
        person, other = (sandbox.population.get_person(number).phone for number in (3, 4))
        for to, body in ((person, "1"), (other, "2"), (person, "3"), (person, "4")):
            status, _ = await post(sandbox, http, make_fields(sandbox, receiver, To=to, Body=body))
            assert status == 201
        messages = make_client(sandbox).messages

        async def read(**query: Any) -> list[str]:
            listed = await asyncio.to_thread(messages.list, page_size=2, **query)
            return [message.body for message in listed]

        assert await read() == ["4", "3", "2", "1"]
        assert await read(to=person) == await read(from_=sandbox.settings.sender, to=person) == ["4", "3", "1"]
        assert await read(from_="+34600000000") == []
        # What waits has no date yet, and is not found by one.
        assert await read(to=person, date_sent_after=datetime.now(UTC).date() - timedelta(days=1)) == []


async def test_list_is_cut_down_to_a_date(sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession) -> None:
    await post(sandbox, http, make_fields(sandbox, receiver))
    await sandbox.outbox.drain()
    messages, today = make_client(sandbox).messages, datetime.now(UTC).date()
    for query, count in (
        ({"date_sent_after": today - timedelta(days=1)}, 1),
        ({"date_sent_after": today + timedelta(days=2)}, 0),
        ({"date_sent_before": today + timedelta(days=2)}, 1),
        ({"date_sent_before": today - timedelta(days=2)}, 0),
        ({"date_sent": today - timedelta(days=2)}, 0),
    ):
        assert len(await asyncio.to_thread(messages.list, **query)) == count


async def test_twilios_own_client_sends_and_fetches(sandbox: Sandbox, receiver: Receiver) -> None:
    settings = sandbox.settings
    client = make_client(sandbox)

    def send(to: str) -> Any:
        return client.messages.create(
            to=to,
            messaging_service_sid=settings.messaging_service_sid,
            body="Hello",
            status_callback=f"{receiver.url}/sms?t={TOKEN}",
        )

    message = await asyncio.to_thread(send, sandbox.population.get_person(2).phone)
    assert message.status == "accepted"
    await sandbox.outbox.drain()
    fetched = await asyncio.to_thread(client.messages(message.sid).fetch)
    assert (fetched.status, fetched.error_code, fetched.body) == ("delivered", None, "Hello")
    with pytest.raises(TwilioRestException) as refused:
        await asyncio.to_thread(send, "+15005550004")
    assert (refused.value.status, refused.value.code) == (400, 21610)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"To": ""}, 21604),
        ({"To": "6505551234"}, 21211),
        ({"To": "whatsapp:600000000"}, 21211),
        ({"To": "whatsapp:+34600000000", "From": "+15005550006"}, 21910),
        ({"To": "whatsapp:+34600000000", "From": "whatsapp:+15005550006"}, 63007),
        ({"From": "whatsapp:+14155238886"}, 21910),
        ({"To": "+15005550001"}, 21211),
        ({"To": "+15005550009"}, 21614),
        ({"MessagingServiceSid": ""}, 21603),
        ({"MessagingServiceSid": "MG00000000000000000000000000000000"}, 21701),
        ({"From": "+15005550007"}, 21606),
        ({"From": "+34600000000"}, 21606),
        ({"From": "+15005550001"}, 21212),
        ({"Body": ""}, 21602),
        ({"Body": "x" * 1601}, 21617),
        ({"ContentSid": "HX1", "ContentVariables": "[]"}, 21656),
        ({"ContentSid": "HX1", "ContentVariables": '{"1": 1}'}, 21656),
        ({"ContentSid": "HX1"}, 21655),
        ({"StatusCallback": "http://my_host/sms"}, 21609),
        ({"StatusCallback": "/sms"}, 21609),
        ({"ValidityPeriod": "36001"}, 20001),
    ],
)
async def test_field_is_refused_with_twilios_code(
    sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession, changes: dict[str, str], code: int
) -> None:
    status, answer = await post(sandbox, http, make_fields(sandbox, receiver, **changes))
    assert answer["code"] == code
    assert answer["status"] == status >= 400
    assert answer["more_info"] == f"https://www.twilio.com/docs/errors/{code}"
    assert sandbox.truth.entries == []


async def test_json_and_wrong_credentials_are_refused(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    settings = sandbox.settings
    url = f"{sandbox.url}/2010-04-01/Accounts/{settings.account_sid}/Messages.json"
    headers = authorize(settings.account_sid, settings.auth_token)
    async with http.post(url, json={"To": "+34600000000"}, headers=headers) as response:
        assert response.status == 415
    for wrong in ({}, authorize(settings.account_sid, "wrong")):
        async with http.post(url, data={"To": "+34600000000"}, headers=wrong) as response:
            assert (response.status, (await response.json())["code"]) == (401, 20003)
    async with http.get(url.replace("Messages.json", "Messages/SM0.json"), headers=headers) as response:
        assert (response.status, (await response.json())["code"]) == (404, 20404)


@pytest.mark.parametrize(("share", "code"), [("sms_opted_out", 21610), ("sms_gone", 21211)])
async def test_person_is_refused_for_good(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession, share: str, code: int
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, **{share: 1.0}))) as sandbox:
        for _ in range(2):
            status, answer = await post(sandbox, http, make_fields(sandbox, receiver))
            assert (status, answer["code"]) == (400, code)
        assert [entry.refused for entry in sandbox.truth.entries] == [str(code)] * 2


async def test_unreachable_phone_is_undelivered(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, sms_unreachable=1.0))) as sandbox:
        await post(sandbox, http, make_fields(sandbox, receiver))
        await sandbox.outbox.drain()
        reports = [dict(parse_qsl(request.body.decode())) for request in receiver.requests]
        assert ("undelivered", "30003") in {(report["MessageStatus"], report.get("ErrorCode")) for report in reports}
        (entry,) = sandbox.truth.entries
        assert entry.signals["failed"].code == "30003"
        assert entry.signals["failed"].acknowledged
        assert "delivered" not in entry.signals


@pytest.mark.parametrize(
    ("fragment", "failure", "retries"),
    [
        ("", "ct", 1),
        ("", "503", 0),
        ("#rc=5&rp=all", "503", 5),
        ("#rc=2&rp=5xx,ct", "503", 2),
        ("#rc=2&rp=5xx,ct", "404", 0),
        ("#rc=9&rp=everything", "ct", 1),
        ("#rc=0", "ct", 0),
    ],
)
def test_retry_rule_is_read_from_the_fragment(fragment: str, failure: str, retries: int) -> None:
    rule = RetryRule.read(f"https://example.com/sms?t=x{fragment}")
    wanted = [rule.wants_retry(attempts, 1.0, failure) for attempts in range(1, 8)]
    assert wanted == [True] * retries + [False] * (7 - retries)
    assert not rule.wants_retry(1, 16.0, "ct")


async def test_strict_callback_is_lost_after_the_retries_that_were_asked_for(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    receiver.status = 503
    async with Sandbox(make_settings(strict_retries=True)) as sandbox:
        fields = make_fields(sandbox, receiver, StatusCallback=f"{receiver.url}/sms?t={TOKEN}#rc=2&rp=5xx")
        await post(sandbox, http, fields)
        await sandbox.outbox.drain()
        assert len(receiver.requests) == 3 * 3
        assert len({request.headers["I-Twilio-Idempotency-Token"] for request in receiver.requests}) == 3
        assert sandbox.outbox.counts["lost"] == 3
        assert not any(decision.acknowledged for decision in sandbox.truth.entries[0].signals.values())


async def test_callback_outlives_the_receivers_absence(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    receiver = Receiver(sandbox.settings.verify_token)
    bound = receiver.bind()
    await post(sandbox, http, make_fields(sandbox, receiver))
    await wait_for_retries(sandbox, 6)
    runner = await receiver.start(bound)
    await sandbox.outbox.drain()
    await runner.cleanup()
    assert len(receiver.requests) == 3
    assert sandbox.outbox.counts["lost"] == 0


@pytest.mark.parametrize(
    ("body", "segments"),
    [("x" * 160, 1), ("x" * 161, 2), ("€" * 81, 2), ("ж" * 70, 1), ("ж" * 71, 2), ("x" * 306, 2), ("🎉" * 36, 2)],
)
def test_segments_are_counted_as_they_are_billed(body: str, segments: int) -> None:
    assert count_segments(body) == segments


# WhatsApp

CONTENT_SID = "HX" + "1" * 32


def make_whatsapp_fields(sandbox: Sandbox, receiver: Receiver, **changes: str) -> dict[str, str]:
    return {
        "To": f"whatsapp:{sandbox.population.get_person(1).phone}",
        "From": f"whatsapp:{sandbox.settings.whatsapp_sender}",
        "ContentSid": CONTENT_SID,
        "ContentVariables": '{"1": "Ann"}',
        "StatusCallback": f"{receiver.url}/whatsapp?t={TOKEN}#rc=5&rp=all",
        **changes,
    }


async def test_message_on_whatsapp_is_reported_up_to_read_and_answered(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, whatsapp_replied=1.0))) as sandbox:
        status, answer = await post(sandbox, http, make_whatsapp_fields(sandbox, receiver))
        assert (status, answer["status"], answer["from"]) == (201, "queued", f"whatsapp:{sandbox.settings.whatsapp_sender}")
        await sandbox.outbox.drain()
        validator = RequestValidator(sandbox.settings.auth_token)
        forms = []
        for request in receiver.requests:
            forms.append(dict(parse_qsl(request.body.decode())))
            assert validator.validate(request.url, forms[-1], request.headers["X-Twilio-Signature"])
        reports = {form["MessageStatus"]: form for form in forms if "MessageStatus" in form}
        assert reports.keys() == {"sent", "delivered", "read"}
        assert {form["To"] for form in reports.values()} == {f"whatsapp:{sandbox.population.get_person(1).phone}"}
        assert (reports["read"]["EventType"], reports["read"]["ChannelPrefix"]) == ("READ", "whatsapp")
        [reply] = [form for form in forms if form["SmsStatus"] == "received"]
        assert (reply["ButtonText"], reply["ButtonPayload"]) == ("Tell me more", "more")
        assert reply["OriginalRepliedMessageSid"] == answer["sid"]
        [entry] = sandbox.truth.entries
        assert (entry.channel, entry.token, entry.message_id) == ("whatsapp", TOKEN, answer["sid"])
        assert entry.signals.keys() == {"sent", "delivered", "read", "replied"}
        assert all(decision.acknowledged for decision in entry.signals.values())
        fetched = await asyncio.to_thread(make_client(sandbox).messages(answer["sid"]).fetch)
        assert fetched.status == "read"


@pytest.mark.parametrize(
    ("share", "changes", "status", "code"),
    [
        ("whatsapp_gone", {}, "undelivered", "63024"),
        ("whatsapp_opted_out", {}, "undelivered", "63014"),
        ("whatsapp_capped", {}, "undelivered", "63049"),
        ("whatsapp_replied", {"ContentSid": "", "Body": "Hello"}, "failed", "63016"),
    ],
)
async def test_person_on_whatsapp_is_not_reached_for_metas_reasons(
    make_settings: Callable[..., SandboxSettings],
    receiver: Receiver,
    http: aiohttp.ClientSession,
    share: str,
    changes: dict[str, str],
    status: str,
    code: str,
) -> None:
    async with Sandbox(make_settings(shares=replace(CERTAIN, **{share: 1.0}))) as sandbox:
        answered, _ = await post(sandbox, http, make_whatsapp_fields(sandbox, receiver, **changes))
        assert answered == 201
        await sandbox.outbox.drain()
        [form] = [dict(parse_qsl(request.body.decode())) for request in receiver.requests]
        assert (form["MessageStatus"], form["ErrorCode"]) == (status, code)
        [entry] = sandbox.truth.entries
        assert entry.signals["failed"].code == code


async def test_templates_are_listed_page_by_page_with_their_approval(
    make_settings: Callable[..., SandboxSettings], receiver: Receiver, http: aiohttp.ClientSession
) -> None:
    templates = {"summer_sale": "{{1}}, {{2}} off", "winter_sale": "Hello", "spring_sale": "Hello {{first_name}}"}
    settings = make_settings(templates=templates, template_statuses={"winter_sale": "PAUSED"})
    async with Sandbox(settings) as sandbox:
        target = f"{sandbox.url}/v1/ContentAndApprovals"
        contents = []
        following: str | None = f"{target}?PageSize=2"
        while following:
            async with http.get(following, headers=authorize(settings.account_sid, settings.auth_token)) as response:
                page = await response.json()
            contents += page["contents"]
            following = page["meta"]["next_page_url"]
            if following:
                assert following.startswith("https://content.twilio.com/v1/ContentAndApprovals?")
                following = following.replace("https://content.twilio.com", sandbox.url)
        shown = {item["approval_requests"]["name"]: item for item in contents}
        assert {name: item["types"]["twilio/text"]["body"] for name, item in shown.items()} == templates
        assert list(shown["summer_sale"]["variables"]) == ["1", "2"]
        assert {name: item["approval_requests"]["status"] for name, item in shown.items()} == {
            "summer_sale": "approved",
            "winter_sale": "paused",
            "spring_sale": "approved",
        }
        async with http.get(target) as response:
            assert response.status == 401

        status, _ = await post(sandbox, http, make_whatsapp_fields(sandbox, receiver, ContentSid=shown["summer_sale"]["sid"]))
        assert status == 201
        status, answer = await post(sandbox, http, make_whatsapp_fields(sandbox, receiver, ContentSid="HX" + "3" * 32))
        assert (status, answer["code"]) == (400, 21655)


async def test_fault_of_whatsapp_strikes_no_text(sandbox: Sandbox, receiver: Receiver, http: aiohttp.ClientSession) -> None:
    sandbox.faults.set(Fault(channel="whatsapp", mode="429"))
    assert (await post(sandbox, http, make_fields(sandbox, receiver)))[0] == 201
    status, answer = await post(sandbox, http, make_whatsapp_fields(sandbox, receiver))
    assert (status, answer["code"]) == (429, 20429)
