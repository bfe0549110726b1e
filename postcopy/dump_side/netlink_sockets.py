"""netlink(7) sockets that ask the kernel, or listen to what it tells all; of protocols that keep nothing else."""

import select
from socket import SocketType

from postcopy.dump_side.opened import Refused, Table
from postcopy.kernel import net_tables
from postcopy.kernel.socket_options import SOL_NETLINK
from postcopy.socket_kinds import NetlinkSocket, Socket

_LIST_MEMBERSHIPS, _ROOM = 9, 512
# With others, the kernel notes more of a socket than it tells (who takes audit records, queues of packets, families).
_PROTOCOLS = {0: "NETLINK_ROUTE", 4: "NETLINK_SOCK_DIAG", 15: "NETLINK_KOBJECT_UEVENT"}


def collect(table: Table, common: Socket, own: SocketType) -> NetlinkSocket:
    """The socket ``own``, a duplicate of the program's. Raises Refused."""
    title = f"socket:[{common.inode}]: a netlink socket (protocol {common.protocol})"
    if common.protocol not in _PROTOCOLS:
        raise Refused(f"{title} cannot be moved yet")
    if own.getpeername() != (0, 0):
        raise Refused(f"{title} that is connected to another socket cannot be moved yet")
    if table.frozen and (_has_news(own) or net_tables.netlink_answers_come(table.pid, common.inode)):
        raise Refused(f"{title} has something to read, which cannot be moved: try again")
    port, _ = own.getsockname()
    bits = int.from_bytes(own.getsockopt(SOL_NETLINK, _LIST_MEMBERSHIPS, _ROOM), "little")
    return NetlinkSocket(common, port, [number + 1 for number in range(bits.bit_length()) if bits >> number & 1])


def _has_news(own: SocketType) -> bool:
    """A message, or an error: that messages have been lost (ENOBUFS)."""
    poll = select.poll()
    poll.register(own.fileno(), select.POLLIN)
    return bool(poll.poll(0))
