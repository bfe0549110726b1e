"""Makes connections and keeps them, a byte sent on each: ``connecting.py ADDRESS PORT COUNT``. It ends by a signal."""

import resource
import signal
import socket
import sys


def main() -> None:
    """Connect, wait."""
    address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    connections: list[socket.socket] = []
    while len(connections) < count:
        try:
            connections.append(socket.create_connection((address, port)))
        except ConnectionRefusedError:
            continue
        connections[-1].sendall(b"x")
    signal.pause()


if __name__ == "__main__":
    main()
