"""signalfd(2): the signals that are read from it."""

from postcopy.dump_side.opened import Opened, Table
from postcopy.open_kinds import SignalDescriptor
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a signalfd; None for other kinds."""
    mask = opened.field("sigmask")
    if opened.link != "anon_inode:[signalfd]" or mask is None:
        return None
    return Description(signals=SignalDescriptor(int(mask, 16), opened.flags))
