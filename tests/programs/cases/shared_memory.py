"""Memory with an identity: shared anonymous mappings, memfds, System V segments, mappings of files without a name."""

import ctypes
import errno
import fcntl
import os
import struct
from typing import ClassVar

from tests.programs.cases import Case, Unsupported, first_problem, libc, required, syscall, unlike
from tests.programs.cases.memory import (
    FAILED,
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    checked,
    fill,
    map_pages,
    mapping_at,
    page_content,
    wrong_pages,
)

SYS_MREMAP, SYS_SHMGET, SYS_SHMAT, SYS_SHMCTL, SYS_SHMDT = 25, 29, 30, 31, 67
MREMAP_MAYMOVE = 1
MAP_HUGETLB = 0x40000
SHM_HUGETLB = 0o4000
IPC_RMID, IPC_STAT, IPC_CREAT, IPC_EXCL = 0, 2, 0o1000, 0o2000
SHM_RDONLY, SHM_DEST = 0o10000, 0o1000


def again(address: int, pages: int) -> int:
    """A second mapping of shared memory: what mremap(2) makes of an old size of 0."""
    return required(syscall(SYS_MREMAP, address, 0, pages * PAGE, MREMAP_MAYMOVE), "mremap of 0 bytes")


def shown(address: int) -> tuple[str, str, int]:
    """Name, permissions and offset of a mapping."""
    found = mapping_at(address)
    assert found
    return found.name.rpartition(":")[2], found.permissions, found.offset


def not_shared(one: int, other: int, seed: int) -> str | None:
    """What is written at ``one`` must show at ``other``, and the other way round."""
    ctypes.memmove(one, page_content(seed), PAGE)
    there = ctypes.string_at(other, PAGE) == page_content(seed)
    ctypes.memmove(other, page_content(seed + 1), PAGE)
    back = ctypes.string_at(one, PAGE) == page_content(seed + 1)
    return None if there and back else f"{one:#x} and {other:#x} are no longer the same memory"


class SharedAnonymous(Case):
    """Shared anonymous memory mapped twice, with holes, of which a part is read-only and a part unmapped."""

    PAGES = 64

    def setup(self) -> None:
        """Every third page is written."""
        self.address = map_pages(self.PAGES, flags=MAP_SHARED | MAP_ANONYMOUS)
        self.expected = {page: bytes(PAGE) for page in range(self.PAGES)}
        for page in range(0, self.PAGES, 3):
            ctypes.memmove(self.address + page * PAGE, page_content(3000 + page), PAGE)
            self.expected[page] = page_content(3000 + page)
        self.second = again(self.address, self.PAGES)
        checked(libc.mprotect(self.address + 40 * PAGE, 8 * PAGE, PROT_READ), "mprotect")
        checked(libc.munmap(self.address + 48 * PAGE, 4 * PAGE), "munmap")
        self.before = [shown(self.address + page * PAGE) for page in (0, 40, 52)]

    def verify(self) -> str | None:
        """Layout and content; and that both mappings, and a child, still see the same."""
        if problem := first_problem(
            unlike("mappings", self.before, [shown(self.address + page * PAGE) for page in (0, 40, 52)]),
            wrong_pages(self.second, self.expected),
            not_shared(self.address, self.second, 3100),
        ):
            return problem
        if not (child := os.fork()):
            ctypes.memmove(self.second + PAGE, page_content(3200), PAGE)
            os._exit(0)
        os.waitpid(child, 0)
        return wrong_pages(self.address, {1: page_content(3200)})


class SharedReserve(Case):
    """A shared reserve of 64 GiB that nothing is accounted for, with a few pages in it."""

    PAGES = 16 << 20

    def setup(self) -> None:
        """Three pages, far apart."""
        self.address = map_pages(self.PAGES, flags=MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE)
        self.expected = {page: page_content(page) for page in (0, 7 << 20, self.PAGES - 1)}
        for page, content in self.expected.items():
            ctypes.memmove(self.address + page * PAGE, content, PAGE)

    def verify(self) -> str | None:
        """The pages, and zeros between them."""
        return wrong_pages(self.address, {**self.expected, 5: bytes(PAGE)})


class HugePages(Case):
    """Private and shared hugetlb memory, in part written, of which a page each is read-only."""

    PAGES = 3
    SIZE = 2 << 20

    def setup(self) -> None:
        """A private mapping and a shared one."""
        flags = MAP_ANONYMOUS | MAP_HUGETLB | 21 << 26
        # At addresses of the kernel's choice, which fit.
        self.private, self.shared = (
            libc.mmap(None, self.PAGES * self.SIZE, PROT_READ | PROT_WRITE, kind | flags, -1, 0)
            for kind in (MAP_PRIVATE, MAP_SHARED)
        )
        if FAILED in (self.private, self.shared):
            raise Unsupported("no hugetlb pages can be had")
        self.written = {page: 8000 + page for page in (0, 1, 511, 700)}
        for page, seed in self.written.items():
            ctypes.memmove(self.private + page * PAGE, page_content(seed), PAGE)
            ctypes.memmove(self.shared + page * PAGE, page_content(seed + 1000), PAGE)
        for address in (self.private, self.shared):
            checked(libc.mprotect(address + self.SIZE, self.SIZE, PROT_READ), "mprotect")
        self.before = self.take()

    def take(self) -> list[object]:
        """The layout."""
        # Each piece of a private one is mapped anew, and its offset means nothing.
        private = [shown(self.private + page * self.SIZE)[:2] for page in range(2)]
        return [*private, *(shown(self.shared + page * self.SIZE) for page in range(2))]

    def verify(self) -> str | None:
        """Layout, content, zeros where nothing was written; what a child writes to the shared one shows."""
        zeros = {page: bytes(PAGE) for page in (5, 600, 1100)}
        if problem := first_problem(
            unlike("mappings", self.before, self.take()),
            wrong_pages(self.private, zeros | {page: page_content(seed) for page, seed in self.written.items()}),
            wrong_pages(self.shared, zeros | {page: page_content(seed + 1000) for page, seed in self.written.items()}),
        ):
            return problem
        if not (child := os.fork()):
            ctypes.memmove(self.shared + PAGE, page_content(8500), PAGE)
            os._exit(0)
        os.waitpid(child, 0)
        return wrong_pages(self.shared, {1: page_content(8500)})


class HugeFiles(Case):
    """A memfd and a System V segment of hugetlb pages; a child has both too. The first has a hole, and a descriptor."""

    PAGES = 3
    SIZE = 2 << 20

    def setup(self) -> None:
        """The memfd is mapped twice, the segment is no multiple of its pages, and removed."""
        self.fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | 21 << os.MFD_HUGE_SHIFT)
        os.ftruncate(self.fd, self.PAGES * self.SIZE)
        os.fchmod(self.fd, 0o640)
        flags = PROT_READ | PROT_WRITE, MAP_SHARED, self.fd
        self.mapped = libc.mmap(None, self.PAGES * self.SIZE, *flags, 0)
        self.again = libc.mmap(None, self.SIZE, *flags, 2 * self.SIZE)
        if FAILED in (self.mapped, self.again):
            raise Unsupported("no hugetlb pages can be had")
        self.identifier = syscall(SYS_SHMGET, 0, self.SIZE - 5000, IPC_CREAT | SHM_HUGETLB | 21 << 26 | 0o600)
        if self.identifier < 0:
            raise Unsupported("no hugetlb pages can be had")
        self.attached = required(syscall(SYS_SHMAT, self.identifier, 0, 0), "shmat")
        required(syscall(SYS_SHMCTL, self.identifier, IPC_RMID, 0), "IPC_RMID")
        self.written = {page: 8000 + page for page in (0, 1, 511, 1030)}
        for page, seed in self.written.items():
            ctypes.memmove(self.mapped + page * PAGE, page_content(seed), PAGE)
            ctypes.memmove(self.attached + page % 500 * PAGE, page_content(seed + 1000), PAGE)
        self.before = self.take()

    def take(self) -> list[object]:
        """Layout, sizes, link and mode, and how many pages there are (in 512 bytes)."""
        status = os.fstat(self.fd)
        buffer = ctypes.create_string_buffer(112)
        required(syscall(SYS_SHMCTL, self.identifier, IPC_STAT, ctypes.addressof(buffer)), "IPC_STAT")
        return [
            *(shown(address) for address in (self.mapped, self.again, self.attached)),
            *(status.st_size, status.st_mode, status.st_blocks, os.readlink(f"/proc/self/fd/{self.fd}")),
            int.from_bytes(buffer.raw[48:56], "little"),
        ]

    def verify(self) -> str | None:
        """All of it, zeros where nothing was written; all ways lead to the same memory, those of a child too."""
        pages = {page: page_content(seed) for page, seed in self.written.items()}
        segment = {page % 500: page_content(seed + 1000) for page, seed in self.written.items()}
        if problem := first_problem(
            unlike("hugetlb files", self.before, self.take()),
            wrong_pages(self.mapped, pages | {page: bytes(PAGE) for page in (5, 1100)}),
            wrong_pages(self.attached, segment | {300: bytes(PAGE)}),
            not_shared(self.mapped + 2 * self.SIZE + 9 * PAGE, self.again + 9 * PAGE, 8600),
        ):
            return problem
        if not (child := os.fork()):
            ctypes.memmove(self.mapped + 2 * PAGE, page_content(8500), PAGE)
            ctypes.memmove(self.attached + 2 * PAGE, page_content(8501), PAGE)
            os._exit(0)
        os.waitpid(child, 0)
        return first_problem(
            wrong_pages(self.mapped, {2: page_content(8500)}),
            wrong_pages(self.attached, {2: page_content(8501)}),
            unlike("read(2)", page_content(8500), os.pread(self.fd, PAGE, 2 * PAGE)),
        )


class Memfd(Case):
    """A memfd with two descriptions, mapped shared twice and private once; its size is no multiple of a page."""

    PAGES = 32
    SIZE = PAGES * PAGE - 1000

    def setup(self) -> None:
        """Content by write and by mapping."""
        self.fd = os.memfd_create("moved memory", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.SIZE)
        os.fchmod(self.fd, 0o640)
        for page in range(0, self.PAGES - 1, 2):
            os.pwrite(self.fd, page_content(4000 + page), page * PAGE)
        os.pwrite(self.fd, b"the end", self.SIZE - 7)
        os.lseek(self.fd, 12345, os.SEEK_SET)
        self.reader = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY)
        self.address = map_pages(self.PAGES, flags=MAP_SHARED, fd=self.fd)
        self.second = map_pages(self.PAGES - 4, prot=PROT_READ, flags=MAP_SHARED, fd=self.reader, offset=4 * PAGE)
        self.private = map_pages(4, flags=MAP_PRIVATE, fd=self.fd)
        ctypes.memmove(self.private + PAGE, page_content(4500), PAGE)
        self.expected = {page: page_content(4000 + page) if page % 2 == 0 else bytes(PAGE) for page in range(20)}
        self.before = self.take()

    def take(self) -> dict[str, object]:
        """Everything that shows of it."""
        status = os.fstat(self.fd)
        return {
            "size": status.st_size,
            "mode": status.st_mode,
            "link": os.readlink(f"/proc/self/fd/{self.fd}"),
            "position": os.lseek(self.fd, 0, os.SEEK_CUR),
            "seals": fcntl.fcntl(self.fd, fcntl.F_GET_SEALS),
            "flags": [fcntl.fcntl(fd, fcntl.F_GETFL) for fd in (self.fd, self.reader)],
            "close on exec": [os.get_inheritable(fd) for fd in (self.fd, self.reader)],
            "mappings": [shown(address) for address in (self.address, self.second, self.private)],
            "same": os.path.sameopenfile(self.fd, self.reader),
        }

    def verify(self) -> str | None:
        """Content by each way, and that they are one."""
        if problem := unlike("memfd", self.before, self.take()):
            return problem
        private = {page: self.expected[page] for page in (0, 2, 3)} | {1: page_content(4500)}
        if problem := first_problem(
            wrong_pages(self.address, self.expected),
            wrong_pages(self.private, private),
            unlike("the end", b"the end", os.pread(self.reader, 100, self.SIZE - 7)),
            None if libc.mprotect(self.second, PAGE, PROT_READ | PROT_WRITE) else "a read-only mapping became writable",
        ):
            return problem
        os.pwrite(self.fd, page_content(4600), 6 * PAGE)
        return first_problem(
            wrong_pages(self.address, {6: page_content(4600)}),
            wrong_pages(self.second, {2: page_content(4600)}),
            unlike("through the other descriptor", page_content(4600), os.pread(self.reader, PAGE, 6 * PAGE)),
        )


class SealedMemfds(Case):
    """Memfds that are sealed against everything, against future writers only, and against more seals."""

    def setup(self) -> None:
        """One of each."""
        self.fds: dict[str, int] = {}
        kinds = {
            "closed": fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
            "future": 0x10 | fcntl.F_SEAL_GROW,
            "unsealable": 0,
        }
        for name, seals in kinds.items():
            fd = self.fds[name] = os.memfd_create(name, os.MFD_ALLOW_SEALING if seals else 0)
            os.write(fd, page_content(len(name)))
            if name == "future":
                self.address = map_pages(1, flags=MAP_SHARED, fd=fd)
            if seals:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        self.readable = map_pages(1, prot=PROT_READ, flags=MAP_SHARED, fd=self.fds["closed"])
        self.before = self.take()

    def take(self) -> dict[str, int]:
        """The seals."""
        return {name: fcntl.fcntl(fd, fcntl.F_GET_SEALS) for name, fd in self.fds.items()}

    def verify(self) -> str | None:
        """The same seals; and they hold, but for the mapping that was there before."""
        ctypes.memset(self.address, 0x41, 1)
        try:
            os.pwrite(self.fds["closed"], b"x", 0)
            return "a sealed memfd was written to"
        except OSError as error:
            refusal = error.errno
        return first_problem(
            unlike("seals", self.before, self.take()),
            unlike("errno", errno.EPERM, refusal),
            unlike("content", page_content(6), os.pread(self.fds["closed"], PAGE, 0)),
            wrong_pages(self.readable, {0: page_content(6)}),
            unlike("written through the mapping", b"A", os.pread(self.fds["future"], 1, 0)),
        )


class MemfdWithoutDescriptor(Case):
    """A memfd whose descriptors are closed: two mappings are all that is left of it."""

    PAGES = 48

    def setup(self) -> None:
        """Map twice, close."""
        fd = os.memfd_create("closed memory")
        os.ftruncate(fd, self.PAGES * PAGE)
        self.address = map_pages(self.PAGES, flags=MAP_SHARED, fd=fd)
        self.second = map_pages(self.PAGES // 2, flags=MAP_SHARED, fd=fd, offset=self.PAGES // 2 * PAGE)
        os.close(fd)
        fill(self.address, self.PAGES, 5000)
        self.before = shown(self.address), shown(self.second)

    def verify(self) -> str | None:
        """Content, and sharing."""
        return first_problem(
            unlike("mappings", self.before, (shown(self.address), shown(self.second))),
            wrong_pages(self.address, {page: page_content(5000 + page) for page in range(self.PAGES)}),
            not_shared(self.address + self.PAGES // 2 * PAGE, self.second, 5100),
        )


class SysvSegments(Case):
    """Three System V segments: with a key, attached twice, once for reading; removed; and partly unmapped."""

    KEY: ClassVar = 0x4D0F0001
    PAGES = 8

    def setup(self) -> None:
        """Make, attach, fill."""
        flags = IPC_CREAT | IPC_EXCL | 0o640
        self.ids = [
            required(syscall(SYS_SHMGET, key, self.PAGES * PAGE - 100, flags), "shmget") for key in (self.KEY, 0, 0)
        ]
        self.addresses = [required(syscall(SYS_SHMAT, number, 0, 0), "shmat") for number in self.ids]
        self.reading = required(syscall(SYS_SHMAT, self.ids[0], 0, SHM_RDONLY), "shmat")
        for number, address in enumerate(self.addresses):
            fill(address, self.PAGES - 2, 6000 + 100 * number)
        required(syscall(SYS_SHMCTL, self.ids[1], IPC_RMID, 0), "shmctl")
        checked(libc.munmap(self.addresses[2] + 2 * PAGE, 2 * PAGE), "munmap")
        self.before = self.take()

    def take(self) -> list[object]:
        """Key, owner, mode, size and attachments of each; and the mappings."""
        found: list[object] = []
        for number in self.ids:
            buffer = ctypes.create_string_buffer(112)
            required(syscall(SYS_SHMCTL, number, IPC_STAT, ctypes.addressof(buffer)), "shmctl")
            key, uid, gid, _, _, mode = struct.unpack_from("=iIIIII", buffer)
            size, attachments = (struct.unpack_from("=Q", buffer, place)[0] for place in (48, 88))
            found.append((key, uid, gid, oct(mode), size, attachments))
        return [*found, *(shown(address) for address in (*self.addresses, self.reading))]

    def verify(self) -> str | None:
        """Everything as before; and they can be detached, which ends the removed one."""
        if problem := unlike("segments", self.before, self.take()):
            return problem
        for number, address in enumerate(self.addresses):
            pages = [page for page in range(self.PAGES - 2) if number != 2 or page not in (2, 3)]
            content = {page: page_content(6000 + 100 * number + page) for page in pages}
            content[self.PAGES - 1] = bytes(PAGE)
            if problem := wrong_pages(address, content):
                return f"segment {number}: {problem}"
        ctypes.memset(self.addresses[0], 0x42, 1)
        if ctypes.string_at(self.reading, 1) != b"B":
            return "the two attachments are no longer one"
        if found := required(syscall(SYS_SHMGET, self.KEY, 0, 0), "shmget") != self.ids[0]:
            return f"by its key, the segment is {found}"
        for address in (*self.addresses, self.reading):
            required(syscall(SYS_SHMDT, address), "shmdt")
        buffer = ctypes.create_string_buffer(112)
        gone = syscall(SYS_SHMCTL, self.ids[1], IPC_STAT, ctypes.addressof(buffer))
        for number in (self.ids[0], self.ids[2]):
            required(syscall(SYS_SHMCTL, number, IPC_RMID, 0), "shmctl")
        return None if gone == -errno.EINVAL else f"the removed segment is still there ({gone})"


class DeletedFiles(Case):
    """Mappings of files without a name: private, with copied pages; shared and written."""

    PAGES = 8

    def setup(self) -> None:
        """Map, delete."""
        path = self.directory / "deleted"
        path.write_bytes(b"".join(page_content(7000 + page) for page in range(self.PAGES)))
        with open(path, "r+b") as file:
            self.private = map_pages(self.PAGES - 2, flags=MAP_PRIVATE, fd=file.fileno(), offset=2 * PAGE)
            self.guarded = map_pages(2, prot=PROT_NONE, flags=MAP_PRIVATE, fd=file.fileno())
            self.shared = map_pages(self.PAGES, flags=MAP_SHARED, fd=file.fileno())
        path.unlink()
        ctypes.memmove(self.shared, page_content(7200), PAGE)
        ctypes.memmove(self.private + PAGE, page_content(7100), PAGE)

    def verify(self) -> str | None:
        """The content of the file, and of the page that was copied."""
        expected = {page: page_content(7002 + page) for page in range(self.PAGES - 2)} | {1: page_content(7100)}
        libc.mprotect(self.guarded, 2 * PAGE, PROT_READ)
        return first_problem(
            wrong_pages(self.private, expected),
            wrong_pages(self.guarded, {0: page_content(7200), 1: page_content(7001)}),
            wrong_pages(self.shared, {0: page_content(7200), 7: page_content(7007)}),
        )
