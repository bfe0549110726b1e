"""Signal actions and the shared queue of pending signals."""

from dataclasses import dataclass

from postcopy.kernel import ptrace
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Answers, Batch
from postcopy.state import Signals

ACTION_SIZE = 32  # struct kernel_sigaction of x86-64: handler, flags, restorer, mask
_SIGNALS = 64


@dataclass
class Question:
    """Where the answers about the signal actions will lie."""

    actions: list[int]

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        rooms = [batch.room(ACTION_SIZE) for _ in range(_SIGNALS)]
        for number, room in enumerate(rooms, start=1):
            batch.add(call("rt_sigaction", number, 0, room, 8), f"reading the action of signal {number}")
        return cls(rooms)

    def answered(self, answers: Answers, pid: int) -> Signals:
        """The signals of the frozen process ``pid``."""
        actions = [answers.read(room, ACTION_SIZE) for room in self.actions]
        return Signals(actions, ptrace.pending_signals(pid, shared=True))
