"""pipe(7): what is in a pipe, without taking it out (tee(2), FIONREAD)."""

import fcntl
import os
import struct
import termios

from postcopy.kernel.libc import syscall

_NR_TEE = 276
_SPLICE_F_NONBLOCK = 2


def capacity(fd: int) -> int:
    """The size of the pipe's buffer in bytes (F_GETPIPE_SZ)."""
    return fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ)


def unread(fd: int) -> int:
    """The number of bytes in the pipe."""
    found: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return found


def peek(fd: int) -> list[bytes]:
    """What is in the pipe of which ``fd`` is the read end, and stays in it: the packets, or one piece of a stream."""
    length = unread(fd)
    if not length:
        return []
    read_end, write_end = os.pipe()
    try:
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, capacity(fd))
        copied = syscall("copying the content of a pipe", _NR_TEE, fd, write_end, length, _SPLICE_F_NONBLOCK)
        pieces = []
        while copied:
            pieces.append(os.read(read_end, copied))
            copied -= len(pieces[-1])
        return pieces
    finally:
        os.close(read_end)
        os.close(write_end)
