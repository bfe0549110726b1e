"""What the destination knows of each lazy page: absent, requested, present, removed. No I/O.

A page keeps its number for life: its ordinal in the lazy ranges of the address space it comes from. The residency is a
byte for each ordinal; where the page is now is kept apart, in segments, so that mremap(2) moves a few numbers and no
bytes, and a page that is on its way is recognised wherever it has been moved to.
"""

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.page_ranges import PageRanges

ABSENT, REQUESTED, PRESENT, REMOVED = range(4)

_missing = re.compile(b"[\x00\x01]+").finditer
_absent = re.compile(b"\x00+").match

# Above all user addresses: where pages are kept whose place is taken before the event that says where they went.
_SHADOW = 1 << 62


class Run(NamedTuple):
    """Pages that are missing, with neighbouring ordinals and at neighbouring current addresses."""

    address: int
    ordinal: int
    pages: int


class _Places:
    """A set of addresses as ranges that do not overlap, in order; adjacent ones stay apart."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        pairs = sorted(ranges)
        self._starts = [start for start, _ in pairs]
        self._ends = [end for _, end in pairs]

    def copy(self) -> "_Places":
        return _Places(zip(self._starts, self._ends, strict=True))

    def cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take start-end out; what of it was in the set."""
        low, high = self._span(start, end)
        found = self.within(start, end)
        left = [(first, start) for first in self._starts[low : low + 1] if found and first < start]
        left += [(end, last) for last in self._ends[high - 1 : high] if found and last > end]
        self._starts[low:high] = [first for first, _ in left]
        self._ends[low:high] = [last for _, last in left]
        return found

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """What of start-end is in the set."""
        low, high = self._span(start, end)
        found = zip(self._starts[low:high], self._ends[low:high], strict=True)
        return [(max(first, start), min(last, end)) for first, last in found]

    def has(self, address: int) -> bool:
        """Whether ``address`` is in the set."""
        return bool(self.within(address, address + 1))

    def _span(self, start: int, end: int) -> tuple[int, int]:
        return bisect_right(self._ends, start), bisect_left(self._starts, end)

    def add(self, start: int, end: int) -> None:
        self.cut(start, end)
        at = bisect_left(self._starts, start)
        self._starts.insert(at, start)
        self._ends.insert(at, end)

    def clear(self) -> None:
        self._starts.clear()
        self._ends.clear()


class AddressSpace:
    """The lazy pages of one mm.

    ``source`` is the address space that they come from, the same for every descendant by fork. Every page that is
    absent or requested lies in exactly one segment; a page outside of all segments has been unmapped and is removed.
    """

    def __init__(self, source: int, lazy: PageRanges, registered: PageRanges | None = None) -> None:
        """All pages of ``lazy`` are absent, and at the address where they were at the source.

        ``registered``: what the userfaultfd has in its hands, pages or not; ``lazy`` and nothing else, if not given.
        """
        self.source = source
        self.lazy = lazy
        self.states = bytearray(lazy.total_pages)
        # How many pages are absent or requested.
        self.absent_pages = lazy.total_pages
        # Segments in the order of their current addresses, and again in the order of their ordinals.
        self._starts = array("Q")
        self._pages = array("Q")
        self._ordinals = array("Q")
        for each, ordinal in lazy.overlapping(0, 1 << 63):
            self._starts.append(each.start)
            self._pages.append(each.pages)
            self._ordinals.append(ordinal)
        self._by_ordinal = self._ordinals[:]
        self._by_ordinal_pages = self._pages[:]
        self._by_ordinal_start = self._starts[:]
        # What is registered, as far as it is told: that a mapping has grown where it is, nobody tells.
        self._registered = _Places((each.start, each.end) for each in (lazy if registered is None else registered))
        # Ranges that mremap has emptied and whose unmap event is still to come, oldest first; where they have gone.
        self._vacated: dict[tuple[int, int], int] = {}
        # Where pages were moved to before it was told that what had been there has left; its pages are in the shadow.
        self._overtaken = _Places()
        # What has come by moves since the last proof that nothing is due, and what of it may have been unmapped again.
        self._arrived = _Places()
        self._doubtful = _Places()
        # Doubtful places, and where else their pages may have gone by the move that spared them.
        self._elsewhere: list[tuple[int, int, int]] = []
        # Moves since the last proof that nothing is due.
        self._moves: list[tuple[int, int, int]] = []
        # Whether an event may be due that is older than one that has been applied; see `settle`.
        self.unsettled = False

    def fork(self) -> "AddressSpace":
        """The address space of a child, with residency of its own."""
        child = AddressSpace.__new__(AddressSpace)
        child.source = self.source
        child.lazy = self.lazy
        child.states = self.states[:]
        child.absent_pages = self.absent_pages
        child._starts = self._starts[:]
        child._pages = self._pages[:]
        child._ordinals = self._ordinals[:]
        child._by_ordinal = self._by_ordinal[:]
        child._by_ordinal_pages = self._by_ordinal_pages[:]
        child._by_ordinal_start = self._by_ordinal_start[:]
        child._registered = self._registered.copy()
        child._vacated = self._vacated.copy()
        child._overtaken = self._overtaken.copy()
        child._arrived = self._arrived.copy()
        child._doubtful = self._doubtful.copy()
        child._elsewhere = self._elsewhere[:]
        child._moves = self._moves[:]
        child.unsettled = self.unsettled
        return child

    def born(self, later: Iterable[tuple[int, int, int]], registered: Callable[[int], bool]) -> None:
        """Of the changes that its parent has made about the time of the fork, a child has those from before it.

        ``later``: the parent's events between that of the fork and the proof that no older one is due, as the arguments
        of `remap`; an unmapping as start, end, 0. ``registered``: whether an address was, in the child, at its birth.

        That tells for each move whether it is here, unless both of its places were registered before it and after it,
        as by a mapping that has grown into what was left. Of an unmapping nothing is lost that is done before the fork
        and told after it. One that is done after it and told before it, or an MADV_DONTNEED, takes its missing pages
        from the child too: of these nobody tells.
        """
        known = self._registered
        for number, (old, new, length) in reversed(list(enumerate(self._moves))):
            # Told before the fork, but done after it: the child has it where it was before, or before that.
            undone = not registered(new) and self._was_before(old, number, registered)
            if undone and known.has(new) and not known.has(old) and not self._doubtful.has(new):
                for address, ordinal, pages in self._take(new, new + length):
                    self._insert(address - new + old, ordinal, pages)
                known.add(old, old + length)
        for first, second, length in later:
            if length:
                # What has grown into the place that is left has come from one side.
                left = not registered(first) or not registered(first + length - PAGE_SIZE)
                if registered(second) and (not known.has(second) or (left and known.has(first))):
                    self.remap(first, second, length)
            elif (first, second) in self._vacated:
                self.unmap(first, second)
            elif registered(first):
                known.add(first, second)

    def _was_before(self, place: int, moves: int, registered: Callable[[int], bool]) -> bool:
        """Whether a place is registered, or one where the first so many moves have taken it from."""
        for old, new, length in reversed(self._moves[:moves]):
            if registered(place):
                return True
            if new <= place < new + length:
                place += old - new
        return registered(place)

    def give_up(self, places: Iterable[tuple[int, int]]) -> None:
        """Nothing is, nor comes to, where a child has no memory: of that, too, nobody tells (MADV_DONTFORK)."""
        for start, end in places:
            for _, ordinal, pages in self._take(start, end):
                self.mark(ordinal, pages, REMOVED)

    def missing(self) -> Iterator[Run]:
        """Where all missing pages are now, as maximal runs; neither layout nor residency may change meanwhile."""
        return self._runs(_missing(self.states))

    def lookup(self, address: int) -> int:
        """The ordinal of the page that is at ``address`` now, or -1 when no lazy page is."""
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return -1
        offset = (address - self._starts[at]) >> PAGE_SHIFT
        return self._ordinals[at] + offset if offset < self._pages[at] else -1

    def source_address(self, ordinal: int) -> int:
        """Where the page was at the source."""
        return self.lazy.address(ordinal)

    def window(self, ordinal: int, most: int) -> int:
        """How many pages, ``most`` at the most, can be asked for at once from the absent page ``ordinal`` on.

        They are absent, follow each other at the source, and still do so here.
        """
        at = bisect_right(self._by_ordinal, ordinal) - 1
        segment_end = self._by_ordinal[at] + self._by_ordinal_pages[at]
        most = min(self.lazy.stretch(ordinal, most), segment_end - ordinal)
        found = _absent(self.states, ordinal, ordinal + most)
        return found.end() - ordinal if found else 0

    def next_absent(self, ordinal: int = 0) -> int:
        """The first absent page from ``ordinal`` on, or -1."""
        return self.states.find(ABSENT, ordinal)

    def mark(self, ordinal: int, pages: int, state: int) -> None:
        """Set the residency of pages with neighbouring ordinals."""
        states = self.states
        if pages == 1:
            before = states[ordinal]
            states[ordinal] = state
            self.absent_pages += (state <= REQUESTED) - (before <= REQUESTED)
            return
        end = ordinal + pages
        missing = states.count(ABSENT, ordinal, end) + states.count(REQUESTED, ordinal, end)
        states[ordinal:end] = bytes((state,)) * pages
        self.absent_pages += (pages if state <= REQUESTED else 0) - missing

    def missing_runs(self, address: int, pages: int) -> Iterator[Run]:
        """Where the missing pages (absent or requested) of a range of the source are now, as maximal runs.

        The range is given by its address at the source. Runs are found one by one: the residency may change between
        two of them, the layout must not.
        """
        for part, first in self.lazy.overlapping(address, address + (pages << PAGE_SHIFT)):
            yield from self._runs(list(_missing(self.states, first, first + part.pages)))

    def _runs(self, found_missing: Iterable[re.Match[bytes]]) -> Iterator[Run]:
        for found in found_missing:
            ordinal, end = found.span()
            at = bisect_right(self._by_ordinal, ordinal) - 1
            while ordinal < end:
                offset = ordinal - self._by_ordinal[at]
                length = min(self._by_ordinal_pages[at] - offset, end - ordinal)
                yield Run(self._by_ordinal_start[at] + (offset << PAGE_SHIFT), ordinal, length)
                ordinal += length
                at += 1

    def remove(self, start: int, end: int) -> None:
        """The pages that are at start-end now are dropped (MADV_DONTNEED): zero from now on."""
        for _, ordinal, pages in self._overlapping(start, end):
            self.mark(ordinal, pages, REMOVED)

    def unmap(self, start: int, end: int) -> None:
        """start-end has been unmapped, perhaps before the last events applied; see `settle`."""
        if (start, end) in self._vacated:
            del self._vacated[start, end]
            return
        arrived = self._arrived.within(start, end)
        overtaken = self._overtaken.within(start, end)
        if len(arrived) == 1 and self._is_all(arrived, start, end) and not self._fresh(start, end):
            arrived = []
        for _, ordinal, pages in self._meant(start, end, arrived):
            self.mark(ordinal, pages, REMOVED)
        for place in arrived:
            self._doubtful.add(*place)
        for place in overtaken:
            self._doubtful.cut(*place)

    def remap(self, old: int, new: int, length: int) -> None:
        """``length`` bytes have been moved from ``old`` to ``new``, perhaps before the last events applied."""
        fresh = self._fresh(old, old + length)
        younger = _Places([] if self._is_all(fresh, old, old + length) else fresh)
        for place in self._overtaken.within(old, old + length):
            younger.add(*place)
        moved = self._meant(old, old + length, younger.within(old, old + length))
        for place in self._doubtful.within(new, new + length):
            self._leave(*place)
        self._elsewhere = [
            (start, end, at - old + new if old <= at < old + length else at) for start, end, at in self._elsewhere
        ]
        for start, end in younger.within(old, old + length):
            if self._arrived.within(start, end):
                self._doubtful.add(start, end)
                self._elsewhere.append((start, end, start - old + new))
        for start, end in self._registered.cut(new, new + length):
            overtaken = self._cut(start, end)
            self._drop(start + _SHADOW, end + _SHADOW)
            for address, ordinal, pages in overtaken:
                self._insert(address + _SHADOW, ordinal, pages)
            self._overtaken.add(start, end)
        for address, ordinal, pages in moved:
            self._insert(address - old + new, ordinal, pages)
        self._registered.add(new, new + length)
        self._arrived.add(new, new + length)
        self._vacated[old, old + length] = new
        self._moves.append((old, new, length))
        self.unsettled = True

    @property
    def doubtful(self) -> list[tuple[int, int]]:
        """Where `settle` must be told whether anything is still registered; of each range either all is or nothing."""
        return self._doubtful.within(0, _SHADOW)

    def settle(self, gone: Iterable[tuple[int, int]] = ()) -> None:
        """Every layout change that the kernel has begun has been applied: what is expected now will not come.

        ``gone``: those of the `doubtful` ranges that are not registered any more.

        The kernel changes the layout first and tells of it when the lock is free again: another thread may have
        changed it once more by then, and even told so. So events about one place can come in the wrong order, and what
        they mean follows from these rules:

        1. A plain mremap(2) tells of the move and then, when that has been read, of the unmapping of the old range.
           By then others may have moved pages there, which must stay: the unmap event of exactly the range that was
           left is ignored, once. If it is that of a later munmap(2) instead, the other is still to come and means the
           same; nothing else can have gone there in between without the move onto pages of rule 2.
        2. A move onto memory that is still there, by what we know, is told before the event that says where that
           went: a munmap(2) by another thread, or a move. (An mremap(2) that replaces it itself tells of the
           unmapping first.) Its pages are kept in the shadow; the next event about the place means them, or that there
           were none, and not the pages that have come.
        3. Of some memory nobody knows that it was there: a munmap(2) may leave a hole where there was one, and that a
           mapping has grown where it is, nobody tells. Then a move to there comes before the event that says that it
           has left. So an event about a range with something else in it than one arrival spares what has arrived; as
           does any unmapping while the mremap(2) that it came by is not over (rule 1), since only its own thread knows
           where it has gone. What is spared is doubtful until the kernel can be asked: if it is not registered any
           more, it was unmapped, or has gone elsewhere with the move that spared it. A move onto doubtful pages means
           the same; that they were not, and have been moved on since by yet another event that is overtaken, takes two
           threads that each stand still for the time of a few events, at the same place, between their change and its
           event.
        4. A move by MREMAP_DONTUNMAP never tells of an unmapping, and an expectation that is not met must not hit a
           munmap(2) years later. The kernel counts, per address space, the changes that it has begun and whose events
           have not been read (``mmap_changing`` in fs/userfaultfd.c), before it lets go of the lock that the change
           was made under; with the count above zero every UFFDIO_COPY fails with EAGAIN. One that did not fail is
           proof that no event is due which is older than it: then this is called.

        Until it is proven, an expectation stays: to ignore one unmapping too many costs nothing (a page that is filled
        where nothing is registered is refused with ENOENT), to apply one too many would lose pages.
        """
        for place in gone:
            self._leave(*place)
        self._elsewhere.clear()
        self._vacated.clear()
        self._moves.clear()
        self._overtaken.clear()
        self._arrived.clear()
        self._doubtful.clear()
        self._leave_the_shadow()
        self.unsettled = False

    def _leave_the_shadow(self) -> None:
        if self._starts and self._starts[-1] >= _SHADOW:
            self._drop(_SHADOW, 2 * _SHADOW)

    def _meant(self, start: int, end: int, younger: Iterable[tuple[int, int]]) -> list[Run]:
        """Take the pages that an event about start-end means out of the segments, and what it means of the layout.

        ``younger``: where it does not mean what is there; but it does mean the pages in the shadow.
        """
        meant = [
            Run(address - _SHADOW, ordinal, pages)
            for low, high in self._overtaken.cut(start, end)
            for address, ordinal, pages in self._cut(low + _SHADOW, high + _SHADOW)
        ]
        for low, high in younger:
            meant += self._take(start, low)
            start = high
        return meant + self._take(start, end)

    def _leave(self, start: int, end: int) -> None:
        """What was doubtful at start-end is not there."""
        for address, ordinal, pages in self._take(start, end):
            places = (address - first + at for first, last, at in self._elsewhere if first <= address < last)
            at = next(places, 0)
            if at and not self._overlapping(at, at + (pages << PAGE_SHIFT)):
                self._insert(at, ordinal, pages)
            else:
                self.mark(ordinal, pages, REMOVED)

    def _is_all(self, places: list[tuple[int, int]], start: int, end: int) -> bool:
        """Whether nothing else is in start-end by what we know, nor has been overtaken there."""
        return self._registered.within(start, end) == places and not self._overtaken.within(start, end)

    def _fresh(self, start: int, end: int) -> list[tuple[int, int]]:
        """What has come to start-end by moves that are not over, or that keep what they leave."""
        come = [(new, new + last - first) for (first, last), new in self._vacated.items()]
        return [place for low, high in sorted(come) for place in self._arrived.within(max(low, start), min(high, end))]

    def _take(self, start: int, end: int) -> list[Run]:
        for places in (self._registered, self._arrived, self._doubtful):
            places.cut(start, end)
        return self._cut(start, end)

    def _drop(self, start: int, end: int) -> None:
        for _, ordinal, pages in self._cut(start, end):
            self.mark(ordinal, pages, REMOVED)

    def _overlapping(self, start: int, end: int) -> list[Run]:
        at = max(bisect_right(self._starts, start) - 1, 0)
        parts = []
        while at < len(self._starts) and self._starts[at] < end:
            address = self._starts[at]
            low = max(address, start)
            high = min(address + (self._pages[at] << PAGE_SHIFT), end)
            if low < high:
                ordinal = self._ordinals[at] + ((low - address) >> PAGE_SHIFT)
                parts.append(Run(low, ordinal, (high - low) >> PAGE_SHIFT))
            at += 1
        return parts

    def _cut(self, start: int, end: int) -> list[Run]:
        """Take what lies within start-end out of the segments, splitting those at its borders."""
        parts = self._overlapping(start, end)
        for address, ordinal, pages in parts:
            at = bisect_right(self._starts, address) - 1
            whole = Run(self._starts[at], self._ordinals[at], self._pages[at])
            self._delete(at)
            before = ordinal - whole.ordinal
            if before:
                self._insert(whole.address, whole.ordinal, before)
            after = whole.pages - before - pages
            if after:
                self._insert(address + (pages << PAGE_SHIFT), ordinal + pages, after)
        return parts

    def _delete(self, at: int) -> None:
        by_ordinal = bisect_right(self._by_ordinal, self._ordinals[at]) - 1
        for column in (self._starts, self._pages, self._ordinals):
            del column[at]
        for column in (self._by_ordinal, self._by_ordinal_pages, self._by_ordinal_start):
            del column[by_ordinal]

    def _insert(self, address: int, ordinal: int, pages: int) -> None:
        at = bisect_right(self._starts, address)
        self._starts.insert(at, address)
        self._pages.insert(at, pages)
        self._ordinals.insert(at, ordinal)
        at = bisect_right(self._by_ordinal, ordinal)
        self._by_ordinal.insert(at, ordinal)
        self._by_ordinal_pages.insert(at, pages)
        self._by_ordinal_start.insert(at, address)
