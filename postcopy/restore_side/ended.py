"""Processes that have ended, for pidfds: of each, one that ends the same way at once, and is waited for."""

import contextlib
import os
import resource
import signal
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from postcopy.deadline import uninterrupted
from postcopy.errors import RestoreError
from postcopy.kernel.calls import NUMBERS, call
from postcopy.kernel.clone3 import CLONE_NEWPID
from postcopy.kernel.libc import syscall
from postcopy.kernel.prctl import PR_SET_DUMPABLE
from postcopy.open_kinds import EndedProcess
from postcopy.state import Description, Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_PIDFD_THREAD = os.O_EXCL


class EndedProcesses:
    """Those of a tree, made when the first is asked for; each pidfd is ours until the program has taken it."""

    def __init__(self, descriptions: Sequence[Description]) -> None:
        self._states = {number: one.ended for number, one in enumerate(descriptions) if one.ended is not None}
        self._made: dict[int, int] = {}
        self._own = -1

    def pidfd(self, description: int, holder: int) -> tuple[int, int]:
        """A pidfd of ourselves, and which of our descriptors is the one wanted; ``holder``: a pidfd of the process that
        is to have it, whose PID namespace must know of the one that has ended. Raises RestoreError, OSError.
        """
        if self._own < 0:
            self._own = os.pidfd_open(os.getpid())
        if description not in self._made:
            state = self._states[description]
            alike = [number for number, each in self._states.items() if each.identity == state.identity]
            self._make(state.status, alike, holder)
        return self._own, self._made[description]

    def _make(self, status: int, descriptions: Sequence[int], holder: int) -> None:
        # An exception out of a signal handler must not lead the new process back into our work.
        with uninterrupted():
            _bear_children_with(holder)
            try:
                pid = os.fork()
                if not pid:
                    _end(status)
            finally:
                _bear_children_with(self._own)
            try:
                for number in descriptions:
                    flags = self._states[number].flags & (os.O_NONBLOCK | _PIDFD_THREAD)
                    self._made[number] = os.pidfd_open(pid, flags)
            finally:
                _, found = os.waitpid(pid, 0)
        if found != status:
            raise RestoreError(f"a process that was to end with wait status {status:#x} has ended with {found:#x}")

    def close(self) -> None:
        """Let go of them: the program has its own."""
        for fd in (*self._made.values(), self._own):
            if fd >= 0:
                os.close(fd)
        self._made, self._own = {}, -1


def _bear_children_with(process: int) -> None:
    """Have our next child born in the PID namespace of a process, a pidfd."""
    syscall("entering the PID namespace of a process", NUMBERS["setns"], process, CLONE_NEWPID)


def rebuild(plan: "Plan", slot: Slot, _: EndedProcess) -> None:
    """Add the calls: ours is taken over, since nobody could open it by a number."""
    purpose = f"taking over a process that has ended (descriptor {slot.fd})"
    owner, fd = plan.shared.ended.pidfd(slot.description, plan.shared.newborns[plan.pid].pidfd)
    # We may be outside of its PID namespace, but pidfds can be opened anew (pidfs, Linux 6.9).
    opened = plan.next_fd()
    plan.batch.add(call("openat", plan.lender, plan.batch.text(str(owner)), os.O_RDWR), purpose)
    place = plan.park(opened, purpose)
    opened = plan.next_fd()
    plan.batch.add(call("pidfd_getfd", place, fd, 0), purpose)
    plan.unpark(place)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)


def _end(status: int) -> NoReturn:
    with contextlib.suppress(BaseException):
        if number := status & 0x7F:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            syscall("forbidding core dumps", NUMBERS["prctl"], PR_SET_DUMPABLE, 0)
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, set())
            os.kill(os.getpid(), number)
    os._exit(status >> 8)
