"""A running Aftertouch: database, ledger, channels, gRPC, HTTP and sending, put together and taken down in order.

Taken down in reverse: first nothing new comes in, then what came in is made durable, then the channels and the database
close.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import secrets
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.pool import QueuePool

from aftertouch import metrics
from aftertouch.config import Config
from aftertouch.console.app import open_console
from aftertouch.console.issuer import find_issuer
from aftertouch.console.visits import PREFIX
from aftertouch.delivery.breaker import BreakerSettings
from aftertouch.delivery.clicks import Clicks
from aftertouch.delivery.context import MessageContext
from aftertouch.delivery.reconciliation import Reconciler
from aftertouch.delivery.worker import Worker
from aftertouch.errors import AftertouchError
from aftertouch.ingest.accounts import Accounts
from aftertouch.ingest.enrolment import Enrolment
from aftertouch.ingest.intake import Intake
from aftertouch.ingest.ledger import Ledger
from aftertouch.ingest.spool import Spool
from aftertouch.ingest.tokens import TokenCodec
from aftertouch.plugins import Discovery, Registry, build_registry
from aftertouch.rpc.server import create_servicers, serve_grpc
from aftertouch.store.apps import DEFAULT_RETENTION_DAYS, list_apps
from aftertouch.store.clusters import note_cluster
from aftertouch.store.embedded import EmbeddedPostgres, EmbeddedPostgresError, find_running_url, has_cluster
from aftertouch.store.engine import SchemaMismatch, check_schema, open_engine, transaction
from aftertouch.store.erasures import blank_late_attempts
from aftertouch.store.imports import forget_imports
from aftertouch.store.logs import forget_unrecognized
from aftertouch.store.paces import forget_limits
from aftertouch.store.partitions import create_partitions, drop_partitions, lock_housekeeping
from aftertouch.store.requests import forget_requests
from aftertouch.store.users import forget_sessions
from aftertouch.vault import Vault
from aftertouch.web.browsers import Browsers
from aftertouch.web.ingress import WEBHOOKS, create_ingress
from aftertouch.web.metrics import create_metrics
from aftertouch.web.server import bind, mount, serve_http

log = structlog.get_logger()

HOUSEKEEPING_SECONDS = 3600.0
LEDGER_CONNECTIONS = 4
"""To the database, and as many more while there is much to do."""


@dataclass(frozen=True)
class Core:
    """What every server process has: the database, the channels, and the way of events."""

    engine: AsyncEngine
    registry: Registry
    ledger: Ledger
    context: MessageContext


@asynccontextmanager
async def open_database(
    config: Config, *, may_share: bool = False, may_make: bool = True, stopping: asyncio.Event | None = None
) -> AsyncIterator[str]:
    """The libpq URL of the configured database, or of an embedded one that runs meanwhile. A new embedded one gets its schema.

    Args:
        may_share: use the embedded one of a server that runs on the data directory, as commands beside it do.
        may_make: make an embedded one where there is none.
        stopping: set when the embedded one ends by itself.

    Raises:
        EmbeddedPostgresError: it is not there, cannot be started, or ended by itself.
    """
    if config.database_url is not None:
        yield config.database_url.get_secret_value()
        return
    if running := find_running_url(config.data_dir) if may_share else None:
        yield running
        return
    if not may_make and not has_cluster(config.data_dir):
        raise EmbeddedPostgresError(
            f"there is no database in {config.data_dir.resolve()}: run this where the server runs, or name its folder with "
            "AFTERTOUCH_DATA_DIR, or its database with AFTERTOUCH_DATABASE_URL"
        )
    async with EmbeddedPostgres(config.data_dir, bindir=config.pg_bindir) as postgres:
        await migrate_new(postgres.url)
        dying = asyncio.create_task(postgres.wait(), name="watch PostgreSQL")
        if stopping is not None:
            dying.add_done_callback(lambda _: stopping.set())
        try:
            yield postgres.url
        finally:
            # After its death whatever is closed meanwhile fails too, and only this says why.
            if dying.done():
                raise EmbeddedPostgresError(
                    f"the embedded PostgreSQL ended by itself ({dying.result()}); see {config.data_dir / 'postgres.log'}"
                )
            dying.cancel()


async def migrate_new(database_url: str) -> None:
    """Give a database that nobody has used yet its schema; any other is left as it is."""
    try:
        async with open_engine(database_url) as engine:
            await check_schema(engine)
    except SchemaMismatch as error:
        if not error.is_empty:
            raise
        from aftertouch.store.migrate import migrate

        await migrate(database_url)


def read_secret_key(config: Config) -> bytes:
    """The configured secret key, or the one in the data directory, made at first use."""
    if config.secret_key is not None:
        return config.secret_key.get_secret_value().encode()
    path = config.data_dir / "secret.key"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        _write_new(path, secrets.token_urlsafe(32).encode())
        return path.read_bytes()


def _write_new(path: Path, content: bytes) -> None:
    """Write a private file at once or not at all; one that somebody else made meanwhile stays."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        log.info("the secret key exists", action="make_secret_key")
    finally:
        draft.unlink()


@asynccontextmanager
async def open_core(
    config: Config, database_url: str, discovery: Discovery, environment: Mapping[str, str], public_url: str
) -> AsyncIterator[Core]:
    """Connect, check the schema, and open channels and ledger.

    Raises:
        SchemaMismatch: the schema is not this code's; the text names the command that mends it.
    """
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(open_engine(database_url))
        await check_schema(engine)
        built = build_registry(discovery, environment, webhook_base_url=public_url + WEBHOOKS)
        registry = await stack.enter_async_context(built.open())
        for problem in registry.problems:
            log.error("a plugin is broken", action="load_plugins", distribution=problem.distribution, cause=problem.cause)
        for name, obstacles in registry.obstacles.items():
            log.warning("a channel cannot send", action="load_plugins", channel=name, obstacles=list(obstacles))
        secret_key = read_secret_key(config)
        # Connections of its own: calls that hold one of the others wait for the ledger's look-ups and commits, never the reverse.
        own = await stack.enter_async_context(open_engine(database_url, pool_size=LEDGER_CONNECTIONS))
        ledger = Ledger(own, registry.types, TokenCodec(secret_key))
        await stack.enter_async_context(ledger)
        _spare_collections()
        vault = Vault(secret_key)
        accounts = await stack.enter_async_context(Accounts(engine, registry, vault, public_url))
        yield Core(engine, registry, ledger, MessageContext(vault, accounts, public_url))


def _spare_collections() -> None:
    """Let the garbage collector leave alone what is there now, and look less often: next to nothing here is in cycles.

    Walking 150,000 objects of modules over and over took a seventh of a sending worker's CPU.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _keep_memory() -> None:
    """Let glibc keep what is freed, up to 64 MB, instead of giving it back and asking for it again a moment later.

    Every commit fills arrays of megabytes, and most of the time went into new pages for them: grouping 100,000 events into bits
    took 10 to 19 ms instead of 2.5. Larger blocks, as rolls of millions are, come and go as ever.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        mallopt(_M_MMAP_THRESHOLD, 16 << 20)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""As in glibc's malloc.h."""


async def keep_house(engine: AsyncEngine) -> None:
    """Make partitions ahead, drop those that no app keeps any longer; forget old requests, and what came late of the erased."""
    today = datetime.now(UTC).date()
    # Making and dropping a partition locks its log until the commit, so nothing that takes long comes with it.
    async with transaction(engine) as conn:
        await lock_housekeeping(conn)
        if await note_cluster(conn):
            log.info("the database is new in this PostgreSQL: watches of events begin anew", action="note_cluster")
        kept = max((app.retention_days for app in await list_apps(conn)), default=DEFAULT_RETENTION_DAYS)
        for day in await drop_partitions(conn, today - timedelta(days=kept)):
            log.info("a day's events are kept no longer", action="drop_partitions", day=day.isoformat())
        await create_partitions(conn, today)
    async with transaction(engine) as conn:
        await lock_housekeeping(conn)
        if blanked := await blank_late_attempts(conn):
            log.info("messages of people who were erased meanwhile were blanked", action="erase_contact", count=blanked)
        await forget_unrecognized(conn, datetime.now(UTC) - timedelta(days=kept))
        await forget_requests(conn)
        await forget_limits(conn)
        await forget_sessions(conn)
        await forget_imports(conn)


async def _keep_house_hourly(engine: AsyncEngine) -> None:
    while True:
        await asyncio.sleep(HOUSEKEEPING_SECONDS)
        try:
            await keep_house(engine)
        except AftertouchError as error:
            # Partitions are made a week ahead, so the next hours will do.
            log.warning("housekeeping waits for the database", action="keep_house", reason=error.reason)
        except Exception:
            # A defect of ours here is no reason to take no webhooks.
            log.exception("housekeeping failed", action="keep_house")


@dataclass(frozen=True)
class Addresses:
    """Where a running server answers."""

    grpc: str
    http: str
    public_url: str
    metrics: str = ""
    """Empty where nobody asked for it."""


@asynccontextmanager
async def serve(
    config: Config,
    discovery: Discovery,
    environment: Mapping[str, str],
    stopping: asyncio.Event,
    listener: socket.socket,
    *,
    is_shared: bool = False,
) -> AsyncIterator[tuple[Core, Addresses]]:
    """Run a whole server; the body of the context runs while it serves, and ``stopping`` is set when a part of it dies.

    Args:
        listener: the bound socket for HTTP; its address is known before the channels are built with it.
        is_shared: other processes listen on the same ports.
    """
    public_url = config.public_url or f"http://{_name_address(listener)}"
    async with AsyncExitStack() as stack:
        database_url = await stack.enter_async_context(open_database(config, stopping=stopping))
        core = await stack.enter_async_context(open_core(config, database_url, discovery, environment, public_url))
        await keep_house(core.engine)
        intake = await stack.enter_async_context(_open_intake(config, core, stopping))
        ending = asyncio.Event()
        servicers = create_servicers(core.registry, core.ledger, core.context, ending)
        browsers = Browsers(Enrolment(core.engine, core.registry, core.context.accounts, core.context.vault))
        clicks = Clicks(core.engine, core.registry, core.ledger, intake)
        http = create_ingress(core.registry, core.context.accounts, intake, browsers, clicks, public_url)
        if config.serve_console:
            issuer = find_issuer(config, public_url)
            console = await stack.enter_async_context(open_console(core.engine, core.registry, servicers, public_url, issuer))
            http = mount(http, console, ("/", PREFIX))
        await stack.enter_async_context(serve_http(http, listener))
        metrics_address = await stack.enter_async_context(serve_metrics(config, core))
        port = await stack.enter_async_context(
            serve_grpc(
                *(core.engine, servicers, config.grpc_address, ending),
                with_channelz=config.channelz,
                is_shared=is_shared,
            )
        )
        await stack.enter_async_context(_run_beside(_keep_house_hourly(core.engine), "keep house", stopping))
        reconciler = Reconciler(core.engine, core.ledger, core.registry, core.context.accounts)
        await stack.enter_async_context(_run_beside(reconciler.run(), "ask for receipts", stopping))
        await stack.enter_async_context(send_beside(config, core, stopping))
        grpc_host = config.grpc_address.rpartition(":")[0]
        yield core, Addresses(f"{grpc_host}:{port}", _name_address(listener), public_url, metrics_address)


@asynccontextmanager
async def serve_metrics(config: Config, core: Core) -> AsyncIterator[str]:
    """Serve what the process counts meanwhile, where that is configured; hands out the address."""
    if config.metrics_address is None:
        yield ""
        return
    metrics.EVENTS_WAITING.set_function(lambda: core.ledger.waiting_count)
    pool = core.engine.pool
    metrics.CONNECTIONS.set_function(lambda: pool.checkedout() if isinstance(pool, QueuePool) else 0)
    with bind(config.metrics_address) as listener:
        async with serve_http(create_metrics(core.engine), listener):
            yield _name_address(listener)


@asynccontextmanager
async def send_beside(config: Config, core: Core, stopping: asyncio.Event) -> AsyncIterator[None]:
    """Send work units meanwhile; the batches under way are finished first when it ends."""
    done = asyncio.Event()
    breaker = BreakerSettings(config.pause_failures, config.pause_percent)
    worker = Worker(core.engine, core.ledger, core.registry, core.context, units=config.send_units, breaker=breaker)
    sending = asyncio.create_task(worker.run(done), name="send")
    sending.add_done_callback(lambda _: stopping.set())
    try:
        yield
    finally:
        done.set()
        core.ledger.lose_patience()
        await sending


@asynccontextmanager
async def _open_intake(config: Config, core: Core, stopping: asyncio.Event) -> AsyncIterator[Intake]:
    """Take webhooks meanwhile, and replay those that an earlier server or an absent database left in the spool.

    Raises:
        SpoolUnusable: the text says what to do about it.
    """
    async with AsyncExitStack() as stack:
        most_bytes = config.spool_megabytes * 1_000_000
        spool = await stack.enter_async_context(Spool(config.data_dir, most_bytes)) if most_bytes else None
        intake = await stack.enter_async_context(Intake(core.ledger, core.registry.types, spool))
        if spool:
            metrics.SPOOLED.labels("waiting").set_function(lambda: spool.waiting)
            metrics.SPOOLED.labels("aside").set_function(lambda: spool.aside)
            await stack.enter_async_context(_run_beside(intake.replay(spool), "replay the spool", stopping))
        yield intake


@asynccontextmanager
async def _run_beside(work: Coroutine[Any, Any, Any], name: str, stopping: asyncio.Event) -> AsyncIterator[None]:
    """Run ``work`` meanwhile; when it ends by itself, the server stops."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(lambda _: stopping.set())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _name_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
