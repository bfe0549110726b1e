"""System V semaphores and message queues. Nobody has them open: whose they are is seen by who has used them last."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from postcopy.dump_side.choices import Choices
from postcopy.dump_side.freeze import Frozen
from postcopy.errors import DumpError
from postcopy.ipc_kinds import Adjustment, IpcName, Message, MessageQueue, SemaphoreSet
from postcopy.kernel import kcmp, message_queues, procfs, semaphores
from postcopy.kernel.calls import NUMBERS, call
from postcopy.kernel.executor import Executor
from postcopy.kernel.ipc import listed
from postcopy.kernel.semaphores import LEAST_ADJUSTMENT, MOST_VALUE

_TICKS = os.sysconf("SC_CLK_TCK")
_GRACE_SECONDS = 2  # for a wall clock that has been set a little
_AT_ONCE = 256  # semaphores that are asked after by one list of calls
_CALLS = {NUMBERS["semop"]: "sem", NUMBERS["semtimedop"]: "sem", NUMBERS["msgsnd"]: "msg", NUMBERS["msgrcv"]: "msg"}

Waiting = Mapping[tuple[str, int], Collection[int]]
_Question = Callable[[int, int, int], tuple[bytes, int]]


class IpcObjects:
    """Those that a tree uses. ``doubtful``: names of others that nobody uses who lives, but that it may know."""

    def __init__(self) -> None:
        self._pids: Collection[int] = ()
        self._zombies: Collection[int] = ()
        self._adjustments: dict[int, list[Adjustment]] = {}
        self.sets: dict[int, semaphores.SemaphoreStatus] = {}
        self.queues: dict[int, message_queues.QueueStatus] = {}
        self.doubtful: list[str] = []
        self._doubtful_sets: dict[int, semaphores.SemaphoreStatus] = {}

    def find(
        self,
        pids: Collection[int],
        zombies: Collection[int],
        choices: Choices,
        problems: list[str],
        find_waiting: Callable[[], Waiting],
    ) -> None:
        """Find those that the processes ``pids``, or ``zombies`` among them, have used last, or wait for; what of them
        cannot be moved is added to ``problems``. ``find_waiting``: who waits for what; called if there is anything.

        Raises OSError.
        """
        self._pids, self._zombies = pids, zombies
        sets, queues = listed("sem"), listed("msg")
        self._waiting = find_waiting() if sets or queues else {}
        for identifier in sets:
            with contextlib.suppress(OSError):  # it has just been removed
                semaphore_set = semaphores.stat(identifier)
                users = semaphores.last_users(identifier, semaphore_set.count)
                times = [(pid, semaphore_set.changed) for pid in {*users} - {0}]
                if self._is_used("sem", identifier, semaphore_set, times, choices, problems):
                    self.sets[identifier] = semaphore_set
        for identifier in queues:
            with contextlib.suppress(OSError):
                queue = message_queues.stat(identifier)
                if self._is_used("msg", identifier, queue, queue.users, choices, problems):
                    self.queues[identifier] = queue

    @property
    def names(self) -> list[IpcName]:
        """What must be free at the destination."""
        return [
            *(IpcName("sem", identifier, each.key) for identifier, each in self.sets.items()),
            *(IpcName("msg", identifier, each.key) for identifier, each in self.queues.items()),
        ]

    def _is_used(
        self,
        kind: str,
        identifier: int,
        status: semaphores.SemaphoreStatus | message_queues.QueueStatus,
        users: list[tuple[int, int]],
        choices: Choices,
        problems: list[str],
    ) -> bool:
        name = semaphores.name(identifier) if kind == "sem" else message_queues.name(identifier)
        what = f"{name} (key {status.key:#x})"
        present = [*self._waiting.get((kind, identifier), ()), *(pid for pid, when in users if _had_begun(pid, when))]
        mine = [pid for pid in present if pid in self._pids or pid in self._zombies]
        others = [pid for pid in present if pid not in mine and not _has_ended(pid)]
        if not mine:
            if not others and status.owner[0] in {os.stat(f"/proc/{pid}").st_uid for pid in self._pids}:
                self.doubtful.append(what)
                if isinstance(status, semaphores.SemaphoreStatus):
                    self._doubtful_sets[identifier] = status
            return False
        if others:
            problems.append(f"{what} is used by process {others[0]}, too, which is not moved")
        elif not choices.sysv_ipc:
            problems.append(
                f"{what} has been used by process {mine[0]}, and nobody can tell who else uses it; "
                "if nobody does, it is moved with --sysv-ipc, and removed here"
            )
        return True

    # -- of a frozen tree ---------------------------------------------------------------------------------------------

    def read_adjustments(self, executor: Executor, pid: int, number: int, choices: Choices) -> None:
        """Find what SEM_UNDO would add at the end of process ``pid``, called ``number`` in the state.

        Raises DumpError, OSError.
        """
        sets = {**self.sets, **self._doubtful_sets}
        if not sets or kcmp.has_nothing_to_undo(pid):
            return
        for identifier, status in sets.items():
            asking = _Asking(executor, pid, identifier, semaphores.values(identifier, status.count))
            found = [Adjustment(number, place, amount) for place, amount in asking.adjustments()]
            if found and identifier in self._doubtful_sets:
                # Nobody else has shown whose it is.
                if not choices.sysv_ipc:
                    raise DumpError(
                        f"{semaphores.name(identifier)} is used by process {pid} (SEM_UNDO)",
                        "if nobody else uses it, it is moved with --sysv-ipc, and removed here",
                    )
                self.sets[identifier] = self._doubtful_sets.pop(identifier)
            self._adjustments.setdefault(identifier, []).extend(found)

    def collect(self, common: Callable[[int], int]) -> tuple[list[SemaphoreSet], list[MessageQueue]]:
        """All of them; ``common``: what a process is called in the state. Raises DumpError."""

        def called(pid: int) -> int:
            # What somebody has used who has ended is the tree's now.
            return common(pid if pid in self._pids else next(iter(self._pids)))

        try:
            sets = [
                SemaphoreSet(
                    identifier,
                    each.key,
                    each.creator,
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
                    each.creator,
                    each.owner,
                    each.mode,
                    each.capacity,
                    called(next((pid for pid, _ in each.users if pid in self._pids), 0)),
                    [Message(kind, content) for kind, content in message_queues.messages(identifier, each)],
                )
                for identifier, each in self.queues.items()
            ]
        except OSError as error:
            raise DumpError(error.strerror or str(error)) from None
        return sets, queues

    def end(self) -> None:
        """The tree is of no more use here, and so are these."""
        for identifiers, remove in ((self.sets, semaphores.remove), (self.queues, message_queues.remove)):
            for identifier in identifiers:
                with contextlib.suppress(OSError):
                    remove(identifier)


def waiting(pids: Iterable[int]) -> Waiting:
    """Who of the running processes ``pids`` waits in a call for which set (``sem``, id) or queue (``msg``, id)."""
    found: dict[tuple[str, int], list[int]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for tid in procfs.tids(pid):
                number, *arguments = procfs.read(pid, f"task/{tid}/syscall").split()
                if arguments and number.isdigit() and (kind := _CALLS.get(int(number))):
                    found.setdefault((kind, int(arguments[0], 16)), []).append(pid)
    return found


def waiting_frozen(processes: Iterable[Frozen]) -> Waiting:
    """The same of frozen ones."""
    found: dict[tuple[str, int], list[int]] = {}
    for each in processes:
        for thread in each.threads:
            if kind := _CALLS.get(thread.registers["orig_rax"]):
                found.setdefault((kind, thread.registers["rdi"]), []).append(each.pid)
    return found


def _has_ended(pid: int) -> bool:
    try:
        return procfs.stat(pid)[3] in "ZX"
    except OSError:
        return True


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
            above = self._try(semaphores.is_above, dict.fromkeys(some, 0))
            below = self._try(semaphores.is_below, dict.fromkeys(some, 0))
            yield from self._amounts(semaphores.is_above, [n for n in some if above[n]], MOST_VALUE)
            yield from self._amounts(semaphores.is_below, [n for n in some if below[n]], LEAST_ADJUSTMENT)

    def _amounts(self, question: _Question, numbers: list[int], most: int) -> Iterator[tuple[int, int]]:
        """By bisection, of all at once: each is beyond the first of its bounds, and not beyond the other."""
        bounds = dict.fromkeys(numbers, (0, most))
        while middles := {n: (inner + outer) // 2 for n, (inner, outer) in bounds.items() if abs(outer - inner) > 1}:
            for number, is_beyond in self._try(question, middles).items():
                inner, outer = bounds[number]
                bounds[number] = (middles[number], outer) if is_beyond else (inner, middles[number])
        for number, (_, outer) in bounds.items():
            yield number, outer

    def _try(self, question: _Question, amounts: Mapping[int, int]) -> dict[int, bool]:
        """Have the process try what cannot be done; whether its adjustment of each semaphore is beyond the amount."""
        batch = self._executor.batch()
        for number, amount in amounts.items():
            content, count = question(number, self._values[number], amount)
            batch.add(call("semop", self._identifier, batch.place(content), count))
        results = self._executor.run(batch).results
        for result in results:
            if result not in (-errno.ERANGE, -errno.EAGAIN):
                why, name = errno.errorcode.get(-result, str(result)), semaphores.name(self._identifier)
                raise DumpError(
                    f"process {self._pid} may have something to undo in {name}, which it cannot be asked for: {why}",
                    "let it have write access (semctl(2), IPC_SET)",
                )
        return {number: result == -errno.ERANGE for number, result in zip(amounts, results, strict=True)}
