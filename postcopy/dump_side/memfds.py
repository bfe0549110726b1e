"""Descriptors of memfds: where they stand, and the memory behind them."""

from postcopy.dump_side import shared_memory
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.state import Description, OpenMemory


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a memfd's descriptor; None for other kinds."""
    if not shared_memory.is_nameless(opened.stat.st_dev):
        return None
    if shared_memory.kind_of(opened.link) != "memfd":
        raise Refused(f"{opened.link}: memory of this kind cannot be moved by a descriptor")
    number = table.shared.of_memfd(opened.pid, opened.fd, opened.link, opened.stat)
    return Description(memory=OpenMemory(number, opened.flags, opened.position))
