"""What this host can do: everything a source and a destination need, tried rather than guessed."""

import errno
import os
import platform
import resource
from collections.abc import Callable, Iterator

from msgspec import Struct

from postcopy import capabilities
from postcopy.kernel import cpu, pidfd, procfs, ptrace, userfaultfd
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.nftables import DropTable
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.prctl import PR_SET_MM

_ARCHITECTURES = ("x86_64",)
_PR_SET_MM_MAP_SIZE = 15
_FEATURES = {
    "fork events": userfaultfd.UFFD_FEATURE_EVENT_FORK,
    "remap events": userfaultfd.UFFD_FEATURE_EVENT_REMAP,
    "remove events": userfaultfd.UFFD_FEATURE_EVENT_REMOVE,
    "unmap events": userfaultfd.UFFD_FEATURE_EVENT_UNMAP,
}
_ENOUGH_DESCRIPTORS = 4096


class Finding(Struct, frozen=True):
    """One thing a host needs: ``roles`` (source, destination), whether it is there, and what its lack costs.

    ``vital``: without it the role cannot be played at all.
    """

    name: str
    roles: str
    present: bool
    vital: bool
    cost: str


def host() -> list[Finding]:
    """Everything that matters of this host."""
    return list(_findings())


def _findings() -> Iterator[Finding]:
    both, source, destination = "source, destination", "source", "destination"
    machine = platform.machine()
    yield Finding(f"architecture {machine}", both, machine in _ARCHITECTURES, True, "only x86_64 is supported yet")
    for name, cost in (
        ("CAP_SYS_PTRACE", "processes cannot be traced or read: run it as root"),
        ("CAP_SYS_ADMIN", "PIDs cannot be chosen, mounts and mm fields not set: run it as root"),
    ):
        yield Finding(f"capability {name}", both, not capabilities.missing([name]), True, cost)
    for name, cost in (
        ("CAP_SYS_NICE", "the demand path has no priority; niceness and real-time policies cannot be restored"),
        ("CAP_SYS_RESOURCE", "hard limits above those of restore cannot be restored"),
        ("CAP_KILL", "signals to processes of other users are refused"),
    ):
        yield Finding(f"capability {name}", destination, not capabilities.missing([name]), False, cost)
    yield Finding("ptrace(2) of a child, with rseq", both, _works(_trace), True, "kernel 5.13 or newer is needed")
    yield Finding("pidfd_getfd(2)", both, _works(_getfd), True, "kernel 5.6 or newer is needed")
    yield Finding(
        "PAGEMAP_SCAN", source, _works(_scan), False, "kernel 6.7: without it the stand-still is some 60 ms/GiB longer"
    )
    available = _userfaultfd_features()
    yield Finding("userfaultfd(2)", destination, available is not None, True, "CONFIG_USERFAULTFD is needed")
    for name, bit in _FEATURES.items():
        present = available is not None and bool(available & bit)
        yield Finding(f"userfaultfd {name}", destination, present, True, "kernel 4.11 or newer is needed")
    yield Finding("clone3(2) with set_tid", destination, _works(_clone3), True, "kernel 5.5 or newer is needed")
    yield Finding("PR_SET_MM_MAP", destination, _works(_mm_map), True, "CONFIG_CHECKPOINT_RESTORE is needed")
    yield Finding("a vdso that can be moved", both, _vdso_is_movable(), True, "its mappings are missing or sealed")
    cost = "established TCP connections move only with --network-lock iptables or skip"
    yield Finding("nf_tables with owners", both, _works(_lock_network), False, cost)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    yield Finding(
        f"descriptor limit {most}", destination, most >= _ENOUGH_DESCRIPTORS, False, "raise it: one for each fork"
    )


def _works(attempt: Callable[[], None]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _trace() -> None:
    with cpu.stopped_child() as child:
        ptrace.rseq_configuration(child)


def _getfd() -> None:
    own = os.pidfd_open(os.getpid())
    try:
        os.close(pidfd.getfd(own, own))
    finally:
        os.close(own)


def _scan() -> None:
    pagemap = Pagemap(os.getpid())
    try:
        first = next(procfs.for_each_vma(os.getpid()))
        pagemap.try_scan(first.start, first.end)
    finally:
        pagemap.close()


def _userfaultfd_features() -> int | None:
    try:
        fd = userfaultfd.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return userfaultfd.api(fd, 0)
    except OSError:
        return None
    finally:
        os.close(fd)


def _lock_network() -> None:
    table = DropTable(f"postcopy-check-{os.getpid()}")
    try:
        table.drop([], [])
    finally:
        table.close()


def _clone3() -> None:
    # No arguments at all: EINVAL from a kernel that knows the call, ENOSYS from one that does not.
    try:
        syscall("trying clone3", NUMBERS["clone3"], 0, 0)
    except OSError as error:
        if error.errno == errno.ENOSYS:
            raise


def _mm_map() -> None:
    size = bytearray(4)
    syscall("asking for the size of prctl_mm_map", NUMBERS["prctl"], PR_SET_MM, _PR_SET_MM_MAP_SIZE, address_of(size))


def _vdso_is_movable() -> bool:
    lines = [line for line in procfs.parse_smaps(procfs.read(os.getpid(), "smaps")) if line.name == "[vdso]"]
    return bool(lines) and "sl" not in lines[0].flags
