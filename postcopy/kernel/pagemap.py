"""``/proc/PID/pagemap``: which pages of a process exist, and of what kind (admin-guide/mm/pagemap).

PAGEMAP_SCAN (Linux 6.7) where the kernel has it, the 64-bit entries elsewhere.
"""

import array
import errno
import os
import struct
from collections.abc import Iterable, Iterator
from itertools import starmap

from msgspec import Struct

from postcopy.kernel._libc import ffi
from postcopy.kernel.libc import address_of, ioctl, refused
from postcopy.kernel.page import PAGE_SIZE

PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_GUARD = 1 << 8

_PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_ARGUMENT = struct.Struct("<12Q")
_REGION = struct.Struct("<3Q")
_REGIONS = 4096
# Bytes: to read the entries between two ranges that are nearer than this takes less than another call.
_NEAR = 64 * PAGE_SIZE

_PM_FRAME, _PM_EXCLUSIVE = (1 << 55) - 1, 1 << 56
_PM_PRESENT, _PM_SWAPPED, _PM_FILE, _PM_GUARD = 1 << 63, 1 << 62, 1 << 61, 1 << 58


class PageRegion(Struct, frozen=True):
    """Adjacent pages of the same categories (PAGE_IS_ bits); addresses in bytes."""

    start: int
    end: int
    categories: int


class Pagemap:
    """The pagemap of one process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        try:
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise refused(f"opening /proc/{pid}/pagemap", error.errno) from None
        self._scan_is_missing = False

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def for_each_region(self, start: int, end: int, *, files: bool) -> Iterator[PageRegion]:
        """The existing pages from ``start`` to ``end``: present, swapped or guard markers.

        With ``files``, whether they are of a file (PAGE_IS_FILE), which takes three times as long.
        """
        if not self._scan_is_missing:
            try:
                yield from self._scan(start, end, files)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL):
                    raise
                self._scan_is_missing = True
        yield from self._entries(start, end)

    def frames(self, start: int, pages: int) -> list[int]:
        """The numbers of the page frames (PFN) of ``pages`` pages; 0 where there is none, or we may not know it."""
        return frames_in(self._read(start, pages))

    def entries_of(self, places: Iterable[tuple[int, int]]) -> "array.array[int]":
        """The entries of pages that are given as ranges of addresses, in order."""
        every = array.array("Q")
        for entries in self._entries_of(places):
            every += entries
        return every

    def are_exclusive(self, start: int, pages: int) -> bool:
        """Whether no other process maps any of ``pages`` pages."""
        return _are_exclusive(self._read(start, pages))

    def exclusive_of(self, places: Iterable[tuple[int, int]]) -> list[bool]:
        """The same of each of several ranges of addresses, in order."""
        return list(map(_are_exclusive, self._entries_of(places)))

    def _entries_of(self, places: Iterable[tuple[int, int]]) -> "Iterator[array.array[int]]":
        for start, end, parts in _in_one_read(places):
            entries = self._read(start, (end - start) // PAGE_SIZE)
            for at, until in parts:
                yield entries[(at - start) // PAGE_SIZE : (until - start) // PAGE_SIZE]

    def _read(self, start: int, pages: int) -> "array.array[int]":
        return array.array("Q", os.pread(self._fd, 8 * pages, 8 * (start // PAGE_SIZE)))

    def try_scan(self, start: int, end: int) -> None:
        """Raises OSError (ENOTTY) where the kernel has no PAGEMAP_SCAN."""
        for _ in self._scan(start, end, files=False):
            pass

    def _scan(self, start: int, end: int, files: bool) -> Iterator[PageRegion]:
        wanted = (PAGE_IS_FILE if files else 0) | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_GUARD
        anyof = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_GUARD
        regions = bytearray(_REGION.size * _REGIONS)
        while start < end:
            argument = bytearray(
                # size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof mask, return mask
                _SCAN_ARGUMENT.pack(96, 0, start, end, 0, address_of(regions), _REGIONS, 0, 0, 0, anyof, wanted)
            )
            what = f"PAGEMAP_SCAN of process {self._pid} from {start:#x}"
            count = ioctl(what, self._fd, _PAGEMAP_SCAN, ffi.from_buffer(argument))
            yield from starmap(PageRegion, _REGION.iter_unpack(memoryview(regions)[: count * _REGION.size]))
            start = _SCAN_ARGUMENT.unpack(argument)[4]

    def _entries(self, start: int, end: int) -> Iterator[PageRegion]:
        step = 65536
        begin, previous = start, 0
        for first in range(start // PAGE_SIZE, end // PAGE_SIZE, step):
            count = min(step, end // PAGE_SIZE - first)
            entries = self._read(first * PAGE_SIZE, count)
            if not any(entries):
                if previous:
                    yield PageRegion(begin, first * PAGE_SIZE, previous)
                begin, previous = first * PAGE_SIZE, 0
                continue
            for number, entry in enumerate(entries, first):
                categories = _categories(entry)
                if categories != previous:
                    if previous:
                        yield PageRegion(begin, number * PAGE_SIZE, previous)
                    begin, previous = number * PAGE_SIZE, categories
        if previous:
            yield PageRegion(begin, end, previous)


def frames_in(entries: "array.array[int]") -> list[int]:
    """What `Pagemap.frames` says, out of the entries."""
    return [entry & _PM_FRAME if entry & _PM_PRESENT else 0 for entry in entries]


def _are_exclusive(entries: "array.array[int]") -> bool:
    return all(entry & _PM_EXCLUSIVE or not entry & _PM_PRESENT for entry in entries)


def _in_one_read(places: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Ranges that are near to each other, together: from where, to where, which."""
    parts: list[tuple[int, int]] = []
    for start, end in places:
        if parts and start - parts[-1][1] > _NEAR:
            yield parts[0][0], parts[-1][1], parts
            parts = []
        parts.append((start, end))
    if parts:
        yield parts[0][0], parts[-1][1], parts


def _categories(entry: int) -> int:
    found = PAGE_IS_PRESENT if entry & _PM_PRESENT else 0
    found |= PAGE_IS_SWAPPED if entry & _PM_SWAPPED else 0
    found |= PAGE_IS_GUARD if entry & _PM_GUARD else 0
    if found and entry & _PM_FILE:
        found |= PAGE_IS_FILE
    return found
