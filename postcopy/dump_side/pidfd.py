"""pidfd_open(2): a process, or a thread, by descriptor; also one that has ended."""

import os

from postcopy.dump_side.opened import Opened, Refused, Table, common, seen
from postcopy.kernel import pidfd
from postcopy.open_kinds import EndedProcess, PidDescriptor
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a pidfd; None for other kinds."""
    pid = opened.field("Pid")
    if pid is None:
        return None
    number = int(pid)
    if number < 0:
        return _ended(opened)
    holder = table.holder_of(number)
    if holder is None:
        raise Refused(f"{opened.link}: it stands for process {number}, which is not moved along")
    if not seen(table, holder, number):
        raise Refused(f"{opened.link}: it stands for a process outside of its PID namespace, which cannot be moved yet")
    return Description(process=PidDescriptor(common(table, holder, number), opened.flags))


def _ended(opened: Opened) -> Description:
    """Of a process that is gone, the kernel keeps how it has ended, and nothing else can be known of it."""
    with opened.duplicate() as own:
        status = pidfd.exit_status(own) or 0
    if os.WCOREDUMP(status):
        raise Refused(f"{opened.link}: it stands for a process that has left a core dump, which cannot be moved yet")
    return Description(ended=EndedProcess(opened.stat.st_ino, status, opened.flags))
