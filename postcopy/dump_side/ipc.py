"""System V semaphores and message queues. Nobody has them open: whose they are is seen by who has used them last."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence

from postcopy.dump_side.choices import Choices
from postcopy.errors import DumpError
from postcopy.ipc_kinds import Adjustment, IpcName, Message, MessageQueue, SemaphoreSet
from postcopy.kernel import message_queues, procfs, semaphores
from postcopy.kernel.calls import call
from postcopy.kernel.executor import Executor
from postcopy.kernel.ipc import listed
from postcopy.kernel.semaphores import LEAST_ADJUSTMENT, MOST_VALUE

_TICKS = os.sysconf("SC_CLK_TCK")
_GRACE_SECONDS = 2  # for a wall clock that has been set a little
_AT_ONCE = 256  # semaphores that are asked after by one list of calls


class IpcObjects:
    """Those that a tree uses."""

    def __init__(self) -> None:
        self._pids: Collection[int] = ()
        self._adjustments: dict[int, list[Adjustment]] = {}
        self.sets: dict[int, semaphores.SemaphoreStatus] = {}
        self.queues: dict[int, message_queues.QueueStatus] = {}

    def find(self, pids: Collection[int], choices: Choices, problems: list[str]) -> None:
        """Find those that the processes ``pids`` have used last; what of them cannot be moved is added to ``problems``.

        Raises OSError.
        """
        self._pids = pids
        for identifier in listed("sem"):
            with contextlib.suppress(OSError):  # it has just been removed
                semaphore_set = semaphores.stat(identifier)
                users = semaphores.last_users(identifier, semaphore_set.count)
                times = [(pid, semaphore_set.changed) for pid in {*users} - {0}]
                if self._is_used(semaphores.name(identifier), semaphore_set.key, times, choices, problems):
                    self.sets[identifier] = semaphore_set
        for identifier in listed("msg"):
            with contextlib.suppress(OSError):
                queue = message_queues.stat(identifier)
                if self._is_used(message_queues.name(identifier), queue.key, queue.users, choices, problems):
                    self.queues[identifier] = queue

    @property
    def names(self) -> list[IpcName]:
        """What must be free at the destination."""
        return [
            *(IpcName("sem", identifier, each.key) for identifier, each in self.sets.items()),
            *(IpcName("msg", identifier, each.key) for identifier, each in self.queues.items()),
        ]

    def _is_used(
        self, name: str, key: int, users: list[tuple[int, int]], choices: Choices, problems: list[str]
    ) -> bool:
        present = [pid for pid, when in users if _had_begun(pid, when)]
        mine = [pid for pid in present if pid in self._pids]
        if not mine:
            return False
        what = f"{name} (key {key:#x})"
        others = [pid for pid in present if pid not in self._pids]
        if others:
            problems.append(f"{what} is used by process {others[0]}, too, which is not moved")
        elif not choices.sysv_ipc:
            problems.append(
                f"{what} has been used by process {mine[0]}, and nobody can tell who else uses it; "
                "if nobody does, it is moved with --sysv-ipc, and removed here"
            )
        return True

    # -- of a frozen tree ---------------------------------------------------------------------------------------------

    def read_adjustments(self, executor: Executor, pid: int, number: int) -> None:
        """Find what SEM_UNDO would add at the end of process ``pid``, called ``number`` in the state.

        Raises DumpError, OSError.
        """
        for identifier, status in self.sets.items():
            asking = _Asking(executor, pid, identifier, semaphores.values(identifier, status.count))
            for place, amount in asking.adjustments():
                self._adjustments.setdefault(identifier, []).append(Adjustment(number, place, amount))

    def collect(self, common: Callable[[int], int]) -> tuple[list[SemaphoreSet], list[MessageQueue]]:
        """All of them; ``common``: what a process is called in the state. Raises DumpError."""

        def called(pid: int) -> int:
            return common(pid) if pid in self._pids else 0

        try:
            sets = [
                SemaphoreSet(
                    identifier,
                    each.key,
                    each.owner,
                    each.mode,
                    semaphores.values(identifier, each.count),
                    list(map(called, semaphores.last_users(identifier, each.count))),
                    self._adjustments.get(identifier, []),
                )
                for identifier, each in self.sets.items()
            ]
            queues = [
                MessageQueue(
                    identifier,
                    each.key,
                    each.owner,
                    each.mode,
                    each.capacity,
                    next(filter(None, (called(pid) for pid, _ in each.users))),
                    [Message(kind, content) for kind, content in message_queues.messages(identifier, each)],
                )
                for identifier, each in self.queues.items()
            ]
        except OSError as error:
            raise DumpError(str(error)) from None
        return sets, queues

    def end(self) -> None:
        """The tree is of no more use here, and so are these."""
        for identifiers, remove in ((self.sets, semaphores.remove), (self.queues, message_queues.remove)):
            for identifier in identifiers:
                with contextlib.suppress(OSError):
                    remove(identifier)


def _had_begun(pid: int, when: int) -> bool:
    """Whether there is a process of this PID, and was at that time (s since the epoch): else it is another one."""
    try:
        ticks = int(procfs.stat(pid)[22])
    except OSError:
        return False
    since = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / _TICKS
    return when >= time.time() - since - _GRACE_SECONDS


class _Asking:
    """Asks a process what SEM_UNDO keeps for it, in a set whose semaphores have these values."""

    def __init__(self, executor: Executor, pid: int, identifier: int, values: Sequence[int]) -> None:
        self._executor = executor
        self._pid = pid
        self._identifier = identifier
        self._values = values

    def adjustments(self) -> Iterator[tuple[int, int]]:
        """The semaphores where that is anything, and what. Raises DumpError."""
        for first in range(0, len(self._values), _AT_ONCE):
            some = range(first, min(first + _AT_ONCE, len(self._values)))
            above = self._try([semaphores.is_above(n, self._values[n], 0) for n in some])
            below = self._try([semaphores.is_below(n, self._values[n], 0) for n in some])
            for number, is_above, is_below in zip(some, above, below, strict=True):
                if is_above or is_below:
                    yield number, self._amount(number, semaphores.is_above if is_above else semaphores.is_below)

    def _amount(self, number: int, question: Callable[[int, int, int], tuple[bytes, int]]) -> int:
        inner, outer = 0, MOST_VALUE if question is semaphores.is_above else LEAST_ADJUSTMENT
        while abs(outer - inner) > 1:
            middle = (inner + outer) // 2
            if self._try([question(number, self._values[number], middle)])[0]:
                inner = middle
            else:
                outer = middle
        return outer

    def _try(self, operations: list[tuple[bytes, int]]) -> list[bool]:
        """Have the process try what cannot be done; of each, whether an adjustment would have left its range."""
        batch = self._executor.batch()
        for content, count in operations:
            batch.add(call("semop", self._identifier, batch.place(content), count))
        results = self._executor.run(batch).results
        for result in results:
            if result not in (-errno.ERANGE, -errno.EAGAIN):
                why, name = errno.errorcode.get(-result, str(result)), semaphores.name(self._identifier)
                raise DumpError(f"process {self._pid} cannot be asked what it would undo in {name}: {why}")
        return [result == -errno.ERANGE for result in results]
