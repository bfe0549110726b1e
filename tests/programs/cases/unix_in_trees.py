"""Unix sockets that processes of a tree have connected by name, or whose connections nobody has accepted yet."""

import contextlib
import os
import select
import socket
import struct
from collections.abc import Iterator

from tests.programs.cases import Case, first_problem, unlike
from tests.programs.cases.trees import Child, Line, maker_of
from tests.programs.cases.unix_sockets import events, told


class UnixNotAccepted(Case):
    """Connections that wait to be accepted, made by us and by children; one is shut down, one has a name."""

    def setup(self) -> None:
        """Two listeners, of which the backlog of one is full."""
        self.path = str(self.directory / "not-accepted")
        self.seqpacket = b"\0not accepted %d" % os.getpid()
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(3)
        self.packets = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.packets.bind(self.seqpacket)
        self.packets.listen()
        self.first, self.third = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.first.bind(b"\0first %d" % os.getpid())
        self.first.connect(self.path)

        def child(line: Line) -> None:
            by_path, by_name = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            by_path.setblocking(False)
            by_path.connect(self.path)
            by_name.connect(self.seqpacket)
            line.say("there")
            line.wait()
            by_path.send(b"from the child")
            line.say([maker_of(by_path), maker_of(by_name), by_path.getblocking(), by_name.recv(100).decode()])
            line.wait()

        self.child = Child(child)
        self.child.hear()
        self.third.connect(self.path)
        self.third.shutdown(socket.SHUT_WR)
        self.last = socket.socket(socket.AF_UNIX)
        self.last.connect(self.path)
        self.before = self.take()

    def take(self) -> list[object]:
        """What is told, and whether more could connect."""
        full = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        ends = (self.listener, self.packets, self.first, self.third, self.last)
        return [full.connect_ex(self.path), *((told(end), events(end)) for end in ends)]

    def verify(self) -> str | None:
        """They are accepted in their order, and work."""
        problem = unlike("what is told", self.before, self.take())
        accepted = [self.listener.accept()[0] for _ in range(4)]
        names = [sock.getpeername() for sock in accepted]
        own = os.getpid()
        problem = problem or first_problem(
            unlike("names", [b"\0first %d" % own, "", "", ""], names),
            unlike("makers", [own, self.child.pid, own, own], [maker_of(sock) for sock in accepted]),
        )
        packets = self.packets.accept()[0]
        packets.send(b"to the child")
        self.child.say("go on")
        problem = problem or unlike("the child", [own, own, False, "to the child"], self.child.hear())
        self.first.send(b"from the first")
        accepted[2].send(b"to the third")
        found = [accepted[0].recv(100), accepted[1].recv(100), accepted[2].recv(100), self.third.recv(100)]
        none = select.select([self.listener, self.packets], [], [], 0)[0]
        return problem or first_problem(
            unlike("content", [b"from the first", b"from the child", b"", b"to the third"], found),
            unlike("more to accept", [], none),
        )


def told_maker(end: socket.socket) -> list[int]:
    """SO_PEERCRED: process, user and group."""
    return list(struct.unpack("=iII", end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))


@contextlib.contextmanager
def user(number: int) -> Iterator[None]:
    """Be another user for a while."""
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


class UnixByName(Case):
    """Connections by name between processes: to one that still listens and to one that does no more; the accepted end
    with a worker, the connecting one with a grandchild; messages with the credentials of another process."""

    def setup(self) -> None:
        """We listen; the client connects and leaves its end to its own child; the worker gets what we accept."""
        self.path, abstract = str(self.directory / "by-name"), b"\0by name %d" % os.getpid()
        self.listeners = []
        for name in (self.path, abstract):
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(name)
            with user(44):
                listener.listen()
            self.listeners.append(listener)

        def client(line: Line) -> None:
            ends = []
            for name in (self.path, abstract):
                ends.append(socket.socket(socket.AF_UNIX))
                with user(0 if name == self.path else 55):
                    ends[-1].connect(name)
                ends[-1].send(b"from the client")
            grandchild = Child(heir, *(end.fileno() for end in ends))
            ends[0].close()
            ends[1].close()
            grandchild.hear()
            line.say("connected")
            line.wait()
            grandchild.say("go on")
            line.say(grandchild.hear())
            line.wait()

        def heir(line: Line) -> None:
            ends = [
                socket.socket(fileno=int(fd)) for fd in sorted(map(int, os.listdir("/proc/self/fd"))) if is_socket(fd)
            ]
            line.say("there")
            line.wait()
            line.say([[told_maker(end), end.recv(100).decode(), str(end.getpeername())] for end in ends])
            for end in ends:
                end.send(b", and later")
            line.wait()

        self.client = Child(client)
        self.client.hear()
        self.served = [listener.accept()[0] for listener in self.listeners]
        for end in self.served:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            end.send(b"to the client")
        gone = socket.socket(socket.AF_UNIX)
        gone.connect(abstract)
        self.left = self.listeners[1].accept()[0]
        gone.send(b"last words")
        gone.close()

        def worker(line: Line) -> None:
            line.say("there")
            line.wait()
            found = [end.recv(100).decode() for end in (*self.served, self.left)]
            line.say([found, [told_maker(end) for end in self.served], self.left.recv(100).decode()])
            line.wait()
            line.say([end.recv(100).decode() for end in self.served])
            line.wait()

        self.worker = Child(worker, *(end.fileno() for end in (*self.served, self.left)))
        self.worker.hear()
        self.names = [str(end.getsockname()) for end in self.served]
        for end in (*self.served, self.left):
            end.close()
        self.listeners[0].close()
        os.unlink(self.path)

    def verify(self) -> str | None:
        """Each end is told who made the other; what was queued has come, and more comes."""
        own, client = os.getpid(), self.client.pid
        self.worker.say("go on")
        of_worker = self.worker.hear()
        self.client.say("go on")
        of_heir = self.client.hear()
        self.worker.say("go on")
        with socket.socket(socket.AF_UNIX) as new:
            new.connect(self.listeners[1].getsockname())
        return first_problem(
            unlike(
                "the worker",
                [["from the client"] * 2 + ["last words"], [[client, 0, 0], [client, 55, 55]], ""],
                of_worker,
            ),
            unlike("the heir", [[[own, 44, 44], "to the client", name] for name in self.names], of_heir),
            unlike("what came later", [", and later"] * 2, self.worker.hear()),
        )


def is_socket(fd: int) -> bool:
    """Whether it is one."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("socket:")
    except OSError:
        return False


class UnixDatagramsBetween(Case):
    """Datagram sockets of several processes: connected by name, one way and each to the other; messages queued of
    several, with credentials."""

    def setup(self) -> None:
        """We and a child have named sockets; the child's child has one without a name, and leaves another."""
        self.path, self.theirs = str(self.directory / "ours"), str(self.directory / "theirs")
        self.abstract = b"\0between %d" % os.getpid()
        self.ours, self.mutual = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.ours.bind(self.path)
        self.mutual.bind(self.abstract)

        def child(line: Line) -> None:
            named, nameless = (socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2))
            named.bind(self.theirs)
            named.connect(self.abstract)
            nameless.connect(self.path)
            named.sendto(b"named", self.path)
            nameless.send(b"nameless")
            named.send(b"mutual")
            line.say("there")
            line.wait()
            line.say([named.recv(100).decode(), str(nameless.getpeername()), str(named.getpeername())])
            nameless.send(b"more")
            named.send(b"more")
            line.wait()

        self.child = Child(child)
        self.child.hear()
        self.mutual.connect(self.theirs)
        self.mutual.send(b"back")
        self.before = [told(sock) for sock in (self.ours, self.mutual)]

    def verify(self) -> str | None:
        """Messages come from whom they came; the connections lead where they led."""
        after = [told(sock) for sock in (self.ours, self.mutual)]
        by_whom = [self.ours.recvmsg(100, 100) for _ in range(2)]
        found = [(content, address, struct.unpack("=iII", control[0][2])) for content, control, _, address in by_whom]
        who = (self.child.pid, os.getuid(), os.getgid())
        mutual = self.mutual.recvfrom(100)
        self.child.say("go on")
        told_by_child = self.child.hear()
        more = [self.ours.recvmsg(100, 100)[0], self.mutual.recvfrom(100)]
        return first_problem(
            unlike("what is told", self.before, after),
            unlike("messages", [(b"named", self.theirs, who), (b"nameless", None, who)], found),
            unlike("message", (b"mutual", self.theirs), mutual),
            unlike("the child", ["back", self.path, str(self.abstract)], told_by_child),
            unlike("more", [b"more", (b"more", self.theirs)], more),
        )


CASES: tuple[type[Case], ...] = (UnixNotAccepted, UnixByName, UnixDatagramsBetween)
