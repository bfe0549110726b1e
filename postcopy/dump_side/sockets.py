"""Sockets: what those of all families have; each family's own module says the rest."""

import errno
import os
import socket
import stat
from socket import SocketType

from postcopy.dump_side import inet_sockets, netlink_sockets, packet_sockets, pipes, unix_sockets
from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table
from postcopy.kernel import socket_options
from postcopy.socket_kinds import Socket, SocketDefaults, SocketOption
from postcopy.state import Description

_FAMILIES = {
    socket.AF_INET: "IPv4",
    socket.AF_INET6: "IPv6",
    socket.AF_VSOCK: "vsock",
    socket.AF_ALG: "kernel crypto (AF_ALG)",
    44: "XDP",
}
_TYPES: dict[int, str] = {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "datagram", socket.SOCK_RAW: "raw"}


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a socket; None for other kinds."""
    if opened.mode != stat.S_IFSOCK or opened.flags & O_PATH:
        return None
    inode = opened.stat.st_ino
    own = SocketType(fileno=opened.own)
    try:
        found = _describe(table, opened, own)
    finally:
        own.detach()
    if inode not in table.trusted_pipes and (holder := pipes.holder_outside(table, opened.link)):
        raise Refused(f"{opened.link}: process {holder} holds this socket too, which cannot be moved yet")
    table.sockets[inode] = table.pid
    return found


def _describe(table: Table, opened: Opened, own: SocketType) -> Description:
    if own.family == socket.AF_UNIX:
        return Description(unix=unix_sockets.collect(table, _common(table, opened, own), own))
    if own.family in (socket.AF_INET, socket.AF_INET6):
        inet = inet_sockets.collect(table, _common(table, opened, own), own)
        if inet is not None:
            return Description(inet=inet)
    if own.family == socket.AF_NETLINK:
        return Description(netlink=netlink_sockets.collect(table, _common(table, opened, own), own))
    if own.family == socket.AF_PACKET:
        return Description(packet=packet_sockets.collect(table, _common(table, opened, own), own))
    family = _FAMILIES.get(own.family, f"family {own.family}")
    kind = _TYPES.get(own.type, f"type {own.type}")
    raise Refused(f"{opened.link}: {family} {kind} sockets (protocol {own.proto}) cannot be moved yet")


def _common(table: Table, opened: Opened, own: SocketType) -> Socket:
    told = table.told_of_socket(opened.fd)
    try:
        told = told or socket_options.told(own)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        raise Refused(f"{opened.link}: an eBPF program is attached to it, which cannot be moved yet") from None
    options = _options(table, own, told.values)
    if told.is_filter_locked:
        raise Refused(f"{opened.link}: its filter is locked (SO_LOCK_FILTER), which cannot be moved yet")
    return Socket(
        family=own.family,
        type=own.type,
        protocol=own.proto,
        inode=opened.stat.st_ino,
        nonblocking=bool(opened.flags & os.O_NONBLOCK),
        owner=(opened.stat.st_uid, opened.stat.st_gid),
        options=options,
        filter=told.filter,
    )


def _options(table: Table, own: SocketType, values: tuple[bytes | None, ...]) -> list[SocketOption]:
    """The options that are not those of a new socket like ``own``. Those of thousands of sockets are often the same."""
    kind = own.family, own.type, own.proto
    if (kind, values) not in table.socket_options:
        usual = _defaults(table, kind)
        named = socket_options.named(kind, values).items()
        table.socket_options[kind, values] = [
            SocketOption(*option, value) for option, value in named if usual.get(option) != value
        ]
    return table.socket_options[kind, values]


def _defaults(table: Table, kind: tuple[int, int, int]) -> dict[socket_options.Option, bytes]:
    """The options of a new socket of this family, type and protocol; added to the table once."""
    if kind not in table.socket_defaults:
        found = table.socket_defaults[kind] = socket_options.defaults(*kind)
        options = [SocketOption(*option, value) for option, value in found.items()]
        table.descriptors.socket_defaults.append(SocketDefaults(*kind, options))
    return table.socket_defaults[kind]
