"""pidfd_open(2) and pidfd_getfd(2): a process and its descriptors from outside."""

import contextlib
import errno
import fcntl
import os
import struct

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall

_PIDFD_THREAD = os.O_EXCL
_PIDFD_GET_INFO = 0xC048_FF0B  # include/uapi/linux/pidfd.h, with 72 bytes
_PIDFD_INFO_EXIT = 1 << 3
_INFO = struct.Struct("=QQ11Ii8x")


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


def exit_status(pidfd: int) -> int | None:
    """The wait status of a process that has been waited for; None where the kernel keeps none (before Linux 6.15)."""
    info = bytearray(_INFO.pack(_PIDFD_INFO_EXIT, *[0] * 13))
    with contextlib.suppress(OSError):
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
        mask, *_, status = _INFO.unpack(info)
        if mask & _PIDFD_INFO_EXIT:
            return int(status)
    return None
