"""Memory of ours in a frozen process, with an executor for each of its threads."""

import errno
import os
from types import TracebackType
from typing import Self

from postcopy.dump_side.freeze import Frozen
from postcopy.errors import DumpError
from postcopy.kernel import ptrace
from postcopy.kernel.batch import Answers
from postcopy.kernel.calls import Call, call
from postcopy.kernel.executor import ALL_SIGNALS, CODE_SIZE, Executor, SingleCall, signal_bit
from postcopy.kernel.page import PAGE_SIZE, page_up
from postcopy.kernel.vdso import slack

_LEADER_ROOM = 256 * 1024
_THREAD_ROOM = PAGE_SIZE
_PROT_RWX, _MAP_PRIVATE_ANONYMOUS = 7, 0x22


class Arena:
    """The memory and the executors. It is got, and given back, in two steps each: in between the process is busy on
    its own. Leaving the scope does what is left of them.

    The stub's first and last call, which get and give back the memory, are made from the vdso's unused tail, so that a
    thread left alone at any moment heals.
    """

    def __init__(self, frozen: Frozen, vdso: range) -> None:
        """``vdso``: its addresses in the process. Raises DumpError where it has no room for the stub."""
        tail = slack(frozen.memory.read(vdso.start, len(vdso)))
        if len(tail) < CODE_SIZE:
            raise DumpError(f"the vdso of process {frozen.pid} has no room for the executor")
        self.frozen = frozen
        self.range = range(0)
        self.executors: list[Executor] = []
        self._size = page_up(_LEADER_ROOM + _THREAD_ROOM * (len(frozen.threads) - 1))
        self._stub = vdso.start + tail.start
        self._covered = frozen.memory.read(self._stub, CODE_SIZE)
        leader = frozen.threads[0]
        self._single = SingleCall(leader.tid, self._stub, leader.stop, leader.inner)
        self._made: Call | None = None

    def __enter__(self) -> Self:
        """Ask for the memory; `arrive` waits for it."""
        frozen, leader = self.frozen, self.frozen.threads[0]
        frozen.memory.write(self._stub, self._single.stub(leader.signal_mask, leader.registers))
        ptrace.set_registers(leader.tid, self._single.healing(leader.registers))
        # First the registers, then the mask: a thread left alone in between heals and takes its mask back.
        ptrace.set_signal_mask(leader.tid, ALL_SIGNALS & ~signal_bit(leader.stop))
        self._begin(call("mmap", 0, self._size, _PROT_RWX, _MAP_PRIVATE_ANONYMOUS, ALL_SIGNALS, 0))
        return self

    def arrive(self) -> list[Executor]:
        """The executors, in the order of the threads. Raises DumpError where the process has no room for them."""
        frozen = self.frozen
        try:
            base = self._result()
        except DumpError as error:
            raise DumpError(
                f"process {frozen.pid} has no room for {self._size} bytes that the dump needs in it: {error.message}",
                "raise its limits with prlimit(1): --as, --data, --memlock; or vm.max_map_count",
            ) from None
        self.range = range(base, base + self._size)
        for number, thread in enumerate(frozen.threads):
            room = _THREAD_ROOM if number else _LEADER_ROOM
            executor = Executor(thread.tid, frozen.memory, base, room, thread.stop, thread.inner)
            executor.install(thread.signal_mask, thread.registers)
            self.executors.append(executor)
            base += room
            ptrace.set_registers(thread.tid, executor.healing(thread.registers))
            ptrace.set_signal_mask(thread.tid, ALL_SIGNALS & ~signal_bit(thread.stop))
        return self.executors

    def leave(self) -> None:
        """Begin to give the memory back; the end of the scope waits for it."""
        for thread in self.frozen.threads[1:]:
            ptrace.set_signal_mask(thread.tid, thread.signal_mask)
            ptrace.set_registers(thread.tid, thread.registers)
        if self.range:
            self._begin(call("munmap", self.range.start, self._size))
            self.range = range(0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Every thread stands as before, and the memory is gone."""
        frozen, leader = self.frozen, self.frozen.threads[0]
        try:
            if self._made is not None and self._made.name == "mmap":
                self.arrive()
            for executor in self.executors:
                if executor.is_running:
                    executor.finish()
            self.leave()
            if self._made is not None:
                self._result()
        finally:
            ptrace.set_signal_mask(leader.tid, leader.signal_mask)
            ptrace.set_registers(leader.tid, leader.registers)
            frozen.memory.write(self._stub, self._covered)
            for number in (*self._single.swallowed, *(number for each in self.executors for number in each.swallowed)):
                os.kill(frozen.pid, number)

    def _begin(self, made: Call) -> None:
        self._single.begin(made)
        self._made = made

    def _result(self) -> int:
        made = self._made
        result = self._single.finish()
        self._made = None
        if -4096 < result < 0:
            raise DumpError(f"{made} in process {self.frozen.pid}: {errno.errorcode.get(-result, -result)}")
        return result


def accepted(who: str, answers: Answers) -> Answers:
    """The answers of ``who``, none of which is an error that has a purpose. Raises DumpError."""
    for made, purpose, number in answers.refusals():
        raise DumpError(f"{who}: {purpose}: {made} was refused with errno {number}")
    return answers
