"""The part of the contract about ``send`` and ``look_up``: whatever a provider answers, or does not, becomes the honest outcome.

An outcome decides whether somebody is written off, asked again or messaged twice, so each check names what a wrong one costs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest

from aftertouch.channels import (
    Accepted,
    Address,
    Channel,
    Content,
    Finding,
    Message,
    NotTaken,
    Outcome,
    ReasonClass,
    Refused,
    TemplatesUnreadable,
    Unclear,
)
from aftertouch.testing._provider import Answer, FakeProvider, Fault, ProviderRequest, Response
from aftertouch.testing._subject import TOKENS, Subject, needs

in_own_loop = pytest.mark.asyncio(loop_scope="function")
"""Marks a check whatever the author's asyncio_mode; a loop for each keeps one check's mess out of the next."""

TROUBLE: Mapping[str, Response | Fault] = {
    "a 500": Response(status=500),
    "a 429": Response(status=429),
    "a 401": Response(status=401),
    "a 200 that says nothing": Response(status=200, body="<html>Welcome</html>"),
    "silence": Fault.STALL,
    "a reset": Fault.RESET,
}
"""Answers of a provider that say nothing of what it was asked."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What one batch led to."""

    outcomes: Sequence[Outcome]
    messages: Sequence[Message[Address, Content]]
    channel: Channel
    provider: FakeProvider


class SendingChecks(Subject):
    """Checks of ``send`` against a provider that behaves in every way that providers do."""

    @in_own_loop
    async def test_send_accepted(self) -> None:
        sent = await self._send(self.accept)
        (outcome,) = sent.outcomes
        assert isinstance(outcome, Accepted), f"the provider accepted, but send says {outcome!r}"
        assert len(outcome.message_id) <= 256, f"message_id has {len(outcome.message_id)} characters; 256 are allowed"
        assert outcome.message_id or not self._is_heard_by_message_id(sent.channel), (
            "send gave no message_id, and nothing else leads what is heard later to its message: every receipt would be lost"
        )
        undeclared = set(outcome.signals) - {signal.name for signal in self.channel.signals}
        assert not undeclared, f"Accepted.signals has {undeclared}, which the channel does not declare"
        told = [
            answer.body + "".join(answer.headers.values())
            for _, answer in sent.provider.exchanges
            if isinstance(answer, Response)
        ]
        assert any(outcome.message_id in text for text in told), f"the provider never said message_id {outcome.message_id!r}"

    @in_own_loop
    async def test_send_answers_each_message_in_order(self) -> None:
        count = min(len(TOKENS), self.channel.capabilities.batch_size)
        if count < 3:
            pytest.skip(f"{self.channel.name} takes batches of {count}")
        code = self._first_refusal()

        def answer(request: ProviderRequest) -> Response:
            refused = [self.carries_token(request, token) for token in TOKENS[:count]]
            return self.refuse(request, code) if refused[1] and sum(refused) == 1 else self.accept(request)

        sent = await self._send(answer, count=count)
        assert len(sent.outcomes) == count, f"send was given {count} messages and answered {len(sent.outcomes)}"
        if any(sum(self.carries_token(request, token) for token in TOKENS) > 1 for request in sent.provider.requests):
            assert all(isinstance(outcome, Accepted) for outcome in sent.outcomes), (
                f"a batch was accepted, send says {sent.outcomes}"
            )
            return
        kinds = [type(outcome).__name__ for outcome in sent.outcomes]
        assert kinds == ["Accepted", "Refused", *["Accepted"] * (count - 2)], (
            f"the provider refused only the second of {count} messages, but send says {kinds}: the wrong person is written off"
        )

    @in_own_loop
    async def test_send_of_nothing_asks_nobody(self) -> None:
        sent = await self._send(self.accept, count=0)
        assert list(sent.outcomes) == [], f"send was given no message and answered {sent.outcomes!r}"
        assert not sent.provider.requests, "send was given no message and asked the provider all the same"

    @in_own_loop
    async def test_send_refused_with_a_known_code(self) -> None:
        assert self.refusals, "name at least one code in `refusals`"
        for code in self.refusals:
            sent = await self._send(partial(self.refuse, code=code))
            (outcome,) = sent.outcomes
            assert isinstance(outcome, Refused), f"the provider refused with {code!r}, but send says {outcome!r}"
            assert outcome.code == code, f"the provider refused with {code!r}, but send says {outcome.code!r}"
            assert outcome.code in self.channel.reasons, f"{code!r} is missing in `reasons`, so nobody knows what may happen next"

    @in_own_loop
    async def test_send_throttled_keeps_the_delay(self) -> None:
        outcome = await self._throttle("7")
        assert outcome.retry_after == timedelta(seconds=7), (
            f"the provider said Retry-After: 7, but send says {outcome.retry_after!r}: the next try comes too early or too late"
        )

    @in_own_loop
    async def test_send_throttled_without_a_delay(self) -> None:
        outcome = await self._throttle(None)
        assert outcome.retry_after is None, f"the provider named no delay, but send says {outcome.retry_after!r}"

    @in_own_loop
    async def test_send_throttled_with_a_strange_delay(self) -> None:
        for delay in ("soon", "", "-1", "Wed, 21 Oct 2015 07:28:00 GMT", "9" * 40):
            outcome = await self._throttle(delay)
            assert outcome.retry_after is None or timedelta(0) <= outcome.retry_after, f"Retry-After: {delay} became {outcome!r}"

    @in_own_loop
    async def test_send_to_a_failing_provider_is_transient(self) -> None:
        for status in (500, 502, 503):
            sent = await self._send(_always(Response(status=status, body="<html>Sorry</html>")))
            (outcome,) = sent.outcomes
            if isinstance(outcome, Refused):
                assert self.channel.classify(outcome.code) is ReasonClass.TRANSIENT, (
                    f"the provider failed with {status}; {outcome.code!r} is {self.channel.classify(outcome.code)} in `reasons`, "
                    "not transient: people are written off for the provider's trouble"
                )
            else:
                assert isinstance(outcome, Unclear), f"the provider failed with {status}, but send says {outcome!r}"
            self._require_one_attempt(sent, f"a {status}")

    @in_own_loop
    async def test_send_accepted_in_garbled_words_is_not_refused(self) -> None:
        for body in ("", "<html>Welcome</html>", "null", "[" * 5_000):

            def answer(request: ProviderRequest, body: str = body) -> Response:
                return Response(status=self.accept(request).status, body=body)

            (outcome,) = (await self._send(answer)).outcomes
            assert isinstance(outcome, Accepted | Unclear), (
                f"the provider took the message and said so as {body[:40]!r}, but send says {outcome!r}, and it may be sent twice"
            )

    @in_own_loop
    async def test_send_to_a_silent_provider_ends_and_is_unclear(self) -> None:
        sent = await self._send(_always(Fault.STALL))
        self._require_doubt(sent.outcomes[0], "the provider read the request and never answered")
        self._require_one_attempt(sent, "silence")

    @in_own_loop
    async def test_send_after_a_reset_is_unclear(self) -> None:
        sent = await self._send(_always(Fault.RESET))
        self._require_doubt(sent.outcomes[0], "the connection was reset after the request had been read")
        self._require_one_attempt(sent, "a reset")

    @in_own_loop
    async def test_send_to_nobody_is_transient(self) -> None:
        async with self.provider_type(self.accept) as provider:
            pass
        async with self.build(provider.url) as channel, asyncio.timeout(self.patience):
            (outcome,) = await channel.send(self.make_messages(channel, provider.url))
        assert isinstance(outcome, Unclear) or (
            isinstance(outcome, Refused) and self.channel.classify(outcome.code) is ReasonClass.TRANSIENT
        ), f"the connection was refused, so the message can be tried again later; send says {outcome!r}"

    @in_own_loop
    async def test_send_follows_no_redirect(self) -> None:
        def answer(request: ProviderRequest) -> Response:
            if request.url.startswith("/elsewhere"):
                return self.accept(request)
            return Response(status=307, headers={"Location": "/elsewhere"})

        sent = await self._send(answer)
        assert not any(request.url.startswith("/elsewhere") for request in sent.provider.requests), (
            "a redirect was followed: it can carry the message and the credentials to another host; switch that off in the client"
        )
        assert not isinstance(sent.outcomes[0], Accepted), (
            f"the provider redirected and took nothing; send says {sent.outcomes[0]!r}"
        )

    @in_own_loop
    async def test_send_can_be_cancelled(self) -> None:
        async with self.provider_type(_always(Fault.STALL)) as provider, self.build(provider.url) as channel:
            sending = asyncio.ensure_future(channel.send(self.make_messages(channel, provider.url)))
            async with asyncio.timeout(self.patience):
                await provider.wait_for_requests(1)
            sending.cancel()
            await asyncio.wait([sending], timeout=self.patience)
            ended = sending.cancelled()
            assert ended, (
                "send did not end when it was cancelled: do not catch asyncio.CancelledError, and make no blocking calls; "
                "an orderly stop of the server waits for this"
            )

    @in_own_loop
    async def test_send_hands_the_token_to_the_provider(self) -> None:
        sent = await self._send(self.accept)
        assert any(self.carries_token(request, TOKENS[0]) for request in sent.provider.requests), (
            "the message's token is in no request, so no receipt can be matched: put it, unchanged, into the provider's echo "
            "field (or override carries_token where that is encoded)"
        )

    @in_own_loop
    async def test_send_again_hands_over_the_same_token(self) -> None:
        async with (
            self.provider_type(self.accept) as provider,
            self.build(provider.url) as channel,
            asyncio.timeout(self.patience),
        ):
            messages = self.make_messages(channel, provider.url)
            await channel.send(messages)
            await channel.send(messages)
        carried = [request for request in provider.requests if self.carries_token(request, TOKENS[0])]
        assert len(carried) == 2, f"a message sent twice reached the provider {len(carried)} times with its token"

    @in_own_loop
    async def test_send_keeps_private_things_out_of_outcomes_and_logs(
        self, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level(logging.DEBUG)
        ways: dict[str, Answer] = {
            "an acceptance": self.accept,
            "a refusal": partial(self.refuse, code=self._first_refusal()),
            "a 503": _always(Response(status=503)),
            "a reset": _always(Fault.RESET),
            "silence": _always(Fault.STALL),
            # Some providers repeat in an error what they were asked.
            "an echo": lambda request: Response(status=400, body=request.url + request.body.decode(errors="replace")),
        }
        for way, answer in ways.items():
            caplog.clear()
            sent = await self._send(answer)
            shown = {
                "the outcome": f"{sent.outcomes!r}",
                "the log": "\n".join(f"{record.getMessage()} {record.exc_text or ''}" for record in caplog.records),
                "the terminal": "".join(capfd.readouterr()),
            }
            for place, text in shown.items():
                leaks = self.find_leaks(text, sent.channel, sent.messages[0])
                assert not leaks, f"after {way}, {place} shows {', '.join(leaks)}"

    def _is_heard_by_message_id(self, channel: Channel) -> bool:
        """True where the provider's own name for a message is all that news of it comes with."""
        if self.channel.capabilities.fetch_receipts:
            return True
        if not self.channel.capabilities.webhooks or not self.reported:
            return False
        return any(receipt.token is None for receipt in channel.parse(self.sign(channel, TOKENS[0], self.reported[0])).receipts)

    @needs("fetch_receipts")
    @in_own_loop
    async def test_receipts_of_a_provider_in_trouble_are_none(self) -> None:
        for way, answer in TROUBLE.items():
            async with self.provider_type(self.accept) as provider, self.build(provider.url) as channel:
                (outcome,) = await channel.send(self.make_messages(channel, provider.url))
                assert isinstance(outcome, Accepted), f"the provider accepted, but send says {outcome!r}"
                provider.answer = _always(answer)
                try:
                    async with asyncio.timeout(self.patience):
                        found = await channel.fetch_receipts([outcome.message_id])
                except TimeoutError:
                    pytest.fail(f"fetch_receipts did not return within {self.patience} s: set a timeout on every call")
                except Exception as error:
                    pytest.fail(f"after {way} fetch_receipts raised {error!r}: leave out what is not known", pytrace=False)
            assert not found, f"after {way} fetch_receipts says {found!r}, where the provider said nothing"

    @needs("templates")
    @in_own_loop
    async def test_templates_of_a_provider_in_trouble_are_unreadable(self) -> None:
        for way, answer in TROUBLE.items():
            async with self.provider_type(_always(answer)) as provider, self.build(provider.url) as channel:
                (message,) = self.make_messages(channel, provider.url)
                try:
                    async with asyncio.timeout(self.patience):
                        found = await channel.list_templates()
                except TemplatesUnreadable as error:
                    told = str(error)
                except TimeoutError:
                    pytest.fail(f"list_templates did not return within {self.patience} s: set a timeout on every call")
                except Exception as error:
                    pytest.fail(f"after {way} list_templates raised {error!r}: raise TemplatesUnreadable", pytrace=False)
                else:
                    pytest.fail(f"after {way} list_templates says {found!r}, as if the account had no others", pytrace=False)
                leaks = self.find_leaks(told, channel, message)
                assert not leaks, f"after {way} list_templates says {told[:300]!r}, which shows {', '.join(leaks)}"

    @needs("look_up")
    @in_own_loop
    async def test_look_up_finds_what_was_taken(self) -> None:
        finding = await self._look_up(taken=1)
        assert isinstance(finding, Accepted), (
            f"the provider has the message, but look_up says {finding!r}: NotTaken has it sent twice, Unclear looks in vain"
        )
        assert len(finding.message_id) <= 256, f"message_id has {len(finding.message_id)} characters; 256 are allowed"

    @needs("look_up")
    @in_own_loop
    async def test_look_up_of_what_was_never_taken_finds_nothing(self) -> None:
        finding = await self._look_up(taken=0)
        assert isinstance(finding, NotTaken | Unclear), (
            f"the provider never took the message, but look_up says {finding!r}: the person is counted as reached"
        )

    @needs("look_up")
    @in_own_loop
    async def test_look_up_answers_each_message(self) -> None:
        await self._look_up(taken=0, count=min(len(TOKENS), self.channel.capabilities.batch_size))

    @needs("look_up")
    @in_own_loop
    async def test_look_up_at_a_provider_in_trouble_is_unclear(self) -> None:
        for way, answer in TROUBLE.items():
            finding = await self._look_up(taken=0, instead=answer)
            assert isinstance(finding, Unclear), (
                f"after {way} look_up says {finding!r}, where nobody knows whether the message was taken: Unclear has it looked "
                "up once more"
            )

    async def _look_up(self, *, taken: int, count: int = 1, instead: Response | Fault | None = None) -> Finding:
        """What look_up says of the first of ``count`` messages, of which the provider took the first ``taken``."""
        messages: list[Message[Address, Content]] = []

        def answer(request: ProviderRequest) -> Response | Fault:
            return instead or self.report_taken(request, messages[:taken])

        async with FakeProvider(answer) as provider, self.build(provider.url) as channel:
            messages += self.make_messages(channel, provider.url, count)
            try:
                async with asyncio.timeout(self.patience):
                    findings = await channel.look_up(messages, datetime.now(UTC) - timedelta(hours=1))
            except TimeoutError:
                pytest.fail(f"look_up did not return within {self.patience} s: set a timeout on every call")
            except Exception as error:
                pytest.fail(f"look_up raised {error!r}: a provider's trouble is Unclear, an exception a bug", pytrace=False)
        assert len(findings) == count, f"look_up was given {count} messages and answered {len(findings)}: one finding for each"
        return findings[0]

    @asynccontextmanager
    async def _sending(self, answer: Answer) -> AsyncIterator[tuple[Channel, FakeProvider]]:
        """The open channel and its provider, which fails only at messages: whatever else is asked, it accepts."""

        def answer_messages(request: ProviderRequest) -> Response | Fault:
            return answer(request) if any(self.carries_token(request, token) for token in TOKENS) else self.accept(request)

        async with self.provider_type(answer_messages) as provider, self.build(provider.url) as channel:
            yield channel, provider

    async def _send(self, answer: Answer, count: int = 1) -> Sent:
        async with self._sending(answer) as (channel, provider):
            messages = self.make_messages(channel, provider.url, count)
            try:
                async with asyncio.timeout(self.patience):
                    outcomes = await channel.send(messages)
            except TimeoutError:
                pytest.fail(
                    f"send did not return within {self.patience} s: set a timeout on every call, and make it short in `settings`"
                )
        assert len(outcomes) == count, f"send was given {count} messages and answered {len(outcomes)}"
        return Sent(outcomes=outcomes, messages=messages, channel=channel, provider=provider)

    async def _throttle(self, retry_after: str | None) -> Refused:
        (outcome,) = (await self._send(partial(self.throttle, retry_after=retry_after))).outcomes
        assert isinstance(outcome, Refused), f"the provider was asked too fast, but send says {outcome!r}"
        reason = self.channel.classify(outcome.code)
        assert reason is ReasonClass.RATE, f"the provider was asked too fast; {outcome.code!r} is {reason} in `reasons`, not rate"
        return outcome

    def _first_refusal(self) -> str:
        assert self.refusals, "name at least one code in `refusals`"
        return self.refusals[0]

    def _require_doubt(self, outcome: Outcome, event: str) -> None:
        if self.channel.capabilities.idempotent_sends and isinstance(outcome, Refused):
            reason = self.channel.classify(outcome.code)
            assert reason.is_retryable, f"{event}; {outcome.code!r} is {reason} in `reasons`, so the person is written off"
        else:
            assert isinstance(outcome, Unclear), (
                f"{event}, so the message may or may not have been taken; send says {outcome!r} where Unclear is the truth, and "
                "the person gets it twice or is taken for reached"
            )

    def _require_one_attempt(self, sent: Sent, event: str) -> None:
        attempts = sum(self.carries_token(request, TOKENS[0]) for request in sent.provider.requests)
        assert attempts == 1, (
            f"after {event} the message was tried {attempts} times in one call of send: leave retries to the server, which knows "
            "about rates and quiet hours, and switch off those of the client"
        )


def _always(answer: Response | Fault) -> Answer:
    return lambda _: answer
