"""What the descriptor tables of a tree share: who makes what, and where the others find it."""

from collections.abc import Mapping

from postcopy import in_flight
from postcopy.nesting import Nesting
from postcopy.open_kinds import Ghost
from postcopy.restore_side import unix_sockets
from postcopy.restore_side.birth import Newborn
from postcopy.restore_side.root import HERE, Root
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.state import Description, Descriptors, Pipe, Process, Tree


class Shared:
    """What the tables of a tree share: where descriptions, pipes and files without a name are to be had once they are
    there.

    Its first holder in the order of building makes it; the others take it from there. ``memory`` has been made before.
    """

    def __init__(
        self,
        tree: Tree,
        memory: SharedObjects,
        inherited: Mapping[str, int] | None = None,
        newborns: Mapping[int, Newborn] | None = None,
        root: Root = HERE,
    ) -> None:
        """``inherited``: which descriptor of the newborn processes is to take the place of which external resource;
        ``newborns``: these, once they are there; ``root``: their root directory."""
        self.root = root
        self.nesting = Nesting(tree.pid_namespaces)
        self.owners_of_places = {process.places_of for process in tree.processes} - {0}
        self.newborns = {} if newborns is None else newborns
        self.memory = memory
        self.descriptors: Descriptors = tree.descriptors
        self.inherited = inherited or {}
        self.descriptions: dict[int, tuple[int, int]] = {}
        self.pipes: dict[int, tuple[int, int]] = {}
        self.ghosts: dict[int, tuple[int, int]] = {}
        # Sockets that one process makes for others, and where it keeps them until these have them.
        self._for_others: dict[int, list[int]] = {}
        self.kept: dict[int, list[int]] = {}
        # What is only on its way in Unix sockets, by the process that makes it; and what fills these sockets.
        self.in_flight: dict[int, list[int]] = {}
        self.late: dict[int, unix_sockets.Builder] = {}
        for number, pid in in_flight.makers(tree).items():
            self.in_flight.setdefault(pid, []).append(number)
        for process in tree.processes:
            for slot in process.slots:
                where = process.pid, slot.fd
                description = self.descriptors.descriptions[slot.description]
                maker = description.unix.maker if description.unix is not None else 0
                if maker not in (0, process.pid) and slot.description not in self.descriptions:
                    self._for_others.setdefault(maker, []).append(slot.description)
                    where = maker, -1
                self._note(slot.description, where)
            for number in self.in_flight.get(process.pid, ()):
                self._note(number, (process.pid, -1))

    def _note(self, number: int, where: tuple[int, int]) -> None:
        """A description is to be had there, unless it is to be had elsewhere already."""
        description = self.descriptors.descriptions[number]
        self.descriptions.setdefault(number, where)
        if description.pipe is not None:
            self.pipes.setdefault(description.pipe.pipe, where)
        elif description.ghost is not None:
            self.ghosts.setdefault(description.ghost.ghost, where)

    def made_by(self, process: Process) -> list[Description]:
        """The descriptions that a process makes itself."""
        mine = [
            slot.description for slot in process.slots if self.descriptions[slot.description] == (process.pid, slot.fd)
        ]
        others = *self._for_others.get(process.pid, ()), *self.in_flight.get(process.pid, ())
        return [self.descriptors.descriptions[number] for number in (*mine, *others)]

    def keep(self, process: Process, sockets: Mapping[int, int]) -> list[int]:
        """Where the process keeps what it has made for others, out of ``sockets`` (by inode)."""
        for number in self._for_others.get(process.pid, ()):
            unix = self.descriptors.descriptions[number].unix
            if unix is not None:
                at = sockets[unix.socket.inode]
                self.descriptions[number] = process.pid, at
                self.kept.setdefault(process.pid, []).append(at)
        return self.kept.get(process.pid, [])

    def keep_in_flight(self, process: Process, number: int, at: int) -> None:
        """The process has made what nobody has open, and keeps it until it is sent."""
        description = self.descriptors.descriptions[number]
        self.descriptions[number] = process.pid, at
        if description.pipe is not None and self.pipes[description.pipe.pipe] == (process.pid, -1):
            self.pipes[description.pipe.pipe] = process.pid, at
        if description.ghost is not None and self.ghosts[description.ghost.ghost] == (process.pid, -1):
            self.ghosts[description.ghost.ghost] = process.pid, at
        self.kept.setdefault(process.pid, []).append(at)

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
