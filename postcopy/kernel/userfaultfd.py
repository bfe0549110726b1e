"""userfaultfd(2) and its ioctls; see ioctl_userfaultfd(2) and include/uapi/linux/userfaultfd.h.

Each call raises OSError with the kernel's errno. The calls of the fault path (`copy`, `zeropage`, `wake`) share
buffers made at import: fcntl.ioctl with a bytearray costs less than half a microsecond, a cffi call twice that. They
are therefore for processes with one thread.
"""

import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from postcopy.kernel.libc import refused, syscall
from postcopy.kernel.page import PAGE_SIZE

_NUMBERS = {"x86_64": 323, "aarch64": 282, "riscv64": 282}

UFFD_API = 0xAA
UFFD_USER_MODE_ONLY = 1

UFFD_FEATURE_PAGEFAULT_FLAG_WP = 1 << 0
UFFD_FEATURE_EVENT_FORK = 1 << 1
UFFD_FEATURE_EVENT_REMAP = 1 << 2
UFFD_FEATURE_EVENT_REMOVE = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS = 1 << 4
UFFD_FEATURE_MISSING_SHMEM = 1 << 5
UFFD_FEATURE_EVENT_UNMAP = 1 << 6
UFFD_FEATURE_SIGBUS = 1 << 7
UFFD_FEATURE_THREAD_ID = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS = 1 << 9
UFFD_FEATURE_MINOR_SHMEM = 1 << 10
UFFD_FEATURE_EXACT_ADDRESS = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED = 1 << 13
UFFD_FEATURE_POISON = 1 << 14
UFFD_FEATURE_WP_ASYNC = 1 << 15
UFFD_FEATURE_MOVE = 1 << 16

UFFDIO_REGISTER_MODE_MISSING = 1 << 0
UFFDIO_REGISTER_MODE_WP = 1 << 1
UFFDIO_REGISTER_MODE_MINOR = 1 << 2

UFFDIO_COPY_MODE_DONTWAKE = 1 << 0
UFFDIO_COPY_MODE_WP = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE = 1 << 0
UFFDIO_POISON_MODE_DONTWAKE = 1 << 0

UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_FORK = 0x13
UFFD_EVENT_REMAP = 0x14
UFFD_EVENT_REMOVE = 0x15
UFFD_EVENT_UNMAP = 0x16

UFFD_PAGEFAULT_FLAG_WRITE = 1 << 0
UFFD_PAGEFAULT_FLAG_WP = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR = 1 << 2

_API = Struct("=QQQ")
_REGISTER = Struct("=QQQQ")
_RANGE = Struct("=QQ")
_COPY = Struct("=QQQQq")
_ZEROPAGE = Struct("=QQQq")
_POISON = Struct("=QQQq")
_CONTINUE = Struct("=QQQq")
_MESSAGE = Struct("=B7xQQQ")


def _iowr(number: int, size: int) -> int:
    return 3 << 30 | size << 16 | UFFD_API << 8 | number


def _ior(number: int, size: int) -> int:
    return 2 << 30 | size << 16 | UFFD_API << 8 | number


UFFDIO_API = _iowr(0x3F, _API.size)
UFFDIO_REGISTER = _iowr(0x00, _REGISTER.size)
UFFDIO_UNREGISTER = _ior(0x01, _RANGE.size)
UFFDIO_WAKE = _ior(0x02, _RANGE.size)
UFFDIO_COPY = _iowr(0x03, _COPY.size)
UFFDIO_ZEROPAGE = _iowr(0x04, _ZEROPAGE.size)
UFFDIO_CONTINUE = _iowr(0x07, _CONTINUE.size)
UFFDIO_POISON = _iowr(0x08, _POISON.size)

_MESSAGES_A_READ = 64

_copy_argument = bytearray(_COPY.size)
_zeropage_argument = bytearray(_ZEROPAGE.size)
_wake_argument = bytearray(_RANGE.size)
_pack_copy = _COPY.pack_into
_pack_zeropage = _ZEROPAGE.pack_into
_pack_range = _RANGE.pack_into
_copied = Struct("=32xq").unpack_from
_zeroed = Struct("=24xq").unpack_from
_ioctl = fcntl.ioctl


class PageFault(NamedTuple):
    """A thread waits for the page at ``address``."""

    address: int
    flags: int
    ptid: int


class Fork(NamedTuple):
    """The process has forked; ``fd`` is the userfaultfd of the child and now belongs to the reader."""

    fd: int


class Remap(NamedTuple):
    """mremap(2) has moved ``length`` bytes from ``old`` to ``new``."""

    old: int
    new: int
    length: int


class Remove(NamedTuple):
    """madvise(2) is about to drop the pages of start-end, which stays mapped and registered."""

    start: int
    end: int


class Unmap(NamedTuple):
    """start-end is no longer mapped."""

    start: int
    end: int


Message = PageFault | Fork | Remap | Remove | Unmap


def userfaultfd(flags: int) -> int:
    """A new userfaultfd of the calling process; the flags are O_CLOEXEC, O_NONBLOCK and UFFD_USER_MODE_ONLY."""
    number = _NUMBERS.get(platform.machine())
    if number is None:
        raise refused(f"userfaultfd on {platform.machine()}", errno.ENOSYS)
    return syscall("userfaultfd", number, flags)


def api(fd: int, features: int) -> int:
    """UFFDIO_API: enable ``features``; gives the features that the kernel has."""
    argument = bytearray(_API.pack(UFFD_API, features, 0))
    _ioctl(fd, UFFDIO_API, argument)
    available: int = _API.unpack(argument)[1]
    return available


def register(fd: int, start: int, length: int, mode: int) -> int:
    """UFFDIO_REGISTER; gives the bit mask of the ioctls that the range allows."""
    argument = bytearray(_REGISTER.pack(start, length, mode, 0))
    _ioctl(fd, UFFDIO_REGISTER, argument)
    ioctls: int = _REGISTER.unpack(argument)[3]
    return ioctls


def unregister(fd: int, start: int, length: int) -> None:
    """UFFDIO_UNREGISTER; threads that are blocked in the range retry and see the zero page."""
    _ioctl(fd, UFFDIO_UNREGISTER, bytearray(_RANGE.pack(start, length)))


def copy(fd: int, destination: int, source: int, length: int, mode: int = 0) -> int:
    """UFFDIO_COPY of ``length`` bytes at the caller's address ``source``; wakes who waits for them.

    Gives the bytes copied, which are fewer than ``length`` when something stopped the copy: the next call, for the
    rest, raises the reason. EAGAIN: an event is unread; EEXIST: the page is there (and nobody was woken); ENOENT: the
    range is not in one registered mapping; ESRCH: the process is gone.
    """
    _pack_copy(_copy_argument, 0, destination, source, length, mode, 0)
    try:
        _ioctl(fd, UFFDIO_COPY, _copy_argument)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            copied: int = _copied(_copy_argument)[0]
            if copied > 0:
                return copied
        raise
    return length


def zeropage(fd: int, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_ZEROPAGE: like `copy`, of zeros."""
    _pack_zeropage(_zeropage_argument, 0, start, length, mode, 0)
    try:
        _ioctl(fd, UFFDIO_ZEROPAGE, _zeropage_argument)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            zeroed: int = _zeroed(_zeropage_argument)[0]
            if zeroed > 0:
                return zeroed
        raise
    return length


def continue_(fd: int, start: int, length: int) -> None:
    """UFFDIO_CONTINUE: map the pages of shared memory that exist there, and wake who waits for them (Linux 5.14).

    EEXIST: they are mapped (and nobody was woken); EFAULT: they do not exist; EINVAL: this is no shared memory;
    others as of `copy`. The range need not be registered for minor faults.
    """
    _ioctl(fd, UFFDIO_CONTINUE, bytearray(_CONTINUE.pack(start, length, 0, 0)))


def registered(fd: int, start: int, length: int = PAGE_SIZE) -> bool:
    """Whether a range is in one mapping that is in the hands of the userfaultfd, its pages present or not.

    Of a process that is gone, anything may be said to be. Not for private mappings of memfds and the like, where it
    would map pages. Raises OSError EAGAIN: as of `copy`.
    """
    try:
        continue_(fd, start, length)
    except OSError as error:
        if error.errno == errno.EAGAIN:
            raise
        return error.errno != errno.ENOENT
    return True


def wake(fd: int, start: int, length: int) -> None:
    """UFFDIO_WAKE: the threads that are blocked in the range try their access again."""
    _pack_range(_wake_argument, 0, start, length)
    _ioctl(fd, UFFDIO_WAKE, _wake_argument)


def poison(fd: int, start: int, length: int, mode: int = 0) -> int:
    """UFFDIO_POISON: accesses to the range raise SIGBUS; gives the bytes marked (Linux 6.6)."""
    argument = bytearray(_POISON.pack(start, length, mode, 0))
    _ioctl(fd, UFFDIO_POISON, argument)
    updated: int = _POISON.unpack(argument)[3]
    return updated


def read_messages(fd: int) -> list[Message]:
    """What is queued on the descriptor, up to 64 messages; empty when nothing is.

    The kernel hands out page faults before events, so a fault may be younger than the event that follows it here.
    """
    try:
        queued = os.read(fd, _MESSAGES_A_READ * _MESSAGE.size)
    except BlockingIOError:
        return []
    return list(_parse(queued))


def _parse(queued: bytes) -> Iterator[Message]:
    for event, first, second, third in _MESSAGE.iter_unpack(queued):
        if event == UFFD_EVENT_PAGEFAULT:
            yield PageFault(second, first, third & 0xFFFFFFFF)
        elif event == UFFD_EVENT_FORK:
            yield Fork(first & 0xFFFFFFFF)
        elif event == UFFD_EVENT_REMAP:
            yield Remap(first, second, third)
        elif event == UFFD_EVENT_REMOVE:
            yield Remove(first, second)
        elif event == UFFD_EVENT_UNMAP:
            yield Unmap(first, second)
        else:
            raise refused(f"userfaultfd message {event:#x}", errno.EPROTO)


def mm_exists(fd: int) -> bool:
    """Whether the address space of a userfaultfd still exists; poll on the descriptor says nothing at its end.

    A copy from an address that cannot be read changes nothing, and fails with ESRCH only when the mm is gone.
    """
    try:
        copy(fd, _PROBED_ADDRESS, 0, PAGE_SIZE)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def settled(fd: int) -> bool:
    """Whether every layout change that the kernel has begun has been read; the same probe, refused with EAGAIN or not.

    See ``mmap_changing`` in fs/userfaultfd.c: counted before the lock is given up that the change was made under.
    """
    try:
        copy(fd, _PROBED_ADDRESS, 0, PAGE_SIZE)
    except OSError as error:
        return error.errno != errno.EAGAIN
    return True


_PROBED_ADDRESS = 0x10000
