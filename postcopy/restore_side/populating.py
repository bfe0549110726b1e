"""Is a thread of the program waiting for pages that the kernel itself wants, in the middle of an mremap(2)?

Memory that is locked and grows by a move is populated before the userfaultfd is told of the move: the kernel faults on
the new pages, while every answer is refused with EAGAIN until an event has been read that is queued only afterwards.
"""

import contextlib
import os

from postcopy.kernel import procfs
from postcopy.kernel.calls import NUMBERS

_MREMAP_FIXED = 2
_WAITS_FOR_A_PAGE = b"handle_userfault"


def populating(address: int) -> bool:
    """Whether ``address`` may be a page that some thread of this host adds to locked memory by mremap(2).

    From what each thread is waiting in (proc_pid_syscall(5), proc_pid_wchan(5)): a thread that only has not got round
    to queueing its event waits in nothing, or for a lock. Takes some 10 us a thread of this host.
    """
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with contextlib.suppress(OSError):
            for tid in procfs.tids(pid):
                if _grows(pid, tid, address):
                    return True
    return False


def _grows(pid: int, tid: int, address: int) -> bool:
    with contextlib.suppress(OSError, ValueError):
        number, *arguments = procfs.read(pid, f"task/{tid}/syscall").split()[:7]
        if number != b"%d" % NUMBERS["mremap"]:
            return False
        _, old_length, new_length, flags, new, _ = (int(each, 16) for each in arguments)
        if new_length <= old_length or procfs.read(pid, f"task/{tid}/wchan") != _WAITS_FOR_A_PAGE:
            return False
        return not flags & _MREMAP_FIXED or new + old_length <= address < new + new_length
    return False
