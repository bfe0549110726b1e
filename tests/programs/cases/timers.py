"""POSIX timers: ids, clocks, whom they tell, what is left of them."""

import ctypes
import signal
import struct
import time
from pathlib import Path
from typing import ClassVar

from tests.programs.cases import Case, ThreadCase, differences, first_problem, libc, required, syscall, unlike
from tests.programs.cases.signals import TIMER_SIGNALS

SYS_TIMER_CREATE, SYS_TIMER_SETTIME, SYS_TIMER_GETTIME, SYS_TIMER_GETOVERRUN, SYS_TIMER_DELETE = range(222, 227)
SYS_GETTID = 186
SIGEV_SIGNAL, SIGEV_NONE, SIGEV_THREAD_ID = 0, 1, 4
CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME, CLOCK_BOOTTIME = 0, 1, 2, 7
SI_TIMER = -2

PROCESS_SIGNAL, THREAD_SIGNAL, SINGLE_SIGNAL, PERIODIC_SIGNAL = TIMER_SIGNALS


class SigInfo(ctypes.Structure):
    """``siginfo_t`` of a timer's signal."""

    _fields_ = [
        ("number", ctypes.c_int),
        ("error", ctypes.c_int),
        ("code", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("timer", ctypes.c_int),
        ("overrun", ctypes.c_int),
        ("value", ctypes.c_ulong),
        ("rest", ctypes.c_char * 96),
    ]


def create(clock: int, notify: int, number: int = 0, value: int = 0, tid: int = 0) -> int:
    """timer_create(2), the raw call; the id."""
    event = ctypes.create_string_buffer(struct.pack("=Qiii44x", value, number, notify, tid))
    made = ctypes.c_int(-1)
    required(syscall(SYS_TIMER_CREATE, clock, ctypes.addressof(event), ctypes.addressof(made)), "timer_create")
    return made.value


def arm(timer: int, seconds: float, interval: float = 0.0) -> None:
    """timer_settime(2)."""
    words = [int(part) for each in (interval, seconds) for part in (each // 1, each % 1 * 1e9)]
    setting = ctypes.create_string_buffer(struct.pack("=4q", *words))
    required(syscall(SYS_TIMER_SETTIME, timer, 0, ctypes.addressof(setting), 0), "timer_settime")


def left(timer: int) -> tuple[float, float]:
    """timer_gettime(2): seconds to its next expiry, and its interval."""
    setting = (ctypes.c_long * 4)()
    required(syscall(SYS_TIMER_GETTIME, timer, ctypes.addressof(setting)), "timer_gettime")
    return setting[2] + setting[3] / 1e9, setting[0] + setting[1] / 1e9


def take(number: int, seconds: float) -> SigInfo | None:
    """sigtimedwait(3), with what a timer's signal tells."""
    info, timeout = SigInfo(), (ctypes.c_long * 2)(int(seconds), int(seconds % 1 * 1e9))
    wanted = ctypes.c_uint64(1 << (number - 1))
    taken = syscall(128, ctypes.addressof(wanted), ctypes.addressof(info), ctypes.addressof(timeout), 8)
    return info if taken == number else None


def listed() -> dict[int, str]:
    """The entries of /proc/self/timers by id."""
    text = "\n" + Path("/proc/self/timers").read_text()
    return {int(entry.split("\n")[0]): entry.strip() for entry in text.split("\nID: ")[1:]}


class PosixTimers(Case):
    """Timers of four clocks, two of them silent, one off; with holes between their ids, for others were deleted."""

    #: clock, notify, signal, value, seconds, interval
    ALL: ClassVar = (
        (CLOCK_REALTIME, SIGEV_SIGNAL, PROCESS_SIGNAL, 0xDEAD_BEEF_0001, 1000.25, 0.0),
        (CLOCK_MONOTONIC, SIGEV_SIGNAL, PROCESS_SIGNAL, 2, 900.0, 7.5),
        (CLOCK_BOOTTIME, SIGEV_NONE, 0, 3, 800.0, 0.0),
        (CLOCK_PROCESS_CPUTIME, SIGEV_SIGNAL, PROCESS_SIGNAL, 4, 700.0, 3.0),
        (CLOCK_MONOTONIC, SIGEV_NONE, 0, 5, 0.0, 0.0),
    )

    def setup(self) -> None:
        """Create, delete every other, arm."""
        self.timers: dict[int, tuple[float, float]] = {}
        self.clocks: dict[int, int] = {}
        for clock, notify, number, value, seconds, interval in self.ALL:
            spare = create(CLOCK_MONOTONIC, SIGEV_NONE)
            timer = create(clock, notify, number, value)
            syscall(SYS_TIMER_DELETE, spare)
            if seconds:
                arm(timer, seconds, interval)
            self.timers[timer] = seconds, interval
            self.clocks[timer] = clock
        self.begin = time.monotonic()
        self.before = {timer: entry for timer, entry in listed().items() if timer in self.timers}

    def verify(self) -> str | None:
        """The same ids with the same clocks and targets, each with what is left of it; and new timers get other ids."""
        now = {timer: entry for timer, entry in listed().items() if timer in self.timers}
        if problem := differences({str(k): v for k, v in self.before.items()}, {str(k): v for k, v in now.items()}):
            return problem
        passed = time.monotonic() - self.begin
        for timer, (seconds, interval) in self.timers.items():
            remaining, repeat = left(timer)
            if abs(repeat - interval) > 1e-6:
                return f"timer {timer}: every {repeat} s, not {interval} s"
            fastest = passed * (8 if self.clocks[timer] == CLOCK_PROCESS_CPUTIME else 1)
            if not max(seconds - fastest - 0.5, 0) <= remaining <= seconds + 0.01:
                return f"timer {timer}: {remaining} s left of {seconds}; {passed} s have passed"
            if seconds and self.clocks[timer] != CLOCK_PROCESS_CPUTIME and remaining > seconds - passed / 2:
                return f"timer {timer}: {remaining} s left of {seconds} after {passed} s"
        new = create(CLOCK_MONOTONIC, SIGEV_NONE)
        syscall(SYS_TIMER_DELETE, new)
        return f"a new timer got the id {new}, which is taken" if new in self.timers else None


class RaisedTimers(Case):
    """Timers whose signal is pending: one counts its expirations on, one has expired for good."""

    INTERVAL = 0.05

    def setup(self) -> None:
        """Both expire now, and their signals stay blocked."""
        self.periodic = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, PERIODIC_SIGNAL, 0xABCD)
        self.single = create(CLOCK_MONOTONIC, SIGEV_SIGNAL, SINGLE_SIGNAL, 0x1234)
        arm(self.periodic, 0.001, self.INTERVAL)
        arm(self.single, 0.001)
        while not {SINGLE_SIGNAL, PERIODIC_SIGNAL} <= signal.sigpending():
            time.sleep(0.001)
        self.begin = time.monotonic()

    def verify(self) -> str | None:
        """One signal of each; that of the periodic timer tells how often it has expired since; then it goes on."""
        passed = time.monotonic() - self.begin
        single = take(SINGLE_SIGNAL, 1)
        if single is None or (single.code, single.value) != (SI_TIMER, 0x1234) or left(self.single)[0]:
            return f"the single timer: {single and (single.code, single.value)}, {left(self.single)} s left"
        if take(SINGLE_SIGNAL, 0):
            return "the single timer raised its signal twice"
        first = take(PERIODIC_SIGNAL, 1)
        if first is None or (first.code, first.timer, first.value) != (SI_TIMER, self.periodic, 0xABCD):
            return f"the periodic timer: {first and (first.code, first.timer, first.value)}"
        most = passed / self.INTERVAL + 2
        since_move = time.monotonic() - (self.moved_at or self.begin)
        if not since_move / self.INTERVAL - 4 <= first.overrun <= most:
            return f"{first.overrun} overruns in {passed} s, {since_move} s since the move"
        if not 0 <= syscall(SYS_TIMER_GETOVERRUN, self.periodic) <= first.overrun:
            return "timer_getoverrun does not fit"
        again = take(PERIODIC_SIGNAL, 2)
        arm(self.periodic, 0.0)
        return None if again else "the periodic timer does not go on"


class ThreadTimer(ThreadCase):
    """A timer that tells one thread, and one by the CPU time of that thread."""

    def prepare(self) -> None:
        """Create both."""
        self.tid = syscall(SYS_GETTID)
        self.timer = create(CLOCK_MONOTONIC, SIGEV_SIGNAL | SIGEV_THREAD_ID, THREAD_SIGNAL, 77, self.tid)
        # pthread_getcpuclockid(3): the complement of the TID, CPUCLOCK_PERTHREAD and CPUCLOCK_SCHED.
        self.cpu = create(
            (~self.tid << 3 | 6) & 0xFFFFFFFF, SIGEV_SIGNAL | SIGEV_THREAD_ID, THREAD_SIGNAL, 78, self.tid
        )
        arm(self.timer, 500.0)
        arm(self.cpu, 100.0)

    def check(self) -> str | None:
        """Both are there; each tells this thread."""
        entries = listed()
        for timer in (self.timer, self.cpu):
            if f"notify: signal/tid.{self.tid}\n" not in entries.get(timer, ""):
                return f"timer {timer}: {entries.get(timer)}"
        if not 99 < left(self.cpu)[0] <= 100:
            return f"the CPU-time timer has {left(self.cpu)[0]} s left"
        arm(self.timer, 0.001)
        first = take(THREAD_SIGNAL, 5)
        arm(self.cpu, 0.001)
        until = time.monotonic() + 5
        while not (second := take(THREAD_SIGNAL, 0)) and time.monotonic() < until:
            libc.getppid()
        return first_problem(
            unlike("value of the first signal", 77, first and first.value),
            unlike("value of the second signal", 78, second and second.value),
        )
