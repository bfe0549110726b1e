"""Freeze a process: stop every thread under ptrace(2), and give it back untouched.

A frozen process is given back by `Frozen.thaw`, by the death of its tracer, or not at all after `stop_durably`.
"""

import contextlib
import errno
import os
import signal
import struct
import time
from collections.abc import Callable, Iterator, Mapping

from msgspec import Struct

from postcopy.errors import DumpError
from postcopy.kernel import procfs, ptrace
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.executor import (
    ERESTARTNOHAND,
    signal_bit,
    stop_signal,
)
from postcopy.kernel.libc import syscall
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.kernel.ptrace import Registers

_OPTIONS = ptrace.PTRACE_O_TRACESYSGOOD
_STOPPING = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_ALL = 0xFFFF_FFFF_FFFF_FFFF
_LAST_LOOKS = 50  # of a millisecond each
_BETWEEN_LOOKS = 0.0002  # seconds


class FrozenThread(Struct):
    """A stopped thread: what it was about to go on with."""

    tid: int
    registers: Registers
    signal_mask: int
    rseq: ptrace.RseqConfiguration
    group_stop: int
    status: dict[str, str]

    @property
    def stop(self) -> int:
        """The signal that stops it after calls of ours."""
        status = self.status
        return stop_signal(int(status["SigCgt"], 16), int(status["SigPnd"], 16) | int(status["ShdPnd"], 16))

    @property
    def inner(self) -> tuple[int, int]:
        """PID and TID as it sees them itself."""
        return int(self.status["NStgid"].split()[-1]), int(self.status["NSpid"].split()[-1])


class Frozen:
    """A process whose every thread is stopped under our ptrace; threads[0] is the leader, unless that has ended.

    ``face``: see `procfs.face`. ``memory`` and ``pagemap`` are there when it is frozen.
    """

    memory: ProcessMemory
    pagemap: Pagemap

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.face = procfs.face(pid)
        self.pidfd = os.pidfd_open(pid)
        self._files = contextlib.ExitStack()
        self.threads: list[FrozenThread] = []
        self.durable = False
        self._awaited: set[int] = set()
        self._stopped: dict[int, int] = {}
        self._ended_leader = 0  # it stays to be seen as long as other threads go on

    @property
    def stopped_by(self) -> int:
        """The signal of a job-control stop that the process was in before; 0 where it ran."""
        return self.threads[0].group_stop

    def freeze(self) -> None:
        """Stop every thread; raises DumpError when a thread cannot be had. On an error everything runs on."""
        self.ask()
        self.complete()

    def ask(self) -> None:
        """Ask every thread to stop; `complete` waits for them. Raises DumpError like `freeze`."""
        with self._or_give_up():
            self._ask_those_not_in({})

    def complete(self) -> None:
        """Wait for the threads that were asked, and stop those that have come since."""
        with self._or_give_up():
            stopped: dict[int, int] = {}
            self._stopped = stopped
            while True:
                for tid in sorted(self._awaited, key=lambda tid: (tid == self.pid, tid)):
                    group_stop = _wait_for_stop(tid) if self._stops(tid) else None
                    self._awaited.remove(tid)
                    if group_stop is not None:
                        stopped[tid] = group_stop
                if not self._ask_those_not_in(stopped):
                    break
            order = sorted(stopped, key=lambda tid: (tid != self.pid, tid))
            if order:
                # Not earlier: they keep to the memory that the process had when they were opened, before an execve(2).
                self._files.close()
                self.memory = self._files.enter_context(contextlib.closing(ProcessMemory(order[0])))
                self.pagemap = self._files.enter_context(contextlib.closing(Pagemap(order[0])))
            self.threads = [_look(self.pid, tid, stopped[tid], self.memory) for tid in order]
        if not self.threads:
            raise DumpError(f"process {self.pid} ended while it was being frozen")
        self.face = self.threads[0].tid

    def _stops(self, tid: int) -> bool:
        """Whether the stop, or end, of a thread is told: not that of a main thread before its last thread has ended."""
        while tid == self.pid and len(self._awaited | self._stopped.keys()) > 1 and not ptrace.has_news(tid):
            if _has_ended(self.pid, tid, traced=True):
                self._ended_leader = tid
                return False
            time.sleep(_BETWEEN_LOOKS)
        return True

    def _ask_those_not_in(self, stopped: Mapping[int, int]) -> bool:
        """Ask further threads to stop; whether there were any."""
        fresh = [tid for tid in procfs.tids(self.pid) if tid not in stopped and tid != self._ended_leader]
        for tid in fresh:
            if _seize(self.pid, tid):
                self._awaited.add(tid)
            elif tid == self.pid:
                self._ended_leader = tid
        return bool(fresh)

    @contextlib.contextmanager
    def _or_give_up(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.give_up()
            raise

    def give_up(self) -> None:
        """Let go of a process that has only been asked, or is stopped in part."""
        _give_up(self._awaited)
        for tid in sorted(self._stopped, key=lambda tid: tid == self.pid):
            _give_back(tid)
        self._stopped = {}
        self.threads = []

    def thaw(self) -> None:
        """Let the process run on as if nothing had happened."""
        # The leader last: where the process has been killed, its end is told when all others have been waited for.
        for thread in reversed(self.threads):
            _give_back(thread.tid)
        if self.durable and not self.stopped_by:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGCONT)
        self.threads = []

    def let_go(self) -> None:
        """Stop tracing a durably stopped process; it stays stopped."""
        self.stay_stopped()
        for thread in reversed(self.threads):
            _give_back(thread.tid)
        self.threads = []

    def close(self) -> None:
        """Give the descriptors back."""
        self._files.close()
        os.close(self.pidfd)

    def stop_durably(self) -> Iterator[None]:
        """Put the process into a group-stop under the tracer: from now on not even our death wakes it. In steps: after
        each the process is busy on its own.

        No instruction of the program runs: the leader goes from its trap straight into the stop, and only then,
        with the stop pending for all of them, are the other threads let into it (ptrace(2), "Group-stop").
        """
        if self.stopped_by or self.durable:
            return
        self.durable = True
        leader, *others = self.threads
        # A thread's own queue is looked at before that of the process: only what waits there could come first.
        own = ptrace.pending_signals(leader.tid, shared=False)
        blocks = any(not leader.signal_mask & signal_bit(int.from_bytes(info[:4], "little")) for info in own)
        syscall("stopping a thread", NUMBERS["tgkill"], self.pid, leader.tid, signal.SIGSTOP)
        if blocks:
            ptrace.set_signal_mask(leader.tid, _ALL)
        ptrace.cont(leader.tid)
        yield
        self._expect(leader.tid, lambda stop: stop.signal == signal.SIGSTOP and not stop.event)
        if blocks:
            ptrace.set_signal_mask(leader.tid, leader.signal_mask)
        ptrace.cont(leader.tid, signal.SIGSTOP)
        yield
        # Only when the leader has arrived is the stop pending for the others: let go before, they would run on.
        self._expect(leader.tid, _is_group_stop)
        for thread in others:
            ptrace.cont(thread.tid)
        yield
        for thread in others:
            self._expect(thread.tid, _is_group_stop)

    def stay_stopped(self) -> None:
        """See to it that no SIGCONT from anywhere has undone, or will undo, the durable stop.

        SIGCONT ends a group-stop even of threads that a tracer holds; they would run on when we let them go. A SIGSTOP
        that is still pending then stops them again before they make a step, and takes the place of a pending SIGCONT.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGSTOP)

    def _expect(self, tid: int, wanted: Callable[[ptrace.Stop], bool]) -> None:
        stop = ptrace.wait(tid)
        if not wanted(stop):
            raise DumpError(f"thread {tid} met {stop} while process {self.pid} was being stopped")


def _give_back(tid: int, signal_to_deliver: int = 0) -> None:
    try:
        ptrace.detach(tid, signal_to_deliver)
    except OSError:
        # It has been killed meanwhile: nobody else is told of its end before we have waited for it. Or we have been
        # interrupted while it was on its way to a stop.
        with contextlib.suppress(ChildProcessError):
            stop = ptrace.wait(tid)
            if stop.ended is None:
                _give_back(tid, stop.signal if not stop.event else 0)


def _is_group_stop(stop: ptrace.Stop) -> bool:
    return stop.event == ptrace.PTRACE_EVENT_STOP and stop.signal in _STOPPING


def _seize(pid: int, tid: int) -> bool:
    try:
        ptrace.seize(tid, _OPTIONS)
        ptrace.interrupt(tid)
    except OSError as error:
        # A thread that is just ending is refused with EPERM, like one that somebody else traces.
        if error.errno == errno.ESRCH or _has_ended(pid, tid):
            return False
        raise DumpError(f"thread {tid} cannot be traced: {error.strerror}") from None
    return True


def _has_ended(pid: int, tid: int, traced: bool = False) -> bool:
    try:
        status = procfs.status(pid, tid)
    except OSError:
        return True
    return status["State"][0] in "XZ" and (traced or status["TracerPid"] == "0")


def _give_up(awaited: set[int]) -> None:
    """Let go of threads whose stop has not been seen; what does not stop in time, our death lets go."""
    for _ in range(_LAST_LOOKS):
        for tid in list(awaited):
            stop = ptrace.look(tid)
            if stop is not None:
                awaited.remove(tid)
                if stop.ended is None:
                    _give_back(tid, stop.signal if not stop.event else 0)
        if not awaited:
            break
        time.sleep(0.001)


def _wait_for_stop(tid: int) -> int | None:
    """Until the thread is in PTRACE_EVENT_STOP: the signal of its group-stop, 0, or None where it ended."""
    while True:
        stop = ptrace.wait(tid)
        if stop.ended is not None:
            return None
        if stop.event == ptrace.PTRACE_EVENT_STOP:
            return stop.signal if _is_group_stop(stop) else 0
        # A signal was first: let it be delivered; the stop that was asked for comes right after.
        ptrace.cont(tid, stop.signal if not stop.event else 0)


def _look(pid: int, tid: int, group_stop: int, memory: ProcessMemory) -> FrozenThread:
    registers = ptrace.get_registers(tid)
    if _is_broken_off(registers):
        # Where a signal handler is to run the kernel makes EINTR of this, and else begins the call again.
        registers = registers.changed(rax=-ERESTARTNOHAND & _ALL)
        ptrace.set_registers(tid, registers)
    rseq = ptrace.rseq_configuration(tid)
    if rseq.pointer:
        registers = _out_of_critical_section(registers, rseq, memory)
    status = procfs.status(pid, tid)
    if status.get("Seccomp", "0") != "0":
        # The executor's calls are none of the program's, which may be forbidden to make them.
        ptrace.set_options(tid, _OPTIONS | ptrace.PTRACE_O_SUSPEND_SECCOMP)
    return FrozenThread(tid, registers, ptrace.get_signal_mask(tid), rseq, group_stop, status)


def _is_broken_off(registers: Registers) -> bool:
    """Whether a call has ended with EINTR, although no signal handler need have run, and can be begun again.

    A few calls give up when their thread is stopped (signal(7)), which the program must not notice. With a timeout
    they are left as they are: it would begin anew.
    """
    timeouts = {NUMBERS["rt_sigtimedwait"]: "rdx", NUMBERS["semtimedop"]: "r10", NUMBERS["epoll_pwait2"]: "r10"}
    number = registers["orig_rax"]
    if registers["rax"] != -errno.EINTR & _ALL:
        return False
    if number in (NUMBERS["epoll_wait"], NUMBERS["epoll_pwait"]):
        # Milliseconds as an int: without an end where it is negative.
        return bool(registers["r10"] & 1 << 31)
    return number == NUMBERS["semop"] or (number in timeouts and not registers[timeouts[number]])


def _out_of_critical_section(registers: Registers, rseq: ptrace.RseqConfiguration, memory: ProcessMemory) -> Registers:
    """At the abort handler where the thread is in a restartable sequence, as a preemption would leave it."""
    (section,) = struct.unpack("<Q", memory.read(rseq.pointer + 8, 8))
    if not section:
        return registers
    _, _, start, length, abort = struct.unpack("<IIQQQ", memory.read(section, 32))
    if start <= registers["rip"] < start + length:
        return registers.changed(rip=abort, orig_rax=_ALL)
    return registers
