"""One open descriptor as ``/proc`` shows it, and the table that the kinds of descriptors fill."""

import contextlib
import functools
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from socket import SocketType

from msgspec import Struct, field, structs

from postcopy.dump_side import socket_looks
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.shared_memory import DELETED, Key, SharedObjects
from postcopy.dump_side.smaps import Known
from postcopy.kernel import pidfd, procfs, sock_diag
from postcopy.open_kinds import Inotify
from postcopy.socket_kinds import SocketOption, UnixName
from postcopy.state import Description, Descriptors, Draft, FileIdentity, Slot

#: Keeps a TCP socket of a process silent, by its local and its remote address; whether it may have spoken until then.
Silence = Callable[[int, bytes, bytes], bool]

O_PATH = 0o10000000
FASYNC = 0o20000
# What open(2) does not take again, or takes by other means.
_NOT_OPENED_WITH = os.O_CLOEXEC | FASYNC


class Refused(Exception):
    """This descriptor cannot be moved; the text says why and what to do."""


class Remembered(Struct, frozen=True):
    """A file that has its name, as an earlier look has found it open.

    ``info``: its fdinfo; ``stat``: of the file at ``path``; ``description``: what it was found to be, ``needed``: what
    the destination must have for it.
    """

    path: str
    info: bytes
    stat: os.stat_result
    likeness: tuple[str, int, int]
    close_on_exec: bool
    description: Description
    needed: FileIdentity | None

    def still(self, info: bytes) -> bool:
        """Whether all of it is as it was, if its fdinfo is ``info`` now."""
        if info != self.info:
            return False
        try:
            found = os.lstat(self.path)
        except OSError:
            return False
        was = self.stat
        same = found.st_ino == was.st_ino and found.st_dev == was.st_dev and found.st_size == was.st_size
        # Of a file that is read alone, the build counts as well.
        return same and (found.st_ctime_ns == was.st_ctime_ns or self.needed is None or self.needed.changing)


class Opened(Struct, frozen=True, dict=True):
    """A descriptor: ``link`` is where ``/proc/PID/fd/FD`` points, ``flags`` the status flags as open(2) takes them.

    ``asynchronous``: O_ASYNC; ``info``: the lines of its fdinfo. ``process``: a pidfd, if one is at hand.
    ``is_named``: the file has just been found at ``link``. ``shown``: what it shows, if it was asked for.
    """

    pid: int
    fd: int
    link: str
    stat: os.stat_result
    flags: int
    close_on_exec: bool
    asynchronous: bool
    position: int
    info: tuple[str, ...]
    process: int = -1
    is_named: bool = False
    shown: socket_looks.Shown | None = None

    @classmethod
    def look(
        cls,
        pid: int,
        fd: int,
        entries: procfs.Entries | None = None,
        info: bytes | None = None,
        known: Remembered | None = None,
    ) -> "Opened":
        """Read all of it; ``entries`` of the process and ``info``, its fdinfo, where they are at hand. Where an earlier
        look has found it (``known``), it is looked for first. Raises OSError.
        """
        if entries is None:
            with contextlib.closing(procfs.Entries(pid)) as own:
                return structs.replace(cls.look(pid, fd, own), process=-1)
        lines = (entries.info(fd) if info is None else info).decode(errors="surrogateescape").splitlines()
        # The first two lines are those of every kind (fs/proc/fd.c).
        flags = int(lines[1].partition(":")[2], 8)
        found = _still_there(known, lines) if known is not None else None
        status = found or entries.stat(fd)
        if known is not None and found is not None:
            link = known.path
        elif stat.S_ISSOCK(status.st_mode) and not flags & O_PATH:
            link = f"socket:[{status.st_ino}]"
        else:
            link = entries.link(fd)
        return cls._of(pid, fd, link, status, lines, entries.process, found is not None)

    @classmethod
    def of_socket(cls, pid: int, fd: int, shown: socket_looks.Shown, process: int) -> "Opened":
        """What has been seen of a socket."""
        lines = shown.info.decode(errors="surrogateescape").splitlines()
        return cls._of(pid, fd, f"socket:[{shown.status.st_ino}]", shown.status, lines, process, False, shown)

    @classmethod
    def _of(
        cls,
        pid: int,
        fd: int,
        link: str,
        status: os.stat_result,
        lines: Sequence[str],
        process: int,
        is_named: bool,
        shown: socket_looks.Shown | None = None,
    ) -> "Opened":
        flags = int(lines[1].partition(":")[2], 8)
        return cls(
            pid=pid,
            fd=fd,
            link=link,
            stat=status,
            flags=flags & ~_NOT_OPENED_WITH,
            close_on_exec=bool(flags & os.O_CLOEXEC),
            asynchronous=bool(flags & FASYNC),
            position=int(lines[0].partition(":")[2]),
            info=tuple(lines),
            process=process,
            is_named=is_named,
            shown=shown,
        )

    def remembered(self, description: Description, needed: FileIdentity | None) -> Remembered | None:
        """For a later look; None where that must look anew."""
        file = description.file
        # Of others an owner (F_SETOWN) may be told by nothing that can be seen.
        if file is None or file.kind not in ("regular", "directory", "path") or file.path != self.link:
            return None
        if self.asynchronous or not _tells_inode(self.info) or any(line.startswith("lock:") for line in self.info):
            return None
        info = "".join(f"{line}\n" for line in self.info).encode(errors="surrogateescape")
        return Remembered(self.link, info, self.stat, self.likeness, self.close_on_exec, description, needed)

    def field(self, name: str) -> str | None:
        """A field of the fdinfo."""
        return next((line.partition(":")[2].strip() for line in self.info if line.startswith(f"{name}:")), None)

    @functools.cached_property
    def own(self) -> int:
        """A descriptor of ours of the same open file description, until `close`."""
        if self.process >= 0:
            return pidfd.getfd(self.process, self.fd)
        process = pidfd.of_task(self.pid)
        try:
            return pidfd.getfd(process, self.fd)
        finally:
            os.close(process)

    @functools.cached_property
    def sock(self) -> SocketType:
        """The same as a socket, which it must be."""
        # Where its kind is not known, it is asked for.
        return SocketType(*(self.shown.told.kind if self.shown is not None else (-1, -1, -1)), fileno=self.own)

    def close(self) -> None:
        """Give back what `own` and `sock` are."""
        sock = self.__dict__.pop("sock", None)
        if sock is not None:
            sock.detach()
        own = self.__dict__.pop("own", None)
        if own is not None:
            os.close(own)

    @contextlib.contextmanager
    def duplicate(self) -> Iterator[int]:
        """A descriptor of ours of the same open file description, for a while."""
        kept = "own" in self.__dict__
        try:
            yield self.own
        finally:
            if not kept:
                self.close()

    @property
    def mode(self) -> int:
        """The type of the file behind it (S_IFMT)."""
        return stat.S_IFMT(self.stat.st_mode)

    @property
    def likeness(self) -> tuple[str, int, int]:
        """What is the same where two descriptors are one open file description."""
        place = " ".join(self.info[2:4]) if self.link.startswith("/") and _tells_inode(self.info) else self.link
        return place, self.flags, self.position


def _tells_inode(info: Sequence[str]) -> bool:
    """Whether the fourth line of fdinfo is the inode, as since Linux 5.14."""
    return len(info) > 3 and info[3].startswith("ino:")


def _still_there(known: Remembered, lines: Sequence[str]) -> os.stat_result | None:
    """The status of the file at the path where it was, if it is the one that is open: an open inode has no other."""
    if " ".join(lines[2:4]) != known.likeness[0]:
        return None
    with contextlib.suppress(OSError):
        found = os.lstat(known.path)
        if found.st_dev == known.stat.st_dev and found.st_ino == int(lines[3].partition(":")[2]):
            return found
    return None


class Trusted(Struct, frozen=True):
    """What an earlier look has not found outside of the tree, for looking takes long: pipes and sockets (by inode),
    memory. ``ranks``, ``remembered``: see `Table`. ``known``: the mappings of each process as they were; ``draft``:
    what has been seen of the tree; ``sockets``: of each process those descriptors that are sockets, with their inodes;
    ``orders``: see `lineage.Sharing`."""

    pipes: frozenset[int] = frozenset()
    memory: frozenset[Key] = frozenset()
    ranks: Mapping[tuple[int, int], int] = {}
    known: Mapping[int, Known] = {}
    remembered: Mapping[tuple[int, int], Remembered] = {}
    draft: Draft = field(default_factory=Draft)
    sockets: Mapping[int, Mapping[int, int]] = {}
    orders: Mapping[int, Sequence[int]] = {}


class Table(Struct, dict=True):
    """What is found while the descriptor tables of a tree are collected.

    ``pids``: the processes of the tree; ``pid``: the one whose table is being collected. ``frozen``: contents are read,
    too. ``shared``: the memory of memfds; ``trusted_pipes``: see `Trusted`.
    ``holders``: for what other processes have open, by its link, one of them; once it has been looked for.
    ``pipe_numbers``, ``queue_numbers``: pipes and message queues by inode. ``ghost_numbers``: files without a name by
    device and inode. ``alike``: descriptors that may share a description, by what they show, each as (process,
    descriptor, number of its description), as kcmp orders. ``ranks``: for a process and a descriptor, its place among
    those like it as an earlier look has found it; so most of the comparing is saved. ``slots``: the tables, by process.
    ``carrying``: sockets (by inode) in which descriptors are on their way; ``received``: duplicates of these, ours.
    ``remembered``: a process's descriptors as an earlier look has found them; ``found``: the same of this one.
    ``reused``: which descriptions are those of the earlier look, by their id. ``identities``: by the number of a file's
    description, what the destination must have for it.
    ``watched_ghosts``: inotify instances with watches of what has no name: of each its device and inode.
    ``has_lent_terminal``: whether restore is to lend its own. ``sockets``: in which process each was found, by inode;
    ``silence``: is told of those that speak TCP; ``loops``: the ends of TCP connections within this host.
    ``asked``: by process, what its sockets show; ``theirs``: the sockets (by inode) that another process of ours looks
    at meanwhile; ``foreseen``: by process, descriptors of which part was seen before the freeze. ``level``: see
    `pid_namespaces.level`.
    """

    pids: frozenset[int]
    shared: SharedObjects
    trusted_pipes: frozenset[int] = frozenset()
    choices: Choices = field(default_factory=Choices)
    frozen: bool = False
    pid: int = 0
    level: int = -1
    slots: dict[int, list[Slot]] = {}
    descriptors: Descriptors = field(default_factory=lambda: Descriptors([], []))
    pipe_numbers: dict[int, int] = {}
    queue_numbers: dict[int, int] = {}
    ghost_numbers: dict[tuple[int, int], int] = {}
    watched_ghosts: list[tuple[Inotify, dict[int, tuple[int, int]]]] = []
    masters: dict[int, tuple[int, int]] | None = None
    pty_numbers: dict[int, int] = {}
    has_lent_terminal: bool = False
    external: list[str] = []
    build_ids: dict[str, bytes] = {}
    needed: list[FileIdentity] = []
    holders: dict[str, int] | None = None
    ranks: Mapping[tuple[int, int], int] = {}
    remembered: Mapping[tuple[int, int], Remembered] = {}
    found: dict[tuple[int, int], Remembered] = {}
    reused: set[int] = set()
    identities: dict[int, FileIdentity | None] = {}
    sockets: dict[int, int] = {}
    silence: Silence | None = None
    loops: list[tuple[bytes, bytes]] = []
    socket_defaults: dict[tuple[int, int, int], dict[tuple[int, int], bytes]] = {}
    socket_options: dict[tuple[object, object], list[SocketOption]] = {}
    asked: dict[int, Iterator[socket_looks.Seen]] = {}
    theirs: frozenset[int] = frozenset()
    foreseen: dict[int, list[int]] = {}
    carrying: list[int] = []
    received: list[int] = []
    unix_names: list[UnixName] = []
    _unix: dict[int, sock_diag.UnixDiag] = {}
    _unix_waiting: dict[int, int] = {}
    _packet: dict[int, sock_diag.PacketDiag] = {}
    _mapped: set[Key] | None = None
    alike: dict[tuple[str, int, int], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def close(self) -> None:
        """Give back the descriptors that have been received by looking."""
        while self.received:
            os.close(self.received.pop())

    def shown_by_sockets(self) -> Callable[[int], socket_looks.Shown | None]:
        """What gives what is shown by a descriptor of the process whose table is being collected, if it is that of a
        socket and they were asked for. To be called with the numbers in their order."""
        ahead: list[socket_looks.Seen] = []

        def shown(fd: int) -> socket_looks.Shown | None:
            if not ahead:
                ahead.extend(islice(self.asked.get(self.pid, ()), 1))
            return socket_looks.shown(ahead.pop()) if ahead and ahead[0][0] == fd else None

        return shown

    def all_shown(self) -> None:
        """Wait until all that was asked for is there: nobody else takes connections apart any more."""
        self.asked = {pid: iter(list(found)) for pid, found in self.asked.items()}
        self.theirs = frozenset()

    def found_sockets(self) -> dict[int, dict[int, int]]:
        """Of each process those of its descriptors that are sockets, with their inodes."""
        inodes: dict[int, int] = {}
        for number, one in enumerate(self.descriptors.descriptions):
            kind = one.inet or one.unix or one.netlink or one.packet
            if kind is not None:
                inodes[number] = kind.socket.inode
        return {
            pid: {slot.fd: inodes[slot.description] for slot in slots if slot.description in inodes}
            for pid, slots in self.slots.items()
        }

    def asked_no_more(self, pid: int) -> None:
        """The table of that process has been collected: what it has been asked for and nobody wants is left."""
        for _ in self.asked.pop(pid, ()):
            pass

    def unix_diag(self, inode: int) -> sock_diag.UnixDiag | None:
        """What the kernel says of a Unix socket; None where there is none in this network namespace."""
        if inode not in self._unix:
            self._unix = sock_diag.unix_sockets()
            self._unix_waiting = {each: diag.inode for diag in self._unix.values() for each in diag.waiting}
        return self._unix.get(inode)

    def forget_unix(self) -> None:
        """Have the kernel asked again: a running program goes on."""
        self._unix.clear()
        self._unix_waiting.clear()

    def unix_waiting_at(self, inode: int) -> int:
        """The inode of the listening Unix socket that has not accepted the connection of this one yet; 0: none."""
        return self._unix_waiting.get(inode, 0)

    def packet_diag(self, inode: int) -> sock_diag.PacketDiag | None:
        """What the kernel says of a packet socket; None where there is none in this network namespace."""
        if inode not in self._packet:
            self._packet = sock_diag.packet_sockets()
        return self._packet.get(inode)

    @functools.cached_property
    def listening_files(self) -> set[tuple[int, int] | None]:
        """The files (`UnixDiag.vfs`) of all Unix sockets that listen."""
        return {diag.vfs for diag in self._unix.values() if diag.listening}

    def found_ranks(self) -> dict[tuple[int, int], int]:
        """The `ranks` for a later look."""
        places = {number: place for among in self.alike.values() for place, (_, _, number) in enumerate(among)}
        slots = ((pid, slot) for pid, slots in self.slots.items() for slot in slots)
        return {(pid, slot.fd): places[slot.description] for pid, slot in slots if slot.description in places}

    def holder_of(self, tid: int) -> int | None:
        """The process of the tree that has this thread."""
        for pid in self.pids:
            with contextlib.suppress(OSError):
                if tid in procfs.tids(pid):
                    return pid
        return None

    def mapped_without_name(self) -> set[Key]:
        """The deleted files that processes of the tree map; looked for once."""
        if self._mapped is None:
            self._mapped = set()
            for pid in self.pids:
                # One that has ended meanwhile maps nothing.
                with contextlib.suppress(OSError):
                    self._mapped |= _mapped_without_name(pid)
        return self._mapped

    def first_holders(self) -> dict[int, tuple[int, int]]:
        """A process and a descriptor of each description: those that will make it again."""
        found: dict[int, tuple[int, int]] = {}
        for pid, slots in self.slots.items():
            for slot in slots:
                found.setdefault(slot.description, (pid, slot.fd))
        return found


def _mapped_without_name(pid: int) -> set[Key]:
    """The deleted files that a process maps."""
    mapped = set()
    for line in procfs.for_each_vma(pid):
        if line.inode and line.name.endswith(DELETED):
            with contextlib.suppress(OSError):
                found = os.stat(f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}")
                mapped.add((found.st_dev, found.st_ino))
    return mapped


def common(table: Table, pid: int, tid: int | None = None) -> int:
    """The number of a process, or of its thread, in the common PID namespace (`postcopy.nesting`)."""
    return int(procfs.status(pid, tid)["NSpid"].split()[table.level])


def seen(table: Table, pid: int, tid: int | None = None) -> int:
    """What the process whose table is being collected calls a process or its thread; 0 where it cannot see it."""
    numbers, own = (procfs.status(*task)["NSpid"].split() for task in ((pid, tid), (table.pid, None)))
    return int(numbers[len(own) - 1]) if len(numbers) >= len(own) else 0
