"""kcmp(2): whether two processes share a kernel object."""

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall

_KCMP_FILE = 0


def same_description(pid: int, first: int, second: int) -> bool:
    """Whether two descriptors of a process refer to one open file description."""
    what = f"comparing descriptors {first} and {second} of process {pid}"
    return syscall(what, NUMBERS["kcmp"], pid, pid, _KCMP_FILE, first, second) == 0
