"""Putting pages into the address spaces of the destination, and what the kernel may answer to that.

Only the fault handler's process does it, and it does so from its main loop: an ioctl that meets an unread layout
change fails with EAGAIN and is put off until the loop has read the change.
"""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from time import monotonic_ns

from msgspec import Struct, field

from postcopy.errors import ProtocolError
from postcopy.huge_pages import HugeArea, HugeAreas
from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.libc import address_of
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.page_ranges import PageRange, PageRanges
from postcopy.restore_side import newborn
from postcopy.restore_side.arrivals import Arrivals
from postcopy.restore_side.hole_watch import HoleWatch, Undecided
from postcopy.restore_side.populating import populating
from postcopy.restore_side.residency import PRESENT, REMOVED, AddressSpace, Run
from postcopy.restore_side.shared_filling import Part, Parts, SharedObject, never_written

_OUT_OF_MEMORY_NS = 10_000_000_000
# EAGAIN ends when the thread that changes the layout has run and its event has been read; that is a matter of 10 us.
_STUCK_NS = 60_000_000
_ASK_AGAIN_NS = 200_000_000


class Lost(Exception):
    """No more pages will come."""


class Cause(Enum):
    """Why a page was filled."""

    DEMAND = "bytes_demand"
    BULK = "bytes_bulk"
    ZERO = "bytes_zero"


class Mm(Struct, eq=False):
    """One address space of the destination, while it exists."""

    uffd: int
    residency: AddressSpace
    # Where shared memory is in it; None: there has never been any.
    parts: Parts | None = None
    gone: bool = False
    # Fault-around: the ordinal at which a sequential reader will fault next -> the pages it was given last.
    streams: dict[int, int] = {}
    # Since when the kernel answers EAGAIN without an event to read; 0: it does not.
    stalled_since: int = 0
    # In a stall: when to look next for a thread that populates, and whether one was found.
    look_at: int = 0
    populating: bool = False
    # Whose child it is, until it is certain with which layout it was born; see `Filling.born`.
    parent: "Mm | None" = None
    # The parent's layout changes since the fork was told, and what the child itself has told meanwhile.
    later: list[tuple[int, int, int]] = []
    early: list[uffdio.Message] = []
    # Of the places that its parent's missing pages had at the fork, those where it has no memory; None: not known.
    holes: list[tuple[int, int]] | None = None
    # Forked here: nothing keeps huge pages in reserve for its private memory.
    forked: bool = False
    # Private hugetlb memory that no layout change has been about.
    untouched: PageRanges = field(default_factory=PageRanges)
    # Pages that were taken out of the userfaultfd's hands, to be given back before the next message is read.
    unregistered: list[int] = []

    def end_stall(self) -> None:
        """The kernel has answered something else than EAGAIN, or may do so now."""
        self.stalled_since = self.look_at = 0
        self.populating = False

    @property
    def stuck(self) -> bool:
        """Whether EAGAIN has gone on for so long that others should not wait for its end."""
        return bool(self.stalled_since) and monotonic_ns() - self.stalled_since > _STUCK_NS


class Filling:
    """The address spaces, and how to fill them; ``forgotten`` is called with each that turns out to be gone."""

    def __init__(self, forgotten: Callable[[Mm], None]) -> None:
        """No address spaces yet."""
        self.mms: dict[int, Mm] = {}
        self.objects: dict[int, SharedObject] = {}
        # Those that lack pages.
        self.incomplete: set[Mm | SharedObject] = set()
        self.newborns: list[Mm] = []
        # Where hugetlb memory is in the spaces of the source.
        self.huge: dict[int, HugeAreas] = {}
        self.arrivals = Arrivals()
        self._huge_sizes: list[int] = []
        self._holes: HoleWatch | None = None
        self._zeros = never_written(PAGE_SIZE)
        self.filled = dict.fromkeys(Cause, 0)
        self.waits_for_memory = False
        self._forgotten = forgotten
        self._families: dict[int, list[Mm]] = {}
        self._out_of_memory_since = 0

    def adopt(
        self, uffd: int, residency: AddressSpace, parts: Parts | None = None, huge: HugeAreas | None = None
    ) -> Mm:
        """One more address space; ``huge``: where it has lazy hugetlb memory of its own."""
        mm = self.mms[uffd] = Mm(uffd, residency, parts)
        if huge is not None:
            self._add_huge(residency.source, huge)
            mm.untouched = PageRanges.from_pairs((area.start, area.end) for area in huge.areas)
        self._families.setdefault(residency.source, []).append(mm)
        if residency.absent_pages:
            self.incomplete.add(mm)
        return mm

    def adopt_child(self, uffd: int, parent: Mm) -> None:
        """One that has been forked; nothing is filled there, nor are its messages read, before it is `born`."""
        holes, residency = None, parent.residency
        # At once, while it begins: what it makes grow into such a place, nobody tells.
        with suppress(BlockingIOError):
            holes = newborn.holes(residency, partial(uffdio.registered, uffd))
        child = self.adopt(uffd, residency.fork(), parent.parts.fork() if parent.parts is not None else None)
        child.parent = parent
        child.forked = True
        child.untouched = parent.untouched
        child.stalled_since = monotonic_ns()
        child.holes = holes
        self.newborns.append(child)

    def moved(self, mm: Mm, first: int, second: int, length: int = 0) -> None:
        """A layout change of ``mm`` has been read, as `AddressSpace.born` takes them."""
        told = [mm]
        for child in self.newborns:
            if child.parent is mm:
                child.later.append((first, second, length))
                told.append(child)
        if mm.untouched:
            places = [(first, first + length), (second, second + length)] if length else [(first, second)]
            for each in told:
                each.untouched = each.untouched.subtract(PageRanges.from_pairs(places))

    def born(self, child: Mm) -> bool:
        """Whether it is certain which of the parent's layout changes the child was born with.

        A thread of the parent may have changed the layout before another one forked, and tell of it later, or the other
        way round. So nothing older may be due in the parent; then the child is asked what it has.
        """
        parent = child.parent
        if parent is None or not (parent.gone or self.settled(parent)):
            return False
        residency = child.residency
        holes = child.holes or []
        if child.later or residency.unsettled or child.holes is None:
            residency = residency.fork()
            try:
                was_registered = partial(newborn.was_registered, child.uffd, child.early)
                residency.born(child.later, was_registered)
                residency.settle(place for place in residency.doubtful if not was_registered(place[0]))
                holes += newborn.holes(residency, was_registered)
            except BlockingIOError:
                # It lives on meanwhile, and changes its layout.
                child.early += uffdio.read_messages(child.uffd)
                return False
            child.residency = residency
        residency.give_up(holes)
        child.parent = None
        child.later.clear()
        child.end_stall()
        if not residency.absent_pages:
            self.incomplete.discard(child)
        self.newborns.remove(child)
        return True

    def adopt_object(self, shared: SharedObject) -> None:
        """Shared memory, which lacks pages."""
        self.objects[shared.residency.source] = shared
        self.incomplete.add(shared)
        if shared.is_huge:
            self._holes = self._holes or HoleWatch()
            shared.watch = self._holes.add(shared.handed.fd)
            area = HugeArea(0, shared.handed.size, shared.handed.huge_shift)
            self._add_huge(shared.residency.source, HugeAreas([area]))

    def doubt(self, part: Part, now: int) -> None:
        """Pages of shared memory may be about to be dropped, by MADV_REMOVE, or else by nobody."""
        shared = self.objects[part.space]
        if shared.is_huge and shared.open:
            shared.doubts.add(part.offset, part.offset + part.end - part.start, now)

    def note_holes(self) -> None:
        """Find out what has been dropped of hugetlb memory. Not between the reading of an event and its `doubt`."""
        if self._holes is None:
            return
        told = self._holes.changed()
        for shared in self.objects.values():
            if shared.open and (shared.doubts.ranges or shared.watch in told):
                self._note_holes_in(shared, shared.watch in told)

    def _note_holes_in(self, shared: SharedObject, told: bool) -> None:
        try:
            dropped = shared.doubts.decide(told, monotonic_ns())
        except Undecided:
            raise Lost("nobody can tell which missing pages the program has dropped (MADV_REMOVE)") from None
        for start, end in dropped:
            shared.residency.remove(start, end)
            shared.wake(start, end)
        if not shared.residency.absent_pages:
            self._close_object(shared)

    def _add_huge(self, space: int, areas: HugeAreas) -> None:
        self.huge[space] = areas
        self._huge_sizes = sorted({1 << area.shift for each in self.huge.values() for area in each.areas})
        self._zeros = never_written(self._huge_sizes[-1])

    def huge_page(self, residency: AddressSpace, ordinal: int) -> PageRange | None:
        """The huge page, by its addresses at the source, that a lazy page is part of."""
        areas = self.huge.get(residency.source)
        return None if areas is None else areas.page(residency.lazy.address(ordinal))

    @property
    def lacks_shared(self) -> bool:
        """Whether any shared memory lacks pages."""
        return any(shared in self.incomplete for shared in self.objects.values())

    def _close_object(self, shared: SharedObject) -> None:
        self.incomplete.discard(shared)
        shared.close()
        if self._holes is not None and not self._lacks_shared_huge:
            self._holes.close()
            self._holes = None

    def forget(self, mm: Mm) -> None:
        """The process of this address space has ended or executed another program."""
        if mm.gone:
            return
        mm.gone = True
        self.incomplete.discard(mm)
        self._families[mm.residency.source].remove(mm)
        del self.mms[mm.uffd]
        self._forgotten(mm)
        os.close(mm.uffd)
        if not self.mms:
            # Nobody is left who could read them.
            for shared in self.objects.values():
                if shared in self.incomplete:
                    self._close_object(shared)

    def probe(self) -> None:
        """Forget the address spaces that are gone."""
        for mm in tuple(self.mms.values()):
            if mm.parent is None and not uffdio.mm_exists(mm.uffd):
                self.forget(mm)

    def read_messages(self, mm: Mm) -> list[uffdio.Message]:
        """What is queued; whoever waits for that of its event to be read goes on meanwhile.

        So what was unregistered is given back before: else the mapping would be in pieces, and an mremap(2) of all of
        it fail with EFAULT.
        """
        if mm.unregistered:
            for each in PageRanges.from_pairs((page, page + PAGE_SIZE) for page in mm.unregistered):
                with suppress(OSError):
                    uffdio.register(mm.uffd, each.start, each.end - each.start, uffdio.UFFDIO_REGISTER_MODE_MISSING)
            mm.unregistered.clear()
        return uffdio.read_messages(mm.uffd)

    def fill(self, space: int, address: int, pages: int, data: int, cause: Cause) -> bool:
        """Put pages where they are missing, in every descendant; False when some have to be put off.

        ``address`` is where they were at the source, ``data`` where they are in this process. What is part of a huge
        page is kept until all of that is there.
        """
        huge = self.huge.get(space) if self.huge else None
        if huge is None:
            return self._fill(space, address, pages, data, cause)
        complete, streamed = True, cause is Cause.BULK
        for part, page in huge.parts(address, address + (pages << PAGE_SHIFT)):
            at = data + part.start - address
            if page is None:
                complete = self._fill(space, part.start, part.pages, at, cause) and complete
            elif whole := self.arrivals.take(space, page, part, at, streamed=streamed):
                if self._fill(space, page.start, page.pages, whole, cause, huge=True):
                    self.arrivals.done(space, page, streamed=streamed)
                else:
                    complete = False
        return complete

    def _fill(self, space: int, address: int, pages: int, data: int, cause: Cause, *, huge: bool = False) -> bool:
        if (shared := self.objects.get(space)) is not None:
            return self._fill_object(shared, address, pages, data, cause)
        family = self._families.get(space)
        if family is None:
            raise ProtocolError(f"the source has sent pages of an address space {space}, which there is not")
        complete = True
        for mm in tuple(family):
            residency = mm.residency
            if not residency.absent_pages:
                continue
            if mm.parent is not None or (residency.unsettled and not self.settled(mm)):
                complete = False
                continue
            for run in residency.missing_runs(address, pages):
                offset = residency.lazy.address(run.ordinal) - address
                if huge:
                    if run.pages != pages:
                        raise Lost(f"only a part of the huge page from {address:#x} on is missing")
                    if not self._copy_huge(mm, run, data, cause):
                        complete = False
                elif not self._copy(mm, run.address, run.ordinal, run.pages, data + offset, cause):
                    complete = False
                    break
            if not residency.absent_pages:
                self.incomplete.discard(mm)
        return complete

    def _fill_object(self, shared: SharedObject, offset: int, pages: int, data: int, cause: Cause) -> bool:
        residency = shared.residency
        if shared.is_huge:
            self.note_holes()
        if shared not in self.incomplete:
            return True
        if shared.is_huge and shared.doubts.overlap(offset, offset + (pages << PAGE_SHIFT)):
            return False
        for run in residency.missing_runs(offset, pages):
            at, end = run.address, run.address + (run.pages << PAGE_SHIFT)
            while at < end:
                try:
                    done = shared.copy(at, data + at - offset, end - at)
                except OSError as error:
                    if error.errno == errno.EAGAIN or self._out_of_memory(error):
                        return False
                    if error.errno == errno.EEXIST:
                        raise Lost(f"a page of shared memory was there before its content had come ({at:#x})") from None
                    raise Lost(f"UFFDIO_COPY to shared memory at {at:#x}: {error.strerror}") from error
                residency.mark(residency.lookup(at), done >> PAGE_SHIFT, PRESENT)
                self.filled[cause] += done
                shared.wake(at, at + done)
                at += done
        if not residency.absent_pages:
            self._close_object(shared)
        return True

    def zero_in_object(self, shared: SharedObject, offset: int) -> bool:
        """Put a page of zeros that the source never had, or that was dropped; whether there was none."""
        if not shared.open:
            return False
        try:
            made = shared.zero(offset)
        except OSError as error:
            if not self._out_of_memory(error):
                raise Lost(f"UFFDIO_ZEROPAGE in shared memory at {offset:#x}: {error.strerror}") from error
            return False
        if made:
            self.filled[Cause.ZERO] += shared.page_size
        return made

    def share(self, mm: Mm, address: int) -> bool | None:
        """Let who waits at ``address`` go on, whatever is there, without making a page of shared memory.

        None when shared memory is there that has no such page (yet), or may be; False when it has to be put off.
        """
        try:
            uffdio.continue_(mm.uffd, address, PAGE_SIZE)
        except OSError as error:
            if error.errno != errno.EAGAIN and mm.stalled_since:
                mm.end_stall()
            match error.errno:
                case errno.EFAULT:
                    return None
                case errno.EINVAL:
                    return self.zero(mm, address)
                case errno.EAGAIN:
                    mm.stalled_since = mm.stalled_since or monotonic_ns()
                    return False
                case errno.EEXIST | errno.ENOENT:
                    uffdio.wake(mm.uffd, address, PAGE_SIZE)
                case errno.ESRCH:
                    self.forget(mm)
                case _:
                    if self._out_of_memory(error):
                        return False
                    raise Lost(f"UFFDIO_CONTINUE at {address:#x}: {error.strerror}") from error
        return True

    def settled(self, mm: Mm) -> bool:
        """Whether every layout change that the kernel has begun has been read; see `AddressSpace.settle`."""
        residency = mm.residency
        try:
            settled = uffdio.settled(mm.uffd)
            gone = [place for place in residency.doubtful if not uffdio.registered(mm.uffd, place[0])]
        except BlockingIOError:
            settled = False
        if not settled:
            mm.stalled_since = mm.stalled_since or monotonic_ns()
            return False
        mm.end_stall()
        residency.settle(gone)
        if not residency.absent_pages:
            self.incomplete.discard(mm)
        return True

    def _copy(self, mm: Mm, address: int, ordinal: int, pages: int, data: int, cause: Cause) -> bool:
        """UFFDIO_COPY of one run; False when it has to be put off."""
        while pages and not mm.gone:
            try:
                done = uffdio.copy(mm.uffd, address, data, pages << PAGE_SHIFT) >> PAGE_SHIFT
            except OSError as error:
                if error.errno == errno.ENOENT and pages > 1:
                    # The run may cross the border of two mappings, which mprotect can split without any event.
                    half = pages >> 1
                    rest = half << PAGE_SHIFT
                    return self._copy(mm, address, ordinal, half, data, cause) and self._copy(
                        mm, address + rest, ordinal + half, pages - half, data + rest, cause
                    )
                if not self._copy_refused(mm, address, ordinal, error):
                    return False
                done = 1
            else:
                if mm.stalled_since:
                    mm.end_stall()
                mm.residency.mark(ordinal, done, PRESENT)
                self.filled[cause] += done << PAGE_SHIFT
            address += done << PAGE_SHIFT
            data += done << PAGE_SHIFT
            ordinal += done
            pages -= done
        return True

    def _copy_refused(self, mm: Mm, address: int, ordinal: int, error: OSError) -> bool:
        """Whether the page needs nothing more."""
        if error.errno == errno.EAGAIN:
            mm.stalled_since = mm.stalled_since or monotonic_ns()
            return False
        if error.errno == errno.ESRCH:
            self.forget(mm)
        elif error.errno == errno.EEXIST:
            # Nobody but us puts pages there, so its content cannot be right.
            raise Lost(f"a page at {address:#x} was there before its content had come")
        elif error.errno == errno.ENOENT:
            # Not registered, so no thread can wait for it: MADV_DONTFORK, or an unmap event that is on its way.
            mm.residency.mark(ordinal, 1, REMOVED)
            uffdio.wake(mm.uffd, address, PAGE_SIZE)
        elif self._out_of_memory(error):
            return False
        else:
            raise Lost(f"UFFDIO_COPY to {address:#x}: {error.strerror}") from error
        return True

    def zero(self, mm: Mm, address: int) -> bool | None:
        """Put a page of zeros, if there is none, and wake who waits for it; False when it has to be put off.

        None: see `share`; only while shared memory lacks pages.
        """
        try:
            uffdio.zeropage(mm.uffd, address, PAGE_SIZE)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return self._populated(mm, address)
            if error.errno in (errno.EEXIST, errno.ENOENT):
                # EEXIST wakes nobody. ENOENT: no longer registered, the thread must find that out by itself.
                uffdio.wake(mm.uffd, address, PAGE_SIZE)
            elif error.errno == errno.ESRCH:
                self.forget(mm)
            elif error.errno == errno.EINVAL and self._huge_sizes:
                return self._zero_huge(mm, address)
            elif self._out_of_memory(error):
                return False
            else:
                raise Lost(f"UFFDIO_ZEROPAGE at {address:#x}: {error.strerror}") from error
            return True
        if mm.stalled_since:
            mm.end_stall()
        self.filled[Cause.ZERO] += PAGE_SIZE
        return True

    def _zero_huge(self, mm: Mm, address: int) -> bool | None:
        """The same for hugetlb memory, which UFFDIO_ZEROPAGE refuses; the kernel does not tell the size of its pages.

        Nor does it tell private memory from shared memory whose page is missing (UFFDIO_CONTINUE: EFAULT). Before the
        last of the latter has come, private memory is that which was private when the tree was made, unless a layout
        change was about it; and a copy that is not refused with EAGAIN proves that none has begun that we do not know.
        """
        certain = mm.parts is None or not self._lacks_shared_huge or mm.untouched.contains(address)
        for size in self._huge_sizes:
            try:
                if certain:
                    uffdio.copy(mm.uffd, address, address_of(self._zeros), size)
                else:
                    uffdio.continue_(mm.uffd, address, size)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    continue
                if error.errno == errno.EFAULT and not certain:
                    return None
                return self._zero_refused(mm, address, size, error)
            mm.end_stall()
            self.filled[Cause.ZERO] += size if certain else 0
            return True
        raise Lost(f"a page of unknown size is missing at {address:#x}")

    @property
    def _lacks_shared_huge(self) -> bool:
        return any(shared.is_huge and shared in self.incomplete for shared in self.objects.values())

    def _zero_refused(self, mm: Mm, address: int, size: int, error: OSError) -> bool:
        """Whether the huge page needs nothing more."""
        if error.errno == errno.EAGAIN:
            mm.stalled_since = mm.stalled_since or monotonic_ns()
            return False
        if error.errno == errno.ESRCH:
            self.forget(mm)
        elif error.errno == errno.ENOENT:
            uffdio.wake(mm.uffd, address, size)
        elif error.errno in (errno.EEXIST, errno.ENOMEM):
            return self._none_left(mm, address, size) is not None
        else:
            raise Lost(f"filling a huge page at {address:#x}: {error.strerror}") from error
        return True

    def _copy_huge(self, mm: Mm, run: Run, data: int, cause: Cause) -> bool:
        """UFFDIO_COPY of a huge page; False when it has to be put off."""
        size = run.pages << PAGE_SHIFT
        try:
            uffdio.copy(mm.uffd, run.address, data, size)
        except OSError as error:
            if mm.forked and error.errno in (errno.EEXIST, errno.ENOMEM):
                left = self._none_left(mm, run.address, size)
                if left is None:
                    return False
                if not left:
                    mm.residency.mark(run.ordinal, run.pages, PRESENT)
                    return True
            if not self._copy_refused(mm, run.address, run.ordinal, error):
                return False
            if error.errno == errno.ENOENT:
                mm.residency.mark(run.ordinal, run.pages, REMOVED)
            return True
        mm.end_stall()
        mm.residency.mark(run.ordinal, run.pages, PRESENT)
        self.filled[cause] += size
        return True

    def _none_left(self, mm: Mm, address: int, size: int) -> bool | None:
        """Whether a huge page is there; where none is, since the host has none left, whoever touches it gets SIGBUS.

        As the kernel has it where a child needs a copy of a private page and there is none. UFFDIO_COPY says EEXIST
        then (mm/hugetlb.c, hugetlb_mfill_atomic_pte), as it does where the page is there; UFFDIO_POISON fails with
        EEXIST only there. But it looks at the page table alone, which may not have a page yet that shared memory has.
        None when it has to be put off.
        """
        for made, attempt in ((True, uffdio.continue_), (False, uffdio.poison)):
            try:
                attempt(mm.uffd, address, size)
            except OSError as error:
                match error.errno:
                    case errno.EFAULT if made:
                        continue
                    case errno.EAGAIN:
                        mm.stalled_since = mm.stalled_since or monotonic_ns()
                        return None
                    case errno.EEXIST | errno.ENOENT:
                        uffdio.wake(mm.uffd, address, size)
                        return True
                    case errno.ESRCH:
                        self.forget(mm)
                        return True
                raise Lost(f"no huge page is left for {address:#x}: {error.strerror}") from error
            return made
        return True

    def _populated(self, mm: Mm, address: int) -> bool:
        """A page that was never at the source must wait for an event: let the kernel fill it, if else it waits for us.

        It may be a page of locked memory that grows by a move: see `populating`. Out of the userfaultfd's hands the
        page becomes zeros, which is what it must be, and its thread goes on to queue the event.
        """
        now = monotonic_ns()
        mm.stalled_since = mm.stalled_since or now
        if mm.residency.lookup(address) >= 0 or now - mm.stalled_since < _STUCK_NS:
            return False
        if not mm.populating:
            if now < mm.look_at:
                return False
            # The one event that could not be read yet may be a move of missing pages to this address.
            mm.populating = populating(address)
            mm.look_at = now + _ASK_AGAIN_NS
        if mm.populating:
            with suppress(OSError):
                uffdio.unregister(mm.uffd, address, PAGE_SIZE)
                mm.unregistered.append(address)
            uffdio.wake(mm.uffd, address, PAGE_SIZE)
        return mm.populating

    def _out_of_memory(self, error: OSError) -> bool:
        """Whether to try again: a memory cgroup at its limit can recover, and the page is still at the source."""
        if error.errno != errno.ENOMEM:
            return False
        now = monotonic_ns()
        self.waits_for_memory = True
        self._out_of_memory_since = self._out_of_memory_since or now
        if now - self._out_of_memory_since > _OUT_OF_MEMORY_NS:
            raise Lost("the destination has no memory left for the pages of the program") from error
        return True

    def others_wait(self) -> bool:
        """Whether all that keeps pages from being filled is stuck, and other address spaces lack pages too."""
        stalled = [mm for mm in self.incomplete if mm.stalled_since]
        return 0 < len(stalled) < len(self.incomplete) and all(mm.stuck for mm in stalled)

    def nothing_put_off(self) -> None:
        """Everything that was put off has been done: whatever it waited for, it is there."""
        self.waits_for_memory = False
        self._out_of_memory_since = 0
