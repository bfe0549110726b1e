"""Memory that processes of a tree share: before a move and after it, what one writes the others see."""

import ctypes
import fcntl
import mmap
import multiprocessing
import os
import struct
from pathlib import Path

from tests.programs.cases import Case, first_problem, libc, required, syscall, unlike
from tests.programs.cases.memory import (
    MAP_ANONYMOUS,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_READ,
    checked,
    fill,
    map_pages,
    page_content,
    wrong_pages,
)
from tests.programs.cases.shared_memory import (
    IPC_CREAT,
    IPC_RMID,
    IPC_STAT,
    SHM_DEST,
    SHM_RDONLY,
    SYS_SHMAT,
    SYS_SHMCTL,
    SYS_SHMDT,
    SYS_SHMGET,
    again,
)
from tests.programs.cases.trees import Child, Line, wait_for

SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 0, 1


def put(address: int, seed: int) -> None:
    """Write a page."""
    ctypes.memmove(address, page_content(seed), PAGE)


def seen(address: int, seeds: dict[int, int]) -> str | None:
    """What a process finds wrong with pages that should hold these seeds; a seed of 0 is a page of zeros."""
    return wrong_pages(address, {page: page_content(seed) if seed else bytes(PAGE) for page, seed in seeds.items()})


class InheritedAnonymous(Case):
    """Shared anonymous memory of three generations: one has a part of it elsewhere, one only reads it."""

    PAGES = 48

    def setup(self) -> None:
        """Each writes a third before the move."""
        self.address = map_pages(self.PAGES, flags=MAP_SHARED | MAP_ANONYMOUS)
        self.expected = dict.fromkeys(range(self.PAGES), 0)
        for page in range(0, self.PAGES, 4):
            self._write(page, 100 + page)

        def grandchild(line: Line) -> None:
            put(self.address + 2 * PAGE, 300)
            checked(libc.mprotect(self.address, self.PAGES * PAGE, PROT_READ), "mprotect")
            line.say("there")
            line.wait()
            line.say(seen(self.address, self.expected | {2: 300, 1: 201, 40: 400, 41: 401}))
            line.wait()

        def child(line: Line) -> None:
            moved = again(self.address, self.PAGES)
            checked(libc.munmap(self.address, self.PAGES * PAGE), "munmap")
            put(moved + PAGE, 201)
            line.say("there")
            line.wait()
            found = seen(moved, self.expected | {2: 300, 1: 201, 40: 400})
            put(moved + 41 * PAGE, 401)
            line.say(found)
            line.wait()

        self.child, self.grandchild = Child(child), Child(lambda line: self._fork(line, grandchild))
        self.child.hear()
        self.grandchild.hear()

    @staticmethod
    def _fork(line: Line, grandchild: object) -> None:
        assert callable(grandchild)
        if not (pid := os.fork()):
            grandchild(line)
            os._exit(0)
        os.waitpid(pid, 0)

    def _write(self, page: int, seed: int) -> None:
        put(self.address + page * PAGE, seed)
        self.expected[page] = seed

    def verify(self) -> str | None:
        """Each sees what all have written, before the move and after it."""
        put(self.address + 40 * PAGE, 400)
        self.child.say("look")
        of_child = self.child.hear()
        self.grandchild.say("look")
        return first_problem(
            unlike("child", None, of_child),
            unlike("grandchild", None, self.grandchild.hear()),
            seen(self.address, self.expected | {2: 300, 1: 201, 40: 400, 41: 401}),
            unlike("end of the child", 0, self.child.end()),
            unlike("end of the other", 0, self.grandchild.end()),
        )


class WaitInSharedMemory(Case):
    """A child that waits in shared memory (futex(2)) for what its parent does after the move."""

    def setup(self) -> None:
        """It waits."""
        self.address = map_pages(1, flags=MAP_SHARED | MAP_ANONYMOUS)

        def child(line: Line) -> None:
            word = ctypes.c_uint32.from_address(self.address)
            while not word.value:
                syscall(SYS_FUTEX, self.address, FUTEX_WAIT, 0, 0)
            line.say(word.value)
            line.wait()

        self.child = Child(child)
        in_futex = Path(f"/proc/{self.child.pid}/syscall")
        assert wait_for(lambda: in_futex.read_text().startswith(f"{SYS_FUTEX} "))

    def verify(self) -> str | None:
        """Wake it."""
        ctypes.c_uint32.from_address(self.address).value = 77
        woken = syscall(SYS_FUTEX, self.address, FUTEX_WAKE, 1)
        return first_problem(unlike("heard", 77, self.child.hear()), unlike("woken", 1, woken))


class InheritedMemfd(Case):
    """A memfd that a child has a descriptor of, and another child mappings alone, shared and private; their parent
    has neither."""

    PAGES = 16

    def setup(self) -> None:
        """Children first, then the parent lets go of it."""
        fd = os.memfd_create("handed down", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, self.PAGES * PAGE)
        os.pwrite(fd, page_content(500), 3 * PAGE)
        os.lseek(fd, 777, os.SEEK_SET)

        def holder(line: Line) -> None:
            os.pwrite(fd, page_content(501), 4 * PAGE)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
            line.say("there")
            line.wait()
            found = os.lseek(fd, 0, os.SEEK_CUR), fcntl.fcntl(fd, fcntl.F_GET_SEALS), os.fstat(fd).st_size
            os.pwrite(fd, page_content(510), 5 * PAGE)
            line.say([*found, os.pread(fd, PAGE, 3 * PAGE) == page_content(502)])
            line.wait()

        def mapper(line: Line) -> None:
            shared = map_pages(self.PAGES, flags=MAP_SHARED, fd=fd)
            private = map_pages(self.PAGES, flags=MAP_PRIVATE, fd=fd)
            put(private + 6 * PAGE, 503)
            os.close(fd)
            put(shared + 3 * PAGE, 502)
            line.say("there")
            line.wait()
            found = seen(shared, {3: 502, 4: 501, 5: 510, 6: 0}), seen(private, {3: 502, 4: 501, 5: 510, 6: 503})
            line.say(list(found))
            line.wait()

        self.holder, self.mapper = Child(holder, fd), Child(mapper, fd)
        self.holder.hear()
        self.mapper.hear()
        os.close(fd)

    def verify(self) -> str | None:
        """Both see what both write."""
        self.holder.say("look")
        of_holder = self.holder.hear()
        self.mapper.say("look")
        return first_problem(
            unlike("by the descriptor", [777, fcntl.F_SEAL_GROW, self.PAGES * PAGE, True], of_holder),
            unlike("by the mappings", [None, None], self.mapper.hear()),
        )


class OneOffset(Case):
    """A memfd whose one open file description parent and child have, and which the child has opened once more."""

    def setup(self) -> None:
        """The child reads by both."""
        self.fd = fd = os.memfd_create("one offset")
        os.write(fd, bytes(range(200)))
        os.lseek(fd, 10, os.SEEK_SET)

        def child(line: Line) -> None:
            other = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            os.lseek(other, 100, os.SEEK_SET)
            line.say("there")
            line.wait()
            line.say([list(os.read(fd, 2)), list(os.read(other, 2))])
            line.wait()

        self.child = Child(child, fd)
        self.child.hear()

    def verify(self) -> str | None:
        """One goes on where the other stopped."""
        first = list(os.read(self.fd, 2))
        self.child.say("read")
        return first_problem(
            unlike("parent, then child", [[10, 11], [12, 13], [100, 101]], [first, *self.child.hear()]),
            unlike("parent again", [14, 15], list(os.read(self.fd, 2))),
        )


class SegmentOfTwo(Case):
    """System V segments: one that parent and child are attached to at different addresses, removed since; one that
    only the child is attached to."""

    PAGES = 8

    def setup(self) -> None:
        """The child reads one through an attachment of its own."""
        self.id = required(syscall(SYS_SHMGET, 0, self.PAGES * PAGE, IPC_CREAT | 0o600), "shmget")
        self.address = required(syscall(SYS_SHMAT, self.id, 0, 0), "shmat")
        fill(self.address, self.PAGES - 1, 600)

        def child(line: Line) -> None:
            reading = required(syscall(SYS_SHMAT, self.id, 0, SHM_RDONLY), "shmat")
            required(syscall(SYS_SHMDT, self.address), "shmdt")
            own = required(syscall(SYS_SHMGET, 0, PAGE, IPC_CREAT | 0o600), "shmget")
            mine = required(syscall(SYS_SHMAT, own, 0, 0), "shmat")
            put(mine, 650)
            line.say("there")
            line.wait()
            expected = {page: 600 + page for page in range(1, self.PAGES - 1)} | {0: 660, self.PAGES - 1: 0}
            line.say([seen(reading, expected), seen(mine, {0: 650}), syscall(SYS_SHMCTL, own, IPC_RMID, 0)])
            line.wait()
            required(syscall(SYS_SHMDT, reading), "shmdt")

        self.child = Child(child)
        self.child.hear()
        required(syscall(SYS_SHMCTL, self.id, IPC_RMID, 0), "shmctl")

    def verify(self) -> str | None:
        """The child sees what is written now, and its end leaves us the segment, as removed as it was."""
        put(self.address, 660)
        self.child.say("look")
        told = self.child.hear()
        ended = self.child.end()
        buffer = ctypes.create_string_buffer(112)
        required(syscall(SYS_SHMCTL, self.id, IPC_STAT, ctypes.addressof(buffer)), "shmctl")
        return first_problem(
            unlike("of the child", [None, None, 0], told),
            unlike("end of the child", 0, ended),
            unlike("mode", 0o600 | SHM_DEST, struct.unpack_from("=I", buffer, 20)[0] & (0o777 | SHM_DEST)),
            seen(self.address, {0: 660, 1: 601}),
        )


class DeletedFileOfTwo(Case):
    """A file without a name that parent and child have mapped, each another part too."""

    PAGES = 8

    def setup(self) -> None:
        """Map, fork, delete."""
        path = self.directory / "deleted-of-two"
        path.write_bytes(b"".join(page_content(700 + page) for page in range(self.PAGES)))
        with open(path, "r+b") as file:
            self.address = map_pages(self.PAGES, flags=MAP_SHARED, fd=file.fileno())
            private = map_pages(2, flags=MAP_PRIVATE, fd=file.fileno(), offset=6 * PAGE)
        put(private, 750)

        def child(line: Line) -> None:
            put(private + PAGE, 751)
            line.say("there")
            line.wait()
            put(self.address + 7 * PAGE, 761)
            line.say([seen(self.address, {0: 700, 1: 760}), seen(private, {0: 750, 1: 751})])
            line.wait()

        self.child = Child(child)
        self.child.hear()
        path.unlink()
        self.private = private

    def verify(self) -> str | None:
        """What was copied is each one's own, the rest is both's."""
        put(self.address + PAGE, 760)
        self.child.say("look")
        return first_problem(
            unlike("of the child", [None, None], self.child.hear()),
            seen(self.address, {0: 700, 7: 761}),
            seen(self.private, {0: 750, 1: 761}),
        )


class OpenAndMapped(Case):
    """A file without a name that the parent has mapped, and one child open, and another child both."""

    def setup(self) -> None:
        """Three ways to one file."""
        path = self.directory / "open-and-mapped"
        path.write_bytes(bytes(2 * PAGE))
        with open(path, "r+b") as file:
            self.address = map_pages(2, flags=MAP_SHARED, fd=file.fileno())
            fd = os.dup(file.fileno())
        path.unlink()

        def opener(line: Line) -> None:
            checked(libc.munmap(self.address, 2 * PAGE), "munmap")
            os.lseek(fd, 5, os.SEEK_SET)
            line.say("there")
            line.wait()
            line.say([os.lseek(fd, 0, os.SEEK_CUR), os.pwrite(fd, page_content(801), PAGE)])
            line.wait()

        def both(line: Line) -> None:
            line.say("there")
            line.wait()
            line.say([seen(self.address, {0: 800, 1: 801}), os.pread(fd, PAGE, 0) == page_content(800)])
            line.wait()

        self.children = Child(opener, fd), Child(both, fd)
        for child in self.children:
            child.hear()
        os.close(fd)

    def verify(self) -> str | None:
        """They still lead to one."""
        put(self.address, 800)
        heard = []
        for child in self.children:
            child.say("look")
            heard.append(child.hear())
        return first_problem(
            unlike("by the descriptor", [5, PAGE], heard[0]),
            unlike("by both", [None, True], heard[1]),
            seen(self.address, {0: 800, 1: 801}),
        )


class NamedMemory(Case):
    """POSIX shared memory (shm_open(3)): a file on tmpfs, which both hosts have."""

    def setup(self) -> None:
        """Mapped by both, with a name."""
        self.path = Path(f"/dev/shm/postcopy-{os.getpid()}-{self.directory.name}")
        self.path.write_bytes(bytes(2 * PAGE))
        with open(self.path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), 2 * PAGE)

        def child(line: Line) -> None:
            self.memory[0] = 1
            line.say("there")
            line.wait()
            self.memory[1] = self.memory[PAGE]
            line.say("done")
            line.wait()

        self.child = Child(child)
        self.child.hear()

    def verify(self) -> str | None:
        """Both see what both write."""
        self.memory[PAGE] = 9
        self.child.say("look")
        self.child.hear()
        self.path.unlink()
        return unlike("memory", [1, 9], list(self.memory[:2]))


class Multiprocessing(Case):
    """What multiprocessing makes of files on tmpfs without a name: locks and conditions, mapped; values, open too."""

    def setup(self) -> None:
        """A child that waits for a lock that we hold, and one that waits for a condition."""
        context = multiprocessing.get_context("fork")
        self.lock, self.condition, self.value = context.Lock(), context.Condition(), context.Value("i", 5)
        self.lock.acquire()
        self.children = Child(self._get_lock), Child(self._await_condition)
        for child in self.children:
            child.hear()

    def _get_lock(self, line: Line) -> None:
        line.say("there")
        with self.lock, self.value.get_lock():
            self.value.value += 1
            line.say("has the lock")
        line.wait()

    def _await_condition(self, line: Line) -> None:
        with self.condition:
            line.say("there")
            self.condition.wait_for(lambda: self.value.value > 10)
        line.say(self.value.value)
        line.wait()

    def verify(self) -> str | None:
        """Both get what they wait for."""
        waits = not self.lock.acquire(block=False)
        self.lock.release()
        heard = self.children[0].hear()
        with self.condition:
            self.value.value += 10
            self.condition.notify_all()
        return first_problem(
            unlike("heard", "has the lock", heard),
            unlike("lock is held", True, waits),
            unlike("value", 16, self.children[1].hear()),
        )


CASES: tuple[type[Case], ...] = (
    InheritedAnonymous,
    WaitInSharedMemory,
    InheritedMemfd,
    OneOffset,
    SegmentOfTwo,
    DeletedFileOfTwo,
    OpenAndMapped,
    NamedMemory,
    Multiprocessing,
)
