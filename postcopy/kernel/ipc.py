"""What all System V objects have in common (sysvipc(7)): keys and ids, owners, removal."""

import errno
import os
import struct
from pathlib import Path

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, refused, syscall

IPC_CREAT, IPC_EXCL, IPC_NOWAIT = 0o1000, 0o2000, 0o4000
IPC_RMID, IPC_SET, IPC_STAT = 0, 1, 2
# struct ipc64_perm: key, uid, gid, creator's uid and gid, mode, sequence.
PERM = "<iIIIIIHxx4x16x"
_OWNER = struct.Struct("<II8xI")


def listed(kind: str) -> dict[int, int]:
    """The keys of all objects of this IPC namespace, by id; ``kind``: ``shm``, ``sem`` or ``msg``. Raises OSError."""
    try:
        lines = Path("/proc/sysvipc", kind).read_text().splitlines()[1:]
    except FileNotFoundError:
        return {}  # a kernel without CONFIG_SYSVIPC, or a /proc of processes alone
    return {int(identifier): int(key) for key, identifier, *_ in map(str.split, lines)}


def choose_id(kind: str, identifier: int, what: str) -> None:
    """The next object of this kind gets this id, if that is free. Raises OSError: EPERM (CAP_CHECKPOINT_RESTORE or
    CAP_SYS_ADMIN is missing)."""
    path = f"/proc/sys/kernel/{kind}_next_id"
    try:
        with open(path, "w") as stream:
            stream.write(str(identifier))
    except OSError as error:
        raise refused(f"{what}: choosing its id by {path}", error.errno) from None


def become(creator: tuple[int, int]) -> None:
    """Be this user, and of this group, from here on: who makes an object is its creator for good, and always has
    access. Does nothing where that is what we are; else it is for a process of its own. Raises OSError."""
    uid, gid = creator
    if (uid, gid) != (os.geteuid(), os.getegid()):
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)


def control(kind: str, what: str, identifier: int, command: int, argument: int = 0, number: int = 0) -> int:
    """shmctl(2), semctl(2) (of semaphore ``number``) or msgctl(2). Raises OSError."""
    if kind == "sem":
        return syscall(what, NUMBERS["semctl"], identifier, number, command, argument)
    return syscall(what, NUMBERS[f"{kind}ctl"], identifier, command, argument)


def read_status(kind: str, what: str, identifier: int, size: int) -> bytearray:
    """IPC_STAT of ``what``: a struct of so many bytes. Raises OSError: EINVAL (there is none)."""
    status = bytearray(size)
    control(kind, f"looking at {what}", identifier, IPC_STAT, address_of(status))
    return status


def set_owner(kind: str, what: str, identifier: int, status: bytearray, owner: tuple[int, int], mode: int) -> None:
    """IPC_SET: ``status``, as it was read, with this user, group and permission bits. Raises OSError."""
    _OWNER.pack_into(status, 4, *owner, mode)
    control(kind, f"setting the owner of {what}", identifier, IPC_SET, address_of(status))


def remove(kind: str, what: str, identifier: int) -> None:
    """IPC_RMID. Raises OSError."""
    control(kind, f"removing {what}", identifier, IPC_RMID)


def created(kind: str, what: str, identifier: int, got: int) -> None:
    """That an object which has just been made has the id that was chosen; otherwise it is removed. Raises OSError:
    EEXIST."""
    if got != identifier:
        remove(kind, "what was made instead", got)
        raise refused(what, errno.EEXIST)
