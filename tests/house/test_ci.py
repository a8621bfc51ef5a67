"""A green run of `.ci/run` says that everything was run: what is wanting fails it, unless somebody allows that."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("CI", "CI_MAY_SKIP")}
WANTING = "skipped in CI for want of something, without CI_MAY_SKIP=1: no browser\n"


def run_pytest(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Two tests that are skipped, by this repository's conftest."""
    (directory / "conftest.py").write_text("from tests.conftest import pytest_sessionfinish\n")
    (directory / "test_skipped.py").write_text(
        "import pytest\n"
        "@pytest.mark.skipif(True, reason='only root can')\ndef test_as_root(): pass\n"
        "def test_in_browser(): pytest.skip('no browser')\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", directory, directory]
    return subprocess.run(
        [*command, *arguments],
        env={**ENVIRONMENT, "PYTHONPATH": os.fspath(ROOT), **environment},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [[], ["-n", "2"]], ids=["one process", "several"])
def test_test_that_is_skipped_for_want_of_something_fails_ci(tmp_path: Path, arguments: list[str]) -> None:
    done = run_pytest(tmp_path, *arguments, CI="true")
    assert (done.returncode, WANTING in done.stdout) == (1, True), done.stdout + done.stderr
    assert "2 skipped" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [([], {}), ([], {"CI": "true", "CI_MAY_SKIP": "1"}), (["-k", "as_root"], {"CI": "true"})],
    ids=["not in CI", "allowed", "not meant to run here"],
)
def test_test_may_be_skipped_elsewhere_by_leave_and_by_design(
    tmp_path: Path, arguments: list[str], environment: dict[str, str]
) -> None:
    done = run_pytest(tmp_path, *arguments, **environment)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("wanting", ["browser", "peers"])
@pytest.mark.parametrize("leave", ["", "1"])
def test_run_fails_where_something_cannot_be_installed_unless_that_is_allowed(tmp_path: Path, wanting: str, leave: str) -> None:
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1 CI=$CI" >> made\ntest "$1" != {wanting}\n')
    make.chmod(0o755)
    environment = {**ENVIRONMENT, "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "CI_MAY_SKIP": leave}
    done = subprocess.run([script], env=environment, check=False)
    made = (tmp_path / "made").read_text().splitlines()
    assert (done.returncode == 0, "test CI=true" in made) == (bool(leave), bool(leave)), made
