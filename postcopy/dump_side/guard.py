"""The guard: a process that wakes the tree when the control process dies between the durable stop and GO.

ptrace(2) wakes a frozen tree when its tracer dies; the durable stop takes that away one step before commit. The
control process tells the guard by a socket where it stands; the end of the connection says that it has died. The
network lock is the guard's to take away then: before commit at once, after it when the tree has ended or goes on.
Before commit, it also has the action scripts give back the addresses that they have taken away.
"""

import contextlib
import signal
import socket
from collections.abc import Sequence

from postcopy import roles
from postcopy.action_scripts import Action, ActionScripts
from postcopy.dump_side import network
from postcopy.network_lock import NetworkLock

_LOCKING, _GIVING_UP, _STOPPING, _COMMITTING = b"l", b"g", b"s", b"c"
_MOST_BYTES = 1 << 16
_MOST_DESCRIPTORS = 250  # SCM_MAX_FD is 253


class Guard:
    """The control process's end of the connection."""

    def __init__(self, lock: NetworkLock | None = None, scripts: ActionScripts | None = None, pid: int = 0) -> None:
        """Fork the guard; ``lock``: with which the network will be locked, ``pid``: the root of the tree."""
        lock = lock or NetworkLock("skip", "")
        scripts = scripts or ActionScripts()
        self._connection, guards_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def body() -> None:
            watch(guards_end, lock, scripts, pid)

        # Nothing else: it may live on after us, and the destination waits for our connections to be closed.
        keep = [guards_end.fileno(), *lock.descriptors]
        self._role = roles.start("postcopy-guard", body, dies_with_parent=False, keep=keep)
        guards_end.close()

    def locking(self, pids: Sequence[int]) -> None:
        """From here on there may be a network lock to take away, and connections of these processes to give back."""
        for first in range(0, len(pids), _MOST_DESCRIPTORS):
            numbers = " ".join(map(str, pids[first : first + _MOST_DESCRIPTORS]))
            self._connection.send(_LOCKING + numbers.encode())

    def giving_up_addresses(self) -> None:
        """From here on scripts may have taken addresses away."""
        self._connection.send(_GIVING_UP)

    def stopping(self, pidfds: Sequence[int]) -> None:
        """From here on these processes must be woken if we die."""
        for first in range(0, len(pidfds), _MOST_DESCRIPTORS):
            socket.send_fds(self._connection, [_STOPPING], pidfds[first : first + _MOST_DESCRIPTORS])

    def committing(self) -> None:
        """From here on the tree must not be woken by anybody."""
        self._connection.send(_COMMITTING)

    def leave(self) -> None:
        """The tree stays here, stopped, and we end: the guard alone keeps the network locked for it."""
        self._connection.close()

    def dismiss(self) -> None:
        """The guard's work is done."""
        # Killed rather than told: processes forked since may hold the connection open.
        self._role.kill()
        self._connection.close()


def watch(connection: socket.socket, lock: NetworkLock, scripts: ActionScripts, pid: int) -> None:
    """The guard's body: follow the control process to its end."""
    to_wake: list[int] = []
    locked: list[int] = []
    gave_up_addresses = False
    while True:
        said, pidfds, _, _ = socket.recv_fds(connection, _MOST_BYTES, _MOST_DESCRIPTORS)
        if said.startswith(_LOCKING):
            lock.is_locked = True
            locked += [int(word) for word in said[1:].split()]
            continue
        if said == _GIVING_UP:
            gave_up_addresses = True
            continue
        if said != _STOPPING:
            break
        to_wake += pidfds
    if said == _COMMITTING:
        # Whatever becomes of it, nobody wakes the tree.
        connection.recv(1)
        network.keep_watch(lock, locked)
    else:
        if lock.is_locked:
            network.heal(locked)
        if gave_up_addresses:
            scripts.report(Action.NETWORK_UNLOCK, pid)
        lock.close()
        for pidfd in to_wake:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    lock.close()
