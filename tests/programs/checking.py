"""What clients that check every answer have in common.

They work until ``DIRECTORY/stop`` is there, then look at what is to be looked at in the end, and write
``DIRECTORY/report.json``. ``DIRECTORY/progress`` tells how many answers the slowest connection has got.
"""

import json
import os
import random
import threading
import time
from collections.abc import Sequence
from pathlib import Path

PATIENCE = 60.0


class Connection:
    """One connection, in a thread of its own."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.random = random.Random(number)
        self.answers = 0
        self.writes = 0
        self.longest = 0.0
        self.error = ""
        self._heard = 0.0

    def step(self) -> None:
        """Ask, and check the answer. Whatever it raises is an error of the server."""
        raise NotImplementedError

    def begin(self) -> None:
        """What comes before the first question."""

    def end(self) -> None:
        """What is to be checked after the last."""

    def heard(self) -> None:
        """Something has come."""
        now = time.monotonic()
        self.longest, self._heard = max(self.longest, now - self._heard), now

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop."""
        try:
            self.begin()
            while not stop.is_set():
                self._heard = time.monotonic()
                self.step()
                self.heard()
                self.answers += 1
            self.end()
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


def run(directory: Path, connections: Sequence[Connection]) -> None:
    """Work, tell, report."""
    stop = threading.Event()
    threads = [threading.Thread(target=connection.run, args=[stop]) for connection in connections]
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
        "writes": sum(connection.writes for connection in connections),
        "longest": max(connection.longest for connection in connections),
    }
    (directory / "report.json").write_text(json.dumps(report))
