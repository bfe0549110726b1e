"""``/proc/PID/mem``: reads and writes that do not ask for the page's protection (proc_pid_mem(5), FOLL_FORCE)."""

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
        pieces = []
        while length:
            try:
                piece = os.pread(self._fd, length, address)
            except OSError as error:
                raise refused(f"reading memory of process {self._pid} at {address:#x}", error.errno) from None
            if not piece:
                raise refused(f"reading memory of process {self._pid} at {address:#x}", 3)
            pieces.append(piece)
            address += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def write(self, address: int, content: bytes | memoryview) -> None:
        """All of ``content`` to ``address``."""
        view = memoryview(content)
        while view:
            try:
                written = os.pwrite(self._fd, view, address)
            except OSError as error:
                raise refused(f"writing memory of process {self._pid} at {address:#x}", error.errno) from None
            if not written:
                raise refused(f"writing memory of process {self._pid} at {address:#x}", 3)
            address += written
            view = view[written:]
