"""The console's pages, put together: who may see which, what every answer carries, and what becomes of an error."""

from __future__ import annotations

import hashlib
import hmac
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import quote

import structlog
from jinja2 import Environment, PackageLoader, StrictUndefined
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aftertouch.console import campaigns, chains, composer, contacts, entrance, exports, lists, retargets, settings, words
from aftertouch.console.accounts import Accounts
from aftertouch.console.issuer import RETURN_PATH, Issuer
from aftertouch.console.tasks import Tasks
from aftertouch.console.visits import PREFIX, Console, Visit, is_ours, set_session
from aftertouch.errors import AftertouchError, Internal, MessageTooLarge, NotFound, ScopeInsufficient
from aftertouch.plugins import Registry
from aftertouch.rpc.local import Servicers
from aftertouch.store.engine import transaction
from aftertouch.store.users import find_session

log = structlog.get_logger()

CSRF_HEADER = "x-csrf-token"
"""How a page's script sends the token; a form has it in the field ``csrf``."""

LARGEST_SIGN_IN = 10_000
"""Bytes; anybody may send this form."""

HEADERS = {
    # No inline script or style, nothing from elsewhere: what a contact or a provider brings in as text stays text.
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "form-action 'self'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        )
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}

_STATIC_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml", "txt": "text/plain"}


@dataclass(frozen=True)
class Page:
    """One address, and the least scope that its visitors' role has to include."""

    path: str
    serve: Callable[[Visit], Awaitable[Response]]
    scope: str
    method: str = "GET"
    largest: int = 1_000_000
    """Bytes that may be sent to it."""


PAGES = (
    Page("/campaigns", campaigns.show_list, "read"),
    Page("/campaigns/new", composer.show_new, "manage"),
    Page("/campaigns/new", composer.create, "manage", "POST"),
    Page("/campaigns/{campaign}", campaigns.show, "read"),
    Page("/campaigns/{campaign}/row", campaigns.show_row, "read"),
    Page("/campaigns/{campaign}/live", campaigns.show_live, "read"),
    Page("/campaigns/{campaign}/chain", chains.show, "read"),
    Page("/campaigns/{campaign}/people.csv", exports.export_recipients, "read"),
    Page("/campaigns/{campaign}/state", campaigns.change_state, "manage", "POST"),
    Page("/campaigns/{campaign}/retarget", retargets.show, "manage"),
    Page("/campaigns/{campaign}/retarget", retargets.create, "manage", "POST"),
    Page("/campaigns/{campaign}/retarget/funnel", retargets.show_funnel, "manage"),
    Page("/campaigns/{campaign}/retarget/people.csv", exports.export_retarget, "read"),
    Page("/campaigns/{campaign}/review/people.csv", exports.export_audience, "read"),
    Page("/campaigns/{campaign}/review", composer.show_review, "manage"),
    Page("/campaigns/{campaign}/edit", composer.show, "manage"),
    Page("/campaigns/{campaign}/templates", composer.show_templates, "manage"),
    Page("/campaigns/{campaign}/form", composer.change_form, "manage", "POST"),
    Page("/campaigns/{campaign}/save", composer.save, "manage", "POST"),
    Page("/campaigns/{campaign}/test", composer.send_test, "manage", "POST"),
    Page("/campaigns/{campaign}/launch", composer.launch, "manage", "POST"),
    Page("/campaigns/{campaign}/delete", composer.delete, "manage", "POST"),
    Page("/contacts", contacts.show_list, "read"),
    Page("/contacts/import", contacts.show_import_form, "manage"),
    Page("/contacts/import", contacts.start_import, "manage", "POST", largest=contacts.LARGEST_FILE),
    Page("/contacts/imports/{number}", contacts.show_import, "manage"),
    Page("/contacts/person", contacts.show, "read"),
    Page("/contacts/person/erase", contacts.erase, "manage", "POST"),
    Page("/contacts/explain", contacts.explain, "read"),
    Page("/lists", lists.show_all, "read"),
    Page("/lists", lists.create, "manage", "POST", largest=lists.LARGEST_FILE),
    Page("/lists/{list}/add", lists.add, "manage", "POST", largest=lists.LARGEST_FILE),
    Page("/lists/{list}/remove", lists.remove, "manage", "POST", largest=lists.LARGEST_FILE),
    Page("/lists/{list}/people.csv", exports.export_list, "read"),
    Page("/lists/{list}/delete", lists.delete, "manage", "POST"),
    Page("/channels", settings.show_channels, "read"),
    Page("/channels/check", settings.check_addresses, "manage", "POST"),
    Page("/channels/{channel}/own", settings.show_own, "admin"),
    Page("/channels/{channel}/own", settings.change_own, "admin", "POST"),
    Page("/channels/{channel}/own/delete", settings.delete_own, "admin", "POST"),
    Page("/keys", settings.show_keys, "admin"),
    Page("/keys", settings.create_key, "admin", "POST"),
    Page("/keys/{key}/revoke", settings.revoke_key, "admin", "POST"),
    Page("/users", settings.show_users, "admin"),
    Page("/users", settings.create_user, "admin", "POST"),
    Page("/users/change", settings.change_user, "admin", "POST"),
    Page("/rules", settings.show_rules, "admin"),
    Page("/rules", settings.change_rules, "admin", "POST"),
    Page("/audit", settings.show_audit, "admin"),
    Page("/account", entrance.show_account, "read"),
    Page("/account", entrance.change_password, "read", "POST"),
    Page("/sign-out", entrance.sign_out, "read", "POST"),
)


@asynccontextmanager
async def open_console(
    engine: AsyncEngine, registry: Registry, servicers: Servicers, public_url: str, issuer: Issuer | None = None
) -> AsyncIterator[ASGIApp]:
    """The console as an ASGI application for ``/`` and what is below ``/console``; its imports end with it."""
    static = {file.name: file.read_bytes() for file in (files(__package__) / "static").iterdir() if file.is_file()}
    versions = {name: hashlib.sha256(content).hexdigest()[:12] for name, content in static.items()}
    console = Console(engine, registry, servicers, public_url, Accounts(), Tasks(), _load_pages(versions), issuer, versions)

    async def go_home(_: Request) -> Response:
        return RedirectResponse(f"{PREFIX}/campaigns")

    async def answer_static(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in static:
            return PlainTextResponse("not found", 404)
        kind = _STATIC_TYPES[name.rpartition(".")[2]]
        # The address has the content's hash.
        return Response(static[name], 200, {"cache-control": "public, max-age=31536000, immutable"}, kind)

    async def show_sign_in(request: Request) -> Response:
        return await entrance.show_sign_in(console, request)

    async def sign_in(request: Request) -> Response:
        if _read_length(request) > LARGEST_SIGN_IN:
            raise MessageTooLarge(LARGEST_SIGN_IN)
        return await entrance.sign_in(console, request)

    async def lead_to_issuer(request: Request) -> Response:
        if _read_length(request) > LARGEST_SIGN_IN:
            raise MessageTooLarge(LARGEST_SIGN_IN)
        return await entrance.lead_to_issuer(console, request)

    async def come_back(request: Request) -> Response:
        return await entrance.come_back(console, request)

    routes = [
        Route("/", go_home),
        Route(PREFIX, go_home),
        Route(f"{PREFIX}/", go_home),
        Route(f"{PREFIX}/static/{{name}}", answer_static),
        Route(f"{PREFIX}/sign-in", _guard(console, show_sign_in)),
        Route(f"{PREFIX}/sign-in", _guard(console, sign_in), methods=["POST"]),
        Route(f"{PREFIX}/sign-in/issuer", _guard(console, lead_to_issuer), methods=["POST"]),
        Route(RETURN_PATH, _guard(console, come_back)),
        *(Route(PREFIX + page.path, _guard(console, _admit(console, page)), methods=[page.method]) for page in PAGES),
    ]
    try:
        yield _add_headers(Router(routes, redirect_slashes=False))
    finally:
        await console.tasks.stop()


def _load_pages(versions: dict[str, str]) -> Environment:
    pages = Environment(
        loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {
        "number": words.number,
        "people": words.count_people,
        "time": words.show_time,
        "times": words.show_times,
        "url": lambda text: quote(text, safe=""),
    }
    pages.globals |= {"share": words.share, "words": words, "prefix": PREFIX, "versions": versions}
    return pages


def _add_headers(app: ASGIApp) -> ASGIApp:
    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await app(scope, receive, send_with_headers)

    return serve


def _guard(console: Console, serve: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turn whatever goes wrong into a page."""

    async def answer(request: Request) -> Response:
        try:
            return await serve(request)
        except ClientDisconnect:
            return Response(status_code=400)
        except HTTPException as error:
            return PlainTextResponse(error.detail, error.status_code)
        except AftertouchError as error:
            refusal = error
        except Exception:
            number = uuid.uuid4().hex
            log.exception("a page failed", action="serve_page", path=request.scope["route"].path, request=number)
            refusal = Internal(number)
        visit = request.scope.get("visit")
        template = "refusal_part.html" if "hx-request" in request.headers else "refusal.html"
        status = words.STATUSES[refusal.code]
        text = words.explain(refusal)
        page = console.pages.get_template(template)
        return HTMLResponse(page.render(visit=visit, status=status, text=text), status)

    return answer


def _admit(console: Console, page: Page) -> Callable[[Request], Awaitable[Response]]:
    """Serve a page to those who are signed in, whose role includes its scope, and whose changes a page of ours asked for."""

    async def answer(request: Request) -> Response:
        if _read_length(request) > page.largest:
            raise MessageTooLarge(page.largest)
        token = request.cookies.get(console.cookie, "")
        found = None
        if token:
            async with transaction(console.engine) as conn:
                found = await find_session(conn, token)
        if found is None:
            return _send_to_sign_in(console, request, page)
        visit = Visit(console, request, *found, session=token)
        request.scope["visit"] = visit
        try:
            if page.method == "POST" and not await _is_asked_for(visit):
                text = "This change was not asked for by a page of this session."
                return visit.render("refusal.html", 403, status=403, text=text)
            if not visit.may(page.scope):
                raise ScopeInsufficient(page.path, page.scope)
            if "\0" in str(request.path_params):
                raise NotFound("a name with the character U+0000")
            return await page.serve(visit)
        finally:
            if not visit.keeps_upload:
                # A browser sends a file along also where none was chosen.
                await request.close()

    return answer


def _read_length(request: Request) -> int:
    """How many bytes come with a request; a browser always says so for a form."""
    if "transfer-encoding" in request.headers:
        raise HTTPException(411, "say how long the request is")
    return int(request.headers.get("content-length", 0))


async def _is_asked_for(visit: Visit) -> bool:
    if not is_ours(visit.request):
        return False
    given = visit.request.headers.get(CSRF_HEADER) or str((await visit.read_form()).get("csrf", ""))
    return hmac.compare_digest(given.encode(), visit.csrf.encode())


def _send_to_sign_in(console: Console, request: Request, page: Page) -> Response:
    """Where a visitor without a session goes, to come back afterwards."""
    back = request.url.path + (f"?{request.url.query}" if request.url.query else "")
    address = f"{PREFIX}/sign-in" + (f"?next={quote(back, safe='')}" if page.method == "GET" else "")
    if "hx-request" in request.headers:
        return Response(status_code=401, headers={"hx-redirect": f"{PREFIX}/sign-in"})
    response = RedirectResponse(address, 303)
    if console.cookie in request.cookies:
        set_session(console, response, "")
    return response
