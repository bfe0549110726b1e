"""The two processes that give pages out: the demand server and the bulk streamer, and the board between them."""

import gc
import mmap
import os
import socket
import time
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from struct import Struct
from types import MappingProxyType

from postcopy.dump_side.common_pages import CommonPages, Spared
from postcopy.errors import ConnectionLost, PostcopyError, ProtocolError
from postcopy.huge_pages import HugeAreas
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.kernel.sched import scheduling
from postcopy.page_ranges import PageRanges
from postcopy.sent_pages import PageSource
from postcopy.wire import pages as wire

# A fault that promotes its chunk waits for at most one other to be read and sent.
CHUNK_PAGES = 64

# What waits in the socket delays the chunk that a fault has promoted, and on a slow link the demand answers too.
_BULK_SEND_BUFFER = 1 << 20

# The destination says FINISH on one connection, and closes the other.
_LAST_WORD_SECONDS = 1.0

# A demand waits while so many processes, and no more, are asked whether they have its pages too.
_MOST_ASKED = 16

# tc-pfifo_fast(8): packets of the interactive band overtake those of the bulk band.
_PRIORITY_BULK = 2
_PRIORITY_INTERACTIVE = 6

_NONE_HUGE: Mapping[int, HugeAreas] = MappingProxyType({})


class Board:
    """What the demand server, the streamer and their parent tell each other, in memory that a fork shares.

    Make it before the forks. Every field has one writer; a reader may see a hint half written, and then promotes
    a chunk that nobody asked for, which is harmless.
    """

    _FLAGS = Struct("=BB")
    _HINT = Struct("=QQQ")
    _NUMBER = Struct("=Q")
    _HINT_AT = 64
    _REQUESTS_AT = 128
    _DEMAND_BYTES_AT = 136
    _BULK_BYTES_AT = 192
    _SPARED_BYTES_AT = 200

    def __init__(self) -> None:
        """A board with the background halted."""
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)
        self._changed = os.eventfd(0, os.EFD_CLOEXEC)

    @property
    def background(self) -> bool:
        """Whether the bulk stream may run."""
        return self._memory[0] == 1

    @property
    def finished(self) -> bool:
        """Whether nobody wants pages any more."""
        return self._memory[1] == 1

    def finishes(self) -> bool:
        """Whether nobody wants pages any more, as the demand server may be about to hear."""
        until = time.monotonic() + _LAST_WORD_SECONDS
        while not self.finished and time.monotonic() < until:
            time.sleep(0.005)
        return self.finished

    def set_background(self, running: bool) -> None:
        """Start or halt the bulk stream."""
        self._memory[0] = int(running)
        os.eventfd_write(self._changed, 1)

    def finish(self) -> None:
        """End the bulk stream, running or halted."""
        self._memory[1] = 1
        os.eventfd_write(self._changed, 1)

    def wait(self) -> None:
        """Block until `set_background` or `finish` has been called since the last wait."""
        os.eventfd_read(self._changed)

    def set_hint(self, space: int, address: int) -> None:
        """The latest demand; also counts it."""
        count = self._NUMBER.unpack_from(self._memory, self._REQUESTS_AT)[0] + 1
        self._HINT.pack_into(self._memory, self._HINT_AT, space, address, count)
        self._NUMBER.pack_into(self._memory, self._REQUESTS_AT, count)

    def hint(self) -> tuple[int, int, int]:
        """(space, address, how many demands there have been)."""
        return self._HINT.unpack_from(self._memory, self._HINT_AT)

    def add_demand_bytes(self, count: int) -> None:
        """For the demand server."""
        self._NUMBER.pack_into(self._memory, self._DEMAND_BYTES_AT, self.demand_bytes + count)

    def add_bulk_bytes(self, count: int, spared: int) -> None:
        """For the streamer; ``spared``: see `spared_bytes`."""
        self._NUMBER.pack_into(self._memory, self._BULK_BYTES_AT, self.bulk_bytes + count)
        self._NUMBER.pack_into(self._memory, self._SPARED_BYTES_AT, self.spared_bytes + spared)

    @property
    def demand_requests(self) -> int:
        """How many requests the demand server has answered or is answering."""
        number: int = self._NUMBER.unpack_from(self._memory, self._REQUESTS_AT)[0]
        return number

    @property
    def demand_bytes(self) -> int:
        """Bytes of pages sent on the demand channel."""
        number: int = self._NUMBER.unpack_from(self._memory, self._DEMAND_BYTES_AT)[0]
        return number

    @property
    def bulk_bytes(self) -> int:
        """Bytes of pages sent on the bulk channel."""
        number: int = self._NUMBER.unpack_from(self._memory, self._BULK_BYTES_AT)[0]
        return number

    @property
    def spared_bytes(self) -> int:
        """Bytes of pages that need not be sent, since they went with those of another process."""
        number: int = self._NUMBER.unpack_from(self._memory, self._SPARED_BYTES_AT)[0]
        return number


def serve_demand(
    sock: socket.socket,
    sources: Mapping[int, PageSource],
    board: Board,
    plan: Mapping[int, PageRanges] | None = None,
    huge: Mapping[int, HugeAreas] = _NONE_HUGE,
) -> None:
    """Answer requests until the destination says FINISH; the body of a process of its own.

    ``plan``: the pages that processes may have in common; ``huge``: which of them are huge.

    Raises ConnectionLost, ProtocolError, DumpError; the destination has then been told, if it can still be reached.
    """
    gc.disable()
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _PRIORITY_INTERACTIVE)
    try:
        _answer_requests(sock, Spared(plan or {}), CommonPages(sources, huge), sources, board)
    except OSError as error:
        raise ConnectionLost(f"demand channel: {error.strerror}") from error
    except PostcopyError as error:
        with suppress(OSError):
            sock.sendall(wire.failed(str(error)))
        raise


def _answer_requests(
    sock: socket.socket, spared: Spared, common: CommonPages, sources: Mapping[int, PageSource], board: Board
) -> None:
    answer = memoryview(bytearray(wire.HEADER_SIZE + wire.MOST_DEMAND_PAGES * PAGE_SIZE))
    # A slice of a memoryview takes an allocation; the sizes repeat, so they are made once.
    payloads = [answer[wire.HEADER_SIZE : wire.HEADER_SIZE + n * PAGE_SIZE] for n in range(wire.MOST_DEMAND_PAGES + 1)]
    frames = [answer[: wire.HEADER_SIZE + n * PAGE_SIZE] for n in range(wire.MOST_DEMAND_PAGES + 1)]
    received = b""
    while True:
        more = sock.recv(1 << 14)
        if not more:
            raise ConnectionLost("the destination has closed the demand channel before every page had arrived")
        received = received + more if received else more
        at = 0
        while len(received) - at >= wire.HEADER_SIZE:
            kind, space, address, pages, _ = wire.parse_demand(received, at)
            at += wire.HEADER_SIZE
            if kind == wire.REQUEST:
                board.set_hint(space, address)
                source = sources.get(space)
                if source is None:
                    raise ProtocolError(f"there is no address space {space}")
                if spared.has(space, address, pages):
                    # Asked for when they were on their way with those of another space. Something must answer.
                    pages = 1
                elif 1 < len(common) <= _MOST_ASKED:
                    (count, others), *more_runs = common.runs(space, address, pages)
                    if others and not more_runs:
                        sock.sendall(b"".join(wire.also(other, address, count) for other in others))
                        for each in (space, *others):
                            spared.add(each, address, count)
                source.read_into(address, payloads[pages])
                wire.pages_header_into(answer, 0, space, address, pages)
                sock.sendall(frames[pages])
                board.add_demand_bytes(pages << PAGE_SHIFT)
            elif kind == wire.BACKGROUND:
                board.set_background(pages == 1)
            else:
                board.finish()
                return
        received = received[at:]


def stream_bulk(
    sock: socket.socket,
    plan: Mapping[int, PageRanges],
    sources: Mapping[int, PageSource],
    board: Board,
    huge: Mapping[int, HugeAreas] = _NONE_HUGE,
) -> None:
    """Send every page of the plan once while the background is on, then END; the body of a process of its own.

    Those that are ``huge`` are sent whole, one after the other, since they can only be filled so.

    Ends early, without END, when the board says that the destination has every page. Raises ConnectionLost, DumpError.
    """
    gc.disable()
    # Over loopback on 2 processors, nice 10 here and at the receiver: fault p99 0.7 ms instead of 2.1 ms, same total.
    scheduling(nice=10)
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BULK_SEND_BUFFER)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, _PRIORITY_BULK)
    try:
        _stream_chunks(sock, _Chunks(plan, huge), CommonPages(sources, huge), sources, board)
    except OSError as error:
        if not board.finishes():
            raise ConnectionLost(f"bulk channel: {error.strerror}") from error
    except PostcopyError as error:
        with suppress(OSError):
            sock.sendall(wire.failed(str(error)))
        raise


def _stream_chunks(
    sock: socket.socket,
    chunks: "_Chunks",
    common: CommonPages,
    sources: Mapping[int, PageSource],
    board: Board,
) -> None:
    frames = memoryview(bytearray(CHUNK_PAGES * (wire.HEADER_SIZE + PAGE_SIZE)))
    spared = Spared(chunks.plan)
    demands_seen = 0
    while True:
        while not board.background and not board.finished:
            board.wait()
        if board.finished:
            return
        space, address, demands = board.hint()
        if demands != demands_seen:
            demands_seen = demands
            chunks.promote(space, address)
        chunk = chunks.take()
        if chunk is None:
            sock.sendall(wire.end())
            return
        space, ranges, first, count = chunk
        source = sources[space]
        at = 0
        sent_pages = spared_pages = 0
        for part in ranges.stretches(first, count):
            for each in spared.rest(space, part, first):
                start = each.start
                for pages, others in common.runs(space, start, each.pages):
                    if others:
                        also = b"".join(wire.also(other, start, pages) for other in others)
                        sock.sendall(b"".join((frames[:at], also)))
                        at = 0
                        spared_pages += sum(spared.add(other, start, pages) for other in others)
                    wire.pages_header_into(frames, at, space, start, pages)
                    at += wire.HEADER_SIZE
                    source.read_into(start, frames[at : at + (pages << PAGE_SHIFT)])
                    at += pages << PAGE_SHIFT
                    start += pages << PAGE_SHIFT
                    sent_pages += pages
            first += part.pages
        sock.sendall(frames[:at])
        board.add_bulk_bytes(sent_pages << PAGE_SHIFT, spared_pages << PAGE_SHIFT)


class _Chunks:
    """Which chunks have been sent: one byte for each. A chunk is `CHUNK_PAGES` ordinals of one address space, or those
    of a huge page."""

    def __init__(self, plan: Mapping[int, PageRanges], huge: Mapping[int, HugeAreas]) -> None:
        self.plan = plan
        self._plan = {space: ranges for space, ranges in plan.items() if ranges.total_pages}
        # With which ordinal each begins.
        self._firsts = {space: _chunks(ranges, huge.get(space)) for space, ranges in self._plan.items()}
        self._sent = {space: bytearray(len(firsts)) for space, firsts in self._firsts.items()}
        self._space = next(iter(self._plan), 0)
        self._next = 0
        # What is left of a chunk that is sent in pieces: nothing comes in between.
        self._left: tuple[int, PageRanges, range] = (0, PageRanges(), range(0))

    def promote(self, space: int, address: int) -> None:
        """Go on with the chunk that has this page, if it is still to be sent, and with those after it."""
        ranges = self._plan.get(space)
        ordinal = -1 if ranges is None else ranges.ordinal(address)
        if ordinal < 0:
            return
        chunk = bisect_right(self._firsts[space], ordinal) - 1
        if not self._sent[space][chunk]:
            self._space, self._next = space, chunk

    def take(self) -> tuple[int, PageRanges, int, int] | None:
        """What to send next as (space, its ranges, first ordinal, how many); None when all has been sent."""
        if not self._left[2] and not self._take_chunk():
            return None
        space, ranges, left = self._left
        piece = left[:CHUNK_PAGES]
        self._left = space, ranges, left[CHUNK_PAGES:]
        return space, ranges, piece.start, len(piece)

    def _take_chunk(self) -> bool:
        while self._plan:
            sent = self._sent[self._space]
            chunk = sent.find(0, self._next)
            if chunk < 0:
                chunk = sent.find(0)
            if chunk >= 0:
                sent[chunk] = 1
                self._next = chunk + 1
                firsts, ranges = self._firsts[self._space], self._plan[self._space]
                until = firsts[chunk + 1] if chunk + 1 < len(firsts) else ranges.total_pages
                self._left = self._space, ranges, range(firsts[chunk], until)
                return True
            del self._plan[self._space]
            self._space, self._next = next(iter(self._plan), 0), 0
        return False


def _chunks(ranges: PageRanges, huge: HugeAreas | None) -> Sequence[int]:
    """The ordinals with which chunks begin."""
    if huge is None:
        return range(0, ranges.total_pages, CHUNK_PAGES)
    firsts = array("Q")
    at = 0
    for area in huge.areas:
        for part, ordinal in ranges.overlapping(area.start, area.end):
            firsts.extend(range(at, ordinal, CHUNK_PAGES))
            at = ordinal + part.pages
            firsts.extend(range(ordinal, at, 1 << (area.shift - PAGE_SHIFT)))
    firsts.extend(range(at, ranges.total_pages, CHUNK_PAGES))
    return firsts
