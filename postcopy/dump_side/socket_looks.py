"""Sockets of a frozen process, looked at from outside: all but what only the kinds of sockets know to ask for."""

import contextlib
import os
import struct
from collections.abc import Collection, Generator, Iterator

import msgspec
from msgspec import Struct

from postcopy.dump_side.socket_shares import Share
from postcopy.kernel import procfs, socket_look, tcp_repair
from postcopy.kernel.calls import call
from postcopy.kernel.own_calls import KEPT, OwnCalls
from postcopy.kernel.socket_look import Told
from postcopy.kernel.socket_options import SO_DOMAIN, SO_PROTOCOL, SO_TYPE, SOL_SOCKET
from postcopy.kernel.tcp_repair import Apart

#: As it goes from one process of ours to another: descriptor, fdinfo, struct stat, delivery, kind, what it tells, and
#: how it is taken apart.
Seen = tuple[int, bytes, bytes, bytes, bytes, socket_look.Answers, bytes]

_F_GETSIG, _F_GETOWN_EX = 11, 16
_INFO_ROOM, _PATH_ROOM = 1024, 16
_STAT = struct.Struct("=QQQIII4xQQ88x")
_KIND, _DELIVERY = struct.Struct("=iii"), struct.Struct("=qii")


class Shown(Struct, frozen=True):
    """``info``: its fdinfo; ``signal``, ``owner_kind``, ``owner``: F_GETSIG, F_GETOWN_EX (fcntl(2)). ``apart``: of a
    connection that is locked."""

    info: bytes
    status: os.stat_result
    signal: int
    owner_kind: int
    owner: int
    told: Told
    apart: Apart | None


def look(pid: int, share: Share, locked: Collection[tuple[bytes, bytes]]) -> Generator[Seen, None, None]:
    """At the sockets of a process that are in the share, in the order of their descriptors; connections that are
    ``locked`` are taken apart, once. What cannot be looked at so is left out. Raises OSError where there is no such
    process."""
    with contextlib.closing(procfs.Entries(pid)) as entries:
        yield from _look(entries, share, locked)


def _look(entries: procfs.Entries, share: Share, locked: Collection[tuple[bytes, bytes]]) -> Iterator[Seen]:
    calls = OwnCalls(4096)
    path, info, status = calls.place(bytes(_PATH_ROOM)), calls.room(_INFO_ROOM), calls.room(_STAT.size)
    kind, owner = calls.room(_KIND.size), calls.room(8)
    length = calls.place(struct.pack("=I", 4))
    calls.add(call("openat", entries.infos, path, os.O_RDONLY | os.O_CLOEXEC), keep=True)
    read = calls.add(call("read", KEPT, info, _INFO_ROOM))
    calls.add(call("close", KEPT))
    opened = calls.add(call("pidfd_getfd", entries.process, 0, 0), keep=True)
    calls.add(call("fstat", KEPT, status))
    asked = calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_DOMAIN, kind, length))
    calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_TYPE, kind + 4, length))
    calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_PROTOCOL, kind + 8, length))
    signal = calls.add(call("fcntl", KEPT, _F_GETSIG))
    calls.add(call("fcntl", KEPT, _F_GETOWN_EX, owner))
    connections, taken = share.connections if locked else frozenset(), set[int]()
    for fd in share.descriptors.get(entries.pid, ()):
        calls.write(path, b"%d\0" % fd)
        calls.change(opened, 2, fd)
        calls.make()
        own = calls.result(opened)
        if own < 0:
            continue
        try:
            size = calls.result(read)
            if calls.result(asked) or not 0 < size < _INFO_ROOM:
                continue
            answers = socket_look.ask(own, of_kind := _KIND.unpack(kinds := calls.read(kind, _KIND.size)))
            found, apart = calls.read(status, _STAT.size), b""
            if (inode := _inode(found)) in connections and inode not in taken:
                taken.add(inode)
                apart = _apart(own, socket_look.told(of_kind, answers), locked)
        finally:
            os.close(own)
        delivery = calls.results(signal, 1) + calls.read(owner, 8)
        yield fd, calls.read(info, size), found, delivery, kinds, answers, apart


def _inode(status: bytes) -> int:
    return int.from_bytes(status[8:16], "little")


def _apart(own: int, told: Told, locked: Collection[tuple[bytes, bytes]]) -> bytes:
    """How a connection is taken apart, if it is one and nothing more comes for it."""
    if (told.local, told.remote) not in locked or tcp_repair.of_raw(told.info).state not in tcp_repair.SYNCHRONIZED:
        return b""
    try:
        return msgspec.msgpack.encode(tcp_repair.take_apart(own, told.peek_offset))
    except OSError:
        # Who is to say why asks once more.
        return b""


def shown(seen: Seen) -> Shown:
    """What has been seen."""
    _, info, status, delivery, kind, told, apart = seen
    device, inode, links, mode, user, group, _, size = _STAT.unpack(status)
    signal, owner_kind, owner = _DELIVERY.unpack(delivery)
    return Shown(
        info,
        os.stat_result((mode, inode, device, links, user, group, size, 0, 0, 0)),
        signal,
        owner_kind,
        owner,
        socket_look.told(_KIND.unpack(kind), told),
        msgspec.msgpack.decode(apart, type=Apart) if apart else None,
    )
