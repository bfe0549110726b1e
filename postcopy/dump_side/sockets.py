"""Sockets: what those of all families have; each family's own module says the rest."""

import errno
import os
import socket
import stat
import struct

from postcopy.dump_side import inet_sockets, pipes, unix_sockets
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import socket_options
from postcopy.socket_kinds import Socket, SocketDefaults, SocketOption
from postcopy.state import Description

_FAMILIES = {
    socket.AF_INET: "IPv4",
    socket.AF_INET6: "IPv6",
    socket.AF_NETLINK: "netlink",
    socket.AF_PACKET: "packet",
    socket.AF_VSOCK: "vsock",
    socket.AF_ALG: "kernel crypto (AF_ALG)",
    44: "XDP",
}
_TYPES = {socket.SOCK_STREAM: "stream", socket.SOCK_DGRAM: "datagram", socket.SOCK_RAW: "raw"}


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a socket; None for other kinds."""
    if opened.mode != stat.S_IFSOCK:
        return None
    inode = opened.stat.st_ino
    with opened.duplicate() as fd, socket.socket(fileno=os.dup(fd)) as own:
        found = _describe(table, opened, own)
        if inode not in table.trusted_pipes and (holder := pipes.holder_outside(table, opened.link)):
            raise Refused(f"{opened.link}: process {holder} holds this socket too, which cannot be moved yet")
        table.sockets[inode] = opened.pid
        return found


def _describe(table: Table, opened: Opened, own: socket.socket) -> Description:
    if own.family == socket.AF_UNIX:
        return Description(unix=unix_sockets.collect(table, _common(table, opened, own), own))
    if own.family in (socket.AF_INET, socket.AF_INET6):
        inet = inet_sockets.collect(table, _common(table, opened, own), own)
        if inet is not None:
            return Description(inet=inet)
    family = _FAMILIES.get(own.family, f"family {own.family}")
    kind = _TYPES.get(own.type, f"type {own.type}")
    raise Refused(f"{opened.link}: {family} {kind} sockets (protocol {own.proto}) cannot be moved yet")


def _common(table: Table, opened: Opened, own: socket.socket) -> Socket:
    try:
        program = socket_options.read_filter(own)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        raise Refused(f"{opened.link}: an eBPF program is attached to it, which cannot be moved yet") from None
    usual = _defaults(table, own)
    options = socket_options.read(own)
    if struct.unpack("=i", own.getsockopt(socket_options.SOL_SOCKET, socket_options.SO_LOCK_FILTER, 4))[0]:
        raise Refused(f"{opened.link}: its filter is locked (SO_LOCK_FILTER), which cannot be moved yet")
    return Socket(
        family=own.family,
        type=own.type,
        protocol=own.proto,
        inode=opened.stat.st_ino,
        nonblocking=bool(opened.flags & os.O_NONBLOCK),
        owner=(opened.stat.st_uid, opened.stat.st_gid),
        options=[SocketOption(*option, value) for option, value in options.items() if usual.get(option) != value],
        filter=program,
    )


def _defaults(table: Table, own: socket.socket) -> dict[socket_options.Option, bytes]:
    """The options of a new socket like ``own``; added to the table once."""
    kind = own.family, own.type, own.proto
    if kind not in table.socket_defaults:
        found = table.socket_defaults[kind] = socket_options.defaults(*kind)
        options = [SocketOption(*option, value) for option, value in found.items()]
        table.descriptors.socket_defaults.append(SocketDefaults(*kind, options))
    return table.socket_defaults[kind]
