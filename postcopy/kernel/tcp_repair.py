"""TCP_REPAIR (net/ipv4/tcp.c): take a connection apart and put it together again without a packet being sent.

While it is on, closing the socket tells the peer nothing, and connect(2) is believed.
"""

import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Iterator
from socket import SocketType

from msgspec import Struct

from postcopy.kernel.socket_options import SO_PEEK_OFF, SO_REUSEADDR, SOL_SOCKET, SOL_TCP

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW = (
    19,
    20,
    21,
    22,
    24,
    29,
)
REPAIR_ON, REPAIR_OFF, REPAIR_OFF_WITHOUT_PROBE = 1, 0, -1
NO_QUEUE, RECEIVE_QUEUE, SEND_QUEUE = 0, 1, 2
TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK_PERMITTED, TCPOPT_TIMESTAMP = 2, 3, 4, 8
_TCPI_OPT_TIMESTAMPS, _TCPI_OPT_SACK, _TCPI_OPT_WSCALE = 1, 2, 4
_SIOCOUTQNSD = 0x894B
_TCP_INFO_SIZE = 104

STATES = (
    "", "ESTABLISHED", "SYN_SENT", "SYN_RECV", "FIN_WAIT1", "FIN_WAIT2", "TIME_WAIT", "CLOSE", "CLOSE_WAIT",
    "LAST_ACK", "LISTEN", "CLOSING",
)  # fmt: skip
ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 1, 4, 5, 7, 8, 9, 10, 11
# What has a peer that knows of it (RFC 9293, 3.3.2).
SYNCHRONIZED = frozenset({ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING})
# Which ends have closed: ours, the peer's.
CLOSED_HERE, CLOSED_THERE = (
    frozenset({FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING}),
    frozenset({CLOSE_WAIT, LAST_ACK, CLOSING}),
)


class Info(Struct, frozen=True):
    """TCP_INFO, in part. ``waiting``, ``backlog``: of a listening socket."""

    state: int
    timestamps: bool
    sack: bool
    scales: tuple[int, int] | None
    waiting: int
    backlog: int


def info(sock: SocketType) -> Info:
    """What the kernel tells of the connection."""
    raw = sock.getsockopt(SOL_TCP, socket.TCP_INFO, _TCP_INFO_SIZE)
    options, scales = raw[5], raw[6]
    waiting, backlog = struct.unpack_from("=II", raw, 24)
    return Info(
        state=raw[0],
        timestamps=bool(options & _TCPI_OPT_TIMESTAMPS),
        sack=bool(options & _TCPI_OPT_SACK),
        scales=(scales & 15, scales >> 4) if options & _TCPI_OPT_WSCALE else None,
        waiting=waiting,
        backlog=backlog,
    )


@contextlib.contextmanager
def repairing(sock: SocketType) -> Iterator[None]:
    """The connection can be taken apart meanwhile, and goes on afterwards as if nothing had been."""
    reuse = sock.getsockopt(SOL_SOCKET, SO_REUSEADDR)
    peek = _peek_offset(sock)
    sock.setsockopt(SOL_TCP, TCP_REPAIR, REPAIR_ON)
    try:
        if peek >= 0:
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, -1)
        yield
    finally:
        sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
        sock.setsockopt(SOL_TCP, TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
        # Repair takes SO_REUSEADDR away.
        sock.setsockopt(SOL_SOCKET, SO_REUSEADDR, reuse)
        if peek >= 0:
            sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, peek)


def _peek_offset(sock: SocketType) -> int:
    try:
        return sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    except OSError:
        return -1


def is_repairing(sock: SocketType) -> bool:
    """Whether somebody has begun to take it apart."""
    return bool(sock.getsockopt(SOL_TCP, TCP_REPAIR))


def queue(sock: SocketType, which: int, length: int) -> tuple[int, bytes]:
    """The sequence number behind a queue's last byte, and its ``length`` bytes, which stay there; while repairing."""
    sock.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, which)
    (sequence,) = struct.unpack("=I", sock.getsockopt(SOL_TCP, TCP_QUEUE_SEQ, 4))
    content = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT) if length else b""
    return sequence, content


def unread(sock: SocketType) -> int:
    """Bytes received and not read (SIOCINQ)."""
    return _ask(sock, termios.FIONREAD)


def unacknowledged(sock: SocketType) -> int:
    """Bytes written and not acknowledged by the peer (SIOCOUTQ)."""
    return _ask(sock, termios.TIOCOUTQ)


def unsent(sock: SocketType) -> int:
    """Bytes written and not sent yet (SIOCOUTQNSD)."""
    return _ask(sock, _SIOCOUTQNSD)


def _ask(sock: SocketType, request: int) -> int:
    found: int = struct.unpack("=i", fcntl.ioctl(sock, request, bytes(4)))[0]
    return found


def timestamp(sock: SocketType) -> int:
    """The clock that the connection's timestamps come from."""
    found: int = struct.unpack("=I", sock.getsockopt(SOL_TCP, TCP_TIMESTAMP, 4))[0]
    return found


def window(sock: SocketType) -> bytes:
    """struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup; while repairing."""
    return sock.getsockopt(SOL_TCP, TCP_REPAIR_WINDOW, 20)


def closed_window(window: bytes, next_to_come: int) -> bytes:
    """The window with nothing that may be sent, and room for a segment that comes with this sequence number."""
    return struct.pack("=II4sII", next_to_come, 0, window[8:12], 1 << 16, next_to_come)


def options(mss: int, scales: tuple[int, int] | None, sack: bool, timestamps: bool) -> bytes:
    """Options for TCP_REPAIR_OPTIONS: what the two ends agreed upon."""
    found = struct.pack("=II", TCPOPT_MSS, mss)
    if sack:
        found += struct.pack("=II", TCPOPT_SACK_PERMITTED, 0)
    if scales:
        found += struct.pack("=II", TCPOPT_WINDOW, scales[0] | scales[1] << 16)
    if timestamps:
        found += struct.pack("=II", TCPOPT_TIMESTAMP, 0)
    return found
