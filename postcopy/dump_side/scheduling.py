"""How a thread is scheduled: policy and priority, affinity, I/O priority, timer slack."""

import os

from postcopy.kernel import sched_attr
from postcopy.state import Scheduling


def collect(tid: int) -> Scheduling:
    """From outside of the thread, which alone can tell its timer slack. Raises OSError."""
    return Scheduling(
        attributes=sched_attr.getattr(tid),
        nice=os.getpriority(os.PRIO_PROCESS, tid),
        affinity=sorted(os.sched_getaffinity(tid)),
        io_priority=sched_attr.io_priority(tid),
        timer_slack=0,
    )
