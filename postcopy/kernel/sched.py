"""sched(7): how the kernel shares the processors out among the processes of a migration."""

import contextlib
import os


def scheduling(policy: int = os.SCHED_OTHER, priority: int = 0, nice: int = 0) -> None:
    """Policy (os.SCHED_*), real-time priority and niceness of the calling process; what it forks begins without.

    What is not allowed (EPERM without CAP_SYS_NICE, ENOSYS, EINVAL) is left as it is: the caller works without it,
    only slower.
    """
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
