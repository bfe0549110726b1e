"""One open descriptor as ``/proc`` shows it, and the table that the kinds of descriptors fill."""

import os
import stat
from collections import defaultdict
from dataclasses import dataclass, field

from postcopy.dump_side.shared_memory import Key, SharedObjects
from postcopy.kernel import procfs
from postcopy.state import Description, FileIdentity, Pipe

# The status flags that open(2) takes again; the access mode is among them.
O_PATH = 0o10000000
_O_LARGEFILE = 0o100000
_FASYNC = 0o20000


class Refused(Exception):
    """This descriptor cannot be moved; the text says why and what to do."""


@dataclass(frozen=True)
class Opened:
    """A descriptor: ``link`` is where ``/proc/PID/fd/FD`` points, ``flags`` the status flags without close-on-exec."""

    pid: int
    fd: int
    link: str
    stat: os.stat_result
    flags: int
    close_on_exec: bool
    position: int

    @classmethod
    def look(cls, pid: int, fd: int) -> "Opened":
        """Read all of it. Raises Refused for what no kind could carry."""
        info = procfs.fdinfo(pid, fd)
        flags = int(info["flags"], 8)
        found = cls(
            pid=pid,
            fd=fd,
            link=procfs.link(pid, f"fd/{fd}"),
            stat=os.stat(f"/proc/{pid}/fd/{fd}"),
            flags=flags & ~(os.O_CLOEXEC | _O_LARGEFILE),
            close_on_exec=bool(flags & os.O_CLOEXEC),
            position=int(info["pos"]),
        )
        if "lock" in info:
            raise Refused(f"{found.link}: file locks and leases cannot be moved yet")
        if flags & _FASYNC:
            raise Refused(f"{found.link}: signal-driven I/O (O_ASYNC) cannot be moved yet")
        return found

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
    """What an earlier look has not found outside of the tree, for looking takes long: pipes (inodes), memory."""

    pipes: frozenset[int] = frozenset()
    memory: frozenset[Key] = frozenset()


@dataclass
class Table:
    """What is found while the descriptor tables of a tree are collected. ``pipe_numbers``: pipes by inode.

    ``pids``: the processes of the tree; ``pid``: the one whose table is being collected.
    ``shared``: the memory of memfds; ``trusted_pipes``: see `Trusted`.
    ``holders``: for each pipe of another process, by its link, that process; once it has been looked for.
    ``alike``: descriptors that may share a description, by what they show, each as (process, descriptor, number of its
    description), as kcmp orders.
    """

    pids: frozenset[int]
    shared: SharedObjects
    trusted_pipes: frozenset[int] = frozenset()
    pid: int = 0
    descriptions: list[Description] = field(default_factory=list)
    pipes: list[Pipe] = field(default_factory=list)
    pipe_numbers: dict[int, int] = field(default_factory=dict)
    needed: list[FileIdentity] = field(default_factory=list)
    holders: dict[str, int] | None = None
    alike: dict[tuple[str, int, int], list[tuple[int, int, int]]] = field(default_factory=lambda: defaultdict(list))
