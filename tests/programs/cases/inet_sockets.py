"""TCP and UDP sockets: listening, with every option, connected to each other, with full queues."""

import contextlib
import os
import select
import socket
import struct
import time
from typing import Any

from tests.programs.cases import Case, Snapshot, differences, first_problem, unlike

ANY, LOOPBACK, LOOPBACK6, MAPPED = "0.0.0.0", "127.0.0.1", "::1", "::ffff:127.0.0.1"
TCP, UDP, IP, IPV6 = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_IP, socket.IPPROTO_IPV6
MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP, MCAST_MSFILTER = 42, 46, 48
#: Options that are read back: for each level their numbers (four bytes each), and those of another size.
NUMBERS = {
    socket.SOL_SOCKET: (1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 15, 18, 29, 35, 36, 40, 42, 44, 45, 60, 69, 70, 72, 74, 75),
    TCP: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17, 18, 23, 25, 27, 30, 34, 36, 37, 44, 45, 46),
    IP: (1, 2, 6, 7, 8, 10, 11, 12, 13, 15, 18, 19, 20, 21, 22, 23, 24, 25, 26, 33, 34, 49, 50, 51),
    IPV6: (16, 17, 18, 19, 23, 25, 26, 29, 33, 49, 51, 53, 56, 58, 60, 62, 66, 67, 70, 72, 73, 74, 75, 76, 77, 78),
    UDP: (1, 100, 101, 102, 103, 104),
}
MULTICAST = {(IP, 33), (IP, 34), (IP, 49), (IPV6, 17), (IPV6, 18), (IPV6, 19), (IPV6, 29)}
SIZES = {(1, 13): 8, (1, 20): 16, (1, 21): 16, (1, 25): 16, (1, 37): 8, (1, 47): 8, (TCP, 13): 16, (0, 4): 40}


def options(sock: socket.socket) -> dict[str, bytes]:
    """What the kernel tells of the socket's options."""
    wanted = {(level, name): 4 for level, names in NUMBERS.items() for name in names} | SIZES
    if sock.type == socket.SOCK_STREAM:
        # Here the kernel keeps notes of its own about a connection.
        wanted = {option: size for option, size in wanted.items() if option not in MULTICAST}
    found = {}
    for (level, name), size in wanted.items():
        with contextlib.suppress(OSError):
            found[f"option {name} of level {level}"] = sock.getsockopt(level, name, size)
    return found


def told(sock: socket.socket) -> dict[str, Any]:
    """What a program can ask of a socket."""
    try:
        peer = sock.getpeername()
    except OSError as error:
        peer = error.errno
    status = os.fstat(sock.fileno())
    found = {
        "name": sock.getsockname(),
        "peer": peer,
        "type": (sock.family, sock.type, sock.proto, sock.getblocking(), sock.get_inheritable()),
        "owner": (status.st_uid, status.st_gid),
    }
    if sock.type == socket.SOCK_STREAM:
        info = sock.getsockopt(TCP, socket.TCP_INFO, 104)
        # State, and what the two ends have agreed upon: timestamps, SACK, scaling.
        found["state"] = (info[0], info[5] & 7, info[6])
    return found | options(sock)


def events(sock: socket.socket) -> int:
    """What poll(2) says at once."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLOUT | select.POLLRDHUP | select.POLLPRI)
    return sum(event for _, event in poll.poll(0))


def all_told(socks: list[socket.socket]) -> dict[str, Any]:
    """Of many, by number and name."""
    return {f"{number} {key}": value for number, sock in enumerate(socks) for key, value in told(sock).items()}


def listen(host: str, port: int = 0, backlog: int = 5, **options: int) -> socket.socket:
    """A listening socket; ``options`` by their names in the module socket, of SOL_SOCKET or IPPROTO_IPV6."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    for name, value in options.items():
        listener.setsockopt(IPV6 if name.startswith("IPV6") else socket.SOL_SOCKET, getattr(socket, name), value)
    listener.bind((host, port))
    listener.listen(backlog)
    return listener


def connect(listener: socket.socket, host: str) -> tuple[socket.socket, socket.socket]:
    """Both ends of a new connection."""
    client = socket.create_connection((host, listener.getsockname()[1]))
    return client, listener.accept()[0]


class TcpListeners(Case):
    """Listening sockets of IPv4, IPv6 and both, two on one port, bound ones that do not listen, fresh ones."""

    def setup(self) -> None:
        """One of each."""
        self.listeners = [
            (listen(LOOPBACK, backlog=17), LOOPBACK),
            (listen(ANY, SO_REUSEADDR=1), LOOPBACK),
            (listen("::", IPV6_V6ONLY=0), LOOPBACK),
            (listen("::", IPV6_V6ONLY=1), LOOPBACK6),
            (listen(MAPPED), LOOPBACK),
            (listen(LOOPBACK, SO_REUSEPORT=1), LOOPBACK),
        ]
        port = self.listeners[-1][0].getsockname()[1]
        self.listeners.append((listen(LOOPBACK, port, SO_REUSEPORT=1), LOOPBACK))
        bound = socket.socket()
        bound.bind((LOOPBACK, 0))
        self.others = [bound, socket.socket(), socket.socket(socket.AF_INET6)]
        self.before = self.take()

    def take(self) -> dict[str, Any]:
        """What is told; the backlog is in TCP_INFO."""
        backlogs = [
            struct.unpack_from("=II", sock.getsockopt(TCP, socket.TCP_INFO, 104), 24) for sock, _ in self.listeners
        ]
        return all_told([*(sock for sock, _ in self.listeners), *self.others]) | {"backlogs": backlogs}

    def verify(self) -> str | None:
        """As before; and each can be connected to."""
        problem = differences(self.before, self.take())
        for listener, host in self.listeners[:-2]:
            client, server = connect(listener, host)
            client.sendall(b"hello")
            problem = problem or unlike("greeting", b"hello", server.recv(100))
            client.close()
            server.close()
        self.others[0].listen()
        return problem or unlike("what is heard", b"x", self._greet(self.others[0]))

    def _greet(self, listener: socket.socket) -> bytes:
        client, server = connect(listener, LOOPBACK)
        client.sendall(b"x")
        return server.recv(100)


class TcpOptions(Snapshot):
    """Options on a listener, on an accepted connection and on its client."""

    def arrange(self) -> None:
        """Set them before and after the connection is made."""
        listener = listen(LOOPBACK, SO_REUSEADDR=1)
        listener.setsockopt(TCP, socket.TCP_DEFER_ACCEPT, 0)
        listener.setsockopt(TCP, socket.TCP_MAXSEG, 1000)
        listener.setsockopt(TCP, socket.TCP_FASTOPEN, 7)
        client, server = connect(listener, LOOPBACK)
        for sock in (client, server):
            sock.setsockopt(TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(TCP, socket.TCP_KEEPIDLE, 77)
            sock.setsockopt(TCP, socket.TCP_KEEPINTVL, 7)
            sock.setsockopt(TCP, socket.TCP_KEEPCNT, 3)
            sock.setsockopt(TCP, socket.TCP_USER_TIMEOUT, 30_000)
            sock.setsockopt(TCP, socket.TCP_LINGER2, 20)
            sock.setsockopt(TCP, socket.TCP_SYNCNT, 4)
            sock.setsockopt(TCP, 25, 123_456)  # TCP_NOTSENT_LOWAT
            sock.setsockopt(TCP, 13, b"reno")  # TCP_CONGESTION
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 12))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("=qq", 9, 500_000))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, 3)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 99)
            sock.setsockopt(IP, socket.IP_TOS, 0x10)
            sock.setsockopt(IP, socket.IP_TTL, 33)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 100_000)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 60_000)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        os.fchown(server.fileno(), 8, 9)
        client.setblocking(False)
        self.socks = [listener, client, server]

    def take(self) -> dict[str, Any]:
        """All of them. What the path has taught the sender about the size of packets is not an option."""
        found = all_told(self.socks)
        return {key: value for key, value in found.items() if not key.endswith("option 10 of level 6")}


class TcpOwnConnections(Case):
    """Connections between two sockets of the process, with something unread both ways: IPv4, IPv6, mapped."""

    def setup(self) -> None:
        """Make them; the listener of one is gone."""
        listeners = [listen(LOOPBACK), listen("::", IPV6_V6ONLY=0), listen("::1")]
        self.pairs = [connect(listeners[0], LOOPBACK), connect(listeners[1], LOOPBACK), connect(listeners[2], "::1")]
        self.pairs.append(connect(listeners[0], LOOPBACK))
        listeners[2].close()
        self.listeners = listeners[:2]
        for number, (client, server) in enumerate(self.pairs):
            client.sendall(b"to the server %d" % number)
            server.sendall(b"to the client %d" % number)
        self.before = self.take()

    def take(self) -> dict[str, Any]:
        """What is told. IPV6_V6ONLY comes with the bind(2) that even a client has behind it after a move."""
        found = all_told([sock for pair in self.pairs for sock in pair])
        return {key: value for key, value in found.items() if not key.endswith(f"option 26 of level {IPV6}")}

    def verify(self) -> str | None:
        """What was there, then more, then the end."""
        problem = differences(self.before, self.take())
        for number, (client, server) in enumerate(self.pairs):
            client.settimeout(10)
            server.settimeout(10)
            found = [server.recv(100), client.recv(100)]
            client.sendall(b"more")
            found.append(server.recv(100))
            server.sendall(b"even more")
            found.append(client.recv(100))
            client.close()
            found.append(server.recv(100))
            expected = [b"to the server %d" % number, b"to the client %d" % number, b"more", b"even more", b""]
            problem = problem or unlike(f"connection {number}", expected, found)
        return problem


class TcpFullQueues(Case):
    """A connection whose receiver does not read: a full receive buffer, data sent and not, the window closed."""

    def setup(self) -> None:
        """Write until no more is taken."""
        listener = listen(LOOPBACK)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 300_000)
        self.client, self.server = connect(listener, LOOPBACK)
        listener.close()
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 500_000)
        self.client.setblocking(False)
        self.content = os.urandom(4 << 20)
        self.sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                self.sent += self.client.send(self.content[self.sent : self.sent + 100_000])

    def verify(self) -> str | None:
        """Every byte, in order, and what is written afterwards."""
        self.server.settimeout(20)
        self.client.settimeout(20)
        found = bytearray()
        while len(found) < self.sent and (piece := self.server.recv(1 << 20)):
            found += piece
        self.client.sendall(b"behind it")
        behind = self.server.recv(100)
        return first_problem(
            None if bytes(found) == self.content[: self.sent] else f"{len(found)} of {self.sent} bytes, or others",
            unlike("what was written afterwards", b"behind it", behind),
        )


class TcpClosing(Case):
    """Connections that the program has shut down, in every state until the peer has agreed; and one that it only reads
    no more from. What the peer does not read keeps the FIN back."""

    STATES = (5, 8, 4, 1, 11, 5, 9, 5, 1, 1)  # FIN_WAIT2 and CLOSE_WAIT, FIN_WAIT1, CLOSING, LAST_ACK, ESTABLISHED

    def setup(self) -> None:
        """Each with its other end."""
        listener = listen(LOOPBACK)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 20_000)
        self.pairs = [connect(listener, LOOPBACK) for _ in range(5)]
        self.content = os.urandom(1 << 20)
        for client, _ in self.pairs:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
        self.sent = [0] * len(self.pairs)
        for number in (1, 2, 3):
            client, server = self.pairs[number]
            if number == 3:
                server.shutdown(socket.SHUT_WR)
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    self.sent[number] += client.send(self.content[self.sent[number] : self.sent[number] + 50_000])
            client.settimeout(20)
        for number in range(4):
            self.pairs[number][0].shutdown(socket.SHUT_WR)
        self.pairs[2][1].shutdown(socket.SHUT_WR)
        self.pairs[4][0].shutdown(socket.SHUT_RD)
        deadline = time.monotonic() + 5
        # What is acknowledged late is acknowledged within 40 ms.
        while (before := self.take())["states"] != list(self.STATES):
            if time.monotonic() > deadline:
                raise AssertionError(f"states {before['states']}")
        self.before = before

    def take(self) -> dict[str, Any]:
        """States and events."""
        socks = [sock for pair in self.pairs for sock in pair]
        return {
            "states": [sock.getsockopt(TCP, socket.TCP_INFO, 1)[0] for sock in socks],
            "events": [events(sock) for sock in socks],
        }

    def verify(self) -> str | None:
        """What is left comes both ways, then the end."""
        problem = differences(self.before, self.take())
        for number, (client, server) in enumerate(self.pairs[:4]):
            server.settimeout(20)
            if number < 2:
                server.sendall(b"back")
                problem = problem or unlike(f"what comes back on {number}", b"back", client.recv(100))
            found = bytearray()
            while piece := server.recv(1 << 20):
                found += piece
            if bytes(found) != self.content[: self.sent[number]]:
                problem = problem or f"connection {number}: {len(found)} of {self.sent[number]} bytes, or others"
            server.close()
            problem = problem or unlike(f"the end of {number}", b"", client.recv(100))
        client, server = self.pairs[4]
        client.sendall(b"on")
        return problem or first_problem(
            unlike("what comes where no more is read", b"", client.recv(100)),
            unlike("what is still written", b"on", server.recv(100)),
        )


class TcpEnded(Case):
    """Connections that have ended: reset, or closed by both ends."""

    def setup(self) -> None:
        """One of each."""
        listener = listen(LOOPBACK)
        self.reset, other = connect(listener, LOOPBACK)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
        other.close()
        self.closed, other = connect(listener, LOOPBACK)
        other.close()
        self.closed.shutdown(socket.SHUT_WR)
        self.closed.recv(1)
        self.before = [events(self.reset), events(self.closed)]

    def verify(self) -> str | None:
        """An error, then nothing; and nothing at once."""
        found = [events(self.reset), events(self.closed)]
        try:
            self.reset.recv(1)
        except OSError as error:
            failed = type(error).__name__ in ("ConnectionResetError", "ConnectionAbortedError")
        else:
            failed = False
        after = [self.reset.recv(1), self.closed.recv(1)]
        return first_problem(
            unlike("events", self.before, found),
            None if failed else "no error is told",
            unlike("what comes then", [b"", b""], after),
        )


class Udp(Case):
    """UDP sockets: bound, connected, with options, of both families."""

    def setup(self) -> None:
        """Make them."""
        self.bound = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.bound.bind((LOOPBACK, 0))
        self.bound.setsockopt(IP, socket.IP_PKTINFO if hasattr(socket, "IP_PKTINFO") else 8, 1)
        self.bound.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 300_000)
        self.connected = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.connected.connect(self.bound.getsockname())
        self.bound6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.bound6.bind(("::", 0))
        self.bound6.setsockopt(IPV6, socket.IPV6_RECVPKTINFO, 1)
        self.bound6.setsockopt(UDP, 104, 1)  # UDP_GRO
        on_device = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        on_device.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        plain.setsockopt(IP, 50, socket.htonl(socket.if_nametoindex("lo")))  # IP_UNICAST_IF
        self.socks = [self.bound, self.connected, self.bound6, on_device, plain]
        self.before = all_told(self.socks)

    def verify(self) -> str | None:
        """As before; and it works."""
        after = all_told(self.socks)
        self.connected.send(b"ping")
        self.bound.settimeout(10)
        message, sender = self.bound.recvfrom(100)
        return first_problem(
            differences(self.before, after),
            unlike("message", (b"ping", self.connected.getsockname()), (message, sender)),
        )


class CorkedUdp(Case):
    """UDP sockets that keep back what they send, with nothing begun: bound by sending, and not bound."""

    def setup(self) -> None:
        """One has sent a packet in pieces."""
        self.receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.receiver.bind((LOOPBACK, 0))
        self.receiver.settimeout(10)
        self.corked, self.unused = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        self.unused.setsockopt(UDP, 1, 1)
        self.corked.setsockopt(UDP, 1, 1)
        self.pieces = self.take()
        self.corked.setsockopt(UDP, 1, 1)
        self.before = all_told([self.corked, self.unused])

    def take(self) -> bytes:
        """Send two pieces, then let them go as one."""
        self.corked.sendto(b"one, ", self.receiver.getsockname())
        self.corked.send(b"two")
        self.corked.setsockopt(UDP, 1, 0)
        return self.receiver.recv(100)

    def verify(self) -> str | None:
        """Still corked; pieces become one packet."""
        after = all_told([self.corked, self.unused])
        return first_problem(
            differences(self.before, after),
            unlike("packets", [b"one, two"] * 2, [self.pieces, self.take()]),
            unlike("corked", b"\1", self.unused.getsockopt(UDP, 1, 4)[:1]),
        )


class Multicast(Case):
    """Groups joined on an interface, one with a source of its own."""

    GROUPS = ("239.1.2.3", "239.1.2.4")

    def setup(self) -> None:
        """Join."""
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((ANY, 0))
        lo = socket.if_nametoindex("lo")
        plain, sourced = (struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(g)).ljust(128) for g in self.GROUPS)
        source = struct.pack("=HH4s", socket.AF_INET, 0, socket.inet_aton(LOOPBACK)).ljust(128)
        self.sock.setsockopt(IP, MCAST_JOIN_GROUP, struct.pack("=Ixxxx", lo) + plain)
        self.sock.setsockopt(IP, MCAST_JOIN_SOURCE_GROUP, struct.pack("=Ixxxx", lo) + sourced + source)
        self.sock.setsockopt(IP, socket.IP_MULTICAST_ALL if hasattr(socket, "IP_MULTICAST_ALL") else 49, 0)
        self.sock6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.sock6.setsockopt(
            IPV6, socket.IPV6_JOIN_GROUP, socket.inet_pton(socket.AF_INET6, "ff02::77") + struct.pack("=I", lo)
        )

    def verify(self) -> str | None:
        """What is sent to each arrives; a second member of the IPv6 group is refused."""
        sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender.setsockopt(IP, socket.IP_MULTICAST_IF, socket.inet_aton(LOOPBACK))
        sender.bind((LOOPBACK, 0))
        self.sock.settimeout(10)
        found = []
        for group in self.GROUPS:
            sender.sendto(group.encode(), (group, self.sock.getsockname()[1]))
            found.append(self.sock.recv(100).decode())
        joined = socket.inet_pton(socket.AF_INET6, "ff02::77") + struct.pack("=I", socket.if_nametoindex("lo"))
        try:
            self.sock6.setsockopt(IPV6, socket.IPV6_JOIN_GROUP, joined)
        except OSError:
            return unlike("messages", list(self.GROUPS), found)
        return "the IPv6 group was left"
