"""netlink(7): the messages that the kernel answers with, and the attributes in them."""

import struct
from collections.abc import Iterator

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port


def messages(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and body of each message that came together."""
    place = 0
    while place + HEADER.size <= len(content):
        length, kind, *_ = HEADER.unpack_from(content, place)
        yield kind, content[place + HEADER.size : place + length]
        place += max((length + 3) & ~3, HEADER.size)


def attributes(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and value of each attribute that follows a message's fixed part."""
    place = 0
    while place + 4 <= len(content):
        length, kind = struct.unpack_from("=HH", content, place)
        yield kind, content[place + 4 : place + length]
        place += (length + 3) & ~3
