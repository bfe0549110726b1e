"""Sockets of a frozen process, looked at from outside: all but what only the kinds of sockets know to ask for."""

import contextlib
import fcntl
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
from postcopy.kernel.socket_look import F_GETOWN_EX, STAT, Told
from postcopy.kernel.socket_options import SO_DOMAIN, SO_PROTOCOL, SO_TYPE, SOL_SOCKET
from postcopy.kernel.tcp_repair import Apart

#: As it goes from one process of ours to another: descriptor, fdinfo, struct stat, delivery, kind, what it tells, how
#: it is taken apart, and whether part of this was foreseen.
Seen = tuple[int, bytes, bytes, bytes, bytes, socket_look.Answers, bytes, bool]

_INFO_ROOM, _PATH_ROOM = 1024, 16
# Some seconds, before the freeze.
_MOST_FORESEEN = 20_000
_KIND, _DELIVERY = struct.Struct("=iii"), struct.Struct("=qii")


class Shown(Struct, frozen=True):
    """``info``: its fdinfo; ``signal``, ``owner_kind``, ``owner``: F_GETSIG, F_GETOWN_EX (fcntl(2)). ``apart``: of a
    connection that is locked. ``foreseen``: options that only the program changes are as they were before the freeze,
    and close-on-exec is not told."""

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


class Otherwise(Struct, frozen=True):
    """A connection (by inode) that was not as foreseen: its kind and what it told, as in `Seen`; the first of
    `socket_look.Answers` as it is; and whether somebody has locked it (flock(2))."""

    inode: int
    kinds: bytes
    answers: socket_look.Answers
    steady: bytes
    is_locked: bool


class Looks:
    """What the sockets of a tree show to a process of ours, which takes the connections apart.

    Most of their options take long to ask for, and only the program changes them: those of connections can be found out
    while the tree runs (`foresee`), and whether they still were so when it was frozen, while others work (`verify`).
    """

    def __init__(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """``is_wanted``: asked before each connection is taken apart."""
        self._is_wanted = is_wanted
        self._known, self._inodes = Known(), frozenset[int]()
        self._taken = set[int]()
        self._foreseen: dict[int, _Foreseen] = {}

    def foresee(self, known: Known) -> None:
        """Look at the connections of a tree that runs, at some thousands at the most."""
        left = min(_MOST_FORESEEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        for pid, inodes in known.sockets.items():
            with contextlib.suppress(OSError), _Whole.of(pid) as whole:
                for fd, inode in islice(inodes.items(), left):
                    if inode not in self._foreseen and (seen := whole.look(fd)) is not None:
                        self._note(seen)
            left -= min(left, len(inodes))

    def _note(self, seen: Seen) -> None:
        _, info, status, _, kinds, answers, _, _ = seen
        if b"lock:" not in info and _is_connection(told(kinds, answers)):
            kind, inode = _KIND.unpack(kinds), _inode(status)
            self._foreseen[inode] = _Foreseen(kind, _file(status), info.split(b"\n", 2)[2], kinds, answers)

    def begin(self, known: Known) -> None:
        """The tree is about to be frozen; before `look`."""
        self._known, self._inodes = known, known.inodes

    def look(self, pid: int) -> Generator[Seen, None, None]:
        """At the sockets of a frozen process that are known, in the order of their descriptors; each connection is
        taken apart once. What cannot be looked at so is left out. Raises OSError where there is no such process."""
        with _Whole.of(pid) as whole:
            for fd, inode in sorted(self._known.sockets.get(pid, {}).items()):
                if not self._is_wanted():
                    return
                known = self._foreseen.get(inode)
                seen = (self._again(whole, fd, known) if known is not None else None) or whole.look(fd)
                if seen is None:
                    continue
                # What the program has made since belongs to who finds it.
                if (found := _inode(seen[2])) in self._inodes and found not in self._taken:
                    self._taken.add(found)
                    fd, info, status, delivery, kinds, answers, _, foreseen = seen
                    apart = self._apart(whole.own, told(kinds, answers))
                    seen = fd, info, status, delivery, kinds, answers, apart, foreseen
                yield seen

    def _again(self, whole: "_Whole", fd: int, known: "_Foreseen") -> Seen | None:
        """With what was foreseen, if it is that socket."""
        found = whole.look_again(fd, known.kind)
        if _file(found.status) != known.file:
            return None
        if known.own < 0:
            known.own = whole.keep()
        # As fdinfo shows them, but for close-on-exec, which this does not tell.
        info = b"pos:\t0\nflags:\t0%o\n" % found.flags + known.info
        answers = known.answers[0], found.lively, found.told
        return fd, info, found.status, found.delivery, known.kinds, answers, b"", True

    def _apart(self, own: int, told: Told) -> bytes:
        """How a connection is taken apart, if nothing more comes for it."""
        if not _is_connection(told) or (told.local, told.remote) not in self._known.locked:
            return b""
        try:
            return msgspec.msgpack.encode(tcp_repair.take_apart(own, told.peek_offset, told.unread))
        except OSError:
            # Who is to say why asks once more.
            return b""

    def verify(self) -> list[Otherwise]:
        """Of the connections that were foreseen, those that were otherwise. Raises OSError."""
        locked = locks.files()
        used = ((known, known.own) for known in self._foreseen.values() if known.own >= 0)
        found = [(known, socket_look.ask_steady(own, known.kind), known.file in locked) for known, own in used]
        return [
            Otherwise(known.file[1], known.kinds, known.answers, steady, is_locked)
            for known, steady, is_locked in found
            if is_locked or steady != known.answers[0]
        ]


class _Foreseen(Struct):
    """Of a connection. ``file``: device and inode; ``info``: its fdinfo from the third line on; ``own``: our
    descriptor, once it has been found again."""

    kind: socket_look.Kind
    file: tuple[int, int]
    info: bytes
    kinds: bytes
    answers: socket_look.Answers
    own: int = -1


def _is_connection(told: Told) -> bool:
    return tcp_repair.state_of_raw(told.info) in tcp_repair.SYNCHRONIZED


class _Whole:
    """Looks at all that a socket of one process shows. ``own``: our descriptor of the one looked at last."""

    def __init__(self, entries: procfs.Entries) -> None:
        self._entries, self.own, self._kept = entries, -1, False
        self._calls = calls = OwnCalls(4096)
        self._path, self._info = calls.place(bytes(_PATH_ROOM)), calls.room(_INFO_ROOM)
        self._status, self._kind, self._owner = calls.room(STAT.size), calls.room(_KIND.size), calls.room(8)
        length = calls.place(struct.pack("=I", 4))
        calls.add(call("openat", entries.infos, self._path, os.O_RDONLY | os.O_CLOEXEC), keep=True)
        self._read = calls.add(call("read", KEPT, self._info, _INFO_ROOM))
        calls.add(call("close", KEPT))
        self._opened = calls.add(call("pidfd_getfd", entries.process, 0, 0), keep=True)
        calls.add(call("fstat", KEPT, self._status))
        self._asked = calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_DOMAIN, self._kind, length))
        calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_TYPE, self._kind + 4, length))
        calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_PROTOCOL, self._kind + 8, length))
        self._signal = calls.add(call("fcntl", KEPT, fcntl.F_GETSIG))
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
        answers, status = socket_look.ask(self.own, _KIND.unpack(kinds)), calls.read(self._status, STAT.size)
        return fd, calls.read(self._info, size), status, delivery, kinds, answers, b"", False

    def look_again(self, fd: int, kind: socket_look.Kind) -> socket_look.Again:
        """As `socket_look.ask_again`; of nothing where it is closed."""
        self._close()
        again = socket_look.ask_again(self._entries.process, fd, kind)
        self.own = again.own
        return again


def _inode(status: bytes) -> int:
    return int.from_bytes(status[8:16], "little")


def _file(status: bytes) -> tuple[int, int]:
    return int.from_bytes(status[:8], "little"), _inode(status)


def told(kinds: bytes, answers: socket_look.Answers) -> Told:
    """What a socket of that kind, as in `Seen`, has told."""
    return socket_look.told(_KIND.unpack(kinds), answers)


def shown(seen: Seen) -> Shown:
    """What has been seen."""
    _, info, status, delivery, kinds, answers, apart, foreseen = seen
    device, inode, links, mode, user, group, _, size = STAT.unpack(status)
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
