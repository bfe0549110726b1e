"""What sockets show to another process, all at once; and connections that are taken apart by it, and go on."""

import contextlib
import ctypes
import fcntl
import itertools
import os
import signal
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from postcopy import roles
from postcopy.dump_side import network, socket_looks
from postcopy.dump_side.capture import Capture
from postcopy.dump_side.choices import MOVED, Choices
from postcopy.dump_side.looks import Looker
from postcopy.dump_side.socket_looks import Known, Looks, Shown
from postcopy.dump_side.survey import survey
from postcopy.errors import DumpError, RestoreError
from postcopy.kernel import procfs, socket_look, socket_options, tcp_repair
from postcopy.kernel.socket_options import SO_PEEK_OFF, SOL_SOCKET
from postcopy.kernel.tcp_repair import Apart
from postcopy.reporting import Silent
from postcopy.restore_side import socket_changes
from postcopy.socket_kinds import InetSocket, SocketChange, SocketOption
from tests.hosts import wait_until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="taking descriptors and TCP_REPAIR need root")

LOCKED = Choices(connections=MOVED, network_lock="skip")
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
    return {seen[0]: socket_looks.shown(seen) for seen in Looks(known(pid, locked)).look(pid)}


def known(pid: int, locked: Collection[socket.socket]) -> Known:
    """What is known of a process."""
    sockets = {}
    for fd in procfs.descriptors(pid):
        # Listing them has taken one more.
        with contextlib.suppress(FileNotFoundError):
            sockets[fd] = os.stat(f"/proc/{pid}/fd/{fd}").st_ino
    return Known({pid: sockets}, frozenset(map(names, locked)))


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


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[tuple[int, list[Ends]]]:
    """A process that has the other ends of so many connections, and nothing else: its PID. We have both ends."""
    pairs = [connected() for _ in range(count)]
    pid = os.fork()
    if not pid:
        # What else is open here is other tests' business.
        roles.close_all_but(other.fileno() for _, other in pairs)
        signal.signal(signal.SIGUSR1, lambda *_: os.set_inheritable(pairs[0][1].fileno(), True))
        while True:
            signal.pause()
    # What else has them is not the point here.
    monkeypatch.setattr("postcopy.dump_side.pipes.holder_outside", lambda *_: None)
    monkeypatch.setattr("postcopy.dump_side.inet_sockets.check_loops", lambda *_: None)
    try:
        yield pid, pairs
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for end in itertools.chain(*pairs):
            end.close()


def test_connections_go_on_when_who_takes_them_apart_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    us = os.getpid()

    def dies(repair: tcp_repair.Repair, fd: int, peek_offset: int) -> Apart:
        if os.getpid() == us:
            return look(repair, fd, peek_offset)
        socket.socket(fileno=fd).setsockopt(socket_options.SOL_TCP, tcp_repair.TCP_REPAIR, tcp_repair.REPAIR_ON)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    look = tcp_repair.Repair.look
    monkeypatch.setattr(tcp_repair.Repair, "look", dies)
    with serving(monkeypatch, 40) as (pid, _):
        _, trusted = survey(pid, LOCKED)
        with pytest.raises(DumpError, match="cannot be looked at"), Capture(pid, trusted, Silent(), LOCKED) as capture:
            capture.take()
        assert procfs.stat(pid)[3] == "S"
        repairing = [tcp_repair.is_repairing(own) for own in network._tcp_sockets([pid])]
        assert repairing == [False] * 40


Change = Callable[[int, socket.socket], object]


def captured(monkeypatch: pytest.MonkeyPatch, change: Change) -> tuple[list[SocketChange], list[InetSocket], int]:
    """What is found of connections of which one is changed once they were foreseen: the changes, what was collected,
    and its descriptor."""

    def foresee(looker: Looker) -> None:
        foresees(looker)
        change(pid, pairs[0][1])

    foresees = Looker.foresee
    monkeypatch.setattr(Looker, "foresee", foresee)
    with serving(monkeypatch, 5) as (pid, pairs):
        _, trusted = survey(pid, LOCKED)
        with Capture(pid, trusted, Silent(), LOCKED, foresees=True) as capture:
            capture.take()
            inet = [one.inet for one in capture.tree.descriptors.descriptions if one.inet]
            assert [one.connection is not None for one in inet] == [True] * 5
            return capture.changes(), inet, pairs[0][1].fileno()


def test_what_was_foreseen_of_connections_is_how_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    changes, foreseen, _ = captured(monkeypatch, lambda _, own: own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 3))
    assert changes == []
    # What changes without a call is not foreseen.
    offset = SocketOption(SOL_SOCKET, SO_PEEK_OFF, (3).to_bytes(4, "little"))
    assert sum(offset in one.socket.options for one in foreseen) == 1


def test_options_that_were_otherwise_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(_: int, own: socket.socket) -> None:
        own.setblocking(False)
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own.setsockopt(SOL_SOCKET, socket.SO_PRIORITY, 5)

    changes, _, fd = captured(monkeypatch, change)
    (told,) = changes
    assert (told.fd, told.nonblocking) == (fd, True)
    options = {(each.level, each.name): int.from_bytes(each.value, "little") for each in told.options}
    assert options == {(socket.IPPROTO_TCP, socket.TCP_NODELAY): 1, (SOL_SOCKET, socket.SO_PRIORITY): 5}


def inherit(pid: int, own: socket.socket) -> None:
    """Have the process change close-on-exec."""
    before = procfs.fdinfo(pid, own.fileno())["flags"]
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: procfs.fdinfo(pid, own.fileno())["flags"] != before, 10, "it is inherited")


MORE: dict[str, Change] = {
    "owner": lambda pid, own: fcntl.fcntl(own, fcntl.F_SETOWN, pid),
    "signal": lambda _, own: fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGUSR1),
    "append": lambda _, own: fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_APPEND),
    "lock": lambda _, own: fcntl.flock(own, fcntl.LOCK_EX),
    "filter": lambda _, own: own.setsockopt(SOL_SOCKET, socket_options.SO_ATTACH_FILTER, ACCEPT_ALL),
    "address": lambda _, own: own.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1),
    "close-on-exec": inherit,
}


@pytest.mark.parametrize("change", MORE.values(), ids=MORE.keys())
def test_what_cannot_be_told_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    with pytest.raises(DumpError, match="changed the connection with descriptor") as failure:
        captured(monkeypatch, change)
    assert failure.value.hint == "it runs on: try again"


def test_another_socket_under_the_number_of_one_that_was_foreseen_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = connected()
    again, _ = ends = connected()
    place = again.fileno()
    with one, other, ends[0], ends[1]:
        looks = Looks(known(os.getpid(), {one, again}))
        looks.foresee()
        os.dup2(other.fileno(), place)
        found = {seen[0]: socket_looks.shown(seen) for seen in looks.look(os.getpid())}
        assert (found[one.fileno()].foreseen, found[place].foreseen) == (True, False)
        assert found[place].status.st_ino == os.fstat(other.fileno()).st_ino
        assert list(looks.verify()) == []


def test_changes_are_made_of_what_another_process_has() -> None:
    one, other = connected()
    options = [SocketOption(socket.IPPROTO_TCP, socket.TCP_NODELAY, (1).to_bytes(4, "little"))]
    with one, other, holding() as pid:
        pidfd = os.pidfd_open(pid)
        one.setblocking(True)
        socket_changes.apply([SocketChange(7, one.fileno(), True, options)], {7: pidfd})
        assert not one.getblocking() or os.get_blocking(one.fileno()) is False
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        socket_changes.apply([SocketChange(7, one.fileno(), False, [])], {7: pidfd})
        assert os.get_blocking(one.fileno())
        for pid_of, fd, text in ((8, one.fileno(), "not of the tree"), (7, 9999, "EBADF")):
            with pytest.raises(RestoreError, match=text):
                socket_changes.apply([SocketChange(pid_of, fd, True, options)], {7: pidfd})
        wrong = [SocketOption(SOL_SOCKET, 9999, bytes(4))]
        with pytest.raises(RestoreError, match="Protocol not available"):
            socket_changes.apply([SocketChange(7, one.fileno(), True, wrong)], {7: pidfd})
        os.close(pidfd)


def test_a_connection_is_taken_apart_once_however_many_descriptors_it_has() -> None:
    one, other = connected()
    with one, other, one.dup() as again, holding() as pid:
        found = shown(pid, {one})
        first, second = sorted((one.fileno(), again.fileno()))
        assert isinstance(found[first].apart, Apart)
        assert found[second].apart is None
