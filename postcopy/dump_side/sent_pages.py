"""Read the pages that travel with the state, space by space; those that processes share copy-on-write since a fork are
read once."""

from array import array
from collections.abc import Mapping, Sequence
from itertools import groupby, islice, repeat

from msgspec import Struct

from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.pagemap import Pagemap, frames_in
from postcopy.page_ranges import PageRanges
from postcopy.sent_pages import NUMBERS, PageSource, read_runs
from postcopy.spaces import Space

# A process has most pages in common with few others; to look at all of them again for each could take long.
_MOST_OWNERS = 8


class Piece(Struct, frozen=True):
    """The pages of a space: of each, its number among all that are read of a tree; and the contents of new ones."""

    places: "array[int]"
    content: memoryview


class PageReader:
    """Reads the spaces of a tree; ``pagemaps``: of those that may have pages in common."""

    def __init__(self, sources: Mapping[int, PageSource], pagemaps: Mapping[int, Pagemap]) -> None:
        self._sources = sources
        self._pagemaps = pagemaps
        self._known: dict[int, int] = {}  # the pages that have been read, by their frames
        self._spaces = array("I")  # and of each, where
        self._seen: dict[int, tuple[PageRanges, array[int]]] = {}  # of which pages of spaces what was seen

    def read(self, space: Space) -> Piece:
        """The pages of a frozen space that are sent. Raises DumpError where it cannot be read."""
        pagemap = self._pagemaps.get(space.number)
        entries = pagemap.entries_of(space.sent) if pagemap else array("Q")
        frames = frames_in(entries)
        known = self._trusted(list(map(self._known.get, frames, repeat(-1))))
        places = array(NUMBERS)
        fresh = total = len(self._spaces)
        runs: list[tuple[int, int, int]] = []
        at = 0
        for each in space.sent:
            address = each.start
            for is_new, numbers in _stretches(known[at : at + each.pages], each.pages):
                if is_new:
                    runs.append((space.number, address, len(numbers)))
                    numbers = range(total, total + len(numbers))
                    total += len(numbers)
                places.extend(numbers)
                address += len(numbers) * PAGE_SIZE
            at += each.pages
        content = memoryview(bytearray((total - fresh) * PAGE_SIZE))
        read_runs(runs, self._sources, content)
        self._spaces.extend([space.number] * (total - fresh))
        if pagemap:
            self._seen[space.number] = space.sent, entries
            self._known.update((frame, place) for frame, place in zip(frames, places, strict=True) if place >= fresh)
            # What is in no frame.
            self._known.pop(0, None)
        return Piece(places, content)

    def _trusted(self, known: list[int]) -> list[int]:
        """Which page each is, as far as that is certain; -1 for what is to be read anew."""
        owners = {self._spaces[number] for number in known if number >= 0}
        certain = set(filter(self._is_as_it_was, islice(owners, _MOST_OWNERS)))
        if certain == owners:
            return known
        return [number if number >= 0 and self._spaces[number] in certain else -1 for number in known]

    def _is_as_it_was(self, space: int) -> bool:
        """Whether the pages of a space are where they were read: the kernel may have moved them, and have given their
        frames to others."""
        sent, before = self._seen[space]
        now = self._pagemaps[space].entries_of(sent)
        return now == before or frames_in(now) == frames_in(before)


def _stretches(known: Sequence[int], pages: int) -> list[tuple[bool, Sequence[int]]]:
    """Parts of the numbers of ``pages`` pages: known ones and new ones by turns; without ``known``, all are new."""
    if max(known, default=-1) < 0:
        return [(True, range(pages))]
    return [(is_new, list(numbers)) for is_new, numbers in groupby(known, (-1).__eq__)]
