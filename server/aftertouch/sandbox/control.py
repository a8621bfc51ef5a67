"""The sandbox's own switches and its ledger, under /sandbox; no provider has these."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .faults import Fault, Faults
from .meta import Meta
from .push import Push
from .truth import Truth
from .twilio import WHATSAPP, Twilio
from .webhooks import Outbox

_LONGEST_DRAIN = 600.0
_LINES_PER_CHUNK = 500


class Inbound(BaseModel):
    """What a person does."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    channel: Literal["sms", "whatsapp"]
    address: str
    text: str = ""
    preference: Literal["stop", "resume"] | None = None
    """On WhatsApp: instead of writing, in the settings."""


class Control:
    """What a demo or a test does to the world behind the providers."""

    def __init__(self, truth: Truth, faults: Faults, outbox: Outbox, twilio: Twilio, meta: Meta, push: Push) -> None:
        self._truth = truth
        self._faults = faults
        self._outbox = outbox
        self._twilio = twilio
        self._meta = meta
        self._push = push
        self.routes = [
            Route("/sandbox/truth", self._show_truth, methods=["GET"]),
            Route("/sandbox/stats", self._show_stats, methods=["GET"]),
            Route("/sandbox/drain", self._drain, methods=["POST"]),
            Route("/sandbox/reset", self._reset, methods=["POST"]),
            Route("/sandbox/faults", self._set_fault, methods=["PUT"]),
            Route("/sandbox/inbound", self._write, methods=["POST"]),
            Route("/sandbox/whatsapp-webhook", self._set_webhook, methods=["PUT"]),
        ]

    def count(self) -> dict[str, Any]:
        """Totals of what came in and what went out."""
        receipts = {"pending": self._outbox.pending, **self._outbox.counts}
        return {**self._truth.count(), "receipts": receipts, "faults": self._faults.strikes}

    async def reset(self) -> None:
        """Forget all messages, receipts that are pending, and faults."""
        await self._outbox.clear()
        self._faults.clear()
        self._truth.clear()
        self._twilio.clear()
        self._meta.clear()
        self._push.clear()

    async def _show_truth(self, request: Request) -> Response:
        query = request.query_params
        since = query.get("since", "0")
        if not since.isdecimal():
            return JSONResponse({"error": "since must be a sequence number"}, 400)
        lines = self._truth.describe(channel=query.get("channel"), token_prefix=query.get("token_prefix", ""), since=int(since))
        return StreamingResponse(_join_lines(lines), media_type="application/x-ndjson")

    async def _show_stats(self, request: Request) -> Response:
        return JSONResponse(self.count())

    async def _drain(self, request: Request) -> Response:
        try:
            async with asyncio.timeout(min(float(request.query_params.get("timeout", "60")), _LONGEST_DRAIN)):
                await self._outbox.drain()
        except TimeoutError:
            return JSONResponse(self.count(), 504)
        return JSONResponse(self.count())

    async def _reset(self, request: Request) -> Response:
        await self.reset()
        return Response(status_code=204)

    async def _set_fault(self, request: Request) -> Response:
        try:
            self._faults.set(Fault.model_validate_json(await request.body()))
        except ValidationError as problem:
            return JSONResponse(json.loads(problem.json(include_url=False)), 400)
        return Response(status_code=204)

    async def _write(self, request: Request) -> Response:
        """Let a person write to the business, or say in WhatsApp's settings what they want."""
        try:
            inbound = Inbound.model_validate_json(await request.body())
        except ValidationError as problem:
            return JSONResponse(json.loads(problem.json(include_url=False)), 400)
        if not self.write(inbound):
            return JSONResponse({"error": "nothing was ever sent to this address"}, 409)
        return Response(status_code=204)

    def write(self, inbound: Inbound) -> bool:
        """Let a person write; False when nothing was ever sent to them, so that they know nobody to write to."""
        if inbound.preference is not None:
            self._meta.prefer(inbound.address, inbound.preference)
            return True
        if inbound.channel == "sms":
            return self._twilio.receive(inbound.address, inbound.text)
        # Whoever wrote to them; a server has one provider for WhatsApp.
        return self._meta.receive(inbound.address, inbound.text) or self._twilio.receive(
            f"{WHATSAPP}{inbound.address}", inbound.text
        )

    async def _set_webhook(self, request: Request) -> Response:
        try:
            url = json.loads(await request.body())["url"]
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": 'the body must be {"url": "…"}'}, 400)
        self._meta.webhooks.url = url
        return Response(status_code=204)


async def _join_lines(lines: Iterator[str]) -> AsyncIterator[str]:
    """Chunks of lines, with room for the providers' work between them."""
    while chunk := "".join(islice(lines, _LINES_PER_CHUNK)):
        yield chunk
        await asyncio.sleep(0)
