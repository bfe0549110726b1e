"""Pipes with both ends inside the tree, with what is in them."""

import contextlib
import os
import stat

from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import pipe, procfs
from postcopy.state import Description, Pipe, PipeEnd


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of one end; None for other kinds. The pipe itself is added to the table once."""
    if not opened.link.startswith("pipe:["):
        return None
    if opened.flags & os.O_DIRECT:
        raise Refused(f"{opened.link}: pipes in packet mode (O_DIRECT) cannot be moved yet")
    inode = opened.stat.st_ino
    if inode not in table.pipe_numbers:
        if inode not in table.trusted_pipes and (holder := _holder_outside(table, opened.link)):
            raise Refused(
                f"{opened.link}: process {holder}, which is not moved, holds an end of this pipe too; "
                "redirect the stream to a file and start the program again"
            )
        table.pipe_numbers[inode] = len(table.pipes)
        table.pipes.append(_look(table.pid, opened.fd))
    return Description(pipe=PipeEnd(table.pipe_numbers[inode], opened.flags))


def _look(pid: int, fd: int) -> Pipe:
    # Opened through /proc, a pipe gives an end of the asked kind, whichever end ``fd`` is.
    own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert stat.S_ISFIFO(os.fstat(own).st_mode)
        return Pipe(pipe.peek(own), pipe.capacity(own))
    finally:
        os.close(own)


def _holder_outside(table: Table, link: str) -> int | None:
    """A process outside of the tree that has an end of the pipe open."""
    if table.holders is None:
        # Children may have been born to the tree since its processes were listed.
        own = {each for pid in table.pids for each in (pid, *procfs.descendants(pid))}
        table.holders = _holders({*own, os.getpid()})
    return table.holders.get(link)


def _holders(but: set[int]) -> dict[str, int]:
    """Every pipe that a process has open, but for those of ``but``."""
    found: dict[str, int] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) in but:
            continue
        with contextlib.suppress(OSError):
            for fd in procfs.descriptors(int(name)):
                with contextlib.suppress(OSError):
                    link = procfs.link(int(name), f"fd/{fd}")
                    if link.startswith("pipe:["):
                        found[link] = int(name)
    return found
