"""Which fixtures there are, and which PostgreSQL the tests run on: an embedded one, or the one of --dsn."""

import os

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.fix_database", "tests.fix_world", "tests.fix_console"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dsn", help="run on this PostgreSQL (15 to 18; a role that may create databases), not an embedded one")


def pytest_report_header(config: pytest.Config) -> str:
    return f"postgresql: {'as given with --dsn' if config.getoption('--dsn') else 'embedded'}"


# How long an example takes is up to whoever else uses the machine: it says of none that it is wrong.
settings.register_profile("aftertouch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aftertouch")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are cores: of two, each worker was seen to take a quarter of one, the rest was waiting."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)
