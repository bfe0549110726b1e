"""packet(7) sockets: what they receive, from where, and what they ask of interfaces. What is queued may get lost."""

import socket
from socket import SocketType

from postcopy.dump_side.opened import Refused, Table
from postcopy.kernel.socket_options import SOL_PACKET
from postcopy.socket_kinds import PacketMembership, PacketSocket, Socket

_PACKET_FANOUT = 18


def collect(table: Table, common: Socket, own: SocketType) -> PacketSocket:
    """The socket ``own``, a duplicate of the program's. Raises Refused."""
    title = f"socket:[{common.inode}]: a packet socket"
    if common.type not in (socket.SOCK_RAW, socket.SOCK_DGRAM):
        raise Refused(f"{title} of type {common.type} cannot be moved")
    if own.getsockopt(SOL_PACKET, _PACKET_FANOUT):
        raise Refused(f"{title} that shares its packets with others (PACKET_FANOUT) cannot be moved yet")
    try:
        diag = table.packet_diag(common.inode)
    except OSError as error:
        raise Refused(f"{title}: this kernel does not tell what it asks of interfaces: {error.strerror}") from None
    if diag is None:
        raise Refused(f"{title} of another network namespace cannot be moved yet")
    if diag.has_ring:
        raise Refused(f"{title} with a ring of packets (PACKET_RX_RING, PACKET_TX_RING) cannot be moved yet")
    interface, receives = own.getsockname()[:2]
    memberships = [PacketMembership(socket.if_indextoname(index), kind, address) for index, kind, address in diag.asks]
    return PacketSocket(common, receives, interface, memberships)
