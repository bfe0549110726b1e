"""sched_getattr(2) and ioprio_get(2)."""

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall

SCHED_ATTR_SIZE = 56
_IOPRIO_WHO_PROCESS = 1


def getattr(tid: int) -> bytes:
    """struct sched_attr of a thread, as the kernel fills it."""
    buffer = bytearray(SCHED_ATTR_SIZE)
    syscall(f"reading the scheduling of task {tid}", NUMBERS["sched_getattr"], tid, address_of(buffer), len(buffer), 0)
    return bytes(buffer)


def io_priority(tid: int) -> int:
    """The I/O priority of a thread (class and level as ioprio_set(2) takes them)."""
    return syscall(f"reading the I/O priority of task {tid}", NUMBERS["ioprio_get"], _IOPRIO_WHO_PROCESS, tid)


def setattr(tid: int, attributes: bytes) -> None:
    """Set struct sched_attr of a thread. Raises OSError: EPERM, EINVAL, EBUSY (no bandwidth left)."""
    what = f"setting the scheduling of task {tid}"
    syscall(what, NUMBERS["sched_setattr"], tid, address_of(attributes), 0)


def set_io_priority(tid: int, priority: int) -> None:
    """Set the I/O priority of a thread."""
    syscall(f"setting the I/O priority of task {tid}", NUMBERS["ioprio_set"], _IOPRIO_WHO_PROCESS, tid, priority)
