"""sock_diag(7): what the kernel says of Unix and packet sockets of our network namespace (NETLINK_SOCK_DIAG)."""

import os
import socket
import struct
from collections.abc import Iterator

from msgspec import Struct

from postcopy.kernel.libc import refused
from postcopy.kernel.netlink import HEADER, attributes, messages

_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY = 4, 20
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_NAME, _UDIAG_SHOW_VFS, _UDIAG_SHOW_PEER, _UDIAG_SHOW_ICONS, _UDIAG_SHOW_RQLEN = 1, 2, 4, 8, 16
_UNIX_DIAG_NAME, _UNIX_DIAG_VFS, _UNIX_DIAG_PEER, _UNIX_DIAG_ICONS, _UNIX_DIAG_RQLEN, _UNIX_DIAG_SHUTDOWN = (
    0,
    1,
    2,
    3,
    4,
    6,
)
_PACKET_SHOW_MCLIST, _PACKET_SHOW_RING_CFG = 2, 4
_PACKET_DIAG_MCLIST, _PACKET_DIAG_RX_RING, _PACKET_DIAG_TX_RING = 1, 2, 3
_TCP_LISTEN = 10
_RECEIVE_SIZE = 1 << 20

DEAD = -1  # in place of a peer's inode: that socket has been closed


class UnixDiag(Struct, frozen=True):
    """One Unix socket. ``name``: what follows the family in its address, as bind(2) was given it (a path with its NUL).

    ``vfs``: inode and device (st_dev) of the socket's file, where it has one. ``peer``: an inode, 0 or `DEAD`.
    ``shutdown``: RCV_SHUTDOWN (1) and SEND_SHUTDOWN (2). ``queued``: bytes to read, or connections to be accepted;
    ``waiting``: who has made these, by inode, in their order (0: one that has been closed since).
    """

    inode: int
    kind: int
    listening: bool
    name: bytes
    vfs: tuple[int, int] | None
    peer: int
    shutdown: int
    queued: int
    backlog: int
    waiting: tuple[int, ...]


def unix_sockets() -> dict[int, UnixDiag]:
    """Every Unix socket of the network namespace by its inode. Raises OSError."""
    shown = _UDIAG_SHOW_NAME | _UDIAG_SHOW_VFS | _UDIAG_SHOW_PEER | _UDIAG_SHOW_ICONS | _UDIAG_SHOW_RQLEN
    request = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFF_FFFF, 0, shown, 0, 0)
    return {found.inode: found for found in map(_unix, _dump(request))}


class PacketDiag(Struct, frozen=True):
    """One packet socket: what it ``asks`` of interfaces (index, kind, address), and whether it ``has_ring``."""

    asks: list[tuple[int, int, bytes]]
    has_ring: bool


def packet_sockets() -> dict[int, PacketDiag]:
    """Every packet socket of the network namespace by its inode. Raises OSError where this kernel cannot tell."""
    # struct packet_diag_req, linux/packet_diag.h
    request = struct.pack("=BBHIIII", socket.AF_PACKET, 0, 0, 0, _PACKET_SHOW_MCLIST | _PACKET_SHOW_RING_CFG, 0, 0)
    return dict(map(_packet, _dump(request)))


def _packet(body: bytes) -> tuple[int, PacketDiag]:
    told = dict(attributes(body[16:]))
    asks = struct.iter_unpack("=IIHH32s", told.get(_PACKET_DIAG_MCLIST, b""))
    found = [(index, kind, address[:length]) for index, count, kind, length, address in asks for _ in range(count)]
    has_ring = _PACKET_DIAG_RX_RING in told or _PACKET_DIAG_TX_RING in told
    return struct.unpack_from("=I", body, 4)[0], PacketDiag(found, has_ring)


def _dump(request: bytes) -> Iterator[bytes]:
    """The bodies of the messages that answer a dump request."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as door:
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        door.send(HEADER.pack(HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request)
        while True:
            for kind, body in messages(door.recv(_RECEIVE_SIZE)):
                if kind == _NLMSG_ERROR:
                    raise refused("listing the sockets of this host (sock_diag)", -struct.unpack_from("=i", body)[0])
                if kind == _NLMSG_DONE:
                    return
                yield body


def _unix(body: bytes) -> UnixDiag:
    _, kind, state, _, inode, _, _ = struct.unpack_from("=BBBBIII", body)
    told = dict(attributes(body[16:]))
    queued, backlog = struct.unpack("=II", told.get(_UNIX_DIAG_RQLEN, bytes(8)))
    vfs = told.get(_UNIX_DIAG_VFS)
    peer = told.get(_UNIX_DIAG_PEER)
    return UnixDiag(
        inode=inode,
        kind=kind,
        listening=state == _TCP_LISTEN,
        name=told.get(_UNIX_DIAG_NAME, b""),
        vfs=_file(vfs) if vfs else None,
        peer=(struct.unpack("=I", peer)[0] or DEAD) if peer else 0,
        shutdown=told.get(_UNIX_DIAG_SHUTDOWN, b"\0")[0],
        queued=queued,
        backlog=backlog,
        waiting=tuple(each for (each,) in struct.iter_unpack("=I", told.get(_UNIX_DIAG_ICONS, b""))),
    )


def _file(vfs: bytes) -> tuple[int, int]:
    inode, device = struct.unpack("=II", vfs)
    # The kernel's own dev_t: 12 bits of major, 20 of minor number.
    return inode, os.makedev(device >> 20, device & 0xFFFFF)
