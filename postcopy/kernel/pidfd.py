"""pidfd_open(2) and pidfd_getfd(2): a process and its descriptors from outside."""

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall


def getfd(pidfd: int, fd: int) -> int:
    """Our own descriptor (close-on-exec) of the open file description behind ``fd`` of another process."""
    return syscall(f"taking descriptor {fd} of another process", NUMBERS["pidfd_getfd"], pidfd, fd)
