"""Keeping everybody from dropping pages of a file while it is filled: whoever punches a hole waits.

The event of MADV_REMOVE cannot be told from that of MADV_DONTNEED (madvise(2)), and comes before anything is done; but
the one drops content, for all who map it, and the other does not. fallocate(2), which MADV_REMOVE calls, takes the lock
of the inode (mm/shmem.c), and so does write(2), for as long as it waits for the page of which it is to write a byte.
That page never comes, so nothing is written. The page of the file to which it would be written must be there, since
Linux 6.15 makes it first (generic_perform_write in mm/filemap.c).
"""

import mmap
import os
import signal
import threading
from contextlib import suppress

from postcopy.kernel import userfaultfd as uffdio
from postcopy.kernel.calls import NUMBERS
from postcopy.kernel.libc import address_of, syscall
from postcopy.kernel.page import PAGE_SIZE
from postcopy.kernel.poll import readable

_PATIENCE_SECONDS = 5.0
_PROT_NONE = 0


class HoleLock:
    """The lock of one file, held until `release` or the end of this process."""

    def __init__(self, fd: int, offset: int, uffd: int) -> None:
        """``fd``: open for writing; ``offset``: of a page that is there; ``uffd``: a userfaultfd of this process, with
        nothing to read. Raises OSError."""
        self._uffd = uffd
        self._fd = fd
        self._offset = offset
        self._never = mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._at = address_of(self._never)
        uffdio.register(uffd, self._at, PAGE_SIZE, uffdio.UFFDIO_REGISTER_MODE_MISSING)
        # No signal is to be handled by a thread that waits in the kernel.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        threading.stack_size(1 << 16)
        threading.Thread(target=self._hold, daemon=True).start()
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        # The fault of the write(2) that has the lock.
        if not readable(uffd, _PATIENCE_SECONDS):
            raise TimeoutError("the lock of shared memory cannot be had")
        uffdio.read_messages(uffd)

    def _hold(self) -> None:
        with suppress(OSError):
            os.pwrite(self._fd, memoryview(self._never)[:1], self._offset)

    def release(self) -> None:
        """Let them; the write(2) ends with EFAULT."""
        syscall("ending a write", NUMBERS["mprotect"], self._at, PAGE_SIZE, _PROT_NONE)
        uffdio.wake(self._uffd, self._at, PAGE_SIZE)
