"""Write the pages of one address space into a file, in the order of their addresses and without those that are zero.

The pages are taken in chunks, by turns: of n processes, each has every n-th chunk. Only after a chunk has been read is
it known how many of its pages go into the file, and so where the next chunk begins: that number goes round from process
to process through pipes. Reading, hashing and writing overlap.
"""

import errno
import mmap
import os
import select
import struct
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import xxhash

from postcopy import roles
from postcopy.checkpoint.format import PIECE_PAGES, Index, checksum_of
from postcopy.errors import DumpError
from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRanges
from postcopy.roles import Role
from postcopy.sent_pages import PageSource
from postcopy.trouble import Trouble

# As much as stays in the CPU's caches between reading, hashing and writing.
CHUNK_PAGES = 64
_CHUNK_SIZE = CHUNK_PAGES * PAGE_SIZE
_WORDS = PAGE_SIZE // 8

_MOST_WORKERS = 4
# A fork costs about as much as writing so many chunks.
_CHUNKS_A_WORKER = 16

_ALL = (1 << CHUNK_PAGES) - 1
_ZERO_CHUNK = bytes(_CHUNK_SIZE)
_ZERO_PAGE = bytes(PAGE_SIZE)

# What is found of a chunk: which of its pages are zero, one bit for each, and the checksums of its pieces.
_FOUND = struct.Struct(f"=Q{CHUNK_PAGES // PIECE_PAGES}Q")
_PLACE = struct.Struct("=Q")


def write_failed(path: Path, error: OSError, doing: str = "writing") -> DumpError:
    """The error for a file of a checkpoint that cannot be written."""
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "make room there, or dump to another filesystem" if full else ""
    return DumpError(f"{doing} {path}: {name}: {os.strerror(error.errno or 0)}", hint)


class PageWriter:
    """The pages of one address space on their way into an open file."""

    def __init__(self, fd: int, path: Path, source: PageSource, sent: PageRanges, lazy: PageRanges) -> None:
        """``sent`` are written whatever they hold, ``lazy`` unless they are zero. ``path``: the file's, for errors."""
        self._fd = fd
        self._path = path
        self._source = source
        self._sent = sent
        pairs = sorted([*((r.start, r.end) for r in sent), *((r.start, r.end) for r in lazy)])
        self._pages = PageRanges.from_pairs(pairs)
        self._chunks = -(-self._pages.total_pages // CHUNK_PAGES)
        self._found = mmap.mmap(-1, max(self._chunks * _FOUND.size, 1))
        self._trouble = Trouble()

    def close(self) -> None:
        """Give memory and pipes back."""
        self._found.close()
        self._trouble.close()

    def write(self) -> Index:
        """Write all of them. Raises DumpError, after which no process writes any more."""
        count = min(os.cpu_count() or 1, _MOST_WORKERS, self._chunks // _CHUNKS_A_WORKER)
        if count < 2:
            self._write_share(0, 1, _Turns.alone())
        else:
            self._write_together(count)
        return self._index()

    # -- several processes ---------------------------------------------------------------------------------------------

    def _write_together(self, count: int) -> None:
        turns = _Turns.circle(count)
        working: list[Role] = []
        try:
            for number, turn in enumerate(turns):
                body = self._trouble.telling(partial(self._write_share, number, count, turn))
                working.append(roles.start("postcopy-write", body, dies_with_parent=True))
            self._await(working)
        finally:
            for role in working:
                role.kill()
            for turn in turns:
                turn.close()

    def _await(self, working: list[Role]) -> None:
        """Wait for the end of all; the first that fails ends the wait. Who has ended is taken out of the list."""
        poll = select.poll()
        by_fd = {role.pidfd: role for role in working}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        while by_fd:
            for fd, _ in poll.poll():
                poll.unregister(fd)
                role = by_fd.pop(fd)
                working.remove(role)
                if code := role.wait():
                    raise self._trouble.of(code, f"writing {self._path}", DumpError)

    # -- one of them ---------------------------------------------------------------------------------------------------

    def _write_share(self, number: int, count: int, turns: "_Turns") -> None:
        content = bytearray(_CHUNK_SIZE)
        buffer = memoryview(content)
        first_words = buffer.cast("Q")[::_WORDS]
        pieces = [buffer[at : at + PIECE_PAGES * PAGE_SIZE] for at in range(0, _CHUNK_SIZE, PIECE_PAGES * PAGE_SIZE)]
        found, pack, size = self._found, _FOUND.pack_into, _FOUND.size
        for chunk in range(number, self._chunks, count):
            pages = self._read(chunk, buffer)
            # A page that begins with something else is not zero.
            words = first_words[:pages].tolist()
            zeros = self._zeros(chunk, words, content) if 0 in words else 0
            if pages == CHUNK_PAGES and not zeros:
                checksums = [checksum_of(piece) for piece in pieces]
                runs = [buffer]
            else:
                checksums = [_checksum(buffer, at, pages, zeros) for at in range(0, CHUNK_PAGES, PIECE_PAGES)]
                runs = list(_runs(buffer, 0, pages, zeros))
            pack(found, chunk * size, zeros, *checksums)
            held = pages - zeros.bit_count()
            place = turns.take()
            turns.give(place + held)
            self._put(runs, place * PAGE_SIZE)

    def _read(self, chunk: int, buffer: memoryview) -> int:
        """Read a chunk from the source; how many pages it has."""
        at = 0
        for part in self._pages.stretches(chunk * CHUNK_PAGES, CHUNK_PAGES):
            size = part.end - part.start
            self._source.read_into(part.start, buffer[at : at + size])
            at += size
        return at // PAGE_SIZE

    def _zeros(self, chunk: int, words: list[int], content: bytearray) -> int:
        """The lazy pages of a chunk that are zero, one bit for each; ``words``: the first of each page."""
        pages = len(words)
        if pages == CHUNK_PAGES and content == _ZERO_CHUNK:
            zeros = _ALL
        else:
            zeros = 0
            for page, word in enumerate(words):
                if not word and content[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] == _ZERO_PAGE:
                    zeros |= 1 << page
        first = chunk * CHUNK_PAGES
        start, last = self._pages.address(first), self._pages.address(first + pages - 1)
        for part, _ in self._sent.overlapping(start, last + PAGE_SIZE):
            bits = (1 << part.pages) - 1
            zeros &= ~(bits << (self._pages.ordinal(part.start) - first))
        return zeros

    def _put(self, runs: list[memoryview], place: int) -> None:
        """Write ``runs``, one after the other, from ``place`` (bytes) in the file on."""
        while runs:
            try:
                written = os.pwritev(self._fd, runs, place)
            except OSError as error:
                raise write_failed(self._path, error) from None
            place += written
            while runs and written >= len(runs[0]):
                written -= len(runs.pop(0))
            if written:
                runs[0] = runs[0][written:]

    # -- what was found ------------------------------------------------------------------------------------------------

    def _index(self) -> Index:
        zero: list[tuple[int, int]] = []
        sizes = bytearray()
        checksums = array("Q")
        for chunk in range(self._chunks):
            first = chunk * CHUNK_PAGES
            pages = min(CHUNK_PAGES, self._pages.total_pages - first)
            zeros, *sums = _FOUND.unpack_from(self._found, chunk * _FOUND.size)
            for at, checksum in zip(range(0, pages, PIECE_PAGES), sums, strict=False):
                size = min(PIECE_PAGES, pages - at) - (zeros >> at & ((1 << PIECE_PAGES) - 1)).bit_count()
                if size:
                    sizes.append(size)
                    checksums.append(checksum)
            for start, count in _ones(zeros):
                zero += ((part.start, part.end) for part in self._pages.stretches(first + start, count))
        zero_pages = PageRanges.from_pairs(zero)
        return Index(self._pages.subtract(zero_pages), zero_pages, bytes(sizes), checksums)


class _Turns:
    """The place (in pages) in the file where the next chunk begins; who has it may say where the one after it does."""

    def __init__(self, mine: int, next_: int) -> None:
        self._mine = mine
        self._next = next_
        self._place = 0

    @classmethod
    def alone(cls) -> "_Turns":
        """For one process that writes every chunk."""
        return cls(-1, -1)

    @classmethod
    def circle(cls, count: int) -> list["_Turns"]:
        """For ``count`` processes, in the order of their chunks."""
        pipes = [os.pipe() for _ in range(count)]
        os.write(pipes[0][1], _PLACE.pack(0))
        return [cls(pipes[number][0], pipes[(number + 1) % count][1]) for number in range(count)]

    def take(self) -> int:
        """Wait for one's turn; the place."""
        if self._mine >= 0:
            (self._place,) = _PLACE.unpack(os.read(self._mine, _PLACE.size))
        return self._place

    def give(self, place: int) -> None:
        """It is the turn of the next."""
        self._place = place
        if self._next >= 0:
            os.write(self._next, _PLACE.pack(place))

    def close(self) -> None:
        """Give the pipes back."""
        os.close(self._mine)
        os.close(self._next)


def _ones(bits: int) -> Iterator[tuple[int, int]]:
    """The runs of ones: their first bit and their length."""
    at = 0
    while bits >> at:
        rest = bits >> at
        at += (rest & -rest).bit_length() - 1
        rest = bits >> at
        count = (~rest & (rest + 1)).bit_length() - 1
        yield at, count
        at += count


def _runs(buffer: memoryview, start: int, end: int, zeros: int) -> Iterator[memoryview]:
    """The parts of the buffer from page ``start`` up to ``end`` that are not zero."""
    wanted = ((1 << end) - (1 << start)) & ~zeros
    for first, count in _ones(wanted):
        yield buffer[first * PAGE_SIZE : (first + count) * PAGE_SIZE]


def _checksum(buffer: memoryview, piece: int, pages: int, zeros: int) -> int:
    """The checksum of the piece from page ``piece`` on, without its zero pages."""
    hashed = xxhash.xxh3_64()
    for run in _runs(buffer, min(piece, pages), min(piece + PIECE_PAGES, pages), zeros):
        hashed.update(run)
    return hashed.intdigest()
