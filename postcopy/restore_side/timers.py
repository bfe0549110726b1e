"""Interval timers (setitimer(2)) and POSIX timers (timer_create(2)): they go on with what was left of them."""

import struct
from collections.abc import Mapping

from postcopy.errors import RestoreError
from postcopy.kernel import posix_timer
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.posix_timer import TIMER_ABSTIME
from postcopy.kernel.prctl import (
    PR_TIMER_CREATE_RESTORE_IDS,
    PR_TIMER_CREATE_RESTORE_IDS_OFF,
    PR_TIMER_CREATE_RESTORE_IDS_ON,
)
from postcopy.nesting import Nesting
from postcopy.state import PosixTimer, Timers

_TIMESPEC = struct.Struct("<qq")
_ITIMERSPEC = struct.Struct("<qqqq")  # interval, then what is left, as seconds and nanoseconds
_MOST_COUNTED = 2000
_CLOCK_MONOTONIC = 1


def rebuild(state: Timers, nesting: Nesting, now: Mapping[int, int], batch: Batch) -> None:
    """Add the calls. ``now``: what `Clocks` has read."""
    for which, interval in enumerate(state.intervals):
        if any(interval):
            batch.add(call("setitimer", which, batch.place(interval), 0), f"setting interval timer {which}")
    if not state.posix:
        return
    if posix_timer.ids_can_be_chosen():
        create_by_id(state.posix, nesting, batch)
    else:
        create_by_counting(state.posix, nesting, batch)
    for timer in state.posix:
        flags, setting = _setting(timer, now)
        if any(setting):
            made = call("timer_settime", timer.number, flags, batch.place(setting), 0)
            batch.add(made, f"setting POSIX timer {timer.number}")


class Clocks:
    """The clocks of raised timers, as the process itself reads them: it may live in a time namespace."""

    def __init__(self, state: Timers, batch: Batch) -> None:
        """Add the calls that read them."""
        clocks = {timer.clock for timer in state.posix if _is_read(timer)}
        self._rooms = {clock: batch.room(_TIMESPEC.size) for clock in clocks}
        for clock, room in self._rooms.items():
            batch.add(call("clock_gettime", clock, room), f"reading clock {clock}")

    def now(self, answers: Answers) -> dict[int, int]:
        """Nanoseconds by clock."""
        return {c: _nanoseconds(*_TIMESPEC.unpack(answers.read(r, _TIMESPEC.size))) for c, r in self._rooms.items()}


def reads_clocks(state: Timers) -> bool:
    """Whether setting them takes the time of any of their clocks."""
    return any(map(_is_read, state.posix))


def _is_read(timer: PosixTimer) -> bool:
    return timer.raised and timer.clock >= 0


def create_by_id(timers: list[PosixTimer], nesting: Nesting, batch: Batch) -> None:
    """Add the calls that create timers with chosen ids (prctl(2), PR_TIMER_CREATE_RESTORE_IDS)."""
    ids = PR_TIMER_CREATE_RESTORE_IDS
    batch.add(call("prctl", ids, PR_TIMER_CREATE_RESTORE_IDS_ON, 0, 0, 0), "choosing timer ids")
    for timer in timers:
        _create(timer, nesting, batch)
    batch.add(call("prctl", ids, PR_TIMER_CREATE_RESTORE_IDS_OFF, 0, 0, 0), "no longer choosing timer ids")


def create_by_counting(timers: list[PosixTimer], nesting: Nesting, batch: Batch) -> None:
    """Add the calls that create timers in a process that had none: ids count up from 0; those between are deleted.

    Raises RestoreError for ids that would take too long to count up to.
    """
    wanted = {timer.number: timer for timer in timers}
    highest = max(wanted)
    if highest > _MOST_COUNTED:
        raise RestoreError(f"POSIX timer {highest}: before Linux 6.16, ids only up to {_MOST_COUNTED} can be restored")
    for number in range(highest + 1):
        if number in wanted:
            _create(wanted[number], nesting, batch)
        else:
            room = batch.room(4)
            batch.add(call("timer_create", _CLOCK_MONOTONIC, 0, room), "counting timer ids up")
            batch.add(call("timer_delete", number), "counting timer ids up")


def _create(timer: PosixTimer, nesting: Nesting, batch: Batch) -> None:
    event = posix_timer.sigevent(timer.value, timer.signal, timer.notify, nesting.own(timer.tid) if timer.tid else 0)
    number = batch.place(struct.pack("<i", timer.number))
    # The kernel keeps a CPU-time clock as a negative number and takes it as an unsigned one.
    made = call("timer_create", timer.clock & 0xFFFF_FFFF, batch.place(event), number)
    batch.add(made, f"making POSIX timer {timer.number}")


def _setting(timer: PosixTimer, now: Mapping[int, int]) -> tuple[int, bytes]:
    """The flags and struct itimerspec that make a timer go on."""
    interval_seconds, interval_rest, *left = _ITIMERSPEC.unpack(timer.setting)
    if not timer.raised:
        return 0, timer.setting
    # It expires at once and raises its signal again; its next time is when it would have been.
    interval, remaining = _nanoseconds(interval_seconds, interval_rest), _nanoseconds(*left)
    last = now.get(timer.clock, 0) + remaining - interval
    if last <= 0:
        return 0, _ITIMERSPEC.pack(interval_seconds, interval_rest, 0, 1)
    return TIMER_ABSTIME, _ITIMERSPEC.pack(interval_seconds, interval_rest, *divmod(last, 1_000_000_000))


def _nanoseconds(seconds: int, rest: int) -> int:
    return seconds * 1_000_000_000 + rest
