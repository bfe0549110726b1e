"""Interval timers (setitimer(2)): they go on with what was left of them."""

from postcopy.kernel.calls import call
from postcopy.kernel.executor import Batch
from postcopy.state import Timers


def rebuild(state: Timers, batch: Batch) -> None:
    """Add the calls."""
    for which, interval in enumerate(state.intervals):
        if any(interval):
            batch.add(call("setitimer", which, batch.place(interval), 0), f"setting interval timer {which}")
