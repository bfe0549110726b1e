"""Memory: lay out an address space as it was, and write the pages that came with the state."""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from postcopy.errors import RestoreError
from postcopy.huge_pages import is_lazy
from postcopy.kernel import procfs
from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import Call, call
from postcopy.kernel.page import PAGE_SHIFT, PAGE_SIZE
from postcopy.kernel.prctl import PR_SET_MM, PR_SET_MM_MAP, PR_SET_VMA, PR_SET_VMA_ANON_NAME
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.page_ranges import PageRanges
from postcopy.restore_side import system_v
from postcopy.restore_side.shared_filling import Part
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.sent_pages import SentPages
from postcopy.state import MappedFile, Memory, Vma

_AT_FDCWD = -100
_PROT_WRITE = 2
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS = 0x01, 0x02, 0x10, 0x20
_MAP_GROWSDOWN, _MAP_NORESERVE = 0x100, 0x4000
_MAP_HUGETLB, _MAP_HUGE_SHIFT = 0x40000, 26
_MREMAP_MAYMOVE_FIXED = 3
_MLOCK_ONFAULT = 1
_MADV_GUARD_INSTALL = 102
_ADVICE = {"rr": 1, "sr": 2, "dc": 10, "mg": 12, "hg": 14, "nh": 15, "dd": 16, "wf": 18}
# pread(2) gives less than 2 GiB at once.
_MOST_AT_ONCE, _IOV_MAX = 1 << 30, 1024
MOST_READS = 4096
# Backings that lie in one process alone.
_PLAIN = frozenset({"anonymous", "stack", "huge", "file"})
_LOWEST, _HIGHEST = 0x10000, 0x7FFF_FFFF_F000


def hole(size: int, in_use: Iterable[range]) -> int:
    """The address of ``size`` free bytes, below everything in ``in_use`` as far as possible."""
    place = _LOWEST
    for taken in sorted(in_use, key=lambda r: r.start):
        # vsyscall lies beyond what can be mapped.
        if min(taken.start, _HIGHEST) - place >= size:
            return place
        place = max(place, taken.stop)
    if _HIGHEST - place >= size:
        return place
    raise RestoreError(f"no {size} bytes of address space are free beside what the program uses")


def in_use(memory: Memory) -> list[range]:
    """The address ranges of the state's vmas."""
    return [range(vma.start, vma.end) for vma in memory.vmas]


def descriptors(memory: Memory) -> int:
    """How many descriptors are opened for a while, at most."""
    return len(memory.files) + 2 + len(_objects(memory))


def lay_out(
    memory: Memory, batch: Batch, present: list[procfs.MapsLine], keep: range, staging: int, first_fd: int, exe: str
) -> None:
    """Add the calls that make the layout, out of any other, of all that has no identity (`Vma.backing`); it can be
    written wherever it could be once.

    ``present``: what the process has mapped; ``keep``: the executor's memory; ``staging``: a hole that takes the vdso
    and its data on their way; ``first_fd``: the number from which on no descriptor is open; ``exe``: what its exe link
    shows, if anything that has a name here.
    """
    _move_kernel_mappings(memory, batch, present, staging)
    for line in present:
        if not line.name.startswith(("[vdso]", "[vvar", "[vsyscall]")) and line.start != keep.start:
            batch.add(call("munmap", line.start, line.end - line.start), "clearing the new address space")
    for number, mapped in enumerate(memory.files, first_fd):
        _open_mapped(batch, number, mapped)
    last_fd = first_fd + len(memory.files)
    _expect_fd(batch, last_fd, memory.exe, os.O_RDONLY | os.O_CLOEXEC)
    for vma in memory.vmas:
        if vma.backing in _PLAIN:
            _map(batch, vma, first_fd + vma.file if vma.file >= 0 else -1)
    # An exe that is mapped cannot be replaced, not even by itself (EBUSY, kernel/fork.c).
    _set_mm(memory, batch, last_fd if memory.exe != exe else -1)
    batch.add(call("close_range", first_fd, last_fd, 0), "closing the mapped files")


def fits(laid_out: Memory, memory: Memory) -> bool:
    """Whether `complete` can make the layout of ``memory`` out of ``laid_out``."""
    kept = (laid_out.exe, laid_out.auxv, laid_out.vdso, _of_kernel(laid_out))
    return kept == (memory.exe, memory.auxv, memory.vdso, _of_kernel(memory))


def _of_kernel(memory: Memory) -> list[Vma]:
    return [vma for vma in memory.vmas if vma.backing in ("vdso", "vvar")]


def complete(
    laid_out: Memory,
    memory: Memory,
    pages: SentPages,
    shared: SharedObjects,
    batch: Batch,
    lender: int,
    first_fd: int,
) -> tuple[list[tuple[int, range]], dict[int, int]]:
    """Add the calls that make the layout, with all that is in it, out of that which `lay_out` has made, and that read
    ``pages``, which came with the state, into what can be written. Gives the rest, for `write_pages`, and how many
    bytes are read by which of the calls, for `check_pages`.

    ``lender``: its descriptor of the directory of ours.
    """
    fresh = _change(batch, laid_out, memory)
    files = sorted({vma.file for vma in fresh if vma.backing == "file"})
    fds = {number: first_fd + place for place, number in enumerate(files)}
    for number, fd in fds.items():
        _open_mapped(batch, fd, memory.files[number])
    numbers = {each: first_fd + len(fds) + i for i, each in enumerate(_objects(memory))}
    for number, writable in numbers:
        _borrow(batch, shared, number, writable, lender)
    content = first_fd + len(fds) + len(numbers)
    fd = pages.content.fd
    if fd >= 0:
        batch.add(call("openat", lender, batch.text(str(fd)), os.O_RDONLY | os.O_CLOEXEC), "opening the pages")
    system_v.rebuild(memory, shared.states, batch)
    for vma in fresh:
        if vma.backing != "object":
            _map(batch, vma, fds.get(vma.file, -1))
        elif shared.states[vma.file].system_v is not None:
            _advise(batch, vma)
        else:
            _map(batch, vma, numbers[_object(vma)])
    rest: list[tuple[int, range]] = []
    reads = _Reads(batch, content)
    for at, run, by_itself in _sent(memory, pages):
        if by_itself:
            reads.add(at, run)
        else:
            rest.append((at, run))
    reads.end()
    batch.add(call("close_range", first_fd, content, 0), "closing the mapped files")
    for vma in memory.vmas:
        if _first_protection(vma) != vma.prot:
            batch.add(call("mprotect", vma.start, vma.end - vma.start, vma.prot), _On("protecting", vma))
    for guard in PageRanges.unpack(memory.guards):
        where = f"installing guard pages at {guard.start:#x}"
        batch.add(call("madvise", guard.start, guard.end - guard.start, _MADV_GUARD_INSTALL), where)
    return rest, reads.lengths


def _change(batch: Batch, laid_out: Memory, memory: Memory) -> list[Vma]:
    """Add the calls that unmap what ``memory`` has not, or has otherwise; what of it is to be mapped then."""
    if laid_out.vmas is memory.vmas:
        # Most programs have the layout that they had a moment ago.
        return [vma for vma in memory.vmas if vma.backing == "object"]
    there = {vma.start: vma for vma in laid_out.vmas if vma.backing in _PLAIN}
    fresh = []
    for vma in memory.vmas:
        old = there.get(vma.start)
        if old is not None and vma.backing in _PLAIN and _means(old, laid_out) == _means(vma, memory):
            del there[vma.start]
        elif vma.backing in _PLAIN or vma.backing == "object":
            fresh.append(vma)
    for gone in there.values():
        batch.add(call("munmap", gone.start, gone.end - gone.start), _On("unmapping", gone))
    return fresh


def _means(vma: Vma, memory: Memory) -> tuple[Vma, MappedFile | None]:
    """A vma, whatever number its file has."""
    return replace(vma, file=-1), memory.files[vma.file] if vma.backing == "file" else None


def _open_mapped(batch: Batch, number: int, mapped: MappedFile) -> None:
    _expect_fd(batch, number, mapped.path, (os.O_RDWR if mapped.writable else os.O_RDONLY) | os.O_CLOEXEC)


def _object(vma: Vma) -> tuple[int, bool]:
    """What a vma maps: which shared memory, and whether it must be open for writing."""
    return vma.file, vma.shared and vma.writable


def _objects(memory: Memory) -> list[tuple[int, bool]]:
    """What the vmas map of shared memory."""
    return sorted({_object(vma) for vma in memory.vmas if vma.backing == "object"})


def _borrow(batch: Batch, shared: SharedObjects, number: int, writable: bool, lender: int) -> None:
    """Open shared memory; a System V segment, which has no descriptor, only takes the number."""
    state = shared.states[number]
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC
    path = str(shared.fds[number]) if shared.fds[number] >= 0 else "."
    flags = flags if shared.fds[number] >= 0 else os.O_PATH
    batch.add(call("openat", lender, batch.text(path), flags), f"opening {state.kind} memory {state.name}")


class _Reads:
    """Calls that read from a file; what lies there one behind the other, is read by one, wherever it is to go."""

    def __init__(self, batch: Batch, fd: int) -> None:
        self._batch = batch
        self._fd = fd
        self._pieces: list[int] = []
        self._file = range(0)
        self.lengths: dict[int, int] = {}

    def add(self, at: int, run: range) -> None:
        """Read the bytes ``run`` of the file to the address ``at``."""
        full = len(self._pieces) == 2 * _IOV_MAX or run.stop - self._file.start > _MOST_AT_ONCE
        if full or run.start != self._file.stop:
            self.end()
            self._file = range(run.start, run.start)
        self._pieces += (at, len(run))
        self._file = range(self._file.start, run.stop)

    def end(self) -> None:
        """That was the last one."""
        if self._pieces:
            vectors = self._batch.place(struct.pack(f"={len(self._pieces)}Q", *self._pieces))
            made = call("preadv", self._fd, vectors, len(self._pieces) // 2, self._file.start)
            self.lengths[self._batch.add(made, "reading the pages that came with the state")] = len(self._file)
            self._pieces = []


def _sent(memory: Memory, pages: SentPages) -> Iterator[tuple[int, range, bool]]:
    """The pages that travelled with the state: the address, where they lie in ``pages`` (bytes), and whether the
    process reads them itself; it reads no more than `MOST_READS` pieces.
    """
    ranges = PageRanges.unpack(memory.sent)
    if ranges.total_pages != pages.total:
        raise RestoreError(f"{pages.total} pages came with the state, which names {ranges.total_pages}")
    count = ordinal = 0
    starts = [vma.start for vma in memory.vmas]
    for at, end in ranges:
        number = bisect_right(starts, at) - 1
        while at < end:
            vma = memory.vmas[number]
            writable = _is_writable_first(vma)
            part = (min(end, vma.end) - at) >> PAGE_SHIFT
            for whole in pages.runs(ordinal, part):
                for start in range(whole.start, whole.stop, _MOST_AT_ONCE):
                    run = range(start, min(start + _MOST_AT_ONCE, whole.stop))
                    by_itself = writable and pages.content.is_in_file(run)
                    count += by_itself
                    yield at, run, by_itself and count <= MOST_READS
                    at += len(run)
            ordinal += part
            number += 1


def check_pages(lengths: Mapping[int, int], answers: Answers) -> None:
    """That all pages have been read. Raises RestoreError."""
    for number, length in lengths.items():
        if answers.value(number) != length:
            raise RestoreError(f"reading the pages that came with the state: {answers.value(number)} bytes of {length}")


def write_pages(rest: Iterable[tuple[int, range]], pages: SentPages, target: ProcessMemory) -> None:
    """Write what `complete` has left of ``pages``."""
    for at, run in rest:
        target.write(at, pages.content.read(run))


def _is_writable_first(vma: Vma) -> bool:
    """What was writable once stays accounted (and so apart from its neighbours) when it is made read-only."""
    return bool(vma.prot & _PROT_WRITE) or ("ac" in vma.flags and not vma.shared)


def _first_protection(vma: Vma) -> int:
    return vma.prot | _PROT_WRITE if _is_writable_first(vma) else vma.prot


def lazy_parts(memory: Memory, shared: SharedObjects) -> list[Part]:
    """The mappings of shared memory that processes wait for page by page."""
    return [
        Part(vma.start, vma.end, shared.states[vma.file].space, vma.offset)
        for vma in memory.vmas
        if vma.backing == "object" and vma.file in shared.lazy
    ]


def lazy_vmas(memory: Memory, shared: SharedObjects) -> list[range]:
    """The address ranges to be covered by userfaultfd, adjacent ones joined."""
    joined: list[range] = []
    for vma in memory.vmas:
        of_shared = vma.backing == "object" and vma.file in shared.lazy
        # What fork must wipe has come whole: a page filled later would be there in the child.
        if not of_shared and not is_lazy(vma) and (vma.backing not in ("anonymous", "stack") or "wf" in vma.flags):
            continue
        if joined and joined[-1].stop == vma.start:
            joined[-1] = range(joined[-1].start, vma.end)
        else:
            joined.append(range(vma.start, vma.end))
    return joined


def _expect_fd(batch: Batch, number: int, path: str, flags: int) -> None:
    """Open ``path``; the descriptor table is empty from ``number`` on, so that is the descriptor it gets."""
    batch.add(call("openat", _AT_FDCWD, batch.text(path), flags), f"opening {path} (as descriptor {number})")


def _move_kernel_mappings(memory: Memory, batch: Batch, present: list[procfs.MapsLine], staging: int) -> None:
    """Move vvar and vdso to where they were, by way of ``staging``, since old and new places may overlap."""
    ours = {line.name: line for line in present if line.name.startswith(("[vdso]", "[vvar"))}
    wanted = [vma for vma in memory.vmas if vma.backing in ("vdso", "vvar")]
    moves = []
    for vma in wanted:
        line = ours.pop(vma.name, None)
        if line is None or line.end - line.start != vma.end - vma.start:
            raise RestoreError(f"this kernel's {vma.name} differs from the source's", "use hosts with the same kernel")
        size = vma.end - vma.start
        moves.append((line.start, staging, vma.start, size, vma.name))
        staging += size
    for old, middle, _, size, name in moves:
        batch.add(call("mremap", old, size, size, _MREMAP_MAYMOVE_FIXED, middle), f"moving {name}")
    for _, middle, new, size, name in moves:
        batch.add(call("mremap", middle, size, size, _MREMAP_MAYMOVE_FIXED, new), f"moving {name}")
    for name, line in ours.items():
        batch.add(call("munmap", line.start, line.end - line.start), f"removing {name}")


def _map(batch: Batch, vma: Vma, fd: int) -> None:
    size = vma.end - vma.start
    flags = _MAP_FIXED | (_MAP_SHARED if vma.shared else _MAP_PRIVATE)
    flags |= _MAP_NORESERVE if "nr" in vma.flags else 0
    flags |= _MAP_ANONYMOUS if fd < 0 else 0
    flags |= _MAP_HUGETLB | vma.huge_shift << _MAP_HUGE_SHIFT if vma.huge_shift else 0
    flags |= _MAP_GROWSDOWN if vma.backing == "stack" else 0
    batch.add(call("mmap", vma.start, size, _first_protection(vma), flags, fd, vma.offset), _On("mapping", vma))
    _advise(batch, vma)


def _advise(batch: Batch, vma: Vma) -> None:
    """Add the calls for what madvise(2), mlock(2) and prctl(2) have set of a mapping."""
    size = vma.end - vma.start
    for flag in vma.flags:
        if flag in _ADVICE:
            batch.add(call("madvise", vma.start, size, _ADVICE[flag]), _On(f"advising ({flag}) on", vma))
    if "lo" in vma.flags:
        # Locked as it fills: a plain mlock would wait for every page of it now.
        batch.add(call("mlock2", vma.start, size, _MLOCK_ONFAULT), _On("locking", vma))
    if vma.name.startswith("[anon:"):
        # Without a purpose: kernels without CONFIG_ANON_VMA_NAME refuse, and only the name is lost.
        name = batch.text(vma.name[len("[anon:") : -1])
        batch.add(call("prctl", PR_SET_VMA, PR_SET_VMA_ANON_NAME, vma.start, size, name))


class _On(NamedTuple):
    """What is done to a mapping, to be put into words when it is refused."""

    doing: str
    vma: Vma

    def __str__(self) -> str:
        return f"{self.doing} {self.vma.start:#x}-{self.vma.end:#x} {self.vma.name}".rstrip()


def _set_mm(memory: Memory, batch: Batch, exe: int) -> None:
    """All but the ranges of arguments and environment: see `show_arguments`."""
    hidden = replace(memory, arg_end=memory.arg_start, env_end=memory.env_start)
    made = _mm_map(hidden, batch, memory.auxv, exe)
    batch.add(made, f"setting the mm fields and the exe link to {memory.exe}")


def show_arguments(memory: Memory, batch: Batch) -> None:
    """Let others read the arguments and the environment, once userfaultfd is armed.

    Whoever reads ``/proc/PID/cmdline`` before would get zeros, and leave pages of zeros where lazy ones are to come.
    """
    batch.add(_mm_map(memory, batch, b"", -1), "setting the mm fields")


def _mm_map(memory: Memory, batch: Batch, auxv: bytes, exe: int) -> Call:
    """PR_SET_MM_MAP; an empty ``auxv`` and an ``exe`` of -1 leave these as they are (prctl(2))."""
    fields = struct.pack(
        "<12QIi",
        memory.start_code,
        memory.end_code,
        memory.start_data,
        memory.end_data,
        memory.start_brk,
        memory.brk,
        memory.start_stack,
        memory.arg_start,
        memory.arg_end,
        memory.env_start,
        memory.env_end,
        batch.place(auxv) if auxv else 0,
        len(auxv),
        exe,
    )
    return call("prctl", PR_SET_MM, PR_SET_MM_MAP, batch.place(fields), len(fields), 0)


STAGING_SIZE = 64 * PAGE_SIZE
