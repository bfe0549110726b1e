"""Worker processes that share a large anonymous mapping, and do with it whatever can be done.

Each worker has blocks of its own, which it writes and drops; the other blocks never change, and some have never been
touched. Every look at a page is a check. All go on until the file ``--stop`` is there; then the result file says how
many operations there were, or what was wrong first. The progress file gets a byte for each hundred operations. One more
process waits all the time for a word in the last page (futex(2), with a time-out).
"""

import argparse
import ctypes
import mmap
import os
import random
import struct
import sys
from pathlib import Path

PAGE = mmap.PAGESIZE
WORKERS, BLOCK = 4, 8
UNCHANGED, UNTOUCHED = WORKERS, WORKERS + 1
MADV_DONTNEED, MADV_REMOVE = 4, 9
SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE, WAITED = 202, 0, 1, 1
SYS_MREMAP, MREMAP_MAYMOVE, MREMAP_FIXED = 25, 1, 2
MAP_FAILED = ctypes.c_void_p(-1).value

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.syscall.restype = ctypes.c_long
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def content(seed: int) -> bytes:
    """What a page holds; 0: nothing."""
    return seed.to_bytes(8, "little") * (PAGE // 8)


def checked(result: int, what: str) -> int:
    """The result of a call, if it is not -1."""
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def mremap(old: int, old_size: int, new_size: int, flags: int, new: int = 0) -> int:
    """mremap(2); with an old size of 0, a second mapping."""
    arguments = (ctypes.c_long(each) for each in (SYS_MREMAP, old, old_size, new_size, flags, new))
    return checked(libc.syscall(*arguments), "mremap")


class Arena:
    """The shared memory: page N belongs to `owner(N)`."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._mapping = mmap.mmap(-1, (pages + 1) * PAGE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        self.owned: dict[int, list[int]] = {owner: [] for owner in range(WORKERS + 2)}
        for page in range(pages):
            self.owned[page // BLOCK % (WORKERS + 2)].append(page)
        for owner, owned in self.owned.items():
            for page in owned if owner != UNTOUCHED else ():
                ctypes.memmove(self.base + page * PAGE, content(page + 1), PAGE)
        self.word = self.base + pages * PAGE
        ctypes.memmove(self.word, content(WAITED), PAGE)

    def wait(self) -> None:
        """Until `wake` of another process."""
        timeout = ctypes.create_string_buffer(struct.pack("=qq", 600, 0))
        checked(self._futex(FUTEX_WAIT, WAITED, ctypes.addressof(timeout)), "FUTEX_WAIT")
        if (found := ctypes.string_at(self.word, PAGE)) != bytes(4) + content(WAITED)[4:]:
            raise ValueError(f"the page of the futex begins {found[:8].hex()}")

    def wake(self) -> None:
        """Change the word, and tell of it."""
        ctypes.memset(self.word, 0, 4)
        checked(self._futex(FUTEX_WAKE, 1, 0), "FUTEX_WAKE")

    def _futex(self, operation: int, value: int, timeout: int) -> int:
        arguments = (ctypes.c_long(each) for each in (SYS_FUTEX, self.word, operation, value, timeout))
        return int(libc.syscall(*arguments))


class Worker:
    """One process's view."""

    def __init__(self, arena: Arena, number: int) -> None:
        self.arena = arena
        self.random = random.Random(number)
        self.own = arena.owned[number]
        self.expected = {page: page + 1 for page in (*self.own, *arena.owned[UNCHANGED])}
        self.expected |= dict.fromkeys(arena.owned[UNTOUCHED], 0)
        self.readable = list(self.expected)
        self.base = arena.base
        self.second = 0

    def look(self, page: int) -> None:
        """A page is as it must be."""
        found, wanted = ctypes.string_at(self.base + page * PAGE, PAGE), content(self.expected[page])
        if found != wanted:
            raise ValueError(f"page {page} at {self.base:#x} begins {found[:8].hex()}, not {wanted[:8].hex()}")

    def step(self) -> None:
        """One operation."""
        choose = self.random
        chance = choose.random()
        page = choose.choice(self.own)
        if chance < 0.6:
            self.look(choose.choice(self.readable))
        elif chance < 0.8:
            self.look(page)
            self.expected[page] = choose.getrandbits(60)
            ctypes.memmove(self.base + page * PAGE, content(self.expected[page]), PAGE)
        elif chance < 0.9:
            first = choose.randrange(self.arena.pages)
            size = min(choose.randrange(1, 200), self.arena.pages - first) * PAGE
            checked(libc.madvise(self.base + first * PAGE, size, MADV_DONTNEED), "MADV_DONTNEED")
            self.look(choose.choice(self.readable))
        elif chance < 0.95:
            block = page // BLOCK * BLOCK
            checked(libc.madvise(self.base + block * PAGE, BLOCK * PAGE, MADV_REMOVE), "MADV_REMOVE")
            self.expected |= dict.fromkeys((each for each in range(block, block + BLOCK) if each in self.expected), 0)
            self.look(page)
        elif chance < 0.98:
            self.map_elsewhere()
        else:
            self.fork()

    def map_elsewhere(self) -> None:
        """Use a second mapping; move it, with other memory in between; then the first again."""
        size = self.arena.pages * PAGE
        if not self.second:
            self.second = self.base = mremap(self.arena.base, 0, size, MREMAP_MAYMOVE)
        elif self.random.random() < 0.5:
            place = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            address = ctypes.addressof(ctypes.c_char.from_buffer(place))
            self.second = self.base = mremap(self.second, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, address)
            # The arena is there now: nobody may unmap it with the object.
            KEPT.append(place)
        else:
            checked(libc.munmap(self.second, size), "munmap")
            self.second, self.base = 0, self.arena.base

    def fork(self) -> None:
        """A child that sees the same, also where it has it anew."""
        if not (child := os.fork()):
            status = 1
            try:
                for _ in range(5):
                    self.look(self.random.choice(self.readable))
                self.base = mremap(self.base, 0, self.arena.pages * PAGE, MREMAP_MAYMOVE)
                for _ in range(5):
                    self.look(self.random.choice(self.readable))
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise ValueError("a child has found something else")

    def run(self, stop: Path, progress: int) -> int:
        """Until ``stop`` is there; gives how many operations there were."""
        done = 0
        while not stop.exists():
            for _ in range(100):
                self.step()
            done += 100
            os.write(progress, b".")
        for page in self.readable:
            self.look(page)
        return done


KEPT: list[mmap.mmap] = []


def main() -> None:
    """Start the workers, wait for them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pages", type=int, default=6144)
    for name in ("--stop", "--progress", "--result"):
        parser.add_argument(name, required=True, type=Path)
    options = parser.parse_args()
    progress = os.open(options.progress, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    arena = Arena(options.pages)
    workers = {}
    for number in range(WORKERS + 1):
        read, write = os.pipe()
        if not (pid := os.fork()):
            try:
                if number < WORKERS:
                    said = f"{Worker(arena, number).run(options.stop, progress)}"
                else:
                    arena.wait()
                    said = "1"
            except (OSError, ValueError) as error:
                said = f"FAIL worker {number}: {error}"
            os.write(write, said.encode())
            os._exit(0)
        os.close(write)
        workers[pid] = read
    for number, (pid, read) in enumerate(workers.items()):
        if number == WORKERS:
            arena.wake()
        said = os.read(read, 1000).decode() or "FAIL: a worker is gone"
        os.waitpid(pid, 0)
        with open(options.result, "a") as result:
            result.write(f"{said}\n")
    sys.exit("FAIL" in options.result.read_text())


if __name__ == "__main__":
    main()
