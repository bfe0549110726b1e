"""How seccomp(2) confines each thread. Its filters can be read only from a stopped thread (ptrace(2))."""

import contextlib
import os
import struct
from collections.abc import Iterator

from postcopy.dump_side.freeze import FrozenThread
from postcopy.kernel import procfs, ptrace
from postcopy.state import Seccomp, SeccompFilter

_INSTRUCTION = struct.Struct("<HBBI")
_RETURN_CONSTANT = 0x06  # BPF_RET | BPF_K
_ACTION, _USER_NOTIF = 0xFFFF_0000, 0x7FC0_0000


def problems(pid: int) -> Iterator[str]:
    """What would keep us from reading and suspending the filters of a running process."""
    confined = []
    for tid in procfs.tids(pid):
        # A thread may end while we look.
        with contextlib.suppress(OSError):
            confined.append(procfs.status(pid, tid).get("Seccomp", "0") != "0")
    if not any(confined):
        return
    if procfs.status(os.getpid()).get("Seccomp", "0") != "0":
        yield "it is confined by seccomp, and so is this dump, which therefore cannot read its filters"
    if not os.path.exists("/proc/self/timers"):
        yield "it is confined by seccomp; to move it, the kernel must be built with CONFIG_CHECKPOINT_RESTORE"


def problems_of_frozen(threads: list[FrozenThread]) -> Iterator[str]:
    """What of the filters of stopped threads cannot be moved."""
    for thread in threads:
        for each in collect(thread.tid, thread.status).filters:
            if any(_notifies(*found) for found in _INSTRUCTION.iter_unpack(each.program)):
                yield (
                    f"thread {thread.tid} has a seccomp filter that asks a supervisor (SECCOMP_RET_USER_NOTIF), "
                    "which cannot be moved"
                )
                break


def _notifies(code: int, jump_true: int, jump_false: int, constant: int) -> bool:
    return code == _RETURN_CONSTANT and constant & _ACTION == _USER_NOTIF


def collect(tid: int, status: dict[str, str]) -> Seccomp:
    """The mode and filters of a stopped thread, whose ``status`` is given."""
    mode = int(status.get("Seccomp", "0"))
    filters = ptrace.seccomp_filters(tid) if mode == 2 else []
    return Seccomp(mode, [SeccompFilter(program, flags) for program, flags in filters])
