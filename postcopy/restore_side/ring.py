"""The ring between the bulk receiver and the fault handler: memory that a fork shares, and two eventfds.

A slot holds whole frames of the bulk channel, one after the other, as they came from the socket.
"""

import mmap
import os
from struct import Struct

from postcopy.kernel.libc import address_of
from postcopy.kernel.page import PAGE_SIZE
from postcopy.wire.pages import HEADER_SIZE, MOST_BULK_PAGES

# A chunk of the streamer fits whole, even when every page is a frame of its own.
SLOT_SIZE = MOST_BULK_PAGES * (HEADER_SIZE + PAGE_SIZE)
SLOTS = 16

_LENGTH = Struct("=Q")
_LENGTHS_SIZE = PAGE_SIZE


class Ring:
    """Make it before the fork; one process uses the writing half, one the reading half."""

    def __init__(self, slots: int = SLOTS) -> None:
        """An empty ring."""
        self.slots = slots
        self._memory = mmap.mmap(-1, _LENGTHS_SIZE + slots * SLOT_SIZE)
        self._view = memoryview(self._memory)
        self._base = address_of(self._memory)
        self._free = os.eventfd(slots, os.EFD_CLOEXEC)
        # Readable when slots have been filled: what the reader hands to epoll.
        self.filled = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._write_at = 0
        self._credits = 0
        self._read_at = 0

    def slot(self, index: int) -> memoryview:
        """The bytes of a slot."""
        start = _LENGTHS_SIZE + index * SLOT_SIZE
        return self._view[start : start + SLOT_SIZE]

    def address(self, index: int) -> int:
        """The address of a slot in this process."""
        return self._base + _LENGTHS_SIZE + index * SLOT_SIZE

    def next_free(self) -> int:
        """For the writer: the slot to fill next; blocks until the reader has given it back."""
        if not self._credits:
            self._credits = os.eventfd_read(self._free)
        return self._write_at

    def publish(self, length: int) -> None:
        """For the writer: the slot of `next_free` now holds ``length`` bytes."""
        _LENGTH.pack_into(self._memory, self._write_at * _LENGTH.size, length)
        self._credits -= 1
        self._write_at = (self._write_at + 1) % self.slots
        os.eventfd_write(self.filled, 1)

    def take_filled(self) -> int:
        """For the reader: how many more slots have been filled since the last call."""
        try:
            return os.eventfd_read(self.filled)
        except BlockingIOError:
            return 0

    def current(self) -> tuple[int, int]:
        """For the reader, of a filled slot: (its index, the bytes it holds)."""
        length: int = _LENGTH.unpack_from(self._memory, self._read_at * _LENGTH.size)[0]
        return self._read_at, length

    def release(self) -> None:
        """For the reader: the slot of `current` may be filled again."""
        self._read_at = (self._read_at + 1) % self.slots
        os.eventfd_write(self._free, 1)
