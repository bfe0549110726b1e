"""pidfd_open(2): a process, or a thread, by descriptor."""

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import procfs
from postcopy.open_kinds import PidDescriptor
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a pidfd; None for other kinds."""
    pid = opened.field("Pid")
    if pid is None:
        return None
    number = int(pid)
    if number < 0:
        raise Refused(f"{opened.link}: it stands for a process that has ended, which cannot be moved yet")
    if number not in procfs.tids(table.pid):
        raise Refused(f"{opened.link}: it stands for process {number}, which is not moved along")
    inner = int(procfs.status(table.pid, number)["NSpid"].split()[-1])
    return Description(process=PidDescriptor(inner, opened.flags))
