"""The fixtures of the suite: a pair of hosts, or one."""

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests import migrate
from tests.hosts import Host, Pair
from tests.stage import Stage
from tests.stress_options import pytest_addoption, pytest_collection_modifyitems  # noqa: F401 (pytest finds them here)


@pytest.fixture
def hosts() -> Iterator[Pair]:
    """Two joined hosts, ``a`` and ``b``; everything in them ends with the test."""
    with Pair() as pair:
        yield pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Two joined hosts for all tests of a module."""
    with Pair() as both:
        yield both


@pytest.fixture
def stage(pair: Pair, tmp_path: Path) -> Iterator[Stage]:
    """The two hosts of the module, with nothing on them afterwards."""
    new = Stage(pair, tmp_path)
    yield new
    new.clear()


@pytest.fixture
def host() -> Iterator[Host]:
    """One host without a network other than its loopback."""
    (single,) = Host.start("single")
    with single:
        yield single


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Forget the migrations of the test before."""
    migrate.started.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of every migration of a test that failed."""
    report = yield
    if report.failed:
        for migration in migrate.started:
            report.sections += migration.logs()
    return report
