"""The command line: what it says when its settings are wrong."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aftertouch.__main__ import main
from aftertouch.cli import CommandFailed, app
from aftertouch.processes import ProcessFailed, run_command


def test_allow_list_with_a_misspelt_channel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERTOUCH_CHANNELS", "sms,puhs")
    result = CliRunner().invoke(app, ["channels"])
    assert isinstance(result.exception, CommandFailed)
    assert result.exception.code == 2
    assert "puhs" in str(result.exception)
    assert "whatsapp" in str(result.exception)


@pytest.mark.parametrize("missing", ["typer", "uvicorn.loops.auto"])
def test_command_without_what_it_needs_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel author's environment has no server, and a caller's not even a command line."""
    for name in ("aftertouch.cli", missing):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", ["aftertouch", "channels"])
    with pytest.raises(SystemExit) as exited:
        main()
    assert f"{missing} is missing" in str(exited.value)
    assert "[server]" in str(exited.value)


@pytest.mark.parametrize("command", [("keys", "list", "acme"), ("apps", "list")])
def test_command_in_the_wrong_folder_says_so_and_makes_no_database(command: Sequence[str], tmp_path: Path) -> None:
    environment = {"AFTERTOUCH_DATA_DIR": str(tmp_path / "data")}
    with pytest.raises(ProcessFailed) as failed:
        asyncio.run(run_command(*command, environment=environment))
    assert f"there is no database in {tmp_path}/data" in str(failed.value)
    assert "AFTERTOUCH_DATA_DIR" in str(failed.value)
    assert list(tmp_path.iterdir()) == []
