"""Downloads files over kept connections: ``... -m tests.programs.http_client DIRECTORY COUNT ADDRESS``.

``DIRECTORY/sums.json`` has the SHA-256 of every file. COUNT connections to port 8080 download one file after the other,
until ``DIRECTORY/stop`` is there; then ``DIRECTORY/report.json`` is written. ``DIRECTORY/progress`` tells how many files
the slowest connection has got.
"""

import hashlib
import http.client
import json
import os
import random
import sys
import threading
import time
from pathlib import Path

PORT = 8080
_PATIENCE = 60.0
_PIECE = 1 << 16


class Once(http.client.HTTPConnection):
    """A connection that does not connect again by itself."""

    auto_open = 0


class Connection:
    """One connection, and what has come over it."""

    def __init__(self, number: int, address: str, sums: dict[str, str], stop: threading.Event) -> None:
        self.http = Once(address, PORT, timeout=_PATIENCE)
        self.http.connect()
        self.sums, self.stop = sums, stop
        self.random = random.Random(number)
        self.answers = 0
        self.longest = 0.0
        self.error = ""

    def run(self) -> None:
        """Download until told to stop."""
        try:
            while not self.stop.is_set():
                self._download(self.random.choice(sorted(self.sums)))
                self.answers += 1
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def _download(self, name: str) -> None:
        heard = time.monotonic()
        self.http.request("GET", f"/{name}")
        answer = self.http.getresponse()
        found = hashlib.sha256()
        while True:
            piece = answer.read(_PIECE)
            now = time.monotonic()
            self.longest, heard = max(self.longest, now - heard), now
            if not piece:
                break
            found.update(piece)
        if answer.status != http.client.OK or found.hexdigest() != self.sums[name]:
            raise ValueError(f"{name}: status {answer.status}, checksum {found.hexdigest()}")


def main() -> None:
    """Connect, work, report."""
    directory, count, address = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    sums = json.loads((directory / "sums.json").read_text())
    stop = threading.Event()
    connections = [Connection(number, address, sums, stop) for number in range(count)]
    threads = [threading.Thread(target=connection.run) for connection in connections]
    for thread in threads:
        thread.start()
    while not (directory / "stop").exists() and all(thread.is_alive() for thread in threads):
        (directory / "progress.new").write_text(str(min(connection.answers for connection in connections)))
        os.replace(directory / "progress.new", directory / "progress")
        time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    report = {
        "errors": [connection.error for connection in connections if connection.error],
        "answers": sum(connection.answers for connection in connections),
        "longest": max(connection.longest for connection in connections),
    }
    (directory / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
