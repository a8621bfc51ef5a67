"""Webhooks: every channel's provider reports below ``/v1/webhooks/<channel>``.

A request is verified and parsed by the channel, its receipts are made durable, and only then is it answered: 2xx means
stored. A provider whose request could not be stored, not even in the spool, gets 503 and sends it again.
"""

from __future__ import annotations

import sqlite3

import structlog
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from aftertouch.channels import InvalidSignature, InvalidWebhook, WebhookRequest
from aftertouch.errors import AftertouchError
from aftertouch.ingest.intake import Intake
from aftertouch.ingest.ledger import TokenInvalid
from aftertouch.ingest.spool import SpoolFull
from aftertouch.plugins import Registry

log = structlog.get_logger()

LARGEST_BODY = 3 * 1024 * 1024 + 65_536
"""Meta's webhooks hold up to 3 MB (Cloud API: webhooks); other providers stay far below."""

WEBHOOKS = "/v1/webhooks"


def create_ingress(registry: Registry, intake: Intake, public_url: str) -> Starlette:
    """The HTTP application."""

    async def receive(request: Request) -> Response:
        name = request.path_params["channel"]
        channel = registry.channels.get(name)
        if channel is None or not channel.capabilities.webhooks:
            return PlainTextResponse(f"no channel {name!r} takes webhooks here", 404)
        try:
            body = await _read_body(request)
        except ClientDisconnect:
            return Response(status_code=400)
        if body is None:
            return PlainTextResponse(f"the body is larger than {LARGEST_BODY} bytes", 413)
        query = request.scope["query_string"].decode("latin-1")
        path = request.scope["raw_path"].decode("latin-1").partition("?")[0]
        received = WebhookRequest(
            method=request.method,
            # Rebuilt from the configured address: signatures cover what the provider was given, and a proxy changes the rest.
            url=f"{public_url}{path}" + (f"?{query}" if query else ""),
            path=request.path_params.get("rest", ""),
            headers={key.lower(): value for key, value in request.headers.items()},
            body=body,
        )
        try:
            channel.verify(received)
            webhook = channel.parse(received)
        except InvalidSignature as error:
            log.warning("a webhook was not authentic", action="receive_webhook", channel=name)
            return PlainTextResponse(str(error) or "the signature is wrong", 403)
        except InvalidWebhook as error:
            return PlainTextResponse(str(error), 400)
        except Exception:
            log.exception("a channel failed", action="receive_webhook", channel=name)
            return PlainTextResponse("the channel failed on this request", 500)
        try:
            await intake.take(name, webhook.receipts, webhook.unrecognized)
        except TokenInvalid as error:
            return PlainTextResponse(str(error), 403)
        except (AftertouchError, SpoolFull) as error:
            return PlainTextResponse(str(error), 503, headers={"retry-after": "1"})
        except sqlite3.Error:
            log.exception("the spool cannot be written", action="receive_webhook", channel=name)
            return PlainTextResponse("the receipts cannot be stored now", 503, headers={"retry-after": "1"})
        answer = webhook.answer
        return Response(answer.body, answer.status, dict(answer.headers), answer.content_type)

    async def report_health(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    methods = ["GET", "POST", "HEAD", "OPTIONS"]
    return Starlette(
        routes=[
            Route("/healthz", report_health),
            Route(f"{WEBHOOKS}/{{channel}}", receive, methods=methods),
            Route(f"{WEBHOOKS}/{{channel}}/{{rest:path}}", receive, methods=methods),
        ]
    )


async def _read_body(request: Request) -> bytes | None:
    """The body; None when it is too large, without reading the rest."""
    if int(request.headers.get("content-length") or 0) > LARGEST_BODY:
        return None
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            return None
        parts.append(part)
    return b"".join(parts)
