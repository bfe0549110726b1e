"""What was found late of a tree's connections (`SocketChange`)."""

import os
import socket
import struct
from collections.abc import Iterable, Mapping

from postcopy.errors import RestoreError
from postcopy.kernel import pidfd, socket_options
from postcopy.kernel.socket_options import SO_PROTOCOL, SOL_SOCKET
from postcopy.socket_kinds import SocketChange


def apply(changes: Iterable[SocketChange], built: Mapping[int, int]) -> None:
    """Make the changes; ``built``: pidfds of the processes that have been built. Raises RestoreError."""
    for each in changes:
        what = f"changing the socket with descriptor {each.fd} of process {each.pid}"
        if each.pid not in built:
            raise RestoreError(f"{what}: there is no such process in the tree")
        try:
            _apply(each, pidfd.getfd(built[each.pid], each.fd), what)
        except (OSError, ValueError, struct.error) as error:
            raise RestoreError(f"{what}: {error}") from None


def _apply(change: SocketChange, fd: int, what: str) -> None:
    try:
        own = socket.socket(fileno=fd)
    except OSError:
        os.close(fd)
        raise
    with own:
        kind = int(own.family), int(own.type), own.getsockopt(SOL_SOCKET, SO_PROTOCOL)
        wanted = {(option.level, option.name): option.value for option in change.options}
        if foreign := wanted.keys() - socket_options.changeable(kind):
            raise RestoreError(f"{what}: options {sorted(foreign)} cannot be changed so late")
        for option, value in wanted.items():
            own.setsockopt(*socket_options.setting(option, value))
        found = socket_options.named(kind, socket_options.values(own))
        if wrong := [option for option, value in wanted.items() if found.get(option) != value]:
            raise RestoreError(f"{what}: options {wrong} did not stay as they were set; it runs on: try again")
