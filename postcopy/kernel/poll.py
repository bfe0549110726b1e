"""poll(2): waiting for a descriptor, whatever its number; select(2) takes none above 1023."""

import select
from typing import Protocol


class HasFileno(Protocol):
    """A socket, a file."""

    def fileno(self) -> int:
        """Its descriptor."""


def readable(file: int | HasFileno, seconds: float = 0) -> bool:
    """Whether a read would not block, or a pidfd's process has ended; waits up to ``seconds`` for it."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
