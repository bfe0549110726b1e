"""POSIX message queues: made and filled before the tree, and opened by name."""

import contextlib
import os
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


def problems(names: Iterable[str]) -> Iterator[str]:
    """Which names are taken here."""
    for name in names:
        if mqueue.exists(name):
            yield f"there is a message queue /{name} here: remove that one (mq_unlink(3))"


class PosixQueues:
    """All that a tree has; made once, and gone again if it comes to nothing."""

    def __init__(self, leftovers: Leftovers) -> None:
        self._leftovers = leftovers
        self._names: list[str] = []
        self._for_a_while: list[str] = []

    def make(self, queues: Iterable[PosixQueue]) -> None:
        """Make all of them. Raises RestoreError."""
        try:
            for number, each in enumerate(queues):
                name = each.name or f"postcopy.{os.getpid()}.{number}"
                fd = mqueue.create(name, each.most, each.size)
                self._leftovers.message_queue(name)
                self._names.append(name)
                if not each.name:
                    self._for_a_while.append(name)
                try:
                    for message in each.messages:
                        mqueue.send(fd, message.priority, message.content)
                    os.fchown(fd, *each.owner)
                    os.fchmod(fd, each.mode)
                finally:
                    os.close(fd)
        except OSError as error:
            raise RestoreError(str(error)) from None

    def name(self, number: int) -> str:
        """Under which name a queue is found now."""
        return self._names[number]

    def finish(self) -> None:
        """Once all of them are open: those that had no name lose it. Raises RestoreError."""
        try:
            for name in self._for_a_while:
                mqueue.unlink(name)
        except OSError as error:
            raise RestoreError(str(error)) from None

    def undo(self) -> None:
        """Leave nothing behind."""
        for name in self._names:
            with contextlib.suppress(OSError):
                mqueue.unlink(name)


def rebuild(plan: "Plan", slot: Slot, state: QueueOpening) -> None:
    """Add the calls that open a queue at ``slot``."""
    name = plan.shared.numbered.queues_by_name.name(state.queue)
    purpose = f"opening message queue /{name} (descriptor {slot.fd})"
    opened = plan.next_fd()
    flags = state.flags & (os.O_ACCMODE | os.O_NONBLOCK)
    plan.batch.add(call("mq_open", plan.batch.text(name), flags, 0, 0), purpose)
    plan.settle(opened, slot.fd, slot.close_on_exec, purpose)
