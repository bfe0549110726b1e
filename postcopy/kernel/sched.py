"""sched(7): how the kernel shares the processors out among the processes of a migration."""

import contextlib
import os

# What whoever started the command has given it.
_POLICY = os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK
_PRIORITY = os.sched_getparam(0).sched_priority
_NICE = os.getpriority(os.PRIO_PROCESS, 0)


def scheduling(nice: int | None = None) -> None:
    """The niceness of the calling process; None: policy and niceness are as they were given. What it forks begins at 0
    where it is below.

    What is not allowed (EPERM without CAP_SYS_NICE, ENOSYS, EINVAL) is left as it is: the caller works without it,
    only slower.
    """
    policy, priority = (_POLICY, _PRIORITY) if nice is None else (os.SCHED_OTHER, 0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, policy | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    set_niceness(0, _NICE if nice is None else nice if nice < 0 else max(nice, _NICE))


def set_niceness(pid: int, nice: int) -> None:
    """That of a process, 0 for the caller, if it is allowed."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
