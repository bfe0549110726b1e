"""A process and its child that use System V semaphores and a message queue, told by a file of orders what to do.

``numbered.py ORDERS ANSWERS``: each line of ORDERS is ``parent`` or ``child`` and an expression over the functions
here; its value, or the name of the error, is appended to ANSWERS as a line.
"""

import ctypes
import errno
import os
import struct
import sys
import time
from typing import Any

SEM_UNDO, IPC_NOWAIT, IPC_CREAT, IPC_STAT = 0x1000, 0o4000, 0o1000, 2
GETPID, GETALL, SETALL = 11, 13, 17
_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def semget(key: int, count: int) -> int:
    """A set that everybody may use."""
    return _call(64, key, count, IPC_CREAT | 0o640)


def semop(identifier: int, *operations: tuple[int, int, int]) -> int:
    """Of each: number, amount, flags; never waits."""
    packed = b"".join(struct.pack("=Hhh", number, amount, flags | IPC_NOWAIT) for number, amount, flags in operations)
    return _call(65, identifier, packed, len(operations))


def values(identifier: int, count: int) -> list[int]:
    """All of them."""
    buffer = (ctypes.c_ushort * count)()
    _call(66, identifier, 0, GETALL, buffer)
    return list(buffer)


def setall(identifier: int, *wanted: int) -> int:
    """Set all of them."""
    return _call(66, identifier, 0, SETALL, (ctypes.c_ushort * len(wanted))(*wanted))


def users(identifier: int, count: int) -> list[int]:
    """Who has used each last."""
    return [_call(66, identifier, number, GETPID, 0) for number in range(count)]


def msgget(key: int) -> int:
    """A queue that everybody may use."""
    return _call(68, key, IPC_CREAT | 0o604)


def send(identifier: int, kind: int, content: bytes) -> int:
    """Never waits."""
    return _call(69, identifier, struct.pack("<q", kind) + content, len(content), IPC_NOWAIT)


def receive(identifier: int, kind: int = 0) -> tuple[int, bytes]:
    """Never waits."""
    buffer = ctypes.create_string_buffer(8 + 65536)
    length = _call(70, identifier, buffer, 65536, kind, IPC_NOWAIT)
    return struct.unpack_from("<q", buffer)[0], buffer.raw[8 : 8 + length]


def status(identifier: int, number: int) -> tuple[int, ...]:
    """Key, user, group, mode (semctl(2) is 66, msgctl(2) 71)."""
    buffer = ctypes.create_string_buffer(256)
    _call(number, identifier, *([0] if number == 66 else []), IPC_STAT, buffer)
    key, uid, gid, _, _, mode = struct.unpack_from("<iIIIII", buffer)
    return key, uid, gid, mode


def main() -> None:
    """Do what is ordered, until killed."""
    child = os.fork()
    own = "parent" if child else "child"
    with open(sys.argv[1]) as orders:
        while True:
            order = orders.readline()
            if not order.endswith("\n"):
                time.sleep(0.002)
                continue
            who, _, expression = order.strip().partition(" ")
            if who != own:
                continue
            try:
                answer = repr(eval(expression, {**globals(), "child": child}))
            except OSError as error:
                answer = errno.errorcode[error.errno or 0]
            with open(sys.argv[2], "a") as answers:
                answers.write(f"{answer}\n")


if __name__ == "__main__":
    main()
