"""Interval timers (setitimer(2)). POSIX timers are refused by the survey."""

import struct
from dataclasses import dataclass

from postcopy.kernel import procfs
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Answers, Batch
from postcopy.state import Timers

_ITIMERVAL = struct.Struct("<4q")  # interval, then what is left, as seconds and microseconds
_WHICH = (0, 1, 2)  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF


def problems(pid: int) -> list[str]:
    """What cannot be moved yet."""
    if procfs.read(pid, "timers").strip():
        return ["it has POSIX timers (timer_create), which cannot be moved yet"]
    return []


@dataclass
class Question:
    """Where the answers about the interval timers will lie."""

    rooms: list[int]

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        rooms = [batch.room(_ITIMERVAL.size) for _ in _WHICH]
        for which, room in zip(_WHICH, rooms, strict=True):
            batch.add(call("getitimer", which, room), f"reading interval timer {which}")
        return cls(rooms)

    def answered(self, answers: Answers) -> Timers:
        """The timers with what is left of them at this moment."""
        return Timers([_rearmed(answers.read(room, _ITIMERVAL.size)) for room in self.rooms])


def _rearmed(timer: bytes) -> bytes:
    """The kernel arms ITIMER_REAL again when its signal is taken, and until then shows nothing left.

    Set like that it would be off (kernel/time/itimer.c), so it begins a whole interval.
    """
    *interval, seconds, microseconds = _ITIMERVAL.unpack(timer)
    return timer if seconds or microseconds else _ITIMERVAL.pack(*interval, *interval)
