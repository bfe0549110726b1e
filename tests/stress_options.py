"""The options of the layout stress; `conftest.py` lists this plugin, since options must be known before tests are."""

import pytest

DEFAULT_SECONDS = 12.0


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--stress-seconds``, ``--stress-seed`` and ``--stress-without``."""
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
    group.addoption("--connections", type=int, default=60, help="of the service that is moved with many (default: 60)")
    group.addoption(
        "--stress-without", default="", metavar="OPERATIONS", help="leave operations out: op_lock,op_fork,…"
    )
