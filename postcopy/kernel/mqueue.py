"""POSIX message queues: mq_open(2) and its kind, by names without a slash. Errors are OSError."""

import os
import re
import struct

from msgspec import Struct

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall

# struct mq_attr: flags, most messages, bytes of each, messages that are there.
_ATTRIBUTES = struct.Struct("<4q32x")
_NOTIFIED = re.compile(rb"NOTIFY_PID:(\d+)")
_STATFS_SIZE, _MQUEUE_MAGIC = 120, 0x19800202
STATUS_SIZE = 80  # FILENT_SIZE, ipc/mqueue.c: of the file that a queue is


class Attributes(Struct, frozen=True):
    """``most``: messages, ``size``: bytes of each, at most; ``waiting``: messages."""

    most: int
    size: int
    waiting: int


def create(name: str, most: int, size: int) -> int:
    """A new queue for its owner alone; a descriptor for reading and writing, which never waits.

    Raises OSError: EEXIST, EINVAL (more than fs.mqueue.msg_max or msgsize_max), EMFILE (RLIMIT_MSGQUEUE), ENOSPC.
    """
    wanted = _ATTRIBUTES.pack(0, most, size, 0)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
    text = os.fsencode(name) + b"\0"
    what = f"making message queue /{name}"
    return syscall(what, NUMBERS["mq_open"], address_of(text), flags, 0o600, address_of(wanted))


def exists(name: str) -> bool:
    """Whether there is a queue of this name."""
    text = os.fsencode(name) + b"\0"
    try:
        fd = syscall("", NUMBERS["mq_open"], address_of(text), os.O_RDONLY | os.O_CLOEXEC, 0, 0)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    os.close(fd)
    return True


def unlink(name: str) -> None:
    """mq_unlink(2)."""
    text = os.fsencode(name) + b"\0"
    syscall(f"removing message queue /{name}", NUMBERS["mq_unlink"], address_of(text))


def attributes(fd: int) -> Attributes:
    """mq_getattr(3)."""
    found = bytearray(_ATTRIBUTES.size)
    syscall("looking at a message queue", NUMBERS["mq_getsetattr"], fd, 0, address_of(found))
    return Attributes(*_ATTRIBUTES.unpack(found)[1:])


def notified(fd: int) -> int:
    """The PID of who is to be told of the next message (mq_notify(3)), 0 for nobody; by a descriptor for reading."""
    found = _NOTIFIED.search(os.pread(fd, STATUS_SIZE + 1, 0))
    return int(found[1]) if found else 0


def receive(fd: int, size: int) -> tuple[int, bytes]:
    """The next message, of at most ``size`` bytes: its priority and its content. Raises OSError: EAGAIN."""
    content, priority = bytearray(size), bytearray(4)
    what = "reading a message queue"
    length = syscall(what, NUMBERS["mq_timedreceive"], fd, address_of(content), size, address_of(priority), 0)
    return int.from_bytes(priority, "little"), bytes(content[:length])


def send(fd: int, priority: int, content: bytes) -> None:
    """Add a message. Raises OSError: EAGAIN (it is full)."""
    syscall("filling a message queue", NUMBERS["mq_timedsend"], fd, address_of(content), len(content), priority, 0)


def is_one(path: str) -> bool:
    """Whether there is a queue at this path of ``/proc`` (fstatfs(2)). Raises OSError."""
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        status = bytearray(_STATFS_SIZE)
        syscall(f"looking at {path}", NUMBERS["fstatfs"], opened, address_of(status))
        return int.from_bytes(status[:8], "little") == _MQUEUE_MAGIC
    finally:
        os.close(opened)
