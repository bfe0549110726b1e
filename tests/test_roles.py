"""Processes of ours, and the signals that end a command while they are made."""

import os
import select
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


OUTLIVES = """
import os, signal, sys
from postcopy import roles
def body():
    with roles.outliving_parent():
        print(os.getpid(), flush=True)
        while not roles.is_orphaned():
            pass
        print("done", flush=True)
    print("too late", flush=True)
roles.start("test", body, dies_with_parent=True)
signal.pause()
"""


def test_role_that_outlives_its_parent_ends_what_it_is_at_and_no_more() -> None:
    with subprocess.Popen([sys.executable, "-c", OUTLIVES], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        role = os.pidfd_open(int(process.stdout.readline()))
        process.kill()
        # To the end of both.
        assert process.stdout.read() == b"done\n"
    assert select.select([role], [], [], 20)[0]
    os.close(role)


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
