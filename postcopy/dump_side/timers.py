"""Interval timers (setitimer(2)). POSIX timers are refused by the survey."""

from dataclasses import dataclass

from postcopy.kernel import procfs
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Answers, Batch
from postcopy.state import Timers

_ITIMERVAL_SIZE = 32
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
        rooms = [batch.room(_ITIMERVAL_SIZE) for _ in _WHICH]
        for which, room in zip(_WHICH, rooms, strict=True):
            batch.add(call("getitimer", which, room), f"reading interval timer {which}")
        return cls(rooms)

    def answered(self, answers: Answers) -> Timers:
        """The timers with what is left of them at this moment."""
        return Timers([answers.read(room, _ITIMERVAL_SIZE) for room in self.rooms])
