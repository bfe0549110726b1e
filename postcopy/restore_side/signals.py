"""Signal actions and the shared queue of pending signals."""

from postcopy.kernel.calls import call
from postcopy.kernel.executor import Batch
from postcopy.state import Signals

_UNCHANGEABLE = (9, 19)  # SIGKILL, SIGSTOP


def rebuild(state: Signals, inner_pid: int, batch: Batch) -> None:
    """Add the calls; every signal is blocked while they are made, so what is queued stays pending."""
    for number, action in enumerate(state.actions, start=1):
        if number not in _UNCHANGEABLE:
            batch.add(call("rt_sigaction", number, batch.place(action), 0, 8), f"setting the action of signal {number}")
    for siginfo in state.pending:
        number = int.from_bytes(siginfo[:4], "little")
        made = call("rt_sigqueueinfo", inner_pid, number, batch.place(siginfo))
        batch.add(made, f"queueing pending signal {number}")
