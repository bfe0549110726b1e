"""netlink(7) sockets: made, bound to their ports, members of their groups."""

import struct
from collections.abc import Sequence
from socket import AF_NETLINK
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.kernel.socket_options import SOL_NETLINK
from postcopy.restore_side.sockets import Workshop
from postcopy.socket_kinds import NetlinkSocket

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_ADD_MEMBERSHIP = 1


def rebuild(plan: "Plan", sockets: Sequence[NetlinkSocket]) -> dict[int, int]:
    """Add the calls that make all of them; where each is parked, by its inode at the source."""
    shop = Workshop(plan)
    return {one.socket.inode: _make(shop, one) for one in sockets}


def _make(shop: Workshop, one: NetlinkSocket) -> int:
    fd = shop.socket(one.socket, "making a netlink socket")
    # The filter is there before anything can come.
    shop.finish(fd, one.socket)
    if one.port:
        address = struct.pack("=HHII", AF_NETLINK, 0, one.port, 0)
        what = f"binding a netlink socket to port {one.port}, which must be free here"
        shop.add(call("bind", fd, shop.place(address), len(address)), what)
    for group in one.groups:
        made = call("setsockopt", fd, SOL_NETLINK, _ADD_MEMBERSHIP, shop.place(struct.pack("=I", group)), 4)
        shop.add(made, f"joining group {group} of netlink protocol {one.socket.protocol}")
    return fd
