"""The control channel: frames of a fixed header and a msgpack body. No sockets here; see docs/protocol.md."""

import enum
import os
import platform
import struct
from typing import TypeVar

from msgspec import Struct, field

from postcopy import __version__
from postcopy.errors import ProtocolError
from postcopy.kernel import cpu
from postcopy.kernel.page import PAGE_SIZE
from postcopy.socket_kinds import SocketChange
from postcopy.state import Clocks, LateSignal, Manifest, decode, encode

PROTOCOL_VERSION = 4
MAGIC = b"POSTCOPY"
HEADER = struct.Struct("<8sHHI")  # magic, protocol version, kind, length of the body in bytes
GREETING_LIMIT = 64 * 1024
BODY_LIMIT = (1 << 32) - 1
_MIB = 1 << 20


class Kind(enum.IntEnum):
    """What a frame says."""

    HELLO = 1
    MANIFEST = 2
    PREPARED = 3
    PROBLEMS = 4
    STATE = 5
    READY = 6
    GO = 7
    RESUMED = 8
    DRAINED = 9
    FAILED = 10
    PAGES = 11
    DRAFT = 12
    DRAFTED = 13
    CHANGES = 14
    PROCESS = 15


# Bytes of a body: nobody can make the other side keep more in memory. What no limit stands for here is the state.
LIMITS = dict.fromkeys(Kind, GREETING_LIMIT) | {
    Kind.MANIFEST: 256 * _MIB,
    Kind.PROBLEMS: 16 * _MIB,
    Kind.GO: 16 * _MIB,
    Kind.CHANGES: 256 * _MIB,
    Kind.PROCESS: BODY_LIMIT,
    Kind.STATE: BODY_LIMIT,
    Kind.DRAFT: BODY_LIMIT,
    Kind.PAGES: BODY_LIMIT,
}


class Hello(Struct, frozen=True):
    """Who speaks: the channel this connection is to be, the session it belongs to, and the host behind it."""

    channel: str
    session: bytes
    program: str = __version__
    architecture: str = field(default_factory=platform.machine)
    page_size: int = PAGE_SIZE
    kernel: str = field(default_factory=lambda: os.uname().release)
    cpu_features: list[str] = field(default_factory=lambda: sorted(cpu.features()))


class Nothing(Struct, frozen=True):
    """A frame whose kind says all."""


class Offer(Struct, frozen=True):
    """What the source has: the manifest, what the tree's clocks show now (frozen, when it was), and the id of the
    checkpoint directory with the state, if there is one."""

    manifest: Manifest
    clocks: Clocks
    checkpoint: bytes = b""


class Prepared(Struct, frozen=True):
    """The destination can take it; with ``has_state``, it has the checkpoint's directory and needs the pages alone."""

    has_state: bool


class Problems(Struct, frozen=True):
    """What keeps the destination from taking the tree."""

    problems: list[str]


class Failed(Struct, frozen=True):
    """Why the sender gives up, and what to do about it."""

    message: str
    hint: str


class Changes(Struct, frozen=True):
    """What has been found otherwise than the state says, while the destination was building."""

    sockets: list[SocketChange]


class Go(Struct, frozen=True):
    """The tree is the destination's from here on; with the signals that came last."""

    signals: list[LateSignal]


class Drained(Struct, frozen=True):
    """The destination has every page: what it took (bytes, counts, nanoseconds)."""

    faults: int
    fault_p50: int
    fault_p99: int
    fault_max: int
    bytes_demand: int
    bytes_bulk: int
    bytes_zero: int


T = TypeVar("T")


def pack(kind: Kind, body: object) -> bytes:
    """One frame."""
    content = encode(body)
    return pack_header(kind, len(content)) + content


def pack_header(kind: Kind, length: int) -> bytes:
    """The header of a frame whose body has ``length`` bytes."""
    if length > BODY_LIMIT:
        raise ProtocolError(f"the {kind.name} message would take {length} bytes; {BODY_LIMIT} is the limit")
    return HEADER.pack(MAGIC, PROTOCOL_VERSION, kind, length)


def parse_header(header: bytes) -> tuple[Kind, int]:
    """The kind and the length (bytes) of the body that follows. Raises ProtocolError saying what is wrong."""
    magic, version, number, length = HEADER.unpack(header)
    if magic != MAGIC:
        raise ProtocolError(f"the other side does not speak the postcopy protocol (it began with {header[:8]!r})")
    if version != PROTOCOL_VERSION:
        raise ProtocolError(
            f"the other side speaks protocol version {version}, this side {PROTOCOL_VERSION}",
            "install the same postcopy on both hosts",
        )
    try:
        kind = Kind(number)
    except ValueError:
        raise ProtocolError(f"unknown message {number}") from None
    if length > LIMITS[kind]:
        raise ProtocolError(f"a {kind.name} message of {length} bytes; {LIMITS[kind]} is the limit")
    return kind, length


def parse_body(expected: type[T], content: bytes | bytearray | memoryview) -> T:
    """The body of a frame. Raises ProtocolError."""
    return decode(expected, bytes(content) if isinstance(content, bytearray) else content)
