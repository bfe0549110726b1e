"""Processes of ours, and the signals that end a command while they are made."""

import os
import signal
import subprocess
import sys

import pytest

from postcopy import roles

FORKS = """
import logging, signal, sys
from postcopy import roles
from postcopy.deadline import Interrupted, end_on_signals
end_on_signals()
try:
    print(flush=True)
    while True:
        roles.start("test", lambda: None, dies_with_parent=True).wait()
except Interrupted:
    sys.exit(42)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_that_comes_in_a_fork_is_not_lost(number: signal.Signals) -> None:
    for _ in range(15):
        with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.send_signal(number)
            try:
                _, complaints = process.communicate(timeout=20)
            finally:
                process.kill()
        assert (process.returncode, complaints) == (42, b"")


def test_failure_of_a_role_is_seen() -> None:
    role = roles.start("test", lambda: os._exit(3), dies_with_parent=True)
    assert role.wait() == 3
