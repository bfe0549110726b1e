"""TCP, UDP, ICMP and raw sockets: bound, connected, listening; `tcp_connections` puts connections together."""

import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postcopy.errors import RestoreError
from postcopy.kernel import multicast, socket_address
from postcopy.kernel.calls import call
from postcopy.restore_side import tcp_connections
from postcopy.restore_side.sockets import Workshop
from postcopy.socket_kinds import InetSocket, Membership

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_SHUT_RDWR = 2
_AT_ONCE = 64
_KINDS = {socket.IPPROTO_TCP: "TCP", socket.IPPROTO_UDP: "UDP"}


def rebuild(plan: "Plan", sockets: Sequence[InetSocket]) -> dict[int, int]:
    """Add the calls that make all of them; where each is then, by its inode at the source."""

    # Listeners first: a port with connections is not given to a listener any more. Of connections, those with the
    # highest numbers first: as long as lower ones are free, all are opened with the same one.
    def order(one: InetSocket) -> tuple[bool, int]:
        slot = plan.seats.get(one.socket.inode)
        return one.backlog < 0, -slot.fd if slot and one.connection else 0

    shop, made = Workshop(plan), dict[int, int]()
    in_order = sorted(sockets, key=order)
    for first in range(0, len(in_order), _AT_ONCE):
        if first:
            plan.go_ahead()
        made |= {one.socket.inode: _make(shop, one) for one in in_order[first : first + _AT_ONCE]}
    return made


def _make(shop: Workshop, one: InetSocket) -> int:
    if one.connection is not None:
        return tcp_connections.make(shop, one, one.connection)
    common = one.socket
    kind = "raw" if common.type == socket.SOCK_RAW else _KINDS.get(common.protocol, "ping")
    but = tcp_connections.OF_A_CONNECTION if one.ended else frozenset()
    allowed = " (net.ipv4.ping_group_range must allow it)" if kind == "ping" else ""
    fd = shop.socket(common, f"making a {kind} socket{allowed}", but)
    if one.aborted:
        tcp_connections.abort(shop, fd, common.family)
    if one.local and not one.ended:
        bind(shop, fd, one, kind)
    for each in one.memberships:
        _join(shop, fd, one, each)
    if one.remote:
        where = socket_address.text(one.remote)
        shop.add(call("connect", fd, shop.place(one.remote), len(one.remote)), f"connecting a {kind} socket to {where}")
    if one.backlog >= 0:
        shop.add(call("listen", fd, one.backlog), f"listening at {socket_address.text(one.local)}")
    if one.ended:
        # Answers ENOTCONN, and does what it is asked all the same (net/ipv4/af_inet.c, inet_shutdown).
        shop.batch.add(call("shutdown", fd, _SHUT_RDWR))
    shop.finish(fd, common)
    return fd


def bind(shop: Workshop, fd: int, one: InetSocket, kind: str) -> None:
    """Give a socket its address, which must be one of this host's, and free."""
    where = socket_address.text(one.local)
    made = call("bind", fd, shop.place(one.local), len(one.local))
    shop.add(made, f"binding a {kind} socket to {where}, which must be an address of this host, with a free port")


def _join(shop: Workshop, fd: int, one: InetSocket, membership: Membership) -> None:
    try:
        interface = socket.if_nametoindex(membership.interface)
    except OSError:
        raise RestoreError(
            f"a socket listens to a multicast group on network interface {membership.interface}, which is not here"
        ) from None
    level = multicast.level(one.socket.family)
    value = multicast.join(interface, membership.group)
    what = f"joining a multicast group on {membership.interface}"
    shop.add(call("setsockopt", fd, level, multicast.MCAST_JOIN_GROUP, shop.place(value), len(value)), what)
    if membership.sources or not membership.excluding:
        value = multicast.source_filter(interface, membership.group, membership.excluding, membership.sources)
        shop.add(call("setsockopt", fd, level, multicast.MCAST_MSFILTER, shop.place(value), len(value)), what)
