"""System V shared memory: shmget(2), shmctl(2), and segments with chosen ids. Errors are OSError."""

import struct

from msgspec import Struct

from postcopy.kernel import ipc
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.ipc import IPC_CREAT, IPC_EXCL, PERM
from postcopy.kernel.libc import syscall

SHM_RDONLY, SHM_EXEC = 0o10000, 0o100000

_SHM_NORESERVE = 0o10000
_SHM_HUGETLB, _SHM_HUGE_SHIFT = 0o4000, 26
_SHM_DEST = 0o1000
# struct shmid64_ds: permissions; size; three times, two PIDs, attachments.
_SHMID_DS = struct.Struct(f"{PERM}Q24xiiQ16x")


class Segment(Struct, frozen=True):
    """What IPC_STAT tells of a segment.

    ``size`` in bytes; ``removed``: IPC_RMID has been called, it ends with its last attachment.
    """

    key: int
    size: int
    owner: tuple[int, int]
    mode: int
    removed: bool
    attachments: int


def stat(identifier: int) -> Segment:
    """shmctl(2), IPC_STAT. Raises OSError: EINVAL (there is none)."""
    key, uid, gid, _, _, mode, _, size, _, _, attachments = _SHMID_DS.unpack(_stat(identifier))
    return Segment(key, size, (uid, gid), mode & 0o777, bool(mode & _SHM_DEST), attachments)


def _name(identifier: int) -> str:
    return f"System V segment {identifier}"


def _stat(identifier: int) -> bytearray:
    return ipc.read_status("shm", _name(identifier), identifier, _SHMID_DS.size)


def create(identifier: int, key: int, size: int, *, reserved: bool, huge_shift: int = 0) -> None:
    """A new segment of ``size`` bytes with a chosen id, for its owner alone.

    ``huge_shift``: of hugetlb pages of this size (its logarithm).

    Raises OSError: EEXIST (the id or the key is taken), EPERM (CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN is missing).
    """
    what = f"making System V segment {identifier} (key {key:#x})"
    ipc.choose_id("shm", identifier, what)
    flags = IPC_CREAT | IPC_EXCL | 0o600 | (0 if reserved else _SHM_NORESERVE)
    flags |= _SHM_HUGETLB | huge_shift << _SHM_HUGE_SHIFT if huge_shift else 0
    got = syscall(what, NUMBERS["shmget"], key, size, flags)
    ipc.created("shm", what, identifier, got)


def set_owner(identifier: int, owner: tuple[int, int], mode: int) -> None:
    """shmctl(2), IPC_SET: user, group and permission bits."""
    ipc.set_owner("shm", _name(identifier), identifier, _stat(identifier), owner, mode)


def remove(identifier: int) -> None:
    """shmctl(2), IPC_RMID: it ends with its last attachment."""
    ipc.remove("shm", _name(identifier), identifier)


def attach(identifier: int) -> int:
    """shmat(2) for reading and writing; the address."""
    return syscall(f"attaching System V segment {identifier}", NUMBERS["shmat"], identifier, 0, 0)


def detach(address: int) -> None:
    """shmdt(2)."""
    syscall(f"detaching the System V segment at {address:#x}", NUMBERS["shmdt"], address)
