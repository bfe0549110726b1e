"""timerfd_create(2): timers that count a time go on with what was left, those for a wall-clock time keep it."""

import os
import struct
import time
from typing import TYPE_CHECKING

from postcopy.kernel import timerfd
from postcopy.kernel.calls import call
from postcopy.open_kinds import TimerDescriptor
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_WALL_CLOCKS = (time.CLOCK_REALTIME, 8)  # 8: CLOCK_REALTIME_ALARM


def rebuild(plan: "Plan", slot: Slot, state: TimerDescriptor) -> None:
    """Add the calls."""
    purpose = f"making a timerfd (descriptor {slot.fd})"
    opened = plan.next_fd()
    batch = plan.batch
    batch.add(call("timerfd_create", state.clock, state.flags & os.O_NONBLOCK), purpose)
    if state.left or state.set_with:
        setting = batch.place(timerfd.pack(state.interval, _value(state)))
        batch.add(call("timerfd_settime", opened, state.set_with, setting, 0), purpose)
    if state.ticks:
        ticks = batch.place(struct.pack("<Q", state.ticks))
        batch.add(call("ioctl", opened, timerfd.TFD_IOC_SET_TICKS, ticks), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def _value(state: TimerDescriptor) -> int:
    """The time to set: clocks other than the wall clock begin at another time on each host."""
    if not state.left or not state.set_with & timerfd.TFD_TIMER_ABSTIME:
        return state.left
    return state.at if state.clock in _WALL_CLOCKS else time.clock_gettime_ns(state.clock) + state.left
