"""Unix sockets: made, named (see `unix_names`), connected to each other, filled with what was queued in them."""

import contextlib
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from postcopy.errors import RestoreError
from postcopy.kernel.calls import call
from postcopy.kernel.prctl import PR_SET_SECUREBITS
from postcopy.kernel.sock_diag import DEAD
from postcopy.restore_side.own import own_credentials
from postcopy.restore_side.sockets import Workshop
from postcopy.restore_side.unix_names import has_path, root_of
from postcopy.socket_kinds import PeerCredentials, UnixMessage, UnixSocket

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

log = logging.getLogger("postcopy")

_AT_FDCWD = -100
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_KEEP = 0xFFFF_FFFF  # -1 for setresuid(2)
_PER_MESSAGE, _SPARE = 4096, 1 << 20  # bytes that a queued message, and all of them, take beside the content


def rebuild(plan: "Plan", sockets: Sequence[UnixSocket]) -> dict[int, int]:
    """Add the calls that make all of them; where each is parked, by its inode at the source."""
    if not sockets:
        return {}
    builder = Builder(plan, sockets)
    found = builder.run()
    if builder.kept:
        plan.shared.late[plan.pid] = builder
        plan.shared.kept.setdefault(plan.pid, []).extend(builder.kept)
    return found


class Builder:
    """Makes the sockets, and fills them: all at once, but for those in which descriptors are on their way. These are
    filled when the tables of all processes are there (`fill`); ``kept``: what stays open until then.
    """

    def __init__(self, plan: "Plan", sockets: Sequence[UnixSocket]) -> None:
        self._shop = Workshop(plan)
        self._plan = plan
        self._sockets = sockets
        self.kept: list[int] = []
        self._by_inode = {one.socket.inode: one for one in sockets}
        self._at: dict[int, int] = {}
        self._others: dict[int, int] = {}  # the far ends of connections whose peer has been closed
        self._listeners = {(one.socket.type, one.name): one for one in sockets if one.backlog >= 0}
        self._users = Counter((one.socket.type, one.name) for one in sockets if one.name)
        self._doors: dict[tuple[int, bytes], int] = {}  # temporary listeners, by type and abstract name
        self._top = -1

    def run(self) -> dict[int, int]:
        if any(has_path(one) for one in self._sockets):
            made = call("openat", _AT_FDCWD, self._shop.batch.text("/"), os.O_PATH | os.O_DIRECTORY)
            (self._top,) = self._shop.parked(made, "opening the root directory")
        # Listeners first: others come to be by connecting to them.
        for one in sorted(self._sockets, key=lambda one: one.backlog < 0):
            self._make(one)
        carrying = {one.socket.inode for one in self._sockets if any(message.rights for message in one.queue)}
        self._late = [one for one in self._sockets if {one.socket.inode, one.peer} & carrying]
        later = {one.socket.inode for one in self._late}
        self._complete([one for one in self._sockets if one.socket.inode not in later])
        for fd in (*self._doors.values(), self._top):
            if fd >= 0:
                self._shop.close(fd)
        self._late_far = [far for inode, far in self._others.items() if inode in later]
        self.kept = [*(self._at[inode] for inode in later), *self._late_far]
        return self._at

    def fill(self, plan: "Plan") -> list[int]:
        """Add the calls for those in which descriptors are on their way; what of ``kept`` these close."""
        self._plan, self._shop = plan, Workshop(plan)
        self._complete(self._late)
        return self._late_far

    def _complete(self, sockets: Sequence[UnixSocket]) -> None:
        for one in sockets:
            self._fill(one)
        for one in sockets:
            self._close_other(one)
        for one in sockets:
            self._connect_one_way(one)
        for one in sockets:
            at = self._at[one.socket.inode]
            if one.shutdown and one.peer != DEAD:
                self._shop.add(call("shutdown", at, one.shutdown - 1), "shutting a Unix socket down")
            self._shop.finish(at, one.socket)

    # -- making and connecting ----------------------------------------------------------------------------------------

    def _make(self, one: UnixSocket) -> None:
        inode = one.socket.inode
        if inode in self._at:
            return
        peer = self._by_inode.get(one.peer)
        if one.peer == DEAD or (peer is not None and self._is_mutual(one, peer)):
            self._connected(one, peer)
            return
        self._at[inode] = self._shop.socket(one.socket, "making a Unix socket")
        self._bind(one, self._at[inode])
        if one.backlog >= 0:
            with self._as(one.made_by):
                self._shop.add(call("listen", self._at[inode], one.backlog), f"listening at {_text(one.name)}")

    def _is_mutual(self, one: UnixSocket, peer: UnixSocket) -> bool:
        return peer.peer == one.socket.inode

    def _connected(self, one: UnixSocket, peer: UnixSocket | None) -> None:
        """Two sockets connected to each other; ``peer`` None: one that is closed in the end."""
        if peer is not None and self._is_accepted(peer):
            one, peer = peer, one
        accepted = self._is_accepted(one)
        with self._as(one.made_by or (peer.made_by if peer else None)):
            if accepted:
                here, there = self._accepted(one, peer)
            else:
                common = one.socket
                # Nobody reads where the numbers are written to: they are known.
                made = call("socketpair", common.family, common.type, common.protocol, self._shop.batch.room(8))
                here, there = self._shop.parked(made, "making a pair of Unix sockets", 2)
        self._at[one.socket.inode] = here
        self._shop.set_early(here, one.socket)
        if not accepted:
            self._bind(one, here)
        if peer is None:
            self._others[one.socket.inode] = there
            return
        self._at[peer.socket.inode] = there
        self._shop.set_early(there, peer.socket)
        if not accepted:
            self._bind(peer, there)

    def _is_accepted(self, one: UnixSocket) -> bool:
        """Whether it has the name of another socket: only accept(2) gives that."""
        key = one.socket.type, one.name
        if one.backlog >= 0 or not one.name or not one.peer:
            return False
        return key in self._listeners or (one.name.startswith(b"\0") and self._users[key] > 1)

    def _accepted(self, one: UnixSocket, peer: UnixSocket | None) -> tuple[int, int]:
        """Connect a new socket, with the name of ``peer``, to one that listens at that of ``one``, and accept it."""
        purpose = f"connecting to {_text(one.name)}"
        (there,) = self._shop.parked(call("socket", socket.AF_UNIX, one.socket.type, 0), purpose)
        listener = self._listeners.get((one.socket.type, one.name))
        door = self._at[listener.socket.inode] if listener else self._door(one)
        if peer is not None:
            self._bind(peer, there)
        with self._inside(listener) if listener else contextlib.nullcontext():
            self._shop.add(call("connect", there, *self._address(one.name)), purpose)
        (here,) = self._shop.parked(call("accept4", door, 0, 0, 0), purpose)
        return here, there

    def _door(self, one: UnixSocket) -> int:
        """A socket that listens at the abstract name of ``one`` for a while."""
        key = one.socket.type, one.name
        if key not in self._doors:
            purpose = f"listening at {_text(one.name)} for a while"
            (door,) = self._shop.parked(call("socket", socket.AF_UNIX, one.socket.type, 0), purpose)
            self._shop.add(call("bind", door, *self._address(one.name)), purpose)
            self._shop.add(call("listen", door, 1), purpose)
            self._doors[key] = door
        return self._doors[key]

    def _connect_one_way(self, one: UnixSocket) -> None:
        if one.outside:
            what = f"connecting to {_text(one.outside)}, outside of the tree, where somebody must listen"
            self._shop.add(call("connect", self._at[one.socket.inode], *self._address(one.outside)), what)
            return
        peer = self._by_inode.get(one.peer)
        if peer is None or self._is_mutual(one, peer):
            return
        with self._inside(peer):
            what = f"connecting to {_text(peer.name)}"
            self._shop.add(call("connect", self._at[one.socket.inode], *self._address(peer.name)), what)

    def _bind(self, one: UnixSocket, fd: int) -> None:
        if one.name:
            with self._inside(one):
                what = f"binding a Unix socket to {_text(one.name)}"
                self._shop.add(call("bind", fd, *self._address(one.name)), what)

    def _address(self, name: bytes) -> tuple[int, int]:
        address = struct.pack("=H", socket.AF_UNIX) + name
        return self._shop.place(address), len(address)

    @contextlib.contextmanager
    def _inside(self, one: UnixSocket) -> Iterator[None]:
        """The calls made meanwhile find the name of ``one`` in the root directory made for it."""
        if not has_path(one):
            yield
            return
        batch, what = self._shop.batch, "entering the directory made for a Unix socket"
        self._shop.add(call("chroot", batch.text(root_of(one))), what)
        self._shop.add(call("chdir", batch.text("/")), what)
        yield
        self._shop.add(call("fchdir", self._top), what)
        self._shop.add(call("chroot", batch.text(".")), what)

    @contextlib.contextmanager
    def _as(self, who: PeerCredentials | None) -> Iterator[None]:
        """The calls made meanwhile are made with the effective ids and the groups of ``who``: SO_PEERCRED."""
        own = own_credentials()
        uid, gid = own.uids[1], own.gids[1]
        if who is None or (who.uid, who.gid, who.groups) == (uid, gid, own.groups):
            yield
            return
        what = f"becoming user {who.uid} for a while"
        # With this bit the capabilities stay while the ids change.
        self._shop.add(call("prctl", PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP), what)
        self._set_groups(who.groups, what)
        self._shop.add(call("setresgid", _KEEP, who.gid, _KEEP), what)
        self._shop.add(call("setresuid", _KEEP, who.uid, _KEEP), what)
        yield
        self._shop.add(call("setresuid", _KEEP, uid, _KEEP), what)
        self._shop.add(call("setresgid", _KEEP, gid, _KEEP), what)
        self._set_groups(own.groups, what)
        self._shop.add(call("prctl", PR_SET_SECUREBITS, own.securebits), what)

    def _set_groups(self, groups: list[int], what: str) -> None:
        place = self._shop.batch.place(struct.pack(f"={len(groups)}I", *groups)) if groups else 0
        self._shop.add(call("setgroups", len(groups), place), what)

    # -- what is queued -----------------------------------------------------------------------------------------------

    def _fill(self, one: UnixSocket) -> None:
        if not one.queue:
            return
        size = sum(2 * len(message.content) + _PER_MESSAGE for message in one.queue) + _SPARE
        inode = one.socket.inode
        peer = self._by_inode.get(one.peer)
        mutual = peer if peer is not None and self._is_mutual(one, peer) else None
        far = self._others.get(inode, self._at[mutual.socket.inode] if mutual else -1)
        strangers: dict[bytes, int] = {}
        widened: set[int] = set()
        for message in one.queue:
            if one.socket.type != socket.SOCK_DGRAM or (
                far >= 0 and (mutual.name if mutual else b"") == message.sender
            ):
                sender, target = far, b""
            else:
                sender, target = self._sender(message.sender, strangers), one.name
            if sender < 0 or not (target or sender == far):
                raise RestoreError(f"a message queued in Unix socket {inode} comes from a socket that is not there")
            if sender not in widened:
                self._shop.widen(sender, size)
                widened.add(sender)
            with self._inside(one) if target else contextlib.nullcontext():
                self._send(sender, message, target)
        for fd in strangers.values():
            self._shop.close(fd)

    def _sender(self, name: bytes, strangers: dict[bytes, int]) -> int:
        """A datagram socket of that name: one of the program, or one that is made for this."""
        for each in self._sockets:
            if name and each.socket.type == socket.SOCK_DGRAM and each.name == name:
                return self._at[each.socket.inode]
        if name not in strangers:
            purpose = f"making the socket {_text(name)}, from which a message came"
            (strangers[name],) = self._shop.parked(call("socket", socket.AF_UNIX, socket.SOCK_DGRAM, 0), purpose)
            if name:
                self._shop.add(call("bind", strangers[name], *self._address(name)), purpose)
        return strangers[name]

    def _send(self, fd: int, message: UnixMessage, target: bytes) -> None:
        batch = self._shop.batch
        name, name_length = self._address(target) if target else (0, 0)
        vector = batch.place(struct.pack("=QQ", batch.place(message.content), len(message.content)))
        control = b""
        if message.credentials:
            control = struct.pack("=Qii", 28, socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            control += struct.pack("=iIIxxxx", *message.credentials)
        if message.rights:
            what = "sending a descriptor"
            rights = struct.pack(f"={len(message.rights)}i", *(self._plan.place(each, what) for each in message.rights))
            control += struct.pack("=Qii", 16 + len(rights), socket.SOL_SOCKET, socket.SCM_RIGHTS)
            control += rights.ljust((len(rights) + 7) & ~7, b"\0")
        header = struct.pack(
            "=QIxxxxQQQQixxxx", name, name_length, vector, 1, batch.place(control) if control else 0, len(control), 0
        )
        made = call("sendmsg", fd, batch.place(header), _MSG_DONTWAIT | _MSG_NOSIGNAL)
        self._shop.add(made, "filling a Unix socket")

    def _close_other(self, one: UnixSocket) -> None:
        """Close the far end of a connection whose peer has been closed."""
        far = self._others.get(one.socket.inode)
        if far is None:
            return
        if one.reset:
            # Closed with something unread in it, it resets the connection (net/unix/af_unix.c, unix_release_sock).
            self._send(self._at[one.socket.inode], UnixMessage(b"\0", b"", None), b"")
        self._shop.close(far)


def _text(name: bytes) -> str:
    return os.fsdecode(name.rstrip(b"\0").replace(b"\0", b"@")) or "a socket without a name"
