"""Sockets of other kinds: netlink, raw, ICMP (ping), packet."""

import contextlib
import ctypes
import os
import select
import socket
import struct
from pathlib import Path
from typing import Any

from tests.programs.cases import Case, Unsupported, differences, first_problem, unlike
from tests.programs.cases.inet_sockets import all_told

SOL_PACKET, SOL_NETLINK, SOL_RAW, SOL_ICMPV6 = 263, 270, 255, 58
ADD_MEMBERSHIP, DROP_MEMBERSHIP, LIST_MEMBERSHIPS = 1, 2, 9
RTMGRP_NOTIFY, RTNLGRP_MPLS_ROUTE = 2, 27  # of which nothing comes
RTM_NEWLINK, RTM_GETLINK, NLM_F_REQUEST = 16, 18, 1
SO_ATTACH_FILTER = 26
ETH_P_ALL, ETH_P_IP = 3, 0x800
PROMISCUOUS, MULTICAST = 1, 0
#: BPF: take packets of 100 bytes and more; of others nothing.
LONG_ONES = struct.pack("=" + "HBBI" * 4, 0x80, 0, 0, 0, 0x35, 0, 1, 100, 6, 0, 0, 0xFFFF, 6, 0, 0, 0)


def echo_request(identifier: int, content: bytes = b"") -> bytes:
    """An ICMP echo request (RFC 792)."""
    head = struct.pack(">BBHHH", 8, 0, 0, identifier, 1) + content + bytes(len(content) % 2)
    total = sum(struct.unpack(f">{len(head) // 2}H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:2] + struct.pack(">H", ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF) + head[4:]


def comes(sock: socket.socket, wanted: bytes) -> str | None:
    """Wait for a packet that ends so."""
    sock.settimeout(10)
    while True:
        try:
            if sock.recv(1000).endswith(wanted):
                return None
        except TimeoutError:
            return f"{wanted!r} has not come to {sock}"


class NetlinkSockets(Case):
    """Of route, uevent and sock_diag; bound to the PID, another port, to nothing; with groups and options."""

    def setup(self) -> None:
        """One of each."""
        kinds = (0, 0, 15, 4)
        self.socks = [socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) for protocol in kinds]
        route, other, events, _ = self.socks
        route.bind((0, RTMGRP_NOTIFY))
        route.setsockopt(SOL_NETLINK, ADD_MEMBERSHIP, RTNLGRP_MPLS_ROUTE)
        for option in (3, 5, 10, 11):
            route.setsockopt(SOL_NETLINK, option, 1)
        other.bind((123_456, 0))
        other.setblocking(False)
        events.bind((0, 1))
        self.before = self.take()

    def take(self) -> dict[str, Any]:
        """Names, groups, options."""
        found: dict[str, Any] = {}
        for number, sock in enumerate(self.socks):
            groups = sock.getsockopt(SOL_NETLINK, LIST_MEMBERSHIPS, 64)
            options = [sock.getsockopt(SOL_NETLINK, option, 4) for option in (3, 4, 5, 8, 10, 11, 12)]
            found[f"netlink {number}"] = sock.getsockname(), groups, options, sock.getblocking(), sock.proto
        return found

    def verify(self) -> str | None:
        """The kernel answers, and tells what is new."""
        problem = differences(self.before, self.take())
        other = self.socks[1]
        # struct ifinfomsg, of the loopback interface.
        request = struct.pack("=BxHiII", 0, 0, 1, 0, 0)
        other.send(struct.pack("=IHHII", 16 + len(request), RTM_GETLINK, NLM_F_REQUEST, 1, 0) + request)
        select.select([other], [], [], 10)
        kind = struct.unpack_from("=IH", other.recv(1 << 16))[1]
        for each in self.socks:
            each.close()
        return problem or unlike("the kind of the answer", RTM_NEWLINK, kind)


class RawSockets(Case):
    """IPv4 and IPv6: with a filter of ICMP types, bound, connected, with headers of their own."""

    def setup(self) -> None:
        """One of each."""
        raw4 = [socket.socket(socket.AF_INET, socket.SOCK_RAW, protocol) for protocol in (1, 1, 253, 255)]
        raw6 = [socket.socket(socket.AF_INET6, socket.SOCK_RAW, protocol) for protocol in (58, 253)]
        self.socks = [*raw4, *raw6]
        raw4[0].setsockopt(SOL_RAW, 1, struct.pack("=I", ~(1 << 0) & 0xFFFF_FFFF))  # echo replies alone
        raw4[1].bind(("127.0.0.1", 0))
        raw4[2].connect(("127.0.0.2", 0))
        raw6[0].setsockopt(SOL_ICMPV6, 1, b"\xff" * 16 + bytes(16))
        raw6[1].connect(("::1", 0))
        raw6[1].setsockopt(socket.IPPROTO_IPV6, 7, 2)
        self.before = self.take()

    def take(self) -> dict[str, Any]:
        """Names and options."""
        found = all_told(self.socks)
        found["ICMP filter"] = self.socks[0].getsockopt(SOL_RAW, 1, 4)
        found["headers"] = [sock.getsockopt(socket.IPPROTO_IP, 3) for sock in self.socks[:4]]
        found["ICMPv6 filter"] = self.socks[4].getsockopt(SOL_ICMPV6, 1, 32)
        found["checksum"] = self.socks[5].getsockopt(socket.IPPROTO_IPV6, 7)
        return found

    def verify(self) -> str | None:
        """An echo comes; a connected socket sends and hears its peer alone."""
        problem = differences(self.before, self.take())
        echo, _, connected, _, _, connected6 = self.socks
        echo.sendto(echo_request(4711, b"echo"), ("127.0.0.1", 0))
        problem = problem or comes(echo, b"echo")
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as peer:
            peer.bind(("127.0.0.2", 0))
            connected.send(b"there")
            problem = problem or comes(peer, b"there")
            peer.sendto(b"back", ("127.0.0.1", 0))
            problem = problem or comes(connected, b"back")
        # The kernel writes the checksum into bytes 2 and 3.
        connected6.send(b"....itself")
        problem = problem or comes(connected6, b"itself")
        for each in self.socks:
            each.close()
        return problem


class PingSockets(Case):
    """Datagram sockets of ICMP: the identifier is their own."""

    def setup(self) -> None:
        """Bound, and to be bound."""
        allowed = Path("/proc/sys/net/ipv4/ping_group_range").read_text().split()
        if not int(allowed[0]) <= os.getegid() <= int(allowed[1]):
            raise Unsupported("ping sockets are not allowed here (net.ipv4.ping_group_range)")
        self.socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1) for _ in range(2)]
        self.socks[0].bind(("127.0.0.1", 4712))
        self.before = all_told(self.socks)

    def verify(self) -> str | None:
        """Echoes come."""
        problem = differences(self.before, all_told(self.socks))
        for sock in self.socks:
            sock.sendto(echo_request(1, b"echo"), ("127.0.0.1", 0))
            problem = problem or comes(sock, b"echo")
            sock.close()
        return problem


class PacketSockets(Case):
    """Of one interface and of all, with a filter, in promiscuous mode, receiving nothing."""

    def setup(self) -> None:
        """One of each."""
        lo = socket.if_nametoindex("lo")
        self.socks = [
            socket.socket(socket.AF_PACKET, kind, 0)
            for kind in (socket.SOCK_RAW, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_DGRAM)
        ]
        filtered, datagrams, asking, _ = self.socks
        program = ctypes.create_string_buffer(LONG_ONES, len(LONG_ONES))
        attached = struct.pack("=HxxxxxxQ", len(LONG_ONES) // 8, ctypes.addressof(program))
        filtered.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, attached)
        filtered.bind(("lo", ETH_P_ALL))
        filtered.setsockopt(SOL_PACKET, 8, 1)
        datagrams.bind(("lo", ETH_P_IP))
        group = bytes((1, 0, 0x5E, 1, 2, 3))
        for kind, asked in ((PROMISCUOUS, b""), (MULTICAST, group), (MULTICAST, group)):
            asking.setsockopt(SOL_PACKET, ADD_MEMBERSHIP, struct.pack("=iHH8s", lo, kind, len(asked), asked))
        self.before = self.take()

    def take(self) -> dict[str, Any]:
        """Names and options."""
        return {
            f"packet {number}": (
                sock.getsockname()[:2],
                sock.type,
                [sock.getsockopt(SOL_PACKET, option, 4) for option in (8, 9, 10, 12, 14, 15, 17, 19, 20, 23)],
            )
            for number, sock in enumerate(self.socks)
        }

    def verify(self) -> str | None:
        """What comes, what does not, and that the interface was asked as often as before."""
        problem = differences(self.before, self.take())
        filtered, datagrams, asking, silent = self.socks
        for sock in (filtered, datagrams):
            # What has come from others may have filled it.
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.recv(1000)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for content in (b"short", b"long" * 30):
                sender.sendto(content, ("127.0.0.1", 9))
        problem = problem or comes(datagrams, b"short")
        filtered.settimeout(10)
        first = filtered.recv(1000)
        lo = socket.if_nametoindex("lo")
        group = struct.pack("=iHH8s", lo, MULTICAST, 6, bytes((1, 0, 0x5E, 1, 2, 3)))
        for _ in range(2):
            asking.setsockopt(SOL_PACKET, DROP_MEMBERSHIP, group)
        asking.setsockopt(SOL_PACKET, DROP_MEMBERSHIP, struct.pack("=iHH8s", lo, PROMISCUOUS, 0, b""))
        nothing = select.select([silent], [], [], 0)[0]
        for each in self.socks:
            each.close()
        return problem or first_problem(
            unlike("the first that passes the filter", b"long" * 30, first[-120:]),
            unlike("what comes of no protocol", [], nothing),
        )
