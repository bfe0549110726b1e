"""signalfd(2): the signals that are read from it."""

import os
import struct
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.open_kinds import SignalDescriptor
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan


def rebuild(plan: "Plan", slot: Slot, state: SignalDescriptor) -> None:
    """Add the calls."""
    purpose = f"making a signalfd (descriptor {slot.fd})"
    opened = plan.next_fd()
    mask = plan.batch.place(struct.pack("<Q", state.mask))
    plan.batch.add(call("signalfd4", -1, mask, 8, state.flags & os.O_NONBLOCK), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
