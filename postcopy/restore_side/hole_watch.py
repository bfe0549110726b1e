"""Finding out what is dropped of hugetlb memory while it is filled. There can be no `HoleLock`: it has no write(2).

MADV_REMOVE and MADV_DONTNEED send the same event. But fallocate(2), which the first calls once the event has been read,
tells who watches the file (inotify(7), IN_MODIFY) before its caller goes on. So what an event was about is in doubt,
and not filled, until that is told, or until the thread has had time enough to get there. Where that takes longer, or
more is in doubt than is told of, it cannot be found out what was dropped, and nothing may be made of it.
"""

import os
import struct

from msgspec import Struct

from postcopy.kernel import inotify

_PATIENCE_NS = 300_000_000
_EVENT = struct.Struct("=iIII")
_MOST_READ = 4096


class Undecided(Exception):
    """Something has been dropped, and nobody can tell what."""


class HoleWatch:
    """The files that are watched."""

    def __init__(self) -> None:
        """None yet. Raises OSError."""
        self._fd = inotify.make(os.O_CLOEXEC | os.O_NONBLOCK)

    def add(self, fd: int) -> int:
        """Watch a file; the number of the watch. Raises OSError."""
        return inotify.add_watch(self._fd, f"/proc/self/fd/{fd}", inotify.IN_MODIFY)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def changed(self) -> set[int]:
        """The numbers of those of which something has been dropped since the last call."""
        found: set[int] = set()
        while True:
            try:
                events = os.read(self._fd, _MOST_READ)
            except BlockingIOError:
                return found
            # Events of a file itself have no name, and so have one size.
            found |= {number for number, _, _, _ in _EVENT.iter_unpack(events)}


class Doubts(Struct):
    """Which ranges of one file may be about to be dropped, and until when (monotonic clock, ns) that can be."""

    ranges: list[tuple[int, int, int]] = []
    # How often something has been dropped since there has been doubt.
    told: int = 0

    def add(self, start: int, end: int, now: int) -> None:
        """An event was about start-end."""
        self.ranges.append((start, end, now + _PATIENCE_NS))

    def overlap(self, start: int, end: int) -> bool:
        """Whether any of start-end is in doubt."""
        return any(first < end and start < last for first, last, _ in self.ranges)

    def decide(self, told: bool, now: int) -> list[tuple[int, int]]:
        """What has been dropped; ``told``: that something has been. Raises Undecided."""
        self.told += told
        if self.told > len(self.ranges):
            raise Undecided
        if self.told == len(self.ranges):
            dropped = [(start, end) for start, end, _ in self.ranges]
            self.ranges, self.told = [], 0
            return dropped
        over = [each for each in self.ranges if each[2] <= now]
        if over and self.told:
            raise Undecided
        self.ranges = [each for each in self.ranges if each not in over]
        return []
