"""unix(7) sockets, with their names and with what is queued in them; `unix_peers` says who is connected to whom."""

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
import time
from socket import SocketType

from msgspec import structs

from postcopy.dump_side import opened
from postcopy.dump_side.opened import Refused, Table
from postcopy.kernel import procfs, socket_queue
from postcopy.kernel.sock_diag import DEAD, UnixDiag
from postcopy.kernel.socket_options import SO_PEEK_OFF, SO_PEERCRED, SO_PEERGROUPS, SOL_SOCKET
from postcopy.socket_kinds import PeerCredentials, Socket, UnixMessage, UnixName, UnixSocket

_MESSAGE_SIZE = 1 << 24  # bytes; more than a message can have
_SCM_PIDFD = 4
_BOTH = 3  # RCV_SHUTDOWN and SEND_SHUTDOWN
_BETWEEN_LOOKS = 0.03  # seconds
_NOT_YET = "which cannot be moved yet"
_CONTROL_SIZE = socket.CMSG_SPACE(253 * 4) + socket.CMSG_SPACE(12) + socket.CMSG_SPACE(256)
_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
KINDS: dict[int, str] = {
    socket.SOCK_STREAM: "stream",
    socket.SOCK_DGRAM: "datagram",
    socket.SOCK_SEQPACKET: "seqpacket",
}


def collect(table: Table, common: Socket, own: SocketType) -> UnixSocket:
    """The Unix socket ``own``, a duplicate of the program's. Its peer is checked by `unix_peers`. Raises Refused."""
    diag = table.unix_diag(common.inode)
    if diag is None:
        raise Refused(f"socket:[{common.inode}]: a Unix socket of another network namespace, which cannot be moved yet")
    pending = table.unix_waiting_at(common.inode) != 0
    connected = bool(diag.peer) and common.type != socket.SOCK_DGRAM and not pending
    if reason := _not_accepted(table, common, own, diag, pending):
        table.forget_unix()
        if not table.frozen:
            # It is looked at again soon; until then the program may have accepted it.
            time.sleep(_BETWEEN_LOOKS)
        raise Refused(f"{title(diag)}: {reason}")
    # What accept(2) gives has the name of the listening socket, but the file is not its own.
    accepted = connected and diag.vfs in table.listening_files
    place, file = ("", None) if accepted else _place(table, diag, connected)
    failed = _has_failed(own)
    if failed and (common.type != socket.SOCK_STREAM or diag.peer != DEAD):
        raise Refused(f"{title(diag)}: it is about to report an error to the program, which cannot be moved yet")
    found = UnixSocket(
        socket=common,
        name=diag.name,
        place=place,
        mode=file.st_mode & 0o7777 if file else 0,
        file_owner=(file.st_uid, file.st_gid) if file else (0, 0),
        peer=0 if pending else diag.peer,
        made_by=_made_by(own),
        backlog=diag.backlog if diag.listening else -1,
        shutdown=diag.shutdown,
        reset=failed,
        queue=_queue(table, own, diag) if table.frozen and not diag.listening else [],
        pending=list(diag.waiting),
    )
    if diag.name:
        table.unix_names.append(UnixName(diag.name, place))
    return found


def _not_accepted(table: Table, common: Socket, own: SocketType, diag: UnixDiag, pending: bool) -> str:
    """Why connections that wait to be accepted cannot be moved: accept(2) alone tells who made one, and what it brings.

    ``pending``: the socket's own is one.
    """
    if 0 in diag.waiting:
        return f"a connection waits to be accepted whose other end has been closed, {_NOT_YET}"
    if len(diag.waiting) > diag.backlog + 1:
        return f"{len(diag.waiting)} connections wait to be accepted, and its backlog is only {diag.backlog}"
    if not pending:
        lost = diag.peer == DEAD and common.type != socket.SOCK_DGRAM and diag.shutdown != _BOTH
        return "the other end of its connection cannot be found" if lost else ""
    if struct.unpack("=i", fcntl.ioctl(own, termios.TIOCOUTQ, bytes(4)))[0]:
        return f"its connection has not been accepted, and it has sent something, {_NOT_YET}"
    status = procfs.status(table.pid)
    if common.owner != (int(status["Uid"].split()[1]), int(status["Gid"].split()[1])):
        return f"its connection has not been accepted, and may have been made as another user, {_NOT_YET}"
    return ""


def _has_failed(own: SocketType) -> bool:
    """Whether an error waits to be told: asking for it, or looking at the queue, would take it away (sk_err)."""
    poll = select.poll()
    poll.register(own.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def title(diag: UnixDiag) -> str:
    """What a socket is called in messages."""
    text = os.fsdecode(diag.name.rstrip(b"\0").replace(b"\0", b"@")) or "without a name"
    return f"socket:[{diag.inode}] (Unix {KINDS.get(diag.kind, '')} socket {text})"


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
        raise Refused(f"{title(diag)}: its file cannot be found from the working directory, which may have changed")
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
                found.append(structs.replace(piece, content=piece.content[:before], rights=[]))
                piece = structs.replace(piece, content=piece.content[before:])
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
            credentials = (opened.common(table, pid), uid, gid) if pid in table.pids else None
            if pid and pid not in table.pids:
                refusal = f"a message of process {pid} is queued in it, with its credentials (SCM_CREDENTIALS)"
    if refusal:
        raise Refused(f"{title(diag)}: {refusal}, which cannot be moved yet")
    if not content and diag.shutdown & 1:
        return None  # the end, rather than an empty message
    return UnixMessage(content, _raw_name(address), credentials, rights)


def _raw_name(address: object) -> bytes:
    """A sender's address as bind(2) was given it."""
    if isinstance(address, bytes):
        return address
    return os.fsencode(address) + b"\0" if isinstance(address, str) and address else b""
