"""How a thread is scheduled: set from outside, but for the timer slack."""

import os

from postcopy.errors import RestoreError
from postcopy.kernel import sched_attr
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.kernel.prctl import PR_SET_TIMERSLACK
from postcopy.state import Scheduling


def rebuild(state: Scheduling, batch: Batch) -> None:
    """Add the calls that the thread makes itself."""
    batch.add(call("prctl", PR_SET_TIMERSLACK, state.timer_slack), "setting the timer slack")


def apply(state: Scheduling, tid: int) -> None:
    """Set the rest from outside; an affinity to CPUs that this host lacks is left open."""
    try:
        if os.getpriority(os.PRIO_PROCESS, tid) != state.nice:
            os.setpriority(os.PRIO_PROCESS, tid, state.nice)
        if sched_attr.getattr(tid) != state.attributes:
            sched_attr.setattr(tid, state.attributes)
        if sched_attr.io_priority(tid) != state.io_priority:
            sched_attr.set_io_priority(tid, state.io_priority)
        here = os.sched_getaffinity(tid)
        wanted = set(state.affinity) & here
        if wanted and wanted != here:
            os.sched_setaffinity(tid, wanted)
    except OSError as error:
        raise RestoreError(f"setting the scheduling of thread {tid}: {error.strerror}") from None
