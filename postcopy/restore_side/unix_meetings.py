"""What Unix sockets of a tree have to do with more than one process, or with what must be there before.

Before any process has its files, those that were made by another process than the one that makes the rest of its table
are made by just that (SO_PEERCRED): no name is taken yet, so any socket can listen at any for a while. When all tables
are there, the root sends what other processes have sent, or what brings descriptors; then sockets that are connected
one way are connected, and last those connections are made that nobody has accepted yet.
"""

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from postcopy.kernel.calls import call
from postcopy.restore_side import sockets
from postcopy.restore_side.unix_calls import UnixCalls
from postcopy.socket_kinds import PeerCredentials, UnixSocket, is_mutual
from postcopy.state import Description, Tree

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan
    from postcopy.restore_side.shared_descriptors import Shared

#: Makes the calls that a function adds to a plan of a process, which has its table already or not.
Act = Callable[[Callable[["Plan"], None], bool], None]

_F_SETFL = 4
_SPARE = 16


def late_sockets(tree: Tree) -> frozenset[int]:
    """The sockets, by inode, that must wait until all tables are there."""
    every = {one.unix.socket.inode: one.unix for one in tree.descriptors.descriptions if one.unix is not None}
    hosts = _hosts(tree)
    datagrams = {one.name: inode for inode, one in every.items() if one.name and one.socket.type == socket.SOCK_DGRAM}
    late: set[int] = set()
    for inode, one in every.items():
        late.update(one.pending)
        senders = {hosts.get(datagrams.get(message.sender, inode)) for message in one.queue}
        speakers = {message.credentials[0] for message in one.queue if message.credentials}
        waits = one.maker or one.outside or any(message.rights for message in one.queue)
        if waits or {*senders, *speakers} - {hosts.get(inode)}:
            late.add(inode)
            if is_mutual(one, every.get(one.peer)):
                late.add(one.peer)
        elif one.peer in every and not is_mutual(one, every[one.peer]):
            late.add(inode)
    return frozenset(late)


def _hosts(tree: Tree) -> dict[int, int]:
    """Which process makes each socket."""
    found: dict[int, int] = {}
    for process in tree.processes:
        for slot in process.slots:
            if slot.description < len(tree.descriptors.descriptions):
                one = tree.descriptors.descriptions[slot.description].unix
                if one is not None:
                    found.setdefault(one.socket.inode, one.maker or process.pid)
    return found


def needed(late: Iterable[Description]) -> tuple[int, int]:
    """How many descriptors, and how many bytes for calls, completing each of them by itself may take at most."""
    found = [(_numbers(one), sockets.room([one])) for one in late]
    return max((fds for fds, _ in found), default=0), max((size for _, size in found), default=0)


def _numbers(one: Description) -> int:
    queue = one.unix.queue if one.unix is not None else []
    return 2 * sockets.rights([one]) + 2 * len({message.sender for message in queue}) + _SPARE


class Meetings:
    """``acts``: of each process of the tree, which is stopped."""

    def __init__(self, tree: Tree, shared: "Shared", acts: Mapping[int, Act]) -> None:
        self._shared = shared
        self._acts = acts
        self._root = tree.processes[0].pid
        self._credentials = {process.pid: process.threads[0].credentials for process in tree.processes}
        found = enumerate(tree.descriptors.descriptions)
        self._numbers = {one.unix.socket.inode: number for number, one in found if one.unix is not None}
        self._every = {
            inode: unix
            for inode, number in self._numbers.items()
            if (unix := tree.descriptors.descriptions[number].unix)
        }
        self._late = [one for inode, one in self._every.items() if inode in shared.late_sockets]
        self._datagrams = {one.name: one for one in self._every.values() if one.socket.type == socket.SOCK_DGRAM}
        self._widened: set[int] = set()

    def _act(self, pid: int, do: Callable[[UnixCalls, "Plan"], None], has_table: bool) -> None:
        def within(plan: "Plan") -> None:
            calls = UnixCalls(plan)
            do(calls, plan)
            calls.end()

        self._acts[pid](within, has_table)

    # -- before any table ---------------------------------------------------------------------------------------------

    def meet(self) -> None:
        """Make those that have a maker. Raises RestoreError."""
        made: set[int] = set()
        for inode, one in self._every.items():
            if not one.maker or one.backlog >= 0 or inode in made:
                continue
            peer = self._every.get(one.peer)
            mate = peer if is_mutual(one, peer) else None
            if mate is not None and mate.accepted:
                one, mate = mate, one
            made.update(each.socket.inode for each in (one, mate) if each is not None)
            if one.accepted:
                self._connect(one, mate)
            else:
                self._pair(one, mate)
        # Only now: while a socket has a name, nobody else can listen there.
        for one in self._every.values():
            if one.maker and one.backlog >= 0:
                self._listen(one)

    def _keep(self, one: UnixSocket, pid: int, at: int) -> None:
        self._shared.keep(pid, self._numbers[one.socket.inode], at)

    def _listen(self, one: UnixSocket) -> None:
        self._act(one.maker, lambda calls, _: self._keep(one, one.maker, calls.listener(one)), False)

    def _pair(self, one: UnixSocket, mate: UnixSocket | None) -> None:
        def do(calls: UnixCalls, _: "Plan") -> None:
            here, there = calls.pair(one, mate)
            self._keep(one, one.maker, here)
            self._keep_other(one, mate, one.maker, there)

        self._act(one.maker, do, False)

    def _connect(self, one: UnixSocket, mate: UnixSocket | None) -> None:
        """``one`` is accepted by its maker, to which that of ``mate`` connects."""
        doors: list[int] = []
        connector = mate.maker if mate is not None else one.maker
        purpose = "connecting two processes"

        def listen(calls: UnixCalls, _: "Plan") -> None:
            doors.append(calls.door(one, mate.made_by if mate is not None else None))
            calls.leave_doors()
            self._shared.kept.setdefault(one.maker, []).extend(doors)

        def connect(calls: UnixCalls, _: "Plan") -> None:
            self._keep_other(one, mate, connector, calls.connecting(one, mate, one))

        def accept(calls: UnixCalls, plan: "Plan") -> None:
            self._keep(one, one.maker, calls.accepted(one, doors[0]))
            self._shared.kept[one.maker].remove(doors[0])
            plan.batch.add(call("close", doors[0]), purpose)
            plan.release(doors[0])

        self._act(one.maker, listen, False)
        self._act(connector, connect, False)
        self._act(one.maker, accept, False)

    def _keep_other(self, one: UnixSocket, mate: UnixSocket | None, pid: int, at: int) -> None:
        if mate is not None:
            self._keep(mate, pid, at)
        else:
            self._shared.keep_far(pid, one.socket.inode, at)

    # -- when all tables are there ------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Fill those that had to wait, and connect what is connected by name. Raises RestoreError."""
        for one in self._late:
            if one.queue:
                self._act(self._root, lambda calls, plan, one=one: self._fill(calls, plan, one), True)  # type: ignore[misc]
        for one in self._late:
            if one.socket.inode in self._shared.far:
                self._lose(one)
        for one in _in_order(self._late, self._every):
            self._connect_one_way(one)
        pending = {inode for one in self._every.values() for inode in one.pending}
        for inode, one in self._every.items():
            if inode not in pending and (inode in self._shared.late_sockets or inode in self._widened):
                self._finish(one)
        for one in self._every.values():
            for inode in one.pending:
                self._connect_pending(self._every[inode], one)
                self._finish(self._every[inode])

    def _place(self, plan: "Plan", one: UnixSocket) -> int:
        return plan.place(self._numbers[one.socket.inode], "taking a Unix socket")

    def _fill(self, calls: UnixCalls, plan: "Plan", one: UnixSocket) -> None:
        peer = self._every.get(one.peer)
        mutual = peer if is_mutual(one, peer) else None
        far, far_name = -1, b""
        if mutual is not None:
            far, far_name = self._place(plan, mutual), mutual.name
        elif one.socket.inode in self._shared.far:
            purpose = "taking the far end of a connection"
            far = plan.park(plan.borrow(*self._shared.far[one.socket.inode], purpose), purpose)
        senders = {far: one.peer} if mutual is not None else {}

        def sender_at(name: bytes) -> int:
            each = self._datagrams.get(name)
            if each is None:
                return -1
            at = self._place(plan, each)
            senders[at] = each.socket.inode
            return at

        seen = lambda pid: self._shared.nesting.seen(pid, self._root)  # noqa: E731
        for fd in calls.fill(one, far, far_name, sender_at, seen):
            if fd in senders:
                self._widened.add(senders[fd])

    def _lose(self, one: UnixSocket) -> None:
        """Close the far end of a connection that is to have lost it."""
        pid = self._shared.far[one.socket.inode][0]

        def do(calls: UnixCalls, plan: "Plan") -> None:
            if one.reset:
                calls.reset_due(self._place(plan, one))
            at = self._shared.close_far(one.socket.inode)
            plan.batch.add(call("close", at), "closing the far end of a connection")
            plan.release(at)

        self._act(pid, do, True)

    def _connect_one_way(self, one: UnixSocket) -> None:
        peer = self._every.get(one.peer)

        def do(calls: UnixCalls, plan: "Plan") -> None:
            at = self._place(plan, one)
            if one.outside:
                calls.connect_outside(at, one.outside)
            elif peer is not None:
                calls.connect(at, peer)

        self._act(self._root, do, True)

    def _connect_pending(self, one: UnixSocket, listener: UnixSocket) -> None:
        """By the process that has it, and as the user that this will be."""
        pid = self._shared.descriptions[self._numbers[one.socket.inode]][0]
        own = self._credentials[pid]
        who = PeerCredentials(pid, own.uids[1], own.gids[1], own.groups)

        def do(calls: UnixCalls, plan: "Plan") -> None:
            at = self._place(plan, one)
            # Not waiting for a backlog that is smaller here (net.core.somaxconn).
            plan.set_flags(at, os.O_RDWR | os.O_NONBLOCK, "connecting")
            with calls.by(who):
                calls.connect(at, listener)
            plan.set_flags(at, os.O_RDWR, "connecting")

        self._act(pid, do, True)

    def _finish(self, one: UnixSocket) -> None:
        def do(calls: UnixCalls, plan: "Plan") -> None:
            at = self._place(plan, one)
            if one.socket.inode in self._widened:
                calls.shop.resized(at)
            if one.socket.inode in self._shared.late_sockets:
                calls.finish(one, at)
            else:
                calls.shop.finish(at, one.socket)

        self._act(self._root, do, True)


def _in_order(late: Iterable[UnixSocket], every: Mapping[int, UnixSocket]) -> list[UnixSocket]:
    """Those that are connected one way, each before the one it is connected to: once connected itself, a datagram
    socket is one that nobody else can connect to."""
    waiting = {
        one.socket.inode: one
        for one in late
        if one.outside or (one.peer in every and not is_mutual(one, every[one.peer]))
    }
    coming = dict.fromkeys(waiting, 0)
    for one in waiting.values():
        if one.peer in coming:
            coming[one.peer] += 1
    free = [one for inode, one in waiting.items() if not coming[inode]]
    for one in free:
        if one.peer in coming:
            coming[one.peer] -= 1
            if not coming[one.peer]:
                free.append(waiting[one.peer])
    # What is left are sockets that are connected to each other.
    done = {one.socket.inode for one in free}
    return [*free, *(one for inode, one in waiting.items() if inode not in done)]
