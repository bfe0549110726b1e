"""Lazy hugetlb memory: which it is, and the pages of it, which can be filled only whole."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from postcopy.page_ranges import PageRange, PageRanges
from postcopy.state import SharedMemory, Vma

# 32 MiB: what is still to be had in one piece by somebody who waits for it, and held twice while it arrives.
_MOST_SHIFT = 25


def is_lazy(vma: Vma) -> bool:
    """Whether private memory is hugetlb memory that follows lazily.

    Pages that nothing is reserved for may not be there any more when they are to be filled.
    """
    return vma.backing == "huge" and vma.huge_shift <= _MOST_SHIFT and "nr" not in vma.flags


def is_lazy_object(memory: SharedMemory) -> bool:
    """The same for memory with an identity: only what nobody can read but by mappings."""
    return memory.kind == "huge" and memory.huge_shift <= _MOST_SHIFT and memory.reserved


class HugeArea(NamedTuple):
    """The memory of start-end has pages of 2 to the power of ``shift`` bytes."""

    start: int
    end: int
    shift: int


class HugeAreas:
    """All lazy hugetlb memory of one space, by addresses at the source."""

    def __init__(self, areas: Iterable[HugeArea]) -> None:
        """``areas``: in any order, none in another."""
        self.areas = sorted(areas)
        self._starts = [each.start for each in self.areas]

    def page(self, address: int) -> PageRange | None:
        """The huge page that ``address`` is in."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self.areas[at].end:
            return None
        size = 1 << self.areas[at].shift
        return PageRange(address & -size, (address & -size) + size)

    def of(self, pages: PageRanges) -> PageRanges:
        """Those pages that are in it."""
        return pages.subtract(pages.subtract(PageRanges.from_pairs((each.start, each.end) for each in self.areas)))

    def overlap(self, start: int, end: int) -> bool:
        """Whether any of start-end is in a huge page."""
        return any(huge for _, huge in self.parts(start, end))

    def parts(self, start: int, end: int) -> Iterator[tuple[PageRange, PageRange | None]]:
        """start-end in pieces, each with the huge page that it is in, or part of."""
        while start < end:
            huge = self.page(start)
            if huge is None:
                at = bisect_right(self._starts, start)
                until = min(end, self._starts[at]) if at < len(self._starts) else end
            else:
                until = min(end, huge.end)
            yield PageRange(start, until), huge
            start = until
