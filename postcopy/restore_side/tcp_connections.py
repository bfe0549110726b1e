"""TCP connections, put together by TCP_REPAIR; they stay under repair, and silent, until commit."""

import socket
import struct
import time
from socket import SocketType
from typing import TYPE_CHECKING

from msgspec import Struct

from postcopy.kernel import socket_address, tcp_repair, tcp_segment
from postcopy.kernel.calls import call
from postcopy.kernel.pattern import Blank, Pattern
from postcopy.kernel.socket_options import (
    IP_OPTIONS,
    SO_BUF_LOCK,
    SO_RCVBUF,
    SO_RCVBUFFORCE,
    SO_REUSEADDR,
    SO_SNDBUFFORCE,
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
    from postcopy.restore_side.sockets import Seat, Workshop

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
# What is different in each: local and remote address, sequence numbers, timestamp, windows, sizes of buffers.
_DATA = struct.Struct("=32s32sIII20s20sii")
_LOCAL, _REMOTE = (Blank(0, offset) for offset in (0, 32))
_RECEIVE_SEQUENCE, _SEND_SEQUENCE, _TIMESTAMP = (Blank(0, offset) for offset in (64, 68, 72))
_WINDOW, _CLOSED_WINDOW, _ROOM_TO_RECEIVE, _ROOM_TO_SEND = (Blank(0, offset) for offset in (76, 96, 116, 120))
_SEAT, _PIECES, _WINDOW_SIZE = Blank(1), 2, 20
_AF_UNSPEC = struct.pack("=H14x", socket.AF_UNSPEC)
_NOBODY = {
    socket.AF_INET: socket_address.pack(socket.AF_INET, ("127.0.0.1", 9)),
    socket.AF_INET6: socket_address.pack(socket.AF_INET6, ("::1", 9)),
}


def make(shop: "Workshop", one: InetSocket, connection: TcpConnection) -> int:
    """Add the calls that make the connection; where it is then."""
    seat = shop.seat(one.socket.inode)
    queues = [_pieces(queue) for queue in (connection.received, connection.sent, connection.unsent)]
    # Of a thousand connections most are alike, but for what is laid out in `_DATA`.
    alike = (
        seat.opened, seat.stays, seat.close_on_exec, shop.likeness(one.socket), len(one.local), connection.mss,
        connection.scales, connection.sack, connection.timestamp is None, connection.state in CLOSED_THERE,
        *map(len, queues),
    )  # fmt: skip
    if alike not in shop.patterns:
        shop.patterns[alike] = _calls(shop, seat, one, connection, *map(len, queues))
    window = connection.window
    data = _DATA.pack(
        one.local,
        one.remote,
        connection.receive_sequence,
        connection.send_sequence,
        connection.timestamp or 0,
        window,
        tcp_repair.closed_window(window, _next_to_come(connection)) if connection.unsent else b"",
        _room_for(len(connection.received)),
        _room_for(len(connection.sent) + len(connection.unsent)),
    )
    pieces = [word for queue in queues for piece in queue for word in (shop.batch.place(piece), len(piece))]
    shop.patterns[alike].repeat(shop.batch, (shop.batch.place(data), seat.place, *pieces), _Named(one))
    return seat.place


def _pieces(queue: bytes) -> list[bytes]:
    if len(queue) <= _PIECE:
        return [queue] if queue else []
    return [queue[start : start + _PIECE] for start in range(0, len(queue), _PIECE)]


def _room_for(length: int) -> int:
    return min(2 * length + _SPARE, 1 << 29)


def _calls(
    shop: "Workshop", seat: "Seat", one: InetSocket, connection: TcpConnection, received: int, sent: int, unsent: int
) -> Pattern:
    """The calls that make connections like this one, with so many pieces in their queues."""
    pattern, common, fd = Pattern(), one.socket, seat.opened
    with shop.adding_to(pattern.add):
        work = _Work(shop, fd)
        shop.add(call("socket", common.family, common.type, common.protocol), "making the connection {}")
        work.repair(REPAIR_ON)
        # The window's limit follows a size that the program has set, and only that (net/ipv4/tcp_output.c).
        fixed = bool(int.from_bytes(shop.value(common, (SOL_SOCKET, SO_BUF_LOCK)), "little") & _RCVBUF_LOCK)
        shop.set_early(fd, common, _NOT_NOW if fixed else _NOT_NOW | {_RECEIVE_BUFFER})
        for queue, sequence in ((RECEIVE_QUEUE, _RECEIVE_SEQUENCE), (SEND_QUEUE, _SEND_SEQUENCE)):
            work.choose(queue)
            work.set(TCP_QUEUE_SEQ, sequence, 4)
        length = len(one.local)
        what = "binding the connection {}: its own address must be one of this host's"
        shop.add(call("bind", fd, _LOCAL, length), what)
        shop.add(call("connect", fd, _REMOTE, length), "connecting {}")
        has_timestamps = connection.timestamp is not None
        agreed = tcp_repair.options(connection.mss, connection.scales, connection.sack, has_timestamps)
        work.set(TCP_REPAIR_OPTIONS, shop.place(agreed), len(agreed))
        if has_timestamps:
            work.set(TCP_TIMESTAMP, _TIMESTAMP, 4)
        if received:
            work.widen(SO_RCVBUFFORCE, _ROOM_TO_RECEIVE)
            work.choose(RECEIVE_QUEUE)
            work.write(pattern, 0, received)
        if sent or unsent:
            work.widen(SO_SNDBUFFORCE, _ROOM_TO_SEND)
            shop.resized(fd)
        if sent:
            work.choose(SEND_QUEUE)
            work.write(pattern, received, sent)
        work.choose(NO_QUEUE)
        if unsent:
            # Written with the window closed and repair off for a moment, it stays where it belongs: before the network.
            work.set(TCP_REPAIR_WINDOW, _CLOSED_WINDOW, _WINDOW_SIZE)
            work.repair(REPAIR_OFF_WITHOUT_PROBE)
            work.write(pattern, received + sent, unsent)
            work.repair(REPAIR_ON)
        if connection.state not in CLOSED_THERE:
            work.set(TCP_REPAIR_WINDOW, _WINDOW, _WINDOW_SIZE)
        # Setting no options makes the kernel count again how much fits into a packet: repair leaves it at 536 bytes
        # (net/ipv4/ip_sockglue.c, IP_OPTIONS; of IPv6 sockets too).
        shop.add(call("setsockopt", fd, SOL_IP, IP_OPTIONS, 0, 0), "repairing the connection {}")
        if received or not fixed:
            shop.set(fd, _RECEIVE_BUFFER, shop.value(common, _RECEIVE_BUFFER))
            shop.resized(fd)
        shop.finish(fd, common)
        shop.sit_down(seat, _SEAT)
    return pattern


def is_plain(connection: TcpConnection) -> bool:
    """Whether nothing is left to `finish`."""
    return connection.state == ESTABLISHED and not connection.deaf


def finish(own: SocketType, one: InetSocket, connection: TcpConnection, mark: int) -> None:
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


def _hear(own: SocketType, one: InetSocket, connection: TcpConnection, flag: int, mark: int, then: int) -> None:
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


def _shut(own: SocketType, connection: TcpConnection) -> None:
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


def check(own: SocketType, connection: TcpConnection) -> None:
    """That the queues hold every byte, and the FIN, once the connection has been finished. Raises OSError."""
    found = tcp_repair.queued(own)
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


def name(one: InetSocket) -> str:
    """What a connection is called in messages."""
    return f"{socket_address.text(one.local)} to {socket_address.text(one.remote)}"


class _Named(Struct, frozen=True):
    """Its name, made only where something has failed."""

    one: InetSocket

    def __format__(self, _: str) -> str:
        return name(self.one)


class _Work:
    """The calls on one connection."""

    def __init__(self, shop: "Workshop", fd: int, name: str = "the connection {}") -> None:
        self._shop = shop
        self._fd = fd
        self._name = name

    def set(self, option: int, place: int, length: int) -> None:
        self._shop.add(call("setsockopt", self._fd, SOL_TCP, option, place, length), f"repairing {self._name}")

    def repair(self, how: int) -> None:
        self.set(TCP_REPAIR, self._shop.place(_INT.pack(how)), _INT.size)

    def choose(self, queue: int) -> None:
        self.set(TCP_REPAIR_QUEUE, self._shop.place(_INT.pack(queue)), _INT.size)

    def widen(self, option: int, place: int) -> None:
        what = f"making room for what is queued in {self._name}"
        self._shop.add(call("setsockopt", self._fd, SOL_SOCKET, option, place, _INT.size), what)

    def write(self, pattern: Pattern, first: int, count: int) -> None:
        """Of the pieces so many, from the first on."""
        for number in range(first, first + count):
            address, length = Blank(_PIECES + 2 * number), Blank(_PIECES + 2 * number + 1)
            made = call("sendto", self._fd, address, length, _SEND, 0, 0)
            self._shop.add(made, f"filling the queues of {self._name}")
            pattern.must_take(length)
