"""An author's first hour: a distribution made outside of the repository, installed beside the server's wheel, used, removed."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import CliRunner

from aftertouch import cli
from aftertouch.client import Client
from aftertouch.rpc.values import to_struct
from aftertouch.store import apps as store
from aftertouch.store.engine import open_engine, transaction
from aftertouch.testing import FakeProvider, ProviderRequest, Response
from aftertouch.v1 import campaigns_pb2, channels_pb2, contacts_pb2, retargeting_pb2
from tests.fix_world import SECRET_KEY
from tests.refusals import refuse

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SECRET = "a secret that only the provider knows"
DEAD_PHONES = ("+34600000012", "+34600000013")
"""Of p2, who has a pager as well, and of p3, who has none."""


def run_quietly(*command: str | Path, **environment: str) -> str:
    """Run a command that has to succeed, without this process's paths, and return what it says."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(word) for word in command], env={**clean, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write_channel(name: str, directory: Path) -> Path:
    done = CliRunner().invoke(cli.app, ["channels", "new", name, "--directory", str(directory)])
    assert done.exit_code == 0, done.output
    return directory / f"aftertouch-{name}"


@pytest.mark.parametrize("name", ["pager", "two-way-radio"])
def test_new_channel_keeps_the_contract_and_the_house_style(name: str, tmp_path: Path) -> None:
    folder = write_channel(name, tmp_path)
    assert sorted(path.suffix for path in folder.rglob("*") if path.is_file()) == [".py", ".py", ".toml"]
    run_quietly(Path(sys.executable).parent / "ruff", "format", "--check", "--line-length", "130", folder)
    paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
    told = run_quietly(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", folder, folder, PYTHONPATH=paths
    )
    assert re.search(r"\d{2} passed", told)


@pytest.mark.parametrize(
    ("name", "why"), [("Pager", "no name"), ("a--b", "no name"), ("sms", "already"), ("pager", "exists already")]
)
def test_channel_that_cannot_be_made_is_refused(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "aftertouch-pager").mkdir()
    done = CliRunner().invoke(cli.app, ["channels", "new", name, "--directory", str(tmp_path)])
    assert isinstance(done.exception, cli.CommandFailed)
    assert why in str(done.exception)


@pytest.fixture(scope="module")
def second_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the server's wheel and a new channel's; what they need is this one's."""
    folder = tmp_path_factory.mktemp("second")
    channel = write_channel("pager", folder)
    wheels = folder / "wheels"
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", wheels]
    run_quietly(
        *build, ROOT, *(ROOT / "plugins" / f"aftertouch-{name}" for name in ("push", "sms", "twilio", "whatsapp")), channel
    )
    environment = folder / "venv"
    run_quietly(sys.executable, "-m", "venv", "--without-pip", environment)
    python = environment / "bin" / "python"
    purelib = run_quietly(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # A line in such a file adds the path only: what is installed there for editing stays out.
    (Path(purelib) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python]
    run_quietly(*pip, "install", "--no-deps", "--no-index", *sorted(wheels.glob("*.whl")))
    return environment


@asynccontextmanager
async def serve(environment: Path, **settings: str) -> AsyncIterator[tuple[str, str]]:
    """A server of that virtual environment: where gRPC and HTTP answer."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = await asyncio.create_subprocess_exec(
        *(environment / "bin" / "aftertouch", "serve"),
        env={**clean, "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0", "AFTERTOUCH_HTTP_ADDRESS": "127.0.0.1:0", **settings},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(120):
            while (found := re.match(r"gRPC on (\S+), webhooks on (\S+)", (await process.stdout.readline()).decode())) is None:
                assert not process.stdout.at_eof()
        yield found[1], found[2]
    finally:
        process.terminate()
        await process.communicate()


async def wait_for(client: Client, name: str, **signals: int) -> campaigns_pb2.Campaign:
    async with asyncio.timeout(120):
        while True:
            campaign = await client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
            if all(campaign.counts.signals[signal] == count for signal, count in signals.items()):
                return campaign
            await asyncio.sleep(0.05)


async def test_channel_of_a_stranger_comes_works_and_goes(second_environment: Path, database_url: str, tmp_path: Path) -> None:
    def answer(request: ProviderRequest) -> Response:
        return Response.from_json({"id": f"m-{request.read_json()['reference']}"}, status=202)

    def answer_text(request: ProviderRequest) -> Response:
        if request.read_form()["To"] in DEAD_PHONES:
            return Response.from_json({"code": 21211}, status=400)
        return Response.from_json({"sid": f"SM{len(carrier.exchanges)}"}, status=201)

    async with FakeProvider(answer) as provider, FakeProvider(answer_text) as carrier:
        settings = {
            "AFTERTOUCH_DATABASE_URL": database_url,
            "AFTERTOUCH_SECRET_KEY": SECRET_KEY,
            "AFTERTOUCH_DATA_DIR": str(tmp_path),
            "AFTERTOUCH_CHANNELS": "pager,sms",
            "AFTERTOUCH_PAGER_URL": f"{provider.url}/messages",
            "AFTERTOUCH_PAGER_API_KEY": "key",
            "AFTERTOUCH_PAGER_WEBHOOK_SECRET": SECRET,
            "AFTERTOUCH_SMS_API_URL": carrier.url,
            "AFTERTOUCH_SMS_ACCOUNT_SID": "AC" + "0" * 32,
            "AFTERTOUCH_SMS_AUTH_TOKEN": "token",
            "AFTERTOUCH_SMS_SENDER": "+15005550006",
        }
        command = second_environment / "bin" / "aftertouch"
        made = await asyncio.to_thread(run_quietly, command, "channels", "new", "radio", "--directory", tmp_path, **settings)
        assert "aftertouch_radio.py" in made, "the wheel lacks the templates"
        # As the tutorial says it.
        (said,) = re.findall(r"^aftertouch (channels test .*)$", (ROOT / "docs/plugins/tutorial.md").read_text(), re.MULTILINE)
        told = await asyncio.to_thread(run_quietly, command, *shlex.split(said), **settings)
        assert told.startswith("accepted as m-")
        assert provider.requests[0].read_json()["text"] == "Hello"

        async with open_engine(database_url) as engine, transaction(engine) as conn:
            app = await store.create_app(conn, "acme", "Acme")
            _, key = await store.create_api_key(conn, app.app_id, "test", ["admin"])
        async with serve(second_environment, **settings) as (grpc, http), Client(grpc, api_key=key, app="acme") as client:
            name = await use_channel(client, provider, http)
            await reach_from_sms(client, carrier)
            async with aiohttp.ClientSession() as session, session.get(f"{http}/v1/browsers/aftertouch.js") as script:
                assert script.status == 200, "the wheel lacks the scripts for browsers"
            settled = await client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))

        heard = len(provider.requests)
        shown = await asyncio.to_thread(run_quietly, command, "demo", "--people=400", **settings)
        assert "Pager, installed beside: whom a follow-up there would reach; nothing is sent" in shown
        assert re.search(r"^ +action +people +Pager *$", shown, re.MULTILINE), shown
        rows = re.findall(r"^(whatsapp|sms|push) .* (\d+) +(\d+) *$", shown, re.MULTILINE)
        assert {channel for channel, *_ in rows} == {"whatsapp", "sms", "push"}
        assert any(int(people) > int(reached) > 0 for _, people, reached in rows)
        assert "sets of people compared, all equal" in shown
        assert len(provider.requests) == heard, "the demo messages nobody but the sandbox's people"

    pip = [sys.executable, "-m", "pip", "--quiet", "--python", second_environment / "bin" / "python"]
    await asyncio.to_thread(run_quietly, *pip, "uninstall", "--yes", "aftertouch-pager")
    left = {name: value for name, value in settings.items() if "PAGER" not in name} | {"AFTERTOUCH_CHANNELS": "sms"}
    async with serve(second_environment, **left) as (grpc, _), Client(grpc, api_key=key, app="acme") as client:
        listed = await client.channels.ListChannels(channels_pb2.ListChannelsRequest())
        assert [channel.name for channel in listed.channels] == ["channels/sms"]
        campaign = await client.campaigns.GetCampaign(campaigns_pb2.GetCampaignRequest(name=name))
        assert (campaign.channel, campaign.state, campaign.content) == ("pager", campaigns_pb2.Campaign.SENT, settled.content)
        # What a signal of the channel's implies is not known without it; what it said itself is.
        assert campaign.counts.signals["sent"] == settled.counts.signals["sent"]
        recipients = await client.campaigns.ListRecipients(campaigns_pb2.ListRecipientsRequest(parent=name))
        assert len(recipients.recipients) == 3
        selection = campaigns_pb2.RetargetSelection(source=name, action="read")
        request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="sms")
        assert (await refuse(client.retargeting.PreviewRetarget(request))).code in ("NOT_FOUND", "FAILED_PRECONDITION")


async def use_channel(client: Client, provider: FakeProvider, http: str) -> str:
    """Send by the channel, hear of it, and find its row and its column; the campaign's name."""
    people = []
    for number in range(3):
        person = contacts_pb2.Contact(external_id=f"p{number}")
        person.subscriptions.add(channel="pager").address.update({"inbox": f"desk-{number}"})
        person.subscriptions.add(channel="sms").address.update({"phone": f"+3460000001{number}"})
        people.append(person)
    without = contacts_pb2.Contact(external_id="p3")
    without.subscriptions.add(channel="sms").address.update({"phone": DEAD_PHONES[1]})
    people.append(without)
    await client.contacts.UpsertContacts(contacts_pb2.UpsertContactsRequest(parent=client.parent, contacts=people))
    everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
    draft = campaigns_pb2.Campaign(display_name="Alarm", channel="pager", content=to_struct({"text": "Fire"}), audience=everybody)
    made = await client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=draft))
    await client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=made.name))
    await wait_for(client, made.name, sent=3)

    tokens = {request.read_json()["inbox"]: request.read_json()["reference"] for request in provider.requests}
    events: list[dict[str, Any]] = [{"reference": tokens[f"desk-{number}"], "status": "delivered"} for number in range(3)]
    body = json.dumps({"events": [*events, {"reference": tokens["desk-0"], "status": "read"}]}).encode()
    signature = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    async with aiohttp.ClientSession() as session:
        url, headers = f"{http}/v1/webhooks/pager", {"x-pager-signature": signature}
        async with session.post(url, data=body, headers=headers) as answer:
            assert answer.status == 204
    await wait_for(client, made.name, delivered=3, read=1)

    listed = await client.retargeting.ListActions(retargeting_pb2.ListActionsRequest(parent=made.name))
    assert {one.action.action: one.count for one in listed.actions} == {"read": 1, "not_read": 2, "unclear": 0}
    for channel in ("sms", "pager"):
        selection = campaigns_pb2.RetargetSelection(source=made.name, action="not_read")
        request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel=channel)
        assert (await client.retargeting.PreviewRetarget(request)).audience_count == 2
    return made.name


async def reach_from_sms(client: Client, carrier: FakeProvider) -> None:
    """Ask whom the channel reaches of those whose text could not be delivered, and compare it with what the carrier refused."""
    everybody = campaigns_pb2.Audience(all_subscribers=campaigns_pb2.AllSubscribers())
    draft = campaigns_pb2.Campaign(display_name="Alarm", channel="sms", content=to_struct({"body": "Fire"}), audience=everybody)
    made = await client.campaigns.CreateCampaign(campaigns_pb2.CreateCampaignRequest(parent=client.parent, campaign=draft))
    await client.campaigns.LaunchCampaign(campaigns_pb2.LaunchCampaignRequest(name=made.name))
    await wait_for(client, made.name, attempted=4, failed=2)
    refused = {request.read_form()["To"] for request, answer in carrier.exchanges if getattr(answer, "status", 0) == 400}
    listed = await client.contacts.ListContacts(contacts_pb2.ListContactsRequest(parent=client.parent))
    addresses = [{one.channel: dict(one.address) for one in contact.subscriptions} for contact in listed.contacts]
    matched = [person for person in addresses if person["sms"]["phone"] in refused]
    reached = [person for person in matched if "pager" in person]
    assert (len(matched), len(reached)) == (2, 1)
    selection = campaigns_pb2.RetargetSelection(source=made.name, action="not_delivered")
    request = retargeting_pb2.PreviewRetargetRequest(selection=selection, channel="pager")
    shown = await client.retargeting.PreviewRetarget(request)
    assert (shown.matched_count, shown.audience_count) == (len(matched), len(reached))
    matrix = await client.retargeting.GetMatrix(retargeting_pb2.GetMatrixRequest(name=made.name))
    cells = {row.action_count.action.action: {cell.channel: cell.reachable_count for cell in row.cells} for row in matrix.rows}
    assert cells["not_delivered"]["pager"] == len(reached)
