"""Memory with an identity of its own: shared anonymous memory, memfds, System V segments, mapped files without a name.

It is found by the vmas and descriptors that refer to it, and read by way of them (``/proc/PID/map_files``, ``fd``).
"""

import contextlib
import errno
import fcntl
import functools
import os
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator

from msgspec import Struct

from postcopy.dump_side.page_source import OpenMemory
from postcopy.errors import DumpError
from postcopy.kernel import procfs, system_v
from postcopy.kernel.holes import data_ranges
from postcopy.kernel.page import PAGE_SIZE, page_down, page_up
from postcopy.kernel.procfs import MapsLine
from postcopy.page_ranges import PageRanges
from postcopy.state import SharedMemory, SystemV, Vma

DELETED = " (deleted)"
# Bytes: of one such memory, and of all, that travel with the state although they could be fetched later.
MOST_SENT, MOST_SENT_OF_ALL = 64 << 10, 4 << 20

_PREFIXES = {"/dev/zero": "anonymous", "/SYSV": "system_v", "/memfd:": "memfd", "/anon_hugepage": "huge"}
_HUGE_POOLS = "/sys/kernel/mm/hugepages"
_FIRST_SPACE = 1 << 20  # in the page protocol; the numbers below are those of processes

Key = tuple[int, int]  # device and inode


def _device_of_nameless_memory() -> int:
    """The device of the kernel's own tmpfs, which nobody can mount: all such memory lives there (mm/shmem.c)."""
    fd = os.memfd_create("postcopy-device")
    try:
        return os.fstat(fd).st_dev
    finally:
        os.close(fd)


DEVICE = _device_of_nameless_memory()


@functools.cache
def huge_devices() -> dict[int, int]:
    """The same for hugetlb memory: a device for each size of pages, and the logarithm of that (hugetlbfs/inode.c)."""
    devices = {}
    for name in os.listdir(_HUGE_POOLS) if os.path.isdir(_HUGE_POOLS) else ():
        shift = (int(name.removeprefix("hugepages-").removesuffix("kB")) << 10).bit_length() - 1
        with contextlib.suppress(OSError):
            fd = os.memfd_create("postcopy-device", os.MFD_CLOEXEC | os.MFD_HUGETLB | shift << os.MFD_HUGE_SHIFT)
            devices[os.fstat(fd).st_dev] = shift
            os.close(fd)
    return devices


class Found(Struct):
    """One such memory: ``path`` leads to it as long as its finder stays frozen; ``mapped``: for sharing.

    ``boot_set``: offsets of pages that are touched at once when the tree goes on. ``huge_shift``: of hugetlb memory,
    the logarithm of its page size; ``huge_pages``: how many of these it takes.
    """

    key: Key
    kind: str
    name: str
    path: str
    mapped: bool = False
    reserved: bool = True
    boot_set: set[int] = set()
    huge_shift: int = 0
    huge_pages: int = 0


class SharedObjects(Struct):
    """All such memory of a process tree; its vmas and descriptors refer to it by the order of finding.

    ``sources``: where its pages come from, by its number in the page protocol.
    """

    found: list[Found] = []
    sources: dict[int, OpenMemory] = {}
    _numbers: dict[Key, int] = {}

    def of_vma(self, pid: int, line: MapsLine, mapped: os.stat_result) -> int:
        """The number of what a vma maps; ``mapped``: as stat of its ``map_files`` entry shows it."""
        path = f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}"
        number = self._number((mapped.st_dev, mapped.st_ino), line.name, path)
        self.found[number].mapped |= line.shared
        self._count(number, mapped, reserved="nr" not in line.flags)
        if line.shared and "nr" in line.flags:
            self.found[number].reserved = False
        return number

    def of_memfd(self, pid: int, fd: int, link: str, status: os.stat_result) -> int:
        """The number of the memory behind a descriptor."""
        number = self._number((status.st_dev, status.st_ino), link, f"/proc/{pid}/fd/{fd}")
        self.found[number].mapped = True
        self._count(number, status, reserved=False)
        return number

    def _count(self, number: int, status: os.stat_result, *, reserved: bool) -> None:
        """The pages that there are, or that mappings have reserved, of hugetlb memory."""
        each = self.found[number]
        each.huge_shift = huge_devices().get(status.st_dev, 0)
        if each.huge_shift:
            size = status.st_size if reserved else status.st_blocks << 9
            each.huge_pages = max(each.huge_pages, size >> each.huge_shift)

    def add_boot_set(self, vmas: Iterable[Vma], addresses: Iterable[int]) -> None:
        """Of a frozen process's layout: what its threads, or the kernel for them, touch at once when they go on."""
        pages = sorted({page_down(address) for address in addresses})
        for vma in vmas:
            if vma.backing == "object":
                for page in pages[bisect_left(pages, vma.start) : bisect_left(pages, vma.end)]:
                    self.found[vma.file].boot_set.add(page - vma.start + vma.offset)

    def _number(self, key: Key, shown: str, path: str) -> int:
        if key not in self._numbers:
            self._numbers[key] = len(self.found)
            name = shown.removesuffix(DELETED)
            kind = kind_of(shown) if is_nameless(key[0]) else "deleted"
            self.found.append(Found(key, kind or "", name.removeprefix("/memfd:"), path))
        return self._numbers[key]

    @property
    def huge_pages(self) -> Counter[int]:
        """How many pages of hugetlb memory there are of it, by the logarithm of their size."""
        found: Counter[int] = Counter()
        for each in self.found:
            if each.huge_pages:
                found[each.huge_shift] += each.huge_pages
        return found

    # -- what cannot be moved -----------------------------------------------------------------------------------------

    @property
    def keys(self) -> frozenset[Key]:
        """The identities of all of it."""
        return frozenset(self._numbers)

    def problems(self, pids: set[int], trusted: frozenset[Key] = frozenset()) -> Iterator[str]:
        """What is shared with processes other than ``pids``.

        Looking for others takes long; of ``trusted`` an earlier look has found none.
        """
        doubtful = {each.key: each for each in self.found if each.mapped and each.key not in trusted}
        # Children may have been born to the tree since its processes were listed.
        own = {each for pid in pids for each in (pid, *procfs.descendants(pid))} if doubtful else pids
        for key, holder in _holders(set(doubtful), own).items():
            what = _called(doubtful[key])
            yield f"{what} is shared with process {holder}, which is not moved"

    # -- of a frozen tree ---------------------------------------------------------------------------------------------

    def collect(self) -> list[SharedMemory]:
        """All of it, and open it: `sources` reads its content. Raises DumpError."""
        states: list[SharedMemory] = []
        left = MOST_SENT_OF_ALL
        for space, each in enumerate(self.found, _FIRST_SPACE):
            try:
                fd = os.open(each.path, os.O_RDONLY | os.O_CLOEXEC)
                self.sources[space] = OpenMemory(fd, _called(each))
                states.append(_collect(each, space, fd, min(left, MOST_SENT)))
                left -= PageRanges.unpack(states[-1].sent).total_pages * PAGE_SIZE
            except OSError as error:
                raise DumpError(f"{_called(each)} cannot be read: {error.strerror}") from None
        return states

    def close(self) -> None:
        """Give the descriptors back."""
        for source in self.sources.values():
            os.close(source.fd)
        self.sources.clear()

    def end(self) -> None:
        """After the tree's end: remove the System V segments that nobody is attached to any more."""
        for each in self.found:
            if each.kind == "system_v":
                with contextlib.suppress(OSError):
                    if not system_v.stat(each.key[1]).attachments:
                        system_v.remove(each.key[1])


def is_nameless(device: int) -> bool:
    """Whether nothing but memory of the kernel's own is on a device."""
    return device == DEVICE or device in huge_devices()


def kind_of(shown: str) -> str | None:
    """The kind of memory on a device that `is_nameless`, by the name that maps or a descriptor's link shows."""
    return next((kind for prefix, kind in _PREFIXES.items() if shown.startswith(prefix)), None)


def huge_shift(mapped: os.stat_result) -> int:
    """The logarithm of the page size of hugetlb memory, by the stat of its ``map_files`` entry."""
    return mapped.st_blksize.bit_length() - 1


def _called(each: Found) -> str:
    match each.kind:
        case "anonymous":
            return f"shared anonymous memory (inode {each.key[1]})"
        case "system_v":
            return f"System V segment {each.key[1]}"
        case "huge":
            return f"shared hugetlb memory (inode {each.key[1]})"
        case "memfd":
            return f"memfd {each.name}"
    return f"deleted file {each.name}"


def _collect(each: Found, space: int, fd: int, most_sent: int) -> SharedMemory:
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) != each.key:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    existing = _huge_data(fd, status, each.huge_shift) if each.huge_shift else _data(fd, status.st_size)
    lazy = PageRanges()
    if existing.total_pages * PAGE_SIZE > most_sent:
        size = 1 << each.huge_shift if each.huge_shift else PAGE_SIZE
        boot_set = PageRanges.from_pairs((page & -size, (page & -size) + size) for page in each.boot_set)
        lazy = existing.subtract(boot_set)
    segment = system_v.stat(each.key[1]) if each.kind == "system_v" else None
    return SharedMemory(
        kind=each.kind,
        space=space,
        inode=status.st_ino,
        name=os.path.basename(each.name) if each.kind == "deleted" else each.name,
        size=status.st_size,
        mode=segment.mode if segment else stat.S_IMODE(status.st_mode),
        owner=segment.owner if segment else (status.st_uid, status.st_gid),
        seals=fcntl.fcntl(fd, fcntl.F_GET_SEALS) if each.kind == "memfd" else 0,
        reserved=each.reserved,
        system_v=SystemV(each.key[1], segment.key, segment.size, segment.removed) if segment else None,
        sent=existing.subtract(lazy).pack(),
        lazy=lazy.pack(),
        huge_shift=each.huge_shift,
    )


def _data(fd: int, size: int) -> PageRanges:
    """The pages that exist (lseek(2), SEEK_DATA)."""
    return PageRanges.from_pairs((page_down(each.start), page_up(each.stop)) for each in data_ranges(fd, size))


def _huge_data(fd: int, status: os.stat_result, shift: int) -> PageRanges:
    """The pages of hugetlb memory that hold anything: its files do not tell which exist, only how many."""
    length = 1 << shift
    if status.st_blocks << 9 == status.st_size:
        return PageRanges.from_pairs([(0, status.st_size)] if status.st_size else [])
    places = range(0, status.st_size if status.st_blocks else 0, length)
    buffer, zeros = bytearray(length), bytes(length)
    found = []
    for place in places:
        if os.preadv(fd, [buffer], place) and buffer != zeros:
            found.append((place, place + length))
    return PageRanges.from_pairs(found)


def _holders(keys: set[Key], but: set[int]) -> dict[Key, int]:
    """For each of ``keys`` that a process other than ``but`` has mapped or open, one such process."""
    found: dict[Key, int] = {}
    if not keys:
        return found
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in but or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            for key in _held(int(name)):
                if key in keys:
                    found.setdefault(key, int(name))
    return found


def _held(pid: int) -> Iterator[Key]:
    for line in procfs.for_each_vma(pid):
        if line.shared:
            yield os.makedev(*line.device), line.inode
    for fd in procfs.descriptors(pid):
        with contextlib.suppress(OSError):
            status = os.stat(f"/proc/{pid}/fd/{fd}")
            yield status.st_dev, status.st_ino
