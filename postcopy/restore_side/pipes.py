"""Pipes with both ends inside the tree: made anew, filled with what was in them."""

import os
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.state import Pipe, PipeEnd, Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_AT_FDCWD = -100
_F_SETFL, _F_SETPIPE_SZ = 4, 1031


def rebuild(plan: "Plan", slot: Slot, end: PipeEnd) -> None:
    """Add the calls that give ``slot`` an end of a pipe, as an open file description of its own."""
    if end.pipe not in plan.parked_pipes:
        plan.parked_pipes[end.pipe] = _parked(plan, end.pipe)
    parked = plan.parked_pipes[end.pipe]
    purpose = f"opening an end of a pipe (descriptor {slot.fd})"
    source = parked[0] if end.flags & os.O_ACCMODE == os.O_RDONLY else parked[1]
    opened = plan.next_fd()
    path = plan.batch.text(f"/proc/self/fd/{source}")
    plan.batch.add(call("openat", _AT_FDCWD, path, end.flags), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def _parked(plan: "Plan", number: int) -> tuple[int, int]:
    """The parked numbers of a read and a write end of a pipe; opened anew, any end gives any other."""
    holder, fd = plan.shared.pipes[number]
    if holder == plan.pid:
        return _make(plan, plan.shared.descriptors.pipes[number])
    purpose = f"taking an end of a pipe from process {holder}"
    opened, parked = plan.borrow(holder, fd, purpose), plan.parking()
    _park(plan, opened, parked, purpose)
    return parked, parked


def _make(plan: "Plan", pipe: Pipe) -> tuple[int, int]:
    """Add the calls that make the pipe."""
    purpose = "making a pipe"
    read_end, write_end = plan.next_fd(), plan.next_fd()
    parked = plan.parking(), plan.parking()
    batch = plan.batch
    batch.add(call("pipe2", batch.room(8), 0), purpose)
    for opened, place in zip((read_end, write_end), parked, strict=True):
        _park(plan, opened, place, purpose)
    batch.add(call("fcntl", parked[1], _F_SETPIPE_SZ, pipe.capacity), f"setting a pipe's size to {pipe.capacity}")
    if pipe.content:
        batch.add(call("write", parked[1], batch.place(pipe.content), len(pipe.content)), "filling a pipe")
    return parked


def _park(plan: "Plan", opened: int, parked: int, purpose: str) -> None:
    plan.batch.add(call("dup3", opened, parked, os.O_CLOEXEC), purpose)
    plan.batch.add(call("close", opened), purpose)
    plan.release(opened)
