"""The demo that strangers run first: it agrees with the truth, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_demo_agrees_with_the_truth_and_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aftertouch", "demo", "--people=400"]
    done = subprocess.run(command, env=isolate({"TMPDIR": str(tmp_path)}), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all equal" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert list_processes(tmp_path) == []
