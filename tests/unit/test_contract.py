"""The contract suite finds what it is there to find: the example channel, broken in one way at a time, fails one check.

Each break is a mistake that real adapters make. A check that no break can trip is not worth an author's time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aftertouch_console
import aiohttp
import pytest
from aftertouch_console import ConsoleAddress, ConsoleChannel, ConsoleSettings

from aftertouch.channels import (
    Accepted,
    Action,
    Address,
    Capabilities,
    Channel,
    Content,
    Finding,
    InvalidSignature,
    Limit,
    Message,
    NotTaken,
    Outcome,
    Receipt,
    Refused,
    Template,
    TemplatesUnreadable,
    Unclear,
    Webhook,
    WebhookRequest,
)
from aftertouch.testing import ChannelContract, FakeProvider, ProviderRequest, Response

Messages = Sequence[Message[Address, Content]]


class Contract(ChannelContract):
    settings = {
        "url": "{provider}/messages",
        "api_key": "key-that-nobody-sees",
        "webhook_secret": "secret-that-nobody-sees",
        "timeout_seconds": "2",
    }
    address = {"inbox": "adas-private-inbox"}
    content = {"text": "Words for Ada only"}
    refusals = ("no_such_inbox",)
    reported = ("delivered", "failed")
    signature_header = "x-console-signature"
    patience = 8

    def accept(self, request: ProviderRequest) -> Response:
        return Response.from_json({"id": f"message-{request.read_json()['reference']}"}, status=202)

    def refuse(self, request: ProviderRequest, code: str) -> Response:
        return Response.from_json({"error": code}, status=422)

    def report_taken(self, request: ProviderRequest, taken: Messages) -> Response:
        return Response.from_json({"taken": [message.token for message in taken]})

    def sign(self, channel: Channel, token: str, status: str) -> WebhookRequest:
        body = json.dumps({"events": [{"reference": token, "status": status, "error": "x"}]}).encode()
        signature = hmac.new(b"secret-that-nobody-sees", body, hashlib.sha256).hexdigest()
        return WebhookRequest(
            method="POST", url=channel.webhook_url, path="", headers={"x-console-signature": signature}, body=body
        )


class NeverSaysUnclear(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="unavailable") if isinstance(was, Unclear) else was for was in await super().send(messages)]


class TakesSilenceForSuccess(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return [Accepted() if isinstance(was, Unclear) else was for was in await super().send(messages)]


class AnswersBackwards(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return (await super().send(messages))[::-1]


class AnswersOnlyTheFirst(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return (await super().send(messages))[:1]


class MakesUpIds(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return [replace(was, message_id="made-up") if isinstance(was, Accepted) else was for was in await super().send(messages)]


class ForgetsTheDelay(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return [replace(was, retry_after=None) if isinstance(was, Refused) else was for was in await super().send(messages)]


class InventsADelay(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        delay = timedelta(seconds=7)
        return [replace(was, retry_after=delay) if isinstance(was, Refused) else was for was in await super().send(messages)]


class BlamesThePerson(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return [Refused(code="no_such_inbox") if isinstance(was, Refused) else was for was in await super().send(messages)]


class RaisesWhenNobodyAnswers(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        outcomes = await super().send(messages)
        if Refused(code="connect_error") in outcomes:
            raise ConnectionError
        return outcomes


class TriesAgainItself(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        outcomes = await super().send(messages)
        return outcomes if all(isinstance(was, Accepted) for was in outcomes) else await super().send(messages)


class SendsWhenThereIsNothing(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        if not messages:
            async with self._session.post(str(self.settings.url), json={"reference": ""}) as answer:
                await answer.read()
        return await super().send(messages)


class IgnoresCancelling(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        try:
            return await super().send(messages)
        except asyncio.CancelledError:
            return [Unclear(detail="cancelled") for _ in messages]


class SendsItsOwnToken(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return await super().send([replace(message, token=message.token[::-1]) for message in messages])


class LogsTheBody(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        logging.getLogger("acme").debug("sending %s", messages[0].content)
        return await super().send(messages)


class PrintsTheAddress(ConsoleChannel):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        print(messages[0].address.key)
        return await super().send(messages)


class ShowsItsSettings(ConsoleChannel):
    def __repr__(self) -> str:
        return f"<console {self.settings.api_key.get_secret_value()}>"


class FollowsRedirects(ConsoleChannel):
    async def __aenter__(self) -> FollowsRedirects:
        await super().__aenter__()
        post = self._session.post
        self._session.post = lambda *a, **k: post(*a, **{**k, "allow_redirects": True})  # type: ignore[method-assign]
        return self


class WaitsForever(ConsoleChannel):
    async def __aenter__(self) -> WaitsForever:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60))
        return self


class VerifiesNothing(ConsoleChannel):
    def verify(self, request: WebhookRequest) -> None:
        return


class VerifiesWithAFixedKey(ConsoleChannel):
    def verify(self, request: WebhookRequest) -> None:
        expected = hmac.new(b"secret-that-nobody-sees", request.body, hashlib.sha256).hexdigest()
        if expected != request.headers.get("x-console-signature"):
            raise InvalidSignature


class VerifiesText(ConsoleChannel):
    """hmac.compare_digest raises TypeError for text outside ASCII."""

    def verify(self, request: WebhookRequest) -> None:
        expected = hmac.new(b"secret-that-nobody-sees", request.body, hashlib.sha256).hexdigest()
        if not hmac.compare_digest(expected, request.headers.get("x-console-signature", "")):
            raise InvalidSignature


class TrustsTheBody(ConsoleChannel):
    def parse(self, request: WebhookRequest) -> Webhook:
        events = json.loads(request.body)["events"]
        return Webhook(receipts=tuple(Receipt(signal=event["status"], token=event["reference"]) for event in events))


class LosesWhatItDoesNotKnow(ConsoleChannel):
    def parse(self, request: WebhookRequest) -> Webhook:
        return replace(super().parse(request), unrecognized=())


class ReadsTheClock(ConsoleChannel):
    def parse(self, request: WebhookRequest) -> Webhook:
        webhook = super().parse(request)
        return replace(webhook, receipts=tuple(replace(was, time=datetime.now(UTC)) for was in webhook.receipts))


class ForgetsTheZone(ConsoleChannel):
    def parse(self, request: WebhookRequest) -> Webhook:
        webhook = super().parse(request)
        return replace(webhook, receipts=tuple(replace(was, time=datetime(2026, 3, 1)) for was in webhook.receipts))


class SendsInBulk(ConsoleChannel):
    """A provider that takes many messages in one request, as some do."""

    async def send(self, messages: Messages) -> Sequence[Outcome]:
        if not messages:
            return []
        texts = [{"reference": message.token} for message in messages]
        async with self._session.post(str(self.settings.url), json=texts) as answer:
            return [Accepted(message_id=name) for name in (await answer.json())["ids"]]


class BulkContract(Contract):
    channel = SendsInBulk

    def accept(self, request: ProviderRequest) -> Response:
        return Response.from_json({"ids": [f"message-{item['reference']}" for item in request.read_json()]})


class OpenSecrets(ConsoleSettings):
    api_key: str  # type: ignore[assignment]


class KeepsSecretsOpen(ConsoleChannel):
    settings_model = OpenSecrets


class LooseAddress(ConsoleAddress):
    model_config = {"extra": "ignore"}


class TakesAnyField(ConsoleChannel):
    address_model = LooseAddress


class RaisesKeyError(ConsoleChannel):
    def parse_address(self, values: Any) -> Address:
        return ConsoleAddress(inbox=values["inbox"])


class CountsEverybody(ConsoleChannel):
    actions = (Action(name="not_read", label="Didn't read", short_name="not read", expression="~read"),)


class CountsTwice(ConsoleChannel):
    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return [Limit(key="account"), Limit(key="account", interval=timedelta(seconds=1))]


class NamesTheAddress(ConsoleChannel):
    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return [Limit(key=f"inbox-{message.address.key}")]


class NamesNoLimit(ConsoleChannel):
    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return [Limit(key="")]


class NamesAtLength(ConsoleChannel):
    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return [Limit(key="account" * 30)]


class GoesBackInTime(ConsoleChannel):
    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        return [Limit(key="account", interval=timedelta(seconds=-1))]


class LimitsByWord(ConsoleChannel):
    def limits(self, message: Message[Address, Content]) -> Any:
        return ["account"]


class CountsItself(ConsoleChannel):
    calls = 0

    def limits(self, message: Message[Address, Content]) -> Sequence[Limit]:
        type(self).calls += 1
        return [Limit(key=f"sender-{self.calls % 2}")]


class LooksUp(ConsoleChannel):
    """A provider that can be asked for the messages that it took."""

    capabilities = Capabilities(look_up=True)

    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        try:
            async with self._session.get(str(self.settings.url), params={"since": since.isoformat()}) as answer:
                taken = (await answer.json())["taken"] if answer.status == 200 else None
        except (aiohttp.ClientError, TimeoutError) as error:
            return [Unclear(detail=type(error).__name__) for _ in messages]
        if taken is None:
            return [Unclear(detail="no list") for _ in messages]
        return [Accepted(message_id="found") if message.token in taken else NotTaken() for message in messages]


class LooksUpInSecret(LooksUp):
    capabilities = Capabilities()


class PromisesToLookUp(ConsoleChannel):
    capabilities = Capabilities(look_up=True)


class Fetches(ConsoleChannel):
    capabilities = Capabilities(fetch_receipts=True)

    async def fetch_receipts(self, message_ids: Sequence[str]) -> Sequence[Receipt]:
        return ()


class NamesNoMessage(Fetches):
    async def send(self, messages: Messages) -> Sequence[Outcome]:
        return [replace(outcome, message_id="") for outcome in await super().send(messages) if isinstance(outcome, Accepted)]


class MakesReceiptsUp(Fetches):
    async def fetch_receipts(self, message_ids: Sequence[str]) -> Sequence[Receipt]:
        return [Receipt(signal="delivered", message_id=message_id) for message_id in message_ids]


class FailsToFetch(Fetches):
    async def fetch_receipts(self, message_ids: Sequence[str]) -> Sequence[Receipt]:
        raise LookupError("nobody answers")


class Lists(ConsoleChannel):
    capabilities = Capabilities(templates=True)

    async def list_templates(self) -> Sequence[Template]:
        raise TemplatesUnreadable("nobody answers")


class ListsNothing(Lists):
    async def list_templates(self) -> Sequence[Template]:
        return ()


class FailsToList(Lists):
    async def list_templates(self) -> Sequence[Template]:
        raise LookupError("nobody answers")


class FindsNothing(LooksUp):
    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        return [Unclear(detail="never") for _ in messages]


class FindsEverything(LooksUp):
    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        return [Accepted() for _ in messages]


class FindsOne(LooksUp):
    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        return (await super().look_up(messages, since))[:1]


class TakesTroubleForNo(LooksUp):
    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        return [NotTaken() if isinstance(found, Unclear) else found for found in await super().look_up(messages, since)]


class RaisesInTrouble(LooksUp):
    async def look_up(self, messages: Messages, since: datetime) -> Sequence[Finding]:
        if any(isinstance(found, Unclear) for found in await super().look_up(messages, since)):
            raise ConnectionError("no list")
        return await super().look_up(messages, since)


class NeedsNoWebhooks(ConsoleChannel):
    capabilities = Capabilities(webhooks=False)


BREAKS: list[tuple[type[ConsoleChannel], str]] = [
    (NeverSaysUnclear, "test_send_to_a_silent_provider_ends_and_is_unclear"),
    (NeverSaysUnclear, "test_send_after_a_reset_is_unclear"),
    (TakesSilenceForSuccess, "test_send_to_a_silent_provider_ends_and_is_unclear"),
    (TakesSilenceForSuccess, "test_send_after_a_reset_is_unclear"),
    (AnswersBackwards, "test_send_answers_each_message_in_order"),
    (AnswersOnlyTheFirst, "test_send_answers_each_message_in_order"),
    (MakesUpIds, "test_send_accepted"),
    (ForgetsTheDelay, "test_send_throttled_keeps_the_delay"),
    (InventsADelay, "test_send_throttled_without_a_delay"),
    (BlamesThePerson, "test_send_to_a_failing_provider_is_transient"),
    (BlamesThePerson, "test_send_to_nobody_is_transient"),
    (RaisesWhenNobodyAnswers, "test_send_to_nobody_is_transient"),
    (TriesAgainItself, "test_send_to_a_failing_provider_is_transient"),
    (TriesAgainItself, "test_send_after_a_reset_is_unclear"),
    (SendsWhenThereIsNothing, "test_send_of_nothing_asks_nobody"),
    (IgnoresCancelling, "test_send_can_be_cancelled"),
    (SendsItsOwnToken, "test_send_hands_the_token_to_the_provider"),
    (SendsItsOwnToken, "test_send_again_hands_over_the_same_token"),
    (LogsTheBody, "test_send_keeps_private_things_out_of_outcomes_and_logs"),
    (PrintsTheAddress, "test_send_keeps_private_things_out_of_outcomes_and_logs"),
    (ShowsItsSettings, "test_repr_shows_nothing_private"),
    (FollowsRedirects, "test_send_follows_no_redirect"),
    (WaitsForever, "test_send_to_a_silent_provider_ends_and_is_unclear"),
    (VerifiesNothing, "test_webhook_forged_is_refused"),
    (VerifiesWithAFixedKey, "test_webhook_of_another_operator_is_refused"),
    (VerifiesText, "test_webhook_forged_is_refused"),
    (TrustsTheBody, "test_webhook_of_garbage_raises_nothing_strange"),
    (TrustsTheBody, "test_webhook_with_one_strange_part_raises_nothing_strange"),
    (TrustsTheBody, "test_webhook_of_an_unknown_status_is_kept"),
    (LosesWhatItDoesNotKnow, "test_webhook_of_an_unknown_status_is_kept"),
    (ReadsTheClock, "test_webhook_parses_the_same_twice"),
    (ForgetsTheZone, "test_webhook_signed_is_verified_and_parsed"),
    (KeepsSecretsOpen, "test_settings_that_are_secret_are_secret_strings"),
    (TakesAnyField, "test_declarations_have_schemas_that_travel"),
    (RaisesKeyError, "test_address_that_is_strange_is_refused_in_words"),
    (CountsEverybody, "test_declarations_are_valid"),
    (CountsTwice, "test_limits_are_few_named_and_private"),
    (NamesTheAddress, "test_limits_are_few_named_and_private"),
    (NamesNoLimit, "test_limits_are_few_named_and_private"),
    (NamesAtLength, "test_limits_are_few_named_and_private"),
    (GoesBackInTime, "test_limits_are_few_named_and_private"),
    (LimitsByWord, "test_limits_are_few_named_and_private"),
    (CountsItself, "test_limits_are_few_named_and_private"),
    (LooksUpInSecret, "test_optional_methods_are_declared_where_they_are_written"),
    (PromisesToLookUp, "test_optional_methods_are_declared_where_they_are_written"),
    (NamesNoMessage, "test_send_accepted"),
    (MakesReceiptsUp, "test_receipts_of_a_provider_in_trouble_are_none"),
    (FailsToFetch, "test_receipts_of_a_provider_in_trouble_are_none"),
    (ListsNothing, "test_templates_of_a_provider_in_trouble_are_unreadable"),
    (FailsToList, "test_templates_of_a_provider_in_trouble_are_unreadable"),
    (FindsNothing, "test_look_up_finds_what_was_taken"),
    (FindsEverything, "test_look_up_of_what_was_never_taken_finds_nothing"),
    (FindsOne, "test_look_up_answers_each_message"),
    (TakesTroubleForNo, "test_look_up_at_a_provider_in_trouble_is_unclear"),
    (RaisesInTrouble, "test_look_up_at_a_provider_in_trouble_is_unclear"),
]


async def run_check(
    channel: type[ConsoleChannel], check: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    contract = type("Broken", (Contract,), {"channel": channel})()
    method = getattr(contract, check)
    fixtures = {"caplog": caplog, "capfd": capfd}
    answer = method(**{name: fixtures[name] for name in inspect.signature(method).parameters})
    if inspect.isawaitable(answer):
        await answer


@pytest.mark.parametrize(("channel", "check"), BREAKS, ids=lambda value: getattr(value, "__name__", value))
async def test_contract_finds_a_channel_that(
    channel: type[ConsoleChannel], check: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    kinds = {"look_up": LooksUp, "templates": Lists, "test_receipts": Fetches}
    sound = next((kind for part, kind in kinds.items() if part in check), ConsoleChannel)
    await run_check(sound, check, caplog, capfd)
    with pytest.raises((AssertionError, pytest.fail.Exception, ConnectionError)) as caught:
        await run_check(channel, check, caplog, capfd)
    assert str(caught.value) or caught.type is ConnectionError, "a failure must say what is wrong"


def test_contract_has_no_checks_of_what_is_not_declared() -> None:
    contract = type("Contract", (ChannelContract,), {"channel": NeedsNoWebhooks})
    every = {name for name in dir(ChannelContract) if name.startswith("test_")}
    left_out = {name for name in every if getattr(contract, name) is None}
    assert left_out == {
        name for name in every if name.startswith(("test_webhook_", "test_look_up_", "test_templates_", "test_receipts_"))
    }


async def test_contract_fits_a_channel_that_sends_in_bulk() -> None:
    contract = BulkContract()
    await contract.test_send_accepted()
    await contract.test_send_answers_each_message_in_order()
    await contract.test_send_of_nothing_asks_nobody()
    await contract.test_send_again_hands_over_the_same_token()


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_contract_runs_in_a_foreign_project(tmp_path: Path, mode: str) -> None:
    """An author's project: a channel module and one test file, in a folder with nothing of ours."""
    console = Path(aftertouch_console.__file__).parent
    (tmp_path / "aftertouch_console.py").write_text((console / "aftertouch_console.py").read_text())
    (tmp_path / "test_mine.py").write_text(
        (console / "tests" / "test_console.py").read_text().replace('    samples = "samples"\n', "")
    )
    options = ["-q", "-p", "no:cacheprovider", "-W", "error", "-o", f"asyncio_mode={mode}"]
    options += ["-o", "asyncio_default_fixture_loop_scope=function"]  # pytest-asyncio warns of it where it is unset
    root = Path(inspect.getfile(Channel)).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # The samples.
    assert "1 skipped" in run.stdout


def test_contract_import_check_finds_io_at_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(aftertouch_console.__file__).read_text()
    (tmp_path / "hasty_channel.py").write_text(
        source + "\nimport socket\nsocket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', 9))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    channel = type("Hasty", (ConsoleChannel,), {"__module__": "hasty_channel"})
    contract = type("Broken", (Contract,), {"channel": channel})()
    with pytest.raises(AssertionError, match=r"import hasty_channel does or prints: socket\.connect"):
        contract.test_import_does_no_io()


async def test_provider_raises_a_mistake_of_the_test_itself() -> None:
    def answer(request: ProviderRequest) -> Response:
        raise LookupError("no such answer")

    with pytest.raises(LookupError, match="no such answer"):
        async with FakeProvider(answer) as provider, aiohttp.ClientSession() as session, session.get(provider.url) as got:
            assert got.status == 500
