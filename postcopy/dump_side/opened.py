"""One open descriptor as ``/proc`` shows it, and the table that the kinds of descriptors fill."""

import contextlib
import functools
import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from postcopy.dump_side.choices import Choices
from postcopy.dump_side.shared_memory import DELETED, Key, SharedObjects
from postcopy.dump_side.smaps import Known
from postcopy.kernel import pidfd, procfs, sock_diag
from postcopy.socket_kinds import UnixName
from postcopy.state import Descriptors, FileIdentity, Slot

O_PATH = 0o10000000
FASYNC = 0o20000
# What open(2) does not take again, or takes by other means.
_NOT_OPENED_WITH = os.O_CLOEXEC | FASYNC


class Refused(Exception):
    """This descriptor cannot be moved; the text says why and what to do."""


@dataclass(frozen=True)
class Opened:
    """A descriptor: ``link`` is where ``/proc/PID/fd/FD`` points, ``flags`` the status flags as open(2) takes them.

    ``asynchronous``: O_ASYNC; ``info``: the lines of its fdinfo.
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

    @classmethod
    def look(cls, pid: int, fd: int) -> "Opened":
        """Read all of it."""
        lines = procfs.fdinfo_lines(pid, fd)
        # The first two lines are those of every kind (fs/proc/fd.c).
        flags = int(lines[1].partition(":")[2], 8)
        return cls(
            pid=pid,
            fd=fd,
            link=procfs.link(pid, f"fd/{fd}"),
            stat=os.stat(f"/proc/{pid}/fd/{fd}"),
            flags=flags & ~_NOT_OPENED_WITH,
            close_on_exec=bool(flags & os.O_CLOEXEC),
            asynchronous=bool(flags & FASYNC),
            position=int(lines[0].partition(":")[2]),
            info=tuple(lines),
        )

    def field(self, name: str) -> str | None:
        """A field of the fdinfo."""
        return next((line.partition(":")[2].strip() for line in self.info if line.startswith(f"{name}:")), None)

    @contextlib.contextmanager
    def duplicate(self) -> Iterator[int]:
        """A descriptor of ours of the same open file description."""
        process = pidfd.of_task(self.pid)
        try:
            own = pidfd.getfd(process, self.fd)
        finally:
            os.close(process)
        try:
            yield own
        finally:
            os.close(own)

    @property
    def mode(self) -> int:
        """The type of the file behind it (S_IFMT)."""
        return stat.S_IFMT(self.stat.st_mode)

    @property
    def likeness(self) -> tuple[str, int, int]:
        """What is the same where two descriptors are one open file description."""
        return self.link, self.flags, self.position


@dataclass(frozen=True)
class Trusted:
    """What an earlier look has not found outside of the tree, for looking takes long: pipes and sockets (by inode),
    memory. ``ranks``: see `Table`. ``known``: the mappings of each process as they were."""

    pipes: frozenset[int] = frozenset()
    memory: frozenset[Key] = frozenset()
    ranks: Mapping[tuple[int, int], int] = field(default_factory=dict)
    known: Mapping[int, Known] = field(default_factory=dict)


@dataclass
class Table:
    """What is found while the descriptor tables of a tree are collected.

    ``pids``: the processes of the tree; ``pid``: the one whose table is being collected. ``frozen``: contents are read,
    too. ``shared``: the memory of memfds; ``trusted_pipes``: see `Trusted`.
    ``holders``: for what other processes have open, by its link, one of them; once it has been looked for.
    ``pipe_numbers``: pipes by inode. ``ghost_numbers``: files without a name by device and inode. ``alike``:
    descriptors that may share a description, by what they show, each as (process, descriptor, number of its
    description), as kcmp orders. ``ranks``: for a process and a descriptor, its place among those like it as an earlier
    look has found it; so most of the comparing is saved. ``slots``: the tables, by process.
    ``has_lent_terminal``: whether restore is to lend its own. ``sockets``: in which process each was found, by inode.
    ``level``: see `pid_namespaces.level`.
    """

    pids: frozenset[int]
    shared: SharedObjects
    trusted_pipes: frozenset[int] = frozenset()
    choices: Choices = field(default_factory=Choices)
    frozen: bool = False
    pid: int = 0
    level: int = -1
    slots: dict[int, list[Slot]] = field(default_factory=dict)
    descriptors: Descriptors = field(default_factory=lambda: Descriptors([], []))
    pipe_numbers: dict[int, int] = field(default_factory=dict)
    ghost_numbers: dict[tuple[int, int], int] = field(default_factory=dict)
    masters: dict[int, tuple[int, int]] | None = None
    pty_numbers: dict[int, int] = field(default_factory=dict)
    has_lent_terminal: bool = False
    external: list[str] = field(default_factory=list)
    build_ids: dict[str, bytes] = field(default_factory=dict)
    needed: list[FileIdentity] = field(default_factory=list)
    holders: dict[str, int] | None = None
    ranks: Mapping[tuple[int, int], int] = field(default_factory=dict)
    sockets: dict[int, int] = field(default_factory=dict)
    socket_defaults: dict[tuple[int, int, int], dict[tuple[int, int], bytes]] = field(default_factory=dict)
    unix_names: list[UnixName] = field(default_factory=list)
    _unix: dict[int, sock_diag.UnixDiag] = field(default_factory=dict)
    _mapped: set[Key] | None = None
    alike: dict[tuple[str, int, int], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))

    def unix_diag(self, inode: int) -> sock_diag.UnixDiag | None:
        """What the kernel says of a Unix socket; None where there is none in this network namespace."""
        if inode not in self._unix:
            self._unix = sock_diag.unix_sockets()
        return self._unix.get(inode)

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
                for line in procfs.for_each_vma(pid):
                    if line.inode and line.name.endswith(DELETED):
                        with contextlib.suppress(OSError):
                            found = os.stat(f"/proc/{pid}/map_files/{line.start:x}-{line.end:x}")
                            self._mapped.add((found.st_dev, found.st_ino))
        return self._mapped

    def first_holders(self) -> dict[int, tuple[int, int]]:
        """A process and a descriptor of each description: those that will make it again."""
        found: dict[int, tuple[int, int]] = {}
        for pid, slots in self.slots.items():
            for slot in slots:
                found.setdefault(slot.description, (pid, slot.fd))
        return found


def common(table: Table, pid: int, tid: int | None = None) -> int:
    """The number of a process, or of its thread, in the common PID namespace (`postcopy.nesting`)."""
    return int(procfs.status(pid, tid)["NSpid"].split()[table.level])


def seen(table: Table, pid: int, tid: int | None = None) -> int:
    """What the process whose table is being collected calls a process or its thread; 0 where it cannot see it."""
    numbers, own = (procfs.status(*task)["NSpid"].split() for task in ((pid, tid), (table.pid, None)))
    return int(numbers[len(own) - 1]) if len(numbers) >= len(own) else 0
