"""Build a whole tree, stopped, out of its state: first its processes are born, then one after the other is built."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

from msgspec import Struct

from postcopy.errors import RestoreError
from postcopy.kernel import ptrace
from postcopy.nesting import Nesting
from postcopy.page_ranges import PageRanges
from postcopy.restore_side import ptys, signals
from postcopy.restore_side.birth import Newborn
from postcopy.restore_side.build import Building, Built, room_to_join
from postcopy.restore_side.fault_handler import HandedSpace
from postcopy.restore_side.groundwork import Groundwork, room_for_state
from postcopy.restore_side.ipc import IpcObjects
from postcopy.restore_side.memory import lazy_parts, lazy_vmas
from postcopy.restore_side.offspring import Family, bring_up
from postcopy.restore_side.root import HERE, Root
from postcopy.restore_side.shared_descriptors import Shared
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.restore_side.unix_meetings import Meetings
from postcopy.sent_pages import SentPages
from postcopy.spaces import filled_first, huge_areas, spaces_of
from postcopy.state import Draft, LateSignal, Process, Tree
from postcopy.turns import by_turns


class BuiltTree(Struct):
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


class Begun:
    """The processes of a tree, born and with their layouts, as far as these are known before the tree is frozen.

    ``newborns`` has every process as soon as it is there; ``buildings``: those of which more has been begun.
    """

    def __init__(
        self, family: Family, root: Newborn, newborns: dict[int, Newborn], inherited: Mapping[str, int] | None = None
    ) -> None:
        """Have them born. Raises RestoreError; all of them are then to be killed."""
        if next(iter(family.relatives), 0) != root.number:
            raise RestoreError("the state is not that of the process which the manifest announced")
        self.family = family
        self.newborns = newborns
        self.inherited = inherited or {}
        self.buildings: dict[int, Building] = {}
        ptys.set_up(family.ptys, root.pidfd, self.inherited)
        bring_up(family, root, newborns)
        self._nesting = Nesting(family.namespaces)
        owns = {pid: self._nesting.own(pid) for pid in newborns}
        self.groundwork = {
            pid: Groundwork(newborn, (owns[pid], owns[pid]), self.inherited) for pid, newborn in newborns.items()
        }

    def lay_out(self, draft: Draft) -> None:
        """Give each process the layout that it has in the draft whose family this is. Raises RestoreError."""
        layings = {
            each.pid: self.groundwork[each.pid].lay_out(each.memory, bool(each.table_of), room_for_state(each))
            for each in draft.processes
        }
        _owners_first(layings, self.family)

    def begin(
        self, process: Process, pages: SentPages, objects: SharedObjects, parent_stays: bool, room: int = 0
    ) -> Iterator[None]:
        """Begin to build a process (`Building.begin`); ``pages``: those that came with it; ``objects``: as far as they
        are there; ``room``: as of `Building`. Raises RestoreError."""
        pid = process.pid
        building = Building(process, self.newborns[pid], self.groundwork[pid], self._nesting, parent_stays, room)
        self.buildings[pid] = building
        return building.begin(pages, objects)

    def can_begin(self, process: Process) -> bool:
        """Whether a process can be begun before the tree is known: it needs nothing of others."""
        pid = process.pid
        if self.family.relatives.get(pid) != process.lineage or pid in self.family.tables or process.table_of:
            return False
        has_objects = any(vma.backing == "object" for vma in process.memory.vmas)
        return not has_objects and self.groundwork[pid].can_grow(process.memory)

    def give_up(self) -> None:
        """The processes are to be killed."""
        for building in self.buildings.values():
            building.give_up()


def build_tree(
    tree: Tree,
    pages: SentPages,
    begun: Begun,
    memory: SharedObjects,
    numbered: IpcObjects,
    parent_stays: bool,
    directory: Root = HERE,
    before_sockets: Callable[[], None] = lambda: None,
) -> BuiltTree:
    """Build ``tree`` out of what has been ``begun`` of it, which is of its family; ``pages``: the content of the pages
    that came with it, as `spaces_of` orders it; ``directory``: its root directory; ``before_sockets``: what is to be
    done before any socket is made.

    ``memory`` and ``numbered`` have what of the tree's is not of one process alone. Raises RestoreError; all processes
    are then to be killed, and these undone.
    """
    newborns = begun.newborns
    counts = [space.sent.total_pages for space in spaces_of(tree)]
    if sum(counts) != pages.total:
        raise RestoreError(f"{pages.total} pages came with the state, which names {sum(counts)}")
    shared = Shared(tree, memory, numbered, begun.inherited, newborns, directory)
    numbered.make(tree)
    of_processes = sum(counts[: len(tree.processes)])
    memory.make(tree.shared_memory, pages.part(of_processes, pages.total), filled_first(tree))
    beginnings = {
        process.pid: begun.begin(process, pages.part(place, count), memory, parent_stays, room_to_join(process, shared))
        for process, place, count in zip(tree.processes, accumulate(counts, initial=0), counts, strict=False)
        if process.pid not in begun.buildings
    }
    _owners_first(beginnings, begun.family)
    buildings = [begun.buildings[process.pid] for process in tree.processes]
    for building in buildings:
        building.join(shared)
    before_sockets()
    meetings = Meetings(tree, shared, {building.built.state.pid: building.act for building in buildings})
    meetings.meet()
    with contextlib.closing(shared.ended):
        for building in buildings:
            shared.open(building.built.state, building.open())
        shared.await_tables()
    meetings.complete()
    for building in buildings:
        building.connect()
    by_turns(building.finish() for building in buildings)
    return BuiltTree(tree, [building.built for building in buildings], memory)


def _owners_first(works: Mapping[int, Iterator[None]], family: Family) -> None:
    """By turns; but those that share a table use it for a while: one after the other, once its owner has done so."""
    by_turns(work for pid, work in works.items() if pid not in family.tables)
    for work in (work for pid, work in works.items() if pid in family.tables):
        by_turns([work])
