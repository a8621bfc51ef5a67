"""Channels and their webhook addresses; and for admins: keys, users, and the audit log."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy.ext.asyncio import AsyncConnection
from starlette.responses import Response

from aftertouch.console import words
from aftertouch.console.accounts import change_role, check_user
from aftertouch.console.visits import Visit, name_faults, read_id, to_time
from aftertouch.errors import AlreadyExists, FieldsInvalid, NotFound, Violation
from aftertouch.store import users as store
from aftertouch.store.audit import list_entries, record_entry
from aftertouch.store.engine import transaction
from aftertouch.v1 import apps_pb2, channels_pb2, options_pb2
from aftertouch.web.ingress import ANSWERING, WEBHOOKS

CHECK_SECONDS = 5.0
AUDIT_PAGE = 100

_SCOPES = {"read": "Read", "ingest": "Send events", "manage": "Manage campaigns and contacts", "admin": "Everything"}


# Channels


async def show_channels(visit: Visit) -> Response:
    """Every channel, whether it can send, and where its provider reports to."""
    return await _render_channels(visit, {})


async def _render_channels(visit: Visit, checks: Mapping[str, Check]) -> Response:
    listed = await visit.client.channels.ListChannels(channels_pb2.ListChannelsRequest(page_size=1000))
    own = await _find_own_webhooks(visit)
    return visit.render(
        "channels.html",
        channels=[
            {
                "message": channel,
                "state": channels_pb2.Channel.State.Name(channel.state),
                "name": read_id(channel.name),
                "is_own": read_id(channel.name) in own,
                "webhook": own.get(read_id(channel.name), _find_webhook(visit, read_id(channel.name))),
                "check": checks.get(read_id(channel.name)),
            }
            for channel in listed.channels
        ],
        checks=checks,
    )


def _find_webhook(visit: Visit, channel: str) -> str:
    """Where a channel's provider reports to; empty when it does not."""
    takes_webhooks = visit.console.registry.types[channel].channel.capabilities.webhooks
    return f"{visit.console.public_url}{WEBHOOKS}/{channel}" if takes_webhooks else ""


async def show_own(visit: Visit) -> Response:
    """Which settings of a channel are the app's own."""
    return await _render_own(visit, name_faults())


async def _render_own(visit: Visit, faults: Mapping[str, str]) -> Response:
    name = visit.param("channel")
    channel = await visit.client.channels.GetChannel(channels_pb2.GetChannelRequest(name=f"channels/{name}"))
    try:
        request = channels_pb2.GetChannelSettingsRequest(name=visit.name("channelSettings", name))
        own = await visit.client.channels.GetChannelSettings(request)
    except NotFound:
        own = None
    schema = visit.console.registry.types[name].channel.settings_model.model_json_schema()
    kept = own.set_values if own else ()
    return visit.render(
        "own.html",
        400 if faults else 200,
        channel=channel,
        name=name,
        own=own,
        settings=[
            # As the channel has them: an account comes before how fast it may send.
            _describe_setting(field, shape, is_required=field in schema.get("required", ()), is_set=field in kept)
            for field, shape in schema["properties"].items()
            if field in channel.app_settings
        ],
        faults=faults,
    )


@dataclass(frozen=True)
class Setting:
    """One setting of a channel that an app may have of its own; never its value."""

    name: str
    label: str
    hint: str
    is_secret: bool
    is_required: bool
    is_set: bool
    default: str
    choices: Sequence[str]


def _describe_setting(name: str, shape: Mapping[str, Any], *, is_required: bool, is_set: bool) -> Setting:
    shapes = [shape, *shape.get("anyOf", ())]
    default = shape.get("default")
    return Setting(
        name,
        name.replace("_", " ").capitalize(),
        " ".join(str(shape.get("description", "")).replace("``", "").split()),
        is_secret=any(part.get("writeOnly") for part in shapes),
        is_required=is_required,
        is_set=is_set,
        default="" if default is None else str(default),
        choices=[choice for part in shapes for choice in part.get("enum", ())],
    )


async def change_own(visit: Visit) -> Response:
    """Set what was filled in, and forget what was chosen to be; what was left empty stays as it is."""
    name, form = visit.param("channel"), await visit.read_form()
    values = {key.removeprefix("own."): str(value) for key, value in form.items() if key.startswith("own.") and value}
    values |= {str(forgotten): "" for forgotten in form.getlist("forget")}
    given = channels_pb2.ChannelSettings(name=visit.name("channelSettings", name), values=values)
    try:
        await visit.client.channels.UpdateChannelSettings(channels_pb2.UpdateChannelSettingsRequest(channel_settings=given))
    except FieldsInvalid as error:
        return await _render_own(visit, name_faults(error.violations, "channel_settings.values."))
    return visit.redirect(f"/channels/{name}/own?saved=1")


async def delete_own(visit: Visit) -> Response:
    """Speak through the server's account again."""
    name = visit.param("channel")
    request = channels_pb2.DeleteChannelSettingsRequest(name=visit.name("channelSettings", name))
    await visit.client.channels.DeleteChannelSettings(request)
    return visit.redirect("/channels")


async def _find_own_webhooks(visit: Visit) -> Mapping[str, str]:
    """The channels on which the app has an account of its own, and where their providers report to."""
    found = {}
    for name in visit.console.registry.types:
        with suppress(NotFound):
            request = channels_pb2.GetChannelSettingsRequest(name=visit.name("channelSettings", name))
            found[name] = (await visit.client.channels.GetChannelSettings(request)).webhook_url
    return found


@dataclass(frozen=True)
class Check:
    """Whether an address leads here."""

    is_reachable: bool
    text: str


async def check_addresses(visit: Visit) -> Response:
    """Ask the webhooks' addresses whether they lead here, as a provider would reach them: through every proxy."""
    shared = {name: _find_webhook(visit, name) for name in visit.console.registry.channels}
    addresses = {name: address for name, address in {**shared, **await _find_own_webhooks(visit)}.items() if address}
    timeout = aiohttp.ClientTimeout(total=CHECK_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        checks = await asyncio.gather(*(_check(session, name, address) for name, address in addresses.items()))
    return await _render_channels(visit, dict(zip(addresses, checks, strict=True)))


async def _check(session: aiohttp.ClientSession, name: str, address: str) -> Check:
    try:
        async with session.head(address, allow_redirects=False) as response:
            if response.headers.get(ANSWERING) == name:
                return Check(True, "Reachable")
            return Check(
                False, f"Somebody else answers there, with {response.status}. Look at the proxy and at the public address."
            )
    except (aiohttp.ClientError, TimeoutError) as error:
        return Check(False, f"Nobody answers there ({type(error).__name__}). The provider cannot report what became of messages.")


# Rules


async def show_rules(visit: Visit) -> Response:
    """When people are left alone."""
    app = await visit.client.apps.GetApp(apps_pb2.GetAppRequest(name=visit.parent))
    hours, cap = app.quiet_hours, app.frequency_cap
    values = {"start": hours.start, "end": hours.end, "default_time_zone": hours.default_time_zone}
    values |= {"messages": str(cap.messages or ""), "hours": str(cap.hours or "")}
    return visit.render("rules.html", values=values, faults=name_faults())


async def change_rules(visit: Visit) -> Response:
    """Change them; what is left empty does not hold any more."""
    form = await visit.read_form()
    values = {name: str(form.get(name, "")).strip() for name in ("start", "end", "default_time_zone", "messages", "hours")}
    app = apps_pb2.App(name=visit.parent)
    if values["start"] or values["end"]:
        app.quiet_hours.start, app.quiet_hours.end = values["start"], values["end"]
        app.quiet_hours.default_time_zone = values["default_time_zone"]
    try:
        if values["messages"] or values["hours"]:
            app.frequency_cap.messages = _read_number(values["messages"], "app.frequency_cap.messages")
            app.frequency_cap.hours = _read_number(values["hours"], "app.frequency_cap.hours")
        mask = FieldMask(paths=["quiet_hours", "frequency_cap"])
        await visit.client.apps.UpdateApp(apps_pb2.UpdateAppRequest(app=app, update_mask=mask))
    except FieldsInvalid as error:
        return visit.render("rules.html", 400, values=values, faults=name_faults(error.violations, "app."))
    return visit.redirect("/rules?saved=1")


def _read_number(text: str, field: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise FieldsInvalid([Violation(field, "must be a whole number")])
    return int(text)


# Keys


async def show_keys(visit: Visit) -> Response:
    """The app's keys."""
    return await _render_keys(visit)


async def _render_keys(visit: Visit, *, secret: str = "", faults: Mapping[str, str] | None = None) -> Response:
    keys: list[apps_pb2.ApiKey] = []
    token = ""
    while True:
        request = apps_pb2.ListApiKeysRequest(parent=visit.parent, page_size=1000, page_token=token)
        page = await visit.client.apps.ListApiKeys(request)
        keys += page.api_keys
        token = page.next_page_token
        if not token:
            break
    return visit.render(
        "keys.html",
        400 if faults else 200,
        keys=[
            {
                "id": read_id(key.name),
                "display_name": key.display_name,
                "scopes": [options_pb2.Scope.Name(scope).removeprefix("SCOPE_").lower() for scope in key.scopes],
                "create_time": to_time(key.create_time),
                "revoke_time": to_time(key.revoke_time),
            }
            for key in reversed(keys)
        ],
        scopes=_SCOPES,
        secret=secret,
        faults=faults or name_faults(),
    )


async def create_key(visit: Visit) -> Response:
    """Make a key and show its secret, this once."""
    form = await visit.read_form()
    scopes = [options_pb2.Scope.Value(f"SCOPE_{str(scope).upper()}") for scope in form.getlist("scope") if scope in _SCOPES]
    key = apps_pb2.ApiKey(display_name=str(form.get("display_name", "")), scopes=scopes)
    try:
        made = await visit.client.apps.CreateApiKey(apps_pb2.CreateApiKeyRequest(parent=visit.parent, api_key=key))
    except FieldsInvalid as error:
        return await _render_keys(visit, faults=name_faults(error.violations, "api_key."))
    return await _render_keys(visit, secret=made.secret)


async def revoke_key(visit: Visit) -> Response:
    """Revoke a key at once."""
    name = visit.name("apiKeys", visit.param("key"))
    await visit.client.apps.DeleteApiKey(apps_pb2.DeleteApiKeyRequest(name=name))
    return visit.redirect("/keys")


# Users


async def show_users(visit: Visit) -> Response:
    """Who may sign in."""
    return await _render_users(visit)


async def _render_users(
    visit: Visit, *, password: str = "", email: str = "", faults: Mapping[str, str] | None = None
) -> Response:
    async with transaction(visit.console.engine) as conn:
        users = await store.list_users(conn, visit.app.app_id)
    status, faults = (400 if faults else 200), faults or name_faults()
    return visit.render("users.html", status, users=users, roles=store.ROLES, password=password, email=email, faults=faults)


async def create_user(visit: Visit) -> Response:
    """Make a user with a password that is shown this once."""
    form = await visit.read_form()
    given = str(form.get("email", ""))
    password = secrets.token_urlsafe(12)
    try:
        email = check_user(given, str(form.get("role", "")))
        password_hash = await visit.console.accounts.hash(password)
        async with transaction(visit.console.engine) as conn:
            await store.create_user(conn, visit.app.app_id, email, str(form.get("role", "")), password_hash)
            await _record(visit, conn, "Users/CreateUser", email)
    except FieldsInvalid as error:
        return await _render_users(visit, email=given, faults=name_faults(error.violations))
    except AlreadyExists:
        faults = name_faults([Violation("email", "is a user of this app already")])
        return await _render_users(visit, email=given, faults=faults)
    return await _render_users(visit, password=password, email=email)


async def change_user(visit: Visit) -> Response:
    """Change a role, give a new password, or delete, as the pressed button says."""
    form = await visit.read_form()
    email, what = str(form.get("email", "")), str(form.get("do", ""))
    password = ""
    try:
        match what:
            case "password":
                password = secrets.token_urlsafe(12)
                password_hash = await visit.console.accounts.hash(password)
                async with transaction(visit.console.engine) as conn:
                    user = await store.find_user(conn, visit.app.app_id, email)
                    if user is None:
                        raise FieldsInvalid([Violation("change", "there is no such user any more")])
                    await store.set_password_hash(conn, user.user_id, password_hash)
                    await _record(visit, conn, "Users/SetPassword", email)
            case "role" | "delete":
                role = str(form.get("role", "")) if what == "role" else None
                async with transaction(visit.console.engine) as conn:
                    await change_role(conn, visit.app, email, role)
                    await _record(visit, conn, "Users/SetRole" if role else "Users/DeleteUser", email)
            case _:
                raise FieldsInvalid([Violation("change", "choose what to change")])
    except FieldsInvalid as error:
        return await _render_users(visit, faults=name_faults([Violation("change", words.explain(error))]))
    return await _render_users(visit, password=password, email=email) if password else visit.redirect("/users")


async def _record(visit: Visit, conn: AsyncConnection, method: str, email: str) -> None:
    await record_entry(conn, visit.app.app_id, visit.caller.actor, method, visit.name("users", email))


# The audit log


async def show_audit(visit: Visit) -> Response:
    """Who changed what, newest first."""
    before = visit.query("before")
    async with transaction(visit.console.engine) as conn:
        entries = await list_entries(
            conn, visit.app.app_id, int(before) if before.isdecimal() and len(before) < 18 else None, AUDIT_PAGE + 1
        )
    return visit.render("audit.html", entries=entries[:AUDIT_PAGE], has_more=len(entries) > AUDIT_PAGE)
