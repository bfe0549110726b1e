"""Handing the built tree's userfaultfds from the control process to the daemon, which has been forked before."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import msgpack

from postcopy.page_ranges import PageRanges
from postcopy.restore_side.fault_handler import HandedSpace

_MOST_DESCRIPTORS = 250  # SCM_MAX_FD is 253


@dataclass(frozen=True)
class Handover:
    """The address spaces to fill, and the root of the tree: its PID as we see it, and a pidfd."""

    spaces: Sequence[HandedSpace]
    root_pid: int
    root_pidfd: int

    def send(self, connection: socket.socket) -> None:
        """Pass it on by a Unix seqpacket socket; ranges by a memfd, since they may be many. Raises OSError."""
        content = msgpack.packb([self.root_pid, [[s.space, s.lazy.pack()] for s in self.spaces]])
        with os.fdopen(os.memfd_create("postcopy-handover"), "wb") as memory:
            memory.write(content)
            memory.flush()
            fds = [memory.fileno(), self.root_pidfd, *(s.uffd for s in self.spaces)]
            socket.send_fds(connection, [b"h"], fds)

    @classmethod
    def receive(cls, connection: socket.socket) -> "Handover | None":
        """Wait for one, with descriptors of our own; None when the other side has closed the connection instead."""
        said, fds, _, _ = socket.recv_fds(connection, 1, _MOST_DESCRIPTORS)
        if not said:
            return None
        with os.fdopen(fds[0], "rb") as memory:
            memory.seek(0)
            root_pid, spaces = msgpack.unpackb(memory.read())
        handed = [
            HandedSpace(space, uffd, PageRanges.unpack(lazy))
            for (space, lazy), uffd in zip(spaces, fds[2:], strict=True)
        ]
        return cls(handed, root_pid, fds[1])
