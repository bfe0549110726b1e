"""Unix sockets: made, named (see `unix_names`), connected to each other, filled with what was queued in them.

Each process makes those whose connections lie within it; what processes have with one another is `unix_meetings`.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from postcopy.kernel.sock_diag import DEAD
from postcopy.restore_side.unix_calls import UnixCalls
from postcopy.socket_kinds import UnixSocket, is_mutual

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan


def rebuild(plan: "Plan", sockets: Sequence[UnixSocket]) -> dict[int, int]:
    """Add the calls that make all of them; where each is parked, by its inode at the source."""
    return Builder(plan, sockets).run() if sockets else {}


class Builder:
    """Makes the sockets, and fills them, but for those that `unix_meetings` completes (`Shared.late_sockets`)."""

    def __init__(self, plan: "Plan", sockets: Sequence[UnixSocket]) -> None:
        self._calls = UnixCalls(plan)
        self._plan = plan
        self._sockets = sockets
        self._by_inode = {one.socket.inode: one for one in sockets}
        self._at: dict[int, int] = {}
        self._others: dict[int, int] = {}  # the far ends of connections whose peer has been closed
        self._listeners = {(one.socket.type, one.name): one for one in sockets if one.backlog >= 0}
        self._users = Counter((one.socket.type, one.name) for one in sockets if one.name)

    def run(self) -> dict[int, int]:
        # Listeners first: others come to be by connecting to them.
        for one in sorted(self._sockets, key=lambda one: one.backlog < 0):
            self._make(one)
        late = self._plan.shared.late_sockets
        own = [one for one in self._sockets if one.socket.inode not in late]
        for one in own:
            self._fill(one)
        for one in own:
            far = self._others.get(one.socket.inode)
            if far is not None:
                if one.reset:
                    self._calls.reset_due(self._at[one.socket.inode])
                self._calls.shop.close(far)
        for one in own:
            self._calls.finish(one, self._at[one.socket.inode])
        for inode, far in self._others.items():
            if inode in late:
                self._plan.shared.keep_far(self._plan.pid, inode, far)
        self._calls.end()
        return self._at

    def _make(self, one: UnixSocket) -> None:
        inode = one.socket.inode
        if inode in self._at:
            return
        peer = self._by_inode.get(one.peer)
        if one.peer == DEAD or is_mutual(one, peer):
            self._connected(one, peer)
        elif one.backlog >= 0:
            self._at[inode] = self._calls.listener(one)
        else:
            self._at[inode] = self._calls.shop.socket(one.socket, "making a Unix socket")
            self._calls.bind(one, self._at[inode])

    def _connected(self, one: UnixSocket, peer: UnixSocket | None) -> None:
        """Two sockets connected to each other; ``peer`` None: one that is closed in the end."""
        if peer is not None and peer.accepted:
            one, peer = peer, one
        here, there = self._accepted(one, peer) if one.accepted else self._calls.pair(one, peer)
        self._at[one.socket.inode] = here
        if peer is not None:
            self._at[peer.socket.inode] = there
        else:
            self._others[one.socket.inode] = there

    def _accepted(self, one: UnixSocket, peer: UnixSocket | None) -> tuple[int, int]:
        """Connect a new socket, with the name of ``peer``, to one that listens at that of ``one``, and accept it."""
        listener = self._listeners.get((one.socket.type, one.name))
        door = self._at[listener.socket.inode] if listener else self._calls.door(one, peer.made_by if peer else None)
        there = self._calls.connecting(one, peer, listener or one)
        return self._calls.accepted(one, door), there

    def _fill(self, one: UnixSocket) -> None:
        if not one.queue:
            return
        peer = self._by_inode.get(one.peer)
        mutual = peer if is_mutual(one, peer) else None
        far = self._others.get(one.socket.inode, self._at[mutual.socket.inode] if mutual else -1)
        number = lambda pid: self._plan.shared.nesting.seen(pid, self._plan.pid)  # noqa: E731
        self._calls.fill(one, far, mutual.name if mutual else b"", self._sender, number)

    def _sender(self, name: bytes) -> int:
        for each in self._sockets:
            if each.socket.type == socket.SOCK_DGRAM and each.name == name:
                return self._at[each.socket.inode]
        return -1
