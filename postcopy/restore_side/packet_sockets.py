"""packet(7) sockets: bound to what they receive when all else is as it was."""

import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postcopy.errors import RestoreError
from postcopy.kernel.calls import call
from postcopy.kernel.socket_options import SOL_PACKET
from postcopy.restore_side.sockets import Workshop
from postcopy.socket_kinds import PacketSocket

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_ADD_MEMBERSHIP = 1
_MOST_ADDRESS = 32


def rebuild(plan: "Plan", sockets: Sequence[PacketSocket]) -> dict[int, int]:
    """Add the calls that make all of them; where each is parked, by its inode at the source."""
    shop = Workshop(plan)
    return {one.socket.inode: _make(shop, one) for one in sockets}


def _make(shop: Workshop, one: PacketSocket) -> int:
    # Of no protocol yet, so that nothing comes before its filter is there.
    fd = shop.socket(one.socket, "making a packet socket")
    for each in one.memberships:
        # A longer address than that of struct packet_mreq is taken, too (net/packet/af_packet.c).
        asked = struct.pack("=iHH", _index(each.interface), each.kind, len(each.address))
        asked += each.address.ljust(8 if len(each.address) <= 8 else _MOST_ADDRESS, b"\0")
        made = call("setsockopt", fd, SOL_PACKET, _ADD_MEMBERSHIP, shop.place(asked), len(asked))
        shop.add(made, f"asking interface {each.interface} for packets")
    shop.finish(fd, one.socket)
    if one.receives or one.interface:
        index = _index(one.interface) if one.interface else 0
        address = struct.pack("=H", socket.AF_PACKET) + struct.pack(">H", one.receives) + struct.pack("=i12x", index)
        what = f"binding a packet socket to {one.interface or 'all interfaces'}"
        shop.add(call("bind", fd, shop.place(address), len(address)), what)
    return fd


def _index(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        raise RestoreError(f"a packet socket uses network interface {interface}, which is not here") from None
