"""What sockets show to another process, all at once; and connections that are taken apart by it, and go on."""

import contextlib
import ctypes
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from postcopy import roles
from postcopy.dump_side import network, socket_looks
from postcopy.dump_side.capture import Capture
from postcopy.dump_side.choices import MOVED, Choices
from postcopy.dump_side.socket_looks import Shown
from postcopy.dump_side.socket_shares import Share, divide
from postcopy.dump_side.survey import survey
from postcopy.errors import DumpError
from postcopy.kernel import procfs, socket_look, socket_options, tcp_repair
from postcopy.kernel.socket_options import SO_PEEK_OFF, SOL_SOCKET
from postcopy.kernel.tcp_repair import Apart
from postcopy.reporting import Silent

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="taking descriptors and TCP_REPAIR need root")

Ends = tuple[socket.socket, socket.socket]
# struct sock_fprog with one instruction, BPF_RET | BPF_K.
_ACCEPT = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0xFFFF))
ACCEPT_ALL = struct.pack("=HxxxxxxQ", 1, ctypes.addressof(_ACCEPT))


def connected(family: int = socket.AF_INET) -> Ends:
    """A TCP connection within this host."""
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family) as listener:
        listener.bind((host, 0))
        listener.listen()
        one = socket.create_connection(listener.getsockname()[:2])
        return one, listener.accept()[0]


@contextlib.contextmanager
def holding() -> Iterator[int]:
    """A process that has all that we have open; its PID."""
    pid = os.fork()
    if not pid:
        signal.pause()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def shown(pid: int, locked: Collection[socket.socket] = ()) -> dict[int, Shown]:
    """What the sockets of a process show, by descriptor."""
    share = Share({pid: procfs.descriptors(pid)}, frozenset(os.fstat(own.fileno()).st_ino for own in locked))
    return {seen[0]: socket_looks.shown(seen) for seen in socket_looks.look(pid, share, set(map(names, locked)))}


def names(own: socket.socket) -> tuple[bytes, bytes]:
    """How a connection is called."""
    told = socket_look.look(own)
    return told.local, told.remote


KINDS = [
    (socket.AF_INET, socket.SOCK_STREAM, 0),
    (socket.AF_INET6, socket.SOCK_STREAM, 0),
    (socket.AF_INET, socket.SOCK_DGRAM, 0),
    (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
    (socket.AF_UNIX, socket.SOCK_SEQPACKET, 0),
    (socket.AF_NETLINK, socket.SOCK_RAW, 0),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind[0].name}-{kind[1].name}")
def test_all_is_told_that_can_be_asked_one_by_one(kind: tuple[int, int, int]) -> None:
    with socket.socket(*kind) as own:
        own.setsockopt(SOL_SOCKET, socket.SO_RCVBUF, 12345)
        own.setsockopt(SOL_SOCKET, socket.SO_PRIORITY, 3)
        own.setsockopt(SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        told = socket_look.look(own)
        protocol = own.getsockopt(SOL_SOCKET, socket_options.SO_PROTOCOL)
        assert told.kind == (own.family, own.type, protocol)
        with socket.socket(fileno=os.dup(own.fileno())) as again:
            assert told.values == socket_options.values(again)
        assert not told.has_filter and not told.is_filter_locked
        assert bool(told.info) == (protocol == socket.IPPROTO_TCP)
        assert (told.remote, told.peek_offset) == (b"", -1)
        own.setsockopt(SOL_SOCKET, socket_options.SO_ATTACH_FILTER, ACCEPT_ALL)
        own.setsockopt(SOL_SOCKET, socket_options.SO_LOCK_FILTER, 1)
        assert socket_look.look(own).filter_length == 1
        assert socket_look.look(own).is_filter_locked


def test_a_process_shows_its_sockets_and_nothing_else(tmp_path: Path) -> None:
    one, other = connected()
    path = tmp_path / "name"
    with one, other, socket.socket(socket.AF_UNIX) as unix, (tmp_path / "file").open("wb") as file:
        unix.bind(str(path))
        one.setblocking(False)
        os.set_inheritable(other.fileno(), True)
        fcntl.fcntl(one, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(one, fcntl.F_SETSIG, signal.SIGUSR1)
        named = os.open(path, os.O_PATH)
        with holding() as pid:
            found = shown(pid)
            assert {one.fileno(), other.fileno(), unix.fileno()} <= found.keys()
            assert not {file.fileno(), named} & found.keys()
            for own in (one, other, unix):
                look, status = found[own.fileno()], os.fstat(own.fileno())
                assert look.info == procfs.read(pid, f"fdinfo/{own.fileno()}")
                assert look.status[:7] == status[:7]
                told = socket_look.look(own)
                assert (look.told.kind, look.told.values) == (told.kind, told.values)
                assert (look.told.local, look.told.remote) == (told.local, told.remote)
                assert look.told.info[:1] == told.info[:1]
                assert look.apart is None
            first, second = found[one.fileno()], found[other.fileno()]
            assert (first.signal, first.owner_kind, first.owner) == (signal.SIGUSR1, 1, os.getpid())
            assert (second.signal, second.owner) == (0, 0)
        os.close(named)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("peek_offset", [-1, 3])
@pytest.mark.parametrize("length", [0, 5, 2048, 100_000])
def test_connections_that_are_locked_are_taken_apart_and_go_on(family: int, peek_offset: int, length: int) -> None:
    one, other = connected(family)
    content = os.urandom(length)
    with one, other:
        one.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if peek_offset >= 0:
            one.setsockopt(SOL_SOCKET, SO_PEEK_OFF, peek_offset)
        other.sendall(content)
        while tcp_repair.unread(one) < length:
            pass
        with holding() as pid:
            found = shown(pid, {one})
            assert found[other.fileno()].apart is None
            apart = found[one.fileno()].apart
            assert apart is not None
            assert (apart.received, apart.written, apart.unread) == (content, b"", length)
            assert (apart.unacknowledged, apart.unsent, apart.reads_no_more) == (0, 0, False)
            assert len(apart.window) == 20
        assert not tcp_repair.is_repairing(one)
        assert one.getsockopt(SOL_SOCKET, socket.SO_REUSEADDR) == 1
        assert one.getsockopt(SOL_SOCKET, SO_PEEK_OFF) == peek_offset
        one.setsockopt(SOL_SOCKET, SO_PEEK_OFF, -1)
        one.sendall(b"answer")
        assert other.recv(6, socket.MSG_WAITALL) == b"answer"
        assert one.recv(length, socket.MSG_WAITALL) == content if length else True


def test_what_the_peer_has_not_acknowledged_is_among_what_is_taken() -> None:
    one, other = connected()
    with one, other:
        one.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += one.send(b"abcdefgh" * 1024)
        with holding() as pid:
            apart = shown(pid, {one})[one.fileno()].apart
        assert isinstance(apart, Apart)
        assert 0 < apart.unsent <= apart.unacknowledged == len(apart.written)
        received = b""
        while len(received) < sent:
            received += other.recv(1 << 20)
        assert received == b"abcdefgh" * (sent // 8)
        assert received.endswith(apart.written)


def test_connections_go_on_when_who_takes_them_apart_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    us, pairs = os.getpid(), [connected() for _ in range(40)]
    pid = os.fork()
    if not pid:
        # What else is open here is other tests' business.
        roles.close_all_but(other.fileno() for _, other in pairs)
        signal.pause()
    for _, other in pairs:
        other.close()

    def dies(repair: tcp_repair.Repair, fd: int, lengths: tuple[int, int]) -> tuple[bytes, bytes]:
        if os.getpid() != us:
            os.kill(os.getpid(), signal.SIGKILL)
        return give_back(repair, fd, lengths)

    give_back = tcp_repair.Repair._give_back
    monkeypatch.setattr(tcp_repair.Repair, "_give_back", dies)
    # What else the process has is not the point here.
    monkeypatch.setattr("postcopy.dump_side.pipes.holder_outside", lambda *_: None)
    monkeypatch.setattr("postcopy.dump_side.inet_sockets.check_loops", lambda *_: None)
    try:
        choices = Choices(connections=MOVED, network_lock="skip")
        _, trusted = survey(pid, choices)
        with pytest.raises(DumpError, match="cannot be looked at"), Capture(pid, trusted, Silent(), choices) as capture:
            capture.take()
        assert procfs.stat(pid)[3] == "S"
        repairing = [tcp_repair.is_repairing(own) for own in network._tcp_sockets([pid])]
        assert repairing == [False] * 40
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for one, _ in pairs:
            one.close()


def test_a_connection_is_taken_apart_once_however_many_descriptors_it_has() -> None:
    one, other = connected()
    with one, other, one.dup() as again, holding() as pid:
        found = shown(pid, {one})
        first, second = sorted((one.fileno(), again.fileno()))
        assert isinstance(found[first].apart, Apart)
        assert found[second].apart is None


def test_no_connection_is_taken_apart_by_two_processes() -> None:
    # A dup in the other one's share, one in the same share, one in another process that has many, or few.
    many = {1: {fd: 1000 + fd for fd in range(100)}, 2: {fd: 2000 + fd for fd in range(40)}, 3: {7: 1005, 8: 3008}}
    many[1] |= {90: 1010, 31: 1020}
    many[2] |= {39: 1099, 38: 1000, 37: 1040}
    division = divide(many, frozenset())
    ours, theirs = division.ours, division.theirs
    for pid in (1, 2):
        assert ours.descriptors[pid] + theirs.descriptors[pid] == sorted(many[pid])
    assert 3 not in {*ours.descriptors, *theirs.descriptors}
    holders: dict[int, set[object]] = {}
    for pid, inodes in many.items():
        for fd, inode in inodes.items():
            share = next((each for each in (ours, theirs) if fd in each.descriptors.get(pid, ())), None)
            holders.setdefault(inode, set()).add(id(share) if share else None)
    assert ours.connections == {inode for inode, found in holders.items() if found == {id(ours)}}
    assert theirs.connections == {inode for inode, found in holders.items() if found == {id(theirs)}}
    assert not {1005, 1010, 1000, 3008} & (ours.connections | theirs.connections)
    assert {1020} <= ours.connections and {1099, 1040} <= theirs.connections
