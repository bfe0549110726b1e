"""Single values of a process: prctl(2) settings, personality(2), and files of ``/proc/PID``."""

import contextlib

from postcopy.errors import RestoreError
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Batch
from postcopy.kernel.prctl import PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, PR_SET_THP_DISABLE
from postcopy.state import Attributes

_SUID_DUMP_ROOT = 2  # cannot be asked for; the nearest is "not dumpable"


def rebuild(state: Attributes, batch: Batch) -> None:
    """Add the calls that the leader makes, before it loses its privileges."""
    batch.add(call("personality", state.personality), "setting the personality")
    if state.child_subreaper:
        batch.add(call("prctl", PR_SET_CHILD_SUBREAPER, 1), "setting the child-subreaper attribute")


def disable_huge_pages(batch: Batch) -> None:
    """Add the call that keeps a page written now from taking its neighbours, which come later, with it."""
    batch.add(call("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0), "disabling transparent huge pages for a while")


def rebuild_last(state: Attributes, batch: Batch) -> None:
    """Add the calls that must come after the credentials, which reset the dumpable attribute, and after arming."""
    batch.add(call("prctl", PR_SET_THP_DISABLE, state.thp_disable, 0, 0, 0), "setting the THP attribute")
    dumpable = 0 if state.dumpable == _SUID_DUMP_ROOT else state.dumpable
    batch.add(call("prctl", PR_SET_DUMPABLE, dumpable), "setting the dumpable attribute")


def write_files(state: Attributes, pid: int) -> None:
    """Set what only files of ``/proc/PID`` set; as long as we may."""
    for name, value in (("coredump_filter", f"{state.coredump_filter:#x}"), ("oom_score_adj", state.oom_score_adj)):
        try:
            with contextlib.suppress(FileNotFoundError), open(f"/proc/{pid}/{name}", "r+") as stream:
                current = stream.read().strip()
                if int(current or "0", 16 if name == "coredump_filter" else 10) != int(str(value), 0):
                    stream.seek(0)
                    stream.write(str(value))
        except OSError as error:
            raise RestoreError(f"setting {name} to {value}: {error.strerror}") from None
