"""Pipes and FIFOs with both ends inside the tree: made anew, filled with what was in them."""

import os
from itertools import accumulate
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.state import Pipe, PipeEnd, Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_AT_FDCWD = -100
_F_SETPIPE_SZ = 1031
_O_LARGEFILE = 0o100000


def _parked(plan: "Plan", number: int) -> tuple[int, int]:
    """The parked numbers of a read and a write end of a pipe; opened anew, any end gives any other."""
    holder, fd = plan.shared.pipes[number]
    if holder == plan.pid:
        return _make(plan, plan.state.pipes[number])
    purpose = f"taking an end of a pipe from process {holder}"
    one = plan.park(plan.borrow(holder, fd, purpose), purpose)
    plan.taken.add(one)
    return one, one


def _make(plan: "Plan", pipe: Pipe) -> tuple[int, int]:
    """Add the calls that make the pipe; the parked numbers of its read and write end."""
    purpose = f"opening FIFO {pipe.path}" if pipe.path else "making a pipe"
    batch = plan.batch
    if pipe.path:
        opened = plan.next_fd()
        # Opened for both, a FIFO waits for nobody; only for reading, it is told of no writer that never was.
        access = os.O_RDONLY if pipe.untouched else os.O_RDWR
        batch.add(call("openat", _AT_FDCWD, batch.text(pipe.path), access | os.O_NONBLOCK), purpose)
        one = plan.park(opened, purpose)
        read_end, write_end = one, one
    else:
        read_end, write_end = plan.next_fd(), plan.next_fd()
        batch.add(call("pipe2", batch.room(8), 0), purpose)
        read_end, write_end = plan.park(read_end, purpose), plan.park(write_end, purpose)
    batch.add(call("fcntl", write_end, _F_SETPIPE_SZ, pipe.capacity), f"setting a pipe's size to {pipe.capacity}")
    if pipe.content:
        content = batch.place(pipe.content)
        if pipe.packets:
            plan.set_flags(write_end, os.O_DIRECT | os.O_NONBLOCK, "switching a pipe to packets")
        lengths = pipe.packets or [len(pipe.content)]
        for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
            batch.add(call("write", write_end, content + start, length), "filling a pipe")
    return read_end, write_end


def open_end(plan: "Plan", slot: Slot, end: PipeEnd) -> None:
    """Add the calls that give ``slot`` an end of a parked pipe, as an open file description of its own."""
    purpose = f"opening an end of a pipe (descriptor {slot.fd})"
    if end.pipe not in plan.pipes:
        plan.pipes[end.pipe] = _parked(plan, end.pipe)
    read_end, write_end = plan.pipes[end.pipe]
    source = read_end if end.flags & os.O_ACCMODE == os.O_RDONLY else write_end
    if not end.flags & _O_LARGEFILE and source not in plan.taken:
        # open(2) would set this flag, and F_GETFL shows it.
        plan.taken.add(source)
        plan.duplicate(source, slot.fd, slot.close_on_exec, purpose)
        plan.set_flags(slot.fd, end.flags, purpose)
        return
    opened = plan.next_fd()
    path = plan.batch.text(f"/proc/self/fd/{source}")
    # The reading end must not wait for a writer. O_DIRECT is not for open(2), although F_GETFL tells it.
    waits = bool(plan.state.pipes[end.pipe].path) and not end.flags & os.O_NONBLOCK
    for_a_moment = os.O_NONBLOCK if waits else 0
    # Nor O_NOFOLLOW: that path is a link.
    flags = end.flags & ~(os.O_DIRECT | os.O_NOFOLLOW) | for_a_moment
    plan.batch.add(call("openat", _AT_FDCWD, path, flags), purpose)
    if waits or end.flags & os.O_DIRECT:
        plan.set_flags(opened, end.flags, purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
