"""Which fixtures there are, and which PostgreSQL the tests run on: an embedded one, or the one of --dsn."""

import os

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["tests.fix_database", "tests.fix_world", "tests.fix_console"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--dsn", help="run on this PostgreSQL (15 to 18; a role that may create databases), not an embedded one")


def pytest_report_header(config: pytest.Config) -> str:
    return f"postgresql: {'as given with --dsn' if config.getoption('--dsn') else 'embedded'}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI, fail when tests were skipped for want of something, unless CI_MAY_SKIP=1 allows it: green means that all were run.

    A reason that begins with "only" says where alone a test means something, so nothing is wanting elsewhere.
    """
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI") or os.environ.get("CI_MAY_SKIP") == "1":
        return
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
    if wanting := sorted(reason for reason in reasons if not reason.startswith("only ")):
        reporter.write_line(f"\nskipped in CI for want of something, without CI_MAY_SKIP=1: {'; '.join(wanting)}", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


# How long an example takes is up to whoever else uses the machine: it says of none that it is wrong. CI judges each commit by
# the same examples, as Hypothesis does by itself; every other run tries others.
settings.register_profile("aftertouch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("aftertouch")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Half as many again as there are cores: of two, each worker was seen to take a quarter of one, the rest was waiting."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)
