"""Where the pages that the source serves come from."""

import errno
import os
from collections.abc import Sequence
from itertools import groupby

from postcopy.errors import DumpError
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.kernel.process_vm import MOST_PLACES, process_vm_readv, process_vm_readv_all
from postcopy.sent_pages import PageSource


class FrozenProcess(PageSource):
    """The memory of a stopped process, read in place: no copy is kept."""

    def __init__(self, pid: int, memory: ProcessMemory | None = None, pagemap: Pagemap | None = None) -> None:
        """``pid``: any thread of the process, stopped for as long as this is used; ``memory``: the same process's.

        ``pagemap``: the same process's, where it may have pages in common with others.
        """
        self.pid = pid
        self._memory = memory or ProcessMemory(pid)
        self.pagemap = pagemap

    def read_all(self, places: Sequence[tuple[int, int]], buffer: memoryview) -> None:
        """See `PageSource`."""
        done = 0
        for is_alone, numbers in groupby(range(len(places)), self._are_exclusive(places).__getitem__):
            group = [places[number] for number in numbers]
            for first in range(0, len(group), MOST_PLACES):
                some = group[first : first + MOST_PLACES]
                length = sum(size for _, size in some)
                part = buffer[done : done + length]
                if not (is_alone and self._read_together(some, part)):
                    super().read_all(some, part)
                done += length

    def _are_exclusive(self, places: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether no other process has any of the pages there, of each place."""
        if self.pagemap is None:
            return [True] * len(places)
        try:
            return self.pagemap.exclusive_of((start, start + size) for start, size in places)
        except OSError:
            return [False] * len(places)

    def _read_together(self, places: Sequence[tuple[int, int]], buffer: memoryview) -> bool:
        """Whether it could be had by one call."""
        try:
            process_vm_readv_all(self.pid, places, buffer)
        except OSError:
            return False
        return True

    def read_into(self, address: int, buffer: memoryview) -> None:
        """See `PageSource`."""
        try:
            if self.pagemap and not self.pagemap.are_exclusive(address, len(buffer) // PAGE_SIZE):
                # process_vm_readv(2) would give the process copies of its own of pages shared since a fork (mm/gup.c,
                # gup_must_unshare): all of that memory twice, here on the source.
                self._memory.read_into(address, buffer)
                return
            try:
                process_vm_readv(self.pid, address, buffer)
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                # process_vm_readv(2) keeps to the protections; pages in PROT_NONE memory are read the slower way.
                self._memory.read_into(address, buffer)
        except OSError as error:
            raise DumpError(
                f"pages of process {self.pid} cannot be read: {error.strerror}",
                hint="the frozen process must stay as it is until the migration has ended",
            ) from error


class OpenMemory(PageSource):
    """Memory with an identity of its own, whose users stand still; addresses are offsets in it."""

    def __init__(self, fd: int, name: str) -> None:
        """``fd``: open for reading for as long as this is used; ``name``: what errors call it."""
        self.fd = fd
        self._name = name

    def read_into(self, address: int, buffer: memoryview) -> None:
        """See `PageSource`; zeros behind its end."""
        while buffer:
            try:
                count = os.preadv(self.fd, [buffer], address)
            except OSError as error:
                raise DumpError(f"{self._name} cannot be read: {error.strerror}") from None
            if not count:
                buffer[:] = bytes(len(buffer))
                return
            address += count
            buffer = buffer[count:]
