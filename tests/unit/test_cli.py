"""The command line: what it says when its settings are wrong."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from aftertouch.__main__ import main
from aftertouch.cli import CommandFailed, app


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
