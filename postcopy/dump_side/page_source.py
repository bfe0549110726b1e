"""Where the pages that the source serves come from."""

from typing import Protocol

from postcopy.errors import DumpError
from postcopy.kernel.process_vm import process_vm_readv


class PageSource(Protocol):
    """The memory of one address space that no longer changes."""

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer``, whole pages, from the page-aligned ``address`` on; raises DumpError if that cannot be."""


class FrozenProcess:
    """The memory of a stopped process, read in place: no copy is kept."""

    def __init__(self, pid: int) -> None:
        """``pid``: any thread of the process, stopped for as long as this is used."""
        self.pid = pid

    def read_into(self, address: int, buffer: memoryview) -> None:
        """See `PageSource`; process_vm_readv(2) also reads what the process itself may not (PROT_NONE)."""
        try:
            process_vm_readv(self.pid, address, buffer)
        except OSError as error:
            raise DumpError(
                f"pages of process {self.pid} cannot be read: {error.strerror}",
                hint="the frozen process must stay as it is until the migration has ended",
            ) from error
