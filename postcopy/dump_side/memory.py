"""Memory: the layout of a process, which of its pages exist, and what of them travels with the state."""

import contextlib
import functools
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from types import MappingProxyType

from msgspec import Struct
from msgspec.structs import replace

from postcopy.dump_side import names, shared_memory
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.shared_memory import DELETED, SharedObjects
from postcopy.huge_pages import HugeArea, HugeAreas, is_lazy
from postcopy.kernel import procfs
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.kernel.elf import build_id
from postcopy.kernel.page import PAGE_SIZE, page_down
from postcopy.kernel.pagemap import PAGE_IS_FILE, PAGE_IS_GUARD, PAGE_IS_PFNZERO, Pagemap, PageRegion
from postcopy.kernel.procfs import MapsLine
from postcopy.page_ranges import PageRanges
from postcopy.state import FileIdentity, MappedFile, Memory, Vma

_MCL_FUTURE, _MCL_ONFAULT = 2, 4
_LARGE = 4 << 20  # bytes
_MM_FIELDS = (*range(26, 29), *range(45, 52))
_KERNEL_MAPPINGS = {"[vdso]": "vdso", "[vvar]": "vvar", "[vvar_vclock]": "vvar"}
_CARRIED_FLAGS = frozenset({"ac", "gd", "sr", "rr", "dc", "wf", "dd", "hg", "nh", "mg", "nr", "lo"})
_REFUSED_FLAGS = {
    "um": "memory of a userfaultfd of its own cannot be moved",
    "uw": "memory of a userfaultfd of its own cannot be moved",
    "ui": "memory of a userfaultfd of its own cannot be moved",
    "ss": "shadow stacks cannot be moved yet",
    "sl": "sealed mappings (mseal) cannot be moved yet",
    "pf": "device memory cannot be moved",
    "io": "device memory cannot be moved",
}
_SPECIAL_NAMES = {
    "anon_inode:": "memory of a kernel object cannot be moved",
    "/[aio]": "asynchronous I/O contexts cannot be moved yet",
    "socket:": "memory of a socket cannot be moved",
}


class Layout(Struct):
    """The vmas of a process as they will be rebuilt, the files they map, and what cannot be moved."""

    vmas: list[Vma] = []
    files: list[MappedFile] = []
    problems: list[str] = []

    @property
    def has_objects(self) -> bool:
        """Whether any of it is memory that is numbered anew at each look."""
        return any(vma.backing == "object" for vma in self.vmas)

    @property
    def huge_pages(self) -> Counter[int]:
        """How many pages of private hugetlb memory are reserved for it, by the logarithm of their size."""
        found: Counter[int] = Counter()
        for vma in self.vmas:
            if vma.huge_shift and "nr" not in vma.flags:
                found[vma.huge_shift] += (vma.end - vma.start) >> vma.huge_shift
        return found

    @property
    def vdso(self) -> range:
        """The addresses of the vdso; empty where there is none."""
        return next((range(v.start, v.end) for v in self.vmas if v.backing == "vdso"), range(0))


# What has been found out about mapped files of a tree, by device, inode and name: what backs them, or what is wrong.
Checked = dict[tuple[tuple[int, int], int, str], "str | _OtherName | _Problem"]


def layout(pid: int, shared: SharedObjects, lines: Iterable[MapsLine], checked: Checked) -> Layout:
    """The layout of a process, stopped or not; ``lines``: its mappings with their flags.

    What it may share with other processes is added to ``shared``. ``checked``: what the layouts of the other processes
    of the tree have found.
    """
    found = Layout()
    numbers: dict[MappedFile, int] = {}
    for line in lines:
        if line.name == "[vsyscall]":
            continue
        backing = _backing(pid, line, checked)
        if isinstance(backing, _Problem):
            found.problems.append(f"memory at {line.start:#x} ({line.name or 'anonymous'}): {backing.text}")
            continue
        name, number, huge_shift = line.name, -1, 0
        if isinstance(backing, _OtherName):
            name, backing = backing.path, "file"
        if backing == "file":
            mapped = MappedFile(name, writable=line.shared and "mw" in line.flags)
            number = numbers.setdefault(mapped, len(numbers))
        elif backing == "huge":
            with contextlib.suppress(FileNotFoundError):
                huge_shift = shared_memory.huge_shift(os.stat(f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}"))
        elif backing == "object":
            with contextlib.suppress(FileNotFoundError):  # a running process has changed its layout meanwhile
                mapping = os.stat(f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}")
                number = shared.of_vma(pid, line, mapping)
        found.vmas.append(
            Vma(
                start=line.start,
                end=line.end,
                prot=line.prot,
                shared=line.shared,
                backing=backing,
                file=number,
                offset=line.offset if number >= 0 else 0,
                writable="mw" in line.flags,
                flags=_carried(line.flags),
                name=name,
                huge_shift=huge_shift,
            )
        )
    found.files = list(numbers)
    if not found.vdso:
        found.problems.append("it has no vdso, which the executor needs")
    return found


@functools.cache
def _carried(flags: frozenset[str]) -> list[str]:
    return sorted(flags & _CARRIED_FLAGS)


class _Problem(Struct, frozen=True):
    text: str


class _OtherName(Struct, frozen=True):
    """A file that has lost the name that maps shows: sem_open(3) gives a semaphore its name by link and unlink."""

    path: str


def _backing(pid: int, line: MapsLine, checked: Checked) -> str | _OtherName | _Problem:
    if line.name in _KERNEL_MAPPINGS:
        return _KERNEL_MAPPINGS[line.name]
    for flag in sorted(line.flags & _REFUSED_FLAGS.keys()):
        return _Problem(_REFUSED_FLAGS[flag])
    if line.protection_key:
        return _Problem("memory protection keys cannot be moved yet")
    for prefix, text in _SPECIAL_NAMES.items():
        if line.name.startswith(prefix):
            return _Problem(text)
    if "ht" in line.flags:
        return _huge_backing(line)
    if os.makedev(*line.device) == shared_memory.DEVICE:
        return "object" if shared_memory.kind_of(line.name) else _Problem("memory of a kernel object cannot be moved")
    if not line.inode:
        if line.shared:
            return _Problem("shared memory of an unknown kind")
        return "stack" if "gd" in line.flags else "anonymous"
    key = line.device, line.inode, line.name
    if key not in checked:
        checked[key] = _file_backing(pid, line)
    return checked[key]


def _huge_backing(line: MapsLine) -> str | _Problem:
    kind = shared_memory.kind_of(line.name)
    if kind is None or os.makedev(*line.device) not in shared_memory.huge_devices():
        return _Problem("files of huge pages (hugetlbfs) cannot be moved")
    if line.shared:
        return "object"
    return "huge" if kind == "huge" else _Problem("private mappings of huge pages (hugetlb) of a memfd cannot be moved")


def _file_backing(pid: int, line: MapsLine) -> str | _OtherName | _Problem:
    try:
        mapped = os.stat(f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}")
    except OSError:
        # The layout has changed since smaps was read: the process runs, and all is looked at again once it is frozen.
        return "file"
    try:
        named = os.stat(line.name)
    except OSError:
        if line.name.endswith(DELETED) and stat.S_ISREG(mapped.st_mode):
            return _other_name(line.name, mapped) if mapped.st_nlink else "object"
        return _Problem("the file cannot be found under this name any more")
    if not stat.S_ISREG(mapped.st_mode):
        return _Problem("mappings of devices cannot be moved")
    if (mapped.st_dev, mapped.st_ino) != (named.st_dev, named.st_ino):
        return _Problem("another file has this name now")
    return "file"


def _other_name(deleted: str, mapped: os.stat_result) -> _OtherName | _Problem:
    with contextlib.suppress(OSError):
        if other := names.in_same_directory(deleted, mapped):
            return _OtherName(other)
    return _Problem("this name of the file was deleted, and no other is in the same directory")


def without_objects(found: Memory) -> Memory:
    """The same without what is memory of another identity, which a layout numbers anew at each look."""
    objects = any(vma.backing == "object" for vma in found.vmas)
    return replace(found, vmas=[vma for vma in found.vmas if vma.backing != "object"]) if objects else found


def identities(found: Layout, known: Mapping[str, FileIdentity] = MappingProxyType({})) -> list[FileIdentity]:
    """The mapped files that are not ``known`` by their paths yet, as the destination must have them."""
    return [
        FileIdentity(f.path, os.stat(f.path).st_size, build_id(f.path), changing=f.writable)
        for f in found.files
        if f.path not in known or (f.writable and not known[f.path].changing)
    ]


# -- what exists, once the process is frozen ---------------------------------------------------------------------------


class Pages(Struct):
    """Which pages exist: those left behind, those sent along (ranges of addresses), and guard markers."""

    lazy: PageRanges
    sent: PageRanges
    guards: PageRanges


def scan(pagemap: Pagemap, lines: Sequence[MapsLine]) -> Pages:
    """Walk the page tables of a frozen process.

    Missing-mode userfaultfd covers private anonymous memory, of huge pages too; of private mappings of files the copied
    pages are sent.
    """
    anonymous: list[tuple[int, int]] = []
    copied: list[tuple[int, int]] = []
    guards: list[tuple[int, int]] = []
    for line, region in _private_regions(pagemap, lines):
        place = max(line.start, region.start), min(line.end, region.end)
        if region.categories & PAGE_IS_GUARD:
            guards.append(place)
        elif line.inode and not _is_huge(line):
            if not region.categories & PAGE_IS_FILE:
                copied.append(place)
        elif not region.categories & PAGE_IS_PFNZERO:
            anonymous.append(place)
    return Pages(
        lazy=PageRanges.from_pairs(anonymous),
        sent=PageRanges.from_pairs(copied),
        guards=PageRanges.from_pairs(guards),
    )


def with_boot_set(pages: Pages, boot_set: Iterable[int]) -> Pages:
    """Send the pages of these addresses along."""
    wanted = {page_down(address) for address in boot_set}
    return _sent_too(pages, PageRanges.from_pairs((p, p + PAGE_SIZE) for p in wanted if pages.lazy.contains(p)))


def _private_regions(pagemap: Pagemap, lines: Sequence[MapsLine]) -> Iterator[tuple[MapsLine, PageRegion]]:
    """The existing pages of the private mappings, region by region; a region may lie in several of them.

    A call for each mapping would take longer than the walk where they are small: so those between two large ones are
    walked at once, and of the large ones only those that are wanted.
    """
    few: list[MapsLine] = []
    for line in lines:
        if line.name == "[vsyscall]":
            continue
        if line.end - line.start < _LARGE:
            few.append(line)
            continue
        yield from _regions_of(pagemap, few)
        few = []
        if _is_private(line):
            for region in pagemap.for_each_region(line.start, line.end, files=line.inode != 0):
                yield line, region
    yield from _regions_of(pagemap, few)


def _regions_of(pagemap: Pagemap, lines: Sequence[MapsLine]) -> Iterator[tuple[MapsLine, PageRegion]]:
    if not lines:
        return
    at = 0
    for region in pagemap.for_each_region(lines[0].start, lines[-1].end, files=True):
        while lines[at].end <= region.start:
            at += 1
        for line in islice(lines, at, None):
            if line.start >= region.end:
                break
            if _is_private(line):
                yield line, region


def _is_huge(line: MapsLine) -> bool:
    """Whether a private mapping is of hugetlb memory; of those that can be moved, all are anonymous."""
    return line.name.startswith("/anon_hugepage") and os.makedev(*line.device) in shared_memory.huge_devices()


def _is_private(line: MapsLine) -> bool:
    return not line.shared and line.name not in _KERNEL_MAPPINGS


def keep_together(pages: Pages, found: Layout) -> Pages:
    """Send what is not to be fetched later along with the state.

    Mappings that fork must wipe: a page fetched later would be there in the child. Hugetlb memory that is not lazy. And
    huge pages of which a part is sent, for they can be filled only whole.
    """
    whole = [(v.start, v.end) for v in found.vmas if "wf" in v.flags or (v.backing == "huge" and not is_lazy(v))]
    huge = HugeAreas(HugeArea(v.start, v.end, v.huge_shift) for v in found.vmas if is_lazy(v))
    if huge.areas:
        parts = (part for each in pages.sent for part in huge.parts(*each))
        whole += [(page.start, page.end) for _, page in parts if page]
    if not whole:
        return pages
    return _sent_too(pages, pages.lazy.subtract(pages.lazy.subtract(PageRanges.from_pairs(whole))))


def _sent_too(pages: Pages, more: PageRanges) -> Pages:
    sent = [(r.start, r.end) for r in (*pages.sent, *more)]
    return Pages(pages.lazy.subtract(more), PageRanges.from_pairs(sent), pages.guards)


class Question(Struct):
    """What the task itself must say of its mm: the exact end of the heap."""

    brk: int

    @classmethod
    def ask(cls, batch: Batch) -> "Question":
        """Add the calls to a batch of the leader's."""
        return cls(brk=batch.add(call("brk", 0)))

    def answered(self, answers: Answers) -> int:
        """The program break (bytes)."""
        return answers.value(self.brk)


def future_locks(frozen: Frozen, arena: range) -> int:
    """What mlockall(2) was told of mappings to come; the executors' ``arena`` is one, and shows it."""
    grown = _locked(procfs.status(frozen.face)) - _locked(frozen.threads[0].status)
    if grown < len(arena):
        return 0
    present = sum(r.end - r.start for r in frozen.pagemap.for_each_region(arena.start, arena.stop, files=False))
    return _MCL_FUTURE | (_MCL_ONFAULT if present < len(arena) else 0)


def _locked(status: dict[str, str]) -> int:
    """Bytes of locked memory."""
    return int(status["VmLck"].split()[0]) * 1024


class Seen(Struct, frozen=True):
    """The mm fields as ``/proc`` tells them; ``places``: those of ``stat``, by their numbers (proc_pid_stat(5))."""

    exe: str
    auxv: bytes
    places: dict[int, int]


def see(pid: int) -> Seen:
    """Those of a process. Raises OSError."""
    fields = procfs.stat(pid)
    return Seen(procfs.link(pid, "exe"), procfs.read(pid, "auxv"), {at: int(fields[at]) for at in _MM_FIELDS})


def collect(seen: Seen, found: Layout, pages: Pages, brk: int, vdso: bytes, locks: int) -> Memory:
    """Everything of a process's memory but its lazy pages."""
    places = seen.places
    return Memory(
        vmas=found.vmas,
        files=found.files,
        exe=seen.exe,
        start_code=places[26],
        end_code=places[27],
        start_stack=places[28],
        start_data=places[45],
        end_data=places[46],
        start_brk=places[47],
        arg_start=places[48],
        arg_end=places[49],
        env_start=places[50],
        env_end=places[51],
        brk=brk,
        future_locks=locks,
        auxv=seen.auxv,
        vdso=vdso,
        sent=pages.sent.pack(),
        lazy=pages.lazy.pack(),
        guards=pages.guards.pack(),
    )
