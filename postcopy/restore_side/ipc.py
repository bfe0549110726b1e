"""System V semaphores and message queues: made before the tree, with their numbers, and used by who has used them."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from postcopy import roles
from postcopy.errors import RestoreError
from postcopy.ipc_kinds import IpcName, MessageQueue, SemaphoreSet
from postcopy.kernel import message_queues, semaphores
from postcopy.kernel.batch import Batch
from postcopy.kernel.calls import call
from postcopy.kernel.ipc import IPC_NOWAIT, listed, remove
from postcopy.restore_side.leftovers import Leftovers
from postcopy.restore_side.mqueues import PosixQueues
from postcopy.state import Tree

_NAMES = {"sem": semaphores.name, "msg": message_queues.name}
_PER_USE = 512  # bytes
_ANY_MESSAGE = (1).to_bytes(8, "little") + b"\0"  # struct msgbuf with one byte


def problems(wanted: Iterable[IpcName]) -> Iterator[str]:
    """Whose number or key is taken here."""
    for each in wanted:
        name = _NAMES[each.kind](each.identifier)
        there = listed(each.kind)
        if each.identifier in there:
            yield f"the number of {name} is taken here: remove that one (ipcrm), or move to another IPC namespace"
        elif each.key and each.key in there.values():
            yield f"the key {each.key:#x} of {name} is taken here: remove that one (ipcrm)"


class IpcObjects:
    """All that a tree has; made once, and gone again if it comes to nothing."""

    def __init__(self, leftovers: Leftovers) -> None:
        self.sets: list[SemaphoreSet] = []
        self.queues: list[MessageQueue] = []
        self._leftovers = leftovers
        self._made: list[tuple[str, int]] = []
        self.queues_by_name = PosixQueues(leftovers)

    def make(self, tree: Tree) -> None:
        """Make all of it, with the queues still empty, and for us alone. Raises RestoreError."""
        self.sets, self.queues = tree.semaphores, tree.message_queues
        self.queues_by_name.make(tree.descriptors.queues)
        for each in self.sets:
            _make(each.creator, partial(semaphores.create, each.identifier, each.key, each.creator, each.values))
            self._note("sem", each.identifier)
        for queue in self.queues:
            _make(queue.creator, partial(message_queues.create, queue.identifier, queue.key, queue.creator))
            self._note("msg", queue.identifier)
            # It may have been made smaller when these were in it.
            least = max(sum(len(message.content) for message in queue.messages), len(queue.messages), 1)
            with _errors():
                capacity = max(queue.capacity, least)
                message_queues.set_owner(queue.identifier, (os.geteuid(), os.getegid()), 0o600, capacity)

    def _note(self, kind: str, identifier: int) -> None:
        self._made.append((kind, identifier))
        self._leftovers.ipc_object(kind, identifier)

    def adjust(self, pid: int, batch: Batch) -> None:
        """Add the calls by which the end of process ``pid`` will undo what it would have undone; before any `use`."""
        for each in self.sets:
            for one in each.adjustments:
                if one.pid == pid:
                    _use(batch, each, one.number, one.amount)

    def use(self, pid: int, batch: Batch) -> None:
        """Add the calls by which process ``pid`` uses what it has used last, so that it has again; while it may."""
        for each in self.sets:
            for number, user in enumerate(each.users):
                if user == pid:
                    _use(batch, each, number, 0)
        for queue in self.queues:
            if queue.user == pid:
                what = f"filling {message_queues.name(queue.identifier)}"
                # To have received something, too.
                message = batch.place(_ANY_MESSAGE)
                batch.add(call("msgsnd", queue.identifier, message, 1, IPC_NOWAIT), what)
                batch.add(call("msgrcv", queue.identifier, message, 1, 0, IPC_NOWAIT), what)
                for one in queue.messages:
                    message = batch.place(one.type.to_bytes(8, "little") + one.content)
                    batch.add(call("msgsnd", queue.identifier, message, len(one.content), IPC_NOWAIT), what)

    def room(self, pid: int) -> int:
        """Bytes that these calls take, at most."""
        contents = [message.content for queue in self.queues if queue.user == pid for message in queue.messages]
        uses = len(self.queues) + len(contents)
        uses += sum(each.users.count(pid) + len(each.adjustments) for each in self.sets)
        return _PER_USE * uses + sum(map(len, contents))

    def finish(self) -> None:
        """Once all processes are built: give everything to its owner. Raises RestoreError."""
        self.queues_by_name.finish()
        with _errors():
            for each in self.sets:
                semaphores.set_owner(each.identifier, each.owner, each.mode)
            for queue in self.queues:
                message_queues.set_owner(queue.identifier, queue.owner, queue.mode, queue.capacity)

    def undo(self) -> None:
        """Leave nothing behind."""
        self.queues_by_name.undo()
        for kind, identifier in self._made:
            with contextlib.suppress(OSError):
                remove(kind, _NAMES[kind](identifier), identifier)


def _use(batch: Batch, found: SemaphoreSet, number: int, amount: int) -> None:
    content, count = semaphores.using(number, found.values[number], amount)
    made = call("semop", found.identifier, batch.place(content), count)
    batch.add(made, f"using semaphore {number} of {semaphores.name(found.identifier)}")


def _make(creator: tuple[int, int], make: Callable[[], None]) -> None:
    """Have it made by its creator. Raises RestoreError."""
    if creator == (os.geteuid(), os.getegid()):
        with _errors():
            make()
        return

    def body() -> None:
        with _errors():
            make()

    if roles.start("postcopy-ipc", body, dies_with_parent=True).wait():
        raise RestoreError(f"a System V object cannot be made as user {creator[0]}", "the log says why")


@contextlib.contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RestoreError(error.strerror or str(error)) from None
