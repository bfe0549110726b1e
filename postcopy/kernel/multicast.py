"""Multicast groups of a socket (ip(7), MCAST_MSFILTER; linux/in.h, struct group_req and struct group_filter)."""

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator
from socket import SocketType

from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.socket_options import SOL_IP, SOL_IPV6

MCAST_JOIN_GROUP, MCAST_MSFILTER = 42, 48
_HEADER, _ADDRESS = 144, 128  # bytes of a struct group_filter without sources, of a struct sockaddr_storage
_MCAST_EXCLUDE = 0
_MOST_SOURCES = 256


def groups_of_host(family: int) -> Iterator[tuple[str, bytes]]:
    """The groups that anybody in this network namespace has joined: interface and packed address."""
    with contextlib.suppress(FileNotFoundError):
        if family == socket.AF_INET6:
            with open("/proc/net/igmp6") as stream:
                for words in map(str.split, stream):
                    yield words[1], bytes.fromhex(words[2])
            return
        with open("/proc/net/igmp") as stream:
            interface = ""
            for line in list(stream)[1:]:
                if not line.startswith("\t"):
                    interface = line.split()[1]
                else:
                    yield interface, int(line.split()[0], 16).to_bytes(4, "little")


def level(family: int) -> int:
    """Where a family's multicast options are."""
    return SOL_IPV6 if family == socket.AF_INET6 else SOL_IP


def storage(address: bytes) -> bytes:
    """A group or source as a struct sockaddr_storage."""
    if len(address) == 4:
        return struct.pack("=HH4s", socket.AF_INET, 0, address).ljust(_ADDRESS, b"\0")
    return struct.pack("=HHI16s", socket.AF_INET6, 0, 0, address).ljust(_ADDRESS, b"\0")


def join(interface: int, group: bytes) -> bytes:
    """The value for MCAST_JOIN_GROUP."""
    return struct.pack("=Ixxxx", interface) + storage(group)


def source_filter(interface: int, group: bytes, excluding: bool, sources: list[bytes]) -> bytes:
    """The value for MCAST_MSFILTER."""
    mode = _MCAST_EXCLUDE if excluding else 1 - _MCAST_EXCLUDE
    head = join(interface, group) + struct.pack("=II", mode, len(sources))
    return head + b"".join(map(storage, sources))


def membership(sock: SocketType, interface: str, group: bytes) -> tuple[bool, list[bytes]] | None:
    """Whether the socket excludes, and which, sources; None where it is no member of the group."""
    room = bytearray(_HEADER + _ADDRESS * _MOST_SOURCES)
    head = join(socket.if_nametoindex(interface), group) + struct.pack("=II", 0, _MOST_SOURCES)
    room[: len(head)] = head
    length = bytearray(struct.pack("=i", len(room)))
    what = "asking for a socket's multicast groups"
    try:
        at = level(sock.family), MCAST_MSFILTER, address_of(room), address_of(length)
        syscall(what, NUMBERS["getsockopt"], sock.fileno(), *at)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EINVAL, errno.ENODEV):
            return None
        raise
    mode, count = struct.unpack_from("=II", room, _HEADER - 8)
    place, size = (4, 4) if sock.family == socket.AF_INET else (8, 16)
    starts = [_HEADER + _ADDRESS * number + place for number in range(count)]
    return mode == _MCAST_EXCLUDE, [bytes(room[start : start + size]) for start in starts]
