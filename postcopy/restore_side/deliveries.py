"""Signal-driven I/O: whom a description tells, by which signal, and whether it does (fcntl(2))."""

import struct
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_F_GETFL, _F_SETFL, _F_SETSIG, _F_SETOWN_EX = 3, 4, 10, 15
_FASYNC = 0o20000


def rebuild(plan: "Plan") -> None:
    """Add the calls."""
    batch = plan.batch
    for state in plan.state.deliveries:
        if plan.shared.descriptions[state.description][0] != plan.pid:
            continue
        fd = plan.place(state.description, "finding a descriptor")
        purpose = f"setting whom descriptor {fd} signals"
        if state.owner:
            owner = batch.place(struct.pack("<ii", state.kind, plan.shared.nesting.seen(state.owner, plan.pid)))
            batch.add(call("fcntl", fd, _F_SETOWN_EX, owner), purpose)
        if state.signal:
            batch.add(call("fcntl", fd, _F_SETSIG, state.signal), purpose)
        if state.asynchronous:
            batch.add(call("fcntl", fd, _F_SETFL, state.flags | _FASYNC), purpose)
