"""``/proc/PID/mem``: reads and writes that do not ask for the page's protection (proc_pid_mem(5), FOLL_FORCE)."""

import errno
import os

from postcopy.kernel.libc import refused


class ProcessMemory:
    """The memory of one process, by address. Raises OSError: EIO where nothing is mapped, ESRCH when it is gone."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def read(self, address: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``address``."""
        content = bytearray(length)
        self.read_into(address, memoryview(content))
        return bytes(content)

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from ``address``."""
        while buffer:
            try:
                count = os.preadv(self._fd, [buffer], address)
            except OSError as error:
                raise refused(f"reading memory of process {self._pid} at {address:#x}", error.errno) from None
            if not count:
                raise refused(f"reading memory of process {self._pid} at {address:#x}", errno.ESRCH)
            address += count
            buffer = buffer[count:]

    def write(self, address: int, content: bytes | memoryview) -> None:
        """All of ``content`` to ``address``."""
        view = memoryview(content)
        while view:
            try:
                written = os.pwrite(self._fd, view, address)
            except OSError as error:
                raise refused(f"writing memory of process {self._pid} at {address:#x}", error.errno) from None
            if not written:
                raise refused(f"writing memory of process {self._pid} at {address:#x}", errno.ESRCH)
            address += written
            view = view[written:]
