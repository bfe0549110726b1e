"""The messages of the demand channel and of the bulk channel.

Both are streams of frames: a header of 24 bytes, little-endian, then ``length`` bytes of payload.

====================  ======================  =======================================================
frame                 way                     meaning of its fields
====================  ======================  =======================================================
REQUEST (demand)      destination to source   send ``pages`` pages from ``address`` of ``space`` on
BACKGROUND (demand)   destination to source   ``pages`` is 1 to start the bulk stream, 0 to halt it
FINISH (demand)       destination to source   every page has arrived
PAGES (both)          source to destination   the payload is ``pages`` pages from ``address`` of ``space`` on
ALSO (both)           source to destination   the next PAGES frame, of the same pages, is for ``space`` too
END (bulk)            source to destination   everything has been sent once
FAILED (both)         source to destination   the payload is the reason, UTF-8
====================  ======================  =======================================================
"""

from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from postcopy.errors import ProtocolError
from postcopy.kernel.page import ADDRESS_LIMIT, PAGE_SHIFT, PAGE_SIZE

_HEADER = Struct("<IIQII")
HEADER_SIZE = _HEADER.size

MOST_DEMAND_PAGES = 64
MOST_BULK_PAGES = 64
MOST_REASON_BYTES = 4096


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    BACKGROUND = 2
    FINISH = 3
    PAGES = 4
    END = 5
    FAILED = 6
    ALSO = 7


# Plain numbers: comparing members of an IntEnum costs more than the rest of the parsing.
REQUEST, BACKGROUND, FINISH, PAGES, END, FAILED, ALSO = (int(kind) for kind in Kind)


class Header(NamedTuple):
    """A frame without its payload; ``address`` in bytes, ``length`` in bytes."""

    kind: int
    space: int
    address: int
    pages: int
    length: int


_unpack = _HEADER.unpack_from
pack_header_into = _HEADER.pack_into


def request(space: int, address: int, pages: int) -> bytes:
    """The frame that asks for ``pages`` pages."""
    return _HEADER.pack(REQUEST, space, address, pages, 0)


def background(running: bool) -> bytes:
    """The frame that starts or halts the bulk stream."""
    return _HEADER.pack(BACKGROUND, 0, 0, int(running), 0)


def finish() -> bytes:
    """The frame that says that every page has arrived."""
    return _HEADER.pack(FINISH, 0, 0, 0, 0)


def pages_header_into(buffer: bytearray | memoryview, offset: int, space: int, address: int, pages: int) -> None:
    """Write the header of a PAGES frame to where its payload will follow."""
    pack_header_into(buffer, offset, PAGES, space, address, pages, pages << PAGE_SHIFT)


def also(space: int, address: int, pages: int) -> bytes:
    """The frame that says that the pages which follow are those of ``space`` as well."""
    return _HEADER.pack(ALSO, space, address, pages, 0)


def end() -> bytes:
    """The frame that ends the bulk stream."""
    return _HEADER.pack(END, 0, 0, 0, 0)


def failed(reason: str) -> bytes:
    """The frame that says why no more pages will come; a long reason is cut."""
    payload = reason.encode(errors="replace")[:MOST_REASON_BYTES]
    return _HEADER.pack(FAILED, 0, 0, 0, len(payload)) + payload


def reason_of(payload: bytes | memoryview) -> str:
    """The payload of a FAILED frame as text fit for one line of a terminal."""
    text = bytes(payload).decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text)


def parse_demand(buffer: bytes | bytearray | memoryview, offset: int = 0) -> Header:
    """The frame of the demand channel that the destination sent. Raises ProtocolError."""
    header = Header(*_unpack(buffer, offset))
    kind, _, address, pages, length = header
    if length:
        raise ProtocolError(f"a frame of kind {kind} from the destination has {length} bytes of payload")
    if kind == REQUEST:
        _check_pages(address, pages, MOST_DEMAND_PAGES)
    elif kind == BACKGROUND:
        if pages > 1:
            raise ProtocolError(f"BACKGROUND can be 0 or 1, not {pages}")
    elif kind != FINISH:
        raise ProtocolError(f"unknown frame of kind {kind} on the demand channel")
    return header


def parse_answer(buffer: bytes | bytearray | memoryview, offset: int = 0) -> Header:
    """The frame of either channel that the source sent. Raises ProtocolError."""
    header = Header(*_unpack(buffer, offset))
    kind, _, address, pages, length = header
    if kind == PAGES:
        _check_pages(address, pages, MOST_BULK_PAGES)
        if length != pages << PAGE_SHIFT:
            raise ProtocolError(f"{pages} pages cannot have {length} bytes")
    elif kind == FAILED:
        if length > MOST_REASON_BYTES:
            raise ProtocolError(f"a reason of {length} bytes")
    elif kind in (END, ALSO):
        if length:
            raise ProtocolError(f"a frame of kind {kind} with {length} bytes of payload")
        if kind == ALSO:
            _check_pages(address, pages, MOST_BULK_PAGES)
    else:
        raise ProtocolError(f"unknown frame of kind {kind} from the source")
    return header


def _check_pages(address: int, pages: int, most: int) -> None:
    if not 1 <= pages <= most:
        raise ProtocolError(f"a frame of {pages} pages; 1 to {most} are allowed")
    if address % PAGE_SIZE or address + (pages << PAGE_SHIFT) > ADDRESS_LIMIT:
        raise ProtocolError(f"{pages} pages at {address:#x} are misaligned or no user memory")
