"""Threads: registers and everything the kernel keeps for one thread."""

from msgspec import Struct
from msgspec.structs import replace

from postcopy.dump_side import scheduling, seccomp, sleepers
from postcopy.dump_side.freeze import Frozen, FrozenThread
from postcopy.dump_side.sleepers import Observation
from postcopy.kernel import procfs, ptrace
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import NUMBERS, call
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.prctl import (
    PR_GET_PDEATHSIG,
    PR_GET_SECUREBITS,
    PR_GET_TID_ADDRESS,
    PR_GET_TIMERSLACK,
)
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.state import Credentials, Rseq, Scheduling, Seccomp, Thread

_STACK_T_SIZE = 24


class Seen(Struct, frozen=True):
    """What can be seen of a thread from outside; the timer slack is not among it."""

    name: bytes
    scheduling: Scheduling


def see(pid: int, tid: int) -> Seen:
    """That of a thread. Raises OSError."""
    name = procfs.read(pid, f"task/{tid}/comm").removesuffix(b"\n")
    return Seen(name, scheduling.collect(tid))


class Question(Struct):
    """Where the answers of one thread will lie."""

    alternate_stack: int
    tid_address: int
    death_signal: int
    securebits: int
    timer_slack: int

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the thread's."""
        stack, address, death = batch.room(_STACK_T_SIZE), batch.room(8), batch.room(4)
        batch.add(call("sigaltstack", 0, stack), "reading the alternate signal stack")
        batch.add(call("prctl", PR_GET_TID_ADDRESS, address), "reading the tid address")
        batch.add(call("prctl", PR_GET_PDEATHSIG, death), "reading the parent-death signal")
        return cls(
            alternate_stack=stack,
            tid_address=address,
            death_signal=death,
            securebits=batch.add(call("prctl", PR_GET_SECUREBITS), "reading the secure bits"),
            timer_slack=batch.add(call("prctl", PR_GET_TIMERSLACK), "reading the timer slack"),
        )

    def answered(
        self,
        answers: Answers,
        look: Seen,
        frozen: FrozenThread,
        seen: Observation | None,
        memory: ProcessMemory,
        tid: int,
    ) -> Thread:
        """Everything of the frozen thread, which is ``tid`` in the state."""
        head, size = _robust_list(frozen.tid)
        return Thread(
            tid=tid,
            name=look.name,
            registers=frozen.registers.pack(),
            xstate=ptrace.get_xstate(frozen.tid),
            signal_mask=frozen.signal_mask,
            pending=ptrace.pending_signals(frozen.tid, shared=False),
            alternate_stack=answers.read(self.alternate_stack, _STACK_T_SIZE),
            tid_address=int.from_bytes(answers.read(self.tid_address, 8), "little"),
            robust_list=head,
            robust_list_size=size,
            rseq=Rseq(frozen.rseq.pointer, frozen.rseq.size, frozen.rseq.signature),
            sleep=sleepers.collect(frozen, seen, memory),
            parent_death_signal=int.from_bytes(answers.read(self.death_signal, 4), "little"),
            credentials=Credentials.from_status(frozen.status, answers.value(self.securebits)),
            seccomp=seccomp.collect(frozen.tid, frozen.status),
            scheduling=replace(look.scheduling, timer_slack=answers.value(self.timer_slack)),
        )


def ended_leader(frozen: Frozen, other: Thread, number: int) -> Thread:
    """What is left of a leader that has ended; as to the rest, it is like ``other``, which goes on."""
    status = procfs.status(frozen.pid, frozen.pid)
    return replace(
        other,
        tid=number,
        name=procfs.read(frozen.pid, "comm").removesuffix(b"\n"),
        pending=[],
        alternate_stack=bytes(_STACK_T_SIZE),
        tid_address=0,
        robust_list=0,
        robust_list_size=0,
        rseq=Rseq(0, 0, 0),
        sleep=None,
        parent_death_signal=0,
        credentials=Credentials.from_status(status, other.credentials.securebits),
        seccomp=Seccomp(0, []),
    )


def end_of_leader(pid: int) -> int:
    """The wait status of a leader that has ended before the other threads."""
    return int(procfs.stat(pid, pid)[52])


def boot_set(frozen: FrozenThread) -> list[int]:
    """Addresses that the thread, or the kernel on its behalf, touches at once when it goes on."""
    stack, tls = frozen.registers["rsp"], frozen.registers["fs_base"]
    places = [stack - 128, stack, stack + PAGE_SIZE, tls]
    if frozen.rseq.pointer:
        places += [frozen.rseq.pointer, frozen.rseq.pointer + frozen.rseq.size]
    return places + sleepers.places(frozen)


def _robust_list(tid: int) -> tuple[int, int]:
    head, size = bytearray(8), bytearray(8)
    what = f"reading the robust list of task {tid}"
    syscall(what, NUMBERS["get_robust_list"], tid, address_of(head), address_of(size))
    return int.from_bytes(head, "little"), int.from_bytes(size, "little")
