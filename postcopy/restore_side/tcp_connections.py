"""TCP connections, put together by TCP_REPAIR; they stay under repair, and silent, until commit."""

import socket
import struct
import time
from typing import TYPE_CHECKING

from postcopy.kernel import socket_address, tcp_repair, tcp_segment
from postcopy.kernel.calls import call
from postcopy.kernel.socket_options import (
    IP_OPTIONS,
    SO_BUF_LOCK,
    SO_RCVBUF,
    SO_RCVBUFFORCE,
    SO_REUSEADDR,
    SOL_IP,
    SOL_SOCKET,
    SOL_TCP,
    TCP_FASTOPEN_CONNECT,
    TCP_MAXSEG,
    TCP_WINDOW_CLAMP,
)
from postcopy.kernel.tcp_repair import (
    CLOSE_WAIT,
    CLOSED_HERE,
    CLOSED_THERE,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT2,
    LAST_ACK,
    NO_QUEUE,
    RECEIVE_QUEUE,
    REPAIR_OFF_WITHOUT_PROBE,
    REPAIR_ON,
    SEND_QUEUE,
    TCP_QUEUE_SEQ,
    TCP_REPAIR,
    TCP_REPAIR_OPTIONS,
    TCP_REPAIR_QUEUE,
    TCP_REPAIR_WINDOW,
    TCP_TIMESTAMP,
)
from postcopy.socket_kinds import InetSocket, TcpConnection

if TYPE_CHECKING:
    from postcopy.restore_side.sockets import Workshop

_RCVBUF_LOCK = 2
_SEQUENCES = 1 << 32
_SEGMENT_SECONDS, _LOOK_AGAIN = 1.0, 0.0005
_PIECE = 1 << 16  # bytes; one packet of the receive queue takes no more
_SPARE = 1 << 20
_SEND = 0x40 | 0x4000  # MSG_DONTWAIT, MSG_NOSIGNAL
# What a connection changes, or can be given only before there is one; and what repair takes away.
OF_A_CONNECTION = frozenset({TCP_MAXSEG, TCP_WINDOW_CLAMP, TCP_FASTOPEN_CONNECT})
_NOT_NOW = OF_A_CONNECTION | {(SOL_SOCKET, SO_REUSEADDR)}
_RECEIVE_BUFFER = (SOL_SOCKET, SO_RCVBUF)
_INT = struct.Struct("=i")
_AF_UNSPEC = struct.pack("=H14x", socket.AF_UNSPEC)
_NOBODY = {
    socket.AF_INET: socket_address.pack(socket.AF_INET, ("127.0.0.1", 9)),
    socket.AF_INET6: socket_address.pack(socket.AF_INET6, ("::1", 9)),
}


def make(shop: "Workshop", one: InetSocket, connection: TcpConnection) -> int:
    """Add the calls that make the connection; where it is parked."""
    common = one.socket
    name = f"{socket_address.text(one.local)} to {socket_address.text(one.remote)}"
    (fd,) = shop.parked(call("socket", common.family, common.type, common.protocol), f"making the connection {name}")
    work = _Work(shop, fd, name)
    work.repair(REPAIR_ON)
    # The window's limit follows a size that the program has set, and only that (net/ipv4/tcp_output.c).
    fixed = bool(int.from_bytes(shop.value(common, (SOL_SOCKET, SO_BUF_LOCK)), "little") & _RCVBUF_LOCK)
    shop.set_early(fd, common, _NOT_NOW if fixed else _NOT_NOW | {_RECEIVE_BUFFER})
    for queue, sequence in ((RECEIVE_QUEUE, connection.receive_sequence), (SEND_QUEUE, connection.send_sequence)):
        work.choose(queue)
        work.set(TCP_QUEUE_SEQ, struct.pack("=I", sequence))
    what = f"{name}: its own address must be one of this host's"
    shop.add(call("bind", fd, shop.place(one.local), len(one.local)), f"binding the connection {what}")
    shop.add(call("connect", fd, shop.place(one.remote), len(one.remote)), f"connecting {name}")
    has_timestamps = connection.timestamp is not None
    work.set(TCP_REPAIR_OPTIONS, tcp_repair.options(connection.mss, connection.scales, connection.sack, has_timestamps))
    if connection.timestamp is not None:
        work.set(TCP_TIMESTAMP, struct.pack("=I", connection.timestamp))
    if connection.received:
        work.widen(SO_RCVBUFFORCE, len(connection.received))
        work.choose(RECEIVE_QUEUE)
        work.write(connection.received)
    if connection.sent or connection.unsent:
        shop.widen(fd, 2 * (len(connection.sent) + len(connection.unsent)) + _SPARE)
    if connection.sent:
        work.choose(SEND_QUEUE)
        work.write(connection.sent)
    work.choose(NO_QUEUE)
    if connection.unsent:
        # Written with the window closed and repair off for a moment, it stays where it belongs: before the network.
        work.set(TCP_REPAIR_WINDOW, tcp_repair.closed_window(connection.window, _next_to_come(connection)))
        work.repair(REPAIR_OFF_WITHOUT_PROBE)
        work.write(connection.unsent)
        work.repair(REPAIR_ON)
    if connection.state not in CLOSED_THERE:
        work.set(TCP_REPAIR_WINDOW, connection.window)
    # Setting no options makes the kernel count again how much fits into a packet: repair leaves it at 536 bytes
    # (net/ipv4/ip_sockglue.c, IP_OPTIONS; of IPv6 sockets too).
    shop.add(call("setsockopt", fd, SOL_IP, IP_OPTIONS, 0, 0), f"repairing the connection {name}")
    if connection.received or not fixed:
        shop.set(fd, _RECEIVE_BUFFER, shop.value(common, _RECEIVE_BUFFER))
        shop.resized(fd)
    shop.finish(fd, common)
    return fd


def finish(own: socket.socket, one: InetSocket, connection: TcpConnection, mark: int) -> None:
    """Let what has been made close as it had been closed: by the program, by the peer, in that order or the other.

    Packets with ``mark`` are let through. Raises OSError.
    """
    state = connection.state
    if state in (CLOSE_WAIT, LAST_ACK):
        _hear(own, one, connection, tcp_segment.FIN, mark, CLOSE_WAIT)
    if state in CLOSED_HERE:
        _shut(own, connection)
    if state == FIN_WAIT2:
        _hear(own, one, connection, 0, mark, FIN_WAIT2)
    elif state == CLOSING:
        _hear(own, one, connection, tcp_segment.FIN, mark, CLOSING)
    if connection.deaf:
        own.shutdown(socket.SHUT_RD)
    if state != ESTABLISHED:
        own.setsockopt(SOL_TCP, TCP_REPAIR_WINDOW, connection.window)
        own.setsockopt(SOL_IP, IP_OPTIONS, b"")


def _hear(own: socket.socket, one: InetSocket, connection: TcpConnection, flag: int, mark: int, then: int) -> None:
    """Let a segment of the peer's come (once more), which brings the connection to the state ``then``."""
    acknowledged = (connection.send_sequence + (then == FIN_WAIT2)) % _SEQUENCES
    ends = socket_address.unpack(one.remote), socket_address.unpack(one.local)
    tcp_segment.send(*ends, (_next_to_come(connection), acknowledged), flag | tcp_segment.ACK, mark)
    deadline = time.monotonic() + _SEGMENT_SECONDS
    while tcp_repair.info(own).state != then:
        if time.monotonic() > deadline:
            raise TimeoutError(f"could not be brought to the state {tcp_repair.STATES[then]}")
        time.sleep(_LOOK_AGAIN)


def _next_to_come(connection: TcpConnection) -> int:
    """The sequence number behind what has been received; that of the peer's FIN, if it has come."""
    return (connection.receive_sequence + len(connection.received)) % _SEQUENCES


def _shut(own: socket.socket, connection: TcpConnection) -> None:
    """Shut it down for sending, without a packet: the FIN counts as sent already, or waits for the window to open."""
    waits = bool(connection.unsent) or connection.fin_unsent
    if waits:
        closed = tcp_repair.closed_window(connection.window, _next_to_come(connection))
        own.setsockopt(SOL_TCP, TCP_REPAIR_WINDOW, closed)
    else:
        # What goes into this queue is not transmitted (net/ipv4/tcp_output.c, tcp_write_xmit).
        own.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
    try:
        own.shutdown(socket.SHUT_WR)
    finally:
        if not waits:
            own.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)


def check(own: socket.socket, connection: TcpConnection) -> None:
    """That the queues hold every byte: a call may take less than it is given. Raises OSError."""
    found = tcp_repair.unread(own), tcp_repair.unacknowledged(own), tcp_repair.unsent(own)
    fin = connection.state in CLOSED_HERE and connection.state != FIN_WAIT2
    unsent = len(connection.unsent) + (fin and (bool(connection.unsent) or connection.fin_unsent))
    outstanding = len(connection.sent) + len(connection.unsent) + fin
    if found != (len(connection.received), outstanding, unsent):
        raise OSError(f"could not be filled: its queues hold {found} bytes")


def abort(shop: "Workshop", fd: int, family: int) -> None:
    """Add the calls after which the program finds that its connection was aborted (ECONNABORTED)."""
    work = _Work(shop, fd, "a connection that is closed")
    work.repair(REPAIR_ON)
    address = _NOBODY[socket.AddressFamily(family)]
    shop.add(call("connect", fd, shop.place(address), len(address)), "making a connection to close")
    shop.add(call("connect", fd, shop.place(_AF_UNSPEC), len(_AF_UNSPEC)), "closing a connection")
    work.repair(REPAIR_OFF_WITHOUT_PROBE)


class _Work:
    """The calls on one connection."""

    def __init__(self, shop: "Workshop", fd: int, name: str) -> None:
        self._shop = shop
        self._fd = fd
        self._name = name
        self._what = f"repairing the connection {name}"

    def set(self, option: int, value: bytes) -> None:
        place = self._shop.place(value)
        self._shop.add(call("setsockopt", self._fd, SOL_TCP, option, place, len(value)), self._what)

    def repair(self, how: int) -> None:
        self.set(TCP_REPAIR, _INT.pack(how))

    def choose(self, queue: int) -> None:
        self.set(TCP_REPAIR_QUEUE, _INT.pack(queue))

    def widen(self, option: int, length: int) -> None:
        value = struct.pack("=i", min(2 * length + _SPARE, 1 << 29))
        what = f"making room for what is queued in the connection {self._name}"
        self._shop.add(call("setsockopt", self._fd, SOL_SOCKET, option, self._shop.place(value), 4), what)

    def write(self, content: bytes) -> None:
        for start in range(0, len(content), _PIECE):
            piece = content[start : start + _PIECE]
            made = call("sendto", self._fd, self._shop.batch.place(piece), len(piece), _SEND, 0, 0)
            self._shop.add(made, f"filling the queues of the connection {self._name}")
