"""Signal-driven I/O: whom a description tells, by which signal, and whether it does (fcntl(2), F_SETOWN, O_ASYNC)."""

import fcntl
import os
import stat
import struct

from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table, common, seen
from postcopy.kernel.socket_look import F_GETOWN_EX
from postcopy.open_kinds import Delivery

_F_OWNER_PGRP = 2
_SILENT = (stat.S_IFREG, stat.S_IFDIR)  # they never tell anybody, but for leases


def collect(table: Table, opened: Opened, description: int) -> Delivery | None:
    """What is not the default; None where all of it is. Raises Refused for an owner that is not moved along."""
    if opened.flags & O_PATH or (opened.mode in _SILENT and not opened.asynchronous):
        return None
    if opened.shown is not None:
        signal, kind, owner = opened.shown.signal, opened.shown.owner_kind, opened.shown.owner
    else:
        with opened.duplicate() as own:
            signal = fcntl.fcntl(own, fcntl.F_GETSIG)
            kind, owner = struct.unpack("<ii", fcntl.fcntl(own, F_GETOWN_EX, bytes(8)))
    if not (owner or signal or opened.asynchronous):
        return None
    return Delivery(description, kind, _owner(table, opened, kind, owner), signal, opened.asynchronous, opened.flags)


def _owner(table: Table, opened: Opened, kind: int, owner: int) -> int:
    """The owner as the tree numbers it."""
    if not owner:
        return 0
    if kind == _F_OWNER_PGRP:
        # A group has the number of its leader, which must be there to make it.
        holder = owner if owner in table.pids and os.getpgid(owner) == owner else None
    else:
        holder = table.holder_of(owner)
    if holder is None:
        raise Refused(f"{opened.link}: its signals go to {owner} (F_SETOWN), which is not moved along")
    if not seen(table, holder, owner):
        raise Refused(f"{opened.link}: its signals go to a process outside of its PID namespace, which cannot be moved")
    return common(table, holder, owner)
