"""POSIX message queues: made and filled before the tree, and opened by name."""

import contextlib
import errno
import os
import resource
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from postcopy.errors import RestoreError
from postcopy.ipc_kinds import PosixQueue, QueueOpening
from postcopy.kernel import mqueue
from postcopy.kernel.calls import call
from postcopy.restore_side.leftovers import Leftovers
from postcopy.state import Slot

if TYPE_CHECKING:
    from postcopy.restore_side.descriptors import Plan

_RLIMIT_MSGQUEUE = 12


def problems(names: Iterable[str]) -> Iterator[str]:
    """Which names are taken here."""
    for name in names:
        if mqueue.exists(name):
            yield f"there is a message queue /{name} here: remove that one (mq_unlink(3))"


class PosixQueues:
    """All that a tree has; made once, and gone again if it comes to nothing."""

    def __init__(self, leftovers: Leftovers) -> None:
        self._leftovers = leftovers
        self._queues: list[PosixQueue] = []
        self._names: list[str] = []
        self._fds: list[int] = []

    def make(self, queues: list[PosixQueue]) -> None:
        """Make all of them, for us alone. Raises RestoreError."""
        self._queues = queues
        if queues:
            _raise_limit()
        with _errors():
            for number, each in enumerate(queues):
                name = each.name or f"postcopy.{os.getpid()}.{number}"
                self._fds.append(mqueue.create(name, each.most, each.size))
                self._leftovers.message_queue(name)
                self._names.append(name)
                for message in each.messages:
                    mqueue.send(self._fds[-1], message.priority, message.content)

    def name(self, number: int) -> str:
        """Under which name a queue is found now."""
        return self._names[number]

    def finish(self) -> None:
        """Once all of them are open: give each to its owner; those that had no name lose it. Raises RestoreError."""
        with _errors():
            for fd, name, each in zip(self._fds, self._names, self._queues, strict=True):
                os.fchown(fd, *each.owner)
                os.fchmod(fd, each.mode)
                if not each.name:
                    mqueue.unlink(name)
        self._close()

    def undo(self) -> None:
        """Leave nothing behind."""
        self._close()
        for name in self._names:
            with contextlib.suppress(OSError):
                mqueue.unlink(name)

    def _close(self) -> None:
        while self._fds:
            os.close(self._fds.pop())


def _raise_limit() -> None:
    """Have queues take as many bytes as we are allowed to."""
    _, hard = resource.prlimit(0, _RLIMIT_MSGQUEUE)
    resource.prlimit(0, _RLIMIT_MSGQUEUE, (hard, hard))


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno == errno.EMFILE:
            hint = "queues may take no more bytes (RLIMIT_MSGQUEUE): raise it for restore, ulimit -Hq"
        elif error.errno == errno.EINVAL:
            hint = "compare fs.mqueue.msg_max and fs.mqueue.msgsize_max on both hosts"
        raise RestoreError(error.strerror or str(error), hint) from None


def rebuild(plan: "Plan", slot: Slot, state: QueueOpening) -> None:
    """Add the calls that open a queue at ``slot``."""
    name = plan.shared.numbered.queues_by_name.name(state.queue)
    purpose = f"opening message queue /{name} (descriptor {slot.fd})"
    opened = plan.next_fd()
    flags = state.flags & (os.O_ACCMODE | os.O_NONBLOCK)
    plan.batch.add(call("mq_open", plan.batch.text(name), flags, 0, 0), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
