"""The demo that strangers run first: it agrees with the truth, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from aftertouch.processes import isolate

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def list_processes(directory: Path) -> list[str]:
    """Every process that has the directory in its environment, as ours do, or works inside it, as PostgreSQL does."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes()
            if os.fsencode(directory) in environment or os.readlink(process / "cwd").startswith(str(directory)):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            # It ended meanwhile, or is another user's.
            continue
    return found


def list_remains(directory: Path) -> list[object]:
    """What is left of a run that had this directory for its files: files and processes."""
    return [*directory.iterdir(), *list_processes(directory)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only where processes are in /proc")
async def test_demo_agrees_with_the_truth_offers_the_console_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """At a terminal, as somebody sees it who tries this for the first time."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "aftertouch", "demo", "--people=400"),
        env=isolate({"TMPDIR": str(tmp_path), "TERM": "dumb"}),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    shown = bytearray()
    ended = asyncio.Event()

    def read() -> None:
        try:
            shown.extend(os.read(ours, 65_536))
        except OSError:
            # Nobody has the other side any more.
            asyncio.get_running_loop().remove_reader(ours)
            ended.set()

    asyncio.get_running_loop().add_reader(ours, read)
    try:
        async with asyncio.timeout(300):
            while b"Enter ends it all" not in shown and not ended.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            text = shown.decode()
            assert "all equal" in text, text
            url, password = re.search(r"(http://\S+/console)\s+as you@example\.com with (\S+)\.", text).groups()
            async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as session:
                form = {"app": "demo", "email": "you@example.com", "password": password}
                async with session.post(f"{url}/sign-in", data=form) as response:
                    assert "Retarget: Summer Sale (not read)" in await response.text()
            os.write(ours, b"\n")
            assert await process.wait() == 0, shown.decode()
            await ended.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        os.close(ours)
    assert "`aftertouch serve --sandbox` keeps such a world running" in shown.decode()
    assert list_remains(tmp_path) == []


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="only where processes are in /proc")
def test_demo_without_a_terminal_asks_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aftertouch", "demo", "--people=400"]
    done = subprocess.run(
        command, env=isolate({"TMPDIR": str(tmp_path)}), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "`aftertouch serve --sandbox` keeps such a world running, with its console" in done.stdout
    assert "Enter" not in done.stdout
    assert list_remains(tmp_path) == []
