"""What sockets need beside the calls that make them: before the process is built, when it is, at commit, on failure."""

import contextlib
import fcntl
import logging
import os
import threading
from collections.abc import Mapping
from socket import SocketType

from msgspec import Struct

from postcopy.errors import RestoreError
from postcopy.kernel import neighbours, pidfd, socket_address, tcp_repair
from postcopy.kernel.socket_options import SO_REUSEADDR, SOL_SOCKET
from postcopy.kernel.tcp_repair import ESTABLISHED
from postcopy.network_lock import NetworkLock, Traffic
from postcopy.restore_side import tcp_connections, unix_names
from postcopy.restore_side.groundwork import raise_limit
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.root import Root
from postcopy.socket_kinds import InetSocket, TcpConnection
from postcopy.state import Tree

log = logging.getLogger("postcopy")


class _Held(Struct):
    """A connection that has been made, by a descriptor of ours."""

    own: SocketType
    one: InetSocket
    waits: bool
    reuse_address: int

    @classmethod
    def of(cls, own: SocketType, one: InetSocket, connection: TcpConnection) -> "_Held":
        """``waits``: whether there is something for the peer to hear; ``reuse_address``: SO_REUSEADDR."""
        waits = bool(connection.sent or connection.unsent) or connection.state != ESTABLISHED
        reuse_address = 0
        for each in one.socket.options:
            if each.name == SO_REUSEADDR and each.level == SOL_SOCKET:
                reuse_address = int.from_bytes(each.value, "little")
        return cls(own, one, waits, reuse_address)


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
        self._addresses: set[bytes] = set()
        self._told_by = contextlib.ExitStack()
        # Duplicates, from when they have been made until they speak.
        self._held: list[_Held] = []
        self._lock = NetworkLock(lock, f"postcopy-{os.getpid()}") if self._connections else None
        self._locking: threading.Thread | None = None
        self._not_locked: BaseException | None = None

    def prepare(self, leftovers: Leftovers) -> None:
        """Before the tree is built. Raises PostcopyError."""
        with self._root.entered():
            unix_names.prepare(self._unix, leftovers)
        if self._lock is not None:
            # Most of that is waiting.
            self._locking = threading.Thread(target=self._begin_lock, args=(self._lock,))
            self._locking.start()

    def _begin_lock(self, lock: NetworkLock) -> None:
        ends = [(_end(one.local), _end(one.remote)) for _, one, _ in self._connections]
        listeners = [(host if any(host) else b"", port) for host, port in map(_end, self._listeners)]
        try:
            lock.lock(Traffic(ends, listeners))
        except BaseException as error:
            self._not_locked = error

    def await_lock(self) -> None:
        """Before any socket is made: until the network is locked. Raises PostcopyError."""
        if self._locking is not None:
            self._locking.join()
        if self._not_locked is not None:
            raise self._not_locked

    def complete(self, built: Mapping[int, int]) -> None:
        """Close what peers had closed, and see to it that `hold` cannot fail; ``built``: pidfds by PID.

        Raises RestoreError.
        """
        reserve(len(self._connections))
        for place, one, connection in self._connections:
            if self._lock is not None and not tcp_connections.is_plain(connection):
                own = self._hold(built, place, one, connection)
                try:
                    tcp_connections.finish(own, one, connection, self._lock.mark)
                    tcp_connections.check(own, connection)
                except OSError as error:
                    raise RestoreError(f"the connection {tcp_connections.name(one)}: {error}") from None

    def hold(self, built: Mapping[int, int]) -> None:
        """Get hold of the other connections, to let them speak after commit."""
        self._addresses = {_end(one.local)[0] for _, one, _ in self._connections}
        for place, one, connection in self._connections:
            if tcp_connections.is_plain(connection):
                try:
                    self._hold(built, place, one, connection)
                except RestoreError as error:
                    # The source may have committed. Its process has been killed: nothing else is left to fail.
                    log.error("%s", error.message)

    def _hold(
        self, built: Mapping[int, int], place: tuple[int, int], one: InetSocket, connection: TcpConnection
    ) -> SocketType:
        pid, fd = place
        try:
            taken = pidfd.getfd(built[pid], fd)
        except OSError as error:
            raise RestoreError(f"the connection {tcp_connections.name(one)}: {error.strerror}") from None
        own = SocketType(one.socket.family, one.socket.type, one.socket.protocol, taken)
        self._held.append(_Held.of(own, one, connection))
        return own

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
        self._lock.let_pass()
        for each in self._held:
            # The peers of these are asked for their acknowledgement, which moves what waits here. Each time that takes
            # the network's whole way down and up.
            how = tcp_repair.REPAIR_OFF if each.waits else tcp_repair.REPAIR_OFF_WITHOUT_PROBE
            try:
                tcp_repair.end_repair(each.own, how, each.reuse_address)
            except OSError as error:
                name = tcp_connections.name(each.one)
                log.error("the program runs, but its connection %s does not: %s", name, error.strerror)

    def _announce(self) -> None:
        """Tell the neighbours where the connections are now: they would ask only when nobody has answered for long."""
        try:
            neighbours.announce(self._addresses, self._told_by)
        except OSError as error:
            log.warning("nobody could be told that the addresses of the program are here now: %s", error.strerror)

    def close(self) -> None:
        """What need not be waited for before the tree runs: ask the peers of which nothing is heard whether they are
        still there, and give back what was held."""
        self._told_by.close()
        for each in self._held:
            # Of a reset during the stand-still nothing is left: the lock has dropped it, and it is not sent again.
            if not each.waits:
                with contextlib.suppress(OSError):
                    tcp_repair.end_repair(each.own, tcp_repair.REPAIR_OFF, each.reuse_address)
        self._let_go()
        if self._lock is not None:
            # For some milliseconds the kernel waits until nobody can be looking at the rules any more (RCU).
            self._lock.close()

    def give_up(self) -> None:
        """Leave nothing here; the tree has ended."""
        self._let_go()
        if self._locking is not None:
            self._locking.join()
        with self._root.entered():
            unix_names.clear_away(self._unix)
        if self._lock is not None:
            self._lock.close()

    def _let_go(self) -> None:
        for each in self._held:
            each.own.close()
        self._held.clear()


def reserve(count: int) -> None:
    """Make room for so many descriptors. Raises RestoreError."""
    highest = len(os.listdir("/proc/self/fd")) + count
    if raise_limit(os.getpid(), highest + 1) <= highest:
        raise RestoreError(
            f"restore needs {highest} descriptors to hold the connections of the program until they speak",
            "raise the limit for it: ulimit -Hn",
        )
    # The kernel makes the table as large as that, once and for all.
    with open(os.devnull) as nothing:
        os.close(fcntl.fcntl(nothing, fcntl.F_DUPFD_CLOEXEC, highest))


def _end(address: bytes) -> tuple[bytes, int]:
    return socket_address.unpack(address)
