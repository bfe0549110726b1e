"""The guard: a process that wakes the tree when the control process dies between the durable stop and GO.

ptrace(2) wakes a frozen tree when its tracer dies; the durable stop takes that away one step before commit. The
control process tells the guard by a pipe where it stands; the pipe's end says that it has died.
"""

import contextlib
import os
import signal

from postcopy import roles

_STOPPING, _COMMITTING = b"s", b"c"


class Guard:
    """The control process's end of the pipe."""

    def __init__(self, target_pidfd: int) -> None:
        """Fork the guard; ``target_pidfd`` is the process to wake."""
        read_end, self._write_end = os.pipe()

        def body() -> None:
            os.close(self._write_end)
            watch(read_end, target_pidfd)

        self._role = roles.start("postcopy-guard", body, dies_with_parent=False)
        os.close(read_end)

    def stopping(self) -> None:
        """From here on the tree must be woken if we die."""
        os.write(self._write_end, _STOPPING)

    def committing(self) -> None:
        """From here on the tree must not be woken by anybody."""
        os.write(self._write_end, _COMMITTING)

    def dismiss(self) -> None:
        """The guard's work is done."""
        # Killed rather than told: processes forked since may hold the pipe open.
        self._role.kill()
        os.close(self._write_end)


def watch(read_end: int, target_pidfd: int) -> None:
    """The guard's body: follow the control process to its end."""
    last = b""
    while said := os.read(read_end, 1):
        last = said
    if last == _STOPPING:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(target_pidfd, signal.SIGCONT)
