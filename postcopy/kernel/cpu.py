"""What this CPU and kernel can do: the features a program may have found and come to rely on."""

import os
import struct

from postcopy.kernel import ptrace
from postcopy.kernel.libc import refused


def features() -> frozenset[str]:
    """The flags of ``/proc/cpuinfo`` (those of the first CPU)."""
    with open("/proc/cpuinfo") as stream:
        for line in stream:
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def xsave_size() -> int:
    """The size of the XSAVE area in bytes, from a child stopped for just this."""
    child = os.fork()
    if not child:
        try:
            os.kill(os.getpid(), 19)
        finally:
            os._exit(0)
    try:
        ptrace.seize(child, 0)
        ptrace.interrupt(child)
        if ptrace.wait(child).ended is not None:
            raise refused("looking at the XSAVE area of a child", 3)
        return len(ptrace.get_xstate(child))
    finally:
        os.kill(child, 9)
        os.waitpid(child, ptrace.WALL)


def xstate_features(area: bytes) -> int:
    """XCR0 as the kernel leaves it in the software-reserved bytes of an XSAVE area."""
    found: int = struct.unpack_from("<Q", area, 464)[0]
    return found
