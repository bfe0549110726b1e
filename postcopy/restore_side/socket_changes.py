"""What was found late of a tree's connections (`SocketChange`): their options, and whether they block."""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Mapping
from socket import SocketType

from postcopy.errors import RestoreError
from postcopy.kernel import pidfd, socket_options
from postcopy.socket_kinds import SocketChange


def apply(changes: Iterable[SocketChange], built: Mapping[int, int]) -> None:
    """Make the changes; ``built``: pidfds of the processes that have been built. Raises RestoreError."""
    for each in changes:
        if each.pid not in built:
            raise RestoreError(f"the source has changed a connection of process {each.pid}, which is not of the tree")
        try:
            _apply(each, pidfd.getfd(built[each.pid], each.fd))
        except OSError as error:
            text = f"changing the socket with descriptor {each.fd} of process {each.pid}: {error}"
            raise RestoreError(text) from None


def _apply(change: SocketChange, fd: int) -> None:
    with contextlib.closing(SocketType(fileno=fd)) as own:
        flags = fcntl.fcntl(own, fcntl.F_GETFL) & ~os.O_NONBLOCK
        fcntl.fcntl(own, fcntl.F_SETFL, flags | (os.O_NONBLOCK if change.nonblocking else 0))
        for option in change.options:
            own.setsockopt(*socket_options.setting((option.level, option.name), option.value))
