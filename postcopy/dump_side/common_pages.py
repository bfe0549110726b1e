"""Lazy pages that processes of a frozen tree share copy-on-write since a fork: sent once, for all who have them."""

from collections.abc import Iterator, Mapping
from itertools import groupby
from types import MappingProxyType

from postcopy.dump_side.page_source import FrozenProcess
from postcopy.huge_pages import HugeAreas
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.sent_pages import PageSource

Run = tuple[int, tuple[int, ...]]


class CommonPages:
    """Who has a page in common with whom, at the same address: so it is after a fork."""

    def __init__(self, sources: Mapping[int, PageSource], huge: Mapping[int, HugeAreas] = MappingProxyType({})) -> None:
        """``sources``: the memory by space; ``huge``: what of it is of huge pages, which are left out: the destination
        would have to hold one for each process."""
        self._huge = huge
        self._pagemaps = {
            space: source.pagemap
            for space, source in sources.items()
            if isinstance(source, FrozenProcess) and source.pagemap is not None
        }

    def __len__(self) -> int:
        """How many processes may have pages in common."""
        return len(self._pagemaps)

    def runs(self, space: int, address: int, pages: int) -> list[Run]:
        """Some pages of ``space`` in order, as runs: how many, and which other spaces have the same ones there."""
        pagemap = self._pagemaps.get(space)
        huge = self._huge.get(space)
        if huge is not None and huge.overlap(address, address + pages * PAGE_SIZE):
            return [(pages, ())]
        if pagemap is None or pagemap.are_exclusive(address, pages):
            return [(pages, ())]
        own = pagemap.frames(address, pages)
        others: list[tuple[int, ...]] = [()] * pages
        for other, its in self._pagemaps.items():
            if other != space and (frames := its.frames(address, pages)):
                for number, (mine, frame) in enumerate(zip(own, frames, strict=False)):
                    if mine == frame != 0:
                        others[number] += (other,)
        if pagemap.frames(address, pages) != own:
            # Where the kernel moves a page meanwhile, its frame may become that of another one.
            return [(pages, ())]
        return [(len(list(run)), spaces) for spaces, run in groupby(others)]


class Spared:
    """Which pages of a plan need not be sent any more, since they went with those of another space."""

    def __init__(self, plan: Mapping[int, PageRanges]) -> None:
        """None yet."""
        self._plan = plan
        self._spared: dict[int, bytearray] = {}

    def add(self, space: int, address: int, pages: int) -> int:
        """They have been sent for ``space`` too; gives how many of them it still had to get."""
        plan = self._plan.get(space)
        if plan is None:
            return 0
        spared = self._spared.setdefault(space, bytearray(plan.total_pages))
        new = 0
        for part, first in plan.overlapping(address, address + pages * PAGE_SIZE):
            end = first + part.pages
            new += spared.count(0, first, end)
            spared[first:end] = b"\1" * part.pages
        return new

    def has(self, space: int, address: int, pages: int) -> bool:
        """Whether all of these pages have been sent for ``space``."""
        spared = self._spared.get(space)
        if spared is None:
            return False
        parts = self._plan[space].overlapping(address, address + pages * PAGE_SIZE)
        return sum(spared.count(1, first, first + part.pages) for part, first in parts) == pages

    def rest(self, space: int, part: PageRange, ordinal: int) -> Iterator[PageRange]:
        """What of a range of the plan, which begins with the page ``ordinal``, is still to be sent."""
        spared = self._spared.get(space)
        if spared is None:
            yield part
            return
        at, end = ordinal, ordinal + part.pages
        while (at := spared.find(0, at, end)) >= 0:
            until = spared.find(1, at, end)
            until = end if until < 0 else until
            start = part.start + (at - ordinal << PAGE_SHIFT)
            yield PageRange(start, start + (until - at << PAGE_SHIFT))
            at = until
