#!/usr/bin/env python3
"""Threads and forks change one address space at random and check every byte they read against a model.

The program fills its memory with known pages, announces itself in the ready file, and waits for the go signal:
in between it can be moved to another host. Then each thread does random operations on regions of its own (and,
under a lock, on regions that all threads read), while the model, plain Python objects, says what every page
must contain. The model lies in the memory of the same process and moves with it.

Exit status: 0 all was as it must be, 1 a page or a system call was not, 3 something hung. The result file
(JSON) says what, where and after which operations. The program needs nothing but Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import faulthandler
import json
import mmap
import os
import random
import select
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

PAGE = mmap.PAGESIZE
ZERO_PAGE = bytes(PAGE)

PROT_NONE, PROT_READ, PROT_READ_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = mmap.MAP_SHARED, mmap.MAP_PRIVATE, mmap.MAP_ANONYMOUS
# <asm-generic/mman-common.h>, <linux/mman.h>, <malloc.h>: not in the standard library of Python 3.11.
MAP_FIXED = 0x10
MAP_FIXED_NOREPLACE = 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED, MADV_FREE, MADV_REMOVE = 4, 8, 9
M_TOP_PAD = -2

# A page's contents: 0 for a page of zeros, a token for the page that page_bytes() makes of it, or a token with
# the words that were stored over it since, as (offset in bytes, word).
Patched = tuple[int, tuple[tuple[int, int], ...]]
Contents = int | Patched

_libc = ctypes.CDLL(None, use_errno=True)


def _system_call(name: str, *argument_types: Any) -> Callable[..., int]:
    """A function of the C library that answers -1 and errno; ctypes lets other threads run while it blocks."""
    function = getattr(_libc, name)
    function.argtypes = argument_types
    function.restype = ctypes.c_ssize_t

    def call(*arguments: int) -> int:
        outcome: int = function(*arguments)
        if outcome == -1:
            number = ctypes.get_errno()
            shown = ", ".join(f"{argument:#x}" for argument in arguments)
            raise OSError(number, f"{name}({shown}): {os.strerror(number)}")
        return outcome

    return call


_address, _size, _int, _offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
sys_mmap = _system_call("mmap", _address, _size, _int, _int, _int, _offset)
sys_munmap = _system_call("munmap", _address, _size)
sys_mremap = _system_call("mremap", _address, _size, _size, _int, _address)
sys_mprotect = _system_call("mprotect", _address, _size, _int)
sys_madvise = _system_call("madvise", _address, _size, _int)
sys_mlock = _system_call("mlock", _address, _size)
sys_munlock = _system_call("munlock", _address, _size)
sys_sbrk = _system_call("sbrk", ctypes.c_ssize_t)
sys_read = _system_call("read", _int, _address, _size)
sys_write = _system_call("write", _int, _address, _size)
sys_pread = _system_call("pread", _int, _address, _size, _offset)
sys_pwrite = _system_call("pwrite", _int, _address, _size, _offset)
sys_getrandom = _system_call("getrandom", _address, _size, ctypes.c_uint)

_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memmove.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.malloc.restype = ctypes.c_void_p


def same_bytes(address: int, expected: bytes) -> bool:
    return bool(_libc.memcmp(address, expected, len(expected)) == 0)


def copy_out(address: int, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    _libc.memmove(buffer, address, length)
    return buffer.raw


def copy_in(address: int, contents: bytes) -> None:
    _libc.memmove(address, contents, len(contents))


_seed_mix = 0


def page_bytes(contents: Contents) -> bytes:
    """The PAGE bytes that the contents stand for. No two tokens have a 16-byte unit in common."""
    if isinstance(contents, int):
        return struct.pack("<QQ", contents, contents ^ _seed_mix) * (PAGE // 16) if contents else ZERO_PAGE
    token, patches = contents
    page = bytearray(page_bytes(token))
    for offset, word in patches:
        struct.pack_into("<Q", page, offset, word)
    return bytes(page)


def describe_page(page: bytes) -> str:
    """What a page that was seen looks like, in the words of the model."""
    if page == ZERO_PAGE:
        return "zeros"
    first, second = struct.unpack_from("<QQ", page)
    if first and second == first ^ _seed_mix:
        if page == page_bytes(first):
            return f"all of {describe(first)}"
        return f"begins as {describe(first)}"
    return f"begins with {page[:32].hex()}"


def describe(contents: Contents) -> str:
    if isinstance(contents, tuple):
        return f"{describe(contents[0])} with {[(offset, hex(word)) for offset, word in contents[1]]} stored over it"
    if contents == 0:
        return "zeros"
    return (
        f"token {contents:#x} (process tag {contents >> 48:#x}, writer {contents >> 40 & 0xFF}, "
        f"serial {contents & 0xFFFFFFFFFF})"
    )


class Broken(Exception):
    """Memory or a system call is not as the model says."""

    def __init__(self, what: str, **details: Any) -> None:
        super().__init__(what)
        self.what = what
        self.details = details


@dataclass(eq=False)
class Region:
    """Adjacent pages of one mapping with the same protection: what the kernel could keep in one VMA.

    Whatever would split that VMA splits the region, so that mremap, which takes no range of several VMAs,
    must never fail.
    """

    kind: str  # "anonymous", "private file", "shared file" or "heap"
    address: int
    contents: list[Contents]
    backing: list[Contents] | None = None  # the file's pages below private ones; None: zeros
    freed: set[int] = field(default_factory=set)  # MADV_FREE since the last write: as in contents, or blank
    protection: int = PROT_READ_WRITE
    locked: bool = False

    @property
    def pages(self) -> int:
        return len(self.contents)

    @property
    def length(self) -> int:
        return len(self.contents) * PAGE

    @property
    def readable(self) -> bool:
        return self.protection != PROT_NONE

    @property
    def writable(self) -> bool:
        return self.protection == PROT_READ_WRITE

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def blank(self, start: int, stop: int) -> list[Contents]:
        """What the pages contain once their private copies are thrown away."""
        return [0] * (stop - start) if self.backing is None else self.backing[start:stop]

    def part(self, start: int, stop: int) -> Region:
        return Region(
            self.kind,
            self.at(start),
            self.contents[start:stop],
            None if self.backing is None else self.backing[start:stop],
            {page - start for page in self.freed if start <= page < stop},
            self.protection,
            self.locked,
        )

    def put(self, start: int, contents: list[Contents]) -> None:
        """Note that these pages were written, or blanked, as a whole."""
        stop = start + len(contents)
        self.contents[start:stop] = contents
        self.freed.difference_update(range(start, stop))

    def check(self, start: int = 0, stop: int | None = None) -> int:
        """Compare pages with the model; settles what became of freed ones. Answers the number of pages."""
        stop = self.pages if stop is None else stop
        for first in range(start, stop, 32):
            last = min(first + 32, stop)
            expected = b"".join([page_bytes(contents) for contents in self.contents[first:last]])
            if not same_bytes(self.at(first), expected):
                for page in range(first, last):
                    self._check_page(page)
        return stop - start

    def _check_page(self, page: int) -> None:
        # Another reader of the same region may settle a freed page between these lines: what it was allowed to
        # contain is noted before it is looked at.
        contents, may_be_blank = self.contents[page], page in self.freed
        seen = copy_out(self.at(page), PAGE)
        if seen == page_bytes(contents):
            return
        blank = self.blank(page, page + 1)[0]
        if may_be_blank and seen == page_bytes(blank):
            # It is gone for good: were it seen again, a dead page would have come back to life.
            self.put(page, [blank])
            return
        expected = page_bytes(contents)
        different = next(offset for offset in range(PAGE) if seen[offset] != expected[offset])
        raise Broken(
            "a page does not contain what was last put there",
            address=hex(self.at(page)),
            kind=self.kind,
            region=f"{self.address:#x}, {self.pages} pages, page {page}",
            expected=describe(contents) + (", or blank (MADV_FREE)" if may_be_blank else ""),
            seen=describe_page(seen),
            first_difference=different,
            expected_there=expected[different : different + 32].hex(),
            seen_there=seen[different : different + 32].hex(),
            seen_a_moment_later=describe_page(copy_out(self.at(page), PAGE)),
        )


class SharedLock:
    """Any number of readers or one writer."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._readers = 0
        self._writing = False

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._writing)
            self._readers += 1
        try:
            yield
        finally:
            with self._condition:
                self._readers -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._writing and not self._readers)
            self._writing = True
        try:
            yield
        finally:
            with self._condition:
                self._writing = False
                self._condition.notify_all()


class Commons:
    """Regions that every thread reads at once and any one may change while nobody reads.

    The threads' reads follow one cursor, so that several of them fault on one missing page at the same time.
    """

    def __init__(self) -> None:
        self.lock = SharedLock()
        self.regions: list[Region] = []
        self._cursor = 0

    def next_page(self, readers: int) -> tuple[Region, int]:
        self._cursor += 1
        page = self._cursor // readers % sum(region.pages for region in self.regions)
        for region in self.regions:
            if page < region.pages:
                return region, page
            page -= region.pages
        raise AssertionError("the page lies in one of the regions")


class Race:
    """Pages that are read while they are thrown away and rewritten, without a lock.

    A page goes through stages: written at even ones, given to MADV_DONTNEED at odd ones. A reader that notes
    the last finished stage before its look and the last begun stage after it knows what it may have seen.
    """

    def __init__(self, address: int, pages: int) -> None:
        self.address = address
        self.pages = pages
        self.begun = [0] * pages
        self.finished = [0] * pages
        self.changing = threading.Lock()
        self._cursor = 0

    def contents(self, page: int, stage: int) -> int:
        return 0 if stage % 2 else 0xACE << 48 | page << 32 | (stage + 2)

    def advance(self, page: int) -> None:
        self.begun[page] += 1
        stage = self.begun[page]
        if stage % 2:
            sys_madvise(self.address + page * PAGE, PAGE, MADV_DONTNEED)
        else:
            copy_in(self.address + page * PAGE, page_bytes(self.contents(page, stage)))
        self.finished[page] = stage

    def next_page(self) -> int:
        self._cursor += 1
        return self._cursor // 4 % self.pages

    def look(self, page: int) -> None:
        earliest = self.finished[page]
        seen = copy_out(self.address + page * PAGE, PAGE)
        latest = self.begun[page]
        stages = range(earliest, latest + 1)
        possible = [page_bytes(self.contents(page, stage)) for stage in stages]
        if seen in possible:
            return
        words = {word for whole in possible for word in struct.unpack_from("<QQ", whole)}
        if latest > earliest and words.issuperset(memoryview(seen).cast("Q")):
            return
        raise Broken(
            "a page that was thrown away and rewritten while it was read shows neither",
            address=hex(self.address + page * PAGE),
            expected=[describe(self.contents(page, stage)) for stage in stages],
            seen=describe_page(seen),
        )


class Heap:
    """A region at the program break. malloc gets enough room below that it leaves the break alone."""

    def __init__(self, pages: int) -> None:
        _libc.mallopt(M_TOP_PAD, 16 << 20)
        before = sys_sbrk(0)
        while sys_sbrk(0) == before:
            _libc.malloc(100_000)
        top = sys_sbrk(0)
        sys_sbrk(-top % PAGE)
        self.region = Region("heap", sys_sbrk(pages * PAGE), [0] * pages)

    @property
    def ours(self) -> bool:
        """Whether the break is still where the region ends."""
        return sys_sbrk(0) == self.region.address + self.region.length


class World:
    """What all threads of the program share, and the ways in which it ends."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.commons = Commons()
        self.race: Race | None = None
        self.moved = threading.Event()  # forks, which a survey would refuse, begin only now
        self.stop = threading.Event()
        self.deadline = float("inf")
        self.actors: list[Actor] = []
        self._ending = threading.Lock()

    def publish(self, result: dict[str, Any]) -> None:
        path = Path(self.options.result)
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(result, indent=1) + "\n")
        draft.rename(path)

    def fail(self, report: dict[str, Any], status: int = 1) -> NoReturn:
        # Never released: the first report is the one that counts.
        self._ending.acquire()
        self.publish(report)
        with contextlib.suppress(OSError):
            sys.stderr.write(json.dumps(report, indent=1) + "\n")
            sys.stderr.flush()
        os._exit(status)


@dataclass
class Child:
    pid: int
    reports: int  # the pipe that it and all its descendants report to
    deadline: float


class Actor:
    """A thread, or the only thread of a forked child, with the regions it alone may touch."""

    def __init__(self, world: World, number: int, quota: int) -> None:
        self.world = world
        self.number = number
        self.quota = quota
        self.random = random.Random(f"{world.options.seed}/{number}")
        self.regions: list[Region] = []
        self.heap: Heap | None = None
        self.depth = 0
        self.tag = 0
        self.serial = 0
        self.steps = 0
        self.counts: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=120)
        self.doing = "nothing yet"
        self.since = time.monotonic()
        self.slowest = (0.0, "nothing yet")
        self.children: list[Child] = []
        self.child_operations = CHILD_OPERATIONS
        self.reports = -1
        self.pipe = os.pipe()
        self.scratch = os.open(self._file("scratch"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.sabotage_at = range(40, 100, 20) if number == 0 and world.options.sabotage else range(0)

    # Preparation

    def _file(self, purpose: str) -> str:
        return f"{self.world.options.scratch}/layout-stress-{os.getpid()}-{self.number}-{purpose}"

    def token(self) -> int:
        self.serial += 1
        return self.tag << 48 | (self.number + 1) << 40 | self.serial

    def fill(self) -> None:
        """Map regions until the quota is reached. Some of their pages are left untouched, some only read."""
        self._map_file("private file", 96)
        self._map_file("shared file", 24)
        while sum(region.pages for region in self.regions) < self.quota:
            pages = min(int(2 ** self.random.uniform(0, 11)), self.quota)
            self.regions.append(self.new_region(pages))
        if self.number == 0:
            self.heap = Heap(64)
            self.write(self.heap.region, 0, 48)

    def new_region(self, pages: int) -> Region:
        address = sys_mmap(0, pages * PAGE, PROT_READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        region = Region("anonymous", address, [0] * pages)
        page = 0
        while page < pages:
            stop = min(page + self.random.randint(1, 64), pages)
            chance = self.random.random()
            if chance < 0.75:
                self.write(region, page, stop)
            elif chance < 0.8:
                region.check(page, stop)
            page = stop
        return region

    def _map_file(self, kind: str, pages: int) -> None:
        path = self._file(kind.replace(" ", "-"))
        backing: list[Contents] = [self.token() for _ in range(pages)]
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(descriptor, b"".join([page_bytes(contents) for contents in backing]), 0)
        sharing = MAP_SHARED if kind == "shared file" else MAP_PRIVATE
        address = sys_mmap(0, pages * PAGE, PROT_READ_WRITE, sharing, descriptor, 0)
        os.close(descriptor)
        region = Region(kind, address, list(backing), backing if kind == "private file" else None)
        for _ in range(pages // 8):
            start = self.random.randrange(pages)
            self.write(region, start, min(start + 4, pages))
        self.regions.append(region)

    def remove_files(self) -> None:
        for purpose in ("scratch", "private-file", "shared-file"):
            Path(self._file(purpose)).unlink(missing_ok=True)

    def write(self, region: Region, start: int, stop: int) -> None:
        tokens: list[Contents] = [self.token() for _ in range(start, stop)]
        copy_in(region.at(start), b"".join([page_bytes(token) for token in tokens]))
        region.put(start, tokens)

    # Choosing

    def pick(self, *kinds: str, suitable: Callable[[Region], bool] = lambda region: True) -> Region | None:
        candidates = [region for region in self.regions if (not kinds or region.kind in kinds) and suitable(region)]
        if not kinds and self.heap and suitable(self.heap.region) and self.random.random() < 0.1:
            return self.heap.region
        return self.random.choice(candidates) if candidates else None

    def span(self, region: Region, longest: int) -> tuple[int, int]:
        start = self.random.randrange(region.pages)
        return start, min(region.pages, start + self.random.randint(1, longest))

    def carve(
        self,
        *kinds: str,
        longest: int = 48,
        suitable: Callable[[Region], bool] = lambda region: True,
    ) -> Region | None:
        """A part of a region, now a region in its own right."""
        region = self.pick(*(kinds or ("anonymous", "private file", "shared file")), suitable=suitable)
        if region is None:
            return None
        start, stop = (0, region.pages) if self.random.random() < 0.15 else self.span(region, longest)
        middle = region.part(start, stop)
        self.regions.remove(region)
        if start:
            self.regions.append(region.part(0, start))
        if stop < region.pages:
            self.regions.append(region.part(stop, region.pages))
        self.regions.append(middle)
        return middle

    def note(self, text: str, region: Region | None = None, start: int = 0, stop: int | None = None) -> None:
        if region is not None:
            stop = region.pages if stop is None else stop
            text += f" {region.at(start):#x}-{region.at(stop):#x} ({region.kind})"
        self.log.append(f"{self.steps}: {text}")

    def unlock(self, region: Region) -> None:
        if region.locked:
            sys_munlock(region.address, region.length)
            region.locked = False

    def _expect(self, expected: int, outcome: int) -> None:
        if outcome != expected:
            raise Broken(f"a system call answered {outcome:#x} instead of {expected:#x}")

    def _expect_error(self, number: int, call: Callable[..., int], *arguments: int) -> None:
        try:
            outcome = call(*arguments)
        except OSError as error:
            if error.errno != number:
                raise
            return
        raise Broken(f"a system call answered {outcome:#x} instead of {errno.errorcode[number]}")

    def last_look(self, region: Region, start: int = 0, stop: int | None = None) -> None:
        """Now and then, a check of pages that are about to be lost; mostly they are lost unseen, and unfetched."""
        if region.readable and self.random.random() < 0.25:
            region.check(start, stop)

    # Operations on contents

    def op_read(self) -> None:
        if region := self.pick(suitable=lambda region: region.readable):
            start, stop = self.span(region, 24)
            self.note("read", region, start, stop)
            self.counts["pages checked"] += region.check(start, stop)

    def op_write(self) -> None:
        if region := self.pick(suitable=lambda region: region.writable):
            start, stop = self.span(region, 12)
            self.note("write", region, start, stop)
            self.last_look(region, start, stop)
            self.write(region, start, stop)

    def op_store_words(self) -> None:
        """Store a few bytes into pages whose other bytes must stay."""
        if region := self.pick(suitable=lambda region: region.writable):
            for page in range(*self.span(region, 6)):
                contents = region.contents[page]
                token, patches = contents if isinstance(contents, tuple) else (contents, ())
                if page in region.freed or len(patches) >= 6:
                    self.write(region, page, page + 1)
                    continue
                offset, word = self.random.randrange(PAGE // 8) * 8, self.token()
                self.note(f"store 8 bytes at {offset} of", region, page, page + 1)
                copy_in(region.at(page) + offset, struct.pack("<Q", word))
                region.put(page, [(token, (*patches, (offset, word)))])

    def op_dontneed(self) -> None:
        if region := self.pick("anonymous", "private file"):
            self._throw_away(region)

    def _throw_away(self, region: Region) -> None:
        start, stop = self.span(region, 64)
        self.note("MADV_DONTNEED", region, start, stop)
        self.last_look(region, start, stop)
        if region.locked:
            self._expect_error(errno.EINVAL, sys_madvise, region.at(start), (stop - start) * PAGE, MADV_DONTNEED)
            self.unlock(region)
        sys_madvise(region.at(start), (stop - start) * PAGE, MADV_DONTNEED)
        region.put(start, region.blank(start, stop))
        if region.readable and self.random.random() < 0.5:
            region.check(start, stop)

    def op_free(self) -> None:
        if region := self.pick("anonymous"):
            start, stop = self.span(region, 64)
            self.unlock(region)
            self.note("MADV_FREE", region, start, stop)
            sys_madvise(region.at(start), (stop - start) * PAGE, MADV_FREE)
            region.freed.update(range(start, stop))

    def op_remove(self) -> None:
        if region := self.pick("shared file", suitable=lambda region: region.writable):
            start, stop = self.span(region, 4)
            self.unlock(region)
            self.note("MADV_REMOVE", region, start, stop)
            try:
                sys_madvise(region.at(start), (stop - start) * PAGE, MADV_REMOVE)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:  # not every file system can punch holes
                    raise
                return
            region.put(start, [0] * (stop - start))
            region.check(start, stop)

    # Operations on the layout

    def op_protect(self) -> None:
        if region := self.carve():
            protection = self.random.choice((PROT_NONE, PROT_READ, PROT_READ_WRITE, PROT_READ_WRITE))
            self.note(f"mprotect {protection}", region)
            sys_mprotect(region.address, region.length, protection)
            region.protection = protection
            if protection == PROT_NONE:
                self._expect_error(errno.EFAULT, sys_pwrite, self.scratch, region.address, 16, 0)
            elif self.random.random() < 0.3:
                region.check()

    def op_unprotect(self) -> None:
        if region := self.pick("anonymous", "private file", "shared file", suitable=lambda region: not region.writable):
            self.note("mprotect read and write", region)
            sys_mprotect(region.address, region.length, PROT_READ_WRITE)
            region.protection = PROT_READ_WRITE

    def op_lock(self) -> None:
        if region := self.carve(longest=24, suitable=lambda region: region.readable):
            self.note("mlock", region)
            sys_mlock(region.address, region.length)
            region.locked = True
            region.check()

    def op_unlock(self) -> None:
        if region := self.pick(suitable=lambda region: region.locked):
            self.note("munlock", region)
            self.unlock(region)

    def op_unmap(self) -> None:
        if region := self.carve():
            self.note("munmap", region)
            self.last_look(region)
            sys_munmap(region.address, region.length)
            self.regions.remove(region)

    def op_refill_hole(self) -> None:
        """Unmap, and map anew exactly there."""
        if region := self.carve():
            self.note("munmap and mmap", region)
            self.last_look(region)
            sys_munmap(region.address, region.length)
            self.regions.remove(region)
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
            try:
                sys_mmap(region.address, region.length, PROT_READ_WRITE, flags, -1, 0)
            except OSError as error:
                if error.errno != errno.EEXIST:  # another thread's mmap was quicker
                    raise
                self.counts["hole taken by another thread"] += 1
                return
            self._add_blank(region.address, region.pages)

    def op_map_over(self) -> None:
        if region := self.carve():
            self.note("mmap over", region)
            self.last_look(region)
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED
            sys_mmap(region.address, region.length, PROT_READ_WRITE, flags, -1, 0)
            self.regions.remove(region)
            self._add_blank(region.address, region.pages)

    def _add_blank(self, address: int, pages: int) -> None:
        fresh = Region("anonymous", address, [0] * pages)
        self.regions.append(fresh)
        if self.random.random() < 0.7:
            fresh.check()
        if self.random.random() < 0.3:
            self.write(fresh, *self.span(fresh, 16))

    def op_map(self) -> None:
        if sum(region.pages for region in self.regions) < self.quota:
            region = self.new_region(self.random.randint(1, 256))
            self.note("mmap", region)
            self.regions.append(region)

    def op_move(self) -> None:
        if region := self.carve(longest=128):
            target = sys_mmap(0, region.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
            self.note(f"mremap to {target:#x}", region)
            self._move(region, target)

    def op_move_onto(self) -> None:
        """Onto the beginning of another region, which is gone then."""
        region = self.carve()
        if region is None:
            return
        pages = region.pages
        target = self.pick(
            "anonymous", "private file", "shared file",
            suitable=lambda other: other is not region and other.pages >= pages,
        )  # fmt: skip
        if target is None:
            return
        self.note(f"mremap onto {target.address:#x}", region)
        self.last_look(target, 0, pages)
        self.regions.remove(target)
        if target.pages > pages:
            self.regions.append(target.part(pages, target.pages))
        self._move(region, target.address)

    def _move(self, region: Region, target: int) -> None:
        self._expect(
            target, sys_mremap(region.address, region.length, region.length, MREMAP_MAYMOVE | MREMAP_FIXED, target)
        )
        region.address = target
        if region.readable and self.random.random() < 0.4:
            start, stop = self.span(region, 16)
            region.check(start, stop)

    def op_move_and_keep(self) -> None:
        """MREMAP_DONTUNMAP: the pages go, the old range stays and is blank."""
        if region := self.carve("anonymous", "private file"):
            self.unlock(region)
            new = sys_mremap(region.address, region.length, region.length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0)
            self.note(f"mremap and keep, to {new:#x}", region)
            old = region.part(0, region.pages)
            old.put(0, old.blank(0, old.pages))
            region.address = new
            self.regions.append(old)
            if region.readable and self.random.random() < 0.7:
                old.check()
                region.check(*self.span(region, 16))

    def op_grow(self) -> None:
        if sum(region.pages for region in self.regions) > self.quota:
            return
        if region := self.carve("anonymous"):
            more = self.random.randint(1, 48)
            flags = self.random.choice((0, MREMAP_MAYMOVE, MREMAP_MAYMOVE))
            self.note(f"mremap, {more} pages more,", region)
            try:
                new = sys_mremap(region.address, region.length, region.length + more * PAGE, flags, 0)
            except OSError as error:
                if error.errno != errno.ENOMEM or flags:  # without leave to move there may be no room
                    raise
                return
            self.note(f"it is at {new:#x}")
            region.address = new
            region.contents += [0] * more
            if region.readable:
                region.check(region.pages - more)

    def op_shrink(self) -> None:
        if region := self.carve(suitable=lambda region: region.pages > 1):
            pages = self.random.randint(1, region.pages)
            self.note(f"mremap, down to {pages} pages,", region)
            self.last_look(region, pages)
            self._expect(region.address, sys_mremap(region.address, region.length, pages * PAGE, 0, 0))
            self.regions.remove(region)
            self.regions.append(region.part(0, pages))

    def op_break(self) -> None:
        """Move the program break. What it leaves is gone; what it takes in is zeros."""
        if self.heap is None or not self.heap.ours:
            return
        region = self.heap.region
        change = self.random.randint(-region.pages // 2, 32) if region.pages < 512 else -region.pages // 2
        self.note(f"sbrk({change} pages)", region)
        sys_sbrk(change * PAGE)
        if change < 0:
            self.heap.region = region.part(0, region.pages + change)
        else:
            region.contents += [0] * change
            region.check(region.pages - change)
        if self.random.random() < 0.5:
            self.write(self.heap.region, *self.span(self.heap.region, 16))

    # System calls that read or write pages

    def op_through_pipe(self) -> None:
        self._pass_through(
            "pipe",
            8,
            lambda address, length: sys_write(self.pipe[1], address, length),
            lambda address, length: sys_read(self.pipe[0], address, length),
        )

    def op_through_file(self) -> None:
        self._pass_through(
            "file",
            64,
            lambda address, length: sys_pwrite(self.scratch, address, length, 0),
            lambda address, length: sys_pread(self.scratch, address, length, 0),
        )

    def _pass_through(
        self, channel: str, longest: int, send: Callable[[int, int], int], receive: Callable[[int, int], int]
    ) -> None:
        """Whole pages by system calls from one region into another, or any bytes and back to the model."""
        source = self.pick(suitable=lambda region: region.readable)
        if source is None:
            return
        start, stop = self.span(source, longest)
        if not source.freed.isdisjoint(range(start, stop)):
            source.check(start, stop)  # a freed page that is still there may yet go: only look at it
            return
        target = self.pick(suitable=lambda region: region.writable and region.pages >= stop - start)
        if target is not None and target is not source and self.random.random() < 0.6:
            length = (stop - start) * PAGE
            where = self.random.randint(0, target.pages - (stop - start))
            self.note(f"{channel} to {target.at(where):#x} from", source, start, stop)
            self._expect(length, send(source.at(start), length))
            self._expect(length, receive(target.at(where), length))
            target.put(where, source.contents[start:stop])
            target.check(where, where + stop - start)
        else:
            skip = self.random.randrange(PAGE)
            length = self.random.randint(1, (stop - start) * PAGE - skip)
            self.note(f"{channel}, {length} bytes from byte {skip} of", source, start, stop)
            self._expect(length, send(source.at(start) + skip, length))
            buffer = ctypes.create_string_buffer(length)
            self._expect(length, receive(ctypes.addressof(buffer), length))
            whole = b"".join([page_bytes(contents) for contents in source.contents[start:stop]])
            if buffer.raw != whole[skip : skip + length]:
                source.check(start, stop)
                raise Broken(
                    f"bytes that went through a {channel} are not those of the pages",
                    address=hex(source.at(start) + skip),
                    length=length,
                )

    def op_getrandom(self) -> None:
        """The kernel writes into the middle of a page; the bytes around must stay."""
        region = self.pick(suitable=lambda region: region.writable)
        if region is None:
            return
        page = self.random.randrange(region.pages)
        if page in region.freed:
            return
        offset = self.random.randrange(PAGE)
        length = self.random.randint(1, min(256, PAGE - offset))
        self.note(f"getrandom, {length} bytes at {offset} of", region, page, page + 1)
        self._expect(length, sys_getrandom(region.at(page) + offset, length, 0))
        seen, expected = copy_out(region.at(page), PAGE), page_bytes(region.contents[page])
        if seen[:offset] != expected[:offset] or seen[offset + length :] != expected[offset + length :]:
            raise Broken(
                "bytes beside those that getrandom wrote have changed",
                address=hex(region.at(page)),
                offset=offset,
                length=length,
                expected=describe(region.contents[page]),
                seen=describe_page(seen),
            )
        self.write(region, page, page + 1)

    def op_pull_away(self) -> None:
        """Change the layout under a system call of another thread that is reading the pages.

        The call must end, whatever becomes of the page it waits for.
        """
        region = self.carve("anonymous", suitable=lambda region: region.readable and not region.freed)
        if region is None:
            return
        how = self.random.choice(("munmap", "mremap", "MADV_DONTNEED", "mprotect"))
        self.note(f"{how} under the system calls of another thread on", region)
        self.unlock(region)
        old_contents = list(region.contents)
        outcomes: list[int] = []

        def read_pages(address: int) -> None:
            for page in range(len(old_contents)):
                try:
                    outcomes.append(sys_pwrite(self.scratch, address + page * PAGE, PAGE, page * PAGE))
                except OSError as error:
                    outcomes.append(-(error.errno or 0))

        reader = threading.Thread(target=read_pages, args=(region.address,))
        reader.start()
        if how == "munmap":
            sys_munmap(region.address, region.length)
            self.regions.remove(region)
        elif how == "mremap":
            self._move(region, sys_mmap(0, region.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))
        elif how == "MADV_DONTNEED":
            sys_madvise(region.address, region.length, MADV_DONTNEED)
            region.put(0, [0] * region.pages)
        else:
            sys_mprotect(region.address, region.length, PROT_NONE)
            region.protection = PROT_NONE
        reader.join()
        for page, outcome in enumerate(outcomes):
            if outcome != PAGE and (how == "MADV_DONTNEED" or (outcome != -errno.EFAULT and not 0 < outcome < PAGE)):
                raise Broken(f"a write(2) from a page under {how} answered {outcome}", page=page)
            if how == "MADV_DONTNEED" or (how == "mprotect" and outcome == PAGE):
                # Elsewhere another thread's mapping may have been read instead.
                seen, old = os.pread(self.scratch, PAGE, page * PAGE), page_bytes(old_contents[page])
                words = set(memoryview(old).cast("Q")) | ({0} if how == "MADV_DONTNEED" else set())
                if seen != old and not words.issuperset(memoryview(seen).cast("Q")):
                    raise Broken(
                        f"a write(2) from a page under {how} wrote something else",
                        page=page,
                        expected=describe(old_contents[page]),
                        seen=describe_page(seen),
                    )
        if region.readable and how != "munmap":
            region.check()

    # What threads share

    def op_common_read(self) -> None:
        commons, race = self.world.commons, self.world.race
        with commons.lock.reading():
            region, page = commons.next_page(len(self.world.actors))
            self.doing = f"read {region.at(page):#x}, which all threads read"
            region.check(page, page + 1)
            region = self.random.choice(commons.regions)
            region.check(*self.span(region, 8))
        if race is not None:
            page = race.next_page()
            for _ in range(3):
                race.look(page)

    def op_common_change(self) -> None:
        with self.world.commons.lock.writing():
            region = self.random.choice(self.world.commons.regions)
            chance = self.random.random()
            if chance < 0.5:
                start, stop = self.span(region, 8)
                self.note("write common", region, start, stop)
                self.write(region, start, stop)
            elif chance < 0.7:
                self._throw_away(region)
            elif chance < 0.8:
                start, stop = self.span(region, 16)
                self.note("MADV_FREE common", region, start, stop)
                sys_madvise(region.at(start), (stop - start) * PAGE, MADV_FREE)
                region.freed.update(range(start, stop))
            else:
                self.note("mremap common", region)
                self._move(region, sys_mmap(0, region.length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))

    def op_race_change(self) -> None:
        race = self.world.race
        if race is not None and race.changing.acquire(blocking=False):
            try:
                page = race.next_page()
                self.note(f"stage {race.begun[page] + 1} of raced page {race.address + page * PAGE:#x}")
                race.advance(page)
                if self.random.random() < 0.5:
                    race.advance(page)
            finally:
                race.changing.release()

    # Children

    def op_spawn(self) -> None:
        """A child that never leaves its parent's memory until exec: vfork."""
        if self.world.moved.is_set():
            self.note("posix_spawn")
            pid = os.posix_spawn("/bin/true", ["true"], {})
            self._expect_exit(pid, os.waitpid(pid, 0)[1])

    def op_fork(self) -> None:
        if not self.world.moved.is_set() or len(self.children) >= 3:
            return
        reading, writing = os.pipe()
        # Nobody changes the commons while they are read, so the child may check them too.
        shared = self.world.commons.lock.reading() if self.depth == 0 else contextlib.nullcontext()
        # The parent's random numbers do not depend on how far the child gets.
        seed, patient = self.random.random(), self.random.random() < 0.4
        self.note("fork")
        with shared:
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                self._live_as_child(seed, writing)
        os.close(writing)
        self.counts["forks"] += 1
        self.note(f"the child is {pid}")
        self.children.append(Child(pid, reading, time.monotonic() + self.world.options.hang_seconds))
        if patient:
            self._reap(self.children.pop())

    def op_reap(self) -> None:
        if self.children:
            child = self.children.pop(0)
            self.note(f"wait for {child.pid}")
            self._reap(child)

    def _reap(self, child: Child) -> None:
        self._expect_exit(child.pid, os.waitpid(child.pid, 0)[1])
        due, received = 1, b""
        poll = select.poll()
        poll.register(child.reports, select.POLLIN)
        while received.count(b"\n") < due:
            if not poll.poll(max(0, child.deadline - time.monotonic()) * 1000):
                raise Broken(f"a descendant of child {child.pid} does not end", reports=received.decode())
            piece = os.read(child.reports, 65536)
            if not piece:
                raise Broken(f"a descendant of child {child.pid} ended without its report", reports=received.decode())
            received += piece
            reports = [json.loads(line) for line in received.split(b"\n")[:-1]]
            if broken := [report for report in reports if not report["ok"]]:
                raise Broken("a descendant saw what must not be", reports=broken)
            due = 1 + sum(report["forks"] for report in reports)
        os.close(child.reports)
        self.counts["descendants"] += due

    def _expect_exit(self, pid: int, status: int) -> None:
        if status == 0:
            return
        code = os.waitstatus_to_exitcode(status)
        report = Path(f"{self.world.options.result}.child-{pid}")
        text: Any = "it left no report"
        with contextlib.suppress(OSError, ValueError):
            text = json.loads(report.read_text())
        raise Broken(
            f"child {pid} ended with {code}" + (" (it hung)" if code == -signal.SIGALRM else ""), child_report=text
        )

    def inherit(self) -> None:
        """In a forked child: what it has of its parent's regions."""
        # Locks are not inherited; a shared file is the parent's to change.
        self.regions = [region for region in self.regions if region.kind != "shared file"]
        for region in self.regions:
            region.locked = False

    def _live_as_child(self, seed: float, reports: int) -> NoReturn:
        """The whole life of a forked child: check, change, perhaps fork again, report, exit."""
        status, forks = 1, 0
        try:
            # The watch over hanging threads is a thread of the parent: here the alarm's default action does it.
            signal.alarm(max(1, int(self.world.options.hang_seconds * 0.8)))
            self.random = random.Random(seed)
            self.depth += 1
            self.tag = self.random.randrange(1, 1 << 15)
            self.children = []
            self.counts.clear()
            self.pipe = os.pipe()
            self.scratch = os.memfd_create("scratch")
            self.log.append(f"--- from here on in child {os.getpid()}, {self.depth} forks deep ---")
            if self.depth == 1:
                for region in self.world.commons.regions:
                    region.check(*self.span(region, 64))
            self.inherit()
            self._sample(24)
            steps = self.random.choice((0, 5, 40))
            self._steps(self.child_operations, steps)
            if self.depth < 3 and self.random.random() < 0.5:
                seed, outlived = self.random.random(), self.random.random() < 0.5
                self.note("fork, and outlive nobody" if outlived else "fork and wait")
                pid = os.fork()
                if pid == 0:
                    self._live_as_child(seed, reports)
                forks += 1
                if not outlived:
                    self._steps(self.child_operations, steps)
                    self._expect_exit(pid, os.waitpid(pid, 0)[1])
            elif self.depth > 1:
                # Let the parent end first, now and then.
                time.sleep(self.random.choice((0, 0, 0.02)))
            if self.random.random() < 0.2:
                self.check_all()
            else:
                self._sample(24)
            status = 0
            report: dict[str, Any] = {"ok": True, "forks": forks}
        except BaseException as error:
            path = Path(f"{self.world.options.result}.child-{os.getpid()}")
            path.write_text(json.dumps(self.report(error), indent=1))
            report = {"ok": False, "forks": forks, "what": str(error), "report": str(path)}
        finally:
            with contextlib.suppress(BaseException):
                # One write of less than PIPE_BUF bytes: reports of relatives do not mix.
                os.write(reports, json.dumps(report).encode()[:2000] + b"\n")
            os._exit(status)

    # The course of things

    def _sample(self, regions: int) -> None:
        for _ in range(regions):
            self.op_read()

    def check_all(self) -> None:
        for region in [*self.regions, *([self.heap.region] if self.heap else [])]:
            if region.readable:
                self.note("check", region)
                self.since, self.doing = time.monotonic(), "check_all"
                self.counts["pages checked"] += region.check()

    def finish(self) -> None:
        """Every page that is left, those too that no protection lets be read."""
        while self.children:
            self.op_reap()
        for region in self.regions:
            if not region.readable:
                sys_mprotect(region.address, region.length, PROT_READ)
                region.protection = PROT_READ
        self.check_all()

    def _steps(self, operations: dict[str, int], steps: int) -> None:
        for name in self.random.choices(list(operations), list(operations.values()), k=steps):
            if name in self.world.options.without:
                continue
            self.steps += 1
            self.since = time.monotonic()
            self.doing = name
            getattr(self, name)()
            self.counts[name] += 1
            self.slowest = max(self.slowest, (time.monotonic() - self.since, name))
            if len(self.regions) > 160:
                self._tidy()
            if self.steps in self.sabotage_at:
                self._sabotage()

    def _tidy(self) -> None:
        """Small pieces give way to a few large ones again."""
        # What has been taken into use of a reserve is given back to it instead.
        self.regions.sort(key=lambda region: (region.kind == "committed", region.pages))
        for region in self.regions[:80]:
            if region.readable:
                region.check()
            sys_munmap(region.address, region.length)
        del self.regions[:80]
        self.note("unmapped the 80 smallest regions")

    def run(self) -> None:
        """A thread's body."""
        try:
            options = self.world.options
            if options.before == "idle":
                self.world.moved.wait()
            while not self.world.stop.is_set():
                self._steps(OPERATIONS, 20)
                if self.world.moved.is_set() and time.monotonic() > self.world.deadline:
                    break
                if options.operations and self.steps >= options.operations:
                    break
            self.world.moved.wait()
            self.finish()
            self.doing = "done"
        except BaseException as error:
            self.world.fail(self.report(error))

    def report(self, error: BaseException) -> dict[str, Any]:
        details = error.details if isinstance(error, Broken) else {}
        return {
            "ok": False,
            "what": str(error) or repr(error),
            **details,
            "seed": self.world.options.seed,
            "thread": self.number,
            "pid": os.getpid(),
            "depth": self.depth,
            "moved": self.world.moved.is_set(),
            "step": f"{self.steps}, {self.doing}",
            "traceback": traceback.format_exception(error),
            "log": list(self.log),
            "mappings": Path("/proc/self/maps").read_text().splitlines() if self.world.options.maps else "see --maps",
        }

    # Proof that it can fail

    def _sabotage(self) -> None:
        """Break memory behind the model's back, as a faulty migration would."""
        regions = [region for region in self.regions if region.kind == "anonymous" and region.writable]
        held = [
            (region, page)
            for region in regions
            if not region.locked
            for page in range(region.pages)
            if region.contents[page] and page not in region.freed
        ]
        region, page = self.random.choice(held)
        kind = self.world.options.sabotage
        self.note(f"sabotage: {kind}", region, page, page + 1)
        if kind == "lost":
            sys_madvise(region.at(page), PAGE, MADV_DONTNEED)
        elif kind == "revived":
            old = page_bytes(region.contents[page])
            sys_madvise(region.at(page), PAGE, MADV_DONTNEED)
            region.put(page, [0])
            copy_in(region.at(page), old)
        elif kind == "exchanged":
            other, other_page = self.random.choice(held)
            copy_in(region.at(page), page_bytes(other.contents[other_page]))
        elif kind == "byte":
            address = region.at(page) + self.random.randrange(PAGE)
            copy_in(address, bytes([copy_out(address, 1)[0] ^ 0x40]))
        elif kind == "hang":
            threading.Event().wait()


CONTENTS_OPERATIONS = {
    "op_read": 30, "op_write": 14, "op_store_words": 10, "op_dontneed": 6, "op_free": 4,
    "op_through_pipe": 5, "op_through_file": 4, "op_getrandom": 4,
}  # fmt: skip
LAYOUT_OPERATIONS = {
    "op_protect": 4, "op_unprotect": 4, "op_lock": 2, "op_unlock": 3, "op_unmap": 2, "op_refill_hole": 4,
    "op_map_over": 3, "op_map": 3, "op_move": 4, "op_move_onto": 3, "op_move_and_keep": 3, "op_grow": 4,
    "op_shrink": 3, "op_break": 2,
}  # fmt: skip
CHILD_OPERATIONS = {**CONTENTS_OPERATIONS, **LAYOUT_OPERATIONS, "op_pull_away": 1}
OPERATIONS = {
    **CHILD_OPERATIONS,
    "op_remove": 1, "op_pull_away": 3, "op_common_read": 12, "op_common_change": 3, "op_race_change": 4, "op_fork": 2,
    "op_reap": 1, "op_spawn": 1,
}  # fmt: skip


def prepare(world: World) -> None:
    options = world.options
    pages = (options.size << 20) // PAGE
    for number in range(options.threads):
        world.actors.append(Actor(world, number, max(pages * 3 // 4 // options.threads, 256)))
        world.actors[-1].fill()
    keeper = world.actors[0]
    world.commons.regions = [keeper.new_region(max(pages // 16, 64)) for _ in range(3)]
    race_pages = max(pages // 16, 64)
    address = sys_mmap(0, race_pages * PAGE, PROT_READ_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    world.race = Race(address, race_pages)
    copy_in(address, b"".join([page_bytes(world.race.contents(page, 0)) for page in range(race_pages)]))


def announce(world: World) -> None:
    """The ready file: who we are, and where our pages lie (for those who want to break them)."""
    regions = [
        {"thread": actor.number, "kind": region.kind, "address": region.address, "pages": region.pages,
         "filled": [page for page in range(region.pages) if region.contents[page]]}
        for actor in world.actors for region in actor.regions
    ]  # fmt: skip
    path = Path(world.options.ready)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps({"pid": os.getpid(), "regions": regions}) + "\n")
    draft.rename(path)


def wait_for_go(world: World) -> None:
    """Until a signal, a file, or another network namespace says that the program has been moved."""
    go = world.options.go
    home = os.stat("/proc/self/ns/net").st_ino
    while go != "now":
        watch(world)
        if go == "signal":
            if signal.sigtimedwait({signal.SIGUSR1}, 1):
                return
        elif go == "moved":
            if os.stat("/proc/self/ns/net").st_ino != home:
                return
            time.sleep(0.001)
        else:
            if os.path.exists(go):
                return
            time.sleep(0.001)


def watch(world: World) -> None:
    """End the program with a report if a thread hangs; with only a traceback if the interpreter itself does."""
    limit = world.options.hang_seconds
    now = time.monotonic()
    if now - watch_armed[0] > limit / 8:
        watch_armed[0] = now
        faulthandler.dump_traceback_later(limit * 2, exit=True, file=watch_file[0])
    if not world.moved.is_set():
        return
    hanging = [actor for actor in world.actors if actor.doing != "done" and now - actor.since > limit]
    if hanging:
        faulthandler.dump_traceback(watch_file[0], all_threads=True)
        report = hanging[0].report(Broken(f"thread {hanging[0].number} hangs in {hanging[0].doing}"))
        report["others"] = {actor.number: actor.doing for actor in world.actors}
        report["stacks"] = Path(watch_file[0].name).read_text().splitlines()
        world.fail(report, 3)


watch_armed = [0.0]
watch_file: list[Any] = []


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", default="0", help="any string")
    parser.add_argument("--seconds", type=float, default=10, help="after the go signal")
    parser.add_argument("--operations", type=int, default=0, help="of each thread at most; 0: only --seconds counts")
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--size", type=int, default=64, metavar="MIB")
    parser.add_argument("--result", required=True, metavar="FILE")
    parser.add_argument("--ready", required=True, metavar="FILE")
    parser.add_argument("--scratch", metavar="DIRECTORY", help="default: where the result goes")
    parser.add_argument(
        "--go",
        default="now",
        metavar="now|signal|moved|PATH",
        help="begin at once, at SIGUSR1, when the network namespace is another one, when PATH exists",
    )
    parser.add_argument(
        "--before",
        choices=("idle", "busy"),
        default="idle",
        help="busy: all operations but forks go on also before the go signal",
    )
    parser.add_argument("--hang-seconds", type=float, default=60)
    parser.add_argument(
        "--without",
        type=lambda names: names.split(","),
        default=[],
        metavar="OPERATIONS",
        help="names like op_lock,op_fork: to find out which operation it takes for a failure",
    )
    parser.add_argument("--maps", action="store_true", help="put /proc/self/maps into a failure's report")
    parser.add_argument("--sabotage", choices=("lost", "revived", "exchanged", "byte", "hang"), help="must fail then")
    options = parser.parse_args()
    if unknown := set(options.without) - set(OPERATIONS):
        parser.error(f"no such operations: {', '.join(sorted(unknown))}")
    options.scratch = options.scratch or str(Path(options.result).resolve().parent)
    return options


def mix_seed(seed: object) -> None:
    """Let the bytes of all pages follow from the seed."""
    global _seed_mix
    _seed_mix = random.Random(f"pattern of {seed}").getrandbits(64) | 1


def main() -> int:
    options = parse_options()
    mix_seed(options.seed)
    # Forking while threads run is what this program is for.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    watch_file.append(open(f"{options.result}.hang", "w"))  # noqa: SIM115 - open to the end
    world = World(options)
    prepare(world)
    threads = [threading.Thread(target=actor.run, name=f"actor-{actor.number}") for actor in world.actors]
    for thread in threads:
        thread.start()
    announce(world)
    wait_for_go(world)
    began = time.monotonic()
    for actor in world.actors:
        actor.since = began
    world.deadline = began + options.seconds
    world.moved.set()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.25)
            watch(world)
    try:
        for region in world.commons.regions:
            region.check()
        assert world.race is not None
        for page in range(world.race.pages):
            world.race.look(page)
    except Broken as error:
        world.fail(world.actors[0].report(error))
    counts: Counter[str] = sum((actor.counts for actor in world.actors), Counter())
    slowest = max(actor.slowest for actor in world.actors)
    world.publish(
        {
            "ok": True,
            "seed": options.seed,
            "seconds": round(time.monotonic() - began, 3),
            "operations": sum(actor.steps for actor in world.actors),
            "slowest operation": f"{slowest[1]}, {slowest[0]:.3f} s",
            "counts": dict(sorted(counts.items())),
        }
    )
    for actor in world.actors:
        actor.remove_files()
    faulthandler.cancel_dump_traceback_later()
    Path(watch_file[0].name).unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
