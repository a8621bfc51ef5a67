"""The part of the contract about ``verify`` and ``parse``: nothing forged gets in, nothing strange is lost, nothing raises.

Whoever finds a webhook address may post anything to it, so both methods are fed with what a provider never sends as well.
"""

from __future__ import annotations

import base64
import inspect
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from pydantic import SecretStr

from aftertouch.channels import Channel, InvalidSignature, InvalidWebhook, Receipt, Reply, Standing, Webhook, WebhookRequest
from aftertouch.testing._subject import TOKENS, UNHEARD_OF, Subject, needs

_GARBAGE = (b"", b"\x00\xff\xfe", b"{", b"null", b"0", b'"x"', b"[]", b"{}", b"[[[]]]", b"=&=&%zz", b"a" * 10_000, b"[" * 5_000)
_STRANGE: tuple[Any, ...] = (None, 0, -1, 1e300, True, "x", "", [], {}, [None], {"x": None})
_REPORTABLE = ("sent", "failed")
"""Signals of the server's own that a provider may report."""


class WebhookChecks(Subject):
    """Checks of ``verify`` and ``parse``, which are pure: the channel is built but not opened."""

    @needs("webhooks")
    def test_webhook_signed_is_verified_and_parsed(self) -> None:
        assert self.reported, "name in `reported` the signals that webhooks bring"
        channel = self.build()
        for signal in self.reported:
            request = self._sign(channel, signal)
            try:
                channel.verify(request)
            except InvalidSignature as error:
                pytest.fail(f"verify refuses the provider's own report of {signal!r}: {error!r}", pytrace=False)
            webhook = channel.parse(request)
            _require_sound(channel, webhook, f"the report of {signal!r}")
            matching = [
                receipt
                for receipt in webhook.receipts
                if receipt.signal == signal and (receipt.token == TOKENS[0] or (receipt.token is None and receipt.message_id))
            ]
            assert len(matching) == 1, (
                f"parse turned one report of {signal!r} for {TOKENS[0]} into {webhook.receipts!r} (not understood: "
                f"{webhook.unrecognized!r})"
            )

    @needs("webhooks")
    def test_webhook_forged_is_refused(self) -> None:
        channel = self.build()
        for fault, forged in self.forge(self._sign(channel, self.reported[0])).items():
            try:
                channel.verify(forged)
            except InvalidSignature:
                continue
            except Exception as error:
                pytest.fail(f"with {fault}, verify raised {error!r} where InvalidSignature is the answer", pytrace=False)
            pytest.fail(f"with {fault}, verify takes the request: anybody can report receipts", pytrace=False)

    @needs("webhooks", "signed_webhooks")
    def test_webhook_of_another_operator_is_refused(self) -> None:
        channel = self.build()
        request = self._sign(channel, self.reported[0])
        secrets = {name: value for name, value in channel.settings if isinstance(value, SecretStr)}
        changed = {name: SecretStr(f"{value.get_secret_value()}x") for name, value in secrets.items()}
        other = self.channel(channel.settings.model_copy(update=changed), webhook_url=channel.webhook_url)
        with pytest.raises(InvalidSignature):
            other.verify(request)

    @needs("webhooks")
    def test_webhook_of_garbage_raises_nothing_strange(self) -> None:
        channel = self.build()
        signed = self._sign(channel, self.reported[0])
        for body in _GARBAGE:
            request = replace(signed, body=body)
            webhook = _parse(channel, request)
            if webhook is not None and signed.body:
                assert not webhook.receipts, f"parse made {webhook.receipts!r} out of the body {body[:40]!r}"
        for headers in ({}, dict.fromkeys(signed.headers, ""), dict.fromkeys(signed.headers, "é\x00")):
            _parse(channel, replace(signed, headers=headers))
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "X"):
            _parse(channel, replace(signed, method=method))
        for path in ("no/such/path", "../..", "é"):
            _parse(channel, replace(signed, path=path))

    @needs("webhooks")
    def test_webhook_with_one_strange_part_raises_nothing_strange(self) -> None:
        channel = self.build()
        for signal in self.reported:
            signed = self._sign(channel, signal)
            for body in _vary(signed.body):
                webhook = _parse(channel, replace(signed, body=body))
                if webhook is not None:
                    _require_sound(channel, webhook, f"the body {body[:300]!r}")

    @needs("webhooks")
    def test_webhook_of_an_unknown_status_is_kept(self) -> None:
        channel = self.build()
        webhook = channel.parse(self._sign(channel, UNHEARD_OF))
        assert not webhook.receipts, f"a status that nobody knows became {webhook.receipts!r}"
        assert webhook.unrecognized, (
            "a status that nobody knows was lost: put it into Webhook.unrecognized, so that the operator learns of it"
        )

    @needs("webhooks")
    def test_webhook_parses_the_same_twice(self) -> None:
        channel = self.build()
        request = self._sign(channel, self.reported[0])
        before = deepcopy(request)
        first = channel.parse(request)
        assert request == before, "parse changed the request"
        assert channel.parse(request) == first, (
            "parse gave two answers to one request: leave Receipt.time None where the provider names no time, read no clock"
        )
        assert self.build().parse(request) == first, "parse depends on what the object has seen before"

    @needs("webhooks")
    def test_webhook_samples_say_what_was_recorded(self) -> None:
        samples = self.find_samples(Path(inspect.getfile(type(self))).parent)
        if not samples:
            assert not self.samples, f"`samples` names {self.samples!r}, where there is no .json file"
            pytest.skip("no samples were recorded")
        channel = self.build()
        for path in samples:
            sample = json.loads(path.read_text())
            webhook = channel.parse(_read_request(sample["request"], channel))
            _require_sound(channel, webhook, path.name)
            told = _write_webhook(webhook)
            assert told == sample["expect"], (
                f"{path.name} expects\n{json.dumps(sample['expect'], indent=2)}\nbut parse says\n{json.dumps(told, indent=2)}"
            )

    def _sign(self, channel: Channel, status: str) -> WebhookRequest:
        request = self.sign(channel, TOKENS[0], status)
        unlike = [name for name in request.headers if name != name.lower()]
        assert not unlike, f"sign gave the headers {unlike}; the server hands over lower-case names"
        return request


def _parse(channel: Channel, request: WebhookRequest) -> Webhook | None:
    """Verify and parse; None where the request is turned down as it should be."""
    try:
        channel.verify(request)
    except InvalidSignature:
        pass
    except Exception as error:
        pytest.fail(f"verify raised {error!r} for {request!r} with the body {request.body[:300]!r}", pytrace=False)
    try:
        return channel.parse(request)
    except InvalidWebhook:
        return None
    except Exception as error:
        pytest.fail(
            f"parse raised {error!r} for {request!r} with the body {request.body[:300]!r}: raise InvalidWebhook, or keep the "
            "part in Webhook.unrecognized and go on",
            pytrace=False,
        )


def _require_sound(channel: Channel, webhook: Webhook, source: str) -> None:
    """Whatever was parsed must be something that the server can keep."""
    assert isinstance(webhook, Webhook), f"parse gave {type(webhook).__name__} for {source}"
    known = {*(signal.name for signal in channel.signals), *_REPORTABLE}
    for receipt in webhook.receipts:
        assert receipt.signal in known, f"{source}: {receipt!r} has a signal that the channel does not declare"
        assert receipt.token or receipt.message_id, f"{source}: {receipt!r} names no message"
        for name in ("token", "message_id", "code"):
            value = getattr(receipt, name)
            assert value is None or isinstance(value, str), f"{source}: {name} of {receipt!r} is no text"
        assert receipt.time is None or receipt.time.tzinfo is not None, f"{source}: the time of {receipt!r} has no zone"
    for reply in webhook.replies:
        assert reply.signal in known, f"{source}: {reply!r} has a signal that the channel does not declare"
    inbound: list[Reply | Standing] = [*webhook.replies, *webhook.standings]
    for item in inbound:
        assert isinstance(item.address, channel.address_model), f"{source}: {item!r} has another channel's address"
        assert item.time is None or item.time.tzinfo is not None, f"{source}: the time of {item!r} has no zone"
    assert not (webhook.replies or webhook.standings) or channel.capabilities.signed_webhooks, (
        f"{source}: replies and standings are taken from signed webhooks only: anybody could end a subscription"
    )
    assert all(isinstance(item, str) for item in webhook.unrecognized), f"{source}: unrecognized has items that are no text"


def _vary(body: bytes) -> Iterator[bytes]:
    """The body with each of its parts, in turn, missing or of another kind; JSON or a form."""
    try:
        value = json.loads(body)
    except ValueError:
        pairs = parse_qsl(body.decode(errors="replace"), keep_blank_values=True)
        for at, (name, _) in enumerate(pairs):
            yield urlencode(pairs[:at] + pairs[at + 1 :]).encode()
            yield urlencode([*pairs[:at], (name, ""), *pairs[at + 1 :]]).encode()
            yield urlencode([*pairs, pairs[at]]).encode()
        return
    for path in _walk(value):
        for strange in _STRANGE:
            varied = deepcopy(value)
            part = varied
            for step in path[:-1]:
                part = part[step]
            part[path[-1]] = strange
            yield json.dumps(varied).encode()


def _walk(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield (*path, key)
        yield from _walk(value[key], (*path, key))


def _read_request(recorded: dict[str, Any], channel: Channel) -> WebhookRequest:
    encoded = recorded.get("body_base64")
    return WebhookRequest(
        method=recorded.get("method", "POST"),
        url=recorded.get("url", "{webhook}").replace("{webhook}", channel.webhook_url),
        path=recorded.get("path", ""),
        headers=recorded.get("headers", {}),
        body=base64.b64decode(encoded) if encoded is not None else _write_body(recorded.get("body", "")),
    )


def _write_body(body: Any) -> bytes:
    """A body is recorded as its text, or as the JSON value that it was, which reads better."""
    return (body if isinstance(body, str) else json.dumps(body)).encode()


def _write_webhook(webhook: Webhook) -> dict[str, Any]:
    """What was parsed, as a sample's ``expect``: without what is empty."""
    told: dict[str, Any] = {"receipts": [_write_receipt(receipt) for receipt in webhook.receipts]}
    if webhook.replies:
        told["replies"] = [_write_reply(reply) for reply in webhook.replies]
    if webhook.standings:
        told["standings"] = [_write_standing(standing) for standing in webhook.standings]
    if webhook.unrecognized:
        told["unrecognized"] = list(webhook.unrecognized)
    if webhook.answer.body:
        told["answer"] = webhook.answer.body
    return told


def _write_receipt(receipt: Receipt) -> dict[str, str]:
    return _write_fields(receipt, "signal", "token", "message_id", "code")


def _write_reply(reply: Reply) -> dict[str, str]:
    return {"address": reply.address.key, **_write_fields(reply, "signal", "message_id")}


def _write_standing(standing: Standing) -> dict[str, str]:
    return {"address": standing.address.key, **_write_fields(standing, "state", "reason")}


def _write_fields(item: Receipt | Reply | Standing, *names: str) -> dict[str, str]:
    told = {name: getattr(item, name) for name in names}
    told["time"] = item.time and item.time.isoformat()
    return {name: value for name, value in told.items() if value is not None}
