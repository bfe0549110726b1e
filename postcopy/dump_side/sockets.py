"""Sockets: what those of all families have; each family's own module says the rest."""

import errno
import os
import socket
import stat

from postcopy.dump_side import inet_sockets, netlink_sockets, packet_sockets, pipes, unix_sockets
from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table
from postcopy.kernel import socket_look, socket_options
from postcopy.kernel.socket_look import Kind, Told
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
    found = _describe(table, opened)
    if inode not in table.trusted_pipes and (holder := pipes.holder_outside(table, opened.link)):
        raise Refused(f"{opened.link}: process {holder} holds this socket too, which cannot be moved yet")
    table.sockets[inode] = table.pid
    return found


def _describe(table: Table, opened: Opened) -> Description:
    told = opened.shown.told if opened.shown is not None else socket_look.look(opened.sock)
    family, type_, protocol = told.kind
    if family == socket.AF_UNIX:
        return Description(unix=unix_sockets.collect(table, _common(table, opened, told), opened.sock))
    if family in (socket.AF_INET, socket.AF_INET6):
        inet = inet_sockets.collect(table, _common(table, opened, told), told, opened)
        if inet is not None:
            return Description(inet=inet)
    if family == socket.AF_NETLINK:
        return Description(netlink=netlink_sockets.collect(table, _common(table, opened, told), opened.sock))
    if family == socket.AF_PACKET:
        return Description(packet=packet_sockets.collect(table, _common(table, opened, told), opened.sock))
    name = _FAMILIES.get(family, f"family {family}")
    kind = _TYPES.get(type_, f"type {type_}")
    raise Refused(f"{opened.link}: {name} {kind} sockets (protocol {protocol}) cannot be moved yet")


def _common(table: Table, opened: Opened, told: Told) -> Socket:
    options = _options(table, told.kind, told.values)
    if told.is_filter_locked:
        raise Refused(f"{opened.link}: its filter is locked (SO_LOCK_FILTER), which cannot be moved yet")
    family, type_, protocol = told.kind
    return Socket(
        family=family,
        type=type_,
        protocol=protocol,
        inode=opened.stat.st_ino,
        nonblocking=bool(opened.flags & os.O_NONBLOCK),
        owner=(opened.stat.st_uid, opened.stat.st_gid),
        options=options,
        filter=_filter(opened) if told.has_filter else b"",
    )


def _filter(opened: Opened) -> bytes:
    try:
        return socket_options.read_filter(opened.sock)
    except OSError as error:
        if error.errno != errno.EACCES:
            raise
        raise Refused(f"{opened.link}: an eBPF program is attached to it, which cannot be moved yet") from None


def _options(table: Table, kind: Kind, values: tuple[bytes | None, ...]) -> list[SocketOption]:
    """The options that are not those of a new socket of the kind. Those of thousands of sockets are often the same."""
    found = table.socket_options.get((kind, values))
    if found is None:
        usual = _defaults(table, kind)
        named = socket_options.named(kind, values).items()
        found = [SocketOption(*option, value) for option, value in named if usual.get(option) != value]
        table.socket_options[kind, values] = found
    return found


def _defaults(table: Table, kind: Kind) -> dict[socket_options.Option, bytes]:
    """The options of a new socket of this family, type and protocol; added to the table once."""
    if kind not in table.socket_defaults:
        found = table.socket_defaults[kind] = socket_options.defaults(*kind)
        options = [SocketOption(*option, value) for option, value in found.items()]
        table.descriptors.socket_defaults.append(SocketDefaults(*kind, options))
    return table.socket_defaults[kind]
