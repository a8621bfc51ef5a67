"""The README's five minutes, as anybody would spend them: against ``aftertouch serve --sandbox``, from other processes."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aftertouch.client import Client
from aftertouch.processes import Child, isolate
from aftertouch.v1 import campaigns_pb2
from tests.ports import find_free_port

ROOT = Path(__file__).parents[2]
TYPESCRIPT = ROOT / "clients" / "typescript"
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
async def playground(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, str]]:
    """What a journey finds in its environment."""
    directory = tmp_path_factory.mktemp("playground")
    # Meta's stand-in is told the address before the server binds it, so 0 will not do.
    http = f"127.0.0.1:{find_free_port()}"
    environment = {
        "AFTERTOUCH_DATA_DIR": str(directory / "data"),
        "AFTERTOUCH_GRPC_ADDRESS": "127.0.0.1:0",
        "AFTERTOUCH_HTTP_ADDRESS": http,
    }
    async with Child("serve", "--sandbox", environment=environment, ready=r"gRPC on (\S+),", log=directory / "log.txt") as server:
        (address,) = server.found
        key = next(line for line in server.lines if line.startswith("at_"))
        yield isolate({"AFTERTOUCH_ADDRESS": address, "AFTERTOUCH_API_KEY": key})


async def run(*command: str | Path, environment: dict[str, str], directory: Path = ROOT) -> str:
    """Run a journey to its end and return what it printed."""
    bindir = Path(sys.executable).parent
    environment = {**environment, "PATH": f"{bindir}{os.pathsep}{os.environ['PATH']}"}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=directory, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    return printed.decode()


async def check_retarget(playground: dict[str, str], sale: str, printed: str) -> None:
    """Hold what a journey printed of its wave against what it printed of the preview, and against who got the source."""
    told = re.search(r"(\d+) did not read it, (\d+) of them can be reached by SMS", printed)
    sent = re.search(rf"Retarget: {sale} \(not read\): SENT, (\d+) people", printed)
    assert told is not None, printed
    assert sent is not None, printed
    assert 0 < int(told[2]) < int(told[1])
    # Between the preview and the launch some read it, and on a busy machine others got it.
    async with Client(playground["AFTERTOUCH_ADDRESS"], api_key=playground["AFTERTOUCH_API_KEY"], app="sandbox") as client:
        source = await read_recipients(client, sale)
        wave = await read_recipients(client, f"Retarget: {sale} (not read)")
    assert len(wave) == int(sent[1]) > 0
    assert all("delivered" in source[contact] for contact in wave)


async def read_recipients(client: Client, display_name: str) -> dict[str, set[str]]:
    """The signals of a campaign's people."""
    wanted = campaigns_pb2.CampaignFilter(text=display_name)
    request = campaigns_pb2.ListCampaignsRequest(parent=client.parent, filter=wanted)
    listed = (await client.campaigns.ListCampaigns(request)).campaigns
    (name,) = [campaign.name for campaign in listed if campaign.display_name == display_name]
    found: dict[str, set[str]] = {}
    token = ""
    while True:
        page = await client.campaigns.ListRecipients(
            campaigns_pb2.ListRecipientsRequest(parent=name, page_size=1000, page_token=token)
        )
        found |= {recipient.contact: set(recipient.signals) for recipient in page.recipients}
        token = page.next_page_token
        if not token:
            return found


async def test_python_journey_retargets_by_sms(playground: dict[str, str]) -> None:
    printed = await run(sys.executable, ROOT / "clients" / "python" / "journey.py", environment=playground)
    await check_retarget(playground, "Winter Sale", printed)


@pytest.mark.skipif(not (TYPESCRIPT / "node_modules").exists(), reason="its packages are missing: make peers")
async def test_typescript_journey_retargets_by_sms(playground: dict[str, str]) -> None:
    await run("npm", "run", "generate", environment=playground, directory=TYPESCRIPT)
    await run("npm", "run", "build", environment=playground, directory=TYPESCRIPT)
    printed = await run("npm", "start", environment=playground, directory=TYPESCRIPT)
    await check_retarget(playground, "Spring Sale", printed)


async def test_shell_journey_retargets_by_sms(playground: dict[str, str]) -> None:
    printed = await run(ROOT / "clients" / "shell" / "journey.sh", environment=playground)
    assert '"displayName": "Retarget: Summer Sale (not read)"' in printed
    assert '"state": "SENDING"' in printed.rpartition('"name": "apps/sandbox/campaigns/summer-sale-sms"')[2]
    assert printed.count('"state": "SCHEDULED"') >= 2
    assert '"root": "apps/sandbox/campaigns/summer-sale"' in printed.rpartition('"campaigns"')[0]
