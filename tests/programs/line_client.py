"""Asks `asyncio_service` and checks every answer: ``... -m tests.programs.line_client DIRECTORY COUNT ADDRESS``.

COUNT connections to port 7100 count, each on its own. See `tests.programs.checking`.
"""

import socket
import sys
from pathlib import Path

from tests.programs import checking

PORT = 7100


class Connection(checking.Connection):
    """One connection."""

    def __init__(self, number: int, address: str) -> None:
        super().__init__(number)
        self.sock = socket.create_connection((address, PORT), timeout=checking.PATIENCE)
        self.file = self.sock.makefile("rb")
        self.ticks = 0

    def step(self) -> None:
        """The answer is the question, how many the connection has asked, and how often the timer has expired."""
        asked = b"%d-%d-%s" % (self.number, self.answers, b"x" * self.random.randrange(2000))
        self.sock.sendall(asked + b"\n")
        text, count, ticks = self.file.readline().split()
        if (text, int(count)) != (asked, self.answers + 1) or int(ticks) < self.ticks:
            raise ValueError(f"{asked!r:.60} was answered by {text!r:.60}, {count!r}, {ticks!r} after {self.ticks}")
        self.ticks = int(ticks)


def main() -> None:
    """Connect, work, report."""
    directory, count, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    checking.run(directory, [Connection(number, address) for number in range(count)])


if __name__ == "__main__":
    main()
