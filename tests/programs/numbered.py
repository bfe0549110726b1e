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
TAKE = struct.pack("=Hhh", 0, -1, 0)
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


def mq_open(name: str, flags: int, most: int = 4, size: int = 100) -> int:
    """A descriptor; flags as of open(2)."""
    attributes = struct.pack("<8q", 0, most, size, 0, 0, 0, 0, 0)
    return _call(240, name.encode() + b"\0", flags, 0o620, attributes)


def mq_unlink(name: str) -> int:
    """The name goes, the queue stays while it is open."""
    return _call(241, name.encode() + b"\0")


def mq_send(queue: int, priority: int, content: bytes) -> int:
    """Waits where the descriptor does."""
    return _call(242, queue, content, len(content), priority, 0)


def mq_receive(queue: int) -> tuple[int, bytes]:
    """Waits where the descriptor does."""
    buffer, priority = ctypes.create_string_buffer(8192), ctypes.c_uint()
    length = _call(243, queue, buffer, 8192, ctypes.byref(priority), 0)
    return priority.value, buffer.raw[:length]


def mq_attributes(queue: int) -> tuple[int, ...]:
    """Flags, most messages, most bytes, messages."""
    buffer = ctypes.create_string_buffer(64)
    _call(245, queue, 0, buffer)
    return struct.unpack_from("<4q", buffer)


def mq_notify(queue: int) -> int:
    """Be told of the next message, by SIGCHLD, which nobody hears."""
    return _call(244, queue, struct.pack("<Qii48x", 0, 17, 0))


def ipc_set(identifier: int, number: int, offset: int, form: str, wanted: int) -> int:
    """Change what stands at an offset of what IPC_STAT tells (semctl(2) is 66, msgctl(2) 71)."""
    buffer = ctypes.create_string_buffer(256)
    in_between = [0] if number == 66 else []
    _call(number, identifier, *in_between, IPC_STAT, buffer)
    struct.pack_into(form, buffer, offset, wanted)
    return _call(number, identifier, *in_between, 1, buffer)


def worker(expression: str) -> tuple[int, int]:
    """Have a process evaluate it, and end."""
    pid = os.fork()
    if not pid:
        eval(expression, globals())
        os._exit(0)
    return os.waitpid(pid, 0)


def main() -> None:
    """Do what is ordered, until killed."""
    child = os.fork()
    own = "parent" if child else "child"
    with open(sys.argv[1]) as orders, open(sys.argv[2], "a") as answers:
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
            answers.write(f"{answer}\n")
            answers.flush()


if __name__ == "__main__":
    main()
