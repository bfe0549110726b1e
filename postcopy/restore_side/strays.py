"""Processes that wait for pages and that nobody knows by PID: orphans of processes of the tree that have ended.

A userfaultfd does not tell whose memory it is about. But when it is told to track writes as well, which changes nothing
by itself, `/proc/PID/smaps` shows that of the mapping: so a process whose mapping changes its flags is one of ours.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

from postcopy.kernel import userfaultfd

_MISSING, _TRACKED = b"um", b"uw"  # of VmFlags in proc_pid_smaps(5)


def kill_strays(uffds: list[int]) -> None:
    """SIGKILL every process whose memory is that of one of these userfaultfds. Raises nothing."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), _opened(int(pid)) as pidfd:
            if (found := next(_waiting(pid), None)) and _is_of_one(pid, *found, uffds):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


@contextlib.contextmanager
def _opened(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _is_of_one(pid: str, start: int, end: int, uffds: list[int]) -> bool:
    mode = userfaultfd.UFFDIO_REGISTER_MODE_MISSING | userfaultfd.UFFDIO_REGISTER_MODE_WP
    for uffd in uffds:
        with contextlib.suppress(OSError):
            userfaultfd.register(uffd, start, end - start, mode)
            if (start, end) not in _waiting(pid):
                return True
    return False


def _waiting(pid: str) -> Iterator[tuple[int, int]]:
    """The mappings of a process that userfaultfd fills and does not track. Raises OSError."""
    place = 0, 0
    with open(f"/proc/{pid}/smaps", "rb") as stream:
        for line in stream:
            first, _, rest = line.partition(b" ")
            if first == b"VmFlags:":
                flags = rest.split()
                if _MISSING in flags and _TRACKED not in flags:
                    yield place
            elif not first.endswith(b":"):
                start, _, end = first.partition(b"-")
                place = int(start, 16), int(end, 16)
