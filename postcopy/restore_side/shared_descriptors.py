"""What the descriptor tables of a tree share: who makes what, and where the others find it."""

import functools
from collections.abc import Iterator, Mapping

from postcopy import in_flight
from postcopy.nesting import Nesting
from postcopy.open_kinds import Ghost
from postcopy.restore_side import unix_meetings
from postcopy.restore_side.birth import Newborn
from postcopy.restore_side.ended import EndedProcesses
from postcopy.restore_side.ipc import IpcObjects
from postcopy.restore_side.root import HERE, Root
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.state import Description, Descriptors, Pipe, Process, Tree

# Processes that open their files while the next one is told what to open.
_AT_ONCE = 2


class Shared:
    """What the tables of a tree share: where descriptions, pipes and files without a name are to be had once they are
    there.

    Its first holder in the order of building makes it; the others take it from there. ``memory`` has been made before.
    """

    def __init__(
        self,
        tree: Tree,
        memory: SharedObjects,
        numbered: IpcObjects,
        inherited: Mapping[str, int] | None = None,
        newborns: Mapping[int, Newborn] | None = None,
        root: Root = HERE,
    ) -> None:
        """``numbered``: what processes share by number; ``inherited``: which descriptor of the newborn processes is to
        take the place of which external resource; ``newborns``: these, once they are there; ``root``: their root
        directory."""
        self.root = root
        self.nesting = Nesting(tree.pid_namespaces)
        self.newborns = {} if newborns is None else newborns
        self.memory = memory
        self.numbered = numbered
        self.descriptors: Descriptors = tree.descriptors
        self.ended = EndedProcesses(tree.descriptors.descriptions)
        self.inherited = inherited or {}
        self.descriptions: dict[int, tuple[int, int]] = {}
        self.pipes: dict[int, tuple[int, int]] = {}
        self.ghosts: dict[int, tuple[int, int]] = {}
        # What a process has made before all tables, or for others only, and where it keeps that until these have it.
        self.kept: dict[int, list[int]] = {}
        # The sockets (by inode) that are completed when all tables are there; the far ends of those that have lost
        # theirs, where they are.
        self.late_sockets = unix_meetings.late_sockets(tree)
        self.far: dict[int, tuple[int, int]] = {}
        self._met: dict[int, list[int]] = {}
        self._connecting: frozenset[int] | None = None
        # Tables that are being made.
        self._opening: dict[int, Iterator[None]] = {}
        # What is only on its way in Unix sockets, by the process that makes it.
        self.in_flight: dict[int, list[int]] = {}
        for number, description in enumerate(self.descriptors.descriptions):
            if description.unix is not None and description.unix.maker:
                self._met.setdefault(description.unix.maker, []).append(number)
                self.descriptions[number] = description.unix.maker, -1
        for number, pid in in_flight.makers(tree).items():
            if number not in self.descriptions:
                self.in_flight.setdefault(pid, []).append(number)
        for process in tree.processes:
            for slot in process.slots:
                self._note(slot.description, (process.pid, slot.fd))
            for number in self.in_flight.get(process.pid, ()):
                self._note(number, (process.pid, -1))

    @functools.cached_property
    def needed_late(self) -> tuple[int, int]:
        """What completing sockets late takes (`unix_meetings.needed`)."""
        found = ((one, one.unix) for one in self.descriptors.descriptions)
        late = self.late_sockets
        return unix_meetings.needed(one for one, unix in found if unix is not None and unix.socket.inode in late)

    def connecting(self) -> frozenset[int]:
        """The processes that have to do with the files of others, or their own, once all tables are there; most have
        not.
        """
        if self._connecting is None:
            found, where = self.descriptors, self.descriptions
            kinds = ("timer", "epoll", "inotify", "fanotify")
            late = (n for n, one in enumerate(found.descriptions) if any(getattr(one, kind) for kind in kinds))
            numbers = [*late, *(each.description for each in found.deliveries)]
            owners = [lock.owner or where[lock.description][0] for lock in found.locks]
            sessions = [pty.session for pty in found.ptys]
            self._connecting = frozenset([*(where[number][0] for number in numbers), *owners, *sessions])
        return self._connecting

    def _note(self, number: int, where: tuple[int, int]) -> None:
        """A description is to be had there, unless it is to be had elsewhere already."""
        description = self.descriptors.descriptions[number]
        self.descriptions.setdefault(number, where)
        if description.pipe is not None:
            self.pipes.setdefault(description.pipe.pipe, where)
        elif description.ghost is not None:
            self.ghosts.setdefault(description.ghost.ghost, where)

    def open(self, process: Process, opening: Iterator[None]) -> None:
        """Have a process open its files, those before it in the order of building having begun with that.

        ``opening``: in steps; after each it is busy on its own for a while.
        """
        others_wait = process.table_of or process.places_of or self.nesting.mounts(process.pid)
        if others_wait:
            self.await_tables()
        self._opening[process.pid] = opening
        next(opening, None)
        while len(self._opening) > (0 if others_wait else _AT_ONCE):
            self.await_table(next(iter(self._opening)))

    def await_table(self, pid: int) -> None:
        """Until a process that has begun has opened its files."""
        for _ in self._opening.pop(pid, ()):
            pass

    def await_tables(self) -> None:
        """Until all have."""
        for pid in list(self._opening):
            self.await_table(pid)

    def made_by(self, process: Process) -> list[Description]:
        """The descriptions that a process makes itself."""
        mine = [
            slot.description for slot in process.slots if self.descriptions[slot.description] == (process.pid, slot.fd)
        ]
        return [self.descriptors.descriptions[number] for number in (*mine, *self.in_flight.get(process.pid, ()))]

    def met_by(self, process: Process) -> list[Description]:
        """The sockets that a process makes before it has a table."""
        return [self.descriptors.descriptions[number] for number in self._met.get(process.pid, ())]

    def sockets_met(self, pid: int) -> dict[int, int]:
        """Where a process keeps those that it has made before it had a table, by inode."""
        made = ((self.descriptors.descriptions[number].unix, number) for number in self._met.get(pid, ()))
        return {one.socket.inode: self.descriptions[number][1] for one, number in made if one is not None}

    def keep(self, pid: int, number: int, at: int) -> None:
        """The process has made what it or others are to have, and keeps it until these have it."""
        self.descriptions[number] = pid, at
        self.kept.setdefault(pid, []).append(at)

    def keep_far(self, pid: int, inode: int, at: int) -> None:
        """The same of the far end of a connection whose other end is to have lost it."""
        self.far[inode] = pid, at
        self.kept.setdefault(pid, []).append(at)

    def close_far(self, inode: int) -> int:
        """The process closes a far end now; where it is."""
        pid, at = self.far.pop(inode)
        self.kept[pid].remove(at)
        return at

    def keep_in_flight(self, process: Process, number: int, at: int) -> None:
        """The process has made what nobody has open, and keeps it until it is sent."""
        description = self.descriptors.descriptions[number]
        if description.pipe is not None and self.pipes[description.pipe.pipe] == (process.pid, -1):
            self.pipes[description.pipe.pipe] = process.pid, at
        if description.ghost is not None and self.ghosts[description.ghost.ghost] == (process.pid, -1):
            self.ghosts[description.ghost.ghost] = process.pid, at
        self.keep(process.pid, number, at)

    def taken(self, description: int, process: Process, fd: int) -> None:
        """From now on the process is the one that others take ``description`` from, if it was made for others."""
        pid, at = self.descriptions[description]
        if at in self.kept.get(pid, ()):
            self.descriptions[description] = process.pid, fd

    def pipes_made_by(self, process: Process) -> list[Pipe]:
        """The pipes that a process makes itself."""
        return [self.descriptors.pipes[number] for number, (pid, _) in self.pipes.items() if pid == process.pid]

    def ghosts_made_by(self, process: Process) -> list[tuple[Ghost, int]]:
        """The files without a name that a process makes itself, and a descriptor of each."""
        return [
            (self.descriptors.ghosts[number], fd) for number, (pid, fd) in self.ghosts.items() if pid == process.pid
        ]
