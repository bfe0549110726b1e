"""The guard: a process that wakes the tree when the control process dies between the durable stop and GO.

ptrace(2) wakes a frozen tree when its tracer dies; the durable stop takes that away one step before commit. The
control process tells the guard by a socket where it stands; the end of the connection says that it has died.
"""

import contextlib
import signal
import socket
from collections.abc import Sequence

from postcopy import roles

_STOPPING, _COMMITTING = b"s", b"c"
_MOST_DESCRIPTORS = 250  # SCM_MAX_FD is 253


class Guard:
    """The control process's end of the connection."""

    def __init__(self) -> None:
        """Fork the guard."""
        self._connection, guards_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def body() -> None:
            self._connection.close()
            watch(guards_end)

        self._role = roles.start("postcopy-guard", body, dies_with_parent=False)
        guards_end.close()

    def stopping(self, pidfds: Sequence[int]) -> None:
        """From here on these processes must be woken if we die."""
        for first in range(0, len(pidfds), _MOST_DESCRIPTORS):
            socket.send_fds(self._connection, [_STOPPING], pidfds[first : first + _MOST_DESCRIPTORS])

    def committing(self) -> None:
        """From here on the tree must not be woken by anybody."""
        self._connection.send(_COMMITTING)

    def dismiss(self) -> None:
        """The guard's work is done."""
        # Killed rather than told: processes forked since may hold the connection open.
        self._role.kill()
        self._connection.close()


def watch(connection: socket.socket) -> None:
    """The guard's body: follow the control process to its end."""
    to_wake: list[int] = []
    while True:
        said, pidfds, _, _ = socket.recv_fds(connection, 1, _MOST_DESCRIPTORS)
        if said != _STOPPING:
            break
        to_wake += pidfds
    if said != _COMMITTING:
        for pidfd in to_wake:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
