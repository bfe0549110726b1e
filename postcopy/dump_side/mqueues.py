"""POSIX message queues that the tree alone has open, with what is in them."""

import contextlib
import os
import stat
from collections.abc import Iterable

from postcopy.dump_side.opened import O_PATH, Opened, Refused, Table
from postcopy.dump_side.peek import in_peace
from postcopy.ipc_kinds import PosixQueue, QueuedMessage, QueueOpening
from postcopy.kernel import mqueue, procfs
from postcopy.state import Description


def collect(table: Table, opened: Opened) -> Description | None:
    """The description of a message queue; None for other kinds. The queue itself is added to the table once."""
    if opened.mode != stat.S_IFREG or opened.stat.st_size != mqueue.STATUS_SIZE or opened.flags & O_PATH:
        return None
    if not mqueue.is_one(f"/proc/{opened.pid}/fd/{opened.fd}"):
        return None
    inode = opened.stat.st_dev << 64 | opened.stat.st_ino
    if inode not in table.queue_numbers:
        if inode not in table.trusted_pipes and (holder := _holder_outside(table, opened.stat)):
            raise Refused(f"{opened.link}: process {holder}, which is not moved, has this message queue open, too")
        # Looking fails where a running process closes it meanwhile: then it has no number.
        found = _look(table, opened)
        table.queue_numbers[inode] = len(table.descriptors.queues)
        table.descriptors.queues.append(found)
    return Description(queue=QueueOpening(table.queue_numbers[inode], opened.flags))


def _look(table: Table, opened: Opened) -> PosixQueue:
    # Opened through /proc, it can be used in every way, whichever way the descriptor is for.
    own = os.open(f"/proc/{opened.pid}/fd/{opened.fd}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if pid := mqueue.notified(own):
            raise Refused(f"{opened.link}: process {pid} is to be told of its next message (mq_notify)")
        found = mqueue.attributes(own)
        return PosixQueue(
            name=os.path.basename(opened.link) if opened.stat.st_nlink else "",
            owner=(opened.stat.st_uid, opened.stat.st_gid),
            mode=stat.S_IMODE(opened.stat.st_mode) & 0o777,
            most=found.most,
            size=found.size,
            messages=_messages(own, found.size, opened.link) if table.frozen and found.waiting else [],
        )
    finally:
        os.close(own)


def _messages(own: int, size: int, name: str) -> list[QueuedMessage]:
    def look() -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        try:
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.append(mqueue.receive(own, size))
        finally:
            for priority, content in found:
                mqueue.send(own, priority, content)
        return found

    found = in_peace(look, [own])
    if found is None:
        raise Refused(f"{name}: what is in it could not be read")
    return [QueuedMessage(priority, content) for priority, content in found]


def _holder_outside(table: Table, found: os.stat_result) -> int:
    """A process outside of the tree that has the queue open, 0 for none."""
    # Children may have been born to the tree since its processes were listed.
    own = {each for pid in table.pids for each in (pid, *procfs.descendants(pid))} | {os.getpid()}
    for pid in procfs.pids():
        if pid in own:
            continue
        with contextlib.suppress(OSError):
            for fd in procfs.descriptors(pid):
                with contextlib.suppress(OSError):
                    if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), found):
                        return pid
    return 0


def end(queues: Iterable[PosixQueue]) -> None:
    """The tree is of no more use here, and so are these."""
    for each in queues:
        if each.name:
            with contextlib.suppress(OSError):
                mqueue.unlink(each.name)
