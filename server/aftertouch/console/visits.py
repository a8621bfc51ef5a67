"""A visit: one request of somebody who is signed in, and what a page needs to answer it.

Every change comes with a token that only a page of the same session knows, and from a page of ours by the browser's own word
(Sec-Fetch-Site), so no other site can make a visitor's browser do anything.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from google.protobuf.timestamp_pb2 import Timestamp
from jinja2 import Environment
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from aftertouch.console.accounts import Accounts
from aftertouch.console.issuer import Issuer
from aftertouch.console.tasks import Tasks
from aftertouch.declarations import ChannelType
from aftertouch.errors import Violation
from aftertouch.plugins import Registry
from aftertouch.rpc.interceptor import Caller
from aftertouch.rpc.local import LocalClient, Servicers
from aftertouch.store.apps import App
from aftertouch.store.users import SESSION_LIFETIME, User
from aftertouch.v1 import channels_pb2

PREFIX = "/console"

SCOPES: Mapping[str, tuple[str, ...]] = {"viewer": ("read",), "marketer": ("manage",), "admin": ("admin",)}
"""What each role may do, as the scopes of a key."""


@dataclass(frozen=True)
class Console:
    """What all visits share."""

    engine: AsyncEngine
    registry: Registry
    servicers: Servicers
    public_url: str
    accounts: Accounts
    tasks: Tasks
    pages: Environment
    issuer: Issuer | None = None
    """By whom users may sign in instead of with a password."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the static files, by name."""

    @property
    def is_secure(self) -> bool:
        """True when browsers reach the console over TLS."""
        return self.public_url.startswith("https:")

    @property
    def cookie(self) -> str:
        """The session cookie's name; the prefix has browsers refuse one that another host or a page without TLS set."""
        return "__Host-aftertouch" if self.is_secure else "aftertouch"

    @property
    def trip_cookie(self) -> str:
        """The same of the cookie that a visitor has on the way to the issuer and back."""
        return f"{self.cookie}-trip"


def is_ours(request: Request) -> bool:
    """True unless the browser says, or lets conclude, that another site made this request."""
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    # Not sent over plain HTTP but to this machine; then the origin has to be the address that was asked for.
    origin = request.headers.get("origin")
    return origin is None or urlsplit(origin).netloc == request.headers.get("host")


def set_session(console: Console, response: Response, token: str) -> None:
    """Hand the browser its session, or with an empty one take it back."""
    set_cookie(console, response, console.cookie, token, SESSION_LIFETIME)


def set_cookie(console: Console, response: Response, name: str, value: str, lifetime: timedelta) -> None:
    """Hand the browser a cookie of this site that no script reads, or with an empty value take it back."""
    response.set_cookie(
        name,
        value,
        max_age=int(lifetime.total_seconds()) if value else 0,
        path="/",
        secure=console.is_secure,
        httponly=True,
        samesite="lax",
    )


class Visit:
    """One request of somebody who is signed in."""

    def __init__(self, console: Console, request: Request, app: App, user: User, session: str) -> None:
        self.console = console
        self.request = request
        self.app = app
        self.user = user
        self.session = session
        self.caller = Caller(app, SCOPES[user.role], f"users/{user.email}")
        self.client = LocalClient(console.engine, console.servicers, self.caller)
        self.keeps_upload = False
        """True when work that outlasts the request reads the file that came with it, and closes it."""

    @property
    def parent(self) -> str:
        """What lists and creates take as ``parent``."""
        return self.app.name

    @cached_property
    def csrf(self) -> str:
        """What a change made by a page of this session carries."""
        return hmac.new(self.session.encode(), b"csrf", hashlib.sha256).hexdigest()

    @property
    def is_partial(self) -> bool:
        """True when a page's script asks for a part of a page."""
        return "hx-request" in self.request.headers

    def param(self, name: str) -> str:
        """A part of the path."""
        return str(self.request.path_params[name])

    def query(self, name: str) -> str:
        """A value of the query; empty when there is none."""
        return self.request.query_params.get(name, "")

    def name(self, collection: str, identifier: str) -> str:
        """A resource name of the visitor's app."""
        return f"{self.parent}/{collection}/{identifier}"

    def may(self, scope: str) -> bool:
        """True when the visitor's role includes this scope."""
        return self.caller.may(scope)

    async def list_channels(self) -> list[tuple[str, ChannelType, bool]]:
        """The channels by name, and whether each can send for the visitor's app; those that can first."""
        listed = await self.client.channels.ListChannels(channels_pb2.ListChannelsRequest(page_size=1000))
        ready = {read_id(channel.name) for channel in listed.channels if channel.state == channels_pb2.Channel.State.READY}
        types = self.console.registry.types
        return [(name, types[name], name in ready) for name in sorted(types, key=lambda name: (name not in ready, name))]

    async def read_form(self) -> FormData:
        """The form that was sent; read once."""
        # Starlette's default of 1,000 fields is more than any of ours has.
        return await self.request.form(max_files=1)

    def render(self, template: str, status: int = 200, /, **context: Any) -> HTMLResponse:
        """A page, or a part of one."""
        page = self.console.pages.get_template(template)
        return HTMLResponse(page.render(visit=self, now=datetime.now(UTC), **context), status)

    def redirect(self, path: str) -> Response:
        """Go on with another page of the console, by GET."""
        if self.is_partial:
            return Response(headers={"hx-redirect": f"{PREFIX}{path}"})
        return RedirectResponse(f"{PREFIX}{path}", 303)


def name_faults(violations: Iterable[Violation] = (), prefix: str = "") -> Mapping[str, str]:
    """What is wrong, by field; empty for every field that is right."""
    faults: defaultdict[str, str] = defaultdict(str)
    for violation in violations:
        faults[violation.field.removeprefix(prefix)] = violation.description
    return faults


def read_id(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]


def to_time(stamp: Timestamp) -> datetime | None:
    """A message's time; None when it is not set."""
    return stamp.ToDatetime(UTC) if stamp.seconds or stamp.nanos else None


def is_recent(time: datetime | None, seconds: float) -> bool:
    """True when this was less than some seconds ago."""
    return time is not None and datetime.now(UTC) - time < timedelta(seconds=seconds)
