"""The command line: what it says when its settings are wrong."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from aftertouch.cli import CommandFailed, app


def test_allow_list_with_a_misspelt_channel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERTOUCH_CHANNELS", "sms,puhs")
    result = CliRunner().invoke(app, ["channels"])
    assert isinstance(result.exception, CommandFailed)
    assert result.exception.code == 2
    assert "puhs" in str(result.exception)
    assert "whatsapp" in str(result.exception)
