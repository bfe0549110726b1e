"""Read the pages of one address space back; no byte is handed out before its piece has been verified."""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator

from postcopy.checkpoint.format import PIECE_PAGES, Index, checksum_of
from postcopy.errors import CheckpointError
from postcopy.kernel.libc import address_of
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.sent_pages import PageSource

_CACHED_PIECES = 128
# As much as stays in the CPU's caches between reading, verifying and copying on.
_RUN_PAGES = 64


class PageFile(PageSource):
    """The page file of one address space: a `PageSource`.

    Several processes may use it after a fork: nothing but the open file is shared, and that has no position.
    """

    def __init__(self, fd: int, path: str, index: Index) -> None:
        """``path`` is for errors."""
        self._fd = fd
        self._path = path
        self._index = index
        self._cache: OrderedDict[int, memoryview] = OrderedDict()

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer``, whole pages, from the page-aligned ``address`` on. Raises CheckpointError."""
        end = address + len(buffer)
        done = address
        for part, ordinal in self._index.held.overlapping(address, end):
            if part.start != done:
                break
            self._read_pages(ordinal, buffer[part.start - address : part.end - address])
            done = part.end
        if done != end:
            raise CheckpointError(f"{self._path}: the page at address {done:#x} is not among those held")

    def verified_runs(self, lazy: PageRanges, share: int, shares: int) -> Iterator[tuple[int, int, int]]:
        """Share ``share`` of ``shares`` of the pages in ``lazy``: where they belong, where they lie in the memory of
        this process, how many bytes. What has been given is overwritten once the next is asked for."""
        buffer = memoryview(bytearray(_RUN_PAGES * PAGE_SIZE))
        base = address_of(buffer)
        index = self._index
        pieces = len(index.checksums)
        piece, last = pieces * share // shares, pieces * (share + 1) // shares
        while piece < last:
            first = index.firsts[piece]
            after = min(bisect_right(index.firsts, first + _RUN_PAGES) - 1, last)
            count = index.firsts[after] - first
            wanted = list(_wanted(index.held, lazy, first, count))
            if wanted:
                self._read_pieces(piece, after, buffer)
                for at, run in wanted:
                    yield run.start, base + at, run.end - run.start
            piece = after

    def _read_pages(self, ordinal: int, buffer: memoryview) -> None:
        """Pages from ``ordinal`` on; their pieces are verified, once while they are in the cache."""
        firsts = self._index.firsts
        piece = bisect_right(firsts, ordinal) - 1
        while buffer:
            skipped = (ordinal - firsts[piece]) << PAGE_SHIFT
            whole = bisect_right(firsts, ordinal + (len(buffer) >> PAGE_SHIFT)) - 1
            if not skipped and whole > piece:
                self._read_pieces(piece, whole, buffer)
                taken = (firsts[whole] - ordinal) << PAGE_SHIFT
                piece = whole
            else:
                content = self._piece(piece)
                taken = min(((firsts[piece + 1] - firsts[piece]) << PAGE_SHIFT) - skipped, len(buffer))
                buffer[:taken] = content[skipped : skipped + taken]
                piece += 1
            buffer = buffer[taken:]
            ordinal += taken >> PAGE_SHIFT

    def _piece(self, piece: int) -> memoryview:
        """A verified piece, from the cache if it is there."""
        cached = self._cache.get(piece)
        if cached is not None:
            self._cache.move_to_end(piece)
            return cached
        if len(self._cache) < _CACHED_PIECES:
            content = memoryview(bytearray(PIECE_PAGES * PAGE_SIZE))
        else:
            _, content = self._cache.popitem(last=False)
        self._read_pieces(piece, piece + 1, content)
        self._cache[piece] = content
        return content

    def _read_pieces(self, piece: int, last: int, buffer: memoryview) -> None:
        """Read pieces up to ``last`` into the beginning of ``buffer`` and verify them."""
        firsts, checksums = self._index.firsts, self._index.checksums
        first = firsts[piece]
        size = (firsts[last] - first) << PAGE_SHIFT
        self._read(first << PAGE_SHIFT, buffer[:size])
        at = 0
        for number in range(piece, last):
            end = (firsts[number + 1] - first) << PAGE_SHIFT
            if checksum_of(buffer[at:end]) != checksums[number]:
                place = (first << PAGE_SHIFT) + at
                raise CheckpointError(
                    f"{self._path}: bytes {place} to {place + end - at} (pages from {self._address(number):#x} on) "
                    "do not have the checksum of the index",
                    "the file was changed or damaged since the dump",
                )
            at = end

    def _address(self, piece: int) -> int:
        return self._index.held.address(self._index.firsts[piece])

    def _read(self, place: int, buffer: memoryview) -> None:
        try:
            while buffer:
                count = os.preadv(self._fd, [buffer], place)
                if not count:
                    raise CheckpointError(f"{self._path}: ends at byte {place}: it was cut off")
                place += count
                buffer = buffer[count:]
        except OSError as error:
            raise CheckpointError(f"{self._path}: reading from byte {place} on: {error.strerror}") from None


def _wanted(held: PageRanges, lazy: PageRanges, first: int, count: int) -> Iterator[tuple[int, PageRange]]:
    """The lazy ones of ``count`` held pages from the ordinal ``first`` on, each run with its place (bytes) in these."""
    at = 0
    for part in held.stretches(first, count):
        for run, _ in lazy.overlapping(part.start, part.end):
            yield at + run.start - part.start, run
        at += part.end - part.start
