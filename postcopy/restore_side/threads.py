"""Threads: made by the leader's own clone3, each given what the kernel keeps for it, registers last."""

import struct
from collections.abc import Generator

from postcopy.errors import RestoreError
from postcopy.kernel import clone3, ptrace
from postcopy.kernel.batch import RECORD_SIZE, Batch
from postcopy.kernel.calls import NUMBERS, call
from postcopy.kernel.executor import ERESTART_RESTARTBLOCK, ERESTARTNOHAND, interrupted, make_and_interrupt, untrapped
from postcopy.kernel.prctl import PR_SET_NAME, PR_SET_PDEATHSIG
from postcopy.kernel.ptrace import Registers
from postcopy.nesting import Nesting
from postcopy.restore_side import credentials, filesystem, scheduling, seccomp
from postcopy.state import Credentials, Filesystem, Thread

_THREAD_FLAGS = (
    clone3.CLONE_VM
    | clone3.CLONE_FS
    | clone3.CLONE_FILES
    | clone3.CLONE_SIGHAND
    | clone3.CLONE_THREAD
    | clone3.CLONE_SYSVSEM
)
_SS_ONSTACK = 1
_FIXED_ROOM = 1024
_NO_CALL = 0xFFFF_FFFF_FFFF_FFFF


def ask_for(others: list[Thread], nesting: Nesting, batch: Batch) -> None:
    """Add the calls by which the leader makes the other threads, in order."""
    for thread in others:
        numbers = nesting.numbers(thread.tid)
        wanted = batch.place(clone3.set_tid(numbers))
        arguments = batch.place(clone3.arguments(_THREAD_FLAGS, 0, wanted, len(numbers)))
        batch.add(call("clone3", arguments, clone3.SIZE), f"making thread {thread.tid}")


def room(state: Thread, current: Credentials) -> int:
    """How many bytes of a batch `rebuild` takes at most."""
    pending = sum(RECORD_SIZE + len(siginfo) for siginfo in state.pending)
    places = 4 * (len(state.filesystem.root) + len(state.filesystem.cwd)) + _FIXED_ROOM if state.filesystem else 0
    return _FIXED_ROOM + pending + places + credentials.room(state.credentials, current) + seccomp.room(state)


def part_places(state: Filesystem, batch: Batch) -> None:
    """Add the calls by which a thread gets directories and a umask of its own."""
    batch.add(call("unshare", clone3.CLONE_FS), "parting its directories from those of its process")
    filesystem.rebuild(state, batch)


def rebuild(state: Thread, own: tuple[int, int], current: Credentials, parent_stays: bool, batch: Batch) -> None:
    """Add the calls that the thread makes itself.

    ``own``: its PID and TID as it sees them; ``parent_stays``: ``restore`` will not end before the program.
    """
    batch.add(call("set_tid_address", state.tid_address), "setting the tid address")
    if state.robust_list:
        made = call("set_robust_list", state.robust_list, state.robust_list_size)
        batch.add(made, "setting the robust futex list")
    if state.rseq.pointer:
        made = call("rseq", state.rseq.pointer, state.rseq.size, 0, state.rseq.signature)
        batch.add(made, "registering the rseq area")
    address, flags, size = struct.unpack("<QixxxxQ", state.alternate_stack)
    if size:
        stack = struct.pack("<QixxxxQ", address, flags & ~_SS_ONSTACK, size)
        batch.add(call("sigaltstack", batch.place(stack), 0), "setting the alternate signal stack")
    batch.add(call("prctl", PR_SET_NAME, batch.text(state.name)), "setting the thread's name")
    for siginfo in state.pending:
        number = int.from_bytes(siginfo[:4], "little")
        made = call("rt_tgsigqueueinfo", *own, number, batch.place(siginfo))
        batch.add(made, f"queueing pending signal {number}")
    scheduling.rebuild(state.scheduling, batch)
    credentials.rebuild(state.credentials, current, batch)
    if state.parent_death_signal and parent_stays:
        batch.add(call("prctl", PR_SET_PDEATHSIG, state.parent_death_signal), "setting the parent-death signal")


def fall_asleep(tid: int, state: Thread, syscall_at: int, timespec_at: int) -> Generator[None, None, bool]:
    """Let a thread begin its interrupted call again, with the time that was left, and interrupt it; in steps.

    The kernel keeps the end of an interrupted call where nobody can write it (the restart block of the task); it is
    set by calling. ``timespec_at`` holds the time. False where the call came to its end at once: then it is to be
    made again, from the program's own registers.
    """
    assert state.sleep is not None
    registers = Registers.unpack(state.registers)
    number, milliseconds = state.sleep.call, -(-state.sleep.left // 1_000_000)
    place = {
        NUMBERS["nanosleep"]: {"rdi": timespec_at},
        NUMBERS["clock_nanosleep"]: {"rdx": timespec_at},
        NUMBERS["poll"]: {"rdx": milliseconds},
        NUMBERS["futex"]: {"r10": timespec_at},
    }
    if number not in place:
        return False
    began = untrapped(registers).changed(rip=syscall_at, rax=number, orig_rax=_NO_CALL, **place[number])
    ptrace.set_registers(tid, began)
    yield from make_and_interrupt(tid)
    return interrupted(ptrace.get_registers(tid)) == ERESTART_RESTARTBLOCK


def finish(tid: int, state: Thread, asleep: bool) -> None:
    """Give the thread its registers and signal mask: it is ready to go on where it was.

    ``asleep``: `fall_asleep` has prepared the restart of its call. Otherwise that begins anew, with all of its timeout.
    """
    registers = Registers.unpack(state.registers)
    if interrupted(registers) == ERESTART_RESTARTBLOCK and not asleep:
        number = state.sleep.call if state.sleep is not None else registers["orig_rax"]
        registers = registers.changed(rax=-ERESTARTNOHAND & _NO_CALL, orig_rax=number)
    try:
        ptrace.set_xstate(tid, state.xstate)
    except OSError as error:
        raise RestoreError(
            f"the floating point and vector state of thread {state.tid} does not fit this CPU: {error.strerror}"
        ) from None
    ptrace.set_registers(tid, registers)
    ptrace.set_signal_mask(tid, state.signal_mask)


def end(tid: int, syscall_at: int, status: int) -> None:
    """Have a leader, once it is let go, do nothing but end as ``status`` says; the other threads go on."""
    made = {"rip": syscall_at, "rax": NUMBERS["exit"], "rdi": status >> 8, "orig_rax": _NO_CALL}
    ptrace.set_registers(tid, untrapped(ptrace.get_registers(tid)).changed(**made))
    ptrace.set_signal_mask(tid, _NO_CALL)
