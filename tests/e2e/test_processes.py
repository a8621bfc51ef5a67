"""`aftertouch serve --processes`: all answer on both ports, die one by one or together, and write the same receipts at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aftertouch.demo import SERVER_READY
from aftertouch.processes import Child, ProcessFailed
from aftertouch.store.embedded import find_running_url
from aftertouch.store.engine import open_engine
from aftertouch.supervisor import MOST_DEATHS
from tests.e2e.producers import MOST_PRODUCERS, Producer, launch_target, read_receipts, unite_people
from tests.e2e.site import is_running, kill, read_postgres_pid
from tests.fix_world import SECRET_KEY

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

CONNECTIONS = 60
"""The kernel deals each to a process at random: that one of three gets none happens once in 10^10."""


def configure(directory: Path, **settings: str) -> dict[str, str]:
    return {
        "AFTERTOUCH_DATA_DIR": str(directory / "data"),
        "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
        "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
        "AFTERTOUCH_HTTP_ADDRESS": "127.0.0.1:0",
        **{f"AFTERTOUCH_{name.upper()}": value for name, value in settings.items()},
    }


@asynccontextmanager
async def run_servers(directory: Path, count: int, **settings: str) -> AsyncIterator[Child]:
    environment = configure(directory, **settings)
    log = directory / "server.log"
    async with Child("serve", f"--processes={count}", environment=environment, ready=SERVER_READY, log=log) as servers:
        yield servers


def list_servers(supervisor: Child) -> set[int]:
    """The server processes below a supervisor."""
    return {
        process.pid
        for process in psutil.process_iter(["ppid", "cmdline"])
        if process.info["ppid"] == supervisor.process.pid and "--lifeline" in (process.info["cmdline"] or ())
    }


def find_answering(pids: set[int], port: int) -> set[int]:
    """Those of the processes that have taken a connection on a port."""
    return {
        pid
        for pid in pids
        for connection in psutil.Process(pid).net_connections("tcp")
        if connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
    }


async def wait_until(holds: Callable[[], bool], seconds: float = 120) -> None:
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - the news is other processes'
            await asyncio.sleep(0.05)


def read_ports(servers: Child) -> tuple[int, int]:
    grpc_address, http_address = servers.found
    return int(grpc_address.rpartition(":")[2]), int(http_address.rpartition(":")[2])


async def call_grpc(stack: AsyncExitStack, port: int) -> None:
    """One call on a connection of its own, which stays open."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}", options))
    answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), wait_for_ready=True)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def call_http(stack: AsyncExitStack, port: int) -> None:
    """One request on a connection of its own, which stays open."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    stack.push_async_callback(writer.wait_closed)
    stack.callback(writer.close)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def check_all_answer(servers: Child, pids: set[int]) -> None:
    """Each of the processes takes connections on both ports."""
    for port, call in zip(read_ports(servers), (call_grpc, call_http), strict=True):
        answering: set[int] = set()
        async with AsyncExitStack() as stack:
            for called in asyncio.as_completed([call(stack, port) for _ in range(CONNECTIONS)]):
                await called
                # After each: a server closes what says nothing for a while, and the last may take longer.
                if answering != pids:
                    answering |= find_answering(pids, port)
        assert answering == pids


async def test_processes_all_answer_on_both_ports_and_stop_together(tmp_path: Path) -> None:
    async with run_servers(tmp_path, 3) as servers:
        pids = list_servers(servers)
        assert len(pids) == 3
        await check_all_answer(servers, pids)
        postgres = read_postgres_pid(tmp_path)
        assert await servers.stop() == 0
        assert not any(map(is_running, [*pids, postgres]))


async def test_killed_process_is_told_and_replaced(tmp_path: Path) -> None:
    async with run_servers(tmp_path, 2) as servers:
        first, second = list_servers(servers)
        kill(first)
        await wait_until(lambda: "answers again" in (tmp_path / "server.log").read_text())
        pids = list_servers(servers)
        assert second in pids
        assert len(pids - {first}) == 2
        await check_all_answer(servers, pids)
    log = (tmp_path / "server.log").read_text()
    assert log.count("a server process died") == 1
    assert "exit_code=-9" in log


async def test_process_that_keeps_dying_ends_all(tmp_path: Path) -> None:
    async with run_servers(tmp_path, 2) as servers:
        steady = min(list_servers(servers))
        for _ in range(MOST_DEATHS + 1):
            await wait_until(lambda: len(list_servers(servers)) == 2)
            (victim,) = list_servers(servers) - {steady}
            kill(victim)
            await wait_until(lambda: victim not in list_servers(servers))  # noqa: B023 - waited for here
        assert await servers.process.wait() == 1
        assert not is_running(steady)
        assert f"died {MOST_DEATHS + 1} times in a row" in (tmp_path / "server.log").read_text()


async def test_killed_supervisor_leaves_nothing_behind(tmp_path: Path) -> None:
    async with run_servers(tmp_path, 2) as servers:
        left = [*list_servers(servers), read_postgres_pid(tmp_path)]
        await servers.kill()
        await wait_until(lambda: not any(map(is_running, left)))
        await servers.start()
        await check_all_answer(servers, list_servers(servers))


async def test_ports_of_other_servers_are_not_shared(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    async with run_servers(tmp_path, 2) as servers:
        for setting, address in zip(("grpc_address", "http_address"), servers.found, strict=True):
            other = run_servers(tmp_path / "other", 2, **{setting: address.removeprefix("http://")})
            with pytest.raises(ProcessFailed, match="is another server running there"):
                await other.__aenter__()


async def test_sandbox_goes_with_several_processes(tmp_path: Path) -> None:
    environment = configure(tmp_path, processes="2")
    async with Child("serve", "--sandbox", environment=environment, ready=SERVER_READY, log=tmp_path / "server.log") as servers:
        assert len(list_servers(servers)) == 2
        assert any("the app is sandbox with 10,000 people" in line for line in servers.lines)
        await wait_until(lambda: any("channels that can send: push, sms, whatsapp" in line for line in servers.lines))


async def test_streams_into_several_processes_lose_and_double_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(run_servers(tmp_path, 2))
        url = find_running_url(tmp_path / "data")
        assert url is not None
        engine = await stack.enter_async_context(open_engine(url, pool_size=1))
        target = await launch_target(engine, "acme", "shared", 20_000, SECRET_KEY)
        # So many that they are all dealt to one process once in 30,000 times.
        producers = [Producer(target, number, batch=500, pause=0) for number in range(MOST_PRODUCERS)]
        done = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            for producer in producers:
                group.create_task(producer.run(servers.found[0], done))
            port = read_ports(servers)[0]
            await wait_until(lambda: len(find_answering(list_servers(servers), port)) == 2)
            await wait_until(lambda: all(producer.acknowledged >= 25 for producer in producers))
            done.set()
        for producer in producers:
            assert await producer.find_differences(engine) == []
        assert await read_receipts(engine, target) == unite_people(producers)
    assert "deadlock detected" not in (tmp_path / "data/postgres.log").read_text()
