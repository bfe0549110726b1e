"""Sockets of a frozen process, looked at from outside: all but what only the kinds of sockets know to ask for."""

import contextlib
import os
import resource
import struct
from collections.abc import Callable, Generator, Iterator, Mapping
from itertools import islice

import msgspec
from msgspec import Struct

from postcopy.kernel import locks, procfs, socket_look, tcp_repair
from postcopy.kernel.calls import call
from postcopy.kernel.own_calls import KEPT, OwnCalls
from postcopy.kernel.socket_look import F_GETOWN_EX, F_GETSIG, Told
from postcopy.kernel.socket_options import SO_DOMAIN, SO_PROTOCOL, SO_TYPE, SOL_SOCKET
from postcopy.kernel.tcp_repair import Apart

#: As it goes from one process of ours to another: descriptor, fdinfo, struct stat, delivery, kind, what it tells, how
#: it is taken apart, and whether part of this was foreseen.
Seen = tuple[int, bytes, bytes, bytes, bytes, socket_look.Answers, bytes, bool]
#: What of it only the program changes: status flags, delivery, and the first of `socket_look.Answers`.
OfProgram = tuple[int, bytes, bytes]

_INFO_ROOM, _PATH_ROOM = 1024, 16
_STAT = struct.Struct("=QQQIII4xQQ88x")
_KIND, _DELIVERY = struct.Struct("=iii"), struct.Struct("=qii")


class Shown(Struct, frozen=True):
    """``info``: its fdinfo; ``signal``, ``owner_kind``, ``owner``: F_GETSIG, F_GETOWN_EX (fcntl(2)). ``apart``: of a
    connection that is locked. ``foreseen``: what only the program changes is as it was before the freeze."""

    info: bytes
    status: os.stat_result
    signal: int
    owner_kind: int
    owner: int
    told: Told
    apart: Apart | None
    foreseen: bool


class Known(Struct, frozen=True):
    """What is known of a tree that runs: of its processes, by their faces, the descriptors of sockets with their
    inodes; and the connections that nothing more will come for once it is frozen, by their ends (struct sockaddr, local
    and remote)."""

    sockets: Mapping[int, Mapping[int, int]] = {}
    locked: frozenset[tuple[bytes, bytes]] = frozenset()

    @property
    def inodes(self) -> frozenset[int]:
        """Of all the sockets."""
        return frozenset(inode for inodes in self.sockets.values() for inode in inodes.values())


class Looks:
    """What the sockets of a tree show to a process of ours, which takes the connections apart.

    Most of it takes long, and only the program changes it: of connections it can be found out while the tree runs
    (`foresee`), and whether it still was so when the tree was frozen, while others work (`verify`).
    """

    def __init__(self, known: Known, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """``is_wanted``: asked before each connection is taken apart."""
        self._known, self._inodes, self._is_wanted = known, known.inodes, is_wanted
        self._taken = set[int]()
        self._foreseen: dict[tuple[int, int], _Foreseen] = {}

    def foresee(self) -> None:
        """Look at the connections of a tree that runs."""
        left = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2
        for pid, inodes in self._known.sockets.items():
            with contextlib.suppress(OSError), _Whole.of(pid) as whole:
                for fd in islice(inodes, left):
                    if (seen := whole.look(fd)) is None:
                        continue
                    _, info, status, _, kinds, answers, _, _ = seen
                    if self._is_locked(told(kinds, answers)) and b"lock:" not in info:
                        self._foreseen[pid, fd] = _Foreseen(_KIND.unpack(kinds), _inode(status), seen)
            left -= min(left, len(inodes))

    def look(self, pid: int) -> Generator[Seen, None, None]:
        """At the sockets of a frozen process that are known, in the order of their descriptors; each connection is
        taken apart once. What cannot be looked at so is left out. Raises OSError where there is no such process."""
        with _Whole.of(pid) as whole:
            for fd in sorted(self._known.sockets.get(pid, ())):
                if not self._is_wanted():
                    return
                seen = self._again(whole, pid, fd) or whole.look(fd)
                if seen is None:
                    continue
                # What it has made since belongs to who finds it.
                if (inode := _inode(seen[2])) in self._inodes and inode not in self._taken:
                    self._taken.add(inode)
                    fd, info, status, delivery, kinds, answers, _, foreseen = seen
                    apart = self._apart(whole.own, told(kinds, answers))
                    seen = fd, info, status, delivery, kinds, answers, apart, foreseen
                yield seen

    def _again(self, whole: "_Whole", pid: int, fd: int) -> Seen | None:
        """With what was foreseen, if it is the same socket."""
        if (known := self._foreseen.get((pid, fd))) is None:
            return None
        status, lively, own = whole.ask_again(fd, known.kind)
        if _inode(status) != known.inode:
            del self._foreseen[pid, fd]
            return None
        known.own = whole.keep()
        _, info, _, delivery, kinds, (steady, _, _), _, _ = known.seen
        return fd, info, status, delivery, kinds, (steady, lively, own), b"", True

    def _is_locked(self, told: Told) -> bool:
        """Whether it is a connection, and nothing more comes for it."""
        if (told.local, told.remote) not in self._known.locked:
            return False
        return tcp_repair.state_of_raw(told.info) in tcp_repair.SYNCHRONIZED

    def _apart(self, own: int, told: Told) -> bytes:
        """How a connection is taken apart."""
        if not self._is_locked(told):
            return b""
        try:
            return msgspec.msgpack.encode(tcp_repair.take_apart(own, told.peek_offset))
        except OSError:
            # Who is to say why asks once more.
            return b""

    def verify(self) -> Iterator[tuple[int, Seen, OfProgram]]:
        """What was foreseen and was otherwise, but for close-on-exec: of which process, what was foreseen, what is so.

        Raises OSError.
        """
        locked = locks.inodes()
        for (pid, _), known in self._foreseen.items():
            if known.own >= 0:
                found = socket_look.ask_of_program(known.own, known.kind)
                if known.inode in locked:
                    # No flags are like that.
                    yield pid, known.seen, (-1, *found[1:])
                elif found != of_program(known.seen):
                    yield pid, known.seen, found


class _Foreseen(Struct):
    """``own``: our descriptor of it, once it has been found again."""

    kind: socket_look.Kind
    inode: int
    seen: Seen
    own: int = -1


def of_program(seen: Seen) -> OfProgram:
    """What of it only the program changes."""
    _, info, _, delivery, _, (steady, _, _), _, _ = seen
    return int(info.split(b"\n", 2)[1].partition(b":")[2], 8) & ~os.O_CLOEXEC, delivery, steady


class _Whole:
    """Looks at all that a socket of one process shows. ``own``: our descriptor of the one looked at last."""

    def __init__(self, entries: procfs.Entries) -> None:
        self._entries, self.own, self._kept = entries, -1, False
        self._calls = calls = OwnCalls(4096)
        self._path, self._info = calls.place(bytes(_PATH_ROOM)), calls.room(_INFO_ROOM)
        self._status, self._kind, self._owner = calls.room(_STAT.size), calls.room(_KIND.size), calls.room(8)
        length = calls.place(struct.pack("=I", 4))
        calls.add(call("openat", entries.infos, self._path, os.O_RDONLY | os.O_CLOEXEC), keep=True)
        self._read = calls.add(call("read", KEPT, self._info, _INFO_ROOM))
        calls.add(call("close", KEPT))
        self._opened = calls.add(call("pidfd_getfd", entries.process, 0, 0), keep=True)
        calls.add(call("fstat", KEPT, self._status))
        self._asked = calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_DOMAIN, self._kind, length))
        calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_TYPE, self._kind + 4, length))
        calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_PROTOCOL, self._kind + 8, length))
        self._signal = calls.add(call("fcntl", KEPT, F_GETSIG))
        calls.add(call("fcntl", KEPT, F_GETOWN_EX, self._owner))

    @classmethod
    @contextlib.contextmanager
    def of(cls, pid: int) -> "Iterator[_Whole]":
        """For a while. Raises OSError where there is no such process."""
        with contextlib.closing(procfs.Entries(pid)) as entries:
            whole = cls(entries)
            try:
                yield whole
            finally:
                whole._close()

    def _close(self) -> None:
        if self.own >= 0 and not self._kept:
            os.close(self.own)
        self.own, self._kept = -1, False

    def keep(self) -> int:
        """``own``, which stays open for whoever asks for it."""
        self._kept = True
        return self.own

    def look(self, fd: int) -> Seen | None:
        """All but how it is taken apart; None for what cannot be looked at so."""
        self._close()
        calls = self._calls
        calls.write(self._path, b"%d\0" % fd)
        calls.change(self._opened, 2, fd)
        calls.make()
        self.own = calls.result(self._opened)
        size = calls.result(self._read)
        if self.own < 0 or calls.result(self._asked) or not 0 < size < _INFO_ROOM:
            return None
        kinds = calls.read(self._kind, _KIND.size)
        delivery = calls.results(self._signal, 1) + calls.read(self._owner, 8)
        answers, status = socket_look.ask(self.own, _KIND.unpack(kinds)), calls.read(self._status, _STAT.size)
        return fd, calls.read(self._info, size), status, delivery, kinds, answers, b"", False

    def ask_again(self, fd: int, kind: socket_look.Kind) -> tuple[bytes, bytes, bytes]:
        """As `socket_look.ask_again`: struct stat, and what changes by itself; of nothing where it is closed."""
        self._close()
        self.own, status, lively, told = socket_look.ask_again(self._entries.process, fd, kind)
        return status, lively, told


def _inode(status: bytes) -> int:
    return int.from_bytes(status[8:16], "little")


def told(kinds: bytes, answers: socket_look.Answers) -> Told:
    """What a socket of that kind, as in `Seen`, has told."""
    return socket_look.told(_KIND.unpack(kinds), answers)


def shown(seen: Seen) -> Shown:
    """What has been seen."""
    _, info, status, delivery, kinds, answers, apart, foreseen = seen
    device, inode, links, mode, user, group, _, size = _STAT.unpack(status)
    signal, owner_kind, owner = _DELIVERY.unpack(delivery)
    return Shown(
        info,
        os.stat_result((mode, inode, device, links, user, group, size, 0, 0, 0)),
        signal,
        owner_kind,
        owner,
        told(kinds, answers),
        msgspec.msgpack.decode(apart, type=Apart) if apart else None,
        foreseen,
    )
