"""Freeze a process and all its descendants, and give them back untouched."""

import contextlib
import signal
import time
from collections.abc import Callable

from postcopy.dump_side.freeze import Frozen
from postcopy.errors import DumpError
from postcopy.kernel import procfs, ptrace
from postcopy.turns import by_turns

_PF_EXITING = 0x4  # include/linux/sched.h
_LAST_STEPS = 0.0005  # seconds between two looks at a process that is ending
_MOST_SECONDS = 1.0  # for its threads to end


class FrozenTree:
    """A process tree under our ptrace: ``processes``, parents before their children, and ``zombies``, by PID.

    ``parent_threads``: for each PID but the root's, the thread of its parent whose child it is.
    """

    def __init__(self, pid: int) -> None:
        self.root = Frozen(pid)
        self.processes = [self.root]
        self.zombies: list[int] = []
        self.parent_threads: dict[int, int] = {}

    @property
    def pids(self) -> list[int]:
        """Those of the processes, not of the zombies."""
        return [frozen.pid for frozen in self.processes]

    @property
    def faces(self) -> list[int]:
        """Of each the thread by which ``/proc`` shows it (`procfs.face`)."""
        return [frozen.face for frozen in self.processes]

    @property
    def threads(self) -> int:
        """How many there are in all."""
        return sum(len(frozen.threads) for frozen in self.processes)

    @property
    def pidfds_to_wake(self) -> list[int]:
        """Those of the processes that were not in a job-control stop before."""
        return [frozen.pidfd for frozen in self.processes if not frozen.stopped_by]

    def freeze(self) -> None:
        """Stop them all; raises DumpError when one cannot be had, and then everything runs on.

        A process is stopped before its children are looked for: so one that forks meanwhile leaves nobody out, and a
        parent that waits in vfork(2), which cannot stop, does so when its child has executed a program.
        """
        self.processes, level = [], [self.root]
        try:
            while True:
                level = [frozen for frozen in level if self._if_alive(frozen, Frozen.ask)]
                level = [frozen for frozen in level if self._if_alive(frozen, Frozen.complete)]
                self.processes += level
                # Orphans have been given to a process that was stopped long ago.
                unknown = self._unknown_children(level) or self._unknown_children(self.processes)
                if not unknown:
                    break
                level = [frozen for child in unknown if (frozen := self._found(child))]
        except BaseException:
            for frozen in level:
                frozen.give_up()
            self.thaw()
            raise

    def _if_alive(self, frozen: Frozen, do: Callable[[Frozen], None]) -> bool:
        """Do that to a process; False, and it is left out, where it has ended."""
        try:
            do(frozen)
        except (DumpError, OSError):
            frozen.give_up()
            if frozen is self.root or not self._ends(frozen.pid):
                raise
            frozen.close()
            return False
        return True

    def _ends(self, pid: int) -> bool:
        """Whether a process that cannot be had comes to its end: its threads may have some steps to go."""
        until = time.monotonic() + _MOST_SECONDS
        while not self._has_ended(pid):
            if time.monotonic() > until:
                return False
            time.sleep(_LAST_STEPS)
        return True

    def _found(self, pid: int) -> Frozen | None:
        """The process, if it is not a zombie or gone."""
        if self._has_ended(pid):
            return None
        try:
            return Frozen(pid)
        except OSError:
            if not self._ends(pid):
                raise
            return None

    def _has_ended(self, pid: int) -> bool:
        """Whether a process has; then it may be a zombie of ours."""
        while _is_ending(pid):
            # It still has its children, who belong to us until it has given them away.
            time.sleep(_LAST_STEPS)
        if _is_zombie(pid):
            # Its parent is stopped: it stays what it is.
            self.zombies.append(pid)
            return True
        return not procfs.exists(pid)

    def _unknown_children(self, parents: list[Frozen]) -> list[int]:
        """The children that have not been seen yet."""
        known = {*(frozen.pid for frozen in self.processes), *self.zombies}
        found = []
        for parent in parents:
            for thread in parent.threads:
                for child in procfs.children_of_thread(parent.pid, thread.tid):
                    if child not in known:
                        self.parent_threads[child] = thread.tid
                        found.append(child)
        return found

    def thaw(self) -> None:
        """Let all of them run on as if nothing had happened."""
        for frozen in reversed(self.processes):
            frozen.thaw()

    def let_go(self) -> None:
        """Stop tracing durably stopped processes; they stay stopped."""
        for frozen in self.processes:
            frozen.stay_stopped()
        for frozen in reversed(self.processes):
            frozen.let_go()

    def check_alive(self) -> None:
        """Raises DumpError where somebody has ended one of them."""
        if ended := next((frozen.pid for frozen in self.processes if _is_gone(frozen.face)), 0):
            raise DumpError(f"process {ended} was ended by somebody while it was frozen")

    def stop_durably(self) -> None:
        """Put all of them into a group-stop that our death does not end."""
        by_turns(frozen.stop_durably() for frozen in self.processes)

    def stay_stopped(self) -> None:
        """See to it that no SIGCONT from anywhere undoes the durable stop of any of them."""
        for frozen in self.processes:
            frozen.stay_stopped()

    def kill(self) -> None:
        """End all of them, and wait for their ends as their tracer: their parents are told only then."""
        for frozen in self.processes:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(frozen.pidfd, signal.SIGKILL)
        for frozen in reversed(self.processes):
            # As tracer we are told of each thread's end before its parent is; the leader's comes last.
            for thread in (*frozen.threads[1:], *frozen.threads[:1]):
                with contextlib.suppress(ChildProcessError):
                    while ptrace.wait(thread.tid).ended is None:
                        pass
            frozen.threads = []

    def close(self) -> None:
        """Give the descriptors back."""
        for frozen in self.processes:
            frozen.close()


def _is_gone(face: int) -> bool:
    """Whether a thread that was stopped has ended, or is about to. Its pidfd tells only when its tracer has waited."""
    try:
        fields = procfs.stat(face)
        return fields[3] in "ZX" or bool(int(fields[9]) & _PF_EXITING)
    except OSError:
        return True


def _is_zombie(pid: int) -> bool:
    try:
        return procfs.stat(pid)[3] in "ZX" and len(procfs.tids(pid)) == 1
    except OSError:
        return False


def _is_ending(pid: int) -> bool:
    """Whether the last thread of a process is in exit(2), but not at its end."""
    try:
        fields = procfs.stat(pid)
        return bool(int(fields[9]) & _PF_EXITING) and fields[3] not in "ZX" and len(procfs.tids(pid)) == 1
    except OSError:
        return False
