"""Checks every byte that an echo server gives back: ``... -m tests.programs.echo_client DIRECTORY COUNT ADDRESS...``.

Opens COUNT connections to port 7000 of each address and keeps each of them busy until ``DIRECTORY/stop`` is there,
then lets all come back, and writes ``DIRECTORY/report.json``. ``DIRECTORY/progress`` tells how many bytes have come
back on the connection that is behind all others. With ``DIRECTORY/reset`` it resets the first connection, and makes
``DIRECTORY/was_reset``. With ``DIRECTORY/finish`` it writes no more, tells the server so, and makes
``DIRECTORY/finished``; then it stops by itself when all has come back.
"""

import contextlib
import json
import os
import resource
import selectors
import socket
import struct
import sys
import time
from pathlib import Path

PORT = 7000
_AHEAD = int(os.environ.get("ECHO_AHEAD", "200000"))  # bytes that may be on their way
_PATTERN = bytes(number * 167 % 251 for number in range(251 * 1000))
_PIECE = 20_000
_PATIENCE = 60.0


class Connection:
    """One connection, and how far it is. Each begins at another place of the pattern."""

    def __init__(self, number: int, address: str) -> None:
        self.start = number * 7
        self.sock = socket.create_connection((address, PORT), timeout=20)
        self.sock.setblocking(False)
        self.written = self.read = 0
        self.heard = time.monotonic()
        self.longest = 0.0
        self.error = ""

    def expected(self, at: int, length: int) -> bytes:
        """What the stream holds."""
        begin = (self.start + at) % 251
        return _PATTERN[begin : begin + length]

    def go_on(self, stopping: bool) -> None:
        """Write and read what can be."""
        try:
            with contextlib.suppress(BlockingIOError):
                while not stopping and self.written - self.read < _AHEAD:
                    self.written += self.sock.send(self.expected(self.written, min(_PIECE, _AHEAD)))
            with contextlib.suppress(BlockingIOError):
                piece = self.sock.recv(_PIECE)
                if not piece:
                    self.error = self.error or ("" if stopping and self.read == self.written else "closed")
                elif piece != self.expected(self.read, len(piece)):
                    self.error = f"wrong bytes at {self.read}"
                self.read += len(piece)
                now = time.monotonic()
                self.longest, self.heard = max(self.longest, now - self.heard), now
        except OSError as error:
            self.error = type(error).__name__


def main() -> None:
    """Connect, work, report."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    directory, count, addresses = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    connections = [Connection(number, address) for address in addresses for number in range(count)]
    selector = selectors.PollSelector()
    for connection in connections:
        selector.register(connection.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, connection)
    stopping_since = 0.0
    told = 0.0
    while not stopping_since or time.monotonic() < stopping_since + _PATIENCE:
        if not stopping_since and (directory / "stop").exists():
            stopping_since = time.monotonic()
        if (directory / "reset").exists() and not connections[0].error:
            connections[0].sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
            selector.unregister(connections[0].sock)
            connections[0].sock.close()
            connections[0].error = "reset by us"
            (directory / "was_reset").touch()
        if (directory / "finish").exists() and not stopping_since:
            stopping_since = time.monotonic()
            for connection in connections:
                connection.sock.shutdown(socket.SHUT_WR)
            (directory / "finished").touch()
        for key, _ in selector.select(0.02):
            key.data.go_on(bool(stopping_since))
            full = key.data.written - key.data.read >= _AHEAD or stopping_since
            if key.data.error:
                selector.unregister(key.data.sock)
            else:
                wanted = selectors.EVENT_READ if full else selectors.EVENT_READ | selectors.EVENT_WRITE
                selector.modify(key.data.sock, wanted, key.data)
        alive = [connection for connection in connections if not connection.error]
        if stopping_since and all(connection.read == connection.written for connection in alive):
            break
        if time.monotonic() > told + 0.02:
            told = time.monotonic()
            (directory / "progress.new").write_text(str(min((one.read for one in alive), default=-1)))
            os.replace(directory / "progress.new", directory / "progress")
    report = {
        "errors": [connection.error for connection in connections if connection.error],
        "missing": sum(connection.written - connection.read for connection in connections if not connection.error),
        "read": min((connection.read for connection in connections if not connection.error), default=0),
        "longest": max(connection.longest for connection in connections),
    }
    (directory / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
