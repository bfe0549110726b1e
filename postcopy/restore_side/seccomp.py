"""seccomp(2): strict mode and filters, suspended (ptrace(2)) until the thread is let go.

The filters come before the credentials: to add one takes CAP_SYS_ADMIN, or no_new_privs, which may never have been set.
"""

import struct
from itertools import takewhile

from postcopy.kernel.batch import RECORD_SIZE, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.prctl import PR_SET_SECCOMP
from postcopy.state import SeccompFilter, Thread

_MODE_STRICT, _MODE_FILTER = 1, 2
_SET_MODE_FILTER = 1
_FLAG_TSYNC = 1
_ROOM = 2 * RECORD_SIZE


def room(state: Thread) -> int:
    """How many bytes of a batch the filters of a thread take at most."""
    return sum(_ROOM + len(each.program) for each in state.seccomp.filters) + _ROOM


def is_confined(threads: list[Thread]) -> bool:
    """Whether any thread is."""
    return any(thread.seccomp.mode for thread in threads)


def common(threads: list[Thread]) -> int:
    """How many filters, the oldest, all threads have in common.

    They are given to all by one thread (SECCOMP_FILTER_FLAG_TSYNC), and so are the same to the kernel: only then can
    the program synchronize its threads again.
    """
    chains = [thread.seccomp.filters for thread in threads]
    return len(list(takewhile(lambda row: all(each == row[0] for each in row), zip(*chains, strict=False))))


def rebuild_common(filters: list[SeccompFilter], batch: Batch) -> None:
    """Add the calls that give all threads ``filters``; each answers 0, or the TID of a thread that refused."""
    for each in filters:
        _add(each, _FLAG_TSYNC, batch)


def rebuild_own(state: Thread, after: int, batch: Batch) -> None:
    """Add the calls for what a thread has beyond the first ``after`` filters."""
    if state.seccomp.mode == _MODE_STRICT:
        batch.add(call("prctl", PR_SET_SECCOMP, _MODE_STRICT, 0, 0, 0), "entering seccomp strict mode")
    for each in state.seccomp.filters[after:]:
        _add(each, 0, batch)


def _add(each: SeccompFilter, flags: int, batch: Batch) -> None:
    program = struct.pack("<HxxxxxxQ", len(each.program) // 8, batch.place(each.program))
    made = call("seccomp", _SET_MODE_FILTER, each.flags | flags, batch.place(program))
    batch.add(made, "adding a seccomp filter")
