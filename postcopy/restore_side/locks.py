"""File locks and leases: taken again, if nobody else was faster."""

import fcntl
import struct
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_F_OFD_SETLK, _F_SETLEASE = 37, 1024
_FLOCK = struct.Struct("<hh4xqqi4x")


def rebuild(plan: "Plan") -> None:
    """Add the calls."""
    batch = plan.batch
    for lock in plan.state.locks:
        if (lock.owner or plan.shared.descriptions[lock.description][0]) != plan.pid:
            continue
        fd = plan.place(lock.description, "finding a descriptor")
        purpose = f"taking the lock of descriptor {fd}, which somebody else has"
        if lock.kind == "flock":
            how = fcntl.LOCK_EX if lock.type == fcntl.F_WRLCK else fcntl.LOCK_SH
            batch.add(call("flock", fd, how | fcntl.LOCK_NB), purpose)
        elif lock.kind == "lease":
            batch.add(call("fcntl", fd, _F_SETLEASE, lock.type), purpose)
        else:
            asked = batch.place(_FLOCK.pack(lock.type, 0, lock.start, lock.length, 0))
            command = _F_OFD_SETLK if lock.kind == "ofd" else fcntl.F_SETLK
            batch.add(call("fcntl", fd, command, asked), purpose)
