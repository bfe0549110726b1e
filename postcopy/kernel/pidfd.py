"""pidfd_open(2) and pidfd_getfd(2): a process and its descriptors from outside."""

import errno
import os

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall

_PIDFD_THREAD = os.O_EXCL


def of_task(tid: int) -> int:
    """A pidfd of a process, or of a thread that is not its main thread (Linux 6.9)."""
    try:
        return os.pidfd_open(tid)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOENT):
            raise
    return os.pidfd_open(tid, _PIDFD_THREAD)


def getfd(pidfd: int, fd: int) -> int:
    """Our own descriptor (close-on-exec) of the open file description behind ``fd`` of another process."""
    return syscall(f"taking descriptor {fd} of another process", NUMBERS["pidfd_getfd"], pidfd, fd)
