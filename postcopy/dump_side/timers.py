"""Interval timers (setitimer(2)) and POSIX timers (timer_create(2)), with what is left of them."""

import struct
from collections.abc import Iterable, Iterator, Mapping

from msgspec import Struct

from postcopy.kernel import posix_timer, procfs
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.posix_timer import SIGEV_NONE, SIGEV_THREAD_ID, TimerEntry
from postcopy.state import PosixTimer, Timers

_ITIMERVAL = struct.Struct("<4q")  # interval, then what is left, as seconds and microseconds
_ITIMERSPEC_SIZE = 32
_WHICH = (0, 1, 2)  # ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF
_MOST_TIMERS = 1000


def problems(pid: int) -> list[str]:
    """What cannot be moved."""
    return list(_problems(pid))


def _problems(pid: int) -> Iterator[str]:
    timers = list(posix_timer.for_each_timer(pid))
    if not timers:
        return
    if len(timers) > _MOST_TIMERS:
        yield f"it has {len(timers)} POSIX timers; at most {_MOST_TIMERS} can be moved"
    threads = [int(procfs.status(pid, tid)["NSpid"].split()[-1]) for tid in procfs.tids(pid)]
    for timer in timers:
        if timer.of_a_device:
            yield f"POSIX timer {timer.number} runs by the clock of a device, which cannot be moved"
        elif timer.measures == 0 and timer.of_a_thread and len(threads) > 1:
            yield (
                f"POSIX timer {timer.number} runs by CLOCK_THREAD_CPUTIME_ID, and the kernel does not tell of which "
                "thread; use pthread_getcpuclockid()"
            )
        elif timer.measures and timer.measures not in threads:
            yield f"POSIX timer {timer.number} runs by the CPU time of process {timer.measures}, which is not moved"


class Question(Struct):
    """Where the answers about the timers will lie."""

    rooms: list[int]
    posix: list[tuple[TimerEntry, int]]

    @classmethod
    def ask(cls, batch: Batch, pid: int) -> "Question":
        """Add the calls to a batch of the leader of frozen process ``pid``."""
        rooms = [batch.room(_ITIMERVAL.size) for _ in _WHICH]
        for which, room in zip(_WHICH, rooms, strict=True):
            batch.add(call("getitimer", which, room), f"reading interval timer {which}")
        posix = [(timer, batch.room(_ITIMERSPEC_SIZE)) for timer in posix_timer.for_each_timer(pid)]
        for timer, room in posix:
            batch.add(call("timer_gettime", timer.number, room), f"reading POSIX timer {timer.number}")
        return cls(rooms, posix)

    def answered(self, answers: Answers, inner: Mapping[int, int], queued: Iterable[bytes]) -> Timers:
        """The timers with what is left of them at this moment.

        ``inner``: the TIDs as the process sees them, by ours; ``queued``: the siginfo of all queued signals.
        """
        raised = {posix_timer.raised_by(siginfo) for siginfo in queued}
        return Timers(
            intervals=[_rearmed(answers.read(room, _ITIMERVAL.size)) for room in self.rooms],
            posix=[
                _posix(timer, answers.read(room, _ITIMERSPEC_SIZE), inner, timer.number in raised)
                for timer, room in self.posix
            ],
        )


def _posix(timer: TimerEntry, setting: bytes, inner: Mapping[int, int], raised: bool) -> PosixTimer:
    # A timer that tells a thread which has ended tells nobody.
    forlorn = bool(timer.notify & SIGEV_THREAD_ID) and timer.tid not in inner
    return PosixTimer(
        number=timer.number,
        clock=timer.clock,
        notify=SIGEV_NONE if forlorn else timer.notify,
        signal=timer.signal,
        value=timer.value,
        tid=inner.get(timer.tid, 0),
        setting=setting,
        # Without an interval it has expired for good, and its signal travels like any other.
        raised=raised and any(setting[:16]),
    )


def without_raised(queued: list[bytes], timers: Timers) -> list[bytes]:
    """Queued signals but for those that the timers will raise again at the destination."""
    again = {timer.number for timer in timers.posix if timer.raised}
    return [siginfo for siginfo in queued if posix_timer.raised_by(siginfo) not in again]


def _rearmed(timer: bytes) -> bytes:
    """The kernel arms ITIMER_REAL again when its signal is taken, and until then shows nothing left.

    Set like that it would be off (kernel/time/itimer.c), so it begins a whole interval.
    """
    *interval, seconds, microseconds = _ITIMERVAL.unpack(timer)
    return timer if seconds or microseconds else _ITIMERVAL.pack(*interval, *interval)
