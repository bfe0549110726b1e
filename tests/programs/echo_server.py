"""Echoes what comes over TCP: ``python -m tests.programs.echo_server DIRECTORY ADDRESS...``.

Listens at port 7000 of each address and then makes ``DIRECTORY/ready``. While ``DIRECTORY/hold`` is there it neither
reads nor writes. Writes the errors that connections end with to ``DIRECTORY/errors``, one a line. With
``DIRECTORY/restless`` it changes options of its connections all the time, and an option that is not as it was set last
is an error, too.
"""

import contextlib
import random
import resource
import selectors
import socket
import sys
import time
from pathlib import Path

PORT = 7000
_PIECE = 1 << 16
_SWITCHES = [
    (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    (socket.SOL_SOCKET, socket.SO_OOBINLINE),
]


class Connection:
    """What has been read and not yet written back."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.pending = b""
        self.ended = False
        self.set: list[int] = [0] * len(_SWITCHES)

    def switch(self) -> None:
        """Change options that must be as they were set last."""
        found = [int(self.sock.getsockopt(*option) != 0) for option in _SWITCHES]
        if found != self.set:
            raise OSError(f"options are {found} and were set to {self.set}")
        self.set = [random.randrange(2) for _ in _SWITCHES]
        for option, value in zip(_SWITCHES, self.set, strict=True):
            self.sock.setsockopt(*option, value)

    def go_on(self, events: int) -> bool:
        """Read and write what can be; False at the end."""
        with contextlib.suppress(BlockingIOError):
            if events & selectors.EVENT_READ:
                piece = self.sock.recv(_PIECE)
                self.ended = not piece
                self.pending += piece
            if self.pending:
                self.pending = self.pending[self.sock.send(self.pending) :]
        return bool(self.pending) or not self.ended

    @property
    def interest(self) -> int:
        """What to wait for: no more is read than can be written."""
        return selectors.EVENT_WRITE if self.pending else selectors.EVENT_READ


def main() -> None:
    """Serve."""
    directory, addresses = Path(sys.argv[1]), sys.argv[2:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    selector = selectors.PollSelector()
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, PORT), family=family, backlog=1000)
        listener.setblocking(False)
        selector.register(listener, selectors.EVENT_READ)
    (directory / "ready").touch()
    is_restless = (directory / "restless").exists()
    while True:
        while (directory / "hold").exists():
            (directory / "holding").touch()
            time.sleep(0.01)
        for key, events in selector.select(0.05):
            connection = key.data
            if connection is None:
                with contextlib.suppress(BlockingIOError):
                    accepted = Connection(key.fileobj.accept()[0])  # type: ignore[union-attr]
                    selector.register(accepted.sock, selectors.EVENT_READ, accepted)
                continue
            try:
                if is_restless:
                    connection.switch()
                alive = connection.go_on(events)
            except OSError as error:
                with open(directory / "errors", "a") as errors:
                    errors.write(f"{type(error).__name__}\n")
                alive = False
            if alive:
                selector.modify(connection.sock, connection.interest, connection)
            else:
                selector.unregister(connection.sock)
                connection.sock.close()


if __name__ == "__main__":
    main()
