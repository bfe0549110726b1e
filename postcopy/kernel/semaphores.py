"""System V semaphores: semget(2), semctl(2), semop(2). Errors are OSError."""

import struct
from array import array
from collections.abc import Sequence

from msgspec import Struct

from postcopy.kernel import ipc
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.ipc import IPC_CREAT, IPC_EXCL, IPC_NOWAIT, PERM
from postcopy.kernel.libc import address_of, syscall

MOST_VALUE = 32767  # SEMVMX; and SEMAEM, for what SEM_UNDO keeps
LEAST_ADJUSTMENT = -MOST_VALUE - 1
_SEM_UNDO = 0x1000
_GETPID, _GETALL, _SETALL = 11, 13, 17
# struct semid64_ds: permissions; the times of the last semop(2) and the last change; how many there are.
_SEMID_DS = struct.Struct(f"{PERM}qQqQQ16x")
_OPERATION = struct.Struct("=Hhh")
# What cannot be done at once: with IPC_NOWAIT, it makes nothing of what was to be done with it.
_IMPOSSIBLE = LEAST_ADJUSTMENT


class SemaphoreStatus(Struct, frozen=True):
    """What IPC_STAT tells of a set; ``changed``: when it was used last, or set (s since the epoch)."""

    key: int
    creator: tuple[int, int]
    owner: tuple[int, int]
    mode: int
    count: int
    changed: int


def stat(identifier: int) -> SemaphoreStatus:
    """semctl(2), IPC_STAT. Raises OSError: EINVAL (there is none)."""
    key, uid, gid, creator, group, mode, _, used, _, changed, _, count = _SEMID_DS.unpack(_stat(identifier))
    return SemaphoreStatus(key, (creator, group), (uid, gid), mode & 0o777, count, max(used, changed))


def _stat(identifier: int) -> bytearray:
    return ipc.read_status("sem", name(identifier), identifier, _SEMID_DS.size)


def name(identifier: int) -> str:
    """What errors call it."""
    return f"System V semaphore set {identifier}"


def values(identifier: int, count: int) -> list[int]:
    """semctl(2), GETALL."""
    found = array("H", bytes(2 * count))
    ipc.control("sem", f"reading {name(identifier)}", identifier, _GETALL, address_of(found))
    return found.tolist()


def last_users(identifier: int, count: int) -> list[int]:
    """Of each semaphore the PID of who has changed it last, and may have ended since; 0 for nobody."""
    what = f"looking who uses {name(identifier)}"
    return [ipc.control("sem", what, identifier, _GETPID, number=number) for number in range(count)]


def create(identifier: int, key: int, creator: tuple[int, int], found: Sequence[int]) -> None:
    """A new set with a chosen id and these values, for its creator alone; as of `ipc.become`. Raises OSError: EEXIST
    (the id or the key is taken), ENOSPC."""
    what = f"making {name(identifier)} (key {key:#x})"
    ipc.choose_id("sem", identifier, what)
    ipc.become(creator)
    got = syscall(what, NUMBERS["semget"], key, len(found), IPC_CREAT | IPC_EXCL | 0o600)
    ipc.created("sem", what, identifier, got)
    initial = array("H", found)
    ipc.control("sem", f"setting {name(identifier)}", identifier, _SETALL, address_of(initial))


def set_owner(identifier: int, owner: tuple[int, int], mode: int) -> None:
    """semctl(2), IPC_SET: user, group and permission bits."""
    ipc.set_owner("sem", name(identifier), identifier, _stat(identifier), owner, mode)


def remove(identifier: int) -> None:
    """semctl(2), IPC_RMID."""
    ipc.remove("sem", name(identifier), identifier)


# -- what SEM_UNDO keeps for a process: nothing tells of it but an operation by which it would leave its range ---------


def is_above(number: int, value: int, adjustment: int) -> tuple[bytes, int]:
    """Operations for semop(2), and how many, that are refused with ERANGE where the process's adjustment of a semaphore
    is above ``adjustment`` (0 or more), and otherwise with EAGAIN: none of them is ever done. ``value``: that of the
    semaphore."""
    return _operations(number, (MOST_VALUE - value, 0), (adjustment - MOST_VALUE, _SEM_UNDO))


def is_below(number: int, value: int, adjustment: int) -> tuple[bytes, int]:
    """The same where it is below ``adjustment`` (0 or less)."""
    most = min(adjustment - LEAST_ADJUSTMENT, MOST_VALUE)
    rest = adjustment - LEAST_ADJUSTMENT - most
    return _operations(number, (-value, 0), (most, _SEM_UNDO), (-most, 0), (rest, _SEM_UNDO))


def _operations(number: int, *steps: tuple[int, int]) -> tuple[bytes, int]:
    made = [(by, flags) for by, flags in steps if by] + [(_IMPOSSIBLE, IPC_NOWAIT)]
    return b"".join(_OPERATION.pack(number, by, flags) for by, flags in made), len(made)


def using(number: int, value: int, adjustment: int) -> tuple[bytes, int]:
    """Operations that leave a semaphore at ``value``; the process is the one that has used it last then, and has this
    adjustment, if it has had none."""
    steps = [(-value, 0)] if value else [(1, 0), (-1, 0)]
    while adjustment:
        step = max(min(-adjustment, MOST_VALUE), -MOST_VALUE)
        steps += [(step, _SEM_UNDO), (-step, 0)] if step > 0 else [(-step, 0), (step, _SEM_UNDO)]
        adjustment += step
    steps.append((value, 0))
    made = [(by, flags) for by, flags in steps if by]
    return b"".join(_OPERATION.pack(number, by, flags) for by, flags in made), len(made)
