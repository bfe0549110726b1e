"""pidfd_open(2): processes and threads of the tree by descriptor."""

import os
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.open_kinds import PidDescriptor
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_PIDFD_THREAD = os.O_EXCL


def rebuild(plan: "Plan", slot: Slot, state: PidDescriptor) -> None:
    """Add the calls."""
    purpose = f"opening process {state.pid} (descriptor {slot.fd})"
    opened = plan.next_fd()
    number = plan.shared.nesting.seen(state.pid, plan.pid)
    plan.batch.add(call("pidfd_open", number, state.flags & (os.O_NONBLOCK | _PIDFD_THREAD)), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
