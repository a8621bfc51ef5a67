"""Signing in and out, and one's own password."""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import urlsplit

import structlog
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from aftertouch.console.accounts import FAILURE_WINDOW, TooManyFailures, find_account
from aftertouch.console.issuer import IssuerFailed, Trip
from aftertouch.console.visits import PREFIX, Console, Visit, is_ours, name_faults, set_cookie, set_session
from aftertouch.errors import FieldsInvalid, NotFound, Violation
from aftertouch.store import users as store
from aftertouch.store.apps import list_apps
from aftertouch.store.audit import record_entry
from aftertouch.store.engine import transaction

log = structlog.get_logger()

TRIP_LIFETIME = timedelta(minutes=10)
"""For signing in at the issuer, its second factor included."""


async def show_sign_in(console: Console, request: Request) -> Response:
    """The form."""
    return await _render(console, request, request.query_params.get("app", ""), "", "", 200)


async def sign_in(console: Console, request: Request) -> Response:
    """Make a session, always a new one: a cookie that somebody planted before is worth nothing."""
    if not is_ours(request):
        return HTMLResponse("this form was sent by another site", 403)
    form = await request.form(max_files=0, max_fields=10)
    app, email, password = (str(form.get(name, "")) for name in ("app", "email", "password"))
    try:
        token = await console.accounts.sign_in(console.engine, app, email, password)
    except TooManyFailures:
        log.warning("too many tries to sign in", action="sign_in", app=app)
        minutes = int(FAILURE_WINDOW.total_seconds() // 60)
        text = f"Too many tries. Wait {minutes} minutes, or ask an admin for a new password."
        return await _render(console, request, app, email, text, 429)
    if token is None:
        return await _render(console, request, app, email, "App, email and password do not belong together.", 403)
    response = RedirectResponse(_choose_target(str(form.get("next", ""))), 303)
    set_session(console, response, token)
    return response


async def lead_to_issuer(console: Console, request: Request) -> Response:
    """Send the visitor to the issuer, which asks who they are."""
    if not is_ours(request):
        return HTMLResponse("this form was sent by another site", 403)
    if console.issuer is None:
        raise NotFound("an OpenID Connect issuer")
    form = await request.form(max_files=0, max_fields=10)
    app, email = str(form.get("app", "")), str(form.get("email", ""))[:254]
    trip = Trip.begin(app, str(form.get("next", "")))
    try:
        address = await console.issuer.lead_there(trip, email)
    except IssuerFailed as error:
        log.warning("the issuer leads nobody in", action="sign_in", problem=str(error))
        text = f"{console.issuer.host} cannot be asked now. Try again in a moment, or sign in with a password."
        return await _render(console, request, app, email, text, 503, trip.next)
    # No redirect: the policy lets a form of ours lead to ours only, and that holds for where it is sent on to.
    page = console.pages.get_template("to_issuer.html").render(address=address, host=console.issuer.host)
    response = HTMLResponse(page, headers={"refresh": f"0;url={address}"})
    set_cookie(console, response, console.trip_cookie, trip.write(), TRIP_LIFETIME)
    return response


async def come_back(console: Console, request: Request) -> Response:
    """Make a session for the user of the app whose email the issuer vouches for; it makes no users."""
    if console.issuer is None:
        raise NotFound("an OpenID Connect issuer")
    trip = Trip.read(request.cookies.get(console.trip_cookie, ""))
    app = trip.app if trip else ""
    try:
        if trip is None:
            raise IssuerFailed("this browser was not sent to the issuer, or too long ago")
        email = await console.issuer.read_email(trip, request.query_params)
    except IssuerFailed as error:
        log.warning("the issuer vouches for nobody", action="sign_in", app=app, problem=str(error))
        text = f"{console.issuer.host} did not say who you are. Try again; your operator's log has the reason."
        return await _render(console, request, app, "", text, 403, trip.next if trip else "")
    async with transaction(console.engine) as conn:
        user = await find_account(conn, trip.app, email)
        token = await store.create_session(conn, user.user_id) if user else ""
    if user is None:
        text = f"{email} is no user of this app. Ask an admin of it to make you one."
        response = await _render(console, request, app, "", text, 403, trip.next)
    else:
        response = RedirectResponse(_choose_target(trip.next), 303)
        set_session(console, response, token)
    set_cookie(console, response, console.trip_cookie, "", TRIP_LIFETIME)
    return response


def _choose_target(path: str) -> str:
    """Where to go after signing in: a page of the console and nothing else."""
    parts = urlsplit(path)
    is_page = not parts.scheme and not parts.netloc and "\\" not in path and parts.path.startswith(f"{PREFIX}/")
    return path if is_page and path.isprintable() else f"{PREFIX}/campaigns"


async def _render(
    console: Console, request: Request, app: str, email: str, problem: str, status: int, target: str = ""
) -> Response:
    async with transaction(console.engine) as conn:
        apps = await list_apps(conn)
    page = console.pages.get_template("sign_in.html").render(
        app=app or (apps[0].app if len(apps) == 1 else ""),
        is_only_app=len(apps) == 1,
        email=email,
        problem=problem,
        next=target or request.query_params.get("next", ""),
        issuer=console.issuer.host if console.issuer else "",
    )
    return HTMLResponse(page, status)


async def sign_out(visit: Visit) -> Response:
    """End the session."""
    async with transaction(visit.console.engine) as conn:
        await store.delete_session(conn, visit.session)
    response = RedirectResponse(f"{PREFIX}/sign-in?app={visit.app.app}", 303)
    set_session(visit.console, response, "")
    response.headers["clear-site-data"] = '"cache", "storage"'
    return response


async def show_account(visit: Visit) -> Response:
    """One's own page."""
    return visit.render("account.html", faults=name_faults())


async def change_password(visit: Visit) -> Response:
    """Change one's own password; every other session of this user ends."""
    form = await visit.read_form()
    accounts = visit.console.accounts
    try:
        if not await accounts.is_right(str(form.get("current", "")), visit.user.password_hash):
            raise FieldsInvalid([Violation("current", "is not your password")])
        password_hash = await accounts.hash(str(form.get("password", "")))
    except FieldsInvalid as error:
        return visit.render("account.html", 400, faults=name_faults(error.violations))
    async with transaction(visit.console.engine) as conn:
        await store.set_password_hash(conn, visit.user.user_id, password_hash)
        await record_entry(
            conn, visit.app.app_id, visit.caller.actor, "Users/SetPassword", f"{visit.app.name}/users/{visit.user.email}"
        )
        token = await store.create_session(conn, visit.user.user_id)
    response = visit.redirect("/account?saved=1")
    set_session(visit.console, response, token)
    return response
