"""Which Unix sockets of a tree are connected to each other, and which process must make each of them again.

SO_PEERCRED tells one end who made the other: who called socketpair(2), connect(2) or listen(2). So it is these who must
make them, whoever has them now; where that is not the process that has both ends, before any process has its files.
"""

import contextlib
import os
import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

from msgspec import structs

from postcopy.dump_side import pipes
from postcopy.dump_side.opened import Table, common
from postcopy.dump_side.unix_sockets import KINDS, title
from postcopy.kernel.sock_diag import DEAD, UnixDiag
from postcopy.socket_kinds import UnixSocket, is_mutual
from postcopy.state import FileIdentity


def check(table: Table, problems: list[str]) -> None:
    """Once all tables have been collected: every connection must lead to a socket of the tree, and who made it must
    still be there."""
    _Peers(table).check(problems)


def numbers(table: Table) -> dict[int, int]:
    """The descriptions of Unix sockets by inode."""
    descriptions = enumerate(table.descriptors.descriptions)
    return {one.unix.socket.inode: number for number, one in descriptions if one.unix is not None}


def change(table: Table, number: int, **changes: Any) -> None:
    """Change what is known of a socket of the tree."""
    description = table.descriptors.descriptions[number]
    assert description.unix is not None
    changed = structs.replace(description.unix, **changes)
    table.descriptors.descriptions[number] = structs.replace(description, unix=changed)


class _Peers:
    def __init__(self, table: Table) -> None:
        self._table = table
        self._numbers = numbers(table)
        found = (one.unix for one in table.descriptors.descriptions)
        self._found = {one.socket.inode: one for one in found if one is not None}
        self._listeners = {(one.socket.type, one.name): one for one in self._found.values() if one.backlog >= 0}
        self._datagrams = {one.name: one for one in self._found.values() if one.socket.type == socket.SOCK_DGRAM}
        self._users_of_names = Counter((one.socket.type, one.name) for one in self._found.values())
        self._makers: dict[int, int] = {}
        self._accepted: set[int] = set()

    def check(self, problems: list[str]) -> None:
        for one in self._found.values():
            problems += self._of_listener(one)
        for one in self._found.values():
            peer = self._found.get(one.peer)
            if peer is not None and one.socket.inode < peer.socket.inode and is_mutual(one, peer):
                problems += self._of_pair(one, peer)
            elif one.peer == DEAD:
                self._of_left(one)
        for inode, number in self._numbers.items():
            maker = self._makers.get(inode)
            changes = {} if maker is None else {"maker": common(self._table, maker)}
            if changes or inode in self._accepted:
                change(self._table, number, accepted=inode in self._accepted, **changes)
        for one in self._found.values():
            problems += self._of_connection(one)
            problems += self._of_messages(one)

    def _holder(self, one: UnixSocket) -> int:
        """The process that has it; of several, the first."""
        return self._table.sockets[one.socket.inode]

    # -- who makes what -----------------------------------------------------------------------------------------------

    def _of_listener(self, one: UnixSocket) -> Iterator[str]:
        """A socket that listens, and those whose connections it has yet to accept."""
        if one.backlog < 0:
            return
        made_by = one.made_by.pid if one.made_by is not None else 0
        if made_by != self._holder(one) and made_by in self._table.slots:
            self._makers[one.socket.inode] = made_by
        for inode in one.pending:
            what = f"socket:[{one.socket.inode}]: a connection waits to be accepted that"
            waiting = self._found.get(inode)
            if waiting is None:
                holder = pipes.holder_outside(self._table, f"socket:[{inode}]")
                # While the tree runs, it may be on its way somewhere in it, or new.
                if holder is not None or self._table.frozen:
                    yield f"{what} process {holder or '?'} has made, which is not moved along"
            elif waiting.made_by != one.made_by or made_by not in self._table.slots:
                yield f"{what} was made when a process listened that is gone (SO_PEERCRED)"
            elif self._users(inode) > 1:
                yield f"{what} any of several processes may have made (SO_PEERCRED)"

    def _users(self, inode: int) -> int:
        """How many processes have a socket open."""
        number = self._numbers[inode]
        return sum(any(slot.description == number for slot in slots) for slots in self._table.slots.values())

    def _of_pair(self, one: UnixSocket, peer: UnixSocket) -> Iterator[str]:
        """Two ends of a connection: who made each is what the other is told."""
        accepted = self._accepted_end(one, peer)
        if accepted is not None:
            self._accepted.add(accepted.socket.inode)
        holders = {self._holder(one), self._holder(peer)}
        makers = {
            each.socket.inode: other.made_by.pid if other.made_by is not None else self._holder(each)
            for each, other in ((one, peer), (peer, one))
        }
        if set(makers.values()) == holders and len(holders) == 1 and not self._listens_elsewhere(accepted):
            return
        for inode, maker in makers.items():
            if maker not in self._table.slots:
                yield (
                    f"socket:[{inode}]: a Unix socket that process {maker} made, which its other end could not be told "
                    "any more (SO_PEERCRED): that process is gone, or has no descriptor table of its own"
                )
                return
        if accepted is None and len(set(makers.values())) > 1:
            yield f"socket:[{one.socket.inode}]: it cannot be told how this Unix socket came to be connected"
            return
        self._makers |= makers

    def _of_left(self, one: UnixSocket) -> None:
        """One whose other end has been closed: its name is its own, or that of a socket that listens."""
        if not one.name or one.place or one.socket.type == socket.SOCK_DGRAM:
            return
        key = one.socket.type, one.name
        if key in self._listeners or (one.name.startswith(b"\0") and self._users_of_names[key] > 1):
            self._accepted.add(one.socket.inode)
            if self._listens_elsewhere(one):
                self._makers[one.socket.inode] = self._holder(one)

    def _accepted_end(self, one: UnixSocket, peer: UnixSocket) -> UnixSocket | None:
        """The end that came from accept(2), which has the name of a socket that listened; None of a socketpair(2)."""
        named = [each for each in (one, peer) if each.name]
        if not named or one.socket.type == socket.SOCK_DGRAM:
            return None
        for each in named:
            if (each.socket.type, each.name) in self._listeners:
                return each
        # One whose file is there has been bound; of two, accept(2) made the later one.
        without_file = [each for each in named if not each.place] or named
        return max(without_file, key=lambda each: each.socket.inode)

    def _listens_elsewhere(self, accepted: UnixSocket | None) -> bool:
        """Whether a socket of that name is another process's: while it is there, no other can have the name."""
        if accepted is None:
            return False
        listener = self._listeners.get((accepted.socket.type, accepted.name))
        if listener is None:
            return False
        return self._makers.get(listener.socket.inode, self._holder(listener)) != self._holder(accepted)

    # -- what cannot be had again -------------------------------------------------------------------------------------

    def _of_connection(self, one: UnixSocket) -> Iterator[str]:
        """One that is connected to a socket which is not there, or could not be found by a name."""
        if one.peer <= 0:
            return
        kind = f"socket:[{one.socket.inode}]: a Unix {KINDS[one.socket.type]} socket connected to"
        peer = self._found.get(one.peer)
        if peer is None:
            there = self._table.unix_diag(one.peer)
            if outside := _outside(self._table, one, there):
                change(self._table, self._numbers[one.socket.inode], peer=0, outside=outside)
                return
            name = title(there) if there else "one"
            holder = pipes.holder_outside(self._table, f"socket:[{one.peer}]")
            if holder is None and not self._table.frozen:
                return  # it may be on its way somewhere in the tree
            hint = "; --ext-unix-sk connects it to that name there" if _could_be_outside(one, there) else ""
            yield f"{kind} {name} of process {holder or '?'}, which is not moved along{hint}"
        elif not is_mutual(one, peer) and not peer.name:
            yield f"{kind} one without a name that is not connected to it, which cannot be moved yet"

    def _of_messages(self, one: UnixSocket) -> Iterator[str]:
        """Datagrams of senders that are not there."""
        if one.socket.type != socket.SOCK_DGRAM:
            return
        for name in sorted({message.sender for message in one.queue} - {b""}):
            sender = self._datagrams.get(name)
            text = os.fsdecode(name.rstrip(b"\0").replace(b"\0", b"@"))
            what = f"socket:[{one.socket.inode}]: a message of {text} is queued in it, which"
            if sender is None:
                if not name.startswith(b"\0"):
                    yield f"{what} is not moved along"
            elif self._holder(sender) != self._holder(one) and (one.peer == DEAD or not one.name):
                yield f"{what} has no way to it any more"


def _could_be_outside(one: UnixSocket, there: UnixDiag | None) -> bool:
    return one.socket.type == socket.SOCK_DGRAM and there is not None and there.name[:1] in (b"/", b"\0")


def _outside(table: Table, one: UnixSocket, there: UnixDiag | None) -> bytes:
    """The name of a datagram socket's peer outside of the tree, if the user wants that to be found again there."""
    if not table.choices.unix_outside or there is None or not _could_be_outside(one, there):
        return b""
    if there.name.startswith(b"\0"):
        return there.name
    root = os.readlink(f"/proc/{table.sockets[one.socket.inode]}/root")
    path = os.path.normpath(os.path.join(root, os.fsdecode(there.name.rstrip(b"\0")).lstrip("/")))
    with contextlib.suppress(OSError):
        file = os.stat(path)
        if (file.st_ino & 0xFFFF_FFFF, file.st_dev) == there.vfs:
            table.needed.append(FileIdentity.named(path))
            return os.fsencode(path) + b"\0"
    return b""
