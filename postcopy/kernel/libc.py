"""The door to the kernel: ``syscall(2)`` and ``ioctl(2)`` by cffi, and errors that name what was refused."""

import errno as errno_names
import os
from typing import Any

from postcopy.kernel._libc import ffi

lib: Any = ffi.dlopen(None)


def refused(what: str, errno: int | None = None) -> OSError:
    """The OSError for a call the kernel refused: ``EPERM: Operation not permitted: what``."""
    number = ffi.errno if errno is None else errno
    name = errno_names.errorcode.get(number, str(number))
    return OSError(number, f"{name}: {os.strerror(number)}: {what}")


def syscall(what: str, number: int, *arguments: int) -> int:
    """Make system call ``number`` with up to six integer arguments.

    Raises OSError (see `refused`) with ``what`` in its text.
    """
    padded = arguments + (0,) * (6 - len(arguments))
    result: int = lib.syscall(number, *padded)
    if result == -1:
        raise refused(what)
    return result


def ioctl(what: str, fd: int, request: int, argument: Any) -> int:
    """``ioctl(2)`` with a cffi pointer; raises OSError with ``what`` in its text."""
    result: int = lib.ioctl(fd, request, argument)
    if result == -1:
        raise refused(what)
    return result


def memory_at(address: int, length: int) -> memoryview:
    """``length`` bytes of our own memory; the caller sees to it that they stay."""
    return memoryview(ffi.buffer(ffi.cast("char *", address), length))


def address_of(buffer: Any) -> int:
    """The address of a writable or read-only Python buffer (the caller keeps the buffer alive)."""
    return int(ffi.cast("uintptr_t", ffi.from_buffer(buffer)))
