"""What sockets show to another process, all at once; and connections that are taken apart by it, and go on."""

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import select
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
from postcopy.kernel import locks, procfs, socket_look, socket_options, tcp_repair
from postcopy.kernel.socket_options import SO_PEEK_OFF, SOL_SOCKET
from postcopy.kernel.tcp_repair import Apart
from postcopy.reporting import Silent
from postcopy.restore_side import socket_changes
from postcopy.socket_kinds import SocketChange, SocketOption
from postcopy.state import Tree
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
    looks = Looks()
    looks.begin(known(pid, locked))
    return {seen[0]: socket_looks.shown(seen) for seen in looks.look(pid)}


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

    def dies(repair: tcp_repair.Repair, fd: int, peek_offset: int, unread: int) -> Apart:
        if os.getpid() == us:
            return look(repair, fd, peek_offset, unread)
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


def captured(monkeypatch: pytest.MonkeyPatch, change: Change) -> tuple[list[SocketChange], Tree, int]:
    """What is found of connections of which one is changed once they were foreseen: the changes, what was collected,
    and its descriptor."""

    def foresee(looker: Looker, known: Known) -> None:
        foresees(looker, known)
        change(pid, pairs[0][1])

    foresees = Looker.foresee
    monkeypatch.setattr(Looker, "foresee", foresee)
    with serving(monkeypatch, 5) as (pid, pairs):
        _, trusted = survey(pid, LOCKED)
        with Capture(pid, trusted, Silent(), LOCKED, foresees=True) as capture:
            capture.take()
            inet = [one.inet for one in capture.tree.descriptors.descriptions if one.inet]
            assert [one.connection is not None for one in inet] == [True] * 5
            return capture.changes(), capture.tree, pairs[0][1].fileno()


def options_of(tree: Tree, fd: int) -> dict[socket_options.Option, int]:
    """Those of a connection that are not as in a new socket."""
    (process,) = tree.processes
    (number,) = [slot.description for slot in process.slots if slot.fd == fd]
    inet = tree.descriptors.descriptions[number].inet
    assert inet is not None
    return {(each.level, each.name): int.from_bytes(each.value, "little") for each in inet.socket.options}


def test_what_changes_without_a_call_is_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    changes, tree, fd = captured(monkeypatch, lambda _, own: own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 3))
    assert changes == []
    assert options_of(tree, fd)[SOL_SOCKET, SO_PEEK_OFF] == 3


def inherit(pid: int, own: socket.socket) -> None:
    """Have the process change close-on-exec."""
    before = procfs.fdinfo(pid, own.fileno())["flags"]
    os.kill(pid, signal.SIGUSR1)
    wait_until(lambda: procfs.fdinfo(pid, own.fileno())["flags"] != before, 10, "it is inherited")


def test_what_is_asked_without_much_ado_is_not_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(pid: int, own: socket.socket) -> None:
        own.setblocking(False)
        fcntl.fcntl(own, fcntl.F_SETOWN, pid)
        fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGUSR2)
        inherit(pid, own)

    changes, tree, fd = captured(monkeypatch, change)
    assert changes == []
    (process,), (delivery,) = tree.processes, tree.descriptors.deliveries
    assert {slot.fd: slot.close_on_exec for slot in process.slots}[fd] is False
    assert [slot.close_on_exec for slot in process.slots].count(True) == 4
    blocking = [not one.inet.socket.nonblocking for one in tree.descriptors.descriptions if one.inet]
    assert blocking.count(False) == 1
    assert (delivery.signal, delivery.owner) == (signal.SIGUSR2, process.pid)


def test_options_that_were_otherwise_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(_: int, own: socket.socket) -> None:
        own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        own.setsockopt(SOL_SOCKET, socket.SO_PRIORITY, 5)

    changes, tree, fd = captured(monkeypatch, change)
    (told,) = changes
    assert (told.pid, told.fd) == (tree.processes[0].pid, fd)
    options = {(each.level, each.name): int.from_bytes(each.value, "little") for each in told.options}
    assert options == {(socket.IPPROTO_TCP, socket.TCP_NODELAY): 1, (SOL_SOCKET, socket.SO_PRIORITY): 5}


def test_what_was_foreseen_is_looked_at_again_behind_all_others_until_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(monkeypatch, 5) as (pid, _):
        _, trusted = survey(pid, LOCKED)
        with Capture(pid, trusted, Silent(), LOCKED, foresees=True) as capture:
            capture.take()
            looker = capture._looker._role.pid
            wait_until(lambda: os.getpriority(os.PRIO_PROCESS, looker) == 19, 10, "it gives way")
            assert capture.changes() == []
            assert os.getpriority(os.PRIO_PROCESS, looker) == -20


MORE: dict[str, Change] = {
    "lock": lambda _, own: fcntl.flock(own, fcntl.LOCK_EX),
    "filter": lambda _, own: own.setsockopt(SOL_SOCKET, socket_options.SO_ATTACH_FILTER, ACCEPT_ALL),
    "address": lambda _, own: own.setsockopt(SOL_SOCKET, socket.SO_REUSEADDR, 1),
}


@pytest.mark.parametrize("change", MORE.values(), ids=MORE.keys())
def test_what_cannot_be_told_any_more_is_an_error(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    with pytest.raises(DumpError, match="changed the connection with descriptor") as failure:
        captured(monkeypatch, change)
    assert failure.value.hint == "it runs on: try again"


def test_a_lock_on_something_else_with_that_number_is_none_on_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = connected()
    with one, other:
        looks, found = Looks(), known(os.getpid(), {one})
        looks.foresee(found)
        looks.begin(found)
        assert any(seen[-1] for seen in looks.look(os.getpid()))
        locked = os.fstat(one.fileno())
        monkeypatch.setattr("postcopy.kernel.locks.files", lambda: {(locked.st_dev + 1, locked.st_ino)})
        assert looks.verify() == []
        monkeypatch.setattr("postcopy.kernel.locks.files", lambda: {(locked.st_dev, locked.st_ino)})
        assert [each.inode for each in looks.verify()] == [locked.st_ino]


def test_locked_files_are_told(tmp_path: Path) -> None:
    with open(tmp_path / "locked", "w") as stream:
        status = os.fstat(stream.fileno())
        assert (status.st_dev, status.st_ino) not in locks.files()
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert (status.st_dev, status.st_ino) in locks.files()


def test_a_connection_with_several_descriptors_is_foreseen_once() -> None:
    one, other = connected()
    with one, other, one.dup() as again, holding() as pid:
        looks, found = Looks(), known(pid, {one})
        looks.foresee(found)
        looks.begin(found)
        # What changes in between must not make two of them.
        one.setblocking(False)
        seen = {each[0]: socket_looks.shown(each) for each in looks.look(pid)}
        first, second = seen[one.fileno()], seen[again.fileno()]
        assert (first.foreseen, second.foreseen) == (True, True)
        assert first.info == second.info
        flags = int(first.info.split(b"\n")[1].partition(b":")[2], 8)
        assert flags & os.O_NONBLOCK
        assert [first.apart is None, second.apart is None].count(True) == 1


def test_another_socket_under_the_number_of_one_that_was_foreseen_is_looked_at() -> None:
    one, other = connected()
    again, _ = ends = connected()
    place = again.fileno()
    with one, other, ends[0], ends[1]:
        looks, found = Looks(), known(os.getpid(), {one, again})
        looks.foresee(found)
        looks.begin(found)
        os.dup2(other.fileno(), place)
        seen = {each[0]: socket_looks.shown(each) for each in looks.look(os.getpid())}
        assert (seen[one.fileno()].foreseen, seen[place].foreseen) == (True, False)
        assert seen[place].status.st_ino == os.fstat(other.fileno()).st_ino
        assert looks.verify() == []


def change_of(fd: int, *options: tuple[int, int, bytes], pid: int = 7) -> SocketChange:
    """One that the source has sent."""
    return SocketChange(pid, fd, [SocketOption(*option) for option in options])


def test_changes_are_made_of_what_another_process_has() -> None:
    one, other = connected()
    nodelay = socket.IPPROTO_TCP, socket.TCP_NODELAY, (1).to_bytes(4, "little")
    with one, other, holding() as pid, open(os.devnull) as null:
        built = {7: os.pidfd_open(pid)}
        before = len(os.listdir("/proc/self/fd"))
        socket_changes.apply([change_of(one.fileno(), nodelay)], built)
        assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        wrong = {
            "no such process": change_of(one.fileno(), nodelay, pid=8),
            "EBADF": change_of(9999, nodelay),
            "cannot be changed so late": change_of(one.fileno(), (SOL_SOCKET, 9999, bytes(4))),
            "19.*cannot be changed so late": change_of(one.fileno(), (6, tcp_repair.TCP_REPAIR, bytes(4))),
            "Invalid argument": change_of(one.fileno(), (SOL_SOCKET, socket.SO_PRIORITY, b"")),
            "did not stay": change_of(one.fileno(), (SOL_SOCKET, socket.SO_PRIORITY, (5).to_bytes(8, "little"))),
            "interface|embedded|device": change_of(one.fileno(), (0, 50, b"no\0interface")),
        }
        if null.fileno() in procfs.descriptors(pid):
            wrong["socket"] = change_of(null.fileno(), nodelay)
        for text, change in wrong.items():
            with pytest.raises(RestoreError, match=text):
                socket_changes.apply([change], built)
        assert len(os.listdir("/proc/self/fd")) == before
        os.close(built[7])


def test_options_that_take_one_another_back_arrive_as_they_were() -> None:
    one, other = connected()
    stamps = {name: (SOL_SOCKET, name) for name in (29, 35)}
    with one, other, holding() as pid:
        built = {7: os.pidfd_open(pid)}
        for first, then in ((29, 35), (35, 29)):
            # At the source, in that order.
            other.setsockopt(*stamps[first], 1)
            before = {option: other.getsockopt(*option, 4) for option in stamps.values()}
            other.setsockopt(*stamps[then], 1)
            after = {option: other.getsockopt(*option, 4) for option in stamps.values()}
            one.setsockopt(*stamps[first], 1)
            changed = {option for option in after if before[option] != after[option]}
            assert socket_options.together(changed) >= set(stamps.values())
            told = [(*option, value) for option, value in socket_options.in_order(after)]
            socket_changes.apply([change_of(one.fileno(), *told)], built)
            assert {option: one.getsockopt(*option, 4) for option in stamps.values()} == after
        os.close(built[7])


def checksum(content: bytes) -> int:
    """That of the Internet (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(content) // 2}H", content))
    return int(~((total & 0xFFFF) + (total >> 16)) & 0xFFFF)


def say_unreachable(own: socket.socket, sequence: int) -> None:
    """Have an ICMP message come about a segment of a connection over IPv4."""
    ports, local = (own.getsockname()[1], own.getpeername()[1]), socket.inet_aton("127.0.0.1")
    quoted = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0, local, local)
    quoted += struct.pack("!HHIIBBHHH", *ports, sequence, 0, 0x50, 0x10, 100, 0, 0)
    message = struct.pack("!BBHI", 3, 1, 0, 0) + quoted
    message = message[:2] + struct.pack("!H", checksum(message)) + message[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as icmp:
        icmp.sendto(message, ("127.0.0.1", 0))


def test_an_error_that_waits_for_the_program_still_waits_once_it_was_taken_apart() -> None:
    one, other = connected()
    with one, other:
        one.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR: that a host is unreachable is told at once
        say_unreachable(one, tcp_repair.take_apart(one.fileno(), -1, 0).next_written)
        poll = select.poll()
        poll.register(one, 0)
        wait_until(lambda: poll.poll(0), 10, "it is told")
        assert tcp_repair.take_apart(one.fileno(), -1, 0).unread == 0
        assert one.getsockopt(SOL_SOCKET, socket.SO_ERROR) == errno.EHOSTUNREACH


def test_a_connection_is_taken_apart_once_however_many_descriptors_it_has() -> None:
    one, other = connected()
    with one, other, one.dup() as again, holding() as pid:
        found = shown(pid, {one})
        first, second = sorted((one.fileno(), again.fileno()))
        assert isinstance(found[first].apart, Apart)
        assert found[second].apart is None
