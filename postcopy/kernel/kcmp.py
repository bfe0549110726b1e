"""kcmp(2): whether two processes share a kernel object."""

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall

_KCMP_FILE, _KCMP_FILES, _KCMP_FS = 0, 2, 3


def order_of_descriptions(pid: int, first: int, second: int) -> int:
    """How the open file descriptions of two descriptors of a process are ordered: 0 where they are one, else -1 or 1.

    The order has no meaning, but it holds as long as both are open.
    """
    what = f"comparing descriptors {first} and {second} of process {pid}"
    return (0, -1, 1)[syscall(what, NUMBERS["kcmp"], pid, pid, _KCMP_FILE, first, second)]


def same_table(first: int, second: int) -> bool:
    """Whether two tasks share their descriptor table."""
    return _same(_KCMP_FILES, first, second)


def same_places(first: int, second: int) -> bool:
    """Whether two tasks share their root, working directory and umask."""
    return _same(_KCMP_FS, first, second)


def _same(kind: int, first: int, second: int) -> bool:
    return syscall(f"comparing tasks {first} and {second}", NUMBERS["kcmp"], first, second, kind, 0, 0) == 0
