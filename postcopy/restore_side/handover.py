"""Handing the built tree's userfaultfds from the control process to the daemon, which has been forked before."""

import os
import socket
from collections.abc import Sequence

import msgpack
from msgspec import Struct

from postcopy.huge_pages import HugeArea, HugeAreas
from postcopy.page_ranges import PageRanges
from postcopy.restore_side.fault_handler import HandedSpace
from postcopy.restore_side.shared_filling import HandedObject, Part

_MOST_DESCRIPTORS = 250  # SCM_MAX_FD is 253


class Handover(Struct, frozen=True):
    """What to fill, and the processes of the tree, the root first: PIDs as we see them, and pidfds."""

    spaces: Sequence[HandedSpace]
    objects: Sequence[HandedObject]
    processes: Sequence[tuple[int, int]]

    @property
    def pidfds(self) -> list[int]:
        """Those of all processes."""
        return [pidfd for _, pidfd in self.processes]

    def send(self, connection: socket.socket) -> None:
        """Pass it on by a Unix seqpacket socket; ranges by a memfd, since they may be many. Raises OSError."""
        spaces = [
            [s.space, s.lazy.pack(), s.shared, (s.registered or s.lazy).pack(), s.huge.areas if s.huge else []]
            for s in self.spaces
        ]
        objects = [[o.space, o.size, o.lazy.pack(), o.first, o.huge_shift] for o in self.objects]
        content = msgpack.packb([[pid for pid, _ in self.processes], spaces, objects])
        with os.fdopen(os.memfd_create("postcopy-handover"), "wb") as memory:
            memory.write(content)
            memory.flush()
            socket.send_fds(connection, [b"h"], [memory.fileno()])
        fds = [*self.pidfds, *(s.uffd for s in self.spaces), *(o.fd for o in self.objects)]
        for first in range(0, len(fds), _MOST_DESCRIPTORS):
            socket.send_fds(connection, [b"f"], fds[first : first + _MOST_DESCRIPTORS])

    @classmethod
    def receive(cls, connection: socket.socket) -> "Handover | None":
        """Wait for one, with descriptors of our own; None when the other side has closed the connection instead."""
        said, first, _, _ = socket.recv_fds(connection, 1, 1)
        if not said:
            return None
        with os.fdopen(first[0], "rb") as memory:
            memory.seek(0)
            pids, spaces, objects = msgpack.unpackb(memory.read())
        fds: list[int] = []
        while len(fds) < len(pids) + len(spaces) + len(objects):
            said, more, _, _ = socket.recv_fds(connection, 1, _MOST_DESCRIPTORS)
            if not said:
                return None
            fds += more
        left = iter(fds)
        processes = [(pid, next(left)) for pid in pids]
        return cls(
            [
                HandedSpace(
                    space,
                    next(left),
                    PageRanges.unpack(lazy),
                    [Part(*part) for part in shared],
                    PageRanges.unpack(registered),
                    HugeAreas(HugeArea(*area) for area in huge) if huge else None,
                )
                for space, lazy, shared, registered, huge in spaces
            ],
            [
                HandedObject(space, next(left), size, PageRanges.unpack(lazy), first, huge_shift)
                for space, size, lazy, first, huge_shift in objects
            ],
            processes,
        )
