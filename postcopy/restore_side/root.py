"""The directory that takes the place of ``/`` for a tree (``--root``).

Whatever is looked up for the tree is looked up inside: by its processes, whose root directory it is from their birth,
and by us, for whom it is that for a moment. So links in it lead where they will lead the program, and never out of it.
"""

import contextlib
import os
from collections.abc import Iterator

from msgspec import Struct

_HOST = "/"


class Root(Struct, frozen=True):
    """``path``: as we see it."""

    path: str = _HOST

    def enter(self) -> None:
        """For good. Raises OSError."""
        if self.path != _HOST:
            os.chroot(self.path)
            os.chdir("/")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """For a moment, in which there need not be a ``/proc``. Raises OSError."""
        if self.path == _HOST:
            yield
            return
        with contextlib.ExitStack() as stack:
            outside, directory = (os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in ("/", "."))
            for fd in (outside, directory):
                stack.callback(os.close, fd)
            stack.callback(os.fchdir, directory)
            stack.callback(os.chroot, ".")
            stack.callback(os.fchdir, outside)
            os.chroot(self.path)
            yield

    def has_proc(self, to_be_mounted: bool) -> bool:
        """Whether the ``/proc`` in it is ours, or can be ``to_be_mounted``. Raises OSError."""
        with self.entered(), contextlib.suppress(OSError):
            return os.path.isdir("/proc") if to_be_mounted else os.readlink("/proc/self") == str(os.getpid())
        return False


HERE = Root()
