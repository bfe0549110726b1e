"""Interrupted calls with a relative timeout: which call it is, and what is left of its time.

When a signal or a tracer interrupts such a call, the kernel keeps its end where nobody can read it (the restart block
of the task). So running threads are observed just before the freeze: since when they wait. After a first restart not
even the number of the call is in the registers any more; its arguments are, and tell.
"""

import contextlib
import os
import struct
import time

from msgspec import Struct

from postcopy.dump_side.freeze import FrozenThread
from postcopy.kernel import procfs
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.executor import ERESTART_RESTARTBLOCK, interrupted
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.kernel.ptrace import Registers
from postcopy.state import Sleep

_NANOSLEEP, _CLOCK_NANOSLEEP = NUMBERS["nanosleep"], NUMBERS["clock_nanosleep"]
_POLL, _FUTEX, _RESTART = NUMBERS["poll"], NUMBERS["futex"], NUMBERS["restart_syscall"]
_INTERESTING = {_NANOSLEEP, _CLOCK_NANOSLEEP, _POLL, _FUTEX, _RESTART}
_TIMESPEC = struct.Struct("<qq")
_TIMER_ABSTIME = 1
_FUTEX_WAIT, _FUTEX_COMMAND = 0, 0x7F
_FUTEX_WAITS = (_FUTEX_WAIT, 9)  # FUTEX_WAIT_BITSET
_CLOCK_IDS = 16
_POLLFD_SIZE, _MOST_POLLED = 8, 512


class Observation(Struct, frozen=True):
    """A thread that sleeps since ``since`` (CLOCK_MONOTONIC, ns) in a call made at this place."""

    since: int
    stack: int
    instruction: int


def observe(pid: int) -> dict[int, Observation]:
    """The threads of a running process that sleep in a call that may have a relative timeout."""
    found: dict[int, Observation] = {}
    offsets: dict[int, int] = {}
    before = os.sched_getaffinity(0)
    try:
        for tid in procfs.tids(pid):
            with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
                words = procfs.read(pid, f"task/{tid}/syscall").split()
                if int(words[0]) in _INTERESTING:
                    since = _asleep_since(pid, tid, offsets)
                    found[tid] = Observation(since, int(words[7], 16), int(words[8], 16))
    finally:
        os.sched_setaffinity(0, before)
    return found


def places(thread: FrozenThread) -> list[int]:
    """Addresses that the call reads or writes when it is begun again at the destination."""
    registers = thread.registers
    if interrupted(registers) and registers["orig_rax"] == _FUTEX:
        # The calls for PI futexes end with EFAULT where userfaultfd would have to make them wait for the page.
        return [registers["rdi"], registers["r8"]]
    number = _number(thread)
    if number in (_NANOSLEEP, _CLOCK_NANOSLEEP):
        remaining = _remaining_place(thread, number)
        return [remaining, remaining + _TIMESPEC.size - 1] if remaining else []
    if number == _POLL:
        end = registers["rdi"] + _POLLFD_SIZE * min(registers["rsi"], _MOST_POLLED)
        return list(range(registers["rdi"], end + PAGE_SIZE, PAGE_SIZE))
    if number == _FUTEX:
        return [registers["rdi"]]
    return []


def collect(thread: FrozenThread, seen: Observation | None, memory: ProcessMemory) -> Sleep | None:
    """The interrupted call and what is left of it; None where there is none, or not enough is known of it."""
    number = _number(thread)
    if not number:
        return None
    registers = thread.registers
    since = seen.since if seen is not None and _same(thread, seen) else 0
    elapsed = time.monotonic_ns() - since if since else 0
    if number in (_NANOSLEEP, _CLOCK_NANOSLEEP):
        if place := _remaining_place(thread, number):
            # nanosleep(2) writes what is left before it is restarted.
            left = _nanoseconds(memory, place)
        else:
            left = _nanoseconds(memory, registers["rdi" if number == _NANOSLEEP else "rdx"]) - elapsed
    elif number == _POLL and registers["rsi"] <= _MOST_POLLED:
        left = (registers["rdx"] & 0x7FFF_FFFF) * 1_000_000 - elapsed
    elif number == _FUTEX and registers["rsi"] & _FUTEX_COMMAND == _FUTEX_WAIT:
        left = _nanoseconds(memory, registers["r10"]) - elapsed
    else:
        # The timeout is a point in time: the call is simply made again.
        return Sleep(number, 0)
    return Sleep(number, max(left, 1))


def _number(thread: FrozenThread) -> int:
    """The call that a frozen thread was in, if it is one that the kernel restarts by its restart block; else 0."""
    if interrupted(thread.registers) != ERESTART_RESTARTBLOCK:
        return 0
    number = thread.registers["orig_rax"]
    if number == _RESTART:
        return _behind_restart(thread.registers)
    return number if number in _INTERESTING else 0


def _behind_restart(registers: Registers) -> int:
    """The call that restart_syscall(2) goes on with, by the arguments, which the kernel leaves in their registers."""
    first, second, fourth = registers["rdi"], registers["rsi"], registers["r10"]
    if first < _CLOCK_IDS and not second and fourth not in range(1, PAGE_SIZE):
        return _CLOCK_NANOSLEEP if registers["rdx"] >> 31 else _POLL
    if second > PAGE_SIZE:
        return _NANOSLEEP
    is_futex = second & _FUTEX_COMMAND in _FUTEX_WAITS and fourth > PAGE_SIZE and not first & 3
    if is_futex and (second & ~_FUTEX_COMMAND or not second):
        return _FUTEX
    return _POLL if second or not first else _NANOSLEEP


def _same(thread: FrozenThread, seen: Observation) -> bool:
    return (thread.registers["rsp"], thread.registers["rip"]) == (seen.stack, seen.instruction)


def _remaining_place(thread: FrozenThread, number: int) -> int:
    """Where an interrupted sleep writes what is left of it; 0: the program did not want to know."""
    return thread.registers["rsi" if number == _NANOSLEEP else "r10"]


def _nanoseconds(memory: ProcessMemory, place: int) -> int:
    seconds, nanoseconds = _TIMESPEC.unpack(memory.read(place, _TIMESPEC.size))
    total: int = seconds * 1_000_000_000 + nanoseconds
    return total


def _asleep_since(pid: int, tid: int, offsets: dict[int, int]) -> int:
    """When the thread ran last (CLOCK_MONOTONIC, ns), from the scheduler's clock, of which every CPU has one."""
    cpu = int(procfs.read(pid, f"task/{tid}/stat").rpartition(b")")[2].split()[36])
    if cpu not in offsets:
        os.sched_setaffinity(0, {cpu})
        offsets[cpu] = time.monotonic_ns() - _ran_last(os.getpid(), os.getpid())
    return _ran_last(pid, tid) + offsets[cpu]


def _ran_last(pid: int, tid: int) -> int:
    for line in procfs.read(pid, f"task/{tid}/sched").splitlines():
        if line.startswith(b"se.exec_start"):
            milliseconds, _, fraction = line.rpartition(b":")[2].strip().partition(b".")
            return int(milliseconds) * 1_000_000 + int(fraction)
    raise ValueError("no se.exec_start")
