"""The files of a checkpoint directory, byte for byte; see docs/checkpoint-format.md. No I/O here."""

import enum
import os
import platform
import struct
import sys
from array import array
from itertools import accumulate
from typing import TypeVar

import xxhash
from msgspec import Struct, field

from postcopy import __version__
from postcopy.errors import CheckpointError, ProtocolError
from postcopy.integers import Unsigned
from postcopy.kernel import cpu
from postcopy.kernel.page import PAGE_SIZE
from postcopy.page_ranges import PageRanges
from postcopy.printable import printable
from postcopy.state import Manifest, decode

FORMAT_VERSION = 1
MAGIC = b"POSTCKPT"
ID_SIZE = 16

# Magic, format version, kind, address space, length of the body (bytes), checkpoint id, xxh3_64 of this and the body.
_HEADER = struct.Struct("<8sHHIQ16sQ")
HEADER_SIZE = _HEADER.size
_CHECKSUM = struct.Struct("<Q")

# A fault on one page waits until the piece that the page is in has been read and verified.
PIECE_PAGES = 16
_PIECE_SIZES = bytes(range(1, PIECE_PAGES + 1))

# More than the state of any tree takes: a file beyond it is not read at all.
BODY_LIMIT = 1 << 30

# A dump writes into ".NAME.partial-XXXX" beside NAME.
PARTIAL = ".partial-"

T = TypeVar("T")


class Kind(enum.IntEnum):
    """What a file with a header holds; the value's name in lower case is how errors call it."""

    MANIFEST = 1
    STATE = 2
    INDEX = 3


MANIFEST = "manifest"
STATE = "state"


def pages_name(space: int) -> str:
    """The file with the pages of an address space."""
    return f"pages-{space}"


def index_name(space: int) -> str:
    """The file that says which pages these are."""
    return f"pages-{space}.index"


class SpaceInfo(Struct, frozen=True):
    """What is held of one address space: bytes of page data, and pages that existed and were all zeros."""

    space: Unsigned
    page_bytes: Unsigned
    zero_pages: Unsigned


class About(Struct, frozen=True):
    """The body of ``manifest``: which checkpoint this is, when (ns since 1970) and where it was taken, what is in it.

    ``manifest``: what the survey found; ``pages_elsewhere``: the lazy pages stayed with the frozen tree.
    """

    id: bytes
    taken_at: Unsigned
    manifest: Manifest
    pages_elsewhere: bool
    spaces: list[SpaceInfo]
    program: str = __version__
    architecture: str = field(default_factory=platform.machine)
    page_size: Unsigned = PAGE_SIZE
    kernel: str = field(default_factory=lambda: os.uname().release)
    cpu_features: list[str] = field(default_factory=lambda: sorted(cpu.features()))


class PackedIndex(Struct, frozen=True):
    """The body of an index. ``held``, ``zero``: packed PageRanges; the rest has an entry for each piece, in order:
    the number of its pages (one byte) and the xxh3_64 of its bytes (little-endian)."""

    held: bytes
    zero: bytes
    pages: bytes
    checksums: bytes


class Index:
    """What lies where in a page file: the page with ordinal k of ``held`` at k * PAGE_SIZE.

    Piece p has the ordinals from ``firsts[p]`` up to ``firsts[p + 1]`` and the checksum ``checksums[p]``.
    """

    __slots__ = ("_firsts", "_pages", "checksums", "held", "zero")

    def __init__(self, held: PageRanges, zero: PageRanges, pages: bytes, checksums: "array[int]") -> None:
        """``pages``: how many pages each piece has. Raises ProtocolError where these do not belong together."""
        if len(checksums) != len(pages):
            raise ProtocolError(f"checksums: {len(checksums)} for {len(pages)} pieces")
        if pages.translate(None, _PIECE_SIZES):
            raise ProtocolError(f"pages: a piece has 1 to {PIECE_PAGES} pages, not {min(pages)} or {max(pages)}")
        total = sum(size * pages.count(size) for size in _PIECE_SIZES)
        if total != held.total_pages:
            raise ProtocolError(f"pages: the pieces have {total} pages and held has {held.total_pages}")
        if zero.subtract(held) != zero:
            raise ProtocolError("zero: names pages that are held as well")
        self.held = held
        self.zero = zero
        self.checksums = checksums
        self._pages = pages
        self._firsts: array[int] | None = None

    @property
    def firsts(self) -> "array[int]":
        """The first ordinal of each piece, and how many there are. Made when asked for: it takes 1 ms for each GiB."""
        if self._firsts is None:
            self._firsts = array("Q", accumulate(self._pages, initial=0))
        return self._firsts

    @property
    def page_bytes(self) -> int:
        """The size of the page file."""
        return self.held.total_pages * PAGE_SIZE

    def pack(self) -> PackedIndex:
        """As the body of an index file."""
        return PackedIndex(self.held.pack(), self.zero.pack(), self._pages, _little_endian(self.checksums).tobytes())

    @classmethod
    def unpack(cls, packed: PackedIndex) -> "Index":
        """What `pack` made. Raises ProtocolError."""
        if len(packed.checksums) % 8:
            raise ProtocolError(f"checksums: {len(packed.checksums)} bytes")
        checksums = array("Q")
        checksums.frombytes(packed.checksums)
        held, zero = PageRanges.unpack(packed.held), PageRanges.unpack(packed.zero)
        return cls(held, zero, packed.pages, _little_endian(checksums))


def _little_endian(numbers: "array[int]") -> "array[int]":
    if sys.byteorder == "little":
        return numbers
    swapped = array("Q", numbers)
    swapped.byteswap()
    return swapped


def pack_header(kind: Kind, space: int, checkpoint: bytes, body: bytes) -> bytes:
    """The header of a file that holds ``body``."""
    header = _HEADER.pack(MAGIC, FORMAT_VERSION, kind, space, len(body), checkpoint, 0)
    return header[: -_CHECKSUM.size] + _CHECKSUM.pack(_checksum(header, body))


def parse(name: str, content: bytes, kind: Kind, space: int = 0) -> tuple[bytes, memoryview]:
    """The checkpoint id and the body of a file. Raises CheckpointError with ``name`` and the place of what is wrong."""
    if len(content) < HEADER_SIZE:
        raise CheckpointError(f"{name}: cut off at byte {len(content)}, within its header of {HEADER_SIZE} bytes")
    magic, version, number, found_space, length, checkpoint, checksum = _HEADER.unpack_from(content)
    if magic != MAGIC:
        raise CheckpointError(f"{name}: byte 0: not a file of a checkpoint")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{name}: byte 8: format version {version}; this postcopy reads version {FORMAT_VERSION}",
            "use the postcopy that made the checkpoint",
        )
    body = memoryview(content)[HEADER_SIZE:]
    if length != len(body):
        raise CheckpointError(f"{name}: byte 16: a body of {length} bytes is announced and {len(body)} are there")
    if checksum != _checksum(content[:HEADER_SIZE], body):
        raise CheckpointError(f"{name}: bytes 0 to {len(content)} do not have the checksum that byte 40 gives")
    if number != kind:
        names = {each.value: each.name.lower() for each in Kind}
        raise CheckpointError(f"{name}: byte 10: this is a file of kind {names.get(number, number)}")
    if found_space != space:
        raise CheckpointError(f"{name}: byte 12: this belongs to address space {found_space}")
    return checkpoint, body


def parse_body(name: str, kind: type[T], body: bytes | memoryview) -> T:
    """The body as a struct. Raises CheckpointError with ``name`` and the field."""
    try:
        return decode(kind, body)
    except ProtocolError as error:
        raise CheckpointError(f"{name}: {printable(error.message)}") from None


def checksum_of(content: bytes | memoryview) -> int:
    """The checksum of a piece."""
    return xxhash.xxh3_64_intdigest(content)


def _checksum(header: bytes, body: bytes | memoryview) -> int:
    hashed = xxhash.xxh3_64(header[: -_CHECKSUM.size])
    hashed.update(body)
    return hashed.intdigest()
