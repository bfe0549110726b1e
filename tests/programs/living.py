#!/usr/bin/env python3
"""One small scenario for each way in which a program changes its memory while pages of it are missing.

A scenario fills memory with pages that follow from the seed and the page's number, announces itself in the ready
file and waits for the go signal; in between it can be moved to another host. Then it acts at once and checks every
byte that it must see. The result file (JSON) tells what was seen; it also names the exit status with which the
program is about to end. The program needs nothing but Python 3.11 or newer.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn

PAGE = mmap.PAGESIZE
ZERO_PAGE = bytes(PAGE)

PROT_NONE, PROT_READ, PROT_READ_WRITE = 0, mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
# <asm-generic/mman-common.h>, <linux/mman.h>, <malloc.h>, <linux/futex.h>: not in the standard library of Python 3.11.
MAP_FIXED, MAP_FIXED_NOREPLACE = 0x10, 0x100000
MREMAP_MAYMOVE, MREMAP_FIXED, MREMAP_DONTUNMAP = 1, 2, 4
MADV_DONTNEED, MADV_FREE, MADV_REMOVE, MADV_DONTFORK, MADV_WIPEONFORK = 4, 8, 9, 10, 18
MCL_CURRENT, MCL_FUTURE = 1, 2
MLOCK_ONFAULT = 1
M_TOP_PAD = -2
SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(os.uname().machine, -1)
FUTEX_WAIT = 0

ALARM_SECONDS = 60

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
            raise OSError(number, f"{name}({', '.join(map(hex, arguments))}): {os.strerror(number)}")
        return outcome

    return call


_pointer, _size, _int, _offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
sys_mmap = _system_call("mmap", _pointer, _size, _int, _int, _int, _offset)
sys_munmap = _system_call("munmap", _pointer, _size)
sys_mremap = _system_call("mremap", _pointer, _size, _size, _int, _pointer)
sys_mprotect = _system_call("mprotect", _pointer, _size, _int)
sys_madvise = _system_call("madvise", _pointer, _size, _int)
sys_mlock = _system_call("mlock", _pointer, _size)
sys_mlock2 = _system_call("mlock2", _pointer, _size, ctypes.c_uint)
sys_munlock = _system_call("munlock", _pointer, _size)
sys_mlockall = _system_call("mlockall", _int)
sys_munlockall = _system_call("munlockall")
sys_mincore = _system_call("mincore", _pointer, _size, _pointer)
sys_sbrk = _system_call("sbrk", ctypes.c_ssize_t)
sys_read = _system_call("read", _int, _pointer, _size)
sys_write = _system_call("write", _int, _pointer, _size)
sys_pread = _system_call("pread", _int, _pointer, _size, _offset)
sys_pwrite = _system_call("pwrite", _int, _pointer, _size, _offset)
sys_readv = _system_call("readv", _int, _pointer, _int)
sys_writev = _system_call("writev", _int, _pointer, _int)
sys_vmsplice = _system_call("vmsplice", _int, _pointer, _size, ctypes.c_uint)
sys_process_vm_readv = _system_call(
    "process_vm_readv", _int, _pointer, ctypes.c_ulong, _pointer, ctypes.c_ulong, ctypes.c_ulong
)
sys_getrandom = _system_call("getrandom", _pointer, _size, ctypes.c_uint)
sys_poll = _system_call("poll", _pointer, ctypes.c_ulong, _int)
sys_access = _system_call("access", _pointer, _int)
sys_execve = _system_call("execve", _pointer, _pointer, _pointer)
sys_futex = _system_call("syscall", ctypes.c_long, _pointer, _int, ctypes.c_uint, _pointer)

_libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
_libc.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memmove.restype = ctypes.c_void_p
_libc.malloc.argtypes = (ctypes.c_size_t,)
_libc.malloc.restype = ctypes.c_void_p


def copy_out(address: int, length: int) -> bytes:
    buffer = ctypes.create_string_buffer(length)
    _libc.memmove(buffer, address, length)
    return buffer.raw


def copy_in(address: int, contents: bytes) -> None:
    _libc.memmove(address, contents, len(contents))


class Broken(Exception):
    """Memory or a system call is not as it must be."""


def ensure(truth: object, what: str) -> None:
    if not truth:
        raise Broken(what)


def expect_error(number: int, call: Callable[..., int], *arguments: int) -> None:
    try:
        outcome = call(*arguments)
    except OSError as error:
        if error.errno != number:
            raise
        return
    raise Broken(f"a call answered {outcome:#x} instead of {errno.errorcode[number]}")


def expect_bytes(address: int, expected: bytes, what: str) -> None:
    """Compare memory with what it must contain; the error says where the first difference is."""
    if _libc.memcmp(address, expected, len(expected)) == 0:
        return
    seen = copy_out(address, len(expected))
    offset = next((index for index in range(len(expected)) if seen[index] != expected[index]), None)
    if offset is None:
        raise Broken(f"{what}: differed at a first look, not at a second")
    page = offset - offset % PAGE
    look = "a page of zeros" if seen[page : page + PAGE] == ZERO_PAGE else seen[offset : offset + 32].hex()
    raise Broken(
        f"{what}: page {page // PAGE} ({address + page:#x}) differs from byte {offset - page} on: "
        f"expected {expected[offset : offset + 32].hex()}, seen {look}"
    )


def expect_zeros(address: int, pages: int, what: str) -> None:
    expect_bytes(address, bytes(pages * PAGE), what)


def expect_unmapped(address: int, pages: int) -> None:
    """The kernel cannot read there; a pipe looks at every byte, where /dev/null would not."""
    reading, writing = os.pipe()
    for page in range(pages):
        expect_error(errno.EFAULT, sys_write, writing, address + page * PAGE, 1)
    os.close(reading)
    os.close(writing)


class Stage:
    """What a scenario gets: the options, and the memory it fills, which is listed in the ready file."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.pages: int = options.pages
        self.filled: list[Filled] = []
        # A mapping that the interpreter makes must not land where a scenario has just unmapped: give it two arenas
        # of memory of which nearly all is free again.
        self._slack = [bytes(400) for _ in range(5000)][::1000]

    def fill(self, pages: int = 0, *, address: int | None = None) -> Filled:
        """Pages with a pattern, in a new mapping or over an existing one."""
        filled = Filled(self.options.seed, len(self.filled), pages or self.pages, address)
        self.filled.append(filled)
        return filled

    def path(self, purpose: str) -> str:
        return f"{self.options.result}.{purpose}"

    def settle(self) -> None:
        """Let the background stream bring what it will, late pages that nobody wants any more among them."""
        time.sleep(self.options.settle)

    def publish(self, result: dict[str, Any]) -> None:
        path = Path(self.options.result)
        draft = path.with_name(path.name + ".part")
        draft.write_text(json.dumps(result) + "\n")
        draft.rename(path)

    def succeed(self, status: int = 0) -> None:
        self.publish({"ok": True, "scenario": self.options.scenario, "status": status})

    def fail(self, error: BaseException) -> None:
        self.publish({"ok": False, "scenario": self.options.scenario, "what": str(error) or repr(error), "status": 1})


class Filled:
    """Pages that contain what follows from seed, number of the region, page and generation."""

    def __init__(self, seed: int, number: int, pages: int, address: int | None) -> None:
        self.seed = seed
        self.number = number
        self.pages = pages
        if address is None:
            address = sys_mmap(0, pages * PAGE, PROT_READ_WRITE, PRIVATE, -1, 0)
        self.address = address
        self.write(0, pages, generation=0)

    @property
    def length(self) -> int:
        return self.pages * PAGE

    def at(self, page: int) -> int:
        return self.address + page * PAGE

    def page(self, page: int, generation: int = 0) -> bytes:
        head = self.seed << 48 | self.number << 40 | generation << 32 | page + 1
        return struct.pack("<QQ", head, head * 0x9E3779B97F4A7C15 % (1 << 64)) * (PAGE // 16)

    def contents(self, start: int, stop: int, generation: int = 0) -> bytes:
        return b"".join([self.page(page, generation) for page in range(start, stop)])

    def write(self, start: int, stop: int, generation: int = 1) -> None:
        copy_in(self.at(start), self.contents(start, stop, generation))

    def expect(
        self, start: int = 0, stop: int | None = None, *, at: int | None = None, generation: int = 0, what: str = ""
    ) -> None:
        """Check pages; ``at`` is where page ``start`` is now, if not where it was."""
        address = self.at(start) if at is None else at
        stop = self.pages if stop is None else stop
        expect_bytes(address, self.contents(start, stop, generation), what or f"region {self.number} from page {start}")


Scenario = Callable[[Stage], Generator[None, None, int | None]]
SCENARIOS: dict[str, Scenario] = {}


def scenario(function: Scenario) -> Scenario:
    """A generator: what stands before its one ``yield`` is done before the move; it returns the exit status."""
    SCENARIOS[function.__name__] = function
    return function


def fresh(pages: int, protection: int = PROT_NONE) -> int:
    """The address of new, empty memory, to be replaced by something else."""
    return sys_mmap(0, pages * PAGE, protection, PRIVATE, -1, 0)


# Threads and plain reading and writing


@scenario
def threads_read_the_same_pages(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    yield
    in_threads(4, lambda number: memory.expect())


@scenario
def stores_of_a_few_bytes(stage: Stage) -> Generator[None, None, None]:
    """The other bytes of the page must come from the source."""
    memory = stage.fill()
    yield
    for page in range(memory.pages):
        copy_in(memory.at(page) + 100 + page % 3000, b"stored")
    for page in range(memory.pages):
        expected = bytearray(memory.page(page))
        offset = 100 + page % 3000
        expected[offset : offset + 6] = b"stored"
        expect_bytes(memory.at(page), bytes(expected), f"page {page} with 6 bytes stored at {offset}")


@scenario
def pages_that_were_never_touched(stage: Stage) -> Generator[None, None, None]:
    untouched, read_only_touched, memory = fresh(64, PROT_READ_WRITE), fresh(64, PROT_READ), stage.fill(64)
    expect_zeros(read_only_touched, 64, "before the move")
    yield
    expect_zeros(untouched, 64, "never touched")
    expect_zeros(read_only_touched, 64, "read once")
    memory.expect()


@scenario
def stack_growth(stage: Stage) -> Generator[None, None, None]:
    """The main thread's stack grows into addresses that the source never had."""
    memory = stage.fill(64)
    sys.setrecursionlimit(10_000)

    def deep(level: int) -> int:
        # Through a C function: calls from Python to Python do not use the stack.
        return level if level == 0 else 1 + max(map(deep, [level - 1]))

    before = status_kib("VmStk")
    yield
    ensure(deep(1000) == 1000, "a deep recursion lost count")
    ensure(status_kib("VmStk") > before, "the stack did not grow")
    memory.expect()


# munmap and mremap


@scenario
def munmap(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    third = memory.pages // 3
    yield
    sys_munmap(memory.at(third), third * PAGE)
    expect_unmapped(memory.at(third), third)
    sys_mmap(memory.at(third), third * PAGE, PROT_READ_WRITE, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0)
    memory.write(third, third + 4)
    expect_zeros(memory.at(third + 4), third - 4, "mapped anew where pages were unmapped")
    memory.expect(0, third)
    stage.settle()
    expect_zeros(memory.at(third + 4), third - 4, "mapped anew, some time later")
    memory.expect(third, third + 4, generation=1)
    memory.expect(2 * third)


@scenario
def mmap_over(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    half = memory.pages // 2
    yield
    sys_mmap(memory.at(half), half * PAGE, PROT_READ_WRITE, PRIVATE | MAP_FIXED, -1, 0)
    expect_zeros(memory.at(half), half // 2, "mapped over")
    memory.expect(0, half)
    stage.settle()
    expect_zeros(memory.at(half), half, "mapped over, some time later")


@scenario
def mremap_moved(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    quarter = memory.pages // 4
    # Found beforehand: afterwards the kernel might choose the place that has just become free.
    middle, head, again = fresh(2 * quarter), fresh(quarter), fresh(quarter)
    how = MREMAP_MAYMOVE | MREMAP_FIXED
    yield
    # First the middle, so that what is left is two pieces.
    sys_mremap(memory.at(quarter), 2 * quarter * PAGE, 2 * quarter * PAGE, how, middle)
    sys_mremap(memory.address, quarter * PAGE, quarter * PAGE, how, head)
    expect_unmapped(memory.address, 3 * quarter)
    memory.expect(quarter, 2 * quarter, at=middle)
    # What moved once can move again, with pages of it still missing.
    sys_mremap(middle + quarter * PAGE, quarter * PAGE, quarter * PAGE, how, again)
    memory.expect(2 * quarter, 3 * quarter, at=again)
    stage.settle()
    memory.expect(0, quarter, at=head)
    memory.expect(quarter, 2 * quarter, at=middle)
    memory.expect(2 * quarter, 3 * quarter, at=again)
    memory.expect(3 * quarter)


@scenario
def mremap_exchanged(stage: Stage) -> Generator[None, None, None]:
    """Two regions change places: each address now stands for pages of another one."""
    one, other = stage.fill(), stage.fill()
    yield
    aside, how = fresh(one.pages), MREMAP_MAYMOVE | MREMAP_FIXED
    sys_mremap(one.address, one.length, one.length, how, aside)
    sys_mremap(other.address, one.length, one.length, how, one.address)
    sys_mremap(aside, one.length, one.length, how, other.address)
    for page in range(0, one.pages, 2):
        one.expect(page, page + 1, at=other.at(page))
        other.expect(page, page + 1, at=one.at(page))
    stage.settle()
    one.expect(at=other.address)
    other.expect(at=one.address)


@scenario
def mremap_onto(stage: Stage) -> Generator[None, None, None]:
    """The pages that are moved onto must not come back."""
    memory, victim = stage.fill(), stage.fill()
    half = memory.pages // 2
    yield
    sys_mremap(memory.address, half * PAGE, half * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, victim.address)
    memory.expect(0, half // 2, at=victim.address)
    stage.settle()
    memory.expect(0, half, at=victim.address)
    victim.expect(half)
    memory.expect(half)


@scenario
def mremap_grown(stage: Stage) -> Generator[None, None, None]:
    """Once where it is, once with a move."""
    room = fresh(3 * stage.pages)
    sys_munmap(room + stage.pages * PAGE, 2 * stage.pages * PAGE)
    sys_mprotect(room, stage.pages * PAGE, PROT_READ_WRITE)
    memory = stage.fill(address=room)
    yield
    sys_mremap(memory.address, memory.length, memory.length + 8 * PAGE, 0, 0)
    expect_zeros(memory.at(memory.pages), 8, "grown in place")
    copy_in(memory.at(memory.pages), b"x" * PAGE)
    # Something in the way.
    sys_mmap(memory.at(memory.pages + 8), PAGE, PROT_NONE, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0)
    new = sys_mremap(memory.address, memory.length + 8 * PAGE, 2 * memory.length, MREMAP_MAYMOVE, 0)
    ensure(new != memory.address, "mremap found room where something was in the way")
    expect_zeros(new + memory.length + PAGE, memory.pages - 1, "grown with a move")
    expect_bytes(new + memory.length, b"x" * PAGE, "the page written after the first growth")
    memory.expect(at=new)
    stage.settle()
    expect_zeros(new + memory.length + PAGE, memory.pages - 1, "grown with a move, some time later")
    memory.expect(at=new)


@scenario
def mremap_grown_while_locked(stage: Stage) -> Generator[None, None, None]:
    """The kernel fills the new pages before it tells the userfaultfd of the move: their faults come first."""
    memory = stage.fill(64)
    target, back = fresh(96), fresh(96)
    yield
    sys_mlock(memory.address, memory.length)
    new = sys_mremap(memory.address, memory.length, 96 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target)
    memory.expect(at=new)
    expect_zeros(new + memory.length, 32, "grown while locked")
    sys_munlock(new, 96 * PAGE)
    # Still one mapping for the program, whatever was done to bring the pages.
    sys_mremap(new, 96 * PAGE, 96 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, back)
    memory.expect(at=back)
    expect_zeros(back + memory.length, 32, "grown while locked, moved")


@scenario
def mremap_into_a_place_just_left(stage: Stage) -> Generator[None, None, None]:
    """One thread moves pages away, another at once moves others there.

    The kernel tells the userfaultfd of the first move, then of the second, and only then that the first one's old
    range is unmapped: that is not the end of the pages which have moved in meanwhile.
    """
    one, other = stage.fill(), stage.fill()
    piece = 8
    starts = range(0, one.pages - piece + 1, piece)
    away = fresh(one.pages)
    how = MREMAP_MAYMOVE | MREMAP_FIXED
    length = piece * PAGE
    yield
    turn = threading.Semaphore(0)

    def follow(number: int) -> None:
        if number == 0:
            for start in starts:
                turn.release()
                sys_mremap(one.at(start), length, length, how, away + start * PAGE)
            return
        for start in starts:
            turn.acquire()
            deadline = time.monotonic() + 20
            while True:
                with contextlib.suppress(FileExistsError):
                    sys_mmap(one.at(start), length, PROT_NONE, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0)
                    break
                ensure(time.monotonic() < deadline, "a place is not left")
            sys_mremap(other.at(start), length, length, how, one.at(start))

    in_threads(2, follow)
    for start in starts:
        other.expect(start, start + piece, at=one.at(start))
    one.expect(at=away)


@scenario
def mremap_shrunk(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    half = memory.pages // 2
    yield
    sys_mremap(memory.address, memory.length, half * PAGE, 0, 0)
    expect_unmapped(memory.at(half), memory.pages - half)
    sys_mremap(memory.address, half * PAGE, memory.length, 0, 0)
    expect_zeros(memory.at(half), memory.pages - half, "grown again")
    memory.expect(0, half)
    stage.settle()
    expect_zeros(memory.at(half), memory.pages - half, "grown again, some time later")


@scenario
def mremap_dontunmap(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    quarter = memory.pages // 4
    yield
    length = 2 * quarter * PAGE
    new = sys_mremap(memory.at(quarter), length, length, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, 0)
    expect_zeros(memory.at(quarter), quarter, "the place that pages moved away from")
    memory.expect(quarter, 2 * quarter, at=new)
    memory.write(quarter, quarter + 2)
    stage.settle()
    memory.expect(quarter, quarter + 2, generation=1)
    expect_zeros(memory.at(quarter + 2), 2 * quarter - 2, "the place that pages moved away from, some time later")
    memory.expect(quarter, 3 * quarter, at=new)
    memory.expect(0, quarter)
    memory.expect(3 * quarter)


# madvise, mprotect, mlock


@scenario
def madvise_dontneed(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    gone = range(0, memory.pages - 16, 32)
    yield
    for start in gone:
        sys_madvise(memory.at(start), 16 * PAGE, MADV_DONTNEED)
        expect_zeros(memory.at(start), 8, f"pages from {start} on, thrown away")
        memory.write(start + 12, start + 16)
        memory.expect(start + 16, min(start + 24, memory.pages))
    stage.settle()
    for start in gone:
        expect_zeros(memory.at(start), 12, f"pages from {start} on, some time later")
        memory.expect(start + 12, start + 16, generation=1)
        memory.expect(start + 16, min(start + 32, memory.pages))
    sys_madvise(memory.address, memory.length, MADV_DONTNEED)
    expect_zeros(memory.address, memory.pages, "everything thrown away")


@scenario
def madvise_free(stage: Stage) -> Generator[None, None, None]:
    """Until it is written again a page is as it was or zeros, and once zeros, always zeros."""
    memory = stage.fill()
    half = memory.pages // 2
    yield
    sys_madvise(memory.address, half * PAGE, MADV_FREE)
    memory.write(0, 4)
    zeros = set()
    for _ in range(2):
        for page in range(4, half):
            seen = copy_out(memory.at(page), PAGE)
            if seen == ZERO_PAGE:
                zeros.add(page)
            else:
                ensure(page not in zeros, f"freed page {page} came back")
                ensure(seen == memory.page(page), f"freed page {page} is neither what it was nor zeros")
        stage.settle()
    memory.expect(0, 4, generation=1)
    memory.expect(half)


@scenario
def madvise_remove(stage: Stage) -> Generator[None, None, None]:
    path = stage.path("shared")
    with open(path, "wb+") as file:
        file.truncate(stage.pages * PAGE)
        address = sys_mmap(0, stage.pages * PAGE, PROT_READ_WRITE, mmap.MAP_SHARED, file.fileno(), 0)
    memory = stage.fill(address=address)
    private = stage.fill(64)
    quarter = memory.pages // 4
    yield
    sys_madvise(memory.at(quarter), quarter * PAGE, MADV_REMOVE)
    expect_zeros(memory.at(quarter), quarter, "the hole in the file")
    memory.expect(0, quarter)
    memory.write(quarter, quarter + 4)
    stage.settle()
    memory.expect(quarter, quarter + 4, generation=1)
    expect_zeros(memory.at(quarter + 4), quarter - 4, "the hole in the file, some time later")
    memory.expect(2 * quarter)
    private.expect()
    expect_file(path, copy_out(memory.address, memory.length))


@scenario
def private_file_mapping(stage: Stage) -> Generator[None, None, None]:
    """A page written before the move is kept; thrown away, it is the file's again."""
    path, pages = stage.path("private"), 128
    with open(path, "wb+") as file:
        file.write(b"file" * (pages * PAGE // 4))
        file.flush()
        address = sys_mmap(0, pages * PAGE, PROT_READ_WRITE, mmap.MAP_PRIVATE, file.fileno(), 0)
    memory = stage.fill(64, address=address)
    yield
    sys_madvise(memory.address, 16 * PAGE, MADV_DONTNEED)
    expect_bytes(memory.address, b"file" * (16 * PAGE // 4), "thrown away")
    expect_bytes(memory.at(64), b"file" * (64 * PAGE // 4), "never written")
    memory.expect(16)
    memory.write(60, 64)
    memory.expect(60, 64, generation=1)
    stage.settle()
    expect_bytes(memory.address, b"file" * (16 * PAGE // 4), "thrown away, some time later")
    expect_file(path, b"file" * (pages * PAGE // 4))


@scenario
def mprotect(stage: Stage) -> Generator[None, None, None]:
    memory, hidden = stage.fill(), stage.fill(64)
    third = memory.pages // 3
    sys_mprotect(hidden.address, hidden.length, PROT_NONE)
    yield
    sys_mprotect(memory.at(third), third * PAGE, PROT_NONE)
    expect_unmapped(memory.at(third), third)
    sys_mprotect(memory.at(third), third * PAGE, PROT_READ)
    memory.expect(third, third + third // 2)
    reading, writing = os.pipe()
    os.write(writing, b"x")
    expect_error(errno.EFAULT, sys_read, reading, memory.at(2 * third - 1), 1)
    sys_mprotect(memory.at(third), third * PAGE, PROT_READ_WRITE)
    memory.write(third, third + 4)
    memory.expect(third, third + 4, generation=1)
    memory.expect(third + 4)
    memory.expect(0, third)
    stage.settle()
    sys_mprotect(hidden.address, hidden.length, PROT_READ)
    hidden.expect(what="hidden before the move")


@scenario
def mlock(stage: Stage) -> Generator[None, None, None]:
    memory, on_fault, before = stage.fill(), stage.fill(64), stage.fill(64)
    sys_mlock(before.address, before.length)
    yield
    half = memory.pages // 2
    sys_mlock(memory.address, half * PAGE)
    ensure(resident(memory.address, half), "mlock left pages out")
    sys_mlock2(on_fault.address, on_fault.length, MLOCK_ONFAULT)
    expect_error(errno.EINVAL, sys_madvise, memory.address, PAGE, MADV_DONTNEED)
    for region in (memory, on_fault, before):
        region.expect()
    ensure(status_kib("VmLck") >= (half + 128) * PAGE >> 10, "VmLck is too small")
    sys_munlock(memory.address, half * PAGE)
    sys_madvise(memory.address, half * PAGE, MADV_DONTNEED)
    expect_zeros(memory.address, half, "thrown away after munlock")
    stage.settle()
    memory.expect(half)


@scenario
def mlockall(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    yield
    sys_mlockall(MCL_CURRENT | MCL_FUTURE)
    ensure(resident(memory.address, memory.pages), "mlockall left pages out")
    new = fresh(16, PROT_READ_WRITE)
    ensure(resident(new, 16), "MCL_FUTURE left pages out")
    expect_zeros(new, 16, "mapped after mlockall")
    memory.expect()
    sys_munlockall()
    sys_madvise(memory.address, PAGE, MADV_DONTNEED)
    expect_zeros(memory.address, 1, "thrown away after munlockall")


@scenario
def brk_grown_and_shrunk(stage: Stage) -> Generator[None, None, None]:
    """malloc gets enough room below that it leaves the break alone."""
    _libc.mallopt(M_TOP_PAD, 16 << 20)
    before = sys_sbrk(0)
    while sys_sbrk(0) == before:
        _libc.malloc(100_000)
    sys_sbrk(-sys_sbrk(0) % PAGE)
    memory = stage.fill(address=sys_sbrk(stage.pages * PAGE))
    half = memory.pages // 2
    yield
    ensure(sys_sbrk(0) == memory.at(memory.pages), "the break is elsewhere")
    sys_sbrk(64 * PAGE)
    expect_zeros(memory.at(memory.pages), 64, "beyond the old break")
    sys_sbrk(-(64 + half) * PAGE)
    expect_unmapped(memory.at(memory.pages - half), half)
    sys_sbrk(half * PAGE)
    expect_zeros(memory.at(memory.pages - half), half, "below the old break, given up and taken again")
    memory.expect(0, memory.pages - half)
    stage.settle()
    expect_zeros(memory.at(memory.pages - half), half, "below the old break, some time later")


# Children


@scenario
def fork(stage: Stage) -> Generator[None, None, None]:
    """Each side sees all pages, and none of what the other changes from then on."""
    memory = stage.fill()
    yield
    child = in_child(stage, lambda: _check_and_change(stage, memory, 2))
    _check_and_change(stage, memory, 1)
    expect_child(stage, child)


def _check_and_change(stage: Stage, memory: Filled, generation: int) -> None:
    half = memory.pages // 2
    memory.write(half, memory.pages, generation)
    memory.expect(0, half)
    memory.write(0, half // 2, generation)
    stage.settle()
    memory.expect(0, half // 2, generation=generation)
    memory.expect(half // 2, half)
    memory.expect(half, generation=generation)


@scenario
def fork_and_change_layouts(stage: Stage) -> Generator[None, None, None]:
    """What one side unmaps, moves or throws away stays as it was for the other."""
    memory = stage.fill()
    quarter = memory.pages // 4
    new = fresh(quarter)
    yield

    def change_all() -> None:
        sys_munmap(memory.address, quarter * PAGE)
        sys_madvise(memory.at(quarter), quarter * PAGE, MADV_DONTNEED)
        sys_mremap(memory.at(2 * quarter), quarter * PAGE, quarter * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new)
        expect_zeros(memory.at(quarter), quarter, "thrown away")
        memory.expect(2 * quarter, 3 * quarter, at=new)
        memory.expect(3 * quarter)

    child = in_child(stage, change_all)
    memory.expect()
    expect_child(stage, child)
    bystander = in_child(stage, memory.expect)
    change_all()
    expect_child(stage, bystander)


@scenario
def fork_after_changes(stage: Stage) -> Generator[None, None, None]:
    """The child inherits what was thrown away and moved, not only what is missing."""
    memory = stage.fill()
    quarter = memory.pages // 4
    new = fresh(quarter)
    yield
    sys_madvise(memory.address, quarter * PAGE, MADV_DONTNEED)
    sys_mremap(memory.at(quarter), quarter * PAGE, quarter * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new)
    sys_mmap(memory.at(quarter), quarter * PAGE, PROT_READ_WRITE, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0)

    def check() -> None:
        expect_zeros(memory.address, 2 * quarter, "thrown away, and mapped anew")
        memory.expect(quarter, 2 * quarter, at=new)
        memory.expect(2 * quarter)

    child = in_child(stage, check)
    check()
    expect_child(stage, child)


@scenario
def fork_from_a_thread(stage: Stage) -> Generator[None, None, None]:
    """Two threads fork at once, a third reads all the while."""
    memory = stage.fill()
    yield

    def work(number: int) -> None:
        if number == 2:
            memory.expect()
            return
        expect_child(stage, in_child(stage, memory.expect))

    in_threads(3, work)
    memory.expect()


@scenario
def fork_of_a_fork(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill()
    yield

    def descend(depth: int) -> None:
        memory.write(depth, depth + 1, generation=depth)
        if depth < 4:
            expect_child(stage, in_child(stage, lambda: descend(depth + 1)))
        for page in range(1, 8):
            memory.expect(page, page + 1, generation=page if page <= depth else 0)
        memory.expect(8)

    descend(1)


@scenario
def child_outlives_its_parent(stage: Stage) -> Generator[None, None, int]:
    """The child's pages must come though the process that was moved has ended."""
    memory = stage.fill()
    reading, writing = os.pipe()
    yield

    def live_on() -> None:
        os.close(writing)
        # The end of the pipe is the end of the parent.
        ensure(os.read(reading, 1) == b"", "a byte came from nowhere")
        time.sleep(0.2)
        memory.expect()
        stage.succeed(7)

    in_child(stage, live_on, publishes=True)
    return 7


@scenario
def fork_with_madvise_of_old(stage: Stage) -> Generator[None, None, None]:
    """MADV_DONTFORK and MADV_WIPEONFORK, given before the move, hold after it."""
    kept, wiped, memory = stage.fill(64), stage.fill(64), stage.fill(64)
    sys_madvise(kept.address, kept.length, MADV_DONTFORK)
    sys_madvise(wiped.address, wiped.length, MADV_WIPEONFORK)
    yield

    def check() -> None:
        expect_unmapped(kept.address, kept.pages)
        expect_zeros(wiped.address, wiped.pages, "wiped at fork")
        memory.expect()

    expect_child(stage, in_child(stage, check))
    for region in (kept, wiped, memory):
        region.expect()


@scenario
def vfork_and_exec(stage: Stage) -> Generator[None, None, None]:
    """posix_spawn: a child in its parent's memory until it execs."""
    memory = stage.fill()
    yield
    for _ in range(4):
        expect_child(stage, os.posix_spawn("/bin/true", ["true"], {}))
    memory.expect()


# exec and exit


def _prepare_exec(stage: Stage) -> Callable[[], NoReturn]:
    """Arguments that lie in lazy pages: the pointers in one, the strings in others."""
    pages = 16
    payload = [printable(stage.options.seed, page) for page in range(pages)]
    words = [sys.executable, __file__, "--after-exec", stage.options.result, str(stage.options.seed), *payload]
    strings = sys_mmap(0, (len(words) + 1) * PAGE, PROT_READ_WRITE, PRIVATE, -1, 0)
    pointers = [strings + (index + 1) * PAGE for index in range(len(words))]
    for pointer, word in zip(pointers, words, strict=True):
        copy_in(pointer, word.encode() + b"\0")
    copy_in(strings, struct.pack(f"<{len(words) + 1}Q", *pointers, 0))
    environment: int = ctypes.c_void_p.in_dll(_libc, "environ").value or 0

    def leave() -> NoReturn:
        sys_execve(pointers[0], strings, environment)
        raise Broken("exec answered")

    # For those who want to break memory: the payload alone.
    stage.filled.append(_Listed(pointers[5], pages))
    return leave


class _Listed(Filled):
    """Pages that are listed in the ready file, with contents that are the scenario's own business."""

    def __init__(self, address: int, pages: int) -> None:
        self.address = address
        self.pages = pages


def printable(seed: int, page: int) -> str:
    return f"{seed}.{page}." * 300


def after_exec(result: str, seed: str, *payload: str) -> int:
    """The new program: its arguments crossed over from lazy pages."""
    ok = list(payload) == [printable(int(seed), page) for page in range(len(payload))]
    blank = mmap.mmap(-1, 4 << 20)
    ok = ok and blank[:] == bytes(4 << 20)
    Path(result).write_text(json.dumps({"ok": ok, "what": "the arguments of exec", "status": 11 if ok else 1}))
    return 11 if ok else 1


@scenario
def exec(stage: Stage) -> Generator[None, None, None]:
    stage.fill()
    leave = _prepare_exec(stage)
    yield
    leave()


@scenario
def exec_from_a_thread(stage: Stage) -> Generator[None, None, None]:
    """The new program takes over the PID while the other threads wait for pages."""
    memory = stage.fill()
    leave = _prepare_exec(stage)
    yield
    target = fresh(memory.pages, PROT_READ_WRITE)
    for _ in range(3):
        threading.Thread(target=_libc.memmove, args=(target, memory.address, memory.length), daemon=True).start()
    threading.Thread(target=leave).start()
    signal.pause()


@scenario
def exit_at_once(stage: Stage) -> Generator[None, None, int]:
    stage.fill()
    yield
    return 5


@scenario
def exit_group_with_threads(stage: Stage) -> Generator[None, None, int]:
    """The other threads end in the middle of waiting for pages."""
    memory = stage.fill()
    barrier = threading.Barrier(7)

    def touch(number: int) -> None:
        barrier.wait()
        target = fresh(memory.pages, PROT_READ_WRITE)
        while True:
            for page in range(number, memory.pages):
                _libc.memmove(target, memory.at(page), PAGE)

    for number in range(6):
        threading.Thread(target=touch, args=(number,), daemon=True).start()
    yield
    barrier.wait()
    time.sleep(0.005)
    return 9


@scenario
def threads_end(stage: Stage) -> Generator[None, None, None]:
    """Threads that the source started end: the kernel clears their TIDs and robust lists in lazy pages."""
    memory = stage.fill(64)
    gate = threading.Event()
    threads = [threading.Thread(target=gate.wait) for _ in range(16)]
    for thread in threads:
        thread.start()
    yield
    gate.set()
    for thread in threads:
        thread.join(30)
        ensure(not thread.is_alive(), "a thread does not end")
    # Python's join ends a little before the thread itself does.
    deadline = time.monotonic() + 20
    while len(os.listdir("/proc/self/task")) > 1:
        ensure(time.monotonic() < deadline, "there are threads left")
        time.sleep(0.001)
    memory.expect()


# System calls


@scenario
def system_calls_that_read_pages(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill(160)
    path = stage.path("written")
    copy_in(memory.at(0) + 500, path.encode() + b"\0")
    pair = memory.at(2) + 64
    copy_in(pair, struct.pack("<4Q", memory.at(3) + 11, 5000, memory.at(6) + 1, 3000))
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    reading, writing = os.pipe()
    yield
    ensure(sys_access(memory.at(0) + 500, os.R_OK) == 0, "a path in a lazy page is not found")
    ensure(sys_writev(writing, pair, 2) == 8000, "a short writev")
    both = memory.contents(3, 5)[11:5011] + memory.contents(6, 7)[1:3001]
    ensure(os.read(reading, 8192) == both, "writev from lazy pages wrote something else")
    ensure(sys_write(writing, memory.at(10) + 7, 40_000) == 40_000, "a short write to a pipe")
    ensure(os.read(reading, 65536) == memory.contents(10, 20)[7:40_007], "a pipe got something else")
    ensure(sys_pwrite(file, memory.at(30), 32 * PAGE, 0) == 32 * PAGE, "a short write to a file")
    ensure(os.pread(file, 64 * PAGE, 0) == memory.contents(30, 62), "a file got something else")
    one, other = socket.socketpair()
    ensure(sys_write(one.fileno(), memory.at(70) + 9, 20_000) == 20_000, "a short write to a socket")
    ensure(_received(other, 20_000) == memory.contents(70, 75)[9:20_009], "a socket got something else")
    local, pages = fresh(8, PROT_READ_WRITE), ctypes.create_string_buffer(32)
    struct.pack_into("<4Q", pages, 0, local, 8 * PAGE, memory.at(80), 8 * PAGE)
    vectors = ctypes.addressof(pages)
    ensure(sys_process_vm_readv(os.getpid(), vectors, 1, vectors + 16, 1, 0) == 8 * PAGE, "a short process_vm_readv")
    memory.expect(80, 88, at=local)
    # vmsplice hands the pages themselves to the pipe.
    struct.pack_into("<2Q", pages, 0, memory.at(90), 8 * PAGE)
    ensure(sys_vmsplice(writing, vectors, 1, 0) == 8 * PAGE, "a short vmsplice")
    ensure(os.read(reading, 65536) == memory.contents(90, 98), "vmsplice got something else")
    if SYS_FUTEX != -1:
        expect_error(errno.EAGAIN, sys_futex, SYS_FUTEX, memory.at(100), FUTEX_WAIT, 0xFFFFFFFF, 0)
    memory.expect(3)


def _received(source: socket.socket, length: int) -> bytes:
    pieces = b""
    while len(pieces) < length:
        pieces += source.recv(length - len(pieces))
    return pieces


@scenario
def system_calls_that_write_pages(stage: Stage) -> Generator[None, None, None]:
    memory = stage.fill(128)
    source = os.urandom(16 * PAGE)
    file = os.open(stage.path("read"), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(file, source)
    reading, writing = os.pipe()
    descriptors = memory.at(120) + 40
    copy_in(descriptors, struct.pack("<ihh", reading, select.POLLIN, 0))
    vectors = memory.at(121)
    copy_in(vectors, struct.pack("<4Q", memory.at(60) + 5, 300, memory.at(63) - 100, 400))
    yield
    expected = bytearray(memory.contents(0, 120))

    def wrote(page: int, offset: int, contents: bytes) -> None:
        start = page * PAGE + offset
        expected[start : start + len(contents)] = contents

    # Whole pages, and parts of pages of which the rest must stay.
    ensure(sys_pread(file, memory.at(4), 8 * PAGE, 0) == 8 * PAGE, "a short read from a file")
    wrote(4, 0, source[: 8 * PAGE])
    ensure(sys_pread(file, memory.at(20) + 123, 20_000, 77) == 20_000, "a short read from a file")
    wrote(20, 123, source[77:20_077])
    os.write(writing, source[:30_000])
    ensure(sys_read(reading, memory.at(40) + 9, 30_000) == 30_000, "a short read from a pipe")
    wrote(40, 9, source[:30_000])
    os.write(writing, source[:700])
    ensure(sys_poll(descriptors, 1, 5000) == 1, "poll sees nothing")
    ensure(struct.unpack("<ihh", copy_out(descriptors, 8))[2] & select.POLLIN, "poll's answer got lost")
    ensure(sys_readv(reading, vectors, 2) == 700, "a short readv")
    wrote(60, 5, source[:300])
    wrote(63, -100, source[300:700])
    for page in range(80, 110):
        offset, length = page * 31 % 3000, 200
        ensure(sys_getrandom(memory.at(page) + offset, length, 0) == length, "a short getrandom")
        random = copy_out(memory.at(page) + offset, length)
        ensure(random not in (memory.page(page)[offset : offset + length], bytes(length)), "getrandom wrote nothing")
        wrote(page, offset, random)
    expect_bytes(memory.address, bytes(expected), "after system calls wrote into lazy pages")
    stage.settle()
    expect_bytes(memory.address, bytes(expected), "some time after system calls wrote into lazy pages")


@scenario
def unmapped_under_a_system_call(stage: Stage) -> Generator[None, None, None]:
    """A write(2) that waits for a page ends when the page's mapping goes, or moves."""
    memory = stage.fill()
    half = memory.pages // 2
    new = fresh(half)
    file = os.open(stage.path("scratch"), os.O_RDWR | os.O_CREAT, 0o600)
    yield
    outcomes: list[int] = []

    def write_all() -> None:
        for page in range(memory.pages):
            try:
                outcomes.append(sys_pwrite(file, memory.at(page), PAGE, page * PAGE))
            except OSError as error:
                outcomes.append(-(error.errno or 0))

    writer = threading.Thread(target=write_all)
    writer.start()
    sys_mremap(memory.at(half), half * PAGE, half * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, new)
    sys_munmap(memory.address, half * PAGE)
    writer.join(60)
    ensure(not writer.is_alive(), "a write(2) waits for a page that is gone")
    for page, outcome in enumerate(outcomes):
        ensure(outcome == -errno.EFAULT or 0 < outcome <= PAGE, f"write(2) from page {page} answered {outcome}")
        if outcome == PAGE:
            ensure(os.pread(file, PAGE, page * PAGE) == memory.page(page), f"page {page} was written as another")
    memory.expect(half, at=new)


# Helpers of scenarios


def status_kib(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise Broken(f"no {name} in /proc/self/status")


def resident(address: int, pages: int) -> bool:
    answer = ctypes.create_string_buffer(pages)
    sys_mincore(address, pages * PAGE, ctypes.addressof(answer))
    return all(byte & 1 for byte in answer.raw)


def expect_file(path: str, expected: bytes) -> None:
    ensure(Path(path).read_bytes() == expected, f"{path} contains something else")


def in_threads(count: int, body: Callable[[int], None]) -> None:
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            body(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def in_child(stage: Stage, body: Callable[[], None], *, publishes: bool = False) -> int:
    """Fork; the child runs the body and exits with 0, or leaves a report and exits with 1."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # Alarms are not inherited: fork(2).
        signal.alarm(ALARM_SECONDS)
        body()
        status = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            Path(stage.path(f"child-{os.getpid()}")).write_text(str(error) or repr(error))
            if publishes:
                stage.fail(error)
    finally:
        os._exit(status)


def expect_child(stage: Stage, pid: int) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        report = Path(stage.path(f"child-{pid}"))
        raise Broken(f"child {pid} ended with {code}: {report.read_text() if report.exists() else 'no report'}")


# The course of things


def announce(stage: Stage) -> None:
    """The ready file: who we are, and where our pages lie (for those who want to break them)."""
    path = Path(stage.options.ready)
    draft = path.with_name(path.name + ".part")
    regions = [{"address": region.address, "pages": region.pages} for region in stage.filled]
    draft.write_text(json.dumps({"pid": os.getpid(), "regions": regions}) + "\n")
    draft.rename(path)


def wait_for_go(go: str) -> None:
    """Until a signal, a file, or another network namespace says that the program has been moved."""
    if go == "signal":
        signal.sigwait({signal.SIGUSR1})
    elif go == "moved":
        home = os.stat("/proc/self/ns/net").st_ino
        while os.stat("/proc/self/ns/net").st_ino == home:
            time.sleep(0.001)
    elif go != "now":
        while not os.path.exists(go):
            time.sleep(0.001)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=sorted(SCENARIOS))
    parser.add_argument("--seed", type=int, default=1, help="0 to 65535")
    parser.add_argument("--pages", type=int, default=1024, help="of the main region")
    parser.add_argument("--result", required=True, metavar="FILE")
    parser.add_argument("--ready", required=True, metavar="FILE")
    parser.add_argument("--settle", type=float, default=0, metavar="SECONDS", help="before each second look")
    parser.add_argument(
        "--go",
        default="now",
        metavar="now|signal|moved|PATH",
        help="act at once, at SIGUSR1, when the network namespace is another one, when PATH exists",
    )
    return parser.parse_args()


def main() -> int:
    if sys.argv[1:2] == ["--after-exec"]:
        return after_exec(*sys.argv[2:])
    # Forking while threads run is what some scenarios are for.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    stage = Stage(parse_options())
    play = SCENARIOS[stage.options.scenario](stage)
    next(play)
    announce(stage)
    wait_for_go(stage.options.go)
    # What hangs must end, so that the test can say so.
    signal.alarm(ALARM_SECONDS)
    status = 0
    try:
        next(play)
    except StopIteration as end:
        status = end.value or 0
    except BaseException as error:
        stage.fail(error)
        return 1
    if stage.options.scenario != child_outlives_its_parent.__name__:
        stage.succeed(status)
    # Without the interpreter's own end, which would wait for threads and touch most of its pages.
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
