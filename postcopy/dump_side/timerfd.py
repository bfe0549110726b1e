"""timerfd_create(2): how the timer is set, what is left of it, and expirations that nobody has read."""

import time

from postcopy.dump_side.opened import Opened, Table
from postcopy.kernel import procfs, timerfd
from postcopy.open_kinds import TimerDescriptor
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a timerfd; None for other kinds."""
    if opened.link != "anon_inode:[timerfd]":
        return None
    with opened.duplicate() as own:
        interval, left = timerfd.times(own)
    # Only now: asking for the time has counted what was missed.
    info = procfs.fdinfo(opened.pid, opened.fd)
    clock = int(info["clockid"])
    state = TimerDescriptor(
        clock=clock,
        set_with=int(info["settime flags"], 8),
        left=left,
        at=time.clock_gettime_ns(clock) + left if left else 0,
        interval=interval,
        ticks=int(info["ticks"]),
        flags=opened.flags,
    )
    return Description(timer=state)
