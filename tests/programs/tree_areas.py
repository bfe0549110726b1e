"""Memory that the workers of `tree_stress` share: each page has one writer, and all of them read it at any time.

A page tells its version in each of its 16-byte units, so a reader can say without a lock whether what it sees is right:
every unit is of this page, and no version is older than the oldest that it has seen there before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import struct
from dataclasses import dataclass, field
from pathlib import Path

from tests.programs.layout_stress import (
    MADV_DONTNEED,
    MADV_REMOVE,
    MAP_FIXED,
    MAP_SHARED,
    MREMAP_FIXED,
    MREMAP_MAYMOVE,
    PAGE,
    PROT_NONE,
    PROT_READ_WRITE,
    ZERO_PAGE,
    Broken,
    copy_in,
    copy_out,
    page_bytes,
    sys_madvise,
    sys_mmap,
    sys_mremap,
    sys_munmap,
)

MAP_PRIVATE_RESERVE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
IPC_PRIVATE, IPC_RMID = 0, 0
MAP_HUGETLB, HUGE = 0x40000, 512  # pages
MARK = 0xA5EA << 48
MOST = (1 << 32) - 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.shmat.restype = ctypes.c_void_p
_libc.shmat.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_libc.shmdt.argtypes = (ctypes.c_void_p,)


def fail_on(outcome: int | None, what: str) -> int:
    """OSError for -1."""
    if outcome is None or outcome in (-1, (1 << 64) - 1):
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return outcome


@dataclass(eq=False)
class Area:
    """One object as one process has it mapped. ``seen``: of each page, the version that was seen last."""

    number: int
    kind: str
    pages: int
    fd: int = -1
    segment: int = -1
    address: int = 0
    seen: list[int] = field(default_factory=list)

    @classmethod
    def make(cls, number: int, kind: str, pages: int, directory: Path) -> Area:
        """A new object, mapped; its pages are all at their first version."""
        area = cls(number, kind, pages, seen=[1] * pages)
        if area.is_anonymous:
            flags = mmap.MAP_ANONYMOUS | (mmap.MAP_PRIVATE if area.is_private else MAP_SHARED)
            area.address = sys_mmap(0, pages * PAGE, PROT_READ_WRITE, flags | area.is_huge * MAP_HUGETLB, -1, 0)
        elif kind == "segment":
            area.segment = fail_on(_libc.shmget(IPC_PRIVATE, pages * PAGE, 0o600), "shmget")
            area.attach()
        else:
            path = directory / f"area-{number}"
            if kind.endswith("memfd"):
                area.fd = os.memfd_create("area", os.MFD_CLOEXEC | area.is_huge * os.MFD_HUGETLB)
            else:
                area.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.ftruncate(area.fd, pages * PAGE)
            os.set_inheritable(area.fd, True)
            area.attach()
            if kind == "deleted file":
                path.unlink()
        for page in range(pages):
            copy_in(area.address + page * PAGE, area.content(page, 1))
        return area

    def attach(self) -> None:
        """Map it, by descriptor or id."""
        if self.segment >= 0:
            self.address = fail_on(_libc.shmat(self.segment, None, 0), "shmat")
        else:
            self.address = sys_mmap(0, self.pages * PAGE, PROT_READ_WRITE, MAP_SHARED, self.fd, 0)

    def remove(self) -> None:
        """The System V segment ends with the last process that is attached."""
        if self.segment >= 0:
            fail_on(_libc.shmctl(self.segment, IPC_RMID, None), "shmctl")

    @property
    def is_huge(self) -> bool:
        """Whether it is of hugetlb pages: their size is that of every change of a mapping."""
        return self.kind.startswith("huge")

    @property
    def is_private(self) -> bool:
        """Whether each process has it by itself: it begins as the root has it."""
        return self.kind == "huge private"

    @property
    def is_anonymous(self) -> bool:
        """Whether it is lost with execve(2)."""
        return self.kind in ("anonymous", "huge anonymous", "huge private")

    @property
    def has_holes(self) -> bool:
        """Whether pages may be thrown away: then zeros are right as well."""
        return self.kind in ("anonymous", "memfd", "segment", "huge private")

    def content(self, page: int, version: int) -> bytes:
        """The bytes of a page; version 0 is a hole."""
        return page_bytes(MARK | self.number << 44 | page << 32 | version) if version else ZERO_PAGE

    def take_over(self, pages: range) -> None:
        """Of a new writer of these pages: they are as the one before has left them."""
        for page in pages:
            self.look(page)
            self.check_own(page)

    def write(self, page: int, chance: random.Random) -> None:
        """Of the page's writer: the next version."""
        self.check_own(page)
        version = self.seen[page] + 1
        content = self.content(page, version)
        if self.fd >= 0 and not self.is_huge and chance.random() < 0.4:
            os.pwrite(self.fd, content, page * PAGE)
        else:
            copy_in(self.address + page * PAGE, content)
        self.seen[page] = version
        self.check_own(page)

    def punch(self, page: int) -> None:
        """Of the page's writer: throw it away, and write the next version."""
        self.check_own(page)
        if self.is_private:
            first = page // HUGE * HUGE
            sys_madvise(self.address + first * PAGE, HUGE * PAGE, MADV_DONTNEED)
            self.seen[first : first + HUGE] = [0] * HUGE
        else:
            sys_madvise(self.address + page * PAGE, PAGE, MADV_REMOVE)
        found = copy_out(self.address + page * PAGE, PAGE)
        if found != ZERO_PAGE:
            raise self._broken(page, found, "a page that was thrown away is not zero")
        self.seen[page] += 1
        copy_in(self.address + page * PAGE, self.content(page, self.seen[page]))

    def check_own(self, page: int) -> None:
        """Of the page's writer: it is what was written last."""
        found = self._bytes(page)
        if found != self.content(page, self.seen[page]):
            raise self._broken(page, found, "a page is not what its only writer has written last")

    def look(self, page: int, by_descriptor: bool = False) -> None:
        """Of anybody: what is there may have been written, and not before what has been seen already."""
        found = os.pread(self.fd, PAGE, page * PAGE) if by_descriptor and self.fd >= 0 else self._bytes(page)
        words = memoryview(found).cast("Q")
        first, second = struct.unpack_from("<QQ", self.content(page, 1))
        versions = {word ^ first ^ 1 for word in words[::2] if word or not self.has_holes}
        versions |= {word ^ second ^ 1 for word in words[1::2] if word or not self.has_holes}
        if any(not 0 < version <= MOST for version in versions):
            raise self._broken(page, found, "a shared page has what was never written there")
        if versions:
            if min(versions) < self.seen[page]:
                raise self._broken(page, found, "a shared page has gone back in time")
            self.seen[page] = min(versions)

    def _bytes(self, page: int) -> bytes:
        return copy_out(self.address + page * PAGE, PAGE)

    def _broken(self, page: int, found: bytes, what: str) -> Broken:
        first, second = struct.unpack_from("<QQ", found)
        return Broken(
            what,
            area=f"{self.number} ({self.kind})",
            page=page,
            address=hex(self.address + page * PAGE),
            seen_before=self.seen[page],
            found=f"{first:#x} {second:#x}, {len({found[i : i + 16] for i in range(0, PAGE, 16)})} different units",
            a_moment_later=self._bytes(page)[:16].hex(),
            by_descriptor=os.pread(self.fd, 16, page * PAGE).hex() if self.fd >= 0 else "",
        )

    # Changes of one process's mappings; nobody else notices

    def drop(self, chance: random.Random) -> None:
        """MADV_DONTNEED of shared memory keeps what is there."""
        unit = HUGE if self.is_huge else 1
        start = chance.randrange(self.pages // 2 // unit) * unit
        sys_madvise(self.address + start * PAGE, self.pages // 2 * PAGE, MADV_DONTNEED)

    def move(self) -> None:
        """To another address of this process."""
        size, unit = self.pages * PAGE, HUGE * PAGE if self.is_huge else PAGE
        room = sys_mmap(0, size + unit, PROT_NONE, MAP_PRIVATE_RESERVE, -1, 0)
        target = -(-room // unit) * unit
        for start, end in ((room, target), (target + size, room + size + unit)):
            if start < end:
                sys_munmap(start, end - start)
        sys_mremap(self.address, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, target)
        self.address = target

    def map_again(self) -> None:
        """Another mapping of it, and no longer the first; a part of it by a mapping of its own."""
        old = self.address
        if self.segment >= 0:
            self.attach()
            fail_on(_libc.shmdt(old), "shmdt")
            return
        if self.fd < 0:
            # mremap(2): an old size of 0 makes another mapping of the same shared pages.
            self.address = sys_mremap(old, 0, self.pages * PAGE, MREMAP_MAYMOVE, 0)
        else:
            self.attach()
            half = self.pages // 2 * PAGE
            sys_mmap(self.address + half, half, PROT_READ_WRITE, MAP_SHARED | MAP_FIXED, self.fd, half)
        sys_munmap(old, self.pages * PAGE)
