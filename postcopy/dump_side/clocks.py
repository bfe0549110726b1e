"""The clocks that must not run backwards: CLOCK_MONOTONIC and CLOCK_BOOTTIME as the program reads them."""

import os
import time
from collections.abc import Iterator

from postcopy.dump_side.namespaces import differ
from postcopy.kernel import procfs, time_namespace
from postcopy.state import Clocks


def problems(pid: int, root: int) -> Iterator[str]:
    """What of a process of the tree of ``root`` cannot be moved."""
    own = f"/proc/{pid}/ns/time"
    if differ(own, f"/proc/{pid}/ns/time_for_children"):
        yield "its children will live in another time namespace (unshare), which cannot be moved"
    if differ(own, f"/proc/{root}/ns/time"):
        yield f"it lives in another time namespace than process {root}, which cannot be moved"
    for tid in procfs.tids(pid):
        if differ(f"/proc/{pid}/task/{tid}/ns/time", own):
            yield f"thread {tid} lives in another time namespace than its process, which cannot be moved"


def now(pid: int) -> Clocks:
    """The clocks of process ``pid``."""
    theirs, ours = time_namespace.offsets(procfs.face(pid)), time_namespace.offsets(os.getpid())
    return Clocks(
        monotonic=time.clock_gettime_ns(time.CLOCK_MONOTONIC) + theirs[0] - ours[0],
        boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + theirs[1] - ours[1],
    )
