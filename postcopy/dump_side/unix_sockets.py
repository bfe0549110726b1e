"""unix(7) sockets whose other ends are in the process too, with their names and with what is queued in them."""

import contextlib
import dataclasses
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from socket import SocketType
from typing import Any

from postcopy.dump_side import pipes
from postcopy.dump_side.opened import Refused, Table, common, seen
from postcopy.kernel import socket_queue
from postcopy.kernel.sock_diag import DEAD, UnixDiag
from postcopy.kernel.socket_options import SO_PEEK_OFF, SO_PEERCRED, SO_PEERGROUPS, SOL_SOCKET
from postcopy.socket_kinds import PeerCredentials, Socket, UnixMessage, UnixName, UnixSocket
from postcopy.state import FileIdentity

_MESSAGE_SIZE = 1 << 24  # bytes; more than a message can have
_SCM_PIDFD = 4
_BOTH = 3  # RCV_SHUTDOWN and SEND_SHUTDOWN
_CONTROL_SIZE = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(12) + socket.CMSG_SPACE(256)
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
_KINDS: dict[int, str] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "datagram",
    socket.SOCK_SEQPACKET: "seqpacket",
}


def collect(table: Table, common: Socket, own: SocketType) -> UnixSocket:
    """The Unix socket ``own``, a duplicate of the program's. Its peer is checked by `check_peers`. Raises Refused."""
    diag = table.unix_diag(common.inode)
    if diag is None:
        raise Refused(f"socket:[{common.inode}]: a Unix socket of another network namespace, which cannot be moved yet")
    connected = bool(diag.peer) and common.type != socket.SOCK_DGRAM
    if diag.listening and diag.queued:
        raise Refused(f"{_title(diag)}: connections wait to be accepted ({diag.queued}), which cannot be moved yet")
    if connected and diag.peer == DEAD and diag.shutdown != _BOTH:
        raise Refused(f"{_title(diag)}: its connection has not been accepted yet, which cannot be moved yet")
    # What accept(2) gives has the name of the listening socket, but the file is not its own.
    accepted = connected and diag.vfs in table.listening_files
    place, file = ("", None) if accepted else _place(table, diag, connected)
    failed = _has_failed(own)
    if failed and (common.type != socket.SOCK_STREAM or diag.peer != DEAD):
        raise Refused(f"{_title(diag)}: it is about to report an error to the program, which cannot be moved yet")
    found = UnixSocket(
        socket=common,
        name=diag.name,
        place=place,
        mode=file.st_mode & 0o7777 if file else 0,
        file_owner=(file.st_uid, file.st_gid) if file else (0, 0),
        peer=diag.peer,
        made_by=_made_by(own),
        backlog=diag.backlog if diag.listening else -1,
        shutdown=diag.shutdown,
        reset=failed,
        queue=_queue(table, own, diag) if table.frozen and not diag.listening else [],
    )
    if diag.name:
        table.unix_names.append(UnixName(diag.name, place))
    return found


def check_peers(table: Table, problems: list[str]) -> None:
    """Once all tables have been collected: every connection must lead to a socket of the same process,
    or of one that the maker of the pair can give it to."""
    found = {one.unix.socket.inode: one.unix for one in table.descriptors.descriptions if one.unix}
    shared = _pairs_for_others(table, found)
    numbers_of = numbers(table)
    for inode, one in found.items():
        if inode in shared:
            continue
        if one.peer in found and one.made_by and one.made_by.pid != table.sockets[inode]:
            problems.append(
                f"socket:[{inode}]: a Unix socket connected by process {one.made_by.pid} and not by its owner, which "
                "its other end could not be told any more (SO_PEERCRED)"
            )
        if one.peer <= 0:
            continue
        kind = f"socket:[{inode}]: a Unix {_KINDS[one.socket.type]} socket connected to"
        peer = found.get(one.peer)
        if peer is None:
            there = table.unix_diag(one.peer)
            if outside := _outside(table, one, there):
                change(table, numbers_of[inode], peer=0, outside=outside)
                continue
            name = _title(there) if there else "one"
            holder = pipes.holder_outside(table, f"socket:[{one.peer}]")
            if holder is None and not table.frozen:
                continue  # it may be on its way somewhere in the tree
            hint = "; --ext-unix-sk connects it to that name there" if _could_be_outside(one, there) else ""
            problems.append(f"{kind} {name} of process {holder or '?'}, which is not moved along{hint}")
        elif table.sockets[one.peer] != table.sockets[inode]:
            other = table.sockets[one.peer]
            problems.append(f"{kind} one that process {other} has alone, which cannot be moved yet")
        elif one.socket.type == socket.SOCK_DGRAM and not peer.name and peer.peer != inode:
            problems.append(f"{kind} one without a name that is not connected to it, which cannot be moved yet")
    names = {(one.socket.type, one.name) for one in found.values()}
    for inode, one in found.items():
        for sender in sorted({message.sender for message in one.queue}):
            if sender and not sender.startswith(b"\0") and (one.socket.type, sender) not in names:
                text = os.fsdecode(sender.rstrip(b"\0"))
                problems.append(f"socket:[{inode}]: a message of {text} is queued in it, which is not moved along")


def _pairs_for_others(table: Table, found: dict[int, UnixSocket]) -> set[int]:
    """The pairs of socketpair(2) whose maker has not both ends itself: it makes them again, and gives them away.

    It must be built before all who take them from it. Sockets without names alone: accept(2) makes those of servers.
    """
    order = {pid: place for place, pid in enumerate(table.slots)}
    makers: dict[int, int] = {}
    for inode, one in found.items():
        peer = found.get(one.peer)
        if peer is None or peer.peer != inode or one.made_by is None or peer.made_by is None:
            continue
        maker = one.made_by.pid
        holders = {table.sockets[inode], table.sockets[one.peer]}
        if peer.made_by.pid != maker or maker not in order or holders == {maker} or one.name or peer.name:
            continue
        if all(order[maker] <= order[holder] for holder in holders):
            makers[inode] = common(table, maker)
    numbers_of = numbers(table)
    for inode, maker in makers.items():
        change(table, numbers_of[inode], maker=maker)
    return set(makers)


def numbers(table: Table) -> dict[int, int]:
    """The descriptions of Unix sockets by inode."""
    descriptions = enumerate(table.descriptors.descriptions)
    return {one.unix.socket.inode: number for number, one in descriptions if one.unix is not None}


def change(table: Table, number: int, **changes: Any) -> None:
    """Change what is known of a socket of the tree."""
    description = table.descriptors.descriptions[number]
    assert description.unix is not None
    changed = dataclasses.replace(description.unix, **changes)
    table.descriptors.descriptions[number] = dataclasses.replace(description, unix=changed)


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


def _has_failed(own: SocketType) -> bool:
    """Whether an error waits to be told: asking for it, or looking at the queue, would take it away (sk_err)."""
    poll = select.poll()
    poll.register(own.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _title(diag: UnixDiag) -> str:
    text = os.fsdecode(diag.name.rstrip(b"\0").replace(b"\0", b"@")) or "without a name"
    return f"socket:[{diag.inode}] (Unix {_KINDS.get(diag.kind, '')} socket {text})"


def _place(table: Table, diag: UnixDiag, connected: bool) -> tuple[str, os.stat_result | None]:
    """Where the file of the socket lies, as the host sees it, and its status; "" where it has been deleted.

    Raises Refused where it cannot be found but may well be there; that of a connected socket leads nowhere.
    """
    if diag.vfs is None:
        return "", None
    path = os.fsdecode(diag.name.rstrip(b"\0"))
    base = "root" if path.startswith("/") else "cwd"
    start = os.readlink(f"/proc/{table.pid}/{base}")
    directory, name = os.path.split(os.path.normpath(os.path.join(start, path.lstrip("/"))))
    seen: list[str] = [name]
    with contextlib.suppress(OSError):
        # Programs bind to another name and rename, so that the socket appears when it is ready.
        seen += sorted(os.listdir(directory))
    for candidate in seen:
        with contextlib.suppress(OSError):
            file = os.lstat(os.path.join(directory, candidate))
            if (file.st_ino & 0xFFFF_FFFF, file.st_dev) == diag.vfs:
                return os.path.join(directory, candidate), file
    if base == "cwd" and not connected:
        raise Refused(f"{_title(diag)}: its file cannot be found from the working directory, which may have changed")
    return "", None


def _made_by(own: SocketType) -> PeerCredentials | None:
    """SO_PEERCRED and SO_PEERGROUPS, where there is a peer."""
    pid, uid, gid = struct.unpack("=iII", own.getsockopt(SOL_SOCKET, SO_PEERCRED, 12))
    if not pid:
        return None
    groups = b""
    with contextlib.suppress(OSError):
        groups = own.getsockopt(SOL_SOCKET, SO_PEERGROUPS, 1024)
    return PeerCredentials(pid, uid, gid, [each for (each,) in struct.iter_unpack("=I", groups)])


def _queue(table: Table, own: SocketType, diag: UnixDiag) -> list[UnixMessage]:
    """What is queued; it stays there.

    More than one message can be seen only with SO_PEEK_OFF, which belongs to the socket: it is put back at once.
    """
    before = own.getsockopt(SOL_SOCKET, SO_PEEK_OFF, 4)
    own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        if diag.kind != socket.SOCK_STREAM:
            found = list(iter(lambda: _peek(table, own, diag), None))
        else:
            found = _stream(table, own, diag)
    finally:
        own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)
    if any(message.rights for message in found):
        table.carrying.append(diag.inode)
    return found


def _stream(table: Table, own: SocketType, diag: UnixDiag) -> list[UnixMessage]:
    """The pieces of a stream."""
    found: list[UnixMessage] = []
    # Never beyond the last byte: finding nothing, the kernel would tell, and forget, a pending error.
    left = struct.unpack("=i", fcntl.ioctl(own, termios.FIONREAD, bytes(4)))[0]
    seen = 0
    while left and (piece := _peek(table, own, diag, left)):
        length = len(piece.content)
        if piece.rights and length > 1:
            # What was written before the descriptors is joined to what came with them, and ends with it.
            own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, seen)
            before = socket_queue.whole_pieces(own.fileno(), length - 1)
            own.setsockopt(SOL_SOCKET, SO_PEEK_OFF, seen + length)
            if before:
                found.append(dataclasses.replace(piece, content=piece.content[:before], rights=[]))
                piece = dataclasses.replace(piece, content=piece.content[before:])
        found.append(piece)
        left -= length
        seen += length
    return found


def _peek(table: Table, own: SocketType, diag: UnixDiag, size: int = _MESSAGE_SIZE) -> UnixMessage | None:
    try:
        content, control, flags, address = own.recvmsg(size, _CONTROL_SIZE, _PEEK)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return None
        raise
    credentials = None
    rights: list[int] = []
    refusal = "more descriptors are on their way in it than can be received" if flags & socket.MSG_CTRUNC else ""
    for level, kind, value in control:
        if level == SOL_SOCKET and kind == socket.SCM_RIGHTS:
            rights += [fd for (fd,) in struct.iter_unpack("=i", value)]
            table.received += rights
        elif level == SOL_SOCKET and kind == _SCM_PIDFD:
            os.close(struct.unpack("=i", value)[0])
        elif level == SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid, uid, gid = struct.unpack("=iII", value)
            credentials = (seen(table, table.pid), uid, gid) if pid == table.pid else None
            if pid not in (0, table.pid):
                refusal = f"a message of process {pid} is queued in it, with its credentials (SCM_CREDENTIALS)"
    if refusal:
        raise Refused(f"{_title(diag)}: {refusal}, which cannot be moved yet")
    if not content and diag.shutdown & 1:
        return None  # the end, rather than an empty message
    return UnixMessage(content, _raw_name(address), credentials, rights)


def _raw_name(address: object) -> bytes:
    """A sender's address as bind(2) was given it."""
    if isinstance(address, bytes):
        return address
    return os.fsencode(address) + b"\0" if isinstance(address, str) and address else b""
