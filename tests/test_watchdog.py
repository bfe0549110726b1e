"""What the watchdog does when it fails itself."""

import os
import signal
import socket
import subprocess
from typing import NoReturn

from postcopy import roles
from postcopy.action_scripts import ActionScripts
from postcopy.restore_side.fault_handler import Background
from postcopy.restore_side.handover import Handover
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.watchdog import Watchdog
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
