"""Multicast groups that a socket has joined: the kernel tells only whether it is a member of a group that is named."""

from socket import SocketType

from postcopy.kernel import multicast
from postcopy.socket_kinds import Membership, Socket


def collect(common: Socket, own: SocketType) -> list[Membership]:
    """The memberships of ``own``."""
    found = []
    for interface, group in multicast.groups_of_host(common.family):
        member = multicast.membership(own, interface, group)
        if member is not None:
            found.append(Membership(group, interface, *member))
    return found
