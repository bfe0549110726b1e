"""pidfd_open(2): a process, or a thread, by descriptor."""

from postcopy.dump_side.opened import Opened, Refused, Table, common, seen
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
    holder = table.holder_of(number)
    if holder is None:
        raise Refused(f"{opened.link}: it stands for process {number}, which is not moved along")
    if not seen(table, holder, number):
        raise Refused(f"{opened.link}: it stands for a process outside of its PID namespace, which cannot be moved yet")
    return Description(process=PidDescriptor(common(table, holder, number), opened.flags))
