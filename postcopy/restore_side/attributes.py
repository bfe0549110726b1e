"""Single values of a process: prctl(2) settings, personality(2), and files of ``/proc/PID``."""

import contextlib
import functools
import os

from postcopy.errors import RestoreError
from postcopy.kernel import procfs
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.kernel.prctl import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    PR_SET_MEMORY_MERGE,
    PR_SET_THP_DISABLE,
)
from postcopy.state import Attributes

_SUID_DUMP_ROOT = 2  # cannot be asked for; the nearest is "not dumpable"


def rebuild(state: Attributes, batch: Batch) -> None:
    """Add the calls that the leader makes, before it loses its privileges."""
    batch.add(call("personality", state.personality), "setting the personality")
    if state.child_subreaper:
        batch.add(call("prctl", PR_SET_CHILD_SUBREAPER, 1), "setting the child-subreaper attribute")


def register(state: Attributes, batch: Batch) -> None:
    """Add the calls for what belongs to the address space, once that is there."""
    for bit in range(state.membarrier.bit_length()):
        if state.membarrier >> bit & 1:
            # Without a purpose: only a kernel that did not tell what is registered can refuse what is not.
            batch.add(call("membarrier", 1 << bit, 0, 0))
    if state.memory_merge:
        batch.add(call("prctl", PR_SET_MEMORY_MERGE, 1, 0, 0, 0), "letting pages of the same content be merged")


def log_in(state: Attributes, batch: Batch, fd: int) -> None:
    """Add the calls that set the login user where it is not ours: only the task itself can. ``fd``: the lowest number
    that is free."""
    with contextlib.suppress(FileNotFoundError):
        if int(procfs.read(os.getpid(), "loginuid")) != state.login_uid:
            purpose = f"setting the login user to {state.login_uid}"
            text = str(state.login_uid).encode()
            batch.add(call("openat", -100, batch.text("/proc/self/loginuid"), os.O_WRONLY), purpose)
            batch.add(call("write", fd, batch.place(text), len(text)), purpose)
            batch.add(call("close", fd), purpose)


def disable_huge_pages(batch: Batch) -> None:
    """Add the call that keeps a page written now from taking its neighbours, which come later, with it."""
    batch.add(call("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0), "disabling transparent huge pages for a while")


def rebuild_last(state: Attributes, batch: Batch) -> None:
    """Add the calls that must come after the credentials, which reset the dumpable attribute, and after arming."""
    batch.add(call("prctl", PR_SET_THP_DISABLE, state.thp_disable, 0, 0, 0), "setting the THP attribute")
    dumpable = 0 if state.dumpable == _SUID_DUMP_ROOT else state.dumpable
    batch.add(call("prctl", PR_SET_DUMPABLE, dumpable), "setting the dumpable attribute")


@functools.cache
def _ours(name: str) -> int | None:
    """What a file of our own ``/proc/PID`` says, which we never change."""
    with contextlib.suppress(FileNotFoundError):
        return int(procfs.read(os.getpid(), name) or b"0", 16 if name == "coredump_filter" else 10)
    return None


def write_files(state: Attributes, pid: int) -> None:
    """Set what only files of ``/proc/PID`` set; as long as we may. A process has them from us."""
    for name, value in (("coredump_filter", f"{state.coredump_filter:#x}"), ("oom_score_adj", state.oom_score_adj)):
        if _ours(name) == int(str(value), 0):
            continue
        try:
            with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/{name}", "w") as stream:
                stream.write(str(value))
        except OSError as error:
            raise RestoreError(f"setting {name} to {value}: {error.strerror}") from None
