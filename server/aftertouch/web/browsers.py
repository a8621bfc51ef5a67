"""Browsers: the scripts that a site loads, and where they register and end subscriptions, below ``/v1/browsers``.

    GET  /v1/browsers/aftertouch.js, /v1/browsers/aftertouch-worker.js
    GET  /v1/browsers/<channel>/<app>                 the keys to subscribe with
    POST /v1/browsers/<channel>/<app>/subscribe       {"subscription": …, "identity": …, "previous": …}
    POST /v1/browsers/<channel>/<app>/unsubscribe     {"subscription": …}

Nothing here rests on cookies, so no other site can act for a visitor; CORS lets only the app's own pages read the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse, Response

from aftertouch.channels import Address
from aftertouch.errors import AftertouchError, FieldsInvalid, OriginNotAllowed, Violation
from aftertouch.identity import LONGEST
from aftertouch.ingest.enrolment import Enrolment, Site

BROWSERS = "/v1/browsers"
LARGEST_BODY = 16_384
"""Two subscriptions with endpoints of 2,048 characters, and an identity."""
_STATUSES = {
    "INVALID_ARGUMENT": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "FAILED_PRECONDITION": 503,
    "UNAVAILABLE": 503,
}
"""HTTP's words for ours; a channel that cannot send is no fault of the browser's."""

ReadBody = Callable[[int], Awaitable[bytes | Response]]


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid")

    subscription: dict[str, Any]
    identity: str = Field(default="", max_length=LONGEST)
    previous: dict[str, Any] | None = None


class Browsers:
    """Answers the scripts."""

    def __init__(self, enrolment: Enrolment) -> None:
        self._enrolment = enrolment
        static = Path(__file__).parent / "static"
        self._scripts = {path.name: path.read_bytes() for path in static.glob("*.js")}

    async def answer(self, method: str, path: str, headers: Mapping[str, str], read_body: ReadBody) -> Response:
        """Answer a request; ``path`` is what follows ``/v1/browsers/``, and ``read_body`` reads at most so many bytes."""
        if path in self._scripts:
            return self._serve_script(self._scripts[path], headers)
        channel_name, _, rest = path.partition("/")
        app_name, _, verb = rest.partition("/")
        allowed: dict[str, str] = {}
        try:
            now = asyncio.get_running_loop().time()
            site = await self._enrolment.find_site(channel_name, app_name, now)
            allowed = _allow_origin(site, headers.get("origin"))
            if method == "OPTIONS":
                return Response(status_code=204, headers=allowed)
            if not verb and method in ("GET", "HEAD"):
                return JSONResponse(site.told, headers={**allowed, "Cache-Control": "no-cache"})
            if verb not in ("subscribe", "unsubscribe") or method != "POST":
                return Response(status_code=404, headers=allowed)
            body = await read_body(LARGEST_BODY)
            if isinstance(body, Response):
                body.headers.update(allowed)
                return body
            await self._take(site, verb, body)
        except AftertouchError as error:
            given = {"reason": error.reason, "message": str(error)}
            if error.retry_after is not None:
                allowed["Retry-After"] = str(max(1, round(error.retry_after.total_seconds())))
            return JSONResponse(given, _STATUSES.get(error.code, 500), allowed)
        return Response(status_code=204, headers=allowed)

    async def _take(self, site: Site, verb: str, body: bytes) -> None:
        try:
            call = _Call.model_validate_json(body)
        except ValidationError as error:
            raise _explain(error) from error
        address = _read_address(site, call.subscription, "subscription")
        if verb == "unsubscribe":
            await self._enrolment.unsubscribe(site, address)
            return
        previous = None if call.previous is None else _read_address(site, call.previous, "previous")
        await self._enrolment.subscribe(site, address, call.identity, previous)

    @staticmethod
    def _serve_script(script: bytes, headers: Mapping[str, str]) -> Response:
        tag = f'"{sha256(script).hexdigest()[:16]}"'
        # A browser asks again after an hour; for a worker's scripts at every update, at the latest after a day.
        given = {
            "ETag": tag,
            "Cache-Control": "max-age=3600",
            "Access-Control-Allow-Origin": "*",
            "X-Content-Type-Options": "nosniff",
        }
        if headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=given)
        return Response(script, media_type="text/javascript; charset=utf-8", headers=given)


def _allow_origin(site: Site, origin: str | None) -> dict[str, str]:
    """The headers that let an app's page read the answer (Fetch standard, "CORS protocol").

    Raises:
        OriginNotAllowed: the request comes from another page. One without an origin comes from none, and is judged by what it
            says alone.
    """
    if origin is None:
        return {"Vary": "Origin"}
    if origin not in site.app.web_origins:
        raise OriginNotAllowed(origin[:200])
    return {
        "Vary": "Origin",
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST",
        "Access-Control-Allow-Headers": "Content-Type",
        "Access-Control-Max-Age": "600",
    }


def _read_address(site: Site, values: Mapping[str, Any], field: str) -> Address:
    try:
        return site.channel.parse_address(values)
    except ValidationError as error:
        raise _explain(error, field) from error


def _explain(error: ValidationError, *path: str) -> FieldsInvalid:
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    return FieldsInvalid(Violation(".".join([*path, *map(str, fault["loc"])]), fault["msg"]) for fault in faults)
