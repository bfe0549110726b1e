"""What this CPU and kernel can do: the features a program may have found and come to rely on."""

import contextlib
import errno
import os
import signal
from collections.abc import Iterator

from postcopy.kernel import ptrace
from postcopy.kernel.libc import refused


def features() -> frozenset[str]:
    """The flags of ``/proc/cpuinfo`` (those of the first CPU)."""
    with open("/proc/cpuinfo") as stream:
        for line in stream:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


@contextlib.contextmanager
def stopped_child() -> Iterator[int]:
    """A child of ours that has stopped under our ptrace, to look at; its PID. It ends with the scope."""
    child = os.fork()
    if not child:
        try:
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    try:
        ptrace.seize(child, 0)
        ptrace.interrupt(child)
        if ptrace.wait(child).ended is not None:
            raise refused("stopping a child", errno.ESRCH)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, ptrace.WALL)


def xsave_size() -> int:
    """The size of the XSAVE area in bytes."""
    with stopped_child() as child:
        return len(ptrace.get_xstate(child))
