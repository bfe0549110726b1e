"""Mappings: protections, advice, files mapped privately and shared, the heap's end, the stack."""

import ctypes
import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from tests.programs.cases import Case, Snapshot, Unsupported, first_problem, libc, syscall, unlike

PAGE = mmap.PAGESIZE
SYS_BRK = 12
PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 0x01, 0x02, 0x20
MAP_GROWSDOWN, MAP_LOCKED, MAP_NORESERVE = 0x0100, 0x2000, 0x4000
MLOCK_ONFAULT = 1
FAILED = ctypes.c_void_p(-1).value

libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for function in (libc.mprotect, libc.madvise, libc.mlock2):
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Mapping(NamedTuple):
    """One line of /proc/self/maps, with its VmFlags."""

    start: int
    end: int
    permissions: str
    offset: int
    name: str
    flags: frozenset[str]


#: Set by the kernel or the tool for a while: soft-dirty, and userfaultfd's missing, write-protect and minor modes.
TRANSIENT_FLAGS = {"sd", "um", "uw", "ui"}


def mappings() -> Iterator[Mapping]:
    """Every mapping of the process."""
    head = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) \S+ \d+ *(.*)")
    with open("/proc/self/smaps") as smaps:
        match = None
        for line in smaps:
            if line.startswith("VmFlags:") and match:
                start, end, permissions, offset, name = match.groups()
                flags = frozenset(line.split()[1:]) - TRANSIENT_FLAGS
                yield Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), name, flags)
            else:
                match = head.match(line) or match


def mapping_at(address: int) -> Mapping | None:
    """The mapping that holds ``address``."""
    return next((mapping for mapping in mappings() if mapping.start <= address < mapping.end), None)


def map_pages(
    pages: int,
    *,
    prot: int = PROT_READ | PROT_WRITE,
    flags: int = MAP_PRIVATE | MAP_ANONYMOUS,
    fd: int = -1,
    offset: int = 0,
) -> int:
    """mmap(2) with a hole on each side, so that the kernel merges the mapping with no other."""
    hole: int = libc.mmap(None, (pages + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
    libc.munmap(hole, (pages + 2) * PAGE)
    address: int = libc.mmap(hole + PAGE, pages * PAGE, prot, flags | 0x100000, fd, offset)  # MAP_FIXED_NOREPLACE
    if address == FAILED:
        raise OSError(ctypes.get_errno(), f"mmap with flags {flags:#x}: {os.strerror(ctypes.get_errno())}")
    return address


def checked(result: int, what: str) -> None:
    """Unsupported when a memory call fails in setup."""
    if result:
        raise Unsupported(f"{what}: {os.strerror(ctypes.get_errno())}")


def page_content(seed: int) -> bytes:
    """What page number ``seed`` holds: another content for each."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(PAGE)


def fill(address: int, pages: int, seed: int) -> None:
    """Write the content of each page."""
    for page in range(pages):
        ctypes.memmove(address + page * PAGE, page_content(seed + page), PAGE)


def wrong_pages(address: int, expected: dict[int, bytes]) -> str | None:
    """The pages (by number) that hold something else."""
    wrong = [page for page, content in expected.items() if ctypes.string_at(address + page * PAGE, PAGE) != content]
    return f"{len(wrong)} of {len(expected)} pages differ, first {wrong[0]}" if wrong else None


class Protections(Case):
    """Private anonymous memory with every protection, PROT_NONE with its content among them."""

    ALL: ClassVar = {
        "---p": PROT_NONE,
        "r--p": PROT_READ,
        "-w-p": PROT_WRITE,
        "--xp": PROT_EXEC,
        "rw-p": PROT_READ | PROT_WRITE,
        "r-xp": PROT_READ | PROT_EXEC,
        "rwxp": PROT_READ | PROT_WRITE | PROT_EXEC,
    }
    PAGES = 5

    def setup(self) -> None:
        """Fill while writable, then protect."""
        self.places: dict[str, int] = {}
        for seed, (shown, prot) in enumerate(self.ALL.items()):
            address = map_pages(self.PAGES)
            fill(address, self.PAGES, seed * 100)
            checked(libc.mprotect(address, self.PAGES * PAGE, prot), f"mprotect {shown}")
            self.places[shown] = address

    def verify(self) -> str | None:
        """Protection first, then content."""
        for seed, (shown, address) in enumerate(self.places.items()):
            found = mapping_at(address)
            if problem := unlike(f"permissions of {address:#x}", shown, found and found.permissions):
                return problem
            libc.mprotect(address, self.PAGES * PAGE, PROT_READ)
            expected = {page: page_content(seed * 100 + page) for page in range(self.PAGES)}
            if problem := wrong_pages(address, expected):
                return f"{shown}: {problem}"
        return None


class AnonymousMemory(Case):
    """32 MiB with pages that were written, never touched, only read, and dropped again."""

    PAGES = 32 * 256

    def setup(self) -> None:
        """Of eight pages, five are written; one of these is dropped, one is only read, two are never touched."""
        self.address = map_pages(self.PAGES)
        self.expected: dict[int, bytes] = {}
        for page in range(self.PAGES):
            where = self.address + page * PAGE
            if page % 8 < 5:
                ctypes.memmove(where, page_content(page), PAGE)
            elif page % 8 == 5:
                ctypes.string_at(where, 1)
            self.expected[page] = page_content(page) if page % 8 < 4 else bytes(PAGE)
        for page in range(4, self.PAGES, 8):
            checked(libc.madvise(self.address + page * PAGE, PAGE, mmap.MADV_DONTNEED), "MADV_DONTNEED")

    def verify(self) -> str | None:
        """Every page, from the last to the first, so that read-ahead does not hide a fault."""
        return wrong_pages(self.address, dict(reversed(self.expected.items())))


class Advice(Case):
    """Mappings with the flags that madvise(2), mlock(2) and mmap(2) leave, as VmFlags of smaps shows them."""

    MADVISE: ClassVar = {
        "sequential": mmap.MADV_SEQUENTIAL,
        "random": mmap.MADV_RANDOM,
        "dontfork": mmap.MADV_DONTFORK,
        "dontdump": mmap.MADV_DONTDUMP,
        "wipeonfork": 18,
        "hugepage": mmap.MADV_HUGEPAGE,
        "nohugepage": mmap.MADV_NOHUGEPAGE,
        "mergeable": mmap.MADV_MERGEABLE,
    }
    MMAP: ClassVar = {"growsdown": MAP_GROWSDOWN, "locked": MAP_LOCKED, "noreserve": MAP_NORESERVE}
    PAGES = 8

    def setup(self) -> None:
        """One mapping for each."""
        self.places: dict[str, tuple[int, frozenset[str]]] = {}
        for name, advice in self.MADVISE.items():
            address = map_pages(self.PAGES)
            # Without it in the kernel (huge pages, KSM) there is no flag to keep.
            if not libc.madvise(address, self.PAGES * PAGE, advice):
                self.remember(name, address)
        for name, flag in self.MMAP.items():
            self.remember(name, map_pages(self.PAGES, flags=MAP_PRIVATE | MAP_ANONYMOUS | flag))
        address = map_pages(self.PAGES)
        if not libc.mlock2(address, self.PAGES * PAGE, MLOCK_ONFAULT):
            self.remember("mlock on fault", address)

    def remember(self, name: str, address: int) -> None:
        """Fill some of the pages and note the flags."""
        fill(address, self.PAGES // 2, address)
        found = mapping_at(address)
        assert found
        self.places[name] = (address, found.flags)

    def verify(self) -> str | None:
        """Flags, then content."""
        for name, (address, flags) in self.places.items():
            found = mapping_at(address)
            kept = found.flags if found else frozenset()
            if name == "locked":
                # Locked "on fault" is as much as memory whose pages arrive later can be; by now they all have.
                kept -= {"lf"}
            if problem := unlike(f"VmFlags of {name}", sorted(flags), sorted(kept)):
                return problem
            content = {page: page_content(address + page) for page in range(self.PAGES // 2)}
            content |= {page: bytes(PAGE) for page in range(self.PAGES // 2, self.PAGES)}
            if problem := wrong_pages(address, content):
                return f"{name}: {problem}"
        return None


class GuardPages(Case):
    """Guard markers (MADV_GUARD_INSTALL) in the middle of a mapping: no access, without a mapping of their own."""

    PAGES, GUARDED = 9, range(3, 6)
    MADV_GUARD_INSTALL, SYS_WRITE = 102, 1

    def setup(self) -> None:
        """Between pages that are written."""
        self.address = map_pages(self.PAGES)
        fill(self.address, self.PAGES, 8000)
        length = len(self.GUARDED) * PAGE
        checked(libc.madvise(self.address + self.GUARDED.start * PAGE, length, self.MADV_GUARD_INSTALL), "guard pages")

    def verify(self) -> str | None:
        """The kernel can read all pages but these."""
        fd = os.memfd_create("read")
        refused = [p for p in range(self.PAGES) if syscall(self.SYS_WRITE, fd, self.address + p * PAGE, 8) < 0]
        os.close(fd)
        expected = {page: page_content(8000 + page) for page in range(self.PAGES) if page not in self.GUARDED}
        return unlike("guarded pages", list(self.GUARDED), refused) or wrong_pages(self.address, expected)


class NamedMemory(Case):
    """The name of an anonymous mapping (PR_SET_VMA_ANON_NAME)."""

    PR_SET_VMA = 0x53564D41

    def setup(self) -> None:
        """Name one."""
        self.address = map_pages(2)
        name = ctypes.create_string_buffer(b"a moved name")
        where = (ctypes.c_ulong(self.address), ctypes.c_ulong(2 * PAGE))
        checked(libc.prctl(self.PR_SET_VMA, ctypes.c_ulong(0), *where, name), "PR_SET_VMA_ANON_NAME")

    def verify(self) -> str | None:
        """As maps shows it."""
        found = mapping_at(self.address)
        return unlike("name", "[anon:a moved name]", found and found.name)


class FutureLocks(Case):
    """mlockall(2) for mappings to come, on fault."""

    MCL_FUTURE, MCL_ONFAULT = 2, 4

    def setup(self) -> None:
        """Lock them."""
        checked(libc.mlockall(self.MCL_FUTURE | self.MCL_ONFAULT), "mlockall")

    def verify(self) -> str | None:
        """A new mapping is locked."""
        found = mapping_at(map_pages(2))
        return unlike("locked", {"lo", "lf"}, found and found.flags & {"lo", "lf"})


class HugeReserve(Case):
    """Reserves of terabytes, as Go, Java and the sanitizers make them: nothing in one, pages far apart in the other."""

    TIB = 1 << 40

    def setup(self) -> None:
        """8 TiB without access, 1 TiB with."""
        reserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        self.empty = map_pages(8 * self.TIB // PAGE, prot=PROT_NONE, flags=reserve)
        self.sparse = map_pages(self.TIB // PAGE, flags=reserve)
        self.expected = {page: page_content(9000 + page) for page in (0, 12345, 200 << 20 >> 12, self.TIB // PAGE - 1)}
        for page, content in self.expected.items():
            ctypes.memmove(self.sparse + page * PAGE, content, PAGE)

    def verify(self) -> str | None:
        """Both are there."""
        found = [mapping_at(self.empty), mapping_at(self.sparse)]
        shown = [mapping and (mapping.end - mapping.start, mapping.permissions) for mapping in found]
        return first_problem(
            unlike("mappings", [(8 * self.TIB, "---p"), (self.TIB, "rw-p")], shown),
            wrong_pages(self.sparse, {**self.expected, 777: bytes(PAGE)}),
        )


class ScatteredFile(Case):
    """A private mapping of a file of which every second page is copied: more runs than a process reads itself."""

    PAGES = 64000

    def setup(self) -> None:
        """Map a file that is one hole, and write."""
        self.path = self.directory / "scattered"
        with open(self.path, "w+b") as file:
            file.truncate(self.PAGES * PAGE)
            self.address = map_pages(self.PAGES, flags=MAP_PRIVATE, fd=file.fileno())
        for page in range(0, self.PAGES, 2):
            ctypes.memmove(self.address + page * PAGE, page_content(page), PAGE)

    def verify(self) -> str | None:
        """The content."""
        return wrong_pages(self.address, {page: page_content(page) for page in range(0, self.PAGES, 2)})


class ReadOnlyFile(Case):
    """A private mapping of a file that was never writable, of which a debugger has changed a page."""

    PAGES = 4

    def setup(self) -> None:
        """Map for reading only; write by /proc/self/mem, which needs no permission (proc_pid_mem(5))."""
        self.path = self.directory / "read_only"
        self.path.write_bytes(b"".join(page_content(page) for page in range(self.PAGES)))
        with open(self.path, "rb") as file:
            self.address = map_pages(self.PAGES, prot=PROT_READ, flags=MAP_PRIVATE, fd=file.fileno())
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(self.address + 2 * PAGE)
            memory.write(page_content(2000))

    def verify(self) -> str | None:
        """The mapping, and its content."""
        found = mapping_at(self.address)
        expected = {page: page_content(page if page != 2 else 2000) for page in range(self.PAGES)}
        return first_problem(
            unlike("permissions", "r--p", found and found.permissions), wrong_pages(self.address, expected)
        )


class PrivateFile(Case):
    """A private mapping of a file: some pages copied on write, the others still the file's."""

    PAGES = 16
    OFFSET = 3 * PAGE

    def setup(self) -> None:
        """Map from an offset; write every third page; protect the last ones for reading only."""
        self.path = self.directory / "private"
        self.path.write_bytes(b"".join(page_content(page) for page in range(self.PAGES + 3)))
        with open(self.path, "r+b") as file:
            self.address = map_pages(self.PAGES, flags=MAP_PRIVATE, fd=file.fileno(), offset=self.OFFSET)
        self.expected = {page: page_content(page + 3) for page in range(self.PAGES)}
        for page in range(0, self.PAGES, 3):
            ctypes.memmove(self.address + page * PAGE, page_content(1000 + page), PAGE)
            self.expected[page] = page_content(1000 + page)
        checked(libc.mprotect(self.address + 12 * PAGE, 4 * PAGE, PROT_READ), "mprotect")

    def verify(self) -> str | None:
        """Mapping, content; and the file never saw the written pages."""
        found = [mapping_at(self.address), mapping_at(self.address + 12 * PAGE)]
        shown = [mapping and (mapping.name, mapping.offset, mapping.permissions) for mapping in found]
        wanted = [(str(self.path), self.OFFSET, "rw-p"), (str(self.path), self.OFFSET + 12 * PAGE, "r--p")]
        untouched = b"".join(page_content(page) for page in range(self.PAGES + 3))
        return first_problem(
            unlike("mapping", wanted, shown),
            wrong_pages(self.address, self.expected),
            None if self.path.read_bytes() == untouched else "the file was changed",
        )


class SharedFile(Case):
    """A shared mapping of a file: what is written shows in the file, also after."""

    PAGES = 16

    def setup(self) -> None:
        """Map, write half of it."""
        self.path = self.directory / "shared"
        self.path.write_bytes(b"".join(page_content(page) for page in range(self.PAGES)))
        with open(self.path, "r+b") as file:
            self.address = map_pages(self.PAGES, flags=MAP_SHARED, fd=file.fileno())
        fill(self.address, self.PAGES // 2, 2000)

    def verify(self) -> str | None:
        """Both views agree, in both directions."""
        found = mapping_at(self.address)
        expected = {page: page_content(page + (2000 if page < self.PAGES // 2 else 0)) for page in range(self.PAGES)}
        before = wrong_pages(self.address, expected)
        ctypes.memmove(self.address + PAGE, b"written by the mapping", 22)
        with open(self.path, "r+b") as file:
            content = file.read()
            file.seek(2 * PAGE)
            file.write(b"written by the file")
        return first_problem(
            unlike("mapping", (str(self.path), "rw-s"), found and (found.name, found.permissions)),
            before,
            unlike("the file", b"written by the mapping", content[PAGE : PAGE + 22]),
            unlike("the mapping", b"written by the file", ctypes.string_at(self.address + 2 * PAGE, 19)),
        )


class FileMappings(Snapshot):
    """Where every file, the vdso and the vvar are mapped."""

    def take(self) -> dict[str, object]:
        """Every named mapping whose size is not the process's own to change.

        Neighbours that go on where the other ends count as one: where the kernel splits them is not the program's. Nor
        is at which offset of a file that nobody can open anonymous huge pages lie.
        """
        joined: list[Mapping] = []
        for mapping in mappings():
            ours = ("[heap]", "[stack", "[anon", "/anon_hugepage", "/memfd:", "/dev/zero", "/SYSV", str(self.directory))
            if not mapping.name or mapping.name.startswith(ours):
                continue
            if joined and continues(joined[-1], mapping):
                mapping = mapping._replace(start=joined[-1].start, offset=joined.pop().offset)
            joined.append(mapping)
        return {f"{m.start:x}-{m.end:x}": (m.permissions, m.offset, m.name) for m in joined}


def continues(one: Mapping, other: Mapping) -> bool:
    """Whether two mappings of a file are one to the program."""
    same = (one.end, one.permissions, one.name) == (other.start, other.permissions, other.name)
    return same and one.name.startswith("/") and other.offset == one.offset + one.end - one.start


class AddressSpace(Snapshot):
    """The fields of the kernel's mm: code, data, heap start, stack start, arguments, environment, auxiliary vector."""

    FIELDS: ClassVar = {
        26: "start_code",
        27: "end_code",
        28: "start_stack",
        45: "start_data",
        46: "end_data",
        47: "start_brk",
        48: "arg_start",
        49: "arg_end",
        50: "env_start",
        51: "env_end",
    }

    def take(self) -> dict[str, object]:
        """From /proc/self/stat and auxv."""
        with open("/proc/self/stat") as stat, open("/proc/self/auxv", "rb") as auxv:
            words = stat.read().rpartition(")")[2].split()
            fields = {name: words[number - 3] for number, name in self.FIELDS.items()}
            return {**fields, "auxv": auxv.read().hex()}


class ProgramBreak(Case):
    """The end of the heap: where it was, and movable."""

    def setup(self) -> None:
        """Nothing: the C library has a heap already."""

    def verify(self) -> str | None:
        """brk(2) and /proc agree; it grows by zeroed pages and shrinks again."""
        end = syscall(SYS_BRK, 0)
        # In pieces, where a part of it is locked.
        heap = max((mapping for mapping in mappings() if mapping.name == "[heap]"), default=None)
        if heap is None or heap.end != -(-end // PAGE) * PAGE:
            return f"the heap ends at {heap and hex(heap.end)}, brk says {end:#x}"
        # From here on the C library must not want more heap: what it got above ours would go with ours.
        end = syscall(SYS_BRK, 0)
        grown = syscall(SYS_BRK, end + 64 * PAGE)
        if grown != end + 64 * PAGE:
            return f"brk({end + 64 * PAGE:#x}) gave {grown:#x}"
        # All bytes are as the next ones, and the first is zero.
        first, second = ctypes.c_void_p(heap.end), ctypes.c_void_p(heap.end + 1)
        zeroed = not libc.memcmp(first, second, 63 * PAGE - 1) and not ctypes.c_ubyte.from_address(heap.end).value
        return first_problem(None if zeroed else "new heap is not zero", unlike("brk", end, syscall(SYS_BRK, end)))


class MainStack(Case):
    """The main thread's stack still grows downwards."""

    def setup(self) -> None:
        """Nothing: every process has a stack."""

    def verify(self) -> str | None:
        """Write far below its lower end."""
        before = self.stack()
        if before is None or "gd" not in before.flags:
            return f"the stack is {before}"
        ctypes.memset(before.start - 64 * PAGE, 0x55, PAGE)
        after = self.stack()
        return unlike("lower end of the stack", before.start - 64 * PAGE, after and after.start)

    def stack(self) -> Mapping | None:
        """The mapping of the stack."""
        return next((mapping for mapping in mappings() if mapping.name == "[stack]"), None)
