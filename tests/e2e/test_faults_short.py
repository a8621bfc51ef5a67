"""A short run of `make test-faults`: every kind of fault at least once."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("processes", "kinds"), [(1, 6), (2, 7)])
async def test_faults_of_every_kind_lose_and_double_nothing(processes: int, kinds: int) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.faults", "--seconds", "15", "--processes", str(processes)),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, output.decode() + errors.decode()
    result = json.loads(output.splitlines()[-1])
    assert len(result["kinds of faults"]) == kinds
    assert result["events"]
    assert result["replays"]
    assert result["webhooks"]
