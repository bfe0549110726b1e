"""The process that answers page faults and fills memory, until every lazy page is where it belongs.

It is the only reader of the userfaultfds, the only one that fills pages and the only writer of residency, so nothing
here needs a lock. An ioctl that meets an unread layout change fails with EAGAIN and is put off until the main loop has
read the change: events are thus applied in the order of reading and never from within a fill.
"""

import gc
import logging
import mmap
import os
import resource
import select
import signal
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from time import monotonic_ns
from typing import Any, Literal, NamedTuple, NoReturn

import msgpack
from msgspec import Struct

from postcopy.errors import PostcopyError, ProtocolError
from postcopy.huge_pages import HugeAreas
from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.libc import address_of
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE, page_down
from postcopy.kernel.sched import scheduling
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.restore_side.filling import Cause, Filling, Lost, Mm
from postcopy.restore_side.hole_lock import HoleLock
from postcopy.restore_side.latency import LatencyHistogram
from postcopy.restore_side.residency import ABSENT, REMOVED, REQUESTED, AddressSpace
from postcopy.restore_side.ring import Ring
from postcopy.restore_side.shared_filling import HandedObject, Part, Parts, SharedObject
from postcopy.wire import pages as wire

log = logging.getLogger(__name__)

# What a fault may have to wait for: some 100 us, at 2.5 GB/s. Half of it costs a tenth more time for all of the memory.
PIECE_PAGES = 64

# Tells the fault handler that no page is to be filled any more.
GIVE_UP = signal.SIGUSR2

_TICK_NS = 200_000_000
_PROBE_NS = 1_000_000_000
# The thread that changes the layout still has to run before EAGAIN ends; it usually does so within these many polls.
_HOT_RETRIES = 20
_STREAMS = 16
_FIRST_REQUESTS = 8
# Requests for pieces of huge pages that are on their way: other faults wait behind them.
_PIECES_AHEAD = 4
# While so many answers are put off, no more huge pages are asked for.
_MOST_PUT_OFF = 8
# Spaces that have one page in common: a tree has not as many processes.
_MOST_ALSO = 1 << 16


class HandedSpace(Struct, frozen=True):
    """An address space to fill: its number at the source, its userfaultfd, the pages that it lacks, where shared memory
    is in it that lacks pages, what is registered (see `AddressSpace`), and its own lazy hugetlb memory."""

    space: int
    uffd: int
    lazy: PageRanges
    shared: Sequence[Part] = ()
    registered: PageRanges | None = None
    huge: HugeAreas | None = None


class Background(Struct, frozen=True):
    """When the bulk stream starts: at once, after ``idle_delay`` seconds without a fault, or never."""

    mode: Literal["eager", "idle", "off"] = "eager"
    idle_delay: float = 1.0


class _Answer(NamedTuple):
    """Pages that arrived while the layout was changing."""

    space: int
    address: int
    pages: int
    content: bytes


class FaultHandler:
    """The fault handler of one tree; `run` is the body of a process of its own."""

    def __init__(
        self,
        spaces: Sequence[HandedSpace],
        demand_socket: socket.socket,
        ring: Ring,
        reports: socket.socket,
        background: Background,
        exit_watch: Sequence[int],
        objects: Sequence[HandedObject] = (),
    ) -> None:
        """``exit_watch``: pidfds whose end may be the end of an address space.

        The userfaultfds have fork, remap, remove and unmap events enabled and are non-blocking.
        """
        self._demand = demand_socket
        demand_socket.setblocking(False)
        self._ring = ring
        self._reports = reports
        self._background = background
        self._exit_watch = exit_watch
        self._epoll: select.epoll | None = None
        self._filling = Filling(self._forgotten)
        for each in spaces:
            parts = Parts(each.shared) if each.shared else None
            self._filling.adopt(each.uffd, AddressSpace(each.space, each.lazy, each.registered), parts, each.huge)
        self._objects = objects
        self.own_uffd = uffdio.userfaultfd(os.O_CLOEXEC | os.O_NONBLOCK) if objects else -1

        self._answers = mmap.mmap(-1, 1 << 20)
        self._answers_view = memoryview(self._answers)
        self._answers_at = address_of(self._answers)
        self._answers_have = 0

        self._slots_filled = 0
        self._slot_at = 0
        self._frame: wire.Header | None = None
        # What the next pages of each channel are for, besides the space that they name.
        self._also_bulk: dict[int, wire.Header] = {}
        self._also_demand: dict[int, wire.Header] = {}
        self._frame_pages_done = 0
        self._bulk_stalled = False
        self._bulk_ended = False
        self._asked_rest: tuple[int, int] | None = None

        # Faulted pages that have been asked for, by (space, source address): when the fault was read.
        self._waiting: dict[tuple[int, int], int] = {}
        # Of huge pages that are wanted: (space, address, pages) to be asked for, and what has been asked for.
        self._pieces: deque[tuple[int, int, int]] = deque()
        self._pieces_asked: deque[tuple[int, int]] = deque()
        self._put_off: deque[_Answer] = deque()
        self._put_off_faults: dict[tuple[Mm, int], int] = {}
        self._retries = 0
        # Who waits for shared memory at a place that we did not know of, until nothing lacks there any more.
        self._unplaced: set[tuple[Mm, int]] = set()
        # Somebody waits for the whole of shared memory.
        self._hurry = False

        self._faults = 0
        self._latency = LatencyHistogram()
        self._background_on = False
        self._last_fault = monotonic_ns()
        self._last_tick = 0
        self._last_probe = self._last_fault
        self._last_progress: tuple[int, ...] = ()

    def run(self) -> None:
        """Fill until nothing is missing; never return, nor let go of a userfaultfd, when pages can no longer come.

        Closing the last userfaultfd wakes its blocked threads, and they would read zeros: after a loss this process
        waits to be killed, by someone who has killed the tree before.
        """
        gc.disable()
        # A thread that waits for a page waits for this process.
        scheduling(nice=-10)
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        try:
            self._run()
        except Lost as error:
            # It was told to give up, perhaps when something else was lost already.
            self._wait_for_death(str(error))

    def _run(self) -> None:
        try:
            signal.signal(GIVE_UP, _give_up)
            self._adopt_objects()
            self._serve()
            self._finish()
        except (Lost, PostcopyError) as error:
            self._wait_for_death(str(error))
        except Exception as error:
            log.exception("fault handler")
            self._wait_for_death(f"fault handler: {type(error).__name__}: {error}")

    def _adopt_objects(self) -> None:
        """Fill what the tree needs whole; take the rest on, and keep everybody from dropping pages of it.

        Before the first event is read: who is about to drop pages waits for that.
        """
        if not self._objects:
            return
        try:
            uffdio.api(self.own_uffd, 0)
            for each in self._objects:
                self._filling.adopt_object(SharedObject(each, self.own_uffd))
            if any(each.first for each in self._objects):
                for shared in self._filling.objects.values():
                    if shared.handed.first:
                        self._fetch(shared, shared.residency.lazy.total_pages)
                self._latency = LatencyHistogram()
                self._report({"event": "filled first"})
            for shared in self._filling.objects.values():
                if shared.is_huge:
                    continue
                if shared.open:
                    self._fetch(shared, 1)
                if shared.open:
                    shared.lock = HoleLock(shared.handed.fd, shared.residency.lazy.address(0), self.own_uffd)
        except OSError as error:
            raise Lost(f"shared memory cannot be filled: {error.strerror or error}") from error

    def _fetch(self, shared: SharedObject, pages: int) -> None:
        """Fill the first ``pages`` of its lazy pages now, a few requests on their way at a time."""
        residency = shared.residency
        missing = residency.absent_pages - pages
        while residency.absent_pages > missing:
            while len(self._waiting) < _FIRST_REQUESTS and 0 <= (ordinal := residency.next_absent()) < pages:
                wanted = residency.window(ordinal, min(wire.MOST_DEMAND_PAGES, pages - ordinal))
                self._request(shared, ordinal, wanted, monotonic_ns())
            select.select([self._demand], [], [], _TICK_NS / 1e9)
            self._read_answers()
            if self._put_off:
                self._retry()

    def _wait_for_death(self, reason: str) -> NoReturn:
        signal.signal(GIVE_UP, signal.SIG_IGN)
        log.error("lost: %s", reason)
        self.unlock()
        try:
            self._report({"event": "lost", "reason": reason})
        except OSError as error:
            log.error("the loss cannot be reported: %s", error)
        while True:
            signal.pause()

    def unlock(self) -> None:
        """Let who waits to punch a hole into shared memory; nothing may be filled from here on."""
        for shared in self._filling.objects.values():
            if shared.lock is not None:
                shared.lock.release()

    def _serve(self) -> None:
        epoll = self._epoll = select.epoll()
        for fd in (*self._filling.mms, self._demand.fileno(), self._ring.filled, *self._exit_watch):
            epoll.register(fd, select.EPOLLIN)
        if self._background.mode == "eager":
            self._start_background()
        demand_fd = self._demand.fileno()
        mms = self._filling.mms
        while self._filling.incomplete:
            ready = epoll.poll(self._patience())
            for fd, _ in ready:
                mm = mms.get(fd)
                if mm is not None:
                    self._read_messages(mm)
                elif fd == demand_fd:
                    self._read_answers()
                elif fd == self._ring.filled:
                    self._slots_filled += self._ring.take_filled()
                elif fd in self._exit_watch:
                    epoll.unregister(fd)
                    self._filling.probe()
            if self._waits_for_event:
                self._retry()
            if self._slots_filled and not ready and not self._bulk_stalled:
                self._fill_piece()
            now = monotonic_ns()
            if now - self._last_tick >= _TICK_NS:
                self._tick(now)
            if self._asked_rest is None and (self._bulk_ended or (self._hurry and not self._background_on)):
                self._ask_for_rest()
            if self._unplaced and not self._filling.lacks_shared:
                unplaced, self._unplaced = self._unplaced, set()
                self._put_off_faults |= dict.fromkeys(unplaced, now)

    @property
    def _waits_for_event(self) -> bool:
        return bool(self._put_off or self._put_off_faults or self._bulk_stalled or self._filling.newborns)

    def _patience(self) -> float:
        """How long the main loop may sleep, in seconds."""
        if self._slots_filled and not self._bulk_stalled:
            return 0
        if self._waits_for_event:
            return 0 if self._retries < _HOT_RETRIES and not self._filling.waits_for_memory else 0.001
        return _TICK_NS / 1e9

    def _forgotten(self, mm: Mm) -> None:
        if self._epoll is not None:
            self._epoll.unregister(mm.uffd)
        self._report({"event": "gone", "uffd": mm.uffd})

    # Faults and layout changes

    def _read_messages(self, mm: Mm) -> None:
        """Apply what is queued."""
        self._filling.note_holes()
        self._apply(mm, self._filling.read_messages(mm))

    def _apply(self, mm: Mm, messages: Sequence[uffdio.Message]) -> None:
        """Events first: once they are read, nothing keeps us from filling by an old layout."""
        now = monotonic_ns()
        faults = []
        for message in messages:
            if type(message) is uffdio.PageFault:
                faults.append(message.address)
            else:
                self._retries = 0
                self._change_layout(mm, message)
        if len(faults) < len(messages):
            self._filling.note_holes()
        if faults:
            self._faults += len(faults)
            self._last_fault = now
            for address in faults:
                self._fault(mm, page_down(address), now)
                if mm.gone:
                    return

    def _fault(self, mm: Mm, address: int, now: int) -> None:
        residency = mm.residency
        ordinal = residency.lookup(address)
        state = residency.states[ordinal] if ordinal >= 0 else REMOVED
        if state == ABSENT:
            if self._filling.huge and (page := self._filling.huge_page(residency, ordinal)):
                self._request_huge(mm, page, now)
            elif (residency.source, residency.lazy.address(ordinal)) in self._waiting:
                residency.mark(ordinal, 1, REQUESTED)
            else:
                self._request(mm, ordinal, self._fault_around(mm, ordinal), now)
        elif state != REQUESTED and not self._fault_elsewhere(mm, address, now):
            self._put_off_faults[mm, address] = now

    def _request(self, of: Mm | SharedObject, ordinal: int, pages: int, now: int) -> None:
        residency = of.residency
        source_address = residency.lazy.address(ordinal)
        self._waiting[residency.source, source_address] = now
        residency.mark(ordinal, pages, REQUESTED)
        self._send(wire.request(residency.source, source_address, pages))

    def _request_huge(self, of: Mm | SharedObject, page: PageRange, now: int) -> tuple[int, int]:
        """Ask for a huge page; gives (space, address) of the last answer. ``now`` is 0 where nobody waits for it."""
        residency = of.residency
        source = residency.source
        pages = min(page.pages, wire.MOST_DEMAND_PAGES)
        last = source, page.end - (pages << PAGE_SHIFT)
        residency.mark(residency.lazy.ordinal(page.start), page.pages, REQUESTED)
        if last not in self._waiting:
            self._waiting[last] = now
            self._filling.arrivals.expect(source, page)
            self._pieces.extend((source, each, pages) for each in range(page.start, page.end, pages << PAGE_SHIFT))
            self._request_pieces()
        return last

    def _request_pieces(self) -> None:
        """Ask for what is wanted of huge pages, as long as little is on its way."""
        while self._pieces and len(self._pieces_asked) < _PIECES_AHEAD:
            if len(self._put_off) >= _MOST_PUT_OFF and not self._filling.others_wait():
                return
            space, address, pages = self._pieces.popleft()
            self._pieces_asked.append((space, address))
            self._send(wire.request(space, address, pages))

    def _fault_elsewhere(self, mm: Mm, address: int, now: int) -> bool:
        """A fault that is none on a missing page of the process's own memory; False when it has to be put off.

        What is put into shared memory is right by its offset, wherever a process has it: so to be wrong about the
        place costs a fault, and no content. Only a page that is to become zero at an address of the process must not
        be one of shared memory that is still to come. The kernel tells private memory from shared memory, and there
        an existing page from a missing one; so a missing page at a place that we know nothing of waits for the last.
        """
        filling = self._filling
        if mm.parts is None or not filling.lacks_shared:
            # Never at the source, dropped since, or filled since the fault: in the last case it is there (EEXIST).
            return filling.zero(mm, address) is not False
        if part := mm.parts.at(address):
            shared, offset = filling.objects[part.space], address - part.start + part.offset
            ordinal = shared.residency.lookup(offset) if shared.open else -1
            state = shared.residency.states[ordinal] if ordinal >= 0 else REMOVED
            if state in (ABSENT, REQUESTED):
                shared.wait(offset, mm, address)
                if state == ABSENT and (page := filling.huge_page(shared.residency, ordinal)):
                    self._request_huge(shared, page, now)
                elif state == ABSENT:
                    self._request(shared, ordinal, self._fault_around(shared, ordinal), now)
                return True
            if state == REMOVED and filling.zero_in_object(shared, offset):
                uffdio.wake(mm.uffd, address, PAGE_SIZE)
                return True
        done = filling.share(mm, address)
        if done is None:
            self._unplaced.add((mm, address))
        if not done:
            self._hurry = self._hurry or done is None or mm.stuck
        return done is not False

    def _fault_around(self, of: Mm | SharedObject, ordinal: int) -> int:
        """How many pages to ask for: more and more for a reader that goes on where its last pages ended."""
        if self._background_on:
            return 1
        streams = of.streams
        wanted = min(streams.pop(ordinal, 0) * 4 or 1, wire.MOST_DEMAND_PAGES)
        pages = self._window(of.residency, ordinal, wanted)
        streams[ordinal + pages] = pages
        if len(streams) > _STREAMS:
            del streams[next(iter(streams))]
        return pages

    def _window(self, residency: AddressSpace, ordinal: int, most: int) -> int:
        """See `AddressSpace.window`; up to the next huge page."""
        pages = residency.window(ordinal, most)
        huge = self._filling.huge.get(residency.source)
        if huge is None or pages < 2:
            return pages
        address = residency.lazy.address(ordinal)
        part, _ = next(huge.parts(address, address + (pages << PAGE_SHIFT)))
        return part.pages

    def _change_layout(self, mm: Mm, message: uffdio.Message) -> None:
        """Threads blocked in a range that changed try again: a fault may be older or younger than the event."""
        match message:
            case uffdio.Fork(fd):
                self._fork(mm, fd)
            case uffdio.Remap(old, new, length):
                if mm.parts is not None:
                    mm.parts.remap(old, new, length)
                # Shared memory that is mapped once more: nothing has moved, and nobody has waited there yet.
                if length:
                    mm.residency.remap(old, new, length)
                    self._filling.moved(mm, old, new, length)
                    uffdio.wake(mm.uffd, old, length)
                    uffdio.wake(mm.uffd, new, length)
            case uffdio.Remove(start, end):
                if mm.parts is not None:
                    # Of shared memory nothing is dropped as long as pages are missing: see `HoleLock`, `HoleWatch`.
                    self._hurry = self._hurry or mm.parts.overlaps(start, end)
                    for part in mm.parts.within(start, end):
                        self._filling.doubt(part, monotonic_ns())
                mm.residency.remove(start, end)
                uffdio.wake(mm.uffd, start, end - start)
            case uffdio.Unmap(start, end):
                if mm.parts is not None:
                    mm.parts.unmap(start, end)
                mm.residency.unmap(start, end)
                self._filling.moved(mm, start, end)
                uffdio.wake(mm.uffd, start, end - start)
        mm.end_stall()
        if not mm.residency.absent_pages:
            self._filling.incomplete.discard(mm)

    def _fork(self, mm: Mm, uffd: int) -> None:
        self._filling.adopt_child(uffd, mm)
        os.set_blocking(uffd, False)
        self._report({"event": "forked", "uffd": uffd}, uffd)

    def _bear(self) -> None:
        """Listen to those children of which it is certain by now what they were born with."""
        assert self._epoll is not None
        for child in tuple(self._filling.newborns):
            if self._filling.born(child):
                self._epoll.register(child.uffd, select.EPOLLIN)
                early, child.early = child.early, []
                self._apply(child, early)

    # Filling

    def _read_answers(self) -> None:
        have = self._answers_have
        view = self._answers_view[have:] if have else self._answers_view
        try:
            received = self._demand.recv_into(view)
        except BlockingIOError:
            return
        except OSError as error:
            raise Lost(f"demand channel: {error.strerror}") from error
        if not received:
            raise Lost("the source has closed the demand channel")
        end = have + received
        at = 0
        while end - at >= wire.HEADER_SIZE:
            header = wire.parse_answer(self._answers_view, at)
            after = at + wire.HEADER_SIZE + header.length
            if after > end:
                break
            payload = at + wire.HEADER_SIZE
            if header.kind == wire.PAGES:
                self._answer(header, payload)
            elif header.kind == wire.ALSO:
                _add(self._also_demand, header)
            elif header.kind == wire.FAILED:
                raise Lost(wire.reason_of(self._answers[payload:after]))
            else:
                raise ProtocolError("END on the demand channel")
            at = after
        if at and at < end:
            self._answers.move(0, at, end - at)
        self._answers_have = end - at

    def _answer(self, header: wire.Header, payload: int) -> None:
        _, _, address, pages, length = header
        content = b""
        for space in _spaces(header, self._also_demand):
            if self._asked_rest == (space, address):
                self._asked_rest = None
            if not self._filling.fill(space, address, pages, self._answers_at + payload, Cause.DEMAND):
                content = content or self._answers[payload : payload + length]
                self._put_off.append(_Answer(space, address, pages, content))
                self._retries = 0
            asked = self._waiting.pop((space, address), 0)
            if asked:
                self._latency.add(monotonic_ns() - asked)
        self._also_demand.clear()
        if self._pieces_asked and self._pieces_asked[0] == (header.space, address):
            self._pieces_asked.popleft()
            self._request_pieces()

    def _fill_piece(self) -> None:
        """Fill the next piece of the bulk stream."""
        slot, used = self._ring.current()
        header = self._frame
        if header is None:
            header = self._frame = wire.parse_answer(self._ring.slot(slot), self._slot_at)
            self._slot_at += wire.HEADER_SIZE
            self._frame_pages_done = 0
        if header.kind == wire.FAILED:
            reason = self._ring.slot(slot)[self._slot_at : self._slot_at + header.length]
            raise Lost(wire.reason_of(reason))
        if header.kind == wire.END:
            self._bulk_ended = True
            self._filling.probe()
        elif header.kind == wire.ALSO:
            _add(self._also_bulk, header)
        else:
            done = self._frame_pages_done
            pages = min(PIECE_PAGES, header.pages - done)
            address = header.address + (done << PAGE_SHIFT)
            data = self._ring.address(slot) + self._slot_at + (done << PAGE_SHIFT)
            spaces = _spaces(header, self._also_bulk)
            refused = [each for each in spaces if not self._filling.fill(each, address, pages, data, Cause.BULK)]
            # What an address space does not take that is stuck will be asked for at the end.
            self._bulk_stalled = bool(refused) and not self._filling.others_wait()
            if self._bulk_stalled:
                return
            self._frame_pages_done += pages
            if self._frame_pages_done < header.pages:
                return
            self._also_bulk.clear()
        self._frame = None
        self._slot_at += header.length
        if self._slot_at == used:
            self._slot_at = 0
            self._slots_filled -= 1
            self._ring.release()

    def _retry(self) -> None:
        """Try again what was put off; the events that it waited for may have been read."""
        self._retries += 1
        if self._filling.newborns:
            self._bear()
        faults, self._put_off_faults = self._put_off_faults, {}
        for (mm, address), since in faults.items():
            if not mm.gone:
                self._fault(mm, address, since)
        for _ in range(len(self._put_off)):
            answer = self._put_off.popleft()
            data = address_of(answer.content)
            if not self._filling.fill(answer.space, answer.address, answer.pages, data, Cause.DEMAND):
                self._put_off.append(answer)
        if self._bulk_stalled:
            self._fill_piece()
        self._request_pieces()
        if not self._waits_for_event:
            self._filling.nothing_put_off()

    # Asking

    def _send(self, frame: bytes) -> None:
        at = 0
        while at < len(frame):
            try:
                at += self._demand.send(frame[at:] if at else frame)
            except BlockingIOError:
                select.select([], [self._demand], [])
            except OSError as error:
                raise Lost(f"demand channel: {error.strerror}") from error

    def _start_background(self) -> None:
        self._background_on = True
        self._send(wire.background(True))

    def _ask_for_rest(self) -> None:
        """Ask for a missing page that the bulk stream, which has ended, did not bring."""
        for mm in self._filling.incomplete:
            if mm.stalled_since or (isinstance(mm, Mm) and not self._bulk_ended):
                continue
            ordinal = mm.residency.next_absent()
            if ordinal >= 0:
                if page := self._filling.huge_page(mm.residency, ordinal):
                    self._asked_rest = self._request_huge(mm, page, 0)
                    return
                pages = self._window(mm.residency, ordinal, wire.MOST_DEMAND_PAGES)
                address = mm.residency.lazy.address(ordinal)
                self._asked_rest = (mm.residency.source, address)
                mm.residency.mark(ordinal, pages, REQUESTED)
                self._send(wire.request(mm.residency.source, address, pages))
                return

    # Keeping watch and telling

    def _tick(self, now: int) -> None:
        self._last_tick = now
        if now - self._last_probe >= _PROBE_NS:
            self._filling.probe()
            self._last_probe = now
        for mm in tuple(self._filling.mms.values()):
            if mm.residency.unsettled and mm.parent is None:
                self._filling.settled(mm)
        idle = now - self._last_fault >= self._background.idle_delay * 1e9
        if self._background.mode == "idle" and not self._background_on and idle:
            self._start_background()
        pages_left = sum(mm.residency.absent_pages for mm in self._filling.incomplete)
        progress = (pages_left, self._faults)
        if progress != self._last_progress:
            self._last_progress = progress
            self._report({"event": "progress", "pages_left": pages_left, **self._figures()}, lossy=True)

    def _figures(self) -> dict[str, int]:
        return {"faults": self._faults} | {cause.value: filled for cause, filled in self._filling.filled.items()}

    def _finish(self) -> None:
        # First, since who hears the report ends this process.
        try:
            self._send(wire.finish())
        except Lost as error:
            # Nothing is lost any more: every page is here.
            log.warning("the source was not told that every page has arrived: %s", error)
        self._report(
            {
                "event": "drained",
                "latency_p50_ns": self._latency.quantile(0.5),
                "latency_p99_ns": self._latency.quantile(0.99),
                "latency_max_ns": self._latency.longest,
                **self._figures(),
            }
        )
        for uffd in self._filling.mms:
            os.close(uffd)
        self._filling.mms.clear()

    def _report(self, message: dict[str, Any], *fds: int, lossy: bool = False) -> None:
        packed = msgpack.packb(message)
        flags = socket.MSG_NOSIGNAL | (socket.MSG_DONTWAIT if lossy else 0)
        try:
            if fds:
                socket.send_fds(self._reports, [packed], list(fds), flags)
            else:
                self._reports.send(packed, flags)
        except BlockingIOError:
            if not lossy:
                select.select([], [self._reports], [])
                self._report(message, *fds)
        except OSError as error:
            # Pages matter more than reports: who no longer listens must not stop the filling.
            log.warning("%s cannot be reported: %s", message["event"], error)


def _add(waiting: dict[int, wire.Header], header: wire.Header) -> None:
    """Keep an ALSO frame for the pages that it announces."""
    if len(waiting) >= _MOST_ALSO or header.space in waiting:
        raise ProtocolError(f"pages that are announced twice for a space, or for more than {_MOST_ALSO}")
    waiting[header.space] = header


def _spaces(header: wire.Header, announced: Mapping[int, wire.Header]) -> list[int]:
    """Whose the pages of a PAGES frame are."""
    if any(each.address != header.address or each.pages != header.pages for each in announced.values()):
        raise ProtocolError(f"other pages than those at {header.address:#x} were announced")
    return [header.space, *announced]


def _give_up(*_: object) -> NoReturn:
    raise Lost("the program is being ended")
