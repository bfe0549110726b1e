"""eventfd(2): the counter."""

import os
import struct
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.open_kinds import EventCounter
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_EFD_SEMAPHORE = 1


def rebuild(plan: "Plan", slot: Slot, state: EventCounter) -> None:
    """Add the calls."""
    purpose = f"making an eventfd (descriptor {slot.fd})"
    opened = plan.next_fd()
    flags = (_EFD_SEMAPHORE if state.semaphore else 0) | state.flags & os.O_NONBLOCK
    plan.batch.add(call("eventfd2", 0, flags), purpose)
    if state.count:
        # By writing: eventfd2 takes 32 bits.
        content = struct.pack("<Q", state.count)
        plan.batch.add(call("write", opened, plan.batch.place(content), len(content)), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
