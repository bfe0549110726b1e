"""What makes sense of sockets: the lines of `postcopy.soundness` for `postcopy.socket_kinds`."""

import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from postcopy import in_flight
from postcopy.kernel.tcp_repair import CLOSED_HERE, ESTABLISHED, FIN_WAIT2, SYNCHRONIZED
from postcopy.socket_kinds import (
    InetSocket,
    Membership,
    NetlinkSocket,
    PacketMembership,
    PacketSocket,
    PeerCredentials,
    Socket,
    SocketDefaults,
    TcpConnection,
    UnixName,
    UnixSocket,
    is_mutual,
)
from postcopy.state import Tree

_UINT16, _INT32, _UINT32 = range(1 << 16), range(1 << 31), range(1 << 32)
_NAME_SIZES = range(109)  # struct sockaddr_un, behind the family
_ADDRESS_SIZES: dict[int, int] = {socket.AF_INET: 16, socket.AF_INET6: 28}
_MOST_OPTIONS = 512

NUMBERS: Mapping[type, Mapping[str, range]] = {
    NetlinkSocket: {"port": _UINT32},
    PacketMembership: {"kind": range(4)},
    PacketSocket: {"receives": _UINT16},
    PeerCredentials: {"uid": _UINT32, "gid": _UINT32},
    SocketDefaults: {"family": range(64), "type": range(16), "protocol": _UINT16},
    UnixSocket: {
        "mode": range(0o10000),
        "peer": range(-1, 1 << 63),
        "backlog": range(-1, 1 << 31),
        "maker": range(1 << 22),
    },
}

LENGTHS: Mapping[type, Mapping[str, range]] = {
    Membership: {"interface": range(1, 16)},  # IFNAMSIZ
    NetlinkSocket: {"groups": range(4097)},
    PacketMembership: {"interface": range(1, 16), "address": range(33)},  # MAX_ADDR_LEN
    PacketSocket: {"interface": range(16)},
    PeerCredentials: {"groups": range(65537)},
    SocketDefaults: {"options": range(_MOST_OPTIONS)},
    UnixName: {"name": range(1, 109)},
    UnixSocket: {"name": _NAME_SIZES, "outside": _NAME_SIZES},
}

ITEM_NUMBERS: Mapping[type, Mapping[str, range]] = {
    NetlinkSocket: {"groups": range(1, 1 << 16)},
    PeerCredentials: {"groups": _UINT32},
    UnixSocket: {"file_owner": _UINT32},
}


def _socket(state: Socket) -> Iterator[str]:
    if len(state.filter) % 8:
        yield f"filter: {len(state.filter)} bytes are no whole instructions"


def _unix(state: UnixSocket) -> Iterator[str]:
    if state.socket.family != socket.AF_UNIX:
        yield f"socket.family: {state.socket.family} is not that of Unix sockets"
    if state.place and (not state.place.startswith("/") or "\0" in state.place):
        yield f"place: {state.place[:80]!r} is no absolute path"
    if state.place and (not state.name or state.name.startswith(b"\0")):
        yield f"place: {state.place[:80]!r} for a socket whose name is no path"
    if state.outside and (state.peer or state.socket.type != socket.SOCK_DGRAM):
        yield "outside: it is connected within the tree, or no datagram socket"
    if state.backlog >= 0 and (state.peer or state.queue):
        yield "backlog: it listens, and is connected or has messages"
    if state.accepted and (not state.name or not state.peer or state.socket.type == socket.SOCK_DGRAM):
        yield "accepted: it has no name or is not connected"


def _inet(state: InetSocket) -> Iterator[str]:
    size = _ADDRESS_SIZES.get(state.socket.family)
    if size is None:
        yield f"socket.family: {state.socket.family} is neither IPv4 nor IPv6"
        return
    family = state.socket.family.to_bytes(2, "little")
    for name, address in (("local", state.local), ("remote", state.remote)):
        if address and (len(address) != size or address[:2] != family):
            yield f"{name}: {address.hex()} is no address of family {state.socket.family}"
    if state.connection is not None and not (state.local and state.remote):
        yield "connection: it has not two ends"
    if state.backlog >= 0 and (state.connection is not None or not state.local):
        yield "backlog: it listens, and is connected or has no address"
    # Of these there are thousands: both are looked at here (`INCLUDED`), and where nothing can be wrong, not at all.
    if state.socket.filter:
        yield from (f"socket.{problem}" for problem in _socket(state.socket))
    if state.connection is not None and (state.connection.state != ESTABLISHED or state.connection.fin_unsent):
        yield from (f"connection.{problem}" for problem in _connection(state.connection))


def _connection(state: TcpConnection) -> Iterator[str]:
    if state.state not in SYNCHRONIZED:
        yield f"state: {state.state} is none that can be taken over"
    if state.fin_unsent and state.state not in CLOSED_HERE:
        yield f"fin_unsent: in state {state.state} there is no FIN to send"
    if state.state == FIN_WAIT2 and (state.sent or state.unsent or state.fin_unsent):
        yield "state: the peer has acknowledged all, and something is left to acknowledge"


def _membership(state: Membership) -> Iterator[str]:
    for address in (state.group, *state.sources):
        if len(address) not in (4, 16) or len(address) != len(state.group):
            yield f"group: {address.hex()} is no address"


def _netlink(state: NetlinkSocket) -> Iterator[str]:
    if state.socket.family != socket.AF_NETLINK:
        yield f"socket.family: {state.socket.family} is not that of netlink sockets"


def _packet(state: PacketSocket) -> Iterator[str]:
    if state.socket.family != socket.AF_PACKET:
        yield f"socket.family: {state.socket.family} is not that of packet sockets"


def tree(whole: Tree) -> Iterator[str]:
    """That sockets are known by their numbers, and that those that are connected agree about it."""
    descriptions = whole.descriptors.descriptions
    kinds = [each for one in descriptions for each in (one.unix, one.inet, one.netlink, one.packet)]
    sockets = [each.socket for each in kinds if each is not None]
    seen: set[int] = set()
    for each in sockets:
        if each.inode in seen:
            yield f"descriptors: two sockets have number {each.inode}"
        seen.add(each.inode)
    unix = {one.unix.socket.inode: one.unix for one in descriptions if one.unix is not None}
    for inode, one in unix.items():
        if one.peer > 0 and one.peer not in unix:
            yield f"descriptors: socket {inode} is connected to {one.peer}, which is not there"
        elif one.peer > 0 and one.socket.type != unix[one.peer].socket.type:
            yield f"descriptors: sockets {inode} and {one.peer} are connected, and of two types"
        elif one.peer > 0 and one.socket.type != socket.SOCK_DGRAM and unix[one.peer].peer != inode:
            yield f"descriptors: socket {inode} is connected to {one.peer}, and that is not to it"
    pids = {0, *(member.pid for member in whole.members)}
    for inode, one in unix.items():
        for message in one.queue:
            if message.credentials and message.credentials[0] not in pids:
                yield f"descriptors: a message in socket {inode} is of process {message.credentials[0]}"
            for number in message.rights:
                if number >= len(descriptions):
                    yield f"descriptors: on their way in socket {inode} is {number}, none of {len(descriptions)}"
    yield from _pending(unix)
    yield from _makers(whole, unix)


def _pending(unix: Mapping[int, UnixSocket]) -> Iterator[str]:
    """Connections that wait to be accepted are each made by a socket that is connected to nothing else."""
    seen: set[int] = set()
    for inode, one in unix.items():
        if len(one.pending) > one.backlog + 1:
            count, backlog = len(one.pending), one.backlog
            yield f"descriptors: {count} connections wait for socket {inode}, with a backlog of {backlog}"
        for each in one.pending:
            waiting = unix.get(each)
            if waiting is None or each in seen or waiting.peer or waiting.queue or waiting.backlog >= 0:
                yield f"descriptors: socket {each} does not wait to be accepted by {inode} alone"
            elif waiting.socket.type != one.socket.type:
                yield f"descriptors: socket {each}, which waits to be accepted by {inode}, is of another type"
            seen.add(each)


def _makers(whole: Tree, unix: Mapping[int, UnixSocket]) -> Iterator[str]:
    """Of two ends either one process makes both, when it makes its table, or each has a maker that makes it before."""
    with_tables = {process.pid for process in whole.processes if not process.table_of}
    holders: dict[int, int] = {}
    for number, pid in in_flight.makers(whole).items():
        one = whole.descriptors.descriptions[number].unix
        if one is not None:
            holders[one.socket.inode] = pid
    for process in whole.processes:
        for slot in process.slots:
            if slot.description < len(whole.descriptors.descriptions):
                one = whole.descriptors.descriptions[slot.description].unix
                if one is not None:
                    holders.setdefault(one.socket.inode, process.pid)
    for inode, one in unix.items():
        if one.maker and one.maker not in with_tables:
            yield f"descriptors: process {one.maker}, maker of socket {inode}, has no table"
        if one.maker and one.backlog < 0 and not one.peer:
            yield f"descriptors: socket {inode}, which process {one.maker} makes, neither listens nor is connected"
        if one.maker and one.peer < 0 and not one.accepted:
            yield f"descriptors: socket {inode}, which process {one.maker} makes, has lost its peer"
        peer = unix.get(one.peer)
        if peer is None or peer.peer != inode:
            if one.maker and one.backlog < 0 and one.peer > 0:
                yield f"descriptors: socket {inode}, which process {one.maker} makes, has no peer"
            continue
        both = f"descriptors: sockets {inode} and {one.peer}, a pair"
        if one.accepted and peer.accepted:
            yield f"{both}, have both been accepted"
        elif bool(one.maker) != bool(peer.maker):
            yield f"{both}, of which one has a maker"
        elif one.maker != peer.maker and not (one.accepted or peer.accepted):
            yield f"{both}, are made by two processes"
        elif not one.maker and holders.get(inode) != holders.get(one.peer) and is_mutual(one, peer):
            yield f"{both}, have nobody who makes both"


# Fields whose structs are looked at by the rule of the struct that has them.
INCLUDED: Mapping[type, Collection[str]] = {InetSocket: ("socket", "connection")}

CHECKS: Mapping[type, Callable[[Any], Iterator[str]]] = {
    InetSocket: _inet,
    Membership: _membership,
    NetlinkSocket: _netlink,
    PacketSocket: _packet,
    Socket: _socket,
    TcpConnection: _connection,
    UnixSocket: _unix,
}
