"""Memory with an identity of its own: made by us, with its content, and opened by the new processes by way of us.

They find our descriptors in a directory that every new process is born with, and open them anew.
"""

import contextlib
import fcntl
import mmap
import os

from postcopy.errors import RestoreError
from postcopy.kernel import procfs, system_v, userfaultfd
from postcopy.kernel.libc import address_of
from postcopy.kernel.page import page_up
from postcopy.page_ranges import PageRanges
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.shared_filling import HandedObject
from postcopy.sent_pages import SentPages
from postcopy.state import SharedMemory

_MAP_NORESERVE, _MAP_HUGETLB, _MAP_HUGE_SHIFT = 0x4000, 0x40000, 26


class SharedObjects:
    """All such memory of a tree. ``fds``: our descriptors of it by index (-1: a System V segment)."""

    def __init__(self, leftovers: Leftovers | None = None) -> None:
        self._leftovers = leftovers
        self.states: list[SharedMemory] = []
        self.fds: list[int] = []
        # Those that processes wait for page by page; the others are there before the tree runs.
        self.lazy: frozenset[int] = frozenset()
        self._segments: list[int] = []
        self._segment_fds: dict[int, int] = {}

    def make(self, states: list[SharedMemory], pages: SentPages, first: frozenset[int]) -> None:
        """Make all of it; ``pages``: those that came along; ``first``: see `filled_first`.

        Raises RestoreError.
        """
        self.states = states
        if any(PageRanges.unpack(state.lazy) for state in states) and _can_wait():
            self.lazy = frozenset(
                n for n, state in enumerate(states) if PageRanges.unpack(state.lazy) and state.space not in first
            )
        place = 0
        for state in states:
            count = PageRanges.unpack(state.sent).total_pages
            try:
                self.fds.append(self._make(state, pages.part(place, count)))
            except (OSError, ValueError, OverflowError) as error:
                raise RestoreError(f"making {state.kind} memory {state.name} of {state.size} bytes: {error}") from None
            place += count

    def _make(self, state: SharedMemory, pages: SentPages) -> int:
        if state.system_v is not None:
            self._make_segment(state, pages)
            return -1
        fd = _anonymous(state) if state.kind in ("anonymous", "huge") else _memfd(state)
        _fill(fd, state, pages)
        return fd

    def _make_segment(self, state: SharedMemory, pages: SentPages) -> None:
        assert state.system_v is not None
        identifier = state.system_v.identifier
        key = 0 if state.system_v.removed else state.system_v.key
        size = state.system_v.size
        system_v.create(identifier, key, size, reserved=state.reserved, huge_shift=state.huge_shift)
        self._segments.append(identifier)
        if self._leftovers is not None:
            self._leftovers.segment(identifier)
        address = system_v.attach(identifier)
        try:
            fd = os.open(_map_file(address, page_up(state.size)), os.O_RDWR | os.O_CLOEXEC)
            self._segment_fds[len(self.fds)] = fd
            _fill(fd, state, pages)
        finally:
            system_v.detach(address)
        system_v.set_owner(identifier, state.owner, state.mode)

    def to_fill(self) -> list[HandedObject]:
        """What of it lacks pages; the descriptors stay ours."""
        return [
            HandedObject(
                state.space, self._segment_fds.get(n, fd), state.size, lazy, n not in self.lazy, state.huge_shift
            )
            for n, (state, fd) in enumerate(zip(self.states, self.fds, strict=True))
            if (lazy := PageRanges.unpack(state.lazy))
        ]

    def finish(self) -> None:
        """Once the processes are built, and all is filled that they do not wait for: what would have been in the way.

        Raises RestoreError.
        """
        for state, fd in zip(self.states, self.fds, strict=True):
            try:
                if state.seals:
                    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, state.seals)
                if state.system_v is not None and state.system_v.removed:
                    system_v.remove(state.system_v.identifier)
            except OSError as error:
                raise RestoreError(f"sealing {state.kind} memory {state.name}: {error.strerror}") from None
        self._close()

    def undo(self) -> None:
        """Leave nothing behind."""
        for identifier in self._segments:
            with contextlib.suppress(OSError):
                system_v.remove(identifier)
        self._close()

    def _close(self) -> None:
        for fd in (*self.fds, *self._segment_fds.values()):
            if fd >= 0:
                os.close(fd)
        self.fds = []
        self._segment_fds = {}


def _can_wait() -> bool:
    """Whether the kernel can say what is at an address that a thread waits for: see `Filling.share` (Linux 5.14)."""
    fd = userfaultfd.userfaultfd(os.O_CLOEXEC)
    try:
        return bool(userfaultfd.api(fd, 0) & userfaultfd.UFFD_FEATURE_MINOR_SHMEM)
    finally:
        os.close(fd)


def _anonymous(state: SharedMemory) -> int:
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | (0 if state.reserved else _MAP_NORESERVE)
    flags |= _MAP_HUGETLB | state.huge_shift << _MAP_HUGE_SHIFT if state.huge_shift else 0
    with mmap.mmap(-1, state.size, flags=flags) as mapping:
        return os.open(_map_file(address_of(mapping), state.size), os.O_RDWR | os.O_CLOEXEC)


def _map_file(address: int, size: int) -> str:
    """The entry of ``map_files`` for one of our own mappings."""
    line = next(line for line in procfs.for_each_vma(os.getpid()) if line.start <= address < line.end)
    if line.start != address or line.end - line.start != size:
        raise OSError(f"the mapping at {address:#x} is not of {size} bytes")
    return f"/proc/self/map_files/{line.start:x}-{line.end:x}"


def _memfd(state: SharedMemory) -> int:
    huge = os.MFD_HUGETLB | state.huge_shift << os.MFD_HUGE_SHIFT if state.huge_shift else 0
    fd = os.memfd_create(state.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | huge)
    os.ftruncate(fd, state.size)
    os.fchown(fd, *state.owner)
    os.fchmod(fd, state.mode)
    return fd


def _fill(fd: int, state: SharedMemory, pages: SentPages) -> None:
    """Write the pages that came along, and no others: a huge page would bring its neighbours, empty."""
    sent = PageRanges.unpack(state.sent)
    if not sent:
        return
    with mmap.mmap(fd, state.size) as mapping:
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_NOHUGEPAGE)
        place = 0
        for each in sent:
            length = min(each.end, state.size) - each.start
            mapping[each.start : each.start + length] = pages.joined(place, each.pages)[:length]
            place += each.pages
