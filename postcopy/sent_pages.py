"""The content of the pages that travel with a state: each once, however many processes have it in common."""

import errno
import mmap
import os
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from msgspec import Struct

from postcopy.kernel.page import PAGE_SIZE

_PLACE_SIZE = 4
NUMBERS = "I"  # of places


class PageSource:
    """What pages can be read from: the memory of one address space that no longer changes."""

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer``, whole pages, from the page-aligned ``address`` on. Raises PostcopyError."""
        raise NotImplementedError

    def read_all(self, places: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """Fill ``buffer`` with pages from several places, one behind the other: the address of each, its bytes."""
        at = 0
        for address, length in places:
            self.read_into(address, buffer[at : at + length])
            at += length


class Content:
    """Contents of pages, one behind the other: in a file in memory, for others to read, where there can be one. What is
    said of a run of them is where they lie, in bytes."""

    def __init__(self) -> None:
        self.fd = -1
        self.size = 0
        self._in_file = 0
        self._starts: list[int] = []
        self._parts: list[memoryview] = []

    def grow(self, size: int) -> memoryview:
        """Room for ``size`` bytes more, which takes no memory before they are written. Raises OSError."""
        if not size:
            return memoryview(b"")
        part = memoryview(self._more_of_file(size) or mmap.mmap(-1, size))
        self._starts.append(self.size)
        self._parts.append(part)
        self.size += size
        return part

    def _more_of_file(self, size: int) -> mmap.mmap | None:
        if self._in_file < self.size:
            return None
        if self.fd < 0:
            self.fd = os.memfd_create("postcopy-pages")
        try:
            os.ftruncate(self.fd, self.size + size)
        except OSError as error:
            # RLIMIT_FSIZE is about files in memory, too.
            if error.errno == errno.EFBIG:
                return None
            raise
        self._in_file = self.size + size
        return mmap.mmap(self.fd, size, offset=self.size)

    def is_in_file(self, run: range) -> bool:
        """Whether others can read a run."""
        return run.stop <= self._in_file

    def read(self, run: range) -> bytes:
        """A run."""
        found = []
        at, number = run.start, bisect_right(self._starts, run.start) - 1
        while at < run.stop:
            start, part = self._starts[number], self._parts[number]
            found.append(part[at - start : run.stop - start])
            at, number = start + len(part), number + 1
        return b"".join(found)

    def close(self) -> None:
        """Give the file back; for us, the contents stay as long as they are used."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SentPages(Struct, frozen=True):
    """``places``: for each page, in the order of `spaces_of`, which page of ``content`` it is."""

    places: "array[int]"
    content: Content

    @classmethod
    def read(cls, runs: Sequence[tuple[int, int, int]], sources: Mapping[int, PageSource]) -> "SentPages":
        """Pages with a content of each, read from ``runs``: of which of the ``sources``, at which address, how many."""
        total = sum(count for _, _, count in runs)
        pages = cls(array(NUMBERS, range(total)), Content())
        try:
            read_runs(runs, sources, pages.content.grow(total * PAGE_SIZE))
        except BaseException:
            pages.content.close()
            raise
        return pages

    @property
    def total(self) -> int:
        """How many pages there are."""
        return len(self.places)

    def part(self, first: int, count: int) -> "SentPages":
        """``count`` of the pages from number ``first`` on."""
        return SentPages(self.places[first : first + count], self.content)

    def runs(self, first: int, count: int) -> Iterator[range]:
        """Where in ``content`` the ``count`` pages from number ``first`` on lie (bytes), in as few pieces as can be."""
        places = self.places[first : first + count]
        if places and places == array(NUMBERS, range(places[0], places[0] + count)):
            yield range(places[0] * PAGE_SIZE, (places[0] + count) * PAGE_SIZE)
            return
        at = 0
        while at < len(places):
            start, run = places[at], 1
            while at + run < len(places) and places[at + run] == start + run:
                run += 1
            yield range(start * PAGE_SIZE, (start + run) * PAGE_SIZE)
            at += run

    def joined(self, first: int, count: int) -> bytes:
        """The same in one piece."""
        return b"".join(map(self.content.read, self.runs(first, count)))


def read_runs(runs: Iterable[tuple[int, int, int]], sources: Mapping[int, PageSource], buffer: memoryview) -> None:
    """Fill ``buffer`` with runs of pages, one behind the other: of which source, at which address, how many."""
    at = 0
    for space, together in groupby(runs, itemgetter(0)):
        places = [(address, count * PAGE_SIZE) for _, address, count in together]
        length = sum(size for _, size in places)
        sources[space].read_all(places, buffer[at : at + length])
        at += length


def split(total: int, size: int) -> tuple[int, int] | None:
    """The two pieces of a message of ``size`` bytes about ``total`` pages: their places, and contents; None: that
    cannot be."""
    content = size - total * _PLACE_SIZE
    fits = 0 <= content <= total * PAGE_SIZE and content % PAGE_SIZE == 0
    return (total * _PLACE_SIZE, content) if fits else None
