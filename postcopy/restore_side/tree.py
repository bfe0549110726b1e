"""Build a whole tree, stopped, out of its state: first its processes are born, then one after the other is built."""

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from postcopy.errors import RestoreError
from postcopy.kernel import ptrace
from postcopy.page_ranges import PageRanges
from postcopy.restore_side import ptys, signals
from postcopy.restore_side.birth import Newborn
from postcopy.restore_side.build import Building, Built
from postcopy.restore_side.fault_handler import HandedSpace
from postcopy.restore_side.memory import lazy_parts, lazy_vmas
from postcopy.restore_side.offspring import bring_up
from postcopy.restore_side.root import HERE, Root
from postcopy.restore_side.shared_descriptors import Shared
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.restore_side.unix_meetings import Meetings
from postcopy.sent_pages import SentPages
from postcopy.spaces import filled_first, huge_areas, spaces_of
from postcopy.state import LateSignal, Tree


@dataclass
class BuiltTree:
    """A tree that is ready to go on; it dies with us until `resume`. The root is the first."""

    tree: Tree
    processes: list[Built]
    memory: SharedObjects

    @property
    def root(self) -> Built:
        """The process that the user named."""
        return self.processes[0]

    def spaces(self) -> list[HandedSpace]:
        """Its address spaces, with the pages that are missing."""
        huge = huge_areas(self.tree)
        return [
            HandedSpace(
                built.state.space,
                built.uffd,
                PageRanges.unpack(built.state.memory.lazy),
                lazy_parts(built.state.memory, self.memory),
                PageRanges.from_pairs((r.start, r.stop) for r in lazy_vmas(built.state.memory, self.memory)),
                huge.get(built.state.space),
            )
            for built in self.processes
        ]

    def close_userfaultfds(self) -> None:
        """Once the daemon has them, it alone is to keep the memory waiting for pages."""
        for built in self.processes:
            os.close(built.uffd)
            built.uffd = -1

    def resume(self, late: list[LateSignal]) -> None:
        """Let all of it run: from here on it no longer depends on us. ``late``: signals that came last."""
        by_pid = {built.state.pid: built for built in self.processes}
        for each in late:
            if target := by_pid.get(each.pid):
                tids = dict(zip((thread.tid for thread in target.state.threads), target.tids, strict=True))
                signals.send(each, target.pid, tids.get(each.tid))
        for built in self.processes:
            for tid in built.tids:
                ptrace.detach(tid)


def build_tree(
    tree: Tree,
    pages: SentPages,
    root: Newborn,
    newborns: dict[int, Newborn],
    memory: SharedObjects,
    parent_stays: bool,
    inherited: Mapping[str, int] | None = None,
    directory: Root = HERE,
) -> BuiltTree:
    """Build ``tree`` around ``root``; ``inherited``: which descriptor of ours, and of ``root``, is to take the place of
    which external resource; ``pages``: the content of the pages that came with it, as `spaces_of` orders it;
    ``directory``: its root directory.

    Every process is in ``newborns`` as soon as it is there, and ``memory`` has what of the tree's is not of one process
    alone. Raises RestoreError; all of them are then to be killed, and ``memory`` undone.
    """
    if not tree.processes or tree.processes[0].pid != root.number:
        raise RestoreError("the state is not that of the process which the manifest announced")
    counts = [space.sent.total_pages for space in spaces_of(tree)]
    if sum(counts) != pages.total:
        raise RestoreError(f"{pages.total} pages came with the state, which names {sum(counts)}")
    shared = Shared(tree, memory, inherited, newborns, directory)
    ptys.set_up(tree.descriptors.ptys, root.pidfd, inherited or {})
    try:
        bring_up(tree, root, newborns)
    except OSError as error:
        raise RestoreError(f"making the processes of the tree: {error.strerror}") from None
    of_processes = sum(counts[: len(tree.processes)])
    memory.make(tree.shared_memory, pages.part(of_processes, pages.total), filled_first(tree))
    buildings = [Building(process, newborns[process.pid], shared, parent_stays) for process in tree.processes]
    places = accumulate(counts, initial=0)
    parts = [pages.part(place, count) for place, count in zip(places, counts[: len(buildings)], strict=False)]
    begun = [
        (process, building.begin(part))
        for process, building, part in zip(tree.processes, buildings, parts, strict=True)
    ]
    _by_turns(begin for process, begin in begun if not process.table_of)
    # Those that share a table clear it: one after the other, once its owner has begun.
    for begin in (begin for process, begin in begun if process.table_of):
        _by_turns([begin])
    meetings = Meetings(tree, shared, {building.built.state.pid: building.act for building in buildings})
    meetings.meet()
    with contextlib.closing(shared.ended):
        for building in buildings:
            building.open()
    meetings.complete()
    for building in buildings:
        building.connect()
    _by_turns(building.finish() for building in buildings)
    return BuiltTree(tree, [building.built for building in buildings], memory)


def _by_turns(works: Iterable[Iterator[None]]) -> None:
    """A step of one after that of another: while a process makes its calls, the next ones are given theirs."""
    waiting = deque(works)
    while waiting:
        work = waiting.popleft()
        if next(work, work) is None:
            waiting.append(work)
