"""What the watchdog does when it fails itself."""

import os
import signal
import socket
import subprocess
import sys
from typing import NoReturn

import pytest

from postcopy import roles
from postcopy.action_scripts import ActionScripts
from postcopy.kernel import procfs
from postcopy.kernel.poll import readable
from postcopy.restore_side.fault_handler import Background
from postcopy.restore_side.handover import Handover
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.watchdog import Watchdog, kill_tree
from postcopy.transport import Channel, Channels


class Failing(Watchdog):
    """One that meets what nobody has foreseen, with a tree in its care."""

    def _watch(self) -> NoReturn:
        raise OSError("the unforeseen")


def test_tree_is_killed_when_the_watchdog_fails_itself() -> None:
    with subprocess.Popen(["sleep", "1000"]) as program:
        channels = [Channel(socket.socketpair()[0], "test") for _ in range(3)]
        watchdog = Failing(
            channels=Channels(*channels),
            background=Background(),
            orders=-1,
            handovers=socket.socketpair()[0],
            news=socket.socketpair()[0],
            namespace_init=None,
            detached=False,
            leftovers=Leftovers(),
            scripts=ActionScripts(),
            program=program.pid,
            tree=Handover([], [], [(program.pid, os.pidfd_open(program.pid))]),
            committed=True,
        )
        try:
            role = roles.start("postcopy-watch", watchdog.run, dies_with_parent=True)
            assert role.wait() == 0
            assert program.wait(20) == -signal.SIGKILL
        finally:
            program.kill()


FORKS = """
import os, time
if not os.fork():
    time.sleep(1000)
print("forked", flush=True)
time.sleep(1000)
"""


def test_tree_is_killed_with_children_that_nobody_knows() -> None:
    with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"forked\n"
        (child,) = procfs.children(program.pid)
        its_end = os.pidfd_open(child)
        kill_tree(Handover([], [], [(program.pid, os.pidfd_open(program.pid))]), None)
        assert program.wait(20) == -signal.SIGKILL
        assert readable(its_end, 20)
        os.close(its_end)


def test_process_that_has_got_the_pid_of_a_child_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "1000"]) as program, subprocess.Popen(["sleep", "1000"]) as other:
        # The first look still finds the child whose PID it has got.
        looks = iter([[other.pid], []])
        monkeypatch.setattr(procfs, "descendants", lambda _: next(looks))
        kill_tree(Handover([], [], [(program.pid, os.pidfd_open(program.pid))]), None)
        assert program.wait(20) == -signal.SIGKILL
        assert other.poll() is None
        other.kill()
