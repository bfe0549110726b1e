"""eventfd(2): the counter, and how it is read."""

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.open_kinds import EventCounter
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of an eventfd; None for other kinds."""
    if opened.link != "anon_inode:[eventfd]":
        return None
    count, semaphore = opened.field("eventfd-count"), opened.field("eventfd-semaphore")
    if count is None or semaphore is None:
        raise Refused(f"{opened.link}: this kernel does not tell whether it is a semaphore (Linux 6.5 does)")
    return Description(event_counter=EventCounter(int(count, 16), semaphore == "1", opened.flags))
