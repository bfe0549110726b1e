"""Huge pages on their way: what of each has arrived, until all of it is there and it can be filled.

Both channels bring a huge page from its first page to its last: the streamer sends nothing in between, and what is
asked for is answered in order. So no more of them are held than one of the bulk stream, one that is being answered, and
those that are complete and cannot be filled yet. What comes otherwise is dropped, and asked for in the end.
"""

import mmap

from postcopy.kernel.libc import address_of, memory_at
from postcopy.page_ranges import PageRange

_Key = tuple[int, int]  # the space, and where the huge page begins at the source


class _Arrival:
    def __init__(self, key: _Key, size: int) -> None:
        self.key = key
        self.content = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = 0


class Arrivals:
    """What has arrived of huge pages."""

    def __init__(self) -> None:
        """Nothing yet."""
        self._asked: dict[_Key, _Arrival] = {}
        self._streamed: _Arrival | None = None

    def expect(self, space: int, page: PageRange) -> None:
        """This huge page is asked for."""
        key = space, page.start
        if key not in self._asked:
            self._asked[key] = _Arrival(key, page.end - page.start)

    def take(self, space: int, page: PageRange, part: PageRange, data: int, *, streamed: bool) -> int:
        """Keep ``part`` of a huge page, which is at ``data``; the address of all of it once it is there, else 0.

        The same part may be given again, as long as its page is not `done`.
        """
        arrival = self._find((space, page.start), page, part, streamed)
        first, last = part.start - page.start, part.end - page.start
        if arrival is None or first > arrival.bytes:
            return 0
        if last > arrival.bytes:
            arrival.content[first:last] = memory_at(data, last - first)
            arrival.bytes = last
        return address_of(arrival.content) if arrival.bytes == len(arrival.content) else 0

    def _find(self, key: _Key, page: PageRange, part: PageRange, streamed: bool) -> _Arrival | None:
        if not streamed:
            return self._asked.get(key)
        if self._streamed is None or self._streamed.key != key:
            self._streamed = _Arrival(key, page.end - page.start) if part.start == page.start else None
        return self._streamed

    def done(self, space: int, page: PageRange, *, streamed: bool) -> None:
        """It has been filled wherever it was missing."""
        if streamed:
            self._streamed = None
        else:
            self._asked.pop((space, page.start), None)
