"""Signal handlers, masks, queues, alternate stacks and interval timers."""

import ctypes
import mmap
import os
import signal
import struct
import threading
import time
from collections.abc import Callable
from typing import ClassVar

from tests.programs.cases import Case, Snapshot, ThreadCase, first_problem, libc, required, syscall, unlike

SYS_RT_SIGACTION, SYS_RT_SIGTIMEDWAIT, SYS_RT_SIGQUEUEINFO = 13, 128, 129
SYS_SIGALTSTACK, SYS_RT_TGSIGQUEUEINFO = 131, 297
SI_QUEUE, SI_USER = -1, 0
SA_SIGINFO, SA_ONSTACK, SA_RESTART, SA_NODEFER = 4, 0x08000000, 0x10000000, 0x40000000
SS_AUTODISARM = 1 << 31
SIGINFO_SIZE = 128

#: Blocked in every thread from the start of the program, so that what is queued stays queued.
PROCESS_QUEUE = [signal.SIGRTMIN + 3, signal.SIGRTMIN + 4, signal.SIGUSR1]
THREAD_QUEUE = [signal.SIGRTMIN + 5]
TIMER_SIGNALS = [signal.SIGRTMIN + number for number in range(11, 15)]
ALWAYS_BLOCKED = {*PROCESS_QUEUE, *THREAD_QUEUE, *TIMER_SIGNALS, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF}

HandlerType = ctypes.CFUNCTYPE(None, ctypes.c_int)


class KernelSigaction(ctypes.Structure):
    """``struct sigaction`` as the kernel has it."""

    _fields_ = [
        ("handler", ctypes.c_ulong),
        ("flags", ctypes.c_ulong),
        ("restorer", ctypes.c_ulong),
        ("mask", ctypes.c_uint64),
    ]


class StackT(ctypes.Structure):
    """``stack_t`` of sigaltstack(2)."""

    _fields_ = [("ss_sp", ctypes.c_ulong), ("ss_flags", ctypes.c_int), ("ss_size", ctypes.c_size_t)]


def get_action(number: int) -> tuple[int, int, int, int]:
    """Handler, flags, restorer and mask of a signal."""
    action = KernelSigaction()
    required(syscall(SYS_RT_SIGACTION, number, 0, ctypes.addressof(action), 8), f"rt_sigaction({number})")
    return action.handler, action.flags, action.restorer, action.mask


def find_restorer() -> int:
    """The C library's, from one of the interpreter's own actions; SIGINT has none where a shell has it ignored."""
    return next(filter(None, (get_action(number)[2] for number in signal.valid_signals())))


class SignalActions(Snapshot):
    """The dispositions of all 64 signals."""

    def arrange(self) -> None:
        """One with every flag, one ignored, one of Python's."""
        self.native = HandlerType(lambda number: None)
        handler = ctypes.cast(self.native, ctypes.c_void_p).value or 0
        restorer = find_restorer()
        wanted = KernelSigaction(
            handler=handler, flags=SA_ONSTACK | SA_RESTART | SA_NODEFER | 0x04000000, restorer=restorer, mask=0x5500
        )
        required(syscall(SYS_RT_SIGACTION, signal.SIGRTMIN + 1, ctypes.addressof(wanted), 0, 8), "rt_sigaction")
        signal.signal(signal.SIGWINCH, signal.SIG_IGN)
        signal.signal(signal.SIGURG, lambda number, frame: None)

    def take(self) -> dict[str, object]:
        """Every action."""
        return {f"signal {number}": get_action(number) for number in range(1, 65)}


class HandlerRuns(Case):
    """A handler runs on a signal, and the interrupted code goes on."""

    def setup(self) -> None:
        """Install a handler."""
        self.received: list[int] = []
        signal.signal(signal.SIGUSR2, lambda number, frame: self.received.append(number))

    def verify(self) -> str | None:
        """Send the signal."""
        signal.raise_signal(signal.SIGUSR2)
        return unlike("signals handled", [signal.SIGUSR2], self.received)


class ThreadMasks(Case):
    """A mask of its own in each of several threads."""

    MASKS: ClassVar[tuple[set[int], ...]] = (
        {signal.SIGHUP},
        {signal.SIGHUP, signal.SIGTERM, signal.SIGRTMAX},
        {signal.SIGCHLD, signal.SIGRTMIN + 7},
        set(),
    )

    def setup(self) -> None:
        """Start the threads."""
        self.asked = threading.Event()
        self.found: list[tuple[set[int], set[int]]] = []
        ready = threading.Barrier(len(self.MASKS) + 1)
        self.threads = [threading.Thread(target=self.live, args=(mask, ready), daemon=True) for mask in self.MASKS]
        for thread in self.threads:
            thread.start()
        ready.wait()

    def live(self, mask: set[int], ready: threading.Barrier) -> None:
        """One thread."""
        wanted = {*mask, *ALWAYS_BLOCKED}
        signal.pthread_sigmask(signal.SIG_SETMASK, wanted)
        ready.wait()
        self.asked.wait()
        self.found.append((set(map(int, wanted)), set(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, [])))))

    def verify(self) -> str | None:
        """Each thread has the mask it set."""
        self.asked.set()
        for thread in self.threads:
            thread.join(10)
        count = unlike("threads that answered", len(self.MASKS), len(self.found))
        return count or first_problem(*(unlike("mask", sorted(old), sorted(new)) for old, new in self.found))


def siginfo(number: int, value: int) -> bytes:
    """A siginfo as sigqueue(3) makes it, with a sender that is not this process."""
    return struct.pack("=iiiiiIq", number, 0, SI_QUEUE, 0, 7, 1234, value).ljust(SIGINFO_SIZE, b"\0")


def take_queued(signals: list[int], what: Callable[[bytes], object]) -> list[object]:
    """Dequeue what is pending of ``signals`` for the calling thread, in the kernel's order."""
    mask = ctypes.c_uint64(sum(1 << (number - 1) for number in signals))
    timeout = (ctypes.c_long * 2)(0, 0)
    buffer = ctypes.create_string_buffer(SIGINFO_SIZE)
    taken = []
    arguments = (ctypes.addressof(mask), ctypes.addressof(buffer), ctypes.addressof(timeout), 8)
    while syscall(SYS_RT_SIGTIMEDWAIT, *arguments) > 0:
        taken.append(what(buffer.raw))
    return taken


class PendingSignals(Case):
    """Signals queued for the process, with all of their siginfo, in order."""

    def setup(self) -> None:
        """Queue real-time signals with values, and a plain one that kill(2) sent."""
        first, second, plain = PROCESS_QUEUE
        queued = [siginfo(first, value) for value in (11, -2, 1 << 40)] + [siginfo(second, value) for value in (5, 4)]
        for info in (queued[3], queued[0], queued[1], queued[4], queued[2]):
            buffer = ctypes.create_string_buffer(info, SIGINFO_SIZE)
            (number,) = struct.unpack_from("=i", info)
            required(syscall(SYS_RT_SIGQUEUEINFO, os.getpid(), number, ctypes.addressof(buffer)), "rt_sigqueueinfo")
        os.kill(os.getpid(), plain)
        sent = struct.pack("=iiiiiI", plain, 0, SI_USER, 0, os.getpid(), os.getuid()).ljust(SIGINFO_SIZE, b"\0")
        # sigtimedwait(2) gives the lowest number first, and each number in the order it was sent.
        self.expected = [sent, *queued]

    def verify(self) -> str | None:
        """Take them."""
        taken = take_queued(PROCESS_QUEUE, bytes)
        short = [describe(info) for info in taken if isinstance(info, bytes)]
        return unlike("queue", [describe(info) for info in self.expected], short) or (
            None if taken == self.expected else "some siginfo differs beyond its first 32 bytes"
        )


class PendingThreadSignals(ThreadCase):
    """Signals queued for one thread, which no other may take."""

    def prepare(self) -> None:
        """Queue them for this thread."""
        self.expected = [siginfo(THREAD_QUEUE[0], value) for value in (3, 1, 2)]
        for info in self.expected:
            buffer = ctypes.create_string_buffer(info, SIGINFO_SIZE)
            arguments = (os.getpid(), threading.get_native_id(), THREAD_QUEUE[0], ctypes.addressof(buffer))
            required(syscall(SYS_RT_TGSIGQUEUEINFO, *arguments), "rt_tgsigqueueinfo")

    def verify(self) -> str | None:
        """They must not be pending for the main thread; then the thread takes them."""
        stolen = [number for number in signal.sigpending() if number in THREAD_QUEUE]
        return super().verify() or (f"signals {stolen} are pending for the whole process" if stolen else None)

    def check(self) -> str | None:
        """Take them."""
        taken = take_queued(THREAD_QUEUE, bytes)
        return None if taken == self.expected else f"{len(taken)} signals, or another order, or another siginfo"


def describe(info: bytes) -> str:
    """A siginfo for a message."""
    number, error, code, _, pid, uid, value = struct.unpack_from("=iiiiiIq", info)
    return f"signal {number} code {code} errno {error} from {pid} uid {uid} value {value}"


class AlternateStack(ThreadCase):
    """A thread's alternate signal stack, and that a handler runs on it."""

    SIZE = 256 * 1024
    FLAGS = SS_AUTODISARM

    def prepare(self) -> None:
        """Install the stack, and a handler that notes where it runs."""
        self.memory = mmap.mmap(-1, self.SIZE, flags=mmap.MAP_PRIVATE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        wanted = StackT(self.base, self.FLAGS - (1 << 32), self.SIZE)
        required(syscall(SYS_SIGALTSTACK, ctypes.addressof(wanted), 0), "sigaltstack")
        self.before = self.current()

    def current(self) -> tuple[int, int, int]:
        """The calling thread's alternate stack."""
        old = StackT()
        required(syscall(SYS_SIGALTSTACK, 0, ctypes.addressof(old)), "sigaltstack")
        return old.ss_sp, old.ss_flags, old.ss_size

    def check(self) -> str | None:
        """The same stack, and a signal frame in it afterwards."""
        if problem := unlike("sigaltstack", self.before, self.current()):
            return problem
        untouched = bytes(4096)
        self.memory[-4096:] = untouched
        handler = HandlerType(lambda number: None)
        address = ctypes.cast(handler, ctypes.c_void_p).value or 0
        restorer = find_restorer()
        action = KernelSigaction(handler=address, flags=SA_ONSTACK | SA_SIGINFO | 0x04000000, restorer=restorer, mask=0)
        required(syscall(SYS_RT_SIGACTION, signal.SIGRTMIN + 9, ctypes.addressof(action), 0, 8), "rt_sigaction")
        libc["raise"](signal.SIGRTMIN + 9)
        return "the handler did not run on the alternate stack" if self.memory[-4096:] == untouched else None


class IntervalTimers(Case):
    """The three timers of setitimer(2): they count on, and keep their interval."""

    TIMERS = ((signal.ITIMER_REAL, 1000.0, 7.0), (signal.ITIMER_VIRTUAL, 900.0, 0.0), (signal.ITIMER_PROF, 800.0, 1.5))

    def setup(self) -> None:
        """Set them, far into the future."""
        self.begin = time.monotonic()
        for which, seconds, interval in self.TIMERS:
            signal.setitimer(which, seconds, interval)

    def verify(self) -> str | None:
        """Each has run for as long as time has passed, at most; the real one for about as long."""
        # CPU time, which the other two count, is at most the time of every processor.
        passed = time.monotonic() - self.begin
        processors = os.cpu_count() or 1
        for which, seconds, interval in self.TIMERS:
            left, repeat = signal.getitimer(which)
            longest = passed if which == signal.ITIMER_REAL else passed * processors
            if repeat != interval or not seconds - longest - 1 <= left <= seconds + 0.01:
                return f"timer {which}: {left} s left of {seconds}, every {repeat} s; {passed} s have passed"
            if which == signal.ITIMER_REAL and left > seconds - passed / 2:
                return f"the real timer has {left} s left of {seconds} after {passed} s"
        return None


class TimerFires(Case):
    """A POSIX-clock wait by signal: SIGALRM of a real timer set now arrives."""

    def setup(self) -> None:
        """Nothing: what is tried is that the process can use its timers."""

    def verify(self) -> str | None:
        """Set the timer and take its signal."""
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        taken = signal.sigtimedwait([signal.SIGALRM], 5)
        return None if taken is not None and taken.si_signo == signal.SIGALRM else "no SIGALRM within 5 s"
