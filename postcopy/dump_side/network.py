"""The TCP sockets of a frozen process: locking the network for them, and letting go of them without a packet."""

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from postcopy import roles
from postcopy.dump_side.choices import MOVED, Choices
from postcopy.errors import PostcopyError
from postcopy.kernel import pidfd, procfs, socket_address, tcp_repair
from postcopy.kernel.addresses import Departures, is_here
from postcopy.kernel.nftables import Address
from postcopy.kernel.socket_options import SOL_TCP
from postcopy.network_lock import NetworkLock, Traffic

log = logging.getLogger("postcopy")

_LOOK_AGAIN, _LOOK_AGAIN_AT_ONCE = 0.1, 0.001  # seconds
_ACCEPT_SECONDS = 0.2
_OUTLAST_SECONDS = 60


class Silence:
    """The lock over the TCP sockets of a tree: no new connections just before the freeze, no packets of those that are
    there right after it. Looking for them takes time where there are many; what the program makes in between is added
    when it is found.
    """

    def __init__(self, network_lock: NetworkLock, choices: Choices, locking: Callable[[Sequence[int]], None]) -> None:
        """``locking`` is told of the processes before anything of theirs is locked."""
        self._lock = network_lock
        self._moved = choices.connections == MOVED
        self._locking = locking
        self._told: set[int] = set()
        self._seen: set[tuple[bytes, bytes]] = set()
        self._foreseen: list[tuple[Address, Address]] = []
        self._connections: dict[tuple[bytes, bytes], tuple[Address, Address]] = {}
        self._listeners: dict[bytes, Address] = {}

    @property
    def traffic(self) -> Traffic:
        """What is locked."""
        return Traffic(list(self._connections.values()), list(self._listeners.values()))

    @property
    def locked(self) -> Collection[tuple[bytes, bytes]]:
        """The connections that are locked by `begin`, by their ends."""
        return self._seen

    def prepare(self, pids: Sequence[int]) -> None:
        """Let no new connections come to these processes, which are running, and let them accept what waits for that.

        Raises PostcopyError.
        """
        if self._look(pids):
            self._look(pids)
        self._foreseen = [(socket_address.unpack(one), socket_address.unpack(other)) for one, other in self._seen]
        self._lock.foresee(self._foreseen)

    def _look(self, pids: Sequence[int]) -> bool:
        """Look for all TCP sockets. Whether something has waited to be accepted, and so was not seen yet."""
        self._seen.clear()
        listeners = set()
        with contextlib.ExitStack() as stack:
            accepting: list[socket.socket] = []
            for own in _tcp_sockets(pids):
                # A running process may have closed it, and who has been reset has no peer any more.
                with contextlib.suppress(OSError):
                    state = tcp_repair.info(own).state
                    local = socket_address.pack(own.family, own.getsockname())
                    if state == tcp_repair.LISTEN:
                        listeners.add(local)
                        accepting.append(stack.enter_context(own.dup()))
                    elif state in tcp_repair.SYNCHRONIZED and self._moved:
                        self._seen.add((local, socket_address.pack(own.family, own.getpeername())))
            self._add(pids, set(), listeners - self._listeners.keys())
            return _await_empty(accepting)

    def begin(self, pids: Sequence[int]) -> None:
        """Lock the connections that have been seen, now that the processes are frozen. Raises PostcopyError.

        Not before: what a program writes as its last word before it closes a connection must get through.
        """
        self._add(pids, self._seen, set(), self._foreseen)

    def cover(self, pid: int, local: bytes, remote: bytes) -> bool:
        """Lock a socket of a frozen process, unless it is locked; ``remote`` is empty where it listens. Whether it was
        not. Raises PostcopyError.
        """
        if remote and self._moved and (local, remote) not in self._connections:
            self._add([pid], {(local, remote)}, set())
        elif not remote and local not in self._listeners:
            self._add([pid], set(), {local})
        else:
            return False
        return True

    def _add(
        self,
        pids: Sequence[int],
        connections: Collection[tuple[bytes, bytes]],
        listeners: Collection[bytes],
        ends: Sequence[tuple[Address, Address]] = (),
    ) -> None:
        """``ends``: what the connections are, where that is at hand."""
        if not (connections or listeners):
            return
        if new := [pid for pid in pids if pid not in self._told]:
            self._locking(new)
            self._told.update(new)
        unpack = socket_address.unpack
        found = Traffic(
            ends or [(unpack(local), unpack(remote)) for local, remote in connections],
            [(host if any(host) else b"", port) for host, port in map(unpack, listeners)],
        )
        try:
            self._lock.lock(found)
        except PostcopyError as error:
            if connections or self._connections:
                raise
            log.warning("new connections may be made in vain while the process stands still: %s", error.message)
        self._connections.update(zip(connections, found.connections, strict=True))
        self._listeners.update(zip(listeners, found.listeners, strict=True))


def _await_empty(accepting: Sequence[socket.socket]) -> bool:
    """Wait a moment until nothing waits to be accepted: while it does, it belongs to no descriptor. Whether it did.

    What has waited all that time waits for longer: the program does not accept.
    """
    deadline = time.monotonic() + _ACCEPT_SECONDS
    waited = False
    while any(tcp_repair.info(own).waiting for own in accepting) and time.monotonic() < deadline:
        waited = True
        time.sleep(_LOOK_AGAIN_AT_ONCE)
    return waited


def outlast(network_lock: NetworkLock, found: Traffic) -> None:
    """Once the process has ended: keep its connections locked until their addresses have left this host, too.

    What their peers send would else be answered with a reset. A process of its own waits for that, some time long.
    """
    # What stays within a host has no address to take along.
    leaving = {local[0] for local, remote in found.connections if not is_here(remote[0])}
    # Before they are looked for: what comes back at once has left all the same, and its connections came back with it.
    with Departures() as departures:
        staying = set(filter(is_here, leaving))
        if not network_lock.is_locked or not staying:
            network_lock.close()
            return

        def body() -> None:
            _let_go_of_output()
            deadline, left = time.monotonic() + _OUTLAST_SECONDS, staying
            while left and time.monotonic() < deadline:
                left = set(filter(is_here, left - departures.wait(_LOOK_AGAIN)))
            network_lock.close()

        keep = [*network_lock.descriptors, departures.fileno()]
        roles.start("postcopy-lock", body, dies_with_parent=False, keep=keep)
    network_lock.leave()


def _let_go_of_output() -> None:
    """Whoever reads what our side prints is to see its end, though a process stays behind."""
    with open(os.devnull, "r+b", buffering=0) as nowhere:
        for stream in range(3):
            os.dup2(nowhere.fileno(), stream)


def heal(pids: Iterable[int]) -> None:
    """Give back, as they were, connections that somebody died over while taking them apart."""
    for own in _tcp_sockets(pids):
        with contextlib.suppress(OSError):
            if tcp_repair.info(own).state != tcp_repair.LISTEN and tcp_repair.is_repairing(own):
                own.setsockopt(SOL_TCP, tcp_repair.TCP_REPAIR_QUEUE, tcp_repair.NO_QUEUE)
                own.setsockopt(SOL_TCP, tcp_repair.TCP_REPAIR, tcp_repair.REPAIR_OFF_WITHOUT_PROBE)


def silence(pids: Iterable[int]) -> None:
    """Let connections end without a word to their peers when their processes are killed: others go on with them."""
    for own in _tcp_sockets(pids):
        _silence(own)


def keep_watch(network_lock: NetworkLock, pids: Sequence[int]) -> None:
    """Hold the lock over processes that stay stopped until they end, or are made to go on."""
    if not network_lock.is_locked:
        return
    _let_go_of_output()
    held = list(_tcp_sockets(pids, keep=True))
    while states := list(_states(pids)):
        if any(state not in "Tt" for state in states):
            break
        time.sleep(_LOOK_AGAIN)
    else:
        # They have ended; their connections have not, as long as we hold them, and now end without a word.
        for own in held:
            _silence(own)
    for own in held:
        own.close()


def _states(pids: Iterable[int]) -> Iterator[str]:
    """What those that have not ended are doing (proc(5))."""
    for pid in pids:
        with contextlib.suppress(OSError):
            if (state := procfs.stat(pid)[3]) not in "ZX":
                yield state


def _silence(own: socket.socket) -> None:
    with contextlib.suppress(OSError):
        if tcp_repair.info(own).state not in (tcp_repair.LISTEN, tcp_repair.CLOSE):
            own.setsockopt(SOL_TCP, tcp_repair.TCP_REPAIR, tcp_repair.REPAIR_ON)


def _tcp_sockets(pids: Iterable[int], keep: bool = False) -> Iterator[socket.socket]:
    """A duplicate of each TCP socket of the processes, closed when the next is asked for unless it is to be kept."""
    seen: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            process = pidfd.of_task(pid)
            try:
                yield from _of_process(process, pid, seen, keep)
            finally:
                os.close(process)


def _of_process(process: int, pid: int, seen: set[str], keep: bool) -> Iterator[socket.socket]:
    for fd in procfs.descriptors(pid):
        own = None
        with contextlib.suppress(OSError):
            link = procfs.link(pid, f"fd/{fd}")
            if link.startswith("socket:[") and link not in seen:
                own = socket.socket(fileno=pidfd.getfd(process, fd))
                seen.add(link)
        if own is None:
            continue
        is_tcp = own.family in (socket.AF_INET, socket.AF_INET6) and own.proto == socket.IPPROTO_TCP
        if is_tcp:
            yield own
        if not (is_tcp and keep):
            own.close()
