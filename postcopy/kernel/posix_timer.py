"""POSIX timers (timer_create(2)): ``/proc/PID/timers``, struct sigevent and what their signals look like."""

import re
import struct
from collections.abc import Iterator

from msgspec import Struct

from postcopy.kernel import procfs
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import syscall
from postcopy.kernel.prctl import PR_TIMER_CREATE_RESTORE_IDS, PR_TIMER_CREATE_RESTORE_IDS_GET

SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD, SIGEV_THREAD_ID = 0, 1, 2, 4
SI_TIMER = -2
TIMER_ABSTIME = 1

_SIGEVENT = struct.Struct("<Qiii44x")
_SIGINFO = struct.Struct("<8xi4xi")  # si_code and si_tid, the timer's id
_NOTIFY = {"signal": SIGEV_SIGNAL, "none": SIGEV_NONE, "thread": SIGEV_THREAD}
_ENTRY = re.compile(r"ID: (\d+)\nsignal: (\d+)/([0-9a-f]+)\nnotify: (\w+)/(pid|tid)\.(\d+)\nClockID: (-?\d+)\n")


class TimerEntry(Struct, frozen=True):
    """A timer as ``/proc/PID/timers`` shows it; ``tid`` (as we see it) is 0 where the process is told."""

    number: int
    signal: int
    value: int
    notify: int
    tid: int
    clock: int

    @property
    def measures(self) -> int | None:
        """The PID or TID, as the process sees it, whose CPU time the clock is; 0: its maker's; None: no such clock.

        CPU-time clocks are negative, with the complement of the id above three bits (include/linux/posix-timers.h).
        """
        return ~(self.clock >> 3) if self.clock < 0 and self.clock & 3 != 3 else None

    @property
    def of_a_thread(self) -> bool:
        """Whether a CPU-time clock is that of one thread."""
        return self.clock < 0 and bool(self.clock & 4)

    @property
    def of_a_device(self) -> bool:
        """Whether the clock is that of an open device (clock_gettime(2), "Dynamic clocks")."""
        return self.clock < 0 and self.clock & 7 == 3


def for_each_timer(pid: int) -> Iterator[TimerEntry]:
    """The timers of a process. Raises OSError: ENOENT without CONFIG_CHECKPOINT_RESTORE."""
    for found in _ENTRY.finditer(procfs.read(pid, "timers").decode()):
        number, signal, value, notify, kind, target, clock = found.groups()
        told = _NOTIFY[notify] | (SIGEV_THREAD_ID if kind == "tid" else 0)
        tid = int(target) if kind == "tid" else 0
        yield TimerEntry(int(number), int(signal), int(value, 16), told, tid, int(clock))


def sigevent(value: int, signal: int, notify: int, tid: int) -> bytes:
    """struct sigevent."""
    return _SIGEVENT.pack(value, signal, notify, tid)


def raised_by(siginfo: bytes) -> int | None:
    """The id of the timer that raised a queued signal; None where none did."""
    code, number = _SIGINFO.unpack_from(siginfo)
    return number if code == SI_TIMER else None


def ids_can_be_chosen() -> bool:
    """Whether timer_create(2) can be told the id to give (Linux 6.16)."""
    try:
        get = PR_TIMER_CREATE_RESTORE_IDS_GET
        syscall("PR_TIMER_CREATE_RESTORE_IDS", NUMBERS["prctl"], PR_TIMER_CREATE_RESTORE_IDS, get)
    except OSError:
        return False
    return True
