"""The options of the layout stress; `conftest.py` lists this plugin, since options must be known before tests are."""

import pytest

DEFAULT_SECONDS = 12.0
# Besides the run itself: to begin, to notice that something hangs, and to say so.
_MORE_SECONDS = 280.0
_STRESSES = ("test_every_byte_is_right_while", "test_every_byte_of_a_tree")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Sizes and seeds of the tests that can be made to last."""
    group = parser.getgroup("layout stress")
    group.addoption(
        "--stress-seconds", type=float, default=DEFAULT_SECONDS, help="of each run, after the move (default: 12)"
    )
    group.addoption(
        "--stress-seed",
        type=int,
        action="append",
        help="run this seed instead of the suite's own; may be repeated",
    )
    group.addoption("--tree-processes", type=int, default=100, help="of the largest tree that is moved (default: 100)")
    group.addoption("--redis-megabytes", type=int, default=50, help="of the Redis server that is moved (default: 50)")
    group.addoption("--tree-threads", type=int, default=200, help="of a tree of twenty processes (default: 200)")
    group.addoption("--connections", type=int, default=60, help="of the service that is moved with many (default: 60)")
    group.addoption(
        "--stress-without", default="", metavar="OPERATIONS", help="leave operations out: op_lock,op_fork,…"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A long run has a long time limit, which must be known before the test begins."""
    seconds = float(config.getoption("--stress-seconds", DEFAULT_SECONDS))
    for item in items:
        if item.name.startswith(_STRESSES):
            item.add_marker(pytest.mark.timeout(seconds + _MORE_SECONDS))
