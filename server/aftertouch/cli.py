"""The ``aftertouch`` command: run a server, look after its database, and try it out."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import secrets
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

from aftertouch.channels import Channel
from aftertouch.config import Config, ConfigError, load_config, name_setting
from aftertouch.plugins import Discovery, Registry, SettingsWrong, build_registry, discover_channels
from aftertouch.plugins import name_setting as name_channel_setting

app = typer.Typer(
    help="Aftertouch: send a campaign, hear what happened to it, and message those who did, or did not, do a thing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
apps = typer.Typer(help="Apps are tenants: everything belongs to one.", no_args_is_help=True)
keys = typer.Typer(help="API keys: what callers of an app authenticate with.", no_args_is_help=True)
users = typer.Typer(help="Users: who signs in to the console of an app.", no_args_is_help=True)
contacts = typer.Typer(help="The people of an app.", no_args_is_help=True)
lists = typer.Typer(help="Named sets of people.", no_args_is_help=True)
channels = typer.Typer(help="The installed channels, and what they lack.", invoke_without_command=True)
_GROUPS = {"apps": apps, "keys": keys, "users": users, "contacts": contacts, "lists": lists, "channels": channels}
for _name, _group in _GROUPS.items():
    app.add_typer(_group, name=_name)

SANDBOX_USER = "you@example.com"
SANDBOX_TEMPLATES = {
    "summer_sale": "Hello {{1}}, our summer sale ends on Sunday.",
    "winter_sale": "Hello {{1}}, the winter sale has begun.",
    "spring_sale": "Hello {{1}}, the new season is here.",
    "welcome_back": "Hi {{first_name}}, good to see you again. {{voucher}} takes 10 % off your next order.",
    "spring_preview": "Hello {{1}}, have a look at what comes in spring.",
}
"""What WhatsApp keeps for whoever tries it out."""
ServerAddress = Annotated[
    str,
    typer.Option(envvar=["AFTERTOUCH_ADDRESS", "AFTERTOUCH_GRPC_ADDRESS"], help="The server's gRPC address.", show_envvar=True),
]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

STOP_SECONDS = 28
"""Of a worker: the slowest provider call takes 20, and a process is usually given 30."""
KEYS_AT_ONCE = 1_000
MOST_TOLD = 1_000
"""Rows of a file that are named when they are left out."""


class CommandFailed(Exception):
    """A command cannot go on; the text says why and what to do. It exits with 1, or 2 for wrong settings."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def main() -> None:
    """Run the command line."""
    try:
        app()
    except CommandFailed as error:
        err.print(f"aftertouch: {error}", markup=False)
        sys.exit(error.code)


def _run(work: Coroutine[Any, Any, None]) -> None:
    # Closed when what it needs is not installed: it would be told as never awaited.
    with closing(work):
        from uvicorn.loops.auto import auto_loop_factory

        from aftertouch.errors import AftertouchError
        from aftertouch.ingest.spool import SpoolUnusable
        from aftertouch.store.embedded import EmbeddedPostgresError
        from aftertouch.store.engine import SchemaMismatch
        from aftertouch.supervisor import ServersFailed

        try:
            # uvloop where there is one: a fifth less CPU for a webhook, the same for events on a stream, and a POST to a provider
            # costs 17 µs instead of 45.
            with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
                runner.run(work)
        except (AftertouchError, EmbeddedPostgresError, SchemaMismatch, ServersFailed, SpoolUnusable, OSError) as error:
            raise CommandFailed(str(error)) from error
        except KeyboardInterrupt:
            raise CommandFailed("stopped", 130) from None


def _discover(allowed: frozenset[str] | None = None) -> Discovery:
    return discover_channels(allowed=allowed)


def _load(environment: dict[str, str] | None = None) -> tuple[Config, Discovery]:
    """The settings and the channels; exits with 2 and every problem when the settings are wrong."""
    from aftertouch.logs import configure_logs

    found = _discover()
    try:
        config = load_config(environment or dict(os.environ), [name_channel_setting(name, "") for name in found.types])
    except ConfigError as error:
        raise CommandFailed("the settings are wrong:\n" + "\n".join(f"  {problem}" for problem in error.problems), 2) from error
    if config.allowed_channels is not None:
        if unknown := sorted(config.allowed_channels - found.types.keys()):
            known = ", ".join(sorted(found.types)) or "none"
            raise CommandFailed(f"AFTERTOUCH_CHANNELS names {', '.join(unknown)}; installed are {known}", 2)
        found = _discover(config.allowed_channels)
    configure_logs(config.log_format, config.log_level)
    return config, found


@app.command()
def serve(
    sandbox: Annotated[bool, typer.Option(help="Send to a sandbox on this machine, with 10,000 people to play with.")] = False,
    processes: Annotated[
        int | None, typer.Option(help="How many processes serve, on the same ports; AFTERTOUCH_PROCESSES or 1 by default.")
    ] = None,
    lifeline: Annotated[int | None, typer.Option(hidden=True, help="The descriptor that ties a process to the others.")] = None,
) -> None:
    """Serve gRPC and webhooks, and send; with an embedded PostgreSQL unless AFTERTOUCH_DATABASE_URL names one."""
    if processes is not None:
        os.environ[name_setting("processes")] = str(processes)
    _run(_serve(sandbox) if lifeline is None else _serve_beside(lifeline))


async def _serve(with_sandbox: bool) -> None:
    from aftertouch.server import serve as run_server
    from aftertouch.supervisor import supervise
    from aftertouch.web.server import bind

    environment = dict(os.environ)
    stopping = _stop_on_signals()
    async with AsyncExitStack() as stack:
        if with_sandbox:
            from aftertouch.sandbox import Sandbox, SandboxSettings

            playground = SandboxSettings(templates=SANDBOX_TEMPLATES, template_statuses={"spring_preview": "PENDING"})
            world = await stack.enter_async_context(Sandbox(playground))
            environment |= world.environment
        config, discovery = _load(environment)
        if config.processes > 1:
            engine, addresses = await stack.enter_async_context(supervise(config, environment, stopping))
            registry = build_registry(discovery, environment, webhook_base_url="")
        else:
            listener = bind(config.http_address)
            core, addresses = await stack.enter_async_context(run_server(config, discovery, environment, stopping, listener))
            engine, registry = core.engine, core.registry
        if with_sandbox:
            # Only now is the port known that the ingress was given.
            world.meta.webhooks.url = f"http://{addresses.http}/v1/webhooks/whatsapp"
            password = await _settle_in(engine, world, addresses.grpc)
            if config.serve_console:
                page = f"http://{addresses.http}/console"
                out.print(f"sign in at {page} to the app sandbox as {SANDBOX_USER} with {password}", markup=False)
        out.print(f"gRPC on {addresses.grpc}, webhooks on http://{addresses.http}", markup=False)
        ready = ", ".join(sorted(registry.channels)) or "none"
        others = "" if with_sandbox else "; `aftertouch channels` tells about the others"
        out.print(f"channels that can send: {ready}{others}", markup=False)
        await stopping.wait()
        out.print("stopping …")


async def _serve_beside(descriptor: int) -> None:
    """Serve as one of several processes, of which another one is the supervisor."""
    from aftertouch.server import serve as run_server
    from aftertouch.supervisor import Lifeline
    from aftertouch.web.server import bind

    stopping = _stop_on_signals()
    lifeline = Lifeline(descriptor)
    watching = asyncio.create_task(lifeline.watch(stopping), name="watch the supervisor")
    config, discovery = _load()
    listener = bind(config.http_address, is_shared=True)
    async with run_server(config, discovery, os.environ, stopping, listener, is_shared=True):
        await lifeline.report_ready()
        await stopping.wait()
    watching.cancel()


async def _settle_in(engine: Any, world: Any, address: str) -> str:
    """Make the app that plays in the sandbox, once, with its people; a new key for it, and a new password for its user."""
    from aftertouch.client import Client
    from aftertouch.contact_files import read_contacts
    from aftertouch.store import apps as store
    from aftertouch.store.engine import transaction

    async with transaction(engine) as conn:
        found = await store.find_app(conn, "sandbox")
        created = found or await store.create_app(conn, "sandbox", "Sandbox")
        _, secret = await store.create_api_key(conn, created.app_id, "aftertouch serve --sandbox", ["admin"])
        password = secrets.token_urlsafe(9)
        await _admit_user(conn, created, SANDBOX_USER, "admin", password, reset=True)
    # The push addresses hold the sandbox's port, which is new at every start.
    async with Client(address, api_key=secret, app="sandbox") as client:
        await client.import_contacts(read_contacts(world.population.list_rows()))
    out.print(f"the app is sandbox with {world.settings.size:,} people; its key for this run:\n{secret}", markup=False)
    return password


@app.command()
def worker() -> None:
    """Only send, beside servers on the same database; run as many as you like."""
    _run(_work())


async def _work() -> None:
    from aftertouch.server import open_core, open_database, send_beside, serve_metrics

    config, discovery = _load()
    if config.public_url is None:
        raise CommandFailed("a worker needs AFTERTOUCH_PUBLIC_URL: messages name where their receipts go", 2)
    stopping = _stop_on_signals()
    async with (
        open_database(config, may_share=True, may_make=False) as url,
        open_core(config, url, discovery, os.environ, config.public_url) as core,
        send_beside(config, core, stopping),
        serve_metrics(config, core),
    ):
        out.print("sending")
        await stopping.wait()
        out.print("stopping …")
        # A database that hangs would be waited for, and a stop that hangs is a crash, which harms nobody. As the alarm's
        # default action, since what hangs may be this loop.
        signal.alarm(STOP_SECONDS)
    signal.alarm(0)


def _stop_on_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    return stopping


@app.command()
def migrate() -> None:
    """Bring the database's schema up to date. Run it once for a new database, and before a newer server."""
    _run(_migrate())


async def _migrate() -> None:
    from aftertouch.server import open_database
    from aftertouch.store.engine import SCHEMA_REVISION
    from aftertouch.store.migrate import migrate as run_migrations

    config, _ = _load()
    async with open_database(config, may_share=True) as url:
        await run_migrations(url)
    out.print(f"the schema is {SCHEMA_REVISION}")


@app.command()
def sandbox(
    port: Annotated[int, typer.Option(help="Where it listens on 127.0.0.1.")] = 7072,
    people: Annotated[int, typer.Option(help="How many people there are.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal people and fates.")] = 1,
    webhook_url: Annotated[
        str, typer.Option(help="Where Meta's stand-in reports to.")
    ] = "http://127.0.0.1:7071/v1/webhooks/whatsapp",
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the people there, for `contacts import`.")] = None,
    time_scale: Annotated[float, typer.Option(help="Multiplies every delay.")] = 1.0,
) -> None:
    """Stand in for Twilio, Meta and a push service on this machine, and print the settings to use it with."""
    from aftertouch.sandbox import Sandbox, SandboxSettings, run

    def tell(world: Sandbox) -> None:
        if csv_file is not None:
            world.population.write_csv(csv_file)
        for name, value in world.environment.items():
            out.print(f"export {name}='{value}'", markup=False)
        out.print(f"# the sandbox answers on {world.url}", markup=False)

    settings = SandboxSettings(seed=seed, size=people, port=port, whatsapp_webhook_url=webhook_url, time_scale=time_scale)
    run(settings, started=tell)


@app.command()
def demo(people: Annotated[int, typer.Option(min=400, help="How many people there are.")] = 10_000) -> None:
    """Run the main job end to end in a world of its own, compare it with the truth, and leave nothing running."""
    from aftertouch.demo import run_demo

    raise SystemExit(run_demo(people))


@app.command()
def settings() -> None:
    """List the server's settings, with their values where they are no secrets."""
    config, _ = _load()
    table = Table("Setting", "Value", "Meaning", box=None)
    for field, info in Config.model_fields.items():
        value = getattr(config, field)
        table.add_row(name_setting(field), "" if value is None else str(value), info.description or "")
    out.print(table)


@asynccontextmanager
async def _open_connection(*, may_make: bool = False) -> AsyncIterator[Any]:
    from aftertouch.server import open_database
    from aftertouch.store.engine import check_schema, open_engine, transaction

    config, _ = _load()
    async with (
        open_database(config, may_share=True, may_make=may_make) as url,
        open_engine(url, pool_size=1) as engine,
    ):
        await check_schema(engine)
        async with transaction(engine) as conn:
            yield conn


@asynccontextmanager
async def _open_app(name: str) -> AsyncIterator[tuple[Any, Any]]:
    """A connection, and the app of this name."""
    from aftertouch.errors import NotFound
    from aftertouch.store.apps import find_app

    async with _open_connection() as conn:
        found = await find_app(conn, name)
        if found is None:
            raise NotFound(f"apps/{name}")
        yield conn, found


@apps.command("create")
def create_app(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and hyphens, as in acme.")],
    display_name: Annotated[str | None, typer.Option(help="For people.")] = None,
) -> None:
    """Make an app."""
    from aftertouch.store.apps import is_app_name

    if not is_app_name(name):
        raise CommandFailed(f"{name!r} is no name for an app: lower-case letters, digits and hyphens, beginning with a letter")
    _run(_create_app(name, display_name or name))


async def _create_app(name: str, display_name: str) -> None:
    from aftertouch.store import apps as store

    async with _open_connection(may_make=True) as conn:
        created = await store.create_app(conn, name, display_name)
    out.print(f"{created.name} was made; `aftertouch keys create {name}` makes a key for it", markup=False)


@apps.command("list")
def list_apps() -> None:
    """List the apps."""
    _run(_list_apps())


async def _list_apps() -> None:
    from aftertouch.store import apps as store

    table = Table("App", "Name", "Retargeting", "Retention", "Made", box=None)
    async with _open_connection() as conn:
        for found in await store.list_apps(conn):
            enabled = f"since {found.retargetable_since:%Y-%m-%d %H:%M}" if found.retargeting_enabled else "not in the plan"
            table.add_row(found.app, found.display_name, enabled, f"{found.retention_days} days", f"{found.create_time:%Y-%m-%d}")
    out.print(table)


@apps.command("retargeting")
def set_retargeting(
    name: Annotated[str, typer.Argument(help="The app.")],
    enabled: Annotated[bool, typer.Option("--on/--off", help="Whether its plan includes retargeting.")],
) -> None:
    """Put retargeting into an app's plan, or take it out. Campaigns sent before it is put in stay out."""
    _run(_set_retargeting(name, enabled))


async def _set_retargeting(name: str, enabled: bool) -> None:
    from aftertouch.store import apps as store

    async with _open_app(name) as (conn, found):
        await store.set_retargeting(conn, found.app_id, enabled=enabled, since=datetime.now(UTC))
    out.print(f"retargeting is {'on' if enabled else 'off'} for {name}", markup=False)


@apps.command("retention")
def set_retention(
    name: Annotated[str, typer.Argument(help="The app.")],
    days: Annotated[int, typer.Argument(help="From 1 to 365; 30 unless you say otherwise.", min=1, max=365)],
) -> None:
    """Say how long after its launch a campaign can be retargeted. Event data is kept as long as the longest of all apps'."""
    _run(_set_retention(name, days))


async def _set_retention(name: str, days: int) -> None:
    from aftertouch.store import apps as store

    async with _open_app(name) as (conn, found):
        await store.update_app(conn, found.app_id, retention_days=days)
    out.print(f"campaigns of {name} can be retargeted for {days} days", markup=False)


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="The app.")],
    scopes: Annotated[
        list[str] | None, typer.Option("--scope", help="admin, manage, ingest or read; give it again for several.")
    ] = None,
    display_name: Annotated[str, typer.Option(help="What the key is for.")] = "made on the command line",
) -> None:
    """Make an API key and print its secret, once; only its hash is stored."""
    _run(_create_key(name, scopes or ["manage"], display_name))


async def _create_key(name: str, scopes: list[str], display_name: str) -> None:
    from aftertouch.store import apps as store

    if unknown := [scope for scope in scopes if scope not in store.SCOPES]:
        raise CommandFailed(f"no scope {', '.join(unknown)}; there are {', '.join(store.SCOPES)}")
    from aftertouch.store.audit import record_entry

    async with _open_app(name) as (conn, found):
        key, secret = await store.create_api_key(conn, found.app_id, display_name, scopes)
        await record_entry(conn, found.app_id, "command line", "Apps/CreateApiKey", f"{found.name}/apiKeys/{key.api_key}")
    err.print(f"{found.name}/apiKeys/{key.api_key} may {', '.join(key.scopes)}; its secret is shown only now:", markup=False)
    out.print(secret, markup=False)


@keys.command("list")
def list_keys(name: Annotated[str, typer.Argument(help="The app.")]) -> None:
    """List an app's API keys, never their secrets."""
    _run(_list_keys(name))


async def _list_keys(name: str) -> None:
    from aftertouch.store.apps import list_api_keys

    table = Table("Key", "For", "May", "Made", "Revoked", box=None)
    async with _open_app(name) as (conn, found):
        page = await list_api_keys(conn, found.app_id, None, KEYS_AT_ONCE)
        while page:
            for key in page:
                revoked = f"{key.revoke_time:%Y-%m-%d}" if key.revoke_time else ""
                # What somebody called it is no markup.
                table.add_row(key.api_key, Text(key.display_name), ", ".join(key.scopes), f"{key.create_time:%Y-%m-%d}", revoked)
            page = await list_api_keys(conn, found.app_id, page[-1].api_key, KEYS_AT_ONCE)
    out.print(table)


@keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="The app.")],
    key: Annotated[str, typer.Argument(help="The key's id, as `keys list` shows it and the middle of its secret is: at_ID_…")],
) -> None:
    """Have nobody be let in by an API key any more, at once and for good."""
    _run(_revoke_key(name, key))


async def _revoke_key(name: str, key: str) -> None:
    from aftertouch.errors import NotFound
    from aftertouch.store.apps import revoke_api_key
    from aftertouch.store.audit import record_entry

    async with _open_app(name) as (conn, found):
        if not await revoke_api_key(conn, found.app_id, key, datetime.now(UTC)):
            raise NotFound(f"{found.name}/apiKeys/{key}")
        await record_entry(conn, found.app_id, "command line", "Apps/RevokeApiKey", f"{found.name}/apiKeys/{key}")
    out.print(f"{found.name}/apiKeys/{key} is revoked", markup=False)


@users.command("create")
def create_user(
    name: Annotated[str, typer.Argument(help="The app.")],
    email: Annotated[str, typer.Argument(help="What they sign in with.")],
    role: Annotated[str, typer.Option(help="viewer looks, marketer also sends, admin also manages keys and users.")] = "marketer",
    reset: Annotated[bool, typer.Option(help="Give a user who exists a new password.")] = False,
) -> None:
    """Make a user of the console, with a password that is asked for, or made and printed when there is no terminal."""
    password = typer.prompt("Password", hide_input=True, confirmation_prompt=True) if sys.stdin.isatty() else ""
    _run(_create_user(name, email, role, password, reset))


async def _create_user(name: str, email: str, role: str, password: str, reset: bool) -> None:

    made = "" if password else secrets.token_urlsafe(12)
    async with _open_app(name) as (conn, found):
        await _admit_user(conn, found, email, role, password or made, reset=reset)
    app_name = found.name.removeprefix("apps/")
    err.print(f"{email} has the role {role}; they sign in at /console to the app {app_name}", markup=False)
    if made:
        out.print(made, markup=False)


async def _admit_user(conn: Any, app: Any, email: str, role: str, password: str, *, reset: bool) -> None:
    """Make a user, or with ``reset`` give one who exists this password and role."""
    from aftertouch.console.accounts import Accounts, check_user
    from aftertouch.store import users as store
    from aftertouch.store.audit import record_entry

    email = check_user(email, role)
    password_hash = await Accounts().hash(password)
    user = await store.find_user(conn, app.app_id, email) if reset else None
    if user is None:
        await store.create_user(conn, app.app_id, email, role, password_hash)
    else:
        await store.set_password_hash(conn, user.user_id, password_hash)
        await store.set_role(conn, user.user_id, role)
    await record_entry(conn, app.app_id, "command line", "Users/CreateUser", f"{app.name}/users/{email}")


@users.command("list")
def list_users(name: Annotated[str, typer.Argument(help="The app.")]) -> None:
    """List who may sign in."""
    _run(_list_users(name))


async def _list_users(name: str) -> None:
    from aftertouch.store.users import list_users as read_users

    table = Table("User", "Role", "Made", "Last signed in", box=None)
    async with _open_app(name) as (conn, found):
        for user in await read_users(conn, found.app_id):
            signed_in = f"{user.sign_in_time:%Y-%m-%d %H:%M}" if user.sign_in_time else "never"
            table.add_row(user.email, user.role, f"{user.create_time:%Y-%m-%d}", signed_in)
    out.print(table)


@channels.callback()
def list_channels(
    context: typer.Context,
    app_name: Annotated[str | None, typer.Option("--app", help="For whom: an app may have accounts of its own.")] = None,
) -> None:
    """List the installed channels with their health, missing settings and broken plugins."""
    if context.invoked_subcommand is None:
        _run(_list_channels(app_name))


async def _list_channels(app_name: str | None) -> None:
    config, discovery = _load()
    registry = build_registry(discovery, os.environ, webhook_base_url=f"{config.public_url or ''}/v1/webhooks")
    own = {} if app_name is None else await _find_own_problems(config, registry, app_name)
    problems = {**registry.obstacles, **own}
    table = Table("Channel", "State", "Account", "From", "Actions", box=None)
    for name, found in sorted(registry.types.items()):
        state, account = "not ready" if problems.get(name) else "ready", "its own" if name in own else "server's"
        table.add_row(name, state, account, f"{found.distribution} {found.version}", ", ".join(found.actions))
    out.print(table)
    for name, obstacles in sorted(problems.items()):
        for obstacle in obstacles:
            out.print(f"{name}: {obstacle}", markup=False)
    for problem in registry.problems:
        err.print(f"broken: {problem.entry_point} of {problem.distribution}: {problem.cause}", markup=False)
    if registry.problems:
        raise CommandFailed("some plugins are broken; the others work")


async def _find_own_problems(config: Config, registry: Registry, app_name: str) -> Mapping[str, Sequence[str]]:
    """What is wrong with the settings that an app has of its own, by channel; nothing where they can be used."""
    from aftertouch.ingest.accounts import name_webhook
    from aftertouch.server import read_secret_key
    from aftertouch.store.app_secrets import list_own_channels, read_own_settings
    from aftertouch.vault import SealBroken, Vault

    vault = Vault(read_secret_key(config))
    problems: dict[str, Sequence[str]] = {}
    async with _open_app(app_name) as (conn, found):
        for name in await list_own_channels(conn, found.app_id):
            stored = await read_own_settings(conn, vault, found.app_id, name)
            if name not in registry.types or stored is None:
                continue
            try:
                registry.build_own(name, stored.require_values(), name_webhook(config.public_url or "", found, name))
                problems[name] = []
            except SettingsWrong as error:
                problems[name] = error.texts
            except SealBroken as error:
                problems[name] = [str(error)]
    return problems


@channels.command("new")
def new_channel(
    name: Annotated[str, typer.Argument(help="The channel's name: a lower-case word, as in pager.")],
    directory: Annotated[Path, typer.Option(help="Where the folder aftertouch-<name> is made.")] = Path("."),
) -> None:
    """Write the files of a new channel, which keep the contract at once: begin with them, and change them."""
    from aftertouch.scaffold import ScaffoldRefused, write_channel

    if name in _discover().types:
        raise CommandFailed(f"there is a channel {name} already")
    try:
        files = write_channel(name, directory)
    except ScaffoldRefused as error:
        raise CommandFailed(str(error)) from error
    for path in files:
        out.print(str(path), markup=False)
    folder = files[0].parent
    out.print(f"install it with `pip install -e {folder}`, and hold it to the contract with `pytest {folder}`", markup=False)


@channels.command("test")
def send_one(
    name: Annotated[str, typer.Argument(help="The channel.")],
    to: Annotated[str, typer.Option(help="The address: its one field's value, or all fields as JSON.")],
    content: Annotated[str, typer.Option(help="What to say, as JSON: what a campaign's content would be, without templates.")],
    app_name: Annotated[
        str | None, typer.Option("--app", help="Whose settings and keys to use, where an app has its own.")
    ] = None,
) -> None:
    """Send one message for real, outside of any campaign. What is reported of it is counted nowhere."""
    _run(_send_one(name, to, content, app_name))


async def _send_one(name: str, to: str, content: str, app_name: str | None) -> None:
    import numpy as np
    from pydantic import ValidationError

    from aftertouch.channels import Accepted, Message, Refused
    from aftertouch.ingest.tokens import TEST_POSITION, TokenCodec
    from aftertouch.server import read_secret_key

    config, discovery = _load()
    registry = _build_registry(config, discovery, name)
    declared = discovery.types[name].channel
    built, app_keys = await _find_channel(config, registry, name, app_name)
    try:
        address = built.parse_address(_read_address(declared, to))
        said = declared.content_model.model_validate_json(content)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        texts = (f"  {'.'.join(map(str, fault['loc'])) or 'it'}: {fault['msg']}" for fault in faults)
        raise CommandFailed(f"this is not what {error.title} takes:\n" + "\n".join(texts)) from None
    (token,) = TokenCodec(read_secret_key(config)).make(0, np.array([TEST_POSITION]))
    async with built as channel:
        (outcome,) = await channel.send([Message(token=token, address=address, content=said, app_keys=app_keys)])
    match outcome:
        case Accepted():
            out.print(f"accepted{f' as {outcome.message_id}' if outcome.message_id else ''}", markup=False)
        case Refused():
            raise CommandFailed(f"refused: {outcome.code} ({declared.classify(outcome.code)})")
        case _:
            raise CommandFailed(f"nobody knows whether it was sent: {outcome.detail}")


def _read_address(declared: type[Channel], text: str) -> dict[str, Any]:
    """An address as its fields: JSON, or the value of the one that is required."""
    if text.startswith("{"):
        try:
            values: dict[str, Any] = json.loads(text)
        except ValueError as error:
            raise CommandFailed(f"--to is no JSON: {error}") from error
        return values
    required = [field for field, info in declared.address_model.model_fields.items() if info.is_required()]
    if len(required) != 1:
        raise CommandFailed(f"an address here has {', '.join(required)}; give them as JSON")
    return {required[0]: text}


def _build_registry(config: Config, discovery: Discovery, name: str) -> Registry:
    """The channels, of which there has to be this one."""
    from aftertouch.web.ingress import WEBHOOKS

    if name not in discovery.types:
        known = ", ".join(sorted(discovery.types))
        raise CommandFailed(f"no channel {name} is installed; there are {known}")
    base = config.public_url or f"http://{config.http_address}"
    return build_registry(discovery, os.environ, webhook_base_url=base + WEBHOOKS)


async def _find_channel(config: Config, registry: Registry, name: str, app_name: str | None) -> tuple[Channel, Mapping[str, str]]:
    """The channel as an app speaks through it, which is to be opened, and the app's keys on it."""
    from aftertouch.errors import ChannelNotReady
    from aftertouch.ingest.accounts import name_webhook
    from aftertouch.server import read_secret_key
    from aftertouch.store.app_secrets import ensure_app_keys, read_own_settings
    from aftertouch.vault import SealBroken, Vault

    keys: Mapping[str, str] = {}
    if app_name is not None:
        vault = Vault(read_secret_key(config))
        async with _open_app(app_name) as (conn, found):
            keys = await ensure_app_keys(conn, vault, found.app_id, registry.types[name].channel)
            own = await read_own_settings(conn, vault, found.app_id, name)
        if own is not None:
            base = config.public_url or f"http://{config.http_address}"
            try:
                return registry.build_own(name, own.require_values(), name_webhook(base, found, name)), keys
            except (SettingsWrong, SealBroken) as error:
                raise ChannelNotReady(name, [f"the app's own settings: {error}"]) from None
    if name not in registry.channels:
        raise CommandFailed("the channel is not ready:\n" + "\n".join(f"  {text}" for text in registry.obstacles[name]), 2)
    return registry.channels[name], keys


@channels.command("set")
def set_channel(
    name: Annotated[str, typer.Argument(help="The channel.")],
    values: Annotated[
        list[str], typer.Argument(help="setting=value; setting= goes back to the default, setting=- asks for the value.")
    ],
    app_name: Annotated[str, typer.Option("--app", help="Whose own settings they are.")],
) -> None:
    """Have a channel speak for one app through an account of its own. Settings that are not named stay as they are."""
    given = {}
    for written in values:
        field, equals, value = written.partition("=")
        if not equals:
            raise CommandFailed(f"{written} has no =; write setting=value", 2)
        given[field] = typer.prompt(field, hide_input=True) if value == "-" else value
    _run(_set_channel(name, given, app_name))


async def _set_channel(name: str, given: Mapping[str, str], app_name: str) -> None:
    from aftertouch.ingest.accounts import name_webhook
    from aftertouch.server import read_secret_key
    from aftertouch.store.app_secrets import merge_own_settings, put_own_settings
    from aftertouch.store.audit import record_entry
    from aftertouch.vault import Vault

    config, discovery = _load()
    registry, vault = _build_registry(config, discovery, name), Vault(read_secret_key(config))
    async with _open_app(app_name) as (conn, found):
        merged = await merge_own_settings(conn, vault, found.app_id, name, given)
        url = name_webhook(config.public_url or f"http://{config.http_address}", found, name)
        try:
            registry.build_own(name, merged, url)
        except SettingsWrong as error:
            raise CommandFailed("these settings cannot be used:\n" + "\n".join(f"  {text}" for text in error.texts), 2) from None
        await put_own_settings(conn, vault, found.app_id, name, merged)
        await record_entry(conn, found.app_id, "command line", "Channels/UpdateChannelSettings", _name_own(app_name, name))
    out.print(f"{app_name} speaks through its own account on {name}: {', '.join(sorted(merged))}", markup=False)
    if discovery.types[name].channel.capabilities.webhooks:
        out.print(f"its provider has to report to {url}", markup=False)


def _name_own(app_name: str, channel: str) -> str:
    return f"apps/{app_name}/channelSettings/{channel}"


@channels.command("unset")
def unset_channel(
    name: Annotated[str, typer.Argument(help="The channel.")],
    app_name: Annotated[str, typer.Option("--app", help="Whose own settings are forgotten.")],
) -> None:
    """Have a channel speak for an app through the server's account again."""
    _run(_unset_channel(name, app_name))


async def _unset_channel(name: str, app_name: str) -> None:
    from aftertouch.errors import NotFound
    from aftertouch.store.app_secrets import delete_own_settings
    from aftertouch.store.audit import record_entry

    async with _open_app(app_name) as (conn, found):
        if not await delete_own_settings(conn, found.app_id, name):
            raise NotFound(_name_own(app_name, name))
        await record_entry(conn, found.app_id, "command line", "Channels/DeleteChannelSettings", _name_own(app_name, name))
    out.print(f"{app_name} has no settings of its own on {name} any more", markup=False)


@contacts.command("import")
def import_contacts(
    file: Annotated[Path, typer.Argument(help="CSV with a header; see --help.", exists=True, dir_okay=False)],
    app_name: Annotated[str, typer.Option("--app", help="The app.")],
    key: Annotated[str, typer.Option(envvar="AFTERTOUCH_API_KEY", help="An API key that may manage.", show_default=False)],
    address: ServerAddress = "127.0.0.1:7070",
) -> None:
    """Import people from a CSV file, showing progress, and report the rows that cannot be taken, with reasons.

    The header's columns are external_id, time_zone, <channel>.<address field> (sms.phone, push.keys.auth) and, for all
    other names, attributes. Empty cells are left out. Importing a file again changes nothing.
    """
    _run(_import_contacts(file, app_name, key, address))


async def _import_contacts(file: Path, app_name: str, key: str, address: str) -> None:
    from aftertouch.client import Client
    from aftertouch.contact_files import LeftOut, read_contacts

    left_out = LeftOut(MOST_TOLD)
    with _open_rows(file) as (rows, advance):
        async with Client(address, api_key=key, app=app_name) as client:
            with _told_as_failure():
                result = await client.import_contacts(read_contacts(rows, left_out.add), advance)
    for rejection in result.rejections:
        left_out.add_answer(rejection.index, rejection.external_id, rejection.description, rejection.field)
    rejected = result.rejected_count + left_out.unread_count
    out.print(f"{result.created_count:,} made, {result.updated_count:,} updated, {rejected:,} rejected", markup=False)
    _tell_left_out(left_out, rejected)


@contacts.command("erase")
def erase_contact(
    external_id: Annotated[str, typer.Argument(help="Who.")],
    app_name: Annotated[str, typer.Option("--app", help="The app.")],
    key: Annotated[str, typer.Option(envvar="AFTERTOUCH_API_KEY", help="An API key that may manage.", show_default=False)],
    address: ServerAddress = "127.0.0.1:7070",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase a person for good, and say what was removed. The counts of campaigns stay as they are."""
    if not yes:
        typer.confirm(f"Erase {external_id} of {app_name} for good?", abort=True)
    _run(_erase_contact(external_id, app_name, key, address))


async def _erase_contact(external_id: str, app_name: str, key: str, address: str) -> None:
    from aftertouch.client import Client
    from aftertouch.v1.contacts_pb2 import EraseContactRequest

    async with Client(address, api_key=key, app=app_name) as client:
        with _told_as_failure():
            erased = await client.contacts.EraseContact(EraseContactRequest(name=client.name("contacts", external_id)))
    out.print(
        f"erased, with {erased.subscription_count:,} addresses; taken out of {erased.list_count:,} lists and"
        f" {erased.audience_count:,} audiences; {erased.attempt_count:,} attempts blanked;"
        f" {erased.unrecognized_receipt_count:,} receipts that nobody understood deleted",
        markup=False,
    )


@lists.command("import")
def import_list(
    file: Annotated[Path, typer.Argument(help="CSV with a column external_id.", exists=True, dir_okay=False)],
    name: Annotated[str, typer.Option("--list", help="The list: lower-case letters, digits and hyphens.")],
    app_name: Annotated[str, typer.Option("--app", help="The app.")],
    key: Annotated[str, typer.Option(envvar="AFTERTOUCH_API_KEY", help="An API key that may manage.", show_default=False)],
    display_name: Annotated[str | None, typer.Option(help="For people, when the list is made.")] = None,
    address: ServerAddress = "127.0.0.1:7070",
) -> None:
    """Add the people of a CSV file to a list, which is made when it is new, and report the rows that cannot be added.

    People have to be contacts: `aftertouch contacts import` takes the same file. Importing a file again changes nothing.
    """
    _run(_import_list(file, name, app_name, key, display_name or name, address))


async def _import_list(file: Path, name: str, app_name: str, key: str, display_name: str, address: str) -> None:
    from aftertouch.client import Client
    from aftertouch.contact_files import LeftOut, read_external_ids

    left_out = LeftOut(MOST_TOLD)
    with _open_rows(file) as (rows, advance):
        async with Client(address, api_key=key, app=app_name) as client:
            with _told_as_failure():
                await _make_list(client, name, display_name)
                ids = read_external_ids(rows, left_out.add)
                result = await client.import_list_contacts(client.name("lists", name), ids, advance)
    for rejection in result.rejections:
        left_out.add_answer(rejection.index, rejection.contact, rejection.description)
    rejected = result.rejected_count + left_out.unread_count
    out.print(f"{result.added_count:,} added, {result.present_count:,} in it already, {rejected:,} rejected", markup=False)
    _tell_left_out(left_out, rejected)


async def _make_list(client: Any, name: str, display_name: str) -> None:
    """Make the list, unless it is there."""
    from aftertouch.client import CallError, read_reason
    from aftertouch.v1.lists_pb2 import CreateListRequest, List

    made = CreateListRequest(parent=client.parent, list_id=name, list=List(display_name=display_name))
    try:
        await client.lists.CreateList(made)
    except CallError as error:
        if read_reason(error)[0] != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def _open_rows(file: Path) -> Iterator[tuple[Any, Callable[[int], None]]]:
    """The rows of a CSV file with a header, and what to tell how many have left, for the progress that is shown."""
    from aftertouch.contact_files import HeaderError, check_header

    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            header = next(csv.reader(lines), [])
            total = sum(1 for _ in csv.reader(lines))
    except (csv.Error, UnicodeDecodeError) as error:
        raise CommandFailed(f"{file} is not a CSV file in UTF-8: {error}") from error
    try:
        check_header(header)
    except HeaderError as error:
        raise CommandFailed(str(error)) from error
    with Progress(console=err, transient=True) as progress, file.open(newline="", encoding="utf-8-sig") as lines:
        task = progress.add_task("importing", total=total)
        yield csv.DictReader(lines), lambda sent: progress.update(task, completed=sent)


@contextmanager
def _told_as_failure() -> Iterator[None]:
    from aftertouch.client import CallError

    try:
        yield
    except CallError as error:
        hint = "; is that its address? --address says where it is" if error.code().name == "UNAVAILABLE" else ""
        raise CommandFailed(f"the server answered {error.code().name}: {error.details()}{hint}") from error


def _tell_left_out(left_out: Any, count: int) -> None:
    """Print rows that were left out in the order of the file, and fail if there are any."""
    for rejected in left_out.told:
        field = f"{rejected.field}: " if rejected.field else ""
        err.print(f"row {rejected.place + 1} ({rejected.external_id or 'no external_id'}): {field}{rejected.text}", markup=False)
    if count:
        raise CommandFailed(f"{count:,} {'row was' if count == 1 else 'rows were'} rejected; any others are stored")
