"""The fixtures of the suite: a pair of hosts, or one."""

from collections.abc import Generator, Iterator

import pytest

from tests import migrate
from tests.hosts import Host, Pair


@pytest.fixture
def hosts() -> Iterator[Pair]:
    """Two joined hosts, ``a`` and ``b``; everything in them ends with the test."""
    with Pair() as pair:
        yield pair


@pytest.fixture
def host() -> Iterator[Host]:
    """One host without a network other than its loopback."""
    (single,) = Host.start("single")
    with single:
        yield single


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of every migration of a test that failed."""
    report = yield
    if call.when == "setup":
        migrate.started.clear()
    elif report.failed:
        for migration in migrate.started:
            report.sections += migration.logs()
    return report
