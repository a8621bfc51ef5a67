"""`make bench-send`: messages per second of one worker, which renders, encrypts, POSTs and records, against ECDH alone and
against a loop over ``pywebpush.webpush``; and how long the first message of a campaign to ten million people takes.

Database, server, worker and sink are processes of this machine. A rate counts from the launch until everybody is dealt with,
and afterwards the sink must have had every message once, and the receipts must say so. Of the ten million only some have
subscriptions behind them: the first message does not wait for the others, and a worker's memory is read while it sends to those.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import http_ece
import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from google.protobuf.json_format import ParseDict
from google.protobuf.struct_pb2 import Struct
from pywebpush import webpush
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from aftertouch.client import Client
from aftertouch.processes import Child, run_command
from aftertouch.rolls.chunks import CHUNK, block_of, pack_positions
from aftertouch.rolls.sql import SetChange, change_sets
from aftertouch.store import apps as apps_store
from aftertouch.store.contacts import standing_set
from aftertouch.store.engine import open_engine, transaction
from aftertouch.v1 import campaigns_pb2, contacts_pb2

PEOPLE = 30_000
PHONES = 10_000
"""Of them, with a phone: SMS and WhatsApp take no more people to measure."""
FEW, MANY = 10_000, 10_000_000
REACHABLE = 200_000
"""Of the many, with a subscription: more than a worker reaches while its memory is watched."""
WATCH_SECONDS = 10.0
CURVE = ec.SECP256R1()
ATTRIBUTES = ("Ada", "Grace", "Edsger", "Barbara")
CONTENT = {
    "push": {
        "title": "Hi {{ first_name | default: 'there' }}",
        "body": "The sale ends tonight: 20 % off everything in {{ city }}.",
        "url": "https://shop.example/sale?c={{ external_id }}",
    },
    "sms": {"body": "Hi {{ first_name | default: 'there' }}, the sale in {{ city }} ends tonight"},
    "whatsapp": {"template": "sale", "language": "en_US", "body": ["{{ first_name | default: 'there' }}", "{{ city }}"]},
}


def encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def write_point(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


@dataclass
class Browser:
    """One person's subscription, with the half that only the browser knows."""

    key: ec.EllipticCurvePrivateKey
    auth: bytes
    endpoint: str

    @classmethod
    def subscribe(cls, port: int, number: int) -> Browser:
        return cls(
            ec.generate_private_key(CURVE), os.urandom(16), f"http://127.0.0.1:{port}/push/{number:x}-{os.urandom(60).hex()}"
        )

    def write(self) -> dict[str, Any]:
        """The subscription as ``PushSubscription.toJSON`` writes it."""
        return {"endpoint": self.endpoint, "keys": {"p256dh": encode(write_point(self.key)), "auth": encode(self.auth)}}

    def read(self, request: str) -> dict[str, Any]:
        """The notification in a request."""
        body = request.partition("\r\n\r\n")[2].encode("latin-1")
        return dict(json.loads(http_ece.decrypt(body, private_key=self.key, auth_secret=self.auth, version="aes128gcm")))


def measure_ecdh(seconds: float = 1.0) -> float:
    """Key agreements per second on one core, without anything around them; by the clock, as everything here."""
    private, public = ec.generate_private_key(CURVE), ec.generate_private_key(CURVE).public_key()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(100):
            private.exchange(ec.ECDH(), public)
        count += 100
    return count / spent


class Sink:
    """The providers, in a process of their own."""

    port: int

    async def __aenter__(self) -> Sink:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.bench.sink", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.port = int(await self._process.stdout.readline())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def report(self) -> dict[str, Any]:
        """What came in since the last report."""

        def ask() -> dict[str, Any]:
            with urlopen(f"http://127.0.0.1:{self.port}/") as answer:
                return dict(json.loads(answer.read()))

        return await asyncio.to_thread(ask)

    async def flood(self) -> float:
        """Requests per second that it takes, at least."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.bench.sink", "--flood", str(self.port)), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        await self.report()
        return float(output)


def measure_pywebpush(browsers: list[Browser], key: str) -> float:
    """Messages per second of the loop that everybody writes."""
    began = time.perf_counter()
    for browser in browsers:
        payload = json.dumps({"title": "Hi Ada", "body": "The sale ends tonight", "url": "https://shop.example/sale"})
        webpush(browser.write(), payload, vapid_private_key=key, vapid_claims={"sub": "mailto:bench@example.com"}, ttl=172_800)
    return len(browsers) / (time.perf_counter() - began)


def read_usage(pid: int) -> tuple[float, int]:
    """CPU seconds that a process has used, and the kilobytes that it holds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    ticks = int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(fields[21]) * os.sysconf("SC_PAGE_SIZE") // 1024


@dataclass
class Bench:
    """A running server and worker, with an app to measure on."""

    engine: AsyncEngine
    client: Client
    sink: Sink
    browsers: list[Browser]
    server_pid: int
    worker_pid: int

    async def import_people(self) -> None:
        """Make a contact of each browser; the first also have a phone."""

        def write(number: int, browser: Browser) -> contacts_pb2.Contact:
            contact = contacts_pb2.Contact(external_id=f"person-{number}")
            contact.attributes.update({"first_name": ATTRIBUTES[number % 4], "city": "Madrid", "plan": "gold", "visits": number})
            contact.subscriptions.add(channel="push").address.update(browser.write())
            if number < PHONES:
                for channel in ("sms", "whatsapp"):
                    contact.subscriptions.add(channel=channel).address.update({"phone": f"+1650253{number:04d}"})
            return contact

        imported = await self.client.import_contacts([write(number, browser) for number, browser in enumerate(self.browsers)])
        assert not imported.rejected_count, imported.rejections[:1]

    async def create(self, channel: str, name: str, people: int | None = None) -> str:
        """A draft to everybody, or to the first so many."""
        audience = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
        if people is not None:
            audience = campaigns_pb2.Audience()
            audience.given_contacts.contacts.extend(f"{self.client.parent}/contacts/person-{n}" for n in range(people))
        campaign = campaigns_pb2.Campaign(
            display_name=name, channel=channel, content=ParseDict(CONTENT[channel], Struct()), audience=audience
        )
        created = await self.client.campaigns.CreateCampaign(
            campaigns_pb2.CreateCampaignRequest(parent=self.client.parent, campaign=campaign)
        )
        return str(created.name)

    async def send(self, channel: str, people: int | None = None) -> tuple[float, float]:
        """Messages per second of a campaign, from its launch until everybody is dealt with, and the worker's CPU µs for each."""
        name = await self.create(channel, f"{channel} {people or 'all'}", people)
        await self.sink.report()
        used, _ = read_usage(self.worker_pid)
        began = time.perf_counter()
        await self.client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
        while True:
            await asyncio.sleep(0.05)
            campaign = await self.client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
            if campaign.state != campaigns_pb2.Campaign.State.SENDING:
                break
        seconds = time.perf_counter() - began
        cpu = read_usage(self.worker_pid)[0] - used
        report = await self.sink.report()
        count = campaign.counts.recipients
        assert campaign.state == campaigns_pb2.Campaign.State.SENT, campaign
        assert report["count"] == campaign.counts.signals["sent"] == count == (people or count), (report["count"], campaign)
        if channel == "push":
            self.check(report["kept"])
        print(f"{channel}: {count} people in {seconds:.1f} s, {cpu / count * 1e6:.0f} us of CPU each", file=sys.stderr)
        return count / seconds, cpu / count * 1e6

    def check(self, requests: list[str]) -> None:
        """The first messages are whole, and for whom they went to."""
        by_path = {browser.endpoint.partition("/push/")[2]: (n, browser) for n, browser in enumerate(self.browsers)}
        for request in requests:
            number, browser = by_path[request.partition(" /push/")[2].partition(" ")[0]]
            notification = browser.read(request)
            # The link is tracked, as it is by default.
            assert "/l/" in notification["url"], notification["url"]
            assert notification["title"] == f"Hi {ATTRIBUTES[number % 4]}"

    async def launch_many(self, key: str, address: str) -> dict[str, Any]:
        """Launch to ten million, and read what the processes hold while it is being sent."""
        await self._make_many()
        async with Client(address, api_key=key, app="many") as client:
            bench = Bench(self.engine, client, self.sink, [], self.server_pid, self.worker_pid)
            name = await bench.create("push", "many")
            _, worker_before = read_usage(self.worker_pid)
            _, server_before = read_usage(self.server_pid)
            await self.sink.report()
            began = time.time()
            await client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=name))
            launched = time.time()
            largest = 0
            while time.time() - launched < WATCH_SECONDS:
                await asyncio.sleep(0.1)
                largest = max(largest, read_usage(self.worker_pid)[1])
            report = await self.sink.report()
            _, server_after = read_usage(self.server_pid)
        return {
            "launch_10m_first_send_ms": round((report["first_time"] - began) * 1e3),
            "launch_10m_ms": round((launched - began) * 1e3),
            "worker_mb": {"10k": round(worker_before / 1024), "10m": round(largest / 1024)},
            "server_mb": {"10k": round(server_before / 1024), "10m": round(server_after / 1024)},
        }

    async def _make_many(self) -> None:
        """An app in which everybody can be reached by push, and the first so many have a contact and a subscription."""
        async with transaction(self.engine) as conn:
            app = await apps_store.find_app(conn, "many")
            assert app is not None
            await conn.execute(
                text("INSERT INTO contact_counters (app_id, next_number) VALUES (:app_id, :next_number)"),
                {"app_id": app.app_id, "next_number": MANY},
            )
            everybody = pack_positions(np.arange(CHUNK), CHUNK)
            blocks = range(-(-MANY // CHUNK))
            changes = [
                SetChange(block_of(app.app_id, b * CHUNK), standing_set("active", "push"), everybody, everybody) for b in blocks
            ]
            last = pack_positions(np.arange(MANY % CHUNK), CHUNK)
            changes[-1] = SetChange(changes[-1].block, changes[-1].name, everybody, last)
            await change_sets(conn, changes)
            given = {"first": app.app_id << 20, "count": REACHABLE, "address": json.dumps(self.browsers[0].write())}
            await conn.execute(
                text(
                    "INSERT INTO contacts (block, number, external_id, attributes, time_zone)"
                    " SELECT :first + n / 8192, n, 'person-' || n, '{\"city\": \"Madrid\"}', ''"
                    " FROM generate_series(0, :count - 1) AS n"
                ),
                given,
            )
            await conn.execute(
                text(
                    "INSERT INTO subscriptions (block, number, channel, address_hash, address, state)"
                    " SELECT :first + n / 8192, n, 'push', decode(md5(n::text), 'hex'), cast(:address AS jsonb), 'active'"
                    " FROM generate_series(0, :count - 1) AS n"
                ),
                given,
            )


def find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def open_bench(people: int) -> AsyncIterator[tuple[Bench, str, str, str]]:
    """A bench; with the VAPID key, the server's address, and a key of the app of the many."""
    with tempfile.TemporaryDirectory(prefix="aftertouch-bench-") as directory:
        async with Sink() as sink:
            number = ec.generate_private_key(CURVE).private_numbers().private_value
            vapid, url = encode(number.to_bytes(32, "big")), f"http://127.0.0.1:{sink.port}"
            environment = {
                "AFTERTOUCH_DATA_DIR": f"{directory}/data",
                "AFTERTOUCH_SECRET_KEY": "a secret key of the benchmark, long enough",
                "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
                "AFTERTOUCH_HTTP_ADDRESS": f"127.0.0.1:{find_port()}",
                "AFTERTOUCH_PUBLIC_URL": "https://hooks.example.com",
                "AFTERTOUCH_LOG_LEVEL": "warning",
                "AFTERTOUCH_PUSH_VAPID_PRIVATE_KEY": vapid,
                "AFTERTOUCH_PUSH_VAPID_SUBJECT": "mailto:bench@example.com",
                "AFTERTOUCH_PUSH_ALLOW_INSECURE_LOOPBACK": "true",
                "AFTERTOUCH_SMS_ACCOUNT_SID": f"AC{0:032x}",
                "AFTERTOUCH_SMS_AUTH_TOKEN": "a token of the benchmark",
                "AFTERTOUCH_SMS_SENDER": "+15005550006",
                "AFTERTOUCH_SMS_API_URL": url,
                "AFTERTOUCH_WHATSAPP_PHONE_NUMBER_ID": "1",
                # Meta's own pace, 80 a second, is not what is measured.
                "AFTERTOUCH_WHATSAPP_MESSAGES_PER_SECOND": "10000",
                "AFTERTOUCH_WHATSAPP_SECONDS_BETWEEN_MESSAGES": "0",
                "AFTERTOUCH_WHATSAPP_ACCESS_TOKEN": "a token of the benchmark",
                "AFTERTOUCH_WHATSAPP_APP_SECRET": "a secret of the benchmark",
                "AFTERTOUCH_WHATSAPP_VERIFY_TOKEN": "a word of the benchmark",
                "AFTERTOUCH_WHATSAPP_API_URL": url,
            }
            serving = {**environment, "AFTERTOUCH_SEND_UNITS": "0"}
            async with Child("serve", environment=serving, ready=r"gRPC on (\S+),", log=Path(directory) / "log") as server:
                keys = {}
                for app in ("bench", "many"):
                    await run_command("apps", "create", app, environment=environment)
                    keys[app] = (await run_command("keys", "create", app, environment=environment)).strip()
                async with (
                    open_engine((Path(directory) / "data" / "url").read_text()) as engine,
                    Child("worker", environment=environment, ready="sending", log=Path(directory) / "worker.log") as worker,
                    Client(server.found[0], api_key=keys["bench"], app="bench") as client,
                ):
                    browsers = [Browser.subscribe(sink.port, number) for number in range(people)]
                    bench = Bench(engine, client, sink, browsers, server.process.pid, worker.process.pid)
                    await bench.import_people()
                    yield bench, vapid, server.found[0], keys["many"]


async def measure(people: int, repeats: int) -> dict[str, Any]:
    async with open_bench(people) as (bench, vapid, address, key):
        sink_rate = await bench.sink.flood()
        loop_rate = await asyncio.to_thread(measure_pywebpush, bench.browsers[:500], vapid)
        for channel in ("push", "sms", "whatsapp"):
            await bench.send(channel, 1_000)
        ecdh_rates, push = [], []
        for _ in range(repeats):
            ecdh_rates.append(measure_ecdh())
            push.append(await bench.send("push"))
        sms, _ = await bench.send("sms", PHONES)
        whatsapp, _ = await bench.send("whatsapp", PHONES)
        await bench.send("push", FEW)
        many = await bench.launch_many(key, address)
    ecdh = max(ecdh_rates)
    push_rate, push_cpu = max(push)
    return {
        "bench": "send",
        "ecdh_per_s": round(ecdh),
        "push_per_s": round(push_rate),
        "ratio": round(push_rate / ecdh, 3),
        "pywebpush_loop_per_s": round(loop_rate),
        "vs_pywebpush": round(push_rate / loop_rate, 1),
        "sms_per_s": round(sms),
        "whatsapp_per_s": round(whatsapp),
        **many,
        "push_cpu_us": round(push_cpu),
        "sink_per_s": round(sink_rate),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.bench.send", description=__doc__)
    parser.add_argument("--people", type=int, default=PEOPLE, help="recipients of a push campaign")
    parser.add_argument("--repeats", type=int, default=3, help="push campaigns, of which the fastest counts")
    given = parser.parse_args()
    print(json.dumps(asyncio.run(measure(given.people, given.repeats))))
