"""Shared memory that is being filled: each once, by a mapping of ours, whoever waits for its pages and wherever.

A page that is put into shared memory is there for all who map it, but only those are woken who wait in the userfaultfd
that it was put in by. So it is put in by a userfaultfd and a mapping of our own, which no change of the program's
layout disturbs, and who waits is remembered and woken.
"""

import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct

from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.libc import address_of, memory_at
from postcopy.kernel.page import PAGE_SIZE, page_up
from postcopy.page_ranges import PageRanges
from postcopy.restore_side.hole_lock import HoleLock
from postcopy.restore_side.hole_watch import Doubts
from postcopy.restore_side.residency import AddressSpace

if TYPE_CHECKING:
    from postcopy.restore_side.filling import Mm

# Bytes: how much of what we have filled may count as ours too (VmRSS).
_MOST_MAPPED = 8 << 20


class HandedObject(Struct, frozen=True):
    """Shared memory to fill: its number at the source, a descriptor of it, its size (bytes), the pages that it lacks.

    ``first``: the tree does not run before it is complete. ``huge_shift``: of hugetlb memory.
    """

    space: int
    fd: int
    size: int
    lazy: PageRanges
    first: bool
    huge_shift: int = 0


class Part(NamedTuple):
    """A mapping, or what is left of it: the shared memory ``space`` from ``offset`` on is at start-end."""

    start: int
    end: int
    space: int
    offset: int


class Parts:
    """Where shared memory is in one address space. A hint: what the kernel does not tell in time makes it wrong.

    Nothing is lost where it is wrong, see `FaultHandler`.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = list(parts)

    def fork(self) -> "Parts":
        """Those of a child."""
        return Parts(self._parts)

    def at(self, address: int) -> Part | None:
        """The part that ``address`` is in."""
        return next((each for each in self._parts if each.start <= address < each.end), None)

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any of it is in start-end."""
        return any(True for _ in self.within(start, end))

    def unmap(self, start: int, end: int) -> None:
        """start-end is no longer mapped."""
        kept = []
        for each in self._parts:
            if each.start < min(start, each.end):
                kept.append(each._replace(end=min(start, each.end)))
            if each.end > max(end, each.start):
                low = max(end, each.start)
                kept.append(each._replace(start=low, offset=each.offset + low - each.start))
        self._parts = kept

    def remap(self, old: int, new: int, length: int) -> None:
        """mremap(2) has moved ``length`` bytes; 0: it has mapped the same again, nobody says how much of it."""
        moved = list(self.within(old, old + length if length else 1 << 63))
        if not length:
            moved = [each for each in moved if each.start == old][:1]
        else:
            self.unmap(old, old + length)
        if moved:
            self.unmap(new, new + moved[-1].end - old)
        self._parts += [each._replace(start=each.start - old + new, end=each.end - old + new) for each in moved]

    def within(self, start: int, end: int) -> Iterator[Part]:
        """What of it is in start-end."""
        for each in self._parts:
            low = max(each.start, start)
            if low < min(each.end, end):
                yield Part(low, min(each.end, end), each.space, each.offset + low - each.start)


def never_written(size: int) -> mmap.mmap:
    """Zeros that take no memory: to read private memory that was never written makes no pages."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class SharedObject:
    """Shared memory that lacks pages; the addresses of its residency are offsets."""

    # As `Mm` has it: nothing that the program does keeps us from filling.
    stalled_since = 0
    stuck = False

    def __init__(self, handed: HandedObject, uffd: int) -> None:
        self.handed, self.uffd = handed, uffd
        # Who waits for which page: offset -> address spaces, and where in them.
        self.waiting: dict[int, list[tuple[Mm, int]]] = {}
        self.streams: dict[int, int] = {}
        self.is_huge = bool(self.handed.huge_shift) and not self.handed.first
        self.page_size = 1 << self.handed.huge_shift if self.is_huge else PAGE_SIZE
        self._zeros = never_written(self.page_size) if self.is_huge else None
        self.residency = AddressSpace(self.handed.space, self.handed.lazy)
        self._mapping = mmap.mmap(self.handed.fd, self.handed.size)
        self._at = address_of(self._mapping)
        self._mapped = 0
        self.open = True
        self.lock: HoleLock | None = None
        # Of hugetlb memory: the number of the watch, and what may be about to be dropped.
        self.watch = -1
        self.doubts = Doubts()
        if not self.handed.first:
            uffdio.register(self.uffd, self._at, page_up(self.handed.size), uffdio.UFFDIO_REGISTER_MODE_MISSING)

    def copy(self, offset: int, data: int, length: int) -> int:
        """UFFDIO_COPY to ``offset``; gives the bytes copied."""
        if self.handed.first:
            # Copied pages of private mappings, which came with the state, have brought some of its pages already.
            until = min(offset + length, self.handed.size)
            self._mapping[offset:until] = memory_at(data, until - offset)
            done = length
        else:
            done = uffdio.copy(self.uffd, self._at + offset, data, length)
        self._mapped += done
        if self._mapped > _MOST_MAPPED and not self.handed.huge_shift:
            self._mapped = 0
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return done

    def zero(self, offset: int) -> bool:
        """Put a page of zeros where there is none; whether there was none."""
        if offset >= page_up(self.handed.size):
            return False
        try:
            if self._zeros is not None:
                # For hugetlb memory there is no UFFDIO_ZEROPAGE.
                uffdio.copy(self.uffd, self._at + (offset & -self.page_size), address_of(self._zeros), self.page_size)
            else:
                uffdio.zeropage(self.uffd, self._at + offset, PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
            return False
        return True

    def wait(self, offset: int, mm: "Mm", address: int) -> None:
        """A thread of ``mm`` waits at ``address`` for the page at ``offset``."""
        self.waiting.setdefault(offset, []).append((mm, address))

    def wake(self, start: int, end: int) -> None:
        """The pages of start-end are there."""
        for offset in [each for each in self.waiting if start <= each < end]:
            for mm, address in self.waiting.pop(offset):
                if not mm.gone:
                    uffdio.wake(mm.uffd, address, PAGE_SIZE)

    def close(self) -> None:
        """It is complete, or nobody is left who could read it."""
        self.open = False
        self._mapping.close()
        if self.lock is not None:
            self.lock.release()
        os.close(self.handed.fd)
