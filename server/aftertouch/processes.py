"""Our own commands as child processes on free ports, for the demo and the tests that kill them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self


class ProcessFailed(Exception):
    """A child process ended, or did not answer in time; the text holds the end of what it printed."""


class Child:
    """``aftertouch <arguments>`` as a child process, from when it is ready until the end of the context.

    Args:
        arguments: of the command.
        environment: AFTERTOUCH_* settings; those of this process are not inherited.
        ready: a pattern of the line that says that it is ready; its groups become ``found``.
        log: where its standard error goes.
    """

    found: tuple[str, ...]

    def __init__(self, *arguments: str, environment: Mapping[str, str], ready: str, log: Path) -> None:
        self._arguments = arguments
        self._environment = isolate(environment)
        self._ready = re.compile(ready)
        self._log = log
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self.lines: list[str] = []

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.stop()

    @property
    def process(self) -> asyncio.subprocess.Process:
        """The running process."""
        if self._process is None:
            raise RuntimeError("the process was not started")
        return self._process

    async def start(self, *, seconds: float = 120.0) -> None:
        """Start it, again after ``kill``, and wait until it is ready."""
        self.lines.clear()
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "aftertouch",
                *self._arguments,
                env=self._environment,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        stdout = self.process.stdout
        assert stdout is not None
        try:
            async with asyncio.timeout(seconds):
                while line := (await stdout.readline()).decode(errors="replace").rstrip():
                    self.lines.append(line)
                    if match := self._ready.search(line):
                        self.found = match.groups()
                        self._reading = asyncio.create_task(self._drain(stdout))
                        return
        except TimeoutError:
            await self.kill()
        await self.process.wait()
        tail = self._log.read_text(errors="replace")[-2000:]
        raise ProcessFailed(f"aftertouch {' '.join(self._arguments)} did not become ready:\n" + "\n".join([*self.lines, tail]))

    async def _drain(self, stdout: asyncio.StreamReader) -> None:
        async for line in stdout:
            self.lines.append(line.decode(errors="replace").rstrip())

    async def stop(self) -> int:
        """Stop it in an orderly way, and return its exit code."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        return await self._wait()

    async def kill(self) -> None:
        """kill -9."""
        if self.process.returncode is None:
            self.process.kill()
        await self._wait()

    async def _wait(self) -> int:
        code = await self.process.wait()
        if self._reading is not None:
            await self._reading
        return code


def isolate(environment: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with no other AFTERTOUCH_* settings than these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AFTERTOUCH_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **environment}


async def run_command(*arguments: str, environment: Mapping[str, str]) -> str:
    """Run ``aftertouch <arguments>`` to its end and return what it printed.

    Raises:
        ProcessFailed: it exited with another code than 0.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "aftertouch",
        *arguments,
        env=isolate(environment),
        # It asks nobody.
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    if process.returncode != 0:
        raise ProcessFailed(
            f"aftertouch {' '.join(arguments)} exited with {process.returncode}: {errors.decode(errors='replace')}"
        )
    return output.decode()
