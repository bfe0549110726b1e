"""timerfd_create(2): timers that count a time go on with what was left, those for a wall-clock time keep it."""

import os
import struct
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from postcopy.kernel import timerfd
from postcopy.kernel.batch import Answers
from postcopy.kernel.calls import call
from postcopy.open_kinds import TimerDescriptor
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_TIMESPEC = struct.Struct("<qq")
_WALL_CLOCKS = (time.CLOCK_REALTIME, 8)  # 8: CLOCK_REALTIME_ALARM


def rebuild(plan: "Plan", slot: Slot, state: TimerDescriptor) -> None:
    """Add the calls that make the timer, which is not set yet."""
    purpose = f"making a timerfd (descriptor {slot.fd})"
    opened = plan.next_fd()
    plan.batch.add(call("timerfd_create", state.clock, state.flags & os.O_NONBLOCK), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


class Clocks(Struct):
    """Where the answers lie of what the clocks say; the process may have its own (time_namespaces(7))."""

    rooms: dict[int, int] = {}

    @classmethod
    def ask(cls, plan: "Plan") -> "Clocks":
        """Add the calls that ask for the time of the clocks by which timers are set."""
        clocks = {state.clock for _, state in _mine(plan) if state.set_with & timerfd.TFD_TIMER_ABSTIME and state.left}
        rooms = {clock: plan.batch.room(_TIMESPEC.size) for clock in sorted(clocks - set(_WALL_CLOCKS))}
        for clock, room in rooms.items():
            plan.batch.add(call("clock_gettime", clock, room), f"asking for the time of clock {clock}")
        return cls(rooms)

    def answered(self, answers: Answers) -> dict[int, int]:
        """The time of each clock (ns)."""
        found = {}
        for clock, room in self.rooms.items():
            seconds, nanoseconds = _TIMESPEC.unpack(answers.read(room, _TIMESPEC.size))
            found[clock] = seconds * 1_000_000_000 + nanoseconds
        return found


def connect(plan: "Plan", now: dict[int, int]) -> None:
    """Add the calls that set the timers; ``now``: the time of the clocks (ns)."""
    batch = plan.batch
    for fd, state in _mine(plan):
        purpose = f"setting a timerfd (descriptor {fd})"
        if state.left or state.set_with:
            value = state.left
            if state.left and state.set_with & timerfd.TFD_TIMER_ABSTIME:
                value = state.at if state.clock in _WALL_CLOCKS else now[state.clock] + state.left
            setting = batch.place(timerfd.pack(state.interval, value))
            batch.add(call("timerfd_settime", fd, state.set_with, setting, 0), purpose)
        if state.ticks:
            ticks = batch.place(struct.pack("<Q", state.ticks))
            batch.add(call("ioctl", fd, timerfd.TFD_IOC_SET_TICKS, ticks), purpose)


def _mine(plan: "Plan") -> Iterator[tuple[int, TimerDescriptor]]:
    """The timers that this process makes, with their descriptors."""
    for number, description in enumerate(plan.state.descriptions):
        if description.timer is not None and plan.shared.descriptions[number][0] == plan.pid:
            yield plan.shared.descriptions[number][1], description.timer
