"""Where the pages that the source serves come from."""

import errno
import os
from typing import Protocol

from postcopy.errors import DumpError
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.pagemap import Pagemap
from postcopy.kernel.process_memory import ProcessMemory
from postcopy.kernel.process_vm import process_vm_readv


class PageSource(Protocol):
    """The memory of one address space that no longer changes."""

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer``, whole pages, from the page-aligned ``address`` on; raises DumpError if that cannot be."""


class FrozenProcess:
    """The memory of a stopped process, read in place: no copy is kept."""

    def __init__(self, pid: int, memory: ProcessMemory | None = None, pagemap: Pagemap | None = None) -> None:
        """``pid``: any thread of the process, stopped for as long as this is used; ``memory``: the same process's.

        ``pagemap``: the same process's, where it may have pages in common with others.
        """
        self.pid = pid
        self._memory = memory or ProcessMemory(pid)
        self.pagemap = pagemap

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


class OpenMemory:
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
