"""The clocks that must not run backwards: CLOCK_MONOTONIC and CLOCK_BOOTTIME as the program reads them."""

import os
import time
from collections.abc import Iterator

from postcopy.kernel import procfs, time_namespace
from postcopy.state import Clocks


def problems(pid: int) -> Iterator[str]:
    """What cannot be moved."""
    own, for_children = (os.path.join(f"/proc/{pid}/ns", name) for name in ("time", "time_for_children"))
    if os.path.exists(own) and os.readlink(own) != os.readlink(for_children):
        yield "its children will live in another time namespace (unshare), which cannot be moved"
    for tid in procfs.tids(pid):
        thread = f"/proc/{pid}/task/{tid}/ns/time"
        if os.path.exists(thread) and os.readlink(thread) != os.readlink(own):
            yield f"thread {tid} lives in another time namespace than its process, which cannot be moved"


def now(pid: int) -> Clocks:
    """The clocks of process ``pid``."""
    theirs, ours = time_namespace.offsets(pid), time_namespace.offsets(os.getpid())
    return Clocks(
        monotonic=time.clock_gettime_ns(time.CLOCK_MONOTONIC) + theirs[0] - ours[0],
        boottime=time.clock_gettime_ns(time.CLOCK_BOOTTIME) + theirs[1] - ours[1],
    )
