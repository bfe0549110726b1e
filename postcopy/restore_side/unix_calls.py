"""The calls by which Unix sockets are named, connected and filled, whoever makes them."""

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Iterator
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

_AT_FDCWD = -100
_MSG_DONTWAIT, _MSG_NOSIGNAL = 0x40, 0x4000
_SECBIT_NO_SETUID_FIXUP = 1 << 2
_KEEP = 0xFFFF_FFFF  # -1 for setresuid(2)
_PER_MESSAGE, _SPARE = 4096, 1 << 20  # bytes that a queued message, and all of them, take beside the content


class UnixCalls:
    """Adds calls to the batch of a plan; ``shop`` makes the sockets."""

    def __init__(self, plan: "Plan") -> None:
        self.shop = Workshop(plan)
        self._plan = plan
        self._top = -1
        self._doors: dict[tuple[int, bytes, int], int] = {}  # temporary listeners

    def end(self) -> None:
        """Close what was needed in between."""
        for fd in (*self._doors.values(), self._top):
            if fd >= 0:
                self.shop.close(fd)
        self._doors, self._top = {}, -1

    def leave_doors(self) -> None:
        """What listens for a while goes on to."""
        self._doors = {}

    # -- names --------------------------------------------------------------------------------------------------------

    def bind(self, one: UnixSocket, fd: int) -> None:
        """Give a socket its own name, if it has one."""
        if one.name:
            with self.inside(one):
                what = f"binding a Unix socket to {text(one.name)}"
                self.shop.add(call("bind", fd, *self.address(one.name)), what)

    def address(self, name: bytes) -> tuple[int, int]:
        """Where an address lies, and its length."""
        address = struct.pack("=H", socket.AF_UNIX) + name
        return self.shop.place(address), len(address)

    @contextlib.contextmanager
    def inside(self, one: UnixSocket) -> Iterator[None]:
        """The calls made meanwhile find the name of ``one`` in the root directory made for it."""
        if not has_path(one):
            yield
            return
        batch, what = self.shop.batch, "entering the directory made for a Unix socket"
        if self._top < 0:
            made = call("openat", _AT_FDCWD, batch.text("/"), os.O_PATH | os.O_DIRECTORY)
            (self._top,) = self.shop.parked(made, "opening the root directory")
        self.shop.add(call("chroot", batch.text(root_of(one))), what)
        self.shop.add(call("chdir", batch.text("/")), what)
        yield
        self.shop.add(call("fchdir", self._top), what)
        self.shop.add(call("chroot", batch.text(".")), what)

    # -- who is told to have made it ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def by(self, who: PeerCredentials | None) -> Iterator[None]:
        """The calls made meanwhile are made with the effective ids and the groups of ``who``: SO_PEERCRED."""
        own = own_credentials()
        uid, gid = own.uids[1], own.gids[1]
        if who is None or (who.uid, who.gid, who.groups) == (uid, gid, own.groups):
            yield
            return
        what = f"becoming user {who.uid} for a while"
        # With this bit the capabilities stay while the ids change.
        self.shop.add(call("prctl", PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP), what)
        self._set_groups(who.groups, what)
        self.shop.add(call("setresgid", _KEEP, who.gid, _KEEP), what)
        self.shop.add(call("setresuid", _KEEP, who.uid, _KEEP), what)
        yield
        self.shop.add(call("setresuid", _KEEP, uid, _KEEP), what)
        self.shop.add(call("setresgid", _KEEP, gid, _KEEP), what)
        self._set_groups(own.groups, what)
        self.shop.add(call("prctl", PR_SET_SECUREBITS, own.securebits), what)

    def _set_groups(self, groups: list[int], what: str) -> None:
        place = self.shop.batch.place(struct.pack(f"={len(groups)}I", *groups)) if groups else 0
        self.shop.add(call("setgroups", len(groups), place), what)

    # -- making and connecting ----------------------------------------------------------------------------------------

    def pair(self, one: UnixSocket, peer: UnixSocket | None) -> tuple[int, int]:
        """socketpair(2); ``peer`` None: that is closed in the end."""
        with self.by(one.made_by or (peer.made_by if peer else None)):
            common = one.socket
            # Nobody reads where the numbers are written to: they are known.
            made = call("socketpair", common.family, common.type, common.protocol, self.shop.batch.room(8))
            here, there = self.shop.parked(made, "making a pair of Unix sockets", 2)
        for fd, each in ((here, one), (there, peer)):
            if each is not None:
                self.shop.set_early(fd, each.socket)
                self.bind(each, fd)
        return here, there

    def listener(self, one: UnixSocket) -> int:
        """A socket of its own that listens."""
        fd = self.shop.socket(one.socket, "making a Unix socket")
        self.bind(one, fd)
        with self.by(one.made_by):
            self.shop.add(call("listen", fd, one.backlog), f"listening at {text(one.name)}")
        return fd

    def door(self, one: UnixSocket, told: PeerCredentials | None = None) -> int:
        """A socket that listens at the name of ``one`` for a while; ``told``: who is to have listened there."""
        # A path lies in the directory made for that one socket.
        key = one.socket.type, one.name, one.socket.inode if has_path(one) else 0
        if key not in self._doors:
            purpose = f"listening at {text(one.name)} for a while"
            (door,) = self.shop.parked(call("socket", socket.AF_UNIX, one.socket.type, 0), purpose)
            self.bind(one, door)
            with self.by(told):
                self.shop.add(call("listen", door, 1), purpose)
            self._doors[key] = door
        return self._doors[key]

    def connecting(self, one: UnixSocket, peer: UnixSocket | None, at: UnixSocket) -> int:
        """A new socket, which is to be ``peer``, connected to the one that listens at the name of ``one``, which lies
        in the root directory of ``at``."""
        purpose = f"connecting to {text(one.name)}"
        (there,) = self.shop.parked(call("socket", socket.AF_UNIX, one.socket.type, 0), purpose)
        if peer is not None:
            self.shop.set_early(there, peer.socket)
            self.bind(peer, there)
        with self.by(one.made_by), self.inside(at):
            self.shop.add(call("connect", there, *self.address(one.name)), purpose)
        return there

    def accepted(self, one: UnixSocket, door: int) -> int:
        """What has connected to ``door`` last, which is to be ``one``."""
        (here,) = self.shop.parked(call("accept4", door, 0, 0, 0), f"accepting a connection to {text(one.name)}")
        self.shop.set_early(here, one.socket)
        return here

    def connect(self, fd: int, peer: UnixSocket) -> None:
        """Connect a socket to the name of another of the tree."""
        with self.inside(peer):
            self.shop.add(call("connect", fd, *self.address(peer.name)), f"connecting to {text(peer.name)}")

    def connect_outside(self, fd: int, name: bytes) -> None:
        """Connect a datagram socket to a name that is not the tree's."""
        what = f"connecting to {text(name)}, outside of the tree, where somebody must listen"
        self.shop.add(call("connect", fd, *self.address(name)), what)

    def finish(self, one: UnixSocket, fd: int) -> None:
        """What comes last, when all that is queued is there."""
        if one.shutdown and one.peer != DEAD:
            self.shop.add(call("shutdown", fd, one.shutdown - 1), "shutting a Unix socket down")
        self.shop.finish(fd, one.socket)

    # -- what is queued -----------------------------------------------------------------------------------------------

    def fill(
        self,
        one: UnixSocket,
        far: int,
        far_name: bytes,
        sender_at: Callable[[bytes], int],
        number: Callable[[int], int],
    ) -> list[int]:
        """Send to ``one`` what is queued in it. ``far``: the other end of its connection, with its name, -1 if there is
        none; ``sender_at``: where the socket of a name is, -1 if it is gone; ``number``: what we call a process.

        The senders, whose buffers have been made larger.
        """
        size = sum(2 * len(message.content) + _PER_MESSAGE for message in one.queue) + _SPARE
        strangers: dict[bytes, int] = {}
        widened: list[int] = []
        for message in one.queue:
            if one.socket.type != socket.SOCK_DGRAM or (far >= 0 and far_name == message.sender):
                sender, target = far, b""
            else:
                sender, target = self._sender(message.sender, sender_at, strangers), one.name
            if sender < 0 or not (target or sender == far):
                inode = one.socket.inode
                raise RestoreError(f"a message queued in Unix socket {inode} comes from a socket that is not there")
            if sender not in widened:
                self.shop.widen(sender, size)
                widened.append(sender)
            with self.inside(one) if target else contextlib.nullcontext():
                self._send(sender, message, target, number)
        for fd in strangers.values():
            self.shop.close(fd)
        return [fd for fd in widened if fd not in strangers.values()]

    def _sender(self, name: bytes, sender_at: Callable[[bytes], int], strangers: dict[bytes, int]) -> int:
        """A datagram socket of that name: one of the program, or one that is made for this."""
        found = sender_at(name) if name else -1
        if found >= 0:
            return found
        if name not in strangers:
            purpose = f"making the socket {text(name)}, from which a message came"
            (strangers[name],) = self.shop.parked(call("socket", socket.AF_UNIX, socket.SOCK_DGRAM, 0), purpose)
            if name:
                self.shop.add(call("bind", strangers[name], *self.address(name)), purpose)
        return strangers[name]

    def _send(self, fd: int, message: UnixMessage, target: bytes, number: Callable[[int], int]) -> None:
        batch = self.shop.batch
        name, name_length = self.address(target) if target else (0, 0)
        vector = batch.place(struct.pack("=QQ", batch.place(message.content), len(message.content)))
        control = b""
        if message.credentials:
            pid, uid, gid = message.credentials
            control = struct.pack("=Qii", 28, socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            control += struct.pack("=iIIxxxx", number(pid), uid, gid)
        if message.rights:
            what = "sending a descriptor"
            rights = struct.pack(f"={len(message.rights)}i", *(self._plan.place(each, what) for each in message.rights))
            control += struct.pack("=Qii", 16 + len(rights), socket.SOL_SOCKET, socket.SCM_RIGHTS)
            control += rights.ljust((len(rights) + 7) & ~7, b"\0")
        header = struct.pack(
            "=QIxxxxQQQQixxxx", name, name_length, vector, 1, batch.place(control) if control else 0, len(control), 0
        )
        made = call("sendmsg", fd, batch.place(header), _MSG_DONTWAIT | _MSG_NOSIGNAL)
        self.shop.add(made, "filling a Unix socket")

    def reset_due(self, fd: int) -> None:
        """Leave something unread at the far end of a socket: closed with that, it resets the connection
        (net/unix/af_unix.c, unix_release_sock)."""
        self._send(fd, UnixMessage(b"\0", b"", None), b"", int)


def text(name: bytes) -> str:
    """A name as messages show it."""
    return os.fsdecode(name.rstrip(b"\0").replace(b"\0", b"@")) or "a socket without a name"
