"""The content of the pages that travel with a state: each once, however many processes have it in common."""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from postcopy.errors import ProtocolError
from postcopy.kernel.page import PAGE_SIZE

_PLACE_SIZE = 4
_NUMBERS = "I"


@dataclass(frozen=True)
class SentPages:
    """``places``: for each page, in the order of `spaces_of`, which page of ``content`` it is."""

    places: "array[int]"
    content: memoryview

    @classmethod
    def plain(cls, content: bytes | bytearray | memoryview) -> "SentPages":
        """Every page has a content of its own; these are one after the other."""
        return cls(array(_NUMBERS, range(len(content) // PAGE_SIZE)), memoryview(content))

    @classmethod
    def unpack(cls, total: int, packed: bytearray) -> "SentPages":
        """What `pack` made of ``total`` pages. Raises ProtocolError when it cannot have come from there."""
        content = memoryview(packed)[total * _PLACE_SIZE :]
        places = array(_NUMBERS)
        places.frombytes(packed[: total * _PLACE_SIZE])
        if len(content) % PAGE_SIZE or max(places, default=-1) + 1 > len(content) // PAGE_SIZE:
            raise ProtocolError(f"{len(content)} bytes of pages are not what the places of {total} pages name")
        return cls(places, content)

    def pack(self) -> tuple[bytes, memoryview]:
        """Two pieces, to be sent one after the other: the places as little-endian 32-bit numbers, the content."""
        return self.places.tobytes(), self.content

    @staticmethod
    def fits(total: int, size: int) -> bool:
        """Whether ``total`` pages can take ``size`` bytes packed."""
        content = size - total * _PLACE_SIZE
        return 0 <= content <= total * PAGE_SIZE and content % PAGE_SIZE == 0

    @property
    def total(self) -> int:
        """How many pages there are."""
        return len(self.places)

    def part(self, first: int, count: int) -> "SentPages":
        """``count`` of the pages from number ``first`` on."""
        return SentPages(self.places[first : first + count], self.content)

    def runs(self, first: int, count: int) -> Iterator[memoryview]:
        """The content of ``count`` pages from number ``first`` on, in as few pieces as it lies there."""
        places = self.places[first : first + count]
        at = 0
        while at < len(places):
            start, run = places[at], 1
            while at + run < len(places) and places[at + run] == start + run:
                run += 1
            yield self.content[start * PAGE_SIZE : (start + run) * PAGE_SIZE]
            at += run

    def joined(self, first: int, count: int) -> bytes:
        """The same in one piece."""
        return b"".join(self.runs(first, count))
