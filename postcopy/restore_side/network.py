"""What sockets need beside the calls that make them: before the process is built, when it is, at commit, on failure."""

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Mapping

from postcopy.errors import RestoreError
from postcopy.kernel import neighbours, pidfd, socket_address, tcp_repair
from postcopy.kernel.socket_options import SO_REUSEADDR, SOL_SOCKET, SOL_TCP
from postcopy.kernel.tcp_repair import ESTABLISHED
from postcopy.network_lock import NetworkLock, Traffic
from postcopy.restore_side import tcp_connections, unix_names
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.root import Root
from postcopy.socket_kinds import InetSocket, TcpConnection
from postcopy.state import Tree

log = logging.getLogger("postcopy")


class Network:
    """The sockets of a tree."""

    def __init__(self, tree: Tree, lock: str, root: Root) -> None:
        """``lock``: how to lock the network. ``root``: where the tree's files are."""
        self._root = root
        descriptions = tree.descriptors.descriptions
        self._unix = [one.unix for one in descriptions if one.unix]
        inet = [one.inet for one in descriptions if one.inet]
        self._listeners = [one.local for one in inet if one.backlog >= 0]
        where: dict[int, tuple[int, int]] = {}
        for process in tree.processes:
            for slot in process.slots:
                where.setdefault(slot.description, (process.pid, slot.fd))
        self._connections = [
            (where[number], one.inet, one.inet.connection)
            for number, one in enumerate(descriptions)
            if one.inet and one.inet.connection and number in where
        ]
        self._told_by = contextlib.ExitStack()
        # Duplicates, from when they have been made until they speak.
        self._held: list[tuple[socket.socket, InetSocket, TcpConnection]] = []
        self._lock = NetworkLock(lock, f"postcopy-{os.getpid()}") if self._connections else None

    def prepare(self, leftovers: Leftovers) -> None:
        """Before the tree is built. Raises PostcopyError."""
        with self._root.entered():
            unix_names.prepare(self._unix, leftovers)
        if self._lock is not None:
            ends = [(_end(one.local), _end(one.remote)) for _, one, _ in self._connections]
            listeners = [(host if any(host) else b"", port) for host, port in map(_end, self._listeners)]
            self._lock.lock(Traffic(ends, listeners))

    def complete(self, built: Mapping[int, int]) -> None:
        """Close what peers had closed, and see that every queue holds every byte; ``built``: pidfds by PID.

        Raises RestoreError.
        """
        for (pid, fd), one, connection in self._connections:
            kind = one.socket.family, one.socket.type, one.socket.protocol
            own = socket.socket(*kind, fileno=pidfd.getfd(built[pid], fd))
            self._held.append((own, one, connection))
            try:
                if self._lock is not None:
                    tcp_connections.finish(own, one, connection, self._lock.mark)
                tcp_connections.check(own, connection)
            except OSError as error:
                where = f"{socket_address.text(one.local)} to {socket_address.text(one.remote)}"
                raise RestoreError(f"the connection {where}: {error}") from None

    def settle(self) -> None:
        """After commit, before the tree runs: names are put in place, connections speak again.

        What the system refuses is logged: there is no way back.
        """
        with self._root.entered():
            unix_names.settle(self._unix)
        # Before the first packet, so that its answer finds the way.
        self._announce()
        if self._lock is None:
            return
        # For some milliseconds the kernel waits until nobody can be looking at the rules any more (RCU).
        unlocking = threading.Thread(target=self._lock.close)
        unlocking.start()
        for own, one, connection in self._held:
            if not _waits(connection):
                _let_speak(own, one, tcp_repair.REPAIR_OFF_WITHOUT_PROBE)
        unlocking.join()
        # The peers of these are asked for their acknowledgement, which moves what waits here. Each time that takes the
        # network's whole way down and up.
        for own, one, connection in self._held:
            if _waits(connection):
                _let_speak(own, one, tcp_repair.REPAIR_OFF)

    def _announce(self) -> None:
        """Tell the neighbours where the connections are now: they would ask only when nobody has answered for long."""
        try:
            neighbours.announce({_end(one.local)[0] for _, one, _ in self._connections}, self._told_by)
        except OSError as error:
            log.warning("nobody could be told that the addresses of the program are here now: %s", error.strerror)

    def close(self) -> None:
        """What need not be waited for before the tree runs: ask the peers of which nothing is heard whether they are
        still there, and give back what was held."""
        self._told_by.close()
        for own, one, connection in self._held:
            # Of a reset during the stand-still nothing is left: the lock has dropped it, and it is not sent again.
            if not _waits(connection):
                with contextlib.suppress(OSError):
                    _speak(own, one, tcp_repair.REPAIR_OFF)
        self._let_go()

    def give_up(self) -> None:
        """Leave nothing here; the tree has ended."""
        self._let_go()
        with self._root.entered():
            unix_names.clear_away(self._unix)
        if self._lock is not None:
            self._lock.close()

    def _let_go(self) -> None:
        for own, _, _ in self._held:
            own.close()
        self._held.clear()


def _waits(connection: TcpConnection) -> bool:
    """Whether there is something for the peer to hear, or for the program."""
    queued = connection.sent or connection.unsent or connection.received
    return bool(queued) or connection.state != ESTABLISHED


def _speak(own: socket.socket, one: InetSocket, how: int) -> None:
    """End repair, if it has not ended; with REPAIR_OFF, ask the peer for an acknowledgement."""
    own.setsockopt(SOL_TCP, tcp_repair.TCP_REPAIR, how)
    for each in one.socket.options:
        # That has taken it away.
        if (each.level, each.name) == (SOL_SOCKET, SO_REUSEADDR):
            own.setsockopt(SOL_SOCKET, SO_REUSEADDR, each.value)


def _let_speak(own: socket.socket, one: InetSocket, how: int) -> None:
    try:
        _speak(own, one, how)
    except OSError as error:
        log.error("the program runs, but its connection to %s does not: %s", one.remote, error.strerror)


def _end(address: bytes) -> tuple[bytes, int]:
    return socket_address.unpack(address)
