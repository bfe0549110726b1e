"""The content of the pages that travel with a state: each once, however many processes have it in common."""

import errno
import mmap
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from msgspec import Struct

from postcopy.errors import ProtocolError
from postcopy.kernel.page import PAGE_SIZE

_PLACE_SIZE = 4
_NUMBERS = "I"


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


class SentPages(Struct, frozen=True):
    """``places``: for each page, in the order of `spaces_of`, which page of ``content`` it is.

    ``fd``: a file in memory that is ``content``, for others to read; -1 where there can be none.
    """

    places: "array[int]"
    content: memoryview
    fd: int = -1

    @classmethod
    def room(cls, places: "array[int]", size: int) -> "SentPages":
        """With ``size`` bytes of content still to be written, which take no memory before. Raises OSError."""
        if not size:
            return cls(places, memoryview(b""))
        fd = os.memfd_create("postcopy-pages")
        try:
            os.ftruncate(fd, size)
            return cls(places, memoryview(mmap.mmap(fd, size)), fd)
        except BaseException as error:
            os.close(fd)
            if isinstance(error, OSError) and error.errno == errno.EFBIG:
                # RLIMIT_FSIZE is about files in memory, too.
                return cls(places, memoryview(mmap.mmap(-1, size)))
            raise

    @classmethod
    def read(
        cls,
        runs: Sequence[tuple[int, int, int]],
        sources: Mapping[int, PageSource],
        places: "array[int] | None" = None,
    ) -> "SentPages":
        """The content is read from ``runs``: of which of the ``sources``, at which address, how many pages.

        Without ``places`` every page has a content of its own, in this order.
        """
        total = sum(count for _, _, count in runs)
        pages = cls.room(array(_NUMBERS, range(total)) if places is None else places, total * PAGE_SIZE)
        at = 0
        try:
            for space, together in groupby(runs, itemgetter(0)):
                places_of_space = [(address, count * PAGE_SIZE) for _, address, count in together]
                length = sum(bytes_there for _, bytes_there in places_of_space)
                sources[space].read_all(places_of_space, pages.content[at : at + length])
                at += length
        except BaseException:
            pages.close()
            raise
        return pages

    @classmethod
    def announced(cls, packed: bytes | bytearray, size: int) -> "SentPages":
        """Of the first piece that `pack` gives, with room for the second, of ``size`` bytes. Raises ProtocolError."""
        places = array(_NUMBERS)
        places.frombytes(packed)
        if max(places, default=-1) + 1 > size // PAGE_SIZE:
            raise ProtocolError(f"{size} bytes of pages are not what the places of {len(places)} pages name")
        try:
            return cls.room(places, size)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"{size} bytes of pages cannot be taken: {error}") from None

    def pack(self) -> tuple[bytes, memoryview]:
        """Two pieces, to be sent one after the other: the places as little-endian 32-bit numbers, the content."""
        return self.places.tobytes(), self.content

    @staticmethod
    def split(total: int, size: int) -> tuple[int, int] | None:
        """The sizes of the two pieces of ``total`` pages packed into ``size`` bytes; None: that cannot be."""
        content = size - total * _PLACE_SIZE
        fits = 0 <= content <= total * PAGE_SIZE and content % PAGE_SIZE == 0
        return (total * _PLACE_SIZE, content) if fits else None

    def close(self) -> None:
        """Give the file back; the content stays as long as it is used."""
        if self.fd >= 0:
            os.close(self.fd)

    @property
    def total(self) -> int:
        """How many pages there are."""
        return len(self.places)

    def part(self, first: int, count: int) -> "SentPages":
        """``count`` of the pages from number ``first`` on."""
        return SentPages(self.places[first : first + count], self.content, self.fd)

    def runs(self, first: int, count: int) -> Iterator[range]:
        """Where in ``content`` the ``count`` pages from number ``first`` on lie (bytes), in as few pieces as can be."""
        places = self.places[first : first + count]
        if places and places == array(_NUMBERS, range(places[0], places[0] + count)):
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
        return b"".join(self.content[run.start : run.stop] for run in self.runs(first, count))
