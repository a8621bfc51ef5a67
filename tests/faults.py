"""`make test-faults`: everything is killed and cut at random while events and webhooks come in, and then nothing is missing.

Streams may lose nothing that was acknowledged and hold or count nothing twice; a webhook that was answered 2xx is in the
receipts. First with one server process, then with two on the same ports. The last line of each run is a JSON object of what was
done. The exit code is not 0 when the server's books differ from what was sent.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
from sqlalchemy.ext.asyncio import AsyncEngine
from twilio.request_validator import RequestValidator

from aftertouch.demo import SERVER_READY
from aftertouch.processes import Child, ProcessFailed
from aftertouch.server import migrate_new
from aftertouch.store.embedded import EmbeddedPostgres
from aftertouch.store.engine import open_engine
from tests.e2e.producers import Producer, Target, count_minutes, launch_target, read_minutes, read_receipts, unite_people
from tests.ports import keep_port

SECRET_KEY = "a secret key of the faults, 32 characters or more"
AUTH_TOKEN = "a Twilio auth token"
PUBLIC_URL = "https://hooks.example.com"
PRODUCERS = 4
POSTMEN = 8
PEOPLE = 50_000
LONGEST_CUT = 20_000
"""Bytes that a connection may still carry before it is cut: a batch has about 5,000, a webhook 500."""
PASSING = ("the database does not answer", "cannot listen on", "a server process ended while it started")
"""Why a start may fail that succeeds later: PostgreSQL recovers, or processes that lost their supervisor have not ended yet."""
REPLAY_SECONDS = 120.0
"""How long webhooks that were answered while the database was away may take into the receipts."""
STATUSES = (("delivered", "delivered", None), ("undelivered", "failed", "30003"))
"""A status of Twilio's, the signal that it is, and its code."""


class Wire:
    """A TCP proxy that cuts its connections, with a reset, after any byte."""

    def __init__(self, target: str, chance: random.Random) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._chance = chance
        self._left: dict[asyncio.Task[None], int] = {}
        """Connections that are to be cut, and the bytes until then."""
        self._connections: set[asyncio.Task[None]] = set()
        self.address = ""
        self.cuts = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Wire]:
        """Carry connections meanwhile."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        try:
            yield self
        finally:
            server.close()
            for connection in self._connections:
                connection.cancel()
            await asyncio.gather(*self._connections, return_exceptions=True)

    def cut_soon(self) -> None:
        """Cut every connection after a few more bytes, each after its own number."""
        for connection in self._connections:
            self._left.setdefault(connection, self._chance.randrange(LONGEST_CUT))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        ends = [writer]
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
            ends.append(back)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._carry(connection, reader, back))
                group.create_task(self._carry(connection, there, writer))
        except* OSError:
            for end in (end for end in ends if not end.transport.is_closing()):
                # With no time to linger, closing sends a reset, and what was not sent yet is gone.
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.transport.abort()
        finally:
            self._connections.discard(connection)
            self._left.pop(connection, None)
            for end in ends:
                end.close()

    async def _carry(self, connection: asyncio.Task[None], source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65_536):
            if connection in self._left:
                self._left[connection] -= len(data)
                if self._left[connection] < 0:
                    sink.write(data[: self._left[connection]])
                    await sink.drain()
                    self.cuts += 1
                    raise ConnectionResetError
            sink.write(data)
            await sink.drain()
        sink.write_eof()


class Database:
    """A PostgreSQL of our own that stays at its address through kills and restarts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._running: EmbeddedPostgres | None = None
        self.url = ""

    async def start(self) -> None:
        """Start it, with whatever recovery it needs."""
        self._running = await EmbeddedPostgres(self._directory).__aenter__()
        assert self.url in ("", self._running.url)
        self.url = self._running.url

    async def stop(self) -> None:
        """Stop what is left of it."""
        if self._running is not None:
            await self._running.__aexit__(None, None, None)
            self._running = None

    async def strike(self, number: signal.Signals) -> None:
        """Send the postmaster a signal that ends it."""
        assert self._running is not None
        os.kill(self._postmaster, number)
        await self._running.wait()
        await self.stop()

    def crash(self, chance: random.Random) -> None:
        """Kill one process of its own below the postmaster, which then restarts all the others."""
        if backends := psutil.Process(self._postmaster).children():
            with suppress(psutil.NoSuchProcess):  # it ended by itself just now
                chance.choice(backends).kill()

    @property
    def _postmaster(self) -> int:
        return int((self._directory / "pg/postmaster.pid").read_text().split("\n")[0])


class Postman:
    """Brings signed Twilio callbacks, each again and again until it is answered 2xx."""

    def __init__(self, target: Target, number: int) -> None:
        self._target = target
        self._chance = random.Random(number)
        self._validator = RequestValidator(AUTH_TOKEN)
        self.told: Counter[tuple[str, int]] = Counter()
        """Signal and person of each callback that was answered 2xx."""
        self.repeats = 0

    async def run(self, address: str, done: asyncio.Event) -> None:
        """Bring callbacks until ``done``, the last one to its end."""
        while not done.is_set():
            person = self._chance.randrange(len(self._target.tokens))
            status, signal_name, code = self._chance.choice(STATUSES)
            form = {"MessageSid": f"SM{self._chance.getrandbits(128):032x}", "MessageStatus": status}
            if code is not None:
                form["ErrorCode"] = code
            await self._deliver(address, f"/v1/webhooks/sms?t={self._target.tokens[person]}", form)
            self.told[signal_name, person] += 1
            await asyncio.sleep(self._chance.uniform(0, 0.05))

    async def _deliver(self, address: str, path: str, form: dict[str, str]) -> None:
        headers = {"X-Twilio-Signature": self._validator.compute_signature(PUBLIC_URL + path, form)}
        while True:
            # A session for each try: a connection that was cut must not be reused.
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=15)) as session:
                try:
                    async with session.post(f"http://{address}{path}", data=form, headers=headers) as answer:
                        if answer.ok:
                            return
                        if answer.status != 503:
                            raise AssertionError(f"a webhook was answered {answer.status}: {await answer.text()}")
                except (aiohttp.ClientError, TimeoutError):
                    pass  # nobody knows whether it arrived, so it is brought again, as a provider does
            self.repeats += 1
            await asyncio.sleep(self._chance.uniform(0.05, 0.5))


class Manager:
    """A process manager: it starts the server again whenever that is gone."""

    def __init__(self, server: Child, chance: random.Random) -> None:
        self._server = server
        self._chance = chance
        self._answers = asyncio.Event()
        self._answers.set()

    async def run(self) -> None:
        """Keep it running until cancelled."""
        while True:
            await self._server.process.wait()
            self._answers.clear()
            while not self._answers.is_set():
                try:
                    await self._server.start()
                    self._answers.set()
                except ProcessFailed as error:
                    if not any(reason in str(error) for reason in PASSING):
                        raise

    async def kill(self) -> None:
        """kill -9, and with it none, some or all of the processes below it, which end by themselves when they are alone."""
        await self._answers.wait()
        below = list_servers(self._server)
        self._answers.clear()
        await self._server.kill()
        for process in self._chance.sample(below, self._chance.randint(0, len(below))):
            with suppress(psutil.NoSuchProcess):
                process.kill()

    async def wait(self) -> None:
        """Wait until the server answers."""
        await self._answers.wait()


def list_servers(server: Child) -> list[psutil.Process]:
    """The processes that serve below a supervisor; none where the server is only one."""
    found = []
    # Any of them may end just now, or have ended and not been missed yet.
    with suppress(psutil.NoSuchProcess):
        for process in psutil.Process(server.process.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "--lifeline" in process.cmdline():
                    found.append(process)
    return found


class Trouble:
    """The faults, and how often each was made."""

    def __init__(
        self, server: Child, manager: Manager, database: Database, wires: list[Wire], chance: random.Random, processes: int
    ) -> None:
        self._server = server
        self._manager = manager
        self._database = database
        self._wires = wires
        self._chance = chance
        self.made: Counter[str] = Counter()
        self._kinds: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            "connection cut": (6, self._cut_connections),
            "server killed": (3, self._kill_server),
            "postgres process killed": (2, self._crash_postgres),
            "postgres killed": (2, self._kill_postgres),
            "postgres restarted": (2, self._restart_postgres),
            "server and postgres killed": (1, self._kill_both),
        }
        """Each with its weight: what is over sooner happens more often."""
        if processes > 1:
            self._kinds["one server process killed"] = (4, self._kill_one)

    async def make(self, seconds: float) -> None:
        """Make every kind of fault once, in any order, then any, for so long."""
        deadline = time.monotonic() + seconds
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        upcoming = self._chance.sample(names, len(names))
        while upcoming or time.monotonic() < deadline:
            await asyncio.sleep(self._chance.uniform(0, 1.5))
            name = upcoming.pop() if upcoming else self._chance.choices(names, weights)[0]
            await self._kinds[name][1]()
            self.made[name] += 1
            print(f"{max(0, deadline - time.monotonic()):5.0f} s left: {name}", flush=True)

    async def _cut_connections(self) -> None:
        self._chance.choice(self._wires).cut_soon()

    async def _kill_server(self) -> None:
        await self._manager.kill()
        await self._manager.wait()

    async def _kill_one(self) -> None:
        if below := list_servers(self._server):
            with suppress(psutil.NoSuchProcess):  # it ended by itself just now
                self._chance.choice(below).kill()

    async def _crash_postgres(self) -> None:
        self._database.crash(self._chance)

    async def _kill_postgres(self) -> None:
        await self._database.strike(signal.SIGKILL)
        await asyncio.sleep(self._chance.uniform(0, 2))
        await self._database.start()

    async def _restart_postgres(self) -> None:
        # SIGQUIT is PostgreSQL's immediate shutdown: every connection breaks, and the next start recovers.
        await self._database.strike(signal.SIGQUIT)
        await self._database.start()

    async def _kill_both(self) -> None:
        await asyncio.gather(self._manager.kill(), self._database.strike(signal.SIGKILL))
        await self._database.start()
        await self._manager.wait()


async def find_differences(engine: AsyncEngine, producers: list[Producer], streamed: Target) -> list[str]:
    """In what the log, the receipts and the counts by minute differ from what was streamed."""
    differences = [line for producer in producers for line in await producer.find_differences(engine)]
    differences += compare("streamed", unite_people(producers), await read_receipts(engine, streamed))
    counted, expected = await read_minutes(engine, streamed), count_minutes(producers)
    if counted != expected:
        differences.append(f"counts by minute: {(expected - counted).total()} missing, {(counted - expected).total()} too many")
    return differences


async def find_lost_webhooks(engine: AsyncEngine, postmen: list[Postman], target: Target) -> list[str]:
    """In what the receipts differ from the callbacks that were answered 2xx, once those that wait are in."""
    expected: dict[str, set[int]] = {}
    for signal_name, person in [told for postman in postmen for told in postman.told]:
        expected.setdefault(signal_name, set()).add(person)
    deadline = time.monotonic() + REPLAY_SECONDS
    while differences := compare("told", expected, await read_receipts(engine, target)):
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.5)
    return differences


def compare(what: str, expected: dict[str, set[int]], found: dict[str, set[int]]) -> list[str]:
    """In what two maps of people by signal differ."""
    return [
        f"receipts of what was {what}, {name}: {len(expected.get(name, set()) - found.get(name, set()))} missing, "
        f"{len(found.get(name, set()) - expected.get(name, set()))} of nobody"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


async def main(directory: Path, seconds: float, seed: int, processes: int) -> int:
    print(f"seed {seed}", flush=True)
    chance = random.Random(seed)
    async with AsyncExitStack() as stack:
        database = Database(directory / "db")
        await database.start()
        stack.push_async_callback(database.stop)
        await migrate_new(database.url)
        async with open_engine(database.url) as engine:
            streamed = await launch_target(engine, "acme", "streamed", PEOPLE, SECRET_KEY)
            told = await launch_target(engine, "acme", "told", PEOPLE, SECRET_KEY)
        addresses = [stack.enter_context(keep_port()) for _ in range(2)]
        environment = {
            "AFTERTOUCH_DATABASE_URL": database.url,
            "AFTERTOUCH_DATA_DIR": str(directory / "data"),
            "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
            "AFTERTOUCH_GRPC_ADDRESS": addresses[0],
            "AFTERTOUCH_HTTP_ADDRESS": addresses[1],
            "AFTERTOUCH_PUBLIC_URL": PUBLIC_URL,
            "AFTERTOUCH_PROCESSES": str(processes),
            "AFTERTOUCH_CHANNELS": "sms",
            "AFTERTOUCH_SMS_ACCOUNT_SID": "AC" + "0" * 32,
            "AFTERTOUCH_SMS_AUTH_TOKEN": AUTH_TOKEN,
            "AFTERTOUCH_SMS_SENDER": "+15005550006",
        }
        server = Child("serve", environment=environment, ready=SERVER_READY, log=directory / "server.log")
        await stack.enter_async_context(server)
        wires = [await stack.enter_async_context(Wire(address, chance).open()) for address in addresses]
        producers = [Producer(streamed, number) for number in range(PRODUCERS)]
        postmen = [Postman(told, number) for number in range(POSTMEN)]
        manager = Manager(server, chance)
        trouble = Trouble(server, manager, database, wires, chance, processes)
        done = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                managing = group.create_task(manager.run())
                bringing = [group.create_task(producer.run(wires[0].address, done)) for producer in producers]
                bringing += [group.create_task(postman.run(wires[1].address, done)) for postman in postmen]
                await trouble.make(seconds)
                done.set()
                await asyncio.gather(*bringing)
                managing.cancel()
        except BaseException:
            print((directory / "server.log").read_text(errors="replace")[-5000:], file=sys.stderr)
            raise
        async with open_engine(database.url) as engine:
            differences = await find_differences(engine, producers, streamed) + await find_lost_webhooks(engine, postmen, told)
    for difference in differences:
        print(difference, file=sys.stderr)
    result = {
        "seed": seed,
        "processes": processes,
        "faults": trouble.made.total(),
        "kinds of faults": dict(trouble.made),
        "connections cut": sum(wire.cuts for wire in wires),
        "events": sum(len(producer.events) for producer in producers),
        "replays": sum(producer.replays for producer in producers),
        "webhooks": sum(postman.told.total() for postman in postmen),
        "webhooks repeated": sum(postman.repeats for postman in postmen),
        "differences": len(differences),
    }
    print(json.dumps(result))
    return 1 if differences else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=180.0, help="how long faults are made")
    parser.add_argument("--seed", type=int, default=None, help="of the faults, as printed by an earlier run")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="of the server; a run for each number")
    given = parser.parse_args()
    seed_given = random.randrange(2**32) if given.seed is None else given.seed
    for processes_given in given.processes:
        with tempfile.TemporaryDirectory(prefix="aftertouch-faults-") as made:
            Path(made).chmod(0o711)  # PostgreSQL runs as another user when we are root
            if asyncio.run(main(Path(made), given.seconds, seed_given, processes_given)):
                sys.exit(1)
