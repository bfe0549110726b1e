"""Sets of pages as sorted, disjoint ranges: what is lazy, what is to be sent, what has arrived."""

import functools
import sys
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from operator import sub
from struct import Struct
from typing import NamedTuple

from postcopy.errors import ProtocolError
from postcopy.kernel.page import ADDRESS_LIMIT, PAGE_SHIFT, PAGE_SIZE

_COUNT = Struct("<Q")
_SMALL = 1 << 14  # bytes
_FEW = 8  # times as many ranges as others


class PageRange(NamedTuple):
    """The pages from ``start`` up to, not including, ``end``; both are page-aligned addresses."""

    start: int
    end: int

    @property
    def pages(self) -> int:
        """How many pages the range has."""
        return (self.end - self.start) >> PAGE_SHIFT


class PageRanges:
    """An immutable set of pages: 24 bytes a range, however long the range is.

    The pages are numbered in the order of their addresses. Such a number is called the *ordinal* of a page: tables
    with an entry for each page are indexed by it, so that they need no room for the holes between the ranges.
    """

    __slots__ = ("_ends", "_firsts", "_starts", "_total")

    def __init__(self) -> None:
        """The empty set; see `from_pairs`."""
        self._starts = array("Q")
        self._ends = array("Q")
        self._firsts = array("Q")
        self._total = 0

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[int, int]]) -> "PageRanges":
        """The union of half-open (start, end) ranges in any order; empty ones are left out.

        Raises ValueError when an address is misaligned, negative or past the end of user addresses, or when a range
        ends before it starts.
        """
        starts: list[int] = []
        ends: list[int] = []
        last = -1
        for start, end in sorted(pairs):
            if (start | end) % PAGE_SIZE or not 0 <= start <= end <= ADDRESS_LIMIT:
                raise ValueError(f"not a range of pages: {start:#x}-{end:#x}")
            if start == end:
                continue
            if start > last:
                starts.append(start)
                ends.append(end)
                last = end
            elif end > last:
                ends[-1] = last = end
        return cls._of(starts, ends)

    @classmethod
    def _of(cls, starts: Iterable[int], ends: Iterable[int]) -> "PageRanges":
        """Of ranges that are in order, not empty, and do not touch."""
        made = cls()
        made._starts, made._ends = array("Q", starts), array("Q", ends)
        sizes = map(sub, made._ends, made._starts)
        made._firsts = array("Q", accumulate((size >> PAGE_SHIFT for size in sizes), initial=0))
        made._total = made._firsts.pop()
        return made

    @property
    def total_pages(self) -> int:
        """How many pages all ranges have together."""
        return self._total

    def __len__(self) -> int:
        """How many ranges there are."""
        return len(self._starts)

    def __iter__(self) -> Iterator[PageRange]:
        """The ranges in the order of their addresses."""
        return map(PageRange, self._starts, self._ends)

    def __eq__(self, other: object) -> bool:
        """Whether both have the same pages."""
        return isinstance(other, PageRanges) and self._starts == other._starts and self._ends == other._ends

    def __hash__(self) -> int:
        """Equal sets have equal hashes."""
        return hash((self._starts.tobytes(), self._ends.tobytes()))

    def __repr__(self) -> str:
        """The ranges as /proc/PID/maps writes them."""
        return f"PageRanges({', '.join(f'{each.start:#x}-{each.end:#x}' for each in self)})"

    def contains(self, address: int) -> bool:
        """Whether the page that ``address`` is in belongs to the set."""
        at = bisect_right(self._starts, address) - 1
        return at >= 0 and address < self._ends[at]

    def ordinal(self, address: int) -> int:
        """The ordinal of the page that ``address`` is in, or -1 when it is not in the set."""
        at = bisect_right(self._starts, address) - 1
        if at < 0 or address >= self._ends[at]:
            return -1
        return self._firsts[at] + ((address - self._starts[at]) >> PAGE_SHIFT)

    def address(self, ordinal: int) -> int:
        """The address of the page with this ordinal, which must be one of the set's."""
        at = bisect_right(self._firsts, ordinal) - 1
        return self._starts[at] + ((ordinal - self._firsts[at]) << PAGE_SHIFT)

    def stretch(self, ordinal: int, most: int) -> int:
        """How many pages, ``most`` at the most, follow each other without a hole from the page ``ordinal`` on."""
        at = bisect_right(self._firsts, ordinal)
        until = self._firsts[at] if at < len(self._firsts) else self._total
        return min(most, until - ordinal)

    def stretches(self, ordinal: int, count: int) -> Iterator[PageRange]:
        """The pages with ordinals from ``ordinal`` up to ``ordinal + count`` as ranges."""
        until = min(ordinal + count, self._total)
        while ordinal < until:
            pages = self.stretch(ordinal, until - ordinal)
            start = self.address(ordinal)
            yield PageRange(start, start + (pages << PAGE_SHIFT))
            ordinal += pages

    def overlapping(self, start: int, end: int) -> Iterator[tuple[PageRange, int]]:
        """The parts of the ranges that lie within start-end, each with the ordinal of its first page."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        while at < len(self._starts) and self._starts[at] < end:
            low = max(self._starts[at], start)
            high = min(self._ends[at], end)
            if low < high:
                yield PageRange(low, high), self._firsts[at] + ((low - self._starts[at]) >> PAGE_SHIFT)
            at += 1

    def clip(self, start: int, end: int) -> "PageRanges":
        """The pages of the set that lie within start-end."""
        parts = [part for part, _ in self.overlapping(start, end)]
        return PageRanges._of((part.start for part in parts), (part.end for part in parts))

    def subtract(self, other: "PageRanges") -> "PageRanges":
        """The pages of this set that ``other`` has not."""
        if len(other) * _FEW < len(self):
            return self._without_few(other)
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for each in self:
            start = each.start
            at = bisect_right(other._ends, start, at)
            while at < len(other) and other._starts[at] < each.end:
                if start < other._starts[at]:
                    starts.append(start)
                    ends.append(other._starts[at])
                start = other._ends[at]
                if start >= each.end:
                    break
                at += 1
            if start < each.end:
                starts.append(start)
                ends.append(each.end)
        return PageRanges._of(starts, ends)

    def _without_few(self, other: "PageRanges") -> "PageRanges":
        """The same, in a time that grows with the ranges of ``other`` alone."""
        starts, ends = self._starts[:], self._ends[:]
        for start, end in zip(other._starts, other._ends, strict=True):
            first, last = bisect_right(ends, start), bisect_left(starts, end)
            if first < last:
                rest = [(starts[first], start)] if starts[first] < start else []
                rest += [(end, ends[last - 1])] if end < ends[last - 1] else []
                starts[first:last] = array("Q", (low for low, _ in rest))
                ends[first:last] = array("Q", (high for _, high in rest))
        return PageRanges._of(starts, ends)

    def union(self, other: "PageRanges") -> "PageRanges":
        """The pages of both sets."""
        return PageRanges.from_pairs([*self, *other])

    def pack(self) -> bytes:
        """The set as bytes: a count, the starts, the ends; all of them little-endian 64-bit numbers."""
        starts, ends = self._starts, self._ends
        if sys.byteorder == "big":
            starts, ends = array("Q", starts), array("Q", ends)
            starts.byteswap()
            ends.byteswap()
        return _COUNT.pack(len(self)) + starts.tobytes() + ends.tobytes()

    @classmethod
    def unpack(cls, packed: bytes) -> "PageRanges":
        """What `pack` made. Raises ProtocolError when it cannot have come from there."""
        return _unpack_again(packed) if len(packed) <= _SMALL else cls._unpack(packed)

    @classmethod
    def _unpack(cls, packed: bytes) -> "PageRanges":
        if len(packed) < _COUNT.size:
            raise ProtocolError(f"page ranges of {len(packed)} bytes have no count")
        (count,) = _COUNT.unpack_from(packed)
        if len(packed) != _COUNT.size + 16 * count:
            raise ProtocolError(f"{count} page ranges cannot have {len(packed)} bytes")
        bounds = array("Q")
        bounds.frombytes(packed[_COUNT.size :])
        if sys.byteorder == "big":
            bounds.byteswap()
        starts, ends = bounds[:count], bounds[count:]
        last = -1
        for start, end in zip(starts, ends, strict=True):
            if (start | end) % PAGE_SIZE:
                raise ProtocolError(f"page range {start:#x}-{end:#x} is misaligned")
            if not last < start < end <= ADDRESS_LIMIT:
                raise ProtocolError(f"page range {start:#x}-{end:#x} is empty, out of order or no user memory")
            last = end
        return cls._of(starts, ends)


@functools.lru_cache(maxsize=1024)
def _unpack_again(packed: bytes) -> PageRanges:
    """The sets of a process are asked for again and again while it is checked and built."""
    return PageRanges._unpack(packed)
