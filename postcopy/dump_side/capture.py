"""A tree that is to leave this host, or to be written down: frozen, collected, and then given back or ended."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from postcopy.action_scripts import Action
from postcopy.deadline import uninterrupted
from postcopy.dump_side import mqueues, network, signals, sleepers, socket_changes, socket_looks
from postcopy.dump_side.choices import MOVED, Choices
from postcopy.dump_side.collect import collect
from postcopy.dump_side.frozen_tree import FrozenTree
from postcopy.dump_side.guard import Guard
from postcopy.dump_side.ipc import IpcObjects
from postcopy.dump_side.looks import Looker
from postcopy.dump_side.opened import Trusted
from postcopy.dump_side.page_source import FrozenProcess
from postcopy.dump_side.sent_pages import PageReader
from postcopy.dump_side.shared_memory import SharedObjects
from postcopy.dump_side.smaps import SmapsReader
from postcopy.errors import DumpError
from postcopy.kernel import procfs
from postcopy.kernel.pagemap import Pagemap
from postcopy.network_lock import NetworkLock
from postcopy.page_ranges import PageRanges
from postcopy.reporting import Reporter
from postcopy.sent_pages import PageSource
from postcopy.socket_kinds import SocketChange
from postcopy.spaces import huge_areas, spaces_of
from postcopy.state import LateSignal, Process, Tree


class Capture:
    """Leaving the scope gives the tree back, as if nothing had happened, unless `commit` or `end` was called.

    ``sources``: where the pages of each space come from; ``sent``, ``lazy``: which of them travel when.
    """

    tree: Tree
    sources: dict[int, PageSource]
    sent: dict[int, PageRanges]
    lazy: dict[int, PageRanges]

    def __init__(
        self,
        pid: int,
        trusted: Trusted,
        reporter: Reporter,
        choices: Choices | None = None,
        *,
        foresees: bool = False,
    ) -> None:
        """``trusted``: what the survey said. Nothing is frozen yet. ``foresees``: much of connections is taken as it is
        just before the freeze; `changes` has to be asked for what was otherwise."""
        self.frozen = FrozenTree(pid)
        self.committed = False
        self.began = 0
        self._reporter = reporter
        self._trusted = trusted
        self._choices = choices or Choices()
        self._shared = SharedObjects()
        self._numbered = IpcObjects()
        self._foresees = foresees
        self._ended = False
        self._collects_garbage = False
        self._gave_up_addresses = False
        # Before anything is forked that is to share it.
        self._lock = NetworkLock(self._choices.network_lock, f"postcopy-{os.getpid()}")
        self._guard = Guard(self._lock, self._choices.scripts, pid)
        self._silence = network.Silence(self._lock, self._choices, self._guard.locking)
        self._smaps = SmapsReader(trusted.known)
        self._looker = Looker(trusted.known)

    def __enter__(self) -> "Capture":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if not self.committed and isinstance(error, (DumpError, OSError, LookupError, ValueError)):
                # What is read of a process that has ended can be anything.
                self.frozen.check_alive()
        finally:
            self._leave()

    def _leave(self) -> None:
        self._looker.close()
        if self.committed:
            self.frozen.let_go()
        else:
            if self._looker.is_taking_apart:
                # It has ended in the middle of that.
                network.heal(self.frozen.faces)
            if not self._ended:
                self._unlock()
            self.frozen.thaw()
        self._smaps.close()
        if self.committed and not self._ended and self._lock.is_locked:
            self._guard.leave()
            self._lock.leave()
        else:
            self._guard.dismiss()
            network.outlast(self._lock, self._silence.traffic)
        self._shared.close()
        self.frozen.close()
        if self._collects_garbage:
            gc.enable()

    def take(self, tell: Callable[[Process, PageReader], None] | None = None) -> PageReader:
        """Freeze the tree and collect its state; what reads its pages. Raises DumpError, ProblemsError.

        ``tell`` is told of each process as soon as that has been collected, with what reads its pages by then.
        """
        # A collection of what is garbage takes tens of milliseconds where a tree has many processes.
        self._collects_garbage = gc.isenabled()
        gc.disable()
        root = self.frozen.root.pid
        pids = [root, *procfs.descendants(root)]
        # Not later: from then on, nobody new can connect.
        if self._foresees and self._choices.connections == MOVED:
            self._looker.foresee(socket_looks.Known(self._trusted.sockets))
        self._silence.prepare(list(_faces(pids)))
        locked = frozenset(self._silence.locked)
        known = socket_looks.Known(self._trusted.sockets if locked else {}, locked)
        self._looker.begin(known)
        sleeping = {tid: seen for pid in pids for tid, seen in _asleep(pid)}
        self.began = time.monotonic_ns()
        self.frozen.freeze()
        self._silence.begin(self.frozen.faces)
        self._reporter.event("frozen", processes=len(self.frozen.processes), threads=self.frozen.threads)
        if self._choices.scripts.paths:
            self._guard.giving_up_addresses()
            self._gave_up_addresses = True
            self._choices.scripts.run(Action.NETWORK_LOCK, self.frozen.root.pid)
        self.sources = self._sources()
        reader = self.page_reader()

        def collected(state: Process) -> None:
            if tell is not None:
                tell(state, reader)

        self.tree = collect(
            self.frozen,
            self._smaps,
            self._looker,
            self._trusted,
            sleeping,
            self._shared,
            self._choices,
            self._numbered,
            self._silence.cover,
            known,
            collected,
        )
        self.sources.update(self._shared.sources)
        spaces = spaces_of(self.tree)
        self.sent = {space.number: space.sent for space in spaces}
        self.lazy = {space.number: space.lazy for space in spaces}
        self._reporter.event("collected", vmas=sum(len(process.memory.vmas) for process in self.tree.processes))
        return reader

    def changes(self) -> list[SocketChange]:
        """What is otherwise than ``tree`` says; once. Raises DumpError for what cannot be changed any more."""
        return socket_changes.changes(self._looker.otherwise(), self.tree)

    def verify(self) -> None:
        """To be called once before the tree is given away. Raises DumpError where ``tree`` is not how it is."""
        self._smaps.verify()

    def _unlock(self) -> None:
        """The network is the tree's again. Whoever has taken its addresses away brings them back before."""
        if self._gave_up_addresses:
            with uninterrupted():
                self._choices.scripts.report(Action.NETWORK_UNLOCK, self.frozen.root.pid)
        self._lock.unlock()

    def _sources(self) -> dict[int, PageSource]:
        """Where the pages of each process come from."""
        processes, pagemaps = self.frozen.processes, self._pagemaps
        return {n: FrozenProcess(each.face, each.memory, pagemaps.get(n)) for n, each in enumerate(processes)}

    @property
    def _pagemaps(self) -> dict[int, Pagemap]:
        """Those of processes that may have pages in common."""
        processes = self.frozen.processes
        return {n: each.pagemap for n, each in enumerate(processes)} if len(processes) > 1 else {}

    def page_reader(self) -> PageReader:
        """What reads the pages that are sent, from the first one on."""
        return PageReader(self.sources, self._pagemaps)

    def to_write(self, space: int) -> tuple[PageRanges, PageRanges]:
        """Which pages are written whatever they hold, and which unless they are zero.

        No parts of huge pages, which can only be filled whole.
        """
        huge = huge_areas(self.tree).get(space)
        whole = huge.of(self.lazy[space]) if huge else PageRanges()
        return self.sent[space].union(whole), self.lazy[space].subtract(whole)

    def late_signals(self) -> list[LateSignal]:
        """The signals that have come since the state was collected."""
        pairs = zip(self.frozen.processes, self.tree.processes, strict=True)
        return [late for frozen, state in pairs for late in signals.late(frozen, state)]

    def stop(self) -> None:
        """Stop the tree durably, one step before commit; if we die from here on, the guard wakes it."""
        self._guard.stopping(self.frozen.pidfds_to_wake)
        self.frozen.stop_durably()

    def commit(self) -> None:
        """Whoever dies from here on: nobody wakes the tree."""
        self._guard.committing()
        self.committed = True
        self.frozen.stay_stopped()

    def end(self) -> None:
        """The tree is of no more use here."""
        if self._choices.connections == MOVED:
            network.silence(self.frozen.faces)
        self.frozen.kill()
        self._ended = True
        self._shared.end()
        self._numbered.end()
        mqueues.end(self.tree.descriptors.queues)
        self._reporter.event("killed", pid=self.frozen.root.pid)


def _faces(pids: Sequence[int]) -> Iterator[int]:
    """See `procfs.face`; of processes that may have ended."""
    for pid in pids:
        with contextlib.suppress(OSError):
            yield procfs.face(pid)


def _asleep(pid: int) -> Iterator[tuple[int, sleepers.Observation]]:
    """The sleeping threads of a process, which may have ended."""
    with contextlib.suppress(OSError):
        yield from sleepers.observe(pid).items()
