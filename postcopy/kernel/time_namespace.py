"""Time namespaces (time_namespaces(7)): CLOCK_MONOTONIC and CLOCK_BOOTTIME with offsets, in nanoseconds."""

import os

from postcopy.kernel import procfs
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import refused, syscall

CLONE_NEWTIME = 0x80


def offsets(pid: int) -> tuple[int, int]:
    """What the two clocks of a process's namespace are ahead of the first namespace's; 0 where there are none."""
    if not os.path.exists(f"/proc/{pid}/timens_offsets"):
        return 0, 0
    found = {}
    for line in procfs.read(pid, "timens_offsets").decode().splitlines():
        clock, seconds, nanoseconds = line.split()
        found[clock] = int(seconds) * 1_000_000_000 + int(nanoseconds)
    return found["monotonic"], found["boottime"]


class TimeNamespace:
    """A new time namespace, for the children that are born within the scope. Its maker has one thread."""

    def __init__(self, monotonic: int, boottime: int) -> None:
        """The offsets to the first namespace."""
        self._offsets = {"monotonic": monotonic, "boottime": boottime}

    def __enter__(self) -> None:
        """Raises OSError: EINVAL without CONFIG_TIME_NS, ERANGE where a clock would be negative."""
        self._own = os.open("/proc/self/ns/time", os.O_RDONLY | os.O_CLOEXEC)
        syscall("making a time namespace", NUMBERS["unshare"], CLONE_NEWTIME)
        lines = [f"{clock} {each // 1_000_000_000} {each % 1_000_000_000}\n" for clock, each in self._offsets.items()]
        try:
            with open("/proc/self/timens_offsets", "w") as stream:
                stream.write("".join(lines))
        except OSError as error:
            self.__exit__()
            raise refused(f"setting the clocks of a time namespace ({self._offsets})", error.errno) from None

    def __exit__(self, *_: object) -> None:
        """Our next children are born in our own namespace again."""
        syscall("leaving a time namespace", NUMBERS["setns"], self._own, CLONE_NEWTIME)
        os.close(self._own)
