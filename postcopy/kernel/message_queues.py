"""System V message queues: msgget(2), msgctl(2), msgrcv(2), msgsnd(2). Errors are OSError."""

import struct

from msgspec import Struct

from postcopy.kernel import ipc
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.ipc import IPC_CREAT, IPC_EXCL, IPC_NOWAIT, PERM
from postcopy.kernel.libc import address_of, syscall

_MSG_NOERROR, _MSG_COPY = 0o10000, 0o40000
# struct msqid64_ds: permissions; three times: last sent, received, changed; bytes, messages, most bytes; who sent and
# received last.
_MSQID_DS = struct.Struct(f"{PERM}qqqQQQii16x")
_CAPACITY_AT = struct.calcsize(f"{PERM}qqqQQ")
_TYPE = struct.Struct("<q")


class QueueStatus(Struct, frozen=True):
    """What IPC_STAT tells of a queue. ``capacity``: bytes; ``users``: the PIDs of who sent and received last, and when
    (s since the epoch)."""

    key: int
    creator: tuple[int, int]
    owner: tuple[int, int]
    mode: int
    capacity: int
    filled: int
    messages: int
    users: list[tuple[int, int]]


def stat(identifier: int) -> QueueStatus:
    """msgctl(2), IPC_STAT. Raises OSError: EINVAL (there is none)."""
    found = _MSQID_DS.unpack(_stat(identifier))
    key, uid, gid, creator, group, mode, _, sent, received, _, filled, messages, capacity, sender, receiver = found
    users = [(pid, time) for pid, time in ((sender, sent), (receiver, received)) if pid]
    return QueueStatus(key, (creator, group), (uid, gid), mode & 0o777, capacity, filled, messages, users)


def _stat(identifier: int) -> bytearray:
    return ipc.read_status("msg", name(identifier), identifier, _MSQID_DS.size)


def name(identifier: int) -> str:
    """What errors call it."""
    return f"System V message queue {identifier}"


def messages(identifier: int, status: QueueStatus) -> list[tuple[int, bytes]]:
    """The type and the content of each message, which stay where they are (MSG_COPY, Linux 3.8). Raises OSError:
    ENOSYS (a kernel without CONFIG_CHECKPOINT_RESTORE)."""
    buffer = bytearray(_TYPE.size + status.filled)
    found = []
    for number in range(status.messages):
        flags = _MSG_COPY | _MSG_NOERROR | IPC_NOWAIT
        what = f"reading {name(identifier)}"
        length = syscall(what, NUMBERS["msgrcv"], identifier, address_of(buffer), status.filled, number, flags)
        found.append((*_TYPE.unpack_from(buffer), bytes(buffer[_TYPE.size : _TYPE.size + length])))
    return found


def create(identifier: int, key: int, creator: tuple[int, int]) -> None:
    """A new queue with a chosen id, for its creator alone; as of `ipc.become`. Raises OSError: EEXIST (the id or the
    key is taken), ENOSPC."""
    what = f"making {name(identifier)} (key {key:#x})"
    ipc.choose_id("msg", identifier, what)
    ipc.become(creator)
    got = syscall(what, NUMBERS["msgget"], key, IPC_CREAT | IPC_EXCL | 0o600)
    ipc.created("msg", what, identifier, got)


def set_owner(identifier: int, owner: tuple[int, int], mode: int, capacity: int) -> None:
    """msgctl(2), IPC_SET: user, group, permission bits, and the most bytes. Raises OSError: EPERM (more than
    kernel.msgmnb)."""
    buffer = _stat(identifier)
    struct.pack_into("<Q", buffer, _CAPACITY_AT, capacity)
    ipc.set_owner("msg", f"{name(identifier)}, and its size", identifier, buffer, owner, mode)


def remove(identifier: int) -> None:
    """msgctl(2), IPC_RMID."""
    ipc.remove("msg", name(identifier), identifier)
