"""kcmp(2): whether two processes share a kernel object."""

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall

_KCMP_FILE, _KCMP_VM, _KCMP_FILES, _KCMP_FS, _KCMP_SIGHAND = 0, 1, 2, 3, 4

# What processes may share by clone(2) although they are no threads of one another.
SHAREABLE = {
    _KCMP_VM: "memory (vfork, CLONE_VM)",
    _KCMP_FILES: "descriptor table (CLONE_FILES)",
    _KCMP_FS: "working directory (CLONE_FS)",
    _KCMP_SIGHAND: "signal actions (CLONE_SIGHAND)",
}


def order_of_descriptions(pid: int, fd: int, other_pid: int, other_fd: int) -> int:
    """How the open file descriptions of two descriptors are ordered: 0 where they are one, else -1 or 1.

    The order has no meaning, but it holds as long as both are open.
    """
    what = f"comparing descriptor {fd} of process {pid} with descriptor {other_fd} of process {other_pid}"
    return (0, -1, 1)[syscall(what, NUMBERS["kcmp"], pid, other_pid, _KCMP_FILE, fd, other_fd)]


def order(kind: int, pid: int, other: int) -> int:
    """How something in `SHAREABLE` of two processes is ordered: 0 where they share it, else -1 or 1."""
    return (0, -1, 1)[syscall(f"comparing processes {pid} and {other}", NUMBERS["kcmp"], pid, other, kind, 0, 0)]


def same_table(first: int, second: int) -> bool:
    """Whether two tasks share their descriptor table."""
    return _same(_KCMP_FILES, first, second)


def same_places(first: int, second: int) -> bool:
    """Whether two tasks share their root, working directory and umask."""
    return _same(_KCMP_FS, first, second)


def _same(kind: int, first: int, second: int) -> bool:
    return syscall(f"comparing tasks {first} and {second}", NUMBERS["kcmp"], first, second, kind, 0, 0) == 0
