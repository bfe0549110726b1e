"""Pipes and FIFOs with both ends inside the tree, with what is in them."""

import contextlib
import os
import select
import stat

from msgspec import structs

from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table
from postcopy.kernel import pipe, procfs
from postcopy.state import Description, FileIdentity, Pipe, PipeEnd

_ANONYMOUS = "pipe:["


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of one end; None for other kinds. The pipe itself is added to the table once."""
    if opened.mode != stat.S_IFIFO or opened.flags & O_PATH:
        return None
    path = "" if opened.link.startswith(_ANONYMOUS) else _named(opened)
    # The inodes of pipes count by themselves.
    inode = opened.stat.st_dev << 64 | opened.stat.st_ino if path else opened.stat.st_ino
    if inode not in table.pipe_numbers:
        if inode not in table.trusted_pipes and (holder := holder_outside(table, opened.link)):
            raise Refused(
                f"{opened.link}: process {holder}, which is not moved, holds an end of this pipe too; redirect the "
                "stream to a file and start the program again, or let restore give it another: "
                f"--external '{opened.link}' here, and --inherit-fd 'fd[N]:{opened.link}' there"
            )
        # Looking fails where a running process closes it meanwhile: then it has no number.
        found = _look(opened, path)
        table.pipe_numbers[inode] = len(table.descriptors.pipes)
        table.descriptors.pipes.append(found)
        if path:
            table.needed.append(FileIdentity.named(path, "fifo"))
    number = table.pipe_numbers[inode]
    found = table.descriptors.pipes[number]
    if opened.flags & os.O_DIRECT and found.content and not found.packets:
        table.descriptors.pipes[number] = structs.replace(found, packets=[len(found.content)])
    return Description(pipe=PipeEnd(number, opened.flags))


def _named(opened: Opened) -> str:
    """The name of a FIFO."""
    with contextlib.suppress(OSError):
        if os.path.samestat(os.lstat(opened.link), opened.stat):
            return opened.link
    raise Refused(f"{opened.link}: the FIFO cannot be found under this name any more, which cannot be moved yet")


def _look(opened: Opened, path: str) -> Pipe:
    untouched = bool(path) and _is_untouched(opened)
    # Opened through /proc, a pipe gives an end of the asked kind, whichever end the descriptor is.
    own = os.open(f"/proc/{opened.pid}/fd/{opened.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        pieces = pipe.peek(own)
        # What a stream holds is read at once; a packet ends a read (pipe(2), O_DIRECT).
        packets = [len(piece) for piece in pieces] if len(pieces) > 1 else []
        return Pipe(b"".join(pieces), pipe.capacity(own), packets, path, untouched)
    finally:
        os.close(own)


def _is_untouched(opened: Opened) -> bool:
    """Whether this is the reading end of a FIFO that has no writer and, since it was opened, has had none.

    The end of a FIFO is only told (POLLHUP) to readers who have seen a writer.
    """
    if opened.flags & os.O_ACCMODE != os.O_RDONLY:
        return False
    with opened.duplicate() as own:
        poll = select.poll()
        poll.register(own, select.POLLIN)
        if poll.poll(0):
            return False
    # Silent, so there is a writer or there has been none: only with a writer, a second reader is told to wait.
    second = os.open(f"/proc/{opened.pid}/fd/{opened.fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(second, 1) == b""
    except BlockingIOError:
        return False
    finally:
        os.close(second)


def holder_outside(table: Table, link: str) -> int | None:
    """A process outside of the tree that has an end of the pipe open."""
    if table.holders is None:
        # Children may have been born to the tree since its processes were listed.
        own = {each for pid in table.pids for each in (pid, *procfs.descendants(pid))}
        table.holders = _holders({*own, os.getpid()})
    return table.holders.get(link)


def _holders(but: set[int]) -> dict[str, int]:
    """What processes have open, and one that has, but for those of ``but``."""
    found: dict[str, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in but:
            continue
        with contextlib.suppress(OSError):
            for fd in procfs.descriptors(int(name)):
                with contextlib.suppress(OSError):
                    found[procfs.link(int(name), f"fd/{fd}")] = int(name)
    return found
