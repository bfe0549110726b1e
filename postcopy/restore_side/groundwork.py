"""Groundwork: what is made of a new process before its state is known, and need not be a part of it in the end.

A process gets an executor of its leader, and the layout that its draft says. Where the state says another one, that is
changed; where it cannot be, everything begins anew.
"""

import errno
import os
import resource
from collections.abc import Iterator, Mapping

from postcopy.errors import RestoreError
from postcopy.kernel import procfs, ptrace, tiny_elf
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.executor import CODE_SIZE, Executor, lone_syscall, signal_bit, stop_signal
from postcopy.kernel.page import page_up
from postcopy.restore_side import attributes, birth, memory
from postcopy.state import Memory, Sketch

_PROT_RWX, _MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE = 7, 0x22 | 0x100000
_ALL = 0xFFFF_FFFF_FFFF_FFFF
# Bytes for the calls of a layout, beside what grows with it; and for a state that nobody knows yet.
_FIXED_ROOM, _PER_VMA, _PER_THREAD = 2 << 20, 768, 8192
# Bytes that the executor's memory can grow by, wherever there is a hole that large.
_SPARE = 1 << 40
# And bytes before it, since what lies there may grow: the heap.
_DISTANCE = 1 << 34
# Where a new process has the directory of ``restore``'s descriptors, behind the standard streams; then comes the rest
# of what it is lent.
LENDER_AT = 3


class Groundwork:
    """``arena``: the executor's memory, clear of the old layout and the new; ``spare``: behind it, what is clear, too;
    ``laid_out``: what the process has now."""

    def __init__(self, newborn: birth.Newborn, own: tuple[int, int], inherited: Mapping[str, int]) -> None:
        """``own``: PID and TID as the process sees them; ``inherited``: its descriptors for external resources."""
        self.arena = self.spare = range(0)
        self.laid_out: Memory | None = None
        self._newborn = newborn
        self._own = own
        self._lent = [0, 1, 2, birth.lender_number(), *inherited.values()]
        self._gaps: list[int] = []
        self._at = tiny_elf.SYSCALL_AT

    def fits(self, state: Memory, room: int) -> bool:
        """Whether the layout can be made into that of ``state``, with ``room`` bytes for the executors."""
        if self.laid_out is None or room > len(self.arena) or not memory.fits(self.laid_out, state):
            return False
        return _is_clear(self.arena, state)

    def can_grow(self, state: Memory) -> bool:
        """Whether the arena can be larger than it is, with the layout of ``state``."""
        return bool(self.spare) and _is_clear(self.spare, state)

    def grow(self, size: int, batch: Batch) -> None:
        """Add the call by which the arena becomes ``size`` bytes larger. Raises RestoreError."""
        size = page_up(size)
        if size > len(self.spare):
            raise RestoreError(f"no {size} bytes of address space are free behind the executor")
        arena = range(self.arena.start, self.arena.stop + size)
        batch.add(call("mremap", arena.start, len(self.arena), len(arena), 0), "making room for calls")
        self.arena, self.spare = arena, range(arena.stop, self.spare.stop)

    def lay_out(self, state: Memory, shares_table: bool, room: int) -> Iterator[None]:
        """Make the layout of ``state``, whatever the process has now, and an arena of at least ``room`` bytes.

        ``shares_table``: another process has its descriptor table, and has laid out its own memory. In steps: after
        each the process is busy on its own for a while. Raises RestoreError.
        """
        present = list(procfs.for_each_vma(self._newborn.pid))
        executor = self._install(state, max(room, _room_for(state)), present)
        batch = executor.batch()
        attributes.disable_huge_pages(batch)
        if self.laid_out is None:
            raise_limit(self._newborn.pid, memory.descriptors(state) + 2 * len(self._lent) + max(self._lent) + 8)
            self._take_in_table(shares_table, batch)
        self.clear_table(batch)
        exe = self.laid_out.exe if self.laid_out else ""
        memory.lay_out(state, batch, present, self.arena, self.arena.stop, self.first_fd, exe)
        self.open_gaps(batch)
        executor.start(batch)
        yield
        check(self._newborn.number, executor.finish())
        self.laid_out = state

    @property
    def first_fd(self) -> int:
        """The number from which on no descriptor is open."""
        return len(self._lent)

    def clear_table(self, batch: Batch) -> None:
        """See to it that what is opened next gets `first_fd`: also where ``restore`` lacks a stream, and where another
        process that has the table has left something in it.
        """
        batch.add(call("close_range", self.first_fd, 0xFFFF_FFFF, 0), "clearing the descriptor table")
        for gap in self._gaps:
            batch.add(call("dup3", LENDER_AT, gap, os.O_CLOEXEC), "taking a free descriptor")

    def open_gaps(self, batch: Batch) -> None:
        """Give these numbers back."""
        for gap in self._gaps:
            batch.add(call("close", gap), "giving a descriptor back")

    def _take_in_table(self, is_clear: bool, batch: Batch) -> None:
        """Leave nothing in the descriptor table but what ``restore`` lends, under the lowest numbers."""
        lent, there = self._lent, set(procfs.descriptors(self._newborn.pid))
        if is_clear:
            lent = list(range(len(lent)))
        self._gaps = [number for number, fd in enumerate(lent) if fd not in there]
        if is_clear:
            return
        # By way of numbers that are nobody's: old and new ones overlap.
        high = max(lent) + 1
        for number, fd in enumerate(lent, high):
            batch.add(call("dup3", fd, number, os.O_CLOEXEC))
        batch.add(call("close_range", 0, high - 1, 0), "clearing the descriptor table")
        for number in range(len(lent)):
            batch.add(call("dup3", high + number, number, 0))
        batch.add(call("close_range", len(lent), 0xFFFF_FFFF, 0), "closing what is open for a while")

    def _install(self, state: Memory, size: int, present: list[procfs.MapsLine]) -> Executor:
        """Map the executor's memory, clear of the old layout and the new, and make the leader's executor."""
        tid = self._newborn.pid
        size = page_up(size)
        in_use = [*(range(line.start, line.end) for line in present), *memory.in_use(state)]
        try:
            base = memory.hole(_DISTANCE + size + _SPARE, in_use) + _DISTANCE
            self.spare = range(base + size, base + size + _SPARE)
        except RestoreError:
            base = memory.hole(size + memory.STAGING_SIZE, in_use)
            self.spare = range(0)
        made = call("mmap", base, size, _PROT_RWX, _MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE, _ALL, 0)
        result = lone_syscall(tid, self._at, made)
        if result != base:
            raise RestoreError(f"mapping the executor: {errno.errorcode.get(-result, result)}")
        self.arena = range(base, base + size)
        executor = Executor(tid, self._newborn.memory, base, size, stop_signal(0, 0), self._own)
        executor.install(0, ptrace.get_registers(tid))
        ptrace.set_signal_mask(tid, _ALL & ~signal_bit(stop_signal(0, 0)))
        self._at = executor.syscall_at
        return executor


def _is_clear(area: range, state: Memory) -> bool:
    return all(r.stop <= area.start or r.start >= area.stop for r in memory.in_use(state))


def raise_limit(pid: int, wanted: int) -> int:
    """Raise the limit of descriptors of a new process to what building it takes, or to the hard limit where that is
    higher, or all that can be had; the program's own is set in the end. How many it may have now."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    most = min(max(wanted, hard), procfs.most_descriptors())
    try:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (most, most))
    except (PermissionError, ValueError):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return most


def check(pid: int, answers: Answers) -> Answers:
    """Raises RestoreError where a call of process ``pid`` that had to succeed was refused."""
    for made, purpose, number in answers.refusals():
        name = errno.errorcode.get(number, str(number))
        raise RestoreError(f"process {pid}: {purpose}: {made.name} was refused with {name}")
    return answers


def room_for_state(sketch: Sketch) -> int:
    """Bytes that will do for the executors of most processes."""
    return _room_for(sketch.memory) + _PER_THREAD * sketch.threads


def _room_for(state: Memory) -> int:
    """Bytes that the calls of a layout take."""
    paths = sum(len(file.path) for file in state.files) + len(state.exe) + len(state.auxv)
    return CODE_SIZE + _FIXED_ROOM + _PER_VMA * len(state.vmas) + 4 * paths
