"""Downloads files over kept connections: ``... -m tests.programs.http_client DIRECTORY COUNT ADDRESS``.

COUNT connections to port 8080 download one file after the other; ``DIRECTORY/sums.json`` has the SHA-256 of each. See
`tests.programs.checking`.
"""

import hashlib
import http.client
import json
import sys
from pathlib import Path

from tests.programs import checking

PORT = 8080
_PIECE = 1 << 16


class Once(http.client.HTTPConnection):
    """A connection that does not connect again by itself."""

    auto_open = 0


class Connection(checking.Connection):
    """One connection, and what must come over it."""

    def __init__(self, number: int, address: str, sums: dict[str, str]) -> None:
        super().__init__(number)
        self.http = Once(address, PORT, timeout=checking.PATIENCE)
        self.http.connect()
        self.sums = sums

    def step(self) -> None:
        """Download a file."""
        name = self.random.choice(sorted(self.sums))
        self.http.request("GET", f"/{name}")
        answer = self.http.getresponse()
        found = hashlib.sha256()
        while piece := answer.read(_PIECE):
            self.heard()
            found.update(piece)
        if answer.status != http.client.OK or found.hexdigest() != self.sums[name]:
            raise ValueError(f"{name}: status {answer.status}, checksum {found.hexdigest()}")


def main() -> None:
    """Connect, work, report."""
    directory, count, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    sums = json.loads((directory / "sums.json").read_text())
    checking.run(directory, [Connection(number, address, sums) for number in range(count)])


if __name__ == "__main__":
    main()
