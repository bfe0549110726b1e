"""inotify(7): constants, and the file behind a watch."""

import fcntl
import os
import struct
import termios

from postcopy.kernel._libc import ffi
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall

IN_MODIFY = 0x00000002
IN_DONT_FOLLOW = 0x02000000
INOTIFY_IOC_SETNEXTWD = 0x40044900  # include/uapi/linux/inotify.h

_NR_OPEN_BY_HANDLE_AT = 304


def make(flags: int) -> int:
    """inotify_init1(2): a descriptor; the flags are O_CLOEXEC and O_NONBLOCK."""
    return syscall("making an inotify instance", NUMBERS["inotify_init1"], flags)


def add_watch(fd: int, path: str, mask: int) -> int:
    """inotify_add_watch(2): the number of the watch."""
    name = ffi.from_buffer(path.encode() + b"\0")
    return syscall(f"watching {path}", NUMBERS["inotify_add_watch"], fd, int(ffi.cast("uintptr_t", name)), mask)


def unread(fd: int) -> int:
    """Bytes of events that nobody has read."""
    found: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, bytes(4)))[0]
    return found


def open_by_handle(mount: int, kind: int, handle: bytes) -> int:
    """An O_PATH descriptor of the file with this handle on the filesystem of ``mount`` (open_by_handle_at(2)).

    Raises OSError: ESTALE where there is no such file any more.
    """
    packed = struct.pack("<Ii", len(handle), kind) + handle
    what = "opening a file by its handle"
    return syscall(what, _NR_OPEN_BY_HANDLE_AT, mount, address_of(packed), os.O_PATH | os.O_CLOEXEC)
