"""Signal actions and the shared queue of pending signals."""

import contextlib
import os

from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import NUMBERS, call
from postcopy.kernel.libc import address_of, syscall
from postcopy.state import LateSignal, Signals

_UNCHANGEABLE = (9, 19)  # SIGKILL, SIGSTOP


def rebuild(state: Signals, own_pid: int, batch: Batch) -> None:
    """Add the calls; every signal is blocked while they are made, so what is queued stays pending."""
    for number, action in enumerate(state.actions, start=1):
        # A new process has the default for every signal.
        if number not in _UNCHANGEABLE and any(action):
            batch.add(call("rt_sigaction", number, batch.place(action), 0, 8), f"setting the action of signal {number}")
    for siginfo in state.pending:
        number = int.from_bytes(siginfo[:4], "little")
        made = call("rt_sigqueueinfo", own_pid, number, batch.place(siginfo))
        batch.add(made, f"queueing pending signal {number}")


def send(late: LateSignal, pid: int, tid: int | None) -> None:
    """Send a signal that came last to a process, or to its thread ``tid``; a full queue loses it, as it would have."""
    number = int.from_bytes(late.siginfo[:4], "little")
    siginfo = address_of(late.siginfo)
    with contextlib.suppress(OSError):
        try:
            if tid is None:
                syscall("queueing a signal", NUMBERS["rt_sigqueueinfo"], pid, number, siginfo)
            else:
                syscall("queueing a signal", NUMBERS["rt_tgsigqueueinfo"], pid, tid, number, siginfo)
        except PermissionError:
            # Only its own sender may say that a signal comes from kill(2): it then comes from us.
            if tid is None:
                os.kill(pid, number)
            else:
                syscall("sending a signal", NUMBERS["tgkill"], pid, tid, number)
