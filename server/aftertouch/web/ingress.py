"""The ingress: webhooks of every channel's provider below ``/v1/webhooks/<channel>``, and of an app's own account below
``/v1/apps/<app>/webhooks/<channel>``; browsers, and tracked links.

A webhook is verified and parsed by the channel, its receipts are made durable, and only then is it answered: 2xx means
stored. A provider whose request could not be stored, not even in the spool, gets 503 and sends it again.

It is a plain ASGI application: with five paths there is nothing for Starlette's routing and middleware to do, and each costs CPU.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Mapping

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from aftertouch import metrics
from aftertouch.channels import (
    Channel,
    InvalidSignature,
    InvalidWebhook,
    Receipt,
    Reply,
    Standing,
    Webhook,
    WebhookRequest,
)
from aftertouch.delivery.clicks import Clicks
from aftertouch.errors import AftertouchError
from aftertouch.ingest.accounts import APPS, Accounts
from aftertouch.ingest.intake import Intake, TokenInvalid
from aftertouch.ingest.spool import SpoolFull
from aftertouch.links import LINKS, write_location
from aftertouch.plugins import Registry
from aftertouch.web.browsers import BROWSERS, Browsers

log = structlog.get_logger()

LARGEST_BODY = 3 * 1024 * 1024 + 65_536
"""Meta's webhooks hold up to 3 MB (Cloud API: webhooks); other providers stay far below."""

MOST_ITEMS = 20_000
"""What one request may bring: Meta's have up to 1,000 updates, and a plugin that invents more would hold everybody up."""

BODY_SECONDS = 30.0
"""For a whole body to arrive; whoever sends it byte by byte would keep a connection and its memory for ever."""

SMALL_BODY = 65_536
"""All that a receipt of Twilio's or a usual one of Meta's needs, and what uvicorn holds of any connection anyway."""
MOST_LARGE_BODIES = 16
"""Larger ones that are taken at once, so that they hold 50 MB at the most whoever sends them; others are asked to come again."""

WEBHOOKS = "/v1/webhooks"
ANSWERING = "x-aftertouch-webhooks"
"""The header by which an answer to HEAD names the channel whose webhooks arrive at the address."""
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS"})


def create_ingress(
    registry: Registry, accounts: Accounts, intake: Intake, browsers: Browsers, clicks: Clicks, public_url: str
) -> ASGIApp:
    """The HTTP application."""
    large = asyncio.Semaphore(MOST_LARGE_BODIES)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        if scope["method"] not in _METHODS:
            response: Response = PlainTextResponse("method not allowed", 405, {"allow": ", ".join(sorted(_METHODS))})
        elif path.startswith(f"{WEBHOOKS}/"):
            name, _, rest = path.removeprefix(f"{WEBHOOKS}/").partition("/")
            response = await answer(scope, receive, name, registry.channels.get(name), None, rest)
        elif path.startswith(f"{APPS}/"):
            response = await answer_own(scope, receive, path.removeprefix(f"{APPS}/"))
        elif path.startswith(f"{BROWSERS}/"):
            headers = _read_headers(scope)

            async def read_body(most_bytes: int) -> bytes | Response:
                return await _receive_body(headers, receive, most_bytes)

            response = await browsers.answer(scope["method"], path.removeprefix(f"{BROWSERS}/"), headers, read_body)
        elif path.startswith(f"{LINKS}/"):
            response = await follow(scope, path.removeprefix(f"{LINKS}/"))
        elif path == "/healthz":
            response = PlainTextResponse("ok\n")
        else:
            response = PlainTextResponse("not found", 404)
        await response(scope, receive, send)

    async def follow(scope: Scope, link: str) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("method not allowed", 405, {"allow": "GET, HEAD"})
        try:
            address = await clicks.follow(link, scope["method"], _read_headers(scope))
        except AftertouchError as error:
            return PlainTextResponse(str(error), 503, headers={"retry-after": "1"})
        if address is None:
            return PlainTextResponse("this link leads nowhere", 404)
        # Not kept by anybody: the next click would not come here.
        return Response(
            status_code=302,
            headers={"location": write_location(address), "cache-control": "no-store", "x-robots-tag": "noindex"},
        )

    async def answer_own(scope: Scope, receive: Receive, path: str) -> Response:
        """A webhook at ``<app>/webhooks/<channel>``, of an app's own account."""
        app, collection, name, *rest = [*path.split("/", 3), "", ""][:4]
        if collection != "webhooks":
            return PlainTextResponse("not found", 404)
        try:
            own = await accounts.find_own(app, name, time.monotonic())
        except AftertouchError as error:
            return PlainTextResponse(str(error), 503, headers={"retry-after": "1"})
        channel, app_id = own or (None, None)
        return await answer(scope, receive, name, channel, app_id, rest[0])

    async def answer(
        scope: Scope, receive: Receive, name: str, channel: Channel | None, app_id: int | None, rest: str
    ) -> Response:
        if channel is None or not channel.capabilities.webhooks:
            return PlainTextResponse(f"no channel {name!r} takes webhooks here", 404)
        if scope["method"] == "HEAD":
            # Nothing is reported so; but whoever asks whether this address leads here, as the console does, is told.
            return Response(status_code=405, headers={"allow": "GET, POST", ANSWERING: name})
        response = await answer_webhook(scope, receive, name, channel, app_id, rest)
        metrics.WEBHOOKS.labels(name, response.status_code).inc()
        return response

    async def answer_webhook(
        scope: Scope, receive: Receive, name: str, channel: Channel, app_id: int | None, rest: str
    ) -> Response:
        headers = _read_headers(scope)
        if _is_small(headers):
            return await take(scope, receive, name, channel, app_id, rest, headers)
        if large.locked():
            return PlainTextResponse("too many large bodies at once", 503, headers={"retry-after": "1"})
        async with large:
            return await take(scope, receive, name, channel, app_id, rest, headers)

    async def take(
        scope: Scope,
        receive: Receive,
        name: str,
        channel: Channel,
        app_id: int | None,
        rest: str,
        headers: Mapping[str, str],
    ) -> Response:
        body = await _receive_body(headers, receive, LARGEST_BODY)
        if isinstance(body, Response):
            return body
        query = scope["query_string"].decode("latin-1")
        path = scope["raw_path"].decode("latin-1").partition("?")[0]
        received = WebhookRequest(
            method=scope["method"],
            # Rebuilt from the configured address: signatures cover what the provider was given, and a proxy changes the rest.
            url=f"{public_url}{path}" + (f"?{query}" if query else ""),
            path=rest,
            headers=headers,
            body=body,
        )
        try:
            channel.verify(received)
            webhook = _check_webhook(channel.parse(received))
        except InvalidSignature as error:
            log.warning("a webhook was not authentic", action="receive_webhook", channel=name)
            return PlainTextResponse(str(error) or "the signature is wrong", 403)
        except InvalidWebhook as error:
            return PlainTextResponse(str(error), 400)
        except Exception:
            log.exception("a channel failed", action="receive_webhook", channel=name)
            return PlainTextResponse("the channel failed on this request", 500)
        try:
            await intake.take(name, webhook, app_id)
        except TokenInvalid as error:
            return PlainTextResponse(str(error), 403)
        except (AftertouchError, SpoolFull) as error:
            return PlainTextResponse(str(error), 503, headers={"retry-after": "1"})
        except sqlite3.Error:
            log.exception("the spool cannot be written", action="receive_webhook", channel=name)
            return PlainTextResponse("the receipts cannot be stored now", 503, headers={"retry-after": "1"})
        given = webhook.answer
        return Response(given.body, given.status, dict(given.headers), given.content_type)

    return serve


def _check_webhook(webhook: object) -> Webhook:
    """What a channel read, as far as the server can take it.

    Raises:
        TypeError, ValueError: it cannot.
    """
    if not isinstance(webhook, Webhook):
        raise TypeError(f"parse returned {type(webhook).__name__} where a Webhook is expected")
    items = (*webhook.receipts, *webhook.replies, *webhook.standings, *webhook.unrecognized)
    if len(items) > MOST_ITEMS:
        raise ValueError(f"parse returned {len(items)} items, and one request can bring {MOST_ITEMS}")
    kinds = (Receipt, webhook.receipts), (Reply, webhook.replies), (Standing, webhook.standings), (str, webhook.unrecognized)
    if strange := [type(item).__name__ for kind, given in kinds for item in given if not isinstance(item, kind)]:
        raise TypeError(f"parse returned {strange[0]} among what should be receipts, replies, standings or texts")
    return webhook


def _read_headers(scope: Scope) -> dict[str, str]:
    # ASGI has the names in lower case.
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}


def _is_small(headers: Mapping[str, str]) -> bool:
    """True when the client has said that its body is; without a length it may be any."""
    return int(headers.get("content-length", 0)) <= SMALL_BODY and "transfer-encoding" not in headers


async def _receive_body(headers: Mapping[str, str], receive: Receive, most_bytes: int) -> bytes | Response:
    """The body, or what to answer to a client whose body is too large, too slow or cut off."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _read_body(int(headers.get("content-length", 0)), receive, most_bytes)
    except ClientDisconnect:
        return Response(status_code=400)
    except TimeoutError:
        return PlainTextResponse("the body took too long", 408, {"connection": "close"})
    return PlainTextResponse(f"the body is larger than {most_bytes} bytes", 413) if body is None else body


async def _read_body(length: int, receive: Receive, most_bytes: int) -> bytes | None:
    """The body; None when it is too large, without reading the rest.

    Raises:
        ClientDisconnect: the client left in the middle of it.
    """
    if length > most_bytes:
        return None
    body: bytes = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if len(body) > most_bytes:
            return None
        if not message.get("more_body", False):
            return body
