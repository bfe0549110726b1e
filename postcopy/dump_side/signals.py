"""Signal actions and the shared queue of pending signals."""

import struct
from collections import Counter
from collections.abc import Iterator

from msgspec import Struct

from postcopy.dump_side.freeze import Frozen
from postcopy.kernel import ptrace
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.pattern import Blank, Pattern
from postcopy.kernel.posix_timer import SI_TIMER
from postcopy.state import LateSignal, Process, Signals

_SI_CODE = struct.Struct("<8xi")  # the third field of siginfo
_SIGSTOP = 19

ACTION_SIZE = 32  # struct kernel_sigaction of x86-64: handler, flags, restorer, mask
_SIGNALS = 64
_READING = Pattern()
for _number in range(_SIGNALS):
    _READING.add(
        call("rt_sigaction", _number + 1, 0, Blank(0, _number * ACTION_SIZE), 8),
        f"reading the action of signal {_number + 1}",
    )


class Question(Struct):
    """Where the answers about the signal actions will lie."""

    actions: int

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        room = batch.room(_SIGNALS * ACTION_SIZE)
        _READING.repeat(batch, [room], None)
        return cls(room)

    def answered(self, answers: Answers, pid: int) -> Signals:
        """The signals of the frozen process ``pid``."""
        actions = answers.read(self.actions, _SIGNALS * ACTION_SIZE)
        each = [actions[at : at + ACTION_SIZE] for at in range(0, len(actions), ACTION_SIZE)]
        return Signals(each, ptrace.pending_signals(pid, shared=True))


def late(frozen: Frozen, collected: Process) -> list[LateSignal]:
    """Signals that somebody has sent to a process since its state was collected; the destination queues them at last.

    Those that the kernel raised (timers) are left out: what raises them has been moved and will raise them there.
    """
    leader = frozen.threads[0].tid
    pid = collected.pid
    found = [LateSignal(pid, 0, siginfo) for siginfo in _new(leader, True, collected.signals.pending)]
    alive = collected.threads[collected.leader_ended is not None :]
    for thread, state in zip(frozen.threads, alive, strict=True):
        found += [LateSignal(pid, state.tid, siginfo) for siginfo in _new(thread.tid, False, state.pending)]
    return found


def _new(tid: int, shared: bool, before: list[bytes]) -> Iterator[bytes]:
    known = Counter(before)
    for siginfo in ptrace.pending_signals(tid, shared):
        if known[siginfo]:
            known[siginfo] -= 1
        elif _sent(_SI_CODE.unpack_from(siginfo)[0]) and siginfo[0] != _SIGSTOP:
            yield siginfo


def _sent(code: int) -> bool:
    """Whether somebody has sent the signal; not so a timer, which the kernel does with a code like theirs."""
    return code <= 0 and code != SI_TIMER
