"""Descriptors of memfds, and of mapped files without a name: opened anew from what `shared_memory` has made.

The way leads over a link of ``/proc``, which O_NOFOLLOW (mkstemp(3) opens with it) would refuse.
"""

import os
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.state import OpenMemory, Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_SEEK_SET = 0


def rebuild(plan: "Plan", slot: Slot, memory: OpenMemory) -> None:
    """Add the calls that open ``memory`` at ``slot``."""
    purpose = f"opening a memfd (descriptor {slot.fd})"
    opened = plan.next_fd()
    path = plan.batch.text(str(plan.shared.memory.fds[memory.memory]))
    plan.batch.add(call("openat", plan.lender, path, memory.flags & ~os.O_NOFOLLOW), purpose)
    if memory.position:
        plan.batch.add(call("lseek", opened, memory.position, _SEEK_SET), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
