"""Sockets, as part of `postcopy.state`, which see."""

import socket
from typing import Annotated

import msgspec
from msgspec import Struct

from postcopy.integers import Pid, Unsigned, Unsigned16, Unsigned31, Unsigned32

WindowScale = Annotated[int, msgspec.Meta(ge=0, le=14)]  # RFC 7323, 2.3


class SocketOption(Struct, frozen=True):
    """A socket option as getsockopt(2) gave it."""

    level: Unsigned31
    name: Unsigned31
    value: Annotated[bytes, msgspec.Meta(max_length=1024)]


class SocketChange(Struct, frozen=True):
    """Options of a socket that are otherwise than the state says, in the order in which they are to be set. ``pid``,
    ``fd``: a descriptor of it."""

    pid: Pid
    fd: Unsigned31
    options: list[SocketOption]


class SocketDefaults(Struct, frozen=True):
    """The options of a new socket at the source: what those of this family, type and protocol have where their own
    state says nothing else."""

    family: Unsigned
    type: Unsigned
    protocol: Unsigned
    options: list[SocketOption]


class Socket(Struct, frozen=True):
    """What sockets of all kinds have: socket(2)'s arguments, O_NONBLOCK, the owner (uid, gid), the options that differ
    from `SocketDefaults`.

    ``inode``: its number at the source, by which sockets of one tree refer to each other. ``filter``: a classic BPF
    program (struct sock_filter, 8 bytes each), attached to what it receives.
    """

    family: Annotated[int, msgspec.Meta(ge=0, lt=64)]
    type: Annotated[int, msgspec.Meta(ge=0, lt=16)]
    protocol: Unsigned16
    inode: Unsigned
    nonblocking: bool
    owner: tuple[Unsigned32, Unsigned32]
    options: Annotated[list[SocketOption], msgspec.Meta(max_length=511)]
    filter: bytes


class UnixMessage(Struct, frozen=True):
    """What is queued in a Unix socket: a datagram, or a piece of a stream. ``sender``: the name of the socket it came
    from; ``credentials``: PID, UID and GID that came with it, if any; ``rights``: the descriptions (by number) of which
    it brings descriptors (SCM_RIGHTS)."""

    content: bytes
    sender: bytes
    credentials: tuple[Pid, Unsigned, Unsigned] | None
    rights: list[Unsigned] = []


class PeerCredentials(Struct, frozen=True):
    """Who made a connection, as SO_PEERCRED and SO_PEERGROUPS tell its other end; ``pid`` as ``dump`` sees it."""

    pid: Unsigned
    uid: Unsigned
    gid: Unsigned
    groups: list[Unsigned]


class UnixSocket(Struct, frozen=True):
    """A Unix socket and what waits in it.

    ``name``: as bind(2) was given it, behind the family (a path ends with NUL; an abstract name begins with it).
    ``place``: where its file lies, with ``mode`` and ``file_owner``; empty where there is none. ``peer``: the inode of
    the socket it is connected to (0: none, -1: one that has been closed). ``backlog``: of listen(2), -1 where it does
    not listen. ``shutdown``: 1 (no more receiving) and 2 (no more sending). ``reset``: ECONNRESET is due.
    ``maker``: the process that makes it before all others have their files, 0 where the first that has it makes it.
    ``accepted``: it came from accept(2), with the name of the socket that had listened. ``pending``: the sockets (by
    inode) whose connections it is yet to accept, in their order; these have no ``peer``. ``outside``: the name outside
    of the tree that a datagram socket is connected to, as connect(2) takes it.
    """

    socket: Socket
    name: bytes
    place: str
    mode: Unsigned
    file_owner: tuple[Unsigned, Unsigned]
    peer: int
    made_by: PeerCredentials | None
    backlog: int
    shutdown: Annotated[int, msgspec.Meta(ge=0, le=3)]
    reset: bool
    queue: list[UnixMessage]
    maker: Unsigned = 0
    outside: bytes = b""
    accepted: bool = False
    pending: list[Unsigned] = []


def is_mutual(one: UnixSocket, peer: UnixSocket | None) -> bool:
    """Whether one connection made the two. Datagram sockets may be connected each by itself, with nobody to tell of."""
    if peer is None or peer.peer != one.socket.inode:
        return False
    return one.socket.type != socket.SOCK_DGRAM or one.made_by is not None


class TcpConnection(Struct, frozen=True):
    """A TCP connection whose peer knows of it, as TCP_REPAIR (tcp(7)) takes it again.

    ``sent``: what the peer has not acknowledged; ``unsent``: what follows it; ``received``: what the program has not
    read. The sequence numbers are those of the first byte of ``sent`` (of the FIN where nothing is left of it) and of
    ``received``. ``scales``: of the window, when sending and receiving, None without scaling. ``timestamp``: None
    without timestamps. ``window``: struct tcp_repair_window. ``state``: as TCP_INFO numbers them: which end has closed,
    or both. ``fin_unsent``: the FIN that the program has asked for waits behind ``unsent``. ``deaf``: the program reads
    no more (SHUT_RD) though more may come.
    """

    sent: bytes
    unsent: bytes
    received: bytes
    send_sequence: Unsigned32
    receive_sequence: Unsigned32
    mss: Unsigned32
    scales: tuple[WindowScale, WindowScale] | None
    sack: bool
    timestamp: Unsigned32 | None
    window: Annotated[bytes, msgspec.Meta(min_length=20, max_length=20)]
    state: Annotated[int, msgspec.Meta(ge=1, le=11)]
    fin_unsent: bool
    deaf: bool


class Membership(Struct, frozen=True):
    """A multicast group that a socket has joined on an interface; ``sources``: the only ones it listens to, or (with
    ``excluding``) those it does not."""

    group: bytes
    interface: str
    excluding: bool
    sources: list[bytes]


class InetSocket(Struct, frozen=True):
    """An IPv4 or IPv6 socket: TCP, UDP, ICMP (ping) or raw. ``local``, ``remote``: struct sockaddr, empty where it has
    none.

    ``backlog``: of listen(2), -1 where it does not listen. ``ended``: a TCP connection that has ended, or (``aborted``)
    whose end the program is yet to be told.
    """

    socket: Socket
    local: bytes
    remote: bytes
    backlog: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 31)]
    memberships: list[Membership]
    connection: TcpConnection | None
    ended: bool
    aborted: bool


class NetlinkSocket(Struct, frozen=True):
    """A netlink(7) socket that talks to the kernel, with nothing in it: its ``port`` (0: not bound) and the multicast
    ``groups`` that it listens to, by number."""

    socket: Socket
    port: Unsigned
    groups: list[Unsigned]


class PacketMembership(Struct, frozen=True):
    """What a packet(7) socket asks of an interface: ``kind`` is PACKET_MR_MULTICAST, _PROMISC or the like."""

    interface: str
    kind: Unsigned
    address: bytes


class PacketSocket(Struct, frozen=True):
    """A packet(7) socket: the ``receives`` protocol (0: none) of one ``interface`` (empty: of all)."""

    socket: Socket
    receives: Unsigned
    interface: str
    memberships: list[PacketMembership]


class UnixName(Struct, frozen=True):
    """A name that a Unix socket of the tree has, and where its file lies (empty: abstract, or deleted)."""

    name: bytes
    place: str
