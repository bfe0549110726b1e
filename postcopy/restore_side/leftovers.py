"""Names that a restore makes and that would outlive it: the watchdog removes them when restore cannot any more."""

import contextlib
import os
import shutil

import msgpack

from postcopy.kernel import mqueue, system_v
from postcopy.kernel.ipc import remove
from postcopy.restore_side.root import HERE, Root

_SIZE = 1 << 16  # bytes: what a pipe holds


class Leftovers:
    """Made before the watchdog is forked. Restore tells of each name; nobody reads it unless all has failed."""

    def __init__(self, root: Root = HERE) -> None:
        """``root``: where the paths lead."""
        self._root = root
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def segment(self, identifier: int) -> None:
        """A System V segment has been made."""
        self._tell(identifier)

    def ipc_object(self, kind: str, identifier: int) -> None:
        """System V semaphores (``sem``) or a message queue (``msg``) has been made."""
        self._tell([kind, identifier])

    def message_queue(self, name: str) -> None:
        """A POSIX message queue has been made."""
        self._tell(["mq", os.fsencode(name)])

    def directory(self, path: str) -> None:
        """A directory of a name that only we make is about to be made."""
        self._tell(os.fsencode(path))

    def cleared(self) -> None:
        """All of them have been removed."""
        self._tell(None)

    def remove(self) -> None:
        """Remove what restore has left. Raises nothing."""
        unpacker = msgpack.Unpacker(raw=True)
        with contextlib.suppress(BlockingIOError):
            unpacker.feed(os.read(self._read, _SIZE))
        names = list(unpacker)
        if None in names:
            return
        for name in names:
            with contextlib.suppress(OSError):
                if isinstance(name, int):
                    system_v.remove(name)
                elif isinstance(name, list) and name[0] == b"mq":
                    mqueue.unlink(os.fsdecode(name[1]))
                elif isinstance(name, list):
                    kind, identifier = name
                    remove(kind.decode(), "what is left", identifier)
                else:
                    with self._root.entered():
                        shutil.rmtree(os.fsdecode(name), ignore_errors=True)

    def _tell(self, name: int | bytes | list[str | int | bytes] | None) -> None:
        # A pipe that is full holds thousands of names: the rest is left behind.
        with contextlib.suppress(BlockingIOError):
            os.write(self._write, msgpack.packb(name))
