"""kcmp(2): whether two processes share a kernel object."""

import os
import struct

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, lib, refused, syscall

_NR_KCMP = NUMBERS["kcmp"]
_ORDER = (0, -1, 1)
_KCMP_FILE, _KCMP_VM, _KCMP_FILES, _KCMP_FS, _KCMP_SIGHAND, _KCMP_SYSVSEM, _KCMP_EPOLL_TFD = 0, 1, 2, 3, 4, 6, 7

# What processes may share by clone(2) although they are no threads of one another.
MEMORY, TABLE, PLACES, SIGNAL_ACTIONS = _KCMP_VM, _KCMP_FILES, _KCMP_FS, _KCMP_SIGHAND
SHAREABLE = {
    MEMORY: "memory (vfork, CLONE_VM)",
    TABLE: "descriptor table (CLONE_FILES)",
    PLACES: "working directory (CLONE_FS)",
    SIGNAL_ACTIONS: "signal actions (CLONE_SIGHAND)",
}


def order_of_descriptions(pid: int, fd: int, other_pid: int, other_fd: int) -> int:
    """How the open file descriptions of two descriptors are ordered: 0 where they are one, else -1 or 1.

    The order has no meaning, but it holds as long as both are open.
    """
    # Directly: among thousands of descriptors that look alike, this is what takes the time.
    found: int = lib.syscall(_NR_KCMP, pid, other_pid, _KCMP_FILE, fd, other_fd, 0)
    if found < 0:
        raise refused(f"comparing descriptor {fd} of process {pid} with descriptor {other_fd} of process {other_pid}")
    return _ORDER[found]


def is_epoll_target(pid: int, fd: int, epoll_pid: int, epoll: int, registered: int, which: int) -> bool:
    """Whether descriptor ``fd`` of a process is what an epoll instance watches under the number ``registered``.

    ``epoll`` is its descriptor in process ``epoll_pid``. ``which`` tells those apart that were registered under one
    number, which was closed in between; in order.
    """
    slot = struct.pack("<3I", epoll, registered, which)  # struct kcmp_epoll_slot
    what = f"comparing descriptor {fd} of process {pid} with a target of epoll instance {epoll}"
    return syscall(what, _NR_KCMP, pid, epoll_pid, _KCMP_EPOLL_TFD, fd, address_of(slot)) == 0


def order(kind: int, pid: int, other: int) -> int:
    """How something in `SHAREABLE` of two processes is ordered: 0 where they share it, else -1 or 1."""
    return (0, -1, 1)[syscall(f"comparing processes {pid} and {other}", NUMBERS["kcmp"], pid, other, kind, 0, 0)]


def same_table(first: int, second: int) -> bool:
    """Whether two tasks share their descriptor table."""
    return _same(_KCMP_FILES, first, second)


def same_places(first: int, second: int) -> bool:
    """Whether two tasks share their root, working directory and umask."""
    return _same(_KCMP_FS, first, second)


def has_nothing_to_undo(pid: int) -> bool:
    """Whether a process has no list of what SEM_UNDO is to undo (semop(2)): who makes a thread has one, too. Where we
    have one, nobody is told apart."""
    return _same(_KCMP_SYSVSEM, pid, os.getpid())


def _same(kind: int, first: int, second: int) -> bool:
    return syscall(f"comparing tasks {first} and {second}", NUMBERS["kcmp"], first, second, kind, 0, 0) == 0
