"""TCP_REPAIR (net/ipv4/tcp.c): take a connection apart and put it together again without a packet being sent.

While it is on, closing the socket tells the peer nothing, and connect(2) is believed.
"""

import fcntl
import functools
import select
import socket
import struct
import termios
from socket import SocketType

from msgspec import Struct

from postcopy.kernel.calls import call
from postcopy.kernel.libc import refused
from postcopy.kernel.own_calls import KEPT, OwnCalls
from postcopy.kernel.socket_options import SO_PEEK_OFF, SO_REUSEADDR, SOL_SOCKET, SOL_TCP

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 22, 24, 29
REPAIR_ON, REPAIR_OFF, REPAIR_OFF_WITHOUT_PROBE = 1, 0, -1
NO_QUEUE, RECEIVE_QUEUE, SEND_QUEUE = 0, 1, 2
TCPOPT_MSS, TCPOPT_WINDOW, TCPOPT_SACK_PERMITTED, TCPOPT_TIMESTAMP = 2, 3, 4, 8
_TCPI_OPT_TIMESTAMPS, _TCPI_OPT_SACK, _TCPI_OPT_WSCALE = 1, 2, 4
_SIOCOUTQNSD = 0x894B
INFO_SIZE, _WINDOW_SIZE = 104, 20
_INT, _POLL, _APART = struct.Struct("=i"), struct.Struct("=ihh"), struct.Struct(f"=IIiiII{_WINDOW_SIZE}s")

# So many bytes of a queue are read in one go with the rest.
_AT_ONCE = 2048
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT

#: Bytes received and not read; written and not acknowledged by the peer; written and not sent yet.
Queued = tuple[int, int, int]

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
    return of_raw(sock.getsockopt(SOL_TCP, socket.TCP_INFO, INFO_SIZE))


def state_of_raw(raw: bytes) -> int:
    """Of struct tcp_info, the state alone."""
    return raw[0] if raw else 0


def of_raw(raw: bytes) -> Info:
    """What struct tcp_info says."""
    options, scales = raw[5], raw[6]
    waiting, backlog = struct.unpack_from("=II", raw, 24)
    return Info(
        state=state_of_raw(raw),
        timestamps=bool(options & _TCPI_OPT_TIMESTAMPS),
        sack=bool(options & _TCPI_OPT_SACK),
        scales=(scales & 15, scales >> 4) if options & _TCPI_OPT_WSCALE else None,
        waiting=waiting,
        backlog=backlog,
    )


class Apart(Struct, frozen=True):
    """What a connection under repair shows: the sequence numbers behind all that has been received and written; bytes
    not read, not acknowledged and not sent (a FIN counts); the clock that its timestamps come from; struct
    tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup. ``reads_no_more``: by the program's will or the
    peer's. ``received``, ``written``: what is in the queues."""

    next_read: int
    next_written: int
    unread: int
    unacknowledged: int
    unsent: int
    mss: int
    timestamp: int
    window: bytes
    reads_no_more: bool
    received: bytes
    written: bytes


class Repair:
    """Takes connections apart, which go on afterwards as if nothing had been: what can be asked without is not asked
    under repair, in which whoever reads would fail (EPERM)."""

    def __init__(self) -> None:
        """Prepare the calls."""
        self._calls = calls = OwnCalls(4096 + 2 * _AT_ONCE)
        self._reuse, self._poll, self._found = calls.room(4), calls.place(bytes(_POLL.size)), calls.room(_APART.size)
        self._contents = [calls.room(_AT_ONCE) for _ in (RECEIVE_QUEUE, SEND_QUEUE)]
        four, of_window = (calls.place(_INT.pack(size)) for size in (4, _WINDOW_SIZE))

        def tell(option: int, value: int) -> None:
            calls.add(call("setsockopt", KEPT, SOL_TCP, option, calls.place(_INT.pack(value)), 4))

        def ask(option: int, place: int, length: int = four) -> None:
            calls.add(call("getsockopt", KEPT, SOL_TCP, option, self._found + place, length))

        def peek(place: int) -> int:
            return calls.add(call("recvfrom", KEPT, place, _AT_ONCE, _PEEK, 0, 0))

        calls.add(call("getsockopt", KEPT, SOL_SOCKET, SO_REUSEADDR, self._reuse, four))
        calls.add(call("poll", self._poll, 1, 0))
        calls.add(call("ioctl", KEPT, termios.TIOCOUTQ, self._found + 8))
        calls.add(call("ioctl", KEPT, _SIOCOUTQNSD, self._found + 12))
        ask(TCP_TIMESTAMP, 20)
        tell(TCP_REPAIR, REPAIR_ON)
        tell(TCP_REPAIR_QUEUE, RECEIVE_QUEUE)
        ask(TCP_QUEUE_SEQ, 0)
        tell(TCP_REPAIR_QUEUE, SEND_QUEUE)
        ask(TCP_QUEUE_SEQ, 4)
        ask(socket.TCP_MAXSEG, 16)
        ask(TCP_REPAIR_WINDOW, 24, of_window)
        sent = peek(self._contents[1])
        tell(TCP_REPAIR_QUEUE, NO_QUEUE)
        tell(TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
        # Repair has taken it away.
        last = calls.add(call("setsockopt", KEPT, SOL_SOCKET, SO_REUSEADDR, self._reuse, 4))
        self._results = struct.Struct(f"={last + 1}q")
        self._peeks = peek(self._contents[0]), sent

    def look(self, fd: int, peek_offset: int, unread: int) -> Apart:
        """As `take_apart`."""
        calls, (received, sent) = self._calls, self._peeks
        calls.write(self._poll, _POLL.pack(fd, select.POLLRDHUP, 0))
        # Where there is nothing, peeking would take an error; and with an offset, it would begin there and move it.
        calls.change(received, 1, KEPT if unread and peek_offset < 0 else -1)
        calls.make(fd)
        results = self._results.unpack(calls.results(0, self._results.size // 8))
        if worst := min(0, *results[:sent], *results[sent + 1 :]):
            raise refused("taking a TCP connection apart", -worst)
        read, written, unacknowledged, unsent, mss, clock, window = _APART.unpack(calls.read(self._found, _APART.size))
        if max(unread, unacknowledged) > _AT_ONCE or peek_offset >= 0:
            reuse = int.from_bytes(calls.read(self._reuse, 4), "little")
            queues = _queues(fd, (unread, unacknowledged), peek_offset, reuse)
        else:
            places = zip(self._contents, self._peeks, strict=True)
            queues = [calls.read(place, max(calls.result(number), 0)) for place, number in places]
        *_, events = _POLL.unpack(calls.read(self._poll, _POLL.size))
        ends = bool(events & select.POLLRDHUP)
        return Apart(read, written, unread, unacknowledged, unsent, mss, clock, window, ends, *queues)


def _queues(fd: int, lengths: tuple[int, int], peek_offset: int, reuse_address: int) -> list[bytes]:
    """The first so many bytes of the queues of a connection, which stay there."""
    own, (unread, written) = SocketType(fileno=fd), lengths
    try:
        if peek_offset >= 0:
            own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, -1)
        try:
            received = own.recv(unread, _PEEK) if unread else b""
        finally:
            if peek_offset >= 0:
                own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, peek_offset)
        if not written:
            return [received, b""]
        own.setsockopt(SOL_TCP, TCP_REPAIR, REPAIR_ON)
        try:
            own.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, SEND_QUEUE)
            return [received, own.recv(written, _PEEK)]
        finally:
            own.setsockopt(SOL_TCP, TCP_REPAIR_QUEUE, NO_QUEUE)
            end_repair(own, REPAIR_OFF_WITHOUT_PROBE, reuse_address)
    finally:
        own.detach()


_repair = functools.cache(Repair)


def take_apart(fd: int, peek_offset: int, unread: int) -> Apart:
    """Take the connection behind a descriptor of ours apart, and let it go on; ``peek_offset``: its SO_PEEK_OFF;
    ``unread``: as of the function. Raises OSError.
    """
    return _repair().look(fd, peek_offset, unread)


def end_repair(own: SocketType, how: int, reuse_address: int) -> None:
    """End repair, if it has not ended; with REPAIR_OFF, ask the peer for an acknowledgement. Raises OSError."""
    own.setsockopt(SOL_TCP, TCP_REPAIR, how)
    # That takes it away.
    if reuse_address:
        own.setsockopt(SOL_SOCKET, SO_REUSEADDR, reuse_address)


def is_repairing(sock: SocketType) -> bool:
    """Whether somebody has begun to take it apart."""
    return bool(sock.getsockopt(SOL_TCP, TCP_REPAIR))


def unread(sock: SocketType) -> int:
    """Bytes received and not read (SIOCINQ)."""
    return _ask(sock, termios.FIONREAD)


def queued(sock: SocketType) -> Queued:
    """What is in the queues (SIOCINQ, SIOCOUTQ, SIOCOUTQNSD)."""
    return unread(sock), _ask(sock, termios.TIOCOUTQ), _ask(sock, _SIOCOUTQNSD)


def _ask(sock: SocketType, request: int) -> int:
    found: int = struct.unpack("=i", fcntl.ioctl(sock, request, bytes(4)))[0]
    return found


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
