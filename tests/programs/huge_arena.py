"""A program with private and shared hugetlb memory, to which it does what ``--step`` names once ``go`` is there.

Of each of its huge pages it has written three small pages, but for every fourth, which it has never touched. Every look
at a page is a check; then the file ``result`` says "right", or what is wrong. It ends when ``stop`` is there.
"""

import argparse
import ctypes
import mmap
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

PAGE, SIZE = mmap.PAGESIZE, 2 << 20
PAGES = 16  # huge ones, of each kind
WRITTEN = (0, 300, 511)
PROT_READ, PROT_WRITE = 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_HUGETLB = 1, 2, 0x10, 0x20 | 0x40000 | 21 << 26
MADV_DONTNEED, MADV_REMOVE = 4, 9
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MAP_NORESERVE = 0x4000
SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1
WAITED_FOR = 13 * SIZE + 100 * PAGE  # where the words are that are waited for
MAP_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(3 * [ctypes.c_int]), ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.syscall.restype = ctypes.c_long
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def required(result: int | None, what: str) -> int:
    """The result of a call that must not fail."""
    if result in (None, -1, MAP_FAILED):
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    assert result is not None
    return result


class Given:
    """Where the files are that tell the program what to do; whether huge pages are reserved for its memory."""

    directory = Path()
    reserved = True


class Memory:
    """Hugetlb memory and what it must hold."""

    def __init__(self, kind: int) -> None:
        self.kind = kind
        flags = kind | MAP_HUGETLB | (0 if Given.reserved else MAP_NORESERVE)
        self.base = required(libc.mmap(None, PAGES * SIZE, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap")
        # What is in the small pages that are not zero, by (huge page, small page).
        self.expected: dict[tuple[int, int], bytes] = {}
        for number in range(PAGES):
            for small in WRITTEN if self.exists(number) else ():
                self.write(number, small, number * 1000 + small + kind)

    @staticmethod
    def exists(number: int) -> bool:
        """Whether a huge page has been written before the move."""
        return number % 4 != 3

    def write(self, number: int, small: int, seed: int) -> None:
        """Put something else into a small page."""
        self.expected[number, small] = seed.to_bytes(8, "little") * (PAGE // 8)
        ctypes.memmove(self.base + number * SIZE + small * PAGE, self.expected[number, small], PAGE)

    def drop(self, number: int) -> None:
        """A huge page is zero from now on."""
        self.expected = {place: content for place, content in self.expected.items() if place[0] != number}

    def check(self, number: int) -> None:
        """Look at a huge page: what was written, and something that was not."""
        for small in (*WRITTEN, 17, 499):
            found = ctypes.string_at(self.base + number * SIZE + small * PAGE, PAGE)
            if found != self.expected.get((number, small), bytes(PAGE)):
                raise ValueError(f"kind {self.kind}: huge page {number}, page {small} begins {found[:8].hex()}")

    def check_all(self) -> None:
        """Look at all of it, in any order."""
        for number in random.sample(range(PAGES), PAGES):
            self.check(number)


Step = Callable[[Memory, Memory], None]


def touch(private: Memory, shared: Memory) -> None:
    """Three pages of each, of which one never was; a write into a missing page leaves its neighbours alone."""
    for memory in (private, shared):
        memory.check(3)
        memory.check(5)
        memory.write(9, 17, 77)
        memory.write(9, 300, 78)
        memory.check(9)


def touch_all(private: Memory, shared: Memory) -> None:
    """Everything."""
    for memory in (private, shared):
        memory.check_all()


def in_child(action: Callable[[], None]) -> int:
    """The status with which a child ends that does this."""
    if not (child := os.fork()):
        try:
            action()
            os._exit(0)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork(private: Memory, shared: Memory) -> None:
    """While all is missing: child and parent find all of it, and of what the other writes only what is shared."""

    def child() -> None:
        private.check(1)
        private.check(7)
        private.write(2, 300, 501)
        private.check(2)
        shared.write(2, 300, 502)
        shared.check(2)
        touch_all(private, shared)

    status = in_child(child)
    assert status == 0, f"the child ended with {status}"
    shared.expected[2, 300] = (502).to_bytes(8, "little") * (PAGE // 8)
    touch_all(private, shared)
    assert in_child(lambda: touch_all(private, shared)) == 0


def poor_fork(private: Memory, shared: Memory) -> None:
    """No huge page is left: a child that needs one of its own is ended by the kernel's signal, and nobody else."""
    assert in_child(lambda: shared.check(1)) == 0
    assert in_child(lambda: private.check(1)) == -signal.SIGBUS
    assert in_child(lambda: private.check(3)) == -signal.SIGBUS
    touch_all(private, shared)


def discard(private: Memory, shared: Memory) -> None:
    """MADV_DONTNEED of missing pages drops private content, and no shared content."""
    for memory in (private, shared):
        required(libc.madvise(memory.base + SIZE, 2 * SIZE, MADV_DONTNEED), "MADV_DONTNEED")
    private.drop(1)
    private.drop(2)
    touch_all(private, shared)
    private.write(1, 5, 600)
    required(libc.madvise(private.base, 2 * SIZE, MADV_DONTNEED), "MADV_DONTNEED")
    private.drop(0)
    private.drop(1)
    touch_all(private, shared)


def remove(private: Memory, shared: Memory) -> None:
    """MADV_REMOVE of missing pages drops shared content, for a child too."""
    required(libc.madvise(shared.base + SIZE, 3 * SIZE, MADV_REMOVE), "MADV_REMOVE")
    for number in (1, 2, 3):
        shared.drop(number)
    shared.check(1)
    shared.write(2, 5, 700)
    assert in_child(lambda: shared.check(2)) == 0
    touch_all(private, shared)


def remap(private: Memory, shared: Memory) -> None:
    """Missing pages that are moved come where they have gone."""
    for memory in (private, shared):
        place = required(libc.mmap(None, (PAGES + 1) * SIZE, 0, 0x4022, -1, 0), "a hole") + SIZE & -SIZE
        flags = MREMAP_MAYMOVE | MREMAP_FIXED
        # All of it: the kernel forgets what it has reserved for the rest of a private mapping.
        memory.base = required(libc.mremap(memory.base, PAGES * SIZE, PAGES * SIZE, flags, place), "mremap")
    private.check(5)
    private.check(7)
    shared.check(6)
    shared.check(11)
    touch_all(private, shared)


def unmap(private: Memory, shared: Memory) -> None:
    """What is unmapped while it is missing is gone, and the rest is not; what is mapped there anew is zero."""
    for memory in (private, shared):
        required(libc.munmap(memory.base + 4 * SIZE, 4 * SIZE), "munmap")
        flags = MAP_FIXED | MAP_PRIVATE | MAP_HUGETLB
        required(libc.mmap(memory.base + 4 * SIZE, SIZE, PROT_READ | PROT_WRITE, flags, -1, 0), "mmap")
        required(libc.mmap(memory.base + 5 * SIZE, 3 * SIZE, PROT_READ, MAP_FIXED | 0x22, -1, 0), "mmap")
        for number in range(4, 8):
            memory.drop(number)
    touch_all(private, shared)


def family(private: Memory, shared: Memory) -> None:
    """A child that was born before the move has the same pages."""
    touch_all(private, shared)
    assert os.wait()[1] == 0, "the child has found something else"


def waiters(private: Memory, shared: Memory) -> None:
    """Threads that have waited since before the move for words in these pages are still there to be woken."""
    touch_all(private, shared)
    for memory in (private, shared):
        word = ctypes.c_uint32.from_address(memory.base + WAITED_FOR)
        assert word.value == 0
        word.value = 1
        while futex(memory.base + WAITED_FOR, FUTEX_WAKE, 1) != 1:
            time.sleep(0.005)


def look_twice(private: Memory, shared: Memory) -> None:
    """At a page of each, and at one more when ``again`` is there; ``looked`` and ``looks`` tell of it."""
    for memory in (private, shared):
        memory.check(0)
    (Given.directory / "looked").touch()
    wait_for(Given.directory / "again")
    (Given.directory / "looks").touch()
    private.check(1)


def futex(place: int, operation: int, value: int) -> int:
    """futex(2) without a time-out; restarted."""
    return int(libc.syscall(*map(ctypes.c_long, (SYS_FUTEX, place, operation, value, 0, 0, 0))))


STEPS: dict[str, Step] = {
    each.__name__: each
    for each in (touch, touch_all, fork, poor_fork, discard, remove, remap, unmap, family, waiters, look_twice)
}


def wait_for(path: Path) -> None:
    """Until it is there."""
    while not path.exists():
        time.sleep(0.005)


def sleeping() -> int:
    """How many threads of this process wait in futex(2) for one of the words."""
    calls = [Path(f"/proc/self/task/{tid}/syscall").read_text().split() for tid in os.listdir("/proc/self/task")]
    return sum(call[0] == str(SYS_FUTEX) and int(call[1], 16) % SIZE == WAITED_FOR % SIZE for call in calls)


def main() -> None:
    """Set up, wait, do it, tell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--step", choices=STEPS, required=True)
    parser.add_argument("--no-reserve", action="store_true")
    options = parser.parse_args()
    Given.directory, Given.reserved = options.directory, not options.no_reserve
    try:
        private, shared = Memory(MAP_PRIVATE), Memory(MAP_SHARED)
        if options.step == "family" and not os.fork():
            wait_for(options.directory / "go")
            touch_all(private, shared)
            os._exit(0)
        if options.step == "waiters":
            for memory in (private, shared):
                place = memory.base + WAITED_FOR
                threading.Thread(target=futex, args=(place, FUTEX_WAIT, 0), daemon=True).start()
            while sleeping() < 2:
                time.sleep(0.005)
        (options.directory / "ready").touch()
        wait_for(options.directory / "go")
        STEPS[options.step](private, shared)
        said = "right"
    except (OSError, ValueError, AssertionError) as error:
        said = repr(error)
    (options.directory / "result.part").write_text(said)
    (options.directory / "result.part").rename(options.directory / "result")
    wait_for(options.directory / "stop")


if __name__ == "__main__":
    main()
