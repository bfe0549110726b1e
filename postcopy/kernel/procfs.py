"""``/proc/PID``: what the kernel says of a process without stopping it (proc(5))."""

import functools
import os
import re
from collections.abc import Iterator

from msgspec import Struct, field

from postcopy.kernel import pidfd
from postcopy.kernel.libc import refused

_PIECE = 1 << 16
_MAPS = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+) *([^\n]*)")


_PROTECTIONS = {r + w + x: (r == "r") | (w == "w") << 1 | (x == "x") << 2 for r in "r-" for w in "w-" for x in "x-"}


class MapsLine(Struct, frozen=True):
    """One vma as ``/proc/PID/smaps`` shows it; ``offset`` in bytes, ``flags`` the two-letter VmFlags."""

    start: int
    end: int
    permissions: str
    offset: int
    device: tuple[int, int]
    inode: int
    name: str
    flags: frozenset[str] = field(default_factory=frozenset)
    protection_key: int = 0

    @property
    def shared(self) -> bool:
        """MAP_SHARED rather than MAP_PRIVATE."""
        return self.permissions[3] == "s"

    @property
    def prot(self) -> int:
        """PROT_READ | PROT_WRITE | PROT_EXEC as mmap(2) takes them."""
        return _PROTECTIONS[self.permissions[:3]]


def read(pid: int, name: str) -> bytes:
    """All of ``/proc/PID/name``. Raises OSError: ENOENT or ESRCH when the process is gone."""
    try:
        # Not by open(): that makes four more system calls, and a tree has thousands of these files.
        fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = piece = os.read(fd, _PIECE)
            while piece:
                piece = os.read(fd, _PIECE)
                content += piece
            return content
        finally:
            os.close(fd)
    except OSError as error:
        raise refused(f"reading /proc/{pid}/{name}", error.errno) from None


def link(pid: int, name: str) -> str:
    """Where the link ``/proc/PID/name`` points."""
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError as error:
        raise refused(f"reading the link /proc/{pid}/{name}", error.errno) from None


def pids() -> list[int]:
    """All processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def exists(pid: int) -> bool:
    """Whether there is such a process, a zombie too."""
    return os.path.exists(f"/proc/{pid}/status")


def status(pid: int, tid: int | None = None) -> dict[str, str]:
    """The fields of ``status``, of the process or of one of its threads."""
    name = "status" if tid is None else f"task/{tid}/status"
    lines = read(pid, name).decode(errors="surrogateescape").splitlines()
    return {key: value.strip() for key, value in [line.split(":", 1) for line in lines]}


def stat(pid: int, tid: int | None = None) -> list[str]:
    """The fields of ``stat``, of the process or of one of its threads, numbered as in proc_pid_stat(5) (so [0] is
    empty); [2] is the name."""
    text = read(pid, "stat" if tid is None else f"task/{tid}/stat").decode(errors="surrogateescape")
    head, _, tail = text.rpartition(")")
    number, _, name = head.partition(" (")
    return ["", number, name, *tail.split()]


def tids(pid: int) -> list[int]:
    """The threads of a process, the leader first."""
    try:
        found = sorted(int(name) for name in os.listdir(f"/proc/{pid}/task"))
    except OSError as error:
        raise refused(f"listing /proc/{pid}/task", error.errno) from None
    return sorted(found, key=lambda tid: tid != pid)


def face(pid: int) -> int:
    """The thread by which ``/proc`` shows what a process has: after the end of its main thread, another one.

    Raises OSError: it is gone.
    """
    if stat(pid)[3] not in "ZX":
        return pid
    return next((tid for tid in tids(pid)[1:] if stat(pid, tid)[3] not in "ZX"), pid)


def children(pid: int) -> list[int]:
    """The child processes, of all threads."""
    return [child for tid in tids(pid) for child in children_of_thread(pid, tid)]


def children_of_thread(pid: int, tid: int) -> list[int]:
    """The child processes of one thread; none where it has ended. Complete only where they do not come and go."""
    try:
        return [int(word) for word in read(pid, f"task/{tid}/children").split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    """The children, their children and so on, parents first; of a running process, as far as they are there to see."""
    found = [pid]
    for each in found:
        try:
            found += [child for child in children(each) if child not in found]
        except OSError:
            continue  # it has ended while we looked
    return found[1:]


def descriptors(pid: int) -> list[int]:
    """The numbers of the open descriptors, in order."""
    try:
        return sorted(int(name) for name in os.listdir(f"/proc/{pid}/fd"))
    except OSError as error:
        raise refused(f"listing /proc/{pid}/fd", error.errno) from None


class Entries:
    """The descriptor table of a process, by the directories that show it: so nobody walks there anew for each entry.

    ``links``, ``infos``: those directories; ``process``: its pidfd.
    """

    def __init__(self, pid: int) -> None:
        """Raises OSError: ENOENT or ESRCH where there is no such process."""
        self.pid = pid
        self._open: list[int] = []
        try:
            self.links = self._directory("fd")
            self.infos = self._directory("fdinfo")
            self.process = pidfd.of_task(pid)
            self._open.append(self.process)
        except OSError as error:
            self.close()
            raise refused(f"looking at the descriptors of process {pid}", error.errno) from None

    def _directory(self, name: str) -> int:
        self._open.append(os.open(f"/proc/{self.pid}/{name}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
        return self._open[-1]

    def close(self) -> None:
        """Give the directories back."""
        while self._open:
            os.close(self._open.pop())

    def link(self, fd: int) -> str:
        """Where the link ``fd/FD`` points."""
        try:
            return os.readlink(str(fd), dir_fd=self.links)
        except OSError as error:
            raise refused(f"reading the link /proc/{self.pid}/fd/{fd}", error.errno) from None

    def stat(self, fd: int) -> os.stat_result:
        """stat(2) of what is behind a descriptor."""
        try:
            return os.stat(str(fd), dir_fd=self.links)
        except OSError as error:
            raise refused(f"looking at /proc/{self.pid}/fd/{fd}", error.errno) from None

    def info(self, fd: int) -> bytes:
        """The content of ``fdinfo/FD``."""
        try:
            opened = os.open(str(fd), os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.infos)
            try:
                content = os.read(opened, _PIECE)
                # The kernel gives all of it, or as much as fits.
                while len(content) % _PIECE == 0 and (piece := os.read(opened, _PIECE)):
                    content += piece
            finally:
                os.close(opened)
        except OSError as error:
            raise refused(f"reading /proc/{self.pid}/fdinfo/{fd}", error.errno) from None
        return content


def fdinfo_lines(pid: int, fd: int) -> list[str]:
    """The lines of ``fdinfo/FD``."""
    return read(pid, f"fdinfo/{fd}").decode(errors="surrogateescape").splitlines()


def fdinfo(pid: int, fd: int) -> dict[str, str]:
    """The fields of ``fdinfo/FD``; of a field that repeats, the first."""
    found: dict[str, str] = {}
    for line in fdinfo_lines(pid, fd):
        key, _, value = line.partition(":")
        found.setdefault(key, value.strip())
    return found


def most_descriptors() -> int:
    """How many descriptors a process can have, whatever its limits (fs.nr_open)."""
    with open("/proc/sys/fs/nr_open") as stream:
        return int(stream.read())


def mount_ids(pid: int) -> set[int]:
    """The ids of the mounts that the process sees, as fdinfo names them."""
    return {int(line.split(b" ", 1)[0]) for line in read(pid, "mountinfo").splitlines()}


def mountpoints(pid: int, device: tuple[int, int]) -> list[str]:
    """Where the filesystem with this device number is mounted, as the process sees it."""
    found = []
    for line in read(pid, "mountinfo").splitlines():
        fields = line.split(b" ")
        if fields[2] == b"%d:%d" % device:
            found.append(_mounted_at(fields[4]))
    return found


def mountpoint(pid: int, mount: int) -> str | None:
    """Where the mount of this number is, as the process sees it; None where it does not."""
    for line in read(pid, "mountinfo").splitlines():
        fields = line.split(b" ")
        if int(fields[0]) == mount:
            return _mounted_at(fields[4])
    return None


def _mounted_at(path: bytes) -> str:
    return _MOUNT_ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), path).decode(errors="surrogateescape")


_MOUNT_ESCAPE = re.compile(rb"\\([0-7]{3})")


def for_each_vma(pid: int) -> Iterator[MapsLine]:
    """The vmas by address, without their flags."""
    return parse_maps(read(pid, "maps"))


def parse_maps(content: bytes) -> Iterator[MapsLine]:
    """The vmas by address, without their flags; from ``maps``."""
    return (_vma(*match.groups()) for match in _MAPS.finditer(content))


def maps_in_smaps(content: bytes) -> bytes:
    """What ``maps`` has said when it had the same content as ``smaps``."""
    return b"".join(_MAPS_LINES.findall(content))


def layout_in_smaps(content: bytes) -> list[bytes]:
    """All that ``smaps`` says but how many pages there are, to be compared."""
    # By hand, for a pattern takes longer than the kernel for the whole file: from the end of what is said of a mapping
    # to the beginning of what is said of the next one.
    parts = content.split(b"\nSize:")
    return [parts[0], *(part[_first(part, b"\nProtectionKey:", b"\nVmFlags:") :] for part in parts[1:])]


def _first(content: bytes, *words: bytes) -> int:
    """Where the first of these that there is begins."""
    return next((place for place in map(content.find, words) if place >= 0), 0)


def parse_smaps(content: bytes) -> Iterator[MapsLine]:
    """The vmas by address, with flags; from ``smaps``, for which the kernel walks the page tables."""
    return (_vma(*match.groups()) for match in _SMAPS.finditer(content))


def _vma(
    start: bytes,
    end: bytes,
    permissions: bytes,
    offset: bytes,
    major: bytes,
    minor: bytes,
    inode: bytes,
    name: bytes,
    key: bytes | None = None,
    flags: bytes = b"",
) -> MapsLine:
    return MapsLine(
        start=int(start, 16),
        end=int(end, 16),
        permissions=_text(permissions),
        offset=int(offset, 16),
        device=(int(major, 16), int(minor, 16)),
        inode=int(inode),
        name=_unescaped(name),
        flags=_words(flags),
        protection_key=int(key or b"0"),
    )


_MAPS_LINES = re.compile(rb"^[0-9a-f]+-[^\n]*\n", re.MULTILINE)
_SMAPS = re.compile(
    rb"^" + _MAPS.pattern + rb"\n(?:[A-Z][^\n]*\n)*?(?:ProtectionKey: *(\d+)\n)?VmFlags: ([^\n]*)$", re.MULTILINE
)


@functools.cache
def _text(permissions: bytes) -> str:
    return permissions.decode()


@functools.cache
def _words(flags: bytes) -> frozenset[str]:
    return frozenset(flags.decode().split())


def _unescaped(name: bytes) -> str:
    """A path of maps, in which the kernel writes only the newline as an octal escape, and a backslash as it is."""
    return name.replace(rb"\012", b"\n").decode(errors="surrogateescape")
