"""Descriptors above 1023, which select(2) cannot wait for: a tree of hundreds of processes takes more than that."""

import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator

import pytest

from postcopy.action_scripts import Action, ActionScripts
from postcopy.kernel.limits import allow_descriptors
from postcopy.restore_side.handover import Handover
from postcopy.restore_side.watchdog import kill_tree

FREE_FROM = 1500


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    """A program that does nothing."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


@pytest.fixture
def all_low_taken() -> Iterator[None]:
    """No descriptor is free below `FREE_FROM`."""
    allow_descriptors()
    taken: list[int] = []
    while not taken or taken[-1] < FREE_FROM:
        taken.append(os.dup(0))
    yield
    for fd in taken:
        os.close(fd)


def test_tree_is_killed_by_descriptors_with_high_numbers(sleeper: "subprocess.Popen[bytes]") -> None:
    allow_descriptors()
    low = os.pidfd_open(sleeper.pid)
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, FREE_FROM)
    try:
        kill_tree(Handover([], [], [(sleeper.pid, high)]), None)
        assert sleeper.wait(20) == -signal.SIGKILL
    finally:
        os.close(low)
        os.close(high)


@pytest.mark.usefixtures("all_low_taken")
def test_scripts_are_waited_for_by_descriptors_with_high_numbers() -> None:
    ActionScripts(["/bin/true"]).run(Action.PRE_DUMP)
