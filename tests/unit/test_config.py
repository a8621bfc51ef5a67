"""Settings: every problem at once, nothing misspelt passed over, and no secret shown."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from aftertouch.config import Config, ConfigError, load_config

KEY = "k" * 32
URL = "postgresql://user:hush@db.example/aftertouch"


def load(**settings: str) -> Config:
    return load_config({f"AFTERTOUCH_{name}": value for name, value in settings.items()}, ["AFTERTOUCH_SMS_"])


def find_problems(**settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(**settings)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return str(caught.value)


def test_nothing_set_is_enough_to_begin() -> None:
    config = load()
    assert (config.database_url, config.secret_key, config.grpc_address) == (None, None, "127.0.0.1:7070")
    assert config.allowed_channels is None


def test_settings_are_read_and_cannot_be_changed() -> None:
    config = load(DATABASE_URL=URL, SECRET_KEY=KEY, SEND_UNITS="0", CHANNELS=" sms, push ,", PUBLIC_URL="https://h.example/x/")
    assert (config.send_units, config.allowed_channels) == (0, frozenset({"sms", "push"}))
    assert config.public_url == "https://h.example/x"
    with pytest.raises(ValidationError):
        config.send_units = 5  # type: ignore[misc]


def test_settings_that_are_empty_are_not_set() -> None:
    assert load(SEND_UNITS="", SECRET_KEY="", DATABASE_URL="") == load()


def test_settings_of_others_are_left_alone() -> None:
    assert load_config({"PATH": "/bin", "AFTERTOUCHED": "x", "AFTERTOUCH_SMS_SENDER": "x"}, ["AFTERTOUCH_SMS_"]) == load()


def test_all_problems_are_told_at_once_by_name_and_without_values() -> None:
    problems = find_problems(
        DATABASE_URL="mysql://hush",
        SECRET_KEY="hush",
        GRPC_ADDRESS="hush",
        HTTP_ADDRESS="127.0.0.1:99999",
        PUBLIC_URL="https://x.example/?hush",
        SEND_UNITS="65",
        LOG_LEVEL="hush",
        SECRET_KEYS="hush",
        FAX_NUMBER="hush",
    )
    names = ("DATABASE_URL", "SECRET_KEY", "GRPC_ADDRESS", "HTTP_ADDRESS", "PUBLIC_URL", "SEND_UNITS", "LOG_LEVEL")
    for name in names:
        assert f"AFTERTOUCH_{name}: " in problems
    assert "AFTERTOUCH_SECRET_KEYS is not a setting" in problems
    assert "AFTERTOUCH_FAX_NUMBER is not a setting" in problems
    assert len(problems.splitlines()) == len(names) + 2
    assert "hush" not in problems


@pytest.mark.parametrize("address", ["7070", ":7070", "host:", "host:x", "host:-1", "host:65536", "host:7 0"])
def test_address_without_host_and_port_is_a_problem(address: str) -> None:
    assert "must be like 127.0.0.1:7070" in find_problems(GRPC_ADDRESS=address)


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::1]:7070", "host.example:65535"])
def test_address_with_host_and_port_is_taken(address: str) -> None:
    assert load(GRPC_ADDRESS=address).grpc_address == address


def test_database_of_ones_own_needs_a_secret_key() -> None:
    assert "AFTERTOUCH_SECRET_KEY is needed" in find_problems(DATABASE_URL=URL)


def test_secrets_are_not_shown() -> None:
    config = load(DATABASE_URL=URL, SECRET_KEY=KEY)
    for text in (repr(config), str(config), config.model_dump_json()):
        assert "hush" not in text
        assert KEY not in text
