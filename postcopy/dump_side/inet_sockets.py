"""TCP, UDP, ICMP and raw sockets over IPv4 and IPv6: addresses, state; `tcp_connections` takes connections apart."""

import select
import socket
from socket import SocketType

from postcopy.dump_side import multicast, tcp_connections
from postcopy.dump_side.choices import CLOSED, MOVED
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import net_tables, socket_address, socket_options, tcp_repair, udp
from postcopy.kernel.socket_look import Told
from postcopy.kernel.tcp_repair import STATES
from postcopy.socket_kinds import InetSocket, Socket

_PING = {(socket.SOCK_DGRAM, socket.IPPROTO_ICMP), (socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6)}
_BROKEN = select.POLLIN | select.POLLRDHUP


def collect(table: Table, common: Socket, told: Told, opened: Opened) -> InetSocket | None:
    """The socket, which has told so much; None for other protocols. Raises Refused."""
    if told.info:
        return _tcp(table, common, told, opened)
    own = opened.sock
    if (common.type, common.protocol) == (socket.SOCK_DGRAM, socket.IPPROTO_UDP):
        return _udp(table, common, own)
    if common.type == socket.SOCK_RAW:
        return _raw(table, common, own)
    if (common.type, common.protocol) in _PING:
        return _datagram(common, own, _local(common, own), _connected_to(common, own))
    return None


def _tcp(table: Table, common: Socket, told: Told, opened: Opened) -> InetSocket:
    title = f"socket:[{common.inode}]"
    info = tcp_repair.of_raw(told.info)
    # Those that are not as in a new socket.
    options = {(each.level, each.name): each.value for each in common.options}
    if options.get(socket_options.TCP_ULP, b"").strip(b"\0"):
        raise Refused(f"{title}: TCP with a protocol on top in the kernel (TLS) cannot be moved yet")
    local, remote = _checked(common, told.local if any(told.local[2:4]) else b""), b""
    connection, ended, aborted = None, False, False
    if info.state == tcp_repair.LISTEN:
        if table.silence is not None:
            table.silence(table.pid, local, b"")
            info = tcp_repair.info(opened.sock)
        if info.waiting and table.frozen:
            text = socket_address.text(local)
            raise Refused(f"{title}: TCP connections to {text} wait to be accepted ({info.waiting}): try again")
    elif info.state == tcp_repair.CLOSE:
        events = _events(opened.own)
        aborted = bool(events & select.POLLERR)
        ended = aborted or events & _BROKEN == _BROKEN
        # With a reset goes what had not been read (RFC 9293, 3.10.7.4).
        if ended and not aborted and tcp_repair.unread(opened.sock):
            raise Refused(f"{title}: a TCP connection that has ended with data left to read cannot be moved yet")
    elif table.choices.connections == CLOSED:
        ended = aborted = True
    else:
        remote = _checked(common, told.remote)
        if reason := _unmovable(table, info):
            to = f" to {socket_address.text(remote)}" if remote else ""
            where = f"{title}: the TCP connection {socket_address.text(local)}{to}"
            raise Refused(f"{where} {reason}")
        apart = opened.shown.apart if opened.shown else None
        if table.silence is not None and table.silence(table.pid, local, remote):
            # Until now something may have come for it.
            info, apart = tcp_repair.info(opened.sock), None
        if info.state == tcp_repair.ESTABLISHED and socket_address.is_loopback(remote):
            table.loops.append((local, remote))
        if table.frozen:
            if apart is None:
                if common.inode in table.theirs:
                    table.all_shown()
                # Something may have come since.
                apart = tcp_repair.take_apart(opened.own, told.peek_offset, tcp_repair.unread(opened.sock))
            connection = tcp_connections.connection(apart, info)
    return InetSocket(
        socket=common,
        local=local,
        remote=remote,
        backlog=info.backlog if info.state == tcp_repair.LISTEN else -1,
        memberships=[],
        connection=connection,
        ended=ended,
        aborted=aborted,
    )


def check_loops(table: Table, problems: list[str]) -> None:
    """Once all sockets have been collected: who is connected to a process that stays here would be so to nobody."""
    if not table.loops:
        return
    addresses = [
        (socket_address.unpack(one.inet.local), one.inet)
        for one in table.descriptors.descriptions
        if one.inet is not None and one.inet.local
    ]
    tree = {(local, socket_address.unpack(one.remote)) for local, one in addresses if one.remote}
    # Where a connection waits to be accepted, its other end is nobody's yet.
    ports = {port for (_, port), one in addresses if one.backlog >= 0}
    for local, remote in table.loops:
        ends = socket_address.unpack(local), socket_address.unpack(remote)
        if ends[::-1] not in tree and ends[1][1] not in ports:
            problems.append(
                f"the TCP connection {socket_address.text(local)} to {socket_address.text(remote)}, whose other end is "
                "a process of this host that is not moved, would be connected to nobody; --tcp-close ends it"
            )


def _unmovable(table: Table, info: tcp_repair.Info) -> str:
    """What is against moving a connection, if anything."""
    if table.choices.connections != MOVED:
        return "can be moved with --tcp-established, or closed with --tcp-close"
    if info.state not in tcp_repair.SYNCHRONIZED:
        return f"is still being made ({STATES[info.state]}), which cannot be moved: try again"
    return ""


def _udp(table: Table, common: Socket, own: SocketType) -> InetSocket:
    options = {(each.level, each.name): each.value for each in common.options}
    title = f"socket:[{common.inode}]"
    if udp.has_pending(own):
        raise Refused(
            f"{title}: a UDP packet is begun in it (UDP_CORK, MSG_MORE), which cannot be read: let it be sent"
        )
    if any(options.get(socket_options.UDP_ENCAP, b"")):
        raise Refused(f"{title}: a UDP socket that unwraps packets (UDP_ENCAP) cannot be moved yet")
    return _datagram(common, own, _local(common, own), _connected_to(common, own))


def _raw(table: Table, common: Socket, own: SocketType) -> InetSocket:
    """A raw(7) socket. What looks like its port is the protocol."""
    if common.protocol == socket.IPPROTO_IGMP:
        raise Refused(f"socket:[{common.inode}]: a raw IGMP socket, which may route multicast, cannot be moved yet")
    address = own.getsockname()
    local = _checked(common, socket_address.pack(common.family, address))
    bound = any(socket_address.unpack(local)[0])
    remote = _connected_to(common, own)
    if not remote and (peer := net_tables.raw_peer(table.pid, common.family, common.inode)):
        remote = _checked(common, socket_address.portless(common.family, peer))
    return _datagram(common, own, local if bound else b"", remote)


def _connected_to(common: Socket, own: SocketType) -> bytes:
    try:
        return _remote(common, own)
    except OSError:
        return b""


def _datagram(common: Socket, own: SocketType, local: bytes, remote: bytes) -> InetSocket:
    return InetSocket(
        socket=common,
        local=local,
        remote=remote,
        backlog=-1,
        memberships=multicast.collect(common, own),
        connection=None,
        ended=False,
        aborted=False,
    )


def _local(common: Socket, own: SocketType) -> bytes:
    """The address it is bound to; empty where it is not."""
    address = own.getsockname()
    return _checked(common, socket_address.pack(common.family, address)) if address[1] else b""


def _remote(common: Socket, own: SocketType) -> bytes:
    return _checked(common, socket_address.pack(common.family, own.getpeername()))


def _checked(common: Socket, address: bytes) -> bytes:
    if socket_address.scope(address):
        text = socket_address.text(address)
        raise Refused(f"socket:[{common.inode}]: the link-local address {text} cannot be moved to another host")
    return address


def _events(fd: int) -> int:
    poll = select.poll()
    poll.register(fd, _BROKEN)
    return sum(event for _, event in poll.poll(0))
