"""setsockopt(2): the options that a program can read back, by level, and how each is set to what was read.

include/uapi/asm-generic/socket.h, linux/in.h, in6.h, tcp.h, udp.h, netlink.h, if_packet.h.
"""

import contextlib
import functools
import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from socket import SocketType

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall

SOL_SOCKET, SOL_IP, SOL_TCP, SOL_UDP, SOL_IPV6 = 1, 0, 6, 17, 41
SOL_ICMPV6, SOL_RAW, SOL_PACKET, SOL_NETLINK = 58, 255, 263, 270
SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF, SO_REUSEPORT, SO_PASSCRED, SO_PEERCRED = 2, 7, 8, 15, 16, 17
SO_BINDTODEVICE, SO_ATTACH_FILTER, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 25, 26, 32, 33
SO_GET_FILTER, SO_PEEK_OFF, SO_LOCK_FILTER, SO_PEERGROUPS, SO_BUF_LOCK, SO_PASSPIDFD = 26, 42, 44, 59, 72, 76
SO_PROTOCOL, SO_DOMAIN, SO_TYPE = 38, 39, 3
IPV6_V6ONLY = 26
_SO_LINGER, _SO_RCVTIMEO, _SO_SNDTIMEO, _SO_TIMESTAMPING, _SO_TXTIME, _SO_MAX_PACING_RATE = 13, 20, 21, 37, 61, 47
IP_OPTIONS, _IP_MULTICAST_IF, _IP_UNICAST_IF, _TCP_CONGESTION, _TCP_ULP = 4, 32, 50, 13, 31
_IPV6_MULTICAST_IF, _IPV6_UNICAST_IF = 17, 76

# SO_BUF_LOCK stands behind the sizes, whose setting locks them.
_OF_ANY = {
    1: 4, SO_REUSEADDR: 4, 5: 4, 6: 4, SO_SNDBUF: 4, SO_RCVBUF: 4, 9: 4, 10: 4, 11: 4, 12: 4, _SO_LINGER: 8,
    SO_REUSEPORT: 4, 18: 4, _SO_RCVTIMEO: 16, _SO_SNDTIMEO: 16, SO_BINDTODEVICE: 16, 29: 4, 35: 4, 36: 4,
    _SO_TIMESTAMPING: 8, 40: 4, 41: 4, 43: 4, 45: 4, 46: 4, _SO_MAX_PACING_RATE: 8, 60: 4, _SO_TXTIME: 8,
    SO_PEEK_OFF: 4, 63: 4, 64: 4, 65: 8, 69: 4, 70: 4, SO_BUF_LOCK: 4, 73: 4, 74: 4, 75: 4, 82: 4,
}  # fmt: skip
_OF_UNIX = {SO_PASSCRED: 4, 34: 4, SO_PASSPIDFD: 4, 83: 4}
_OF_IP = {
    1: 4, 2: 4, IP_OPTIONS: 40, 6: 4, 7: 4, 8: 4, 10: 4, 11: 4, 12: 4, 13: 4, 15: 4, 18: 4, 19: 4, 20: 4, 21: 4,
    22: 4, 23: 4, 24: 4, 25: 4, 26: 4, _IP_MULTICAST_IF: 4, 33: 4, 34: 4, 49: 4, _IP_UNICAST_IF: 4,
    51: 4,
}  # fmt: skip
_OF_IPV6 = {
    IPV6_V6ONLY: 4, 16: 4, _IPV6_MULTICAST_IF: 4, 18: 4, 19: 4, 23: 4, 25: 4, 29: 4, 33: 4, 49: 4, 51: 4, 53: 4, 56: 4,
    58: 4, 60: 4, 62: 4, 66: 4, 67: 4, 70: 4, 72: 4, 73: 4, 74: 4, 75: 4, _IPV6_UNICAST_IF: 4, 77: 4, 78: 4,
}  # fmt: skip
_OF_TCP = {
    1: 4, 2: 4, 3: 4, 4: 4, 5: 4, 6: 4, 7: 4, 8: 4, 9: 4, 10: 4, _TCP_CONGESTION: 16, 16: 4, 17: 4, 18: 4, 23: 4,
    25: 4, 27: 4, 30: 4, _TCP_ULP: 16, 34: 4, 36: 4, 37: 4, 44: 4, 45: 4, 46: 4,
}  # fmt: skip
_OF_RAW = {SOL_IP: {3: 4}, SOL_IPV6: {7: 4, 36: 4}, SOL_RAW: {1: 4}, SOL_ICMPV6: {1: 32}}
_OF_NETLINK = {3: 4, 4: 4, 5: 4, 8: 4, 10: 4, 11: 4, 12: 4}
_OF_PACKET = {8: 4, 9: 4, 10: 4, 12: 4, 14: 4, 15: 4, 17: 4, 19: 4, 20: 4, 23: 4, 24: 4}
_OF_UDP = {1: 4, 100: 4, 101: 4, 102: 4, 103: 4, 104: 4}
_OF_MULTICAST = {(SOL_IP, name) for name in (32, 33, 34, 49)} | {(SOL_IPV6, name) for name in (17, 18, 19, 29)}
_TEXTS = {(SOL_SOCKET, SO_BINDTODEVICE), (SOL_TCP, _TCP_CONGESTION), (SOL_TCP, _TCP_ULP)}
# Interfaces go by their names: their numbers are another host's business. True: a number in network byte order.
_INTERFACES = {
    (SOL_IP, _IP_UNICAST_IF): True,
    (SOL_IPV6, _IPV6_MULTICAST_IF): False,
    (SOL_IPV6, _IPV6_UNICAST_IF): True,
}
_FORCED = {SO_SNDBUF: SO_SNDBUFFORCE, SO_RCVBUF: SO_RCVBUFFORCE}

Option = tuple[int, int]
PEEK_OFF: Option = (SOL_SOCKET, SO_PEEK_OFF)
TCP_MAXSEG: Option = (SOL_TCP, 2)
TCP_WINDOW_CLAMP: Option = (SOL_TCP, 10)
TCP_FASTOPEN_CONNECT: Option = (SOL_TCP, 30)
TCP_ULP: Option = (SOL_TCP, _TCP_ULP)
IP_TOS: Option = (SOL_IP, 1)
IPV6_TCLASS: Option = (SOL_IPV6, 67)
#: What changes without a call: sizes that follow the traffic, how far somebody has peeked, and the bits of congestion.
LIVELY: frozenset[Option] = frozenset(
    {(SOL_SOCKET, SO_SNDBUF), (SOL_SOCKET, SO_RCVBUF), PEEK_OFF, TCP_MAXSEG, TCP_WINDOW_CLAMP, IP_TOS, IPV6_TCLASS}
)
# What has more to it than its value.
_NOT_ALONE = frozenset({TCP_ULP, (SOL_SOCKET, SO_REUSEADDR)})
# What one call sets, another one takes back.
_TIMESTAMPS = frozenset((SOL_SOCKET, name) for name in (29, 35, _SO_TIMESTAMPING, 63, 64, 65))
UDP_ENCAP: Option = (SOL_UDP, 100)


def levels(family: int, kind: int, protocol: int) -> Iterator[tuple[int, dict[int, int]]]:
    """The levels of options that a socket has: for each option its number and the size of its value (bytes)."""
    yield SOL_SOCKET, _OF_ANY
    if family == socket.AF_UNIX:
        yield SOL_SOCKET, _OF_UNIX
    # With these, the kernel keeps notes of its own in what a connection has.
    but = _OF_MULTICAST if kind == socket.SOCK_STREAM else set()
    if family in (socket.AF_INET, socket.AF_INET6):
        yield SOL_IP, {name: size for name, size in _OF_IP.items() if (SOL_IP, name) not in but}
    if family == socket.AF_INET6:
        yield SOL_IPV6, {name: size for name, size in _OF_IPV6.items() if (SOL_IPV6, name) not in but}
    if protocol == socket.IPPROTO_TCP and kind == socket.SOCK_STREAM:
        yield SOL_TCP, _OF_TCP
    if family in (socket.AF_INET, socket.AF_INET6) and kind == socket.SOCK_RAW:
        yield from _OF_RAW.items()
    elif family == socket.AF_NETLINK:
        yield SOL_NETLINK, _OF_NETLINK
    elif family == socket.AF_PACKET:
        yield SOL_PACKET, _OF_PACKET
    elif protocol == socket.IPPROTO_UDP:
        yield SOL_UDP, _OF_UDP


@functools.cache
def readable(family: int, kind: int, protocol: int) -> tuple[tuple[int, int, int], ...]:
    """Level, number and size of each option that a new socket tells of."""
    found = []
    with socket.socket(family, kind, protocol) as fresh:
        for level, options in levels(family, kind, protocol):
            for name, size in options.items():
                with contextlib.suppress(OSError):
                    fresh.getsockopt(level, name, size)
                    found.append((level, name, size))
    return tuple(found)


def values(sock: SocketType) -> tuple[bytes | None, ...]:
    """What the kernel tells of all options of ``sock``, for `named`; None where it tells nothing."""
    return tuple([_value(sock, *each) for each in readable(sock.family, sock.type, sock.proto)])


def _value(sock: SocketType, level: int, name: int, size: int) -> bytes | None:
    try:
        return sock.getsockopt(level, name, size)
    except OSError:
        return None


def named(kind: tuple[int, int, int], values: tuple[bytes | None, ...]) -> dict[Option, bytes]:
    """What `values` has told of a socket of this family, type and protocol, by option."""
    pairs = zip(readable(*kind), values, strict=True)
    found = {(level, name): value for (level, name, _), value in pairs if value is not None}
    for option, network_order in _INTERFACES.items():
        if option in found:
            found[option] = _named(found[option], network_order)
    return found


def _named(value: bytes, network_order: bool) -> bytes:
    number = int.from_bytes(value, "big" if network_order else "little")
    return os.fsencode(socket.if_indextoname(number)) if number else b""


def defaults(family: int, kind: int, protocol: int) -> dict[Option, bytes]:
    """The options of a socket that has just been made."""
    with socket.socket(family, kind, protocol) as fresh:
        return named((family, kind, protocol), values(fresh))


def setting(option: Option, value: bytes) -> tuple[int, int, bytes]:
    """Level, name and value for the setsockopt(2) that makes the option read as ``value``.

    Raises OSError where it names a network interface that is not here.
    """
    level, name = option
    if option in _INTERFACES:
        number = socket.if_nametoindex(os.fsdecode(value)) if value else 0
        return level, name, number.to_bytes(4, "big" if _INTERFACES[option] else "little")
    if option in _TEXTS:
        return level, name, value.rstrip(b"\0")
    if level == SOL_SOCKET and name in _FORCED:
        # The kernel doubles what it is told, and keeps those without privileges below a limit (socket(7)).
        return level, _FORCED[name], struct.pack("=i", struct.unpack("=i", value)[0] // 2)
    return level, name, value


def changeable(kind: tuple[int, int, int]) -> frozenset[Option]:
    """The options of a connection that can be set to what was read late, when all else has been."""
    return frozenset((level, name) for level, name, _ in readable(*kind)) - LIVELY - _NOT_ALONE


def together(changed: Collection[Option]) -> set[Option]:
    """What must be set where these options have changed."""
    return {*changed, *(() if _TIMESTAMPS.isdisjoint(changed) else _TIMESTAMPS)}


def in_order(values: Mapping[Option, bytes]) -> list[tuple[Option, bytes]]:
    """Options in the order in which they can be set: first those that take something away."""
    return sorted(values.items(), key=lambda each: (any(each[1]), each))


def read_filter(sock: SocketType) -> bytes:
    """The classic BPF program attached to ``sock``. Raises OSError EACCES where it is an eBPF one.

    Its length is told and given in instructions of 8 bytes, not in bytes (net/core/filter.c, sk_get_filter).
    """
    room, length = bytearray(8), bytearray(4)

    def ask() -> int:
        place, count = address_of(room), address_of(length)
        what = "reading a socket's filter"
        syscall(what, NUMBERS["getsockopt"], sock.fileno(), SOL_SOCKET, SO_GET_FILTER, place, count)
        return int.from_bytes(length, "little")

    instructions = ask()
    if not instructions:
        return b""
    room = bytearray(8 * instructions)
    ask()
    return bytes(room)
