"""A process that is to leave this host, or to be written down: frozen, collected, and then given back or ended."""

import contextlib
import signal
import time
from types import TracebackType

from postcopy.dump_side import memory, signals, sleepers
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.collect import collect
from postcopy.dump_side.freeze import Frozen
from postcopy.dump_side.guard import Guard
from postcopy.dump_side.page_source import FrozenProcess, PageSource
from postcopy.kernel import ptrace
from postcopy.page_ranges import PageRanges
from postcopy.reporting import Reporter
from postcopy.state import LateSignal, Process, Tree

_SPACE = 0


class Capture:
    """Leaving the scope gives the process back, as if nothing had happened, unless `commit` or `end` was called."""

    tree: Tree
    sent: dict[int, PageRanges]
    lazy: dict[int, PageRanges]

    def __init__(
        self, pid: int, trusted_pipes: frozenset[int], reporter: Reporter, choices: Choices | None = None
    ) -> None:
        """``trusted_pipes``: what the survey said. Nothing is frozen yet."""
        self.frozen = Frozen(pid)
        self.committed = False
        self.began = 0
        self._reporter = reporter
        self._trusted_pipes = trusted_pipes
        self._choices = choices or Choices()
        self._guard = Guard(self.frozen.pidfd)
        self._smaps = memory.SmapsReader(pid)
        self._sleeping = sleepers.observe(pid)

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.committed:
            self.frozen.let_go()
        else:
            self.frozen.thaw()
        self._smaps.close()
        self._guard.dismiss()
        self.frozen.close()

    def take(self) -> None:
        """Freeze the process and collect its state. Raises DumpError, ProblemsError."""
        self.began = time.monotonic_ns()
        self.frozen.freeze()
        self._smaps.begin()
        self._reporter.event("frozen", threads=len(self.frozen.threads))
        process, pages, needed = collect(
            self.frozen, _SPACE, self._smaps, self._trusted_pipes, self._sleeping, self._choices
        )
        self.tree = Tree([process], needed)
        self.sent, self.lazy = {_SPACE: pages.sent}, {_SPACE: pages.lazy}
        self._reporter.event("collected", vmas=len(process.memory.vmas))

    @property
    def sources(self) -> dict[int, PageSource]:
        """Where the pages of each address space come from."""
        return {_SPACE: FrozenProcess(self.frozen.pid, self.frozen.memory)}

    def content(self) -> bytes:
        """The content of the pages that travel with the state."""
        return memory.contents(self.frozen.memory, self.sent[_SPACE])

    def late_signals(self) -> list[LateSignal]:
        """The signals that have come since the state was collected."""
        return signals.late(self.frozen, self._process)

    @property
    def _process(self) -> Process:
        return self.tree.processes[0]

    def stop(self) -> None:
        """Stop the process durably, one step before commit; if we die from here on, the guard wakes it."""
        self._guard.stopping()
        self.frozen.stop_durably()

    def commit(self) -> None:
        """Whoever dies from here on: nobody wakes the process."""
        self._guard.committing()
        self.committed = True
        self.frozen.stay_stopped()

    def end(self) -> None:
        """The process is of no more use here."""
        frozen = self.frozen
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(frozen.pidfd, signal.SIGKILL)
        # As tracer we are told of each thread's end before its parent is; the leader's comes last.
        for thread in (*frozen.threads[1:], frozen.threads[0]):
            with contextlib.suppress(ChildProcessError):
                while ptrace.wait(thread.tid).ended is None:
                    pass
        frozen.threads = []
        self._reporter.event("killed", pid=frozen.pid)
