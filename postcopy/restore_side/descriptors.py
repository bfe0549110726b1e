"""The descriptor table: open everything again, in a table that is empty but for what `Plan` has put high up."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from postcopy.kernel.calls import call
from postcopy.kernel.executor import Batch
from postcopy.restore_side import files, memfds, pipes, terminals
from postcopy.restore_side.shared_memory import SharedObjects
from postcopy.state import Description, Descriptors, Process, Slot, Tree

_CLOSE_ALL = 0xFFFF_FFFF
_O_CLOEXEC = 0o2000000
_LENDER_AT = 3


class Shared:
    """What the tables of a tree share: where each description, and each pipe, is to be had once it has been built.

    Its first holder in the order of building makes it; the others take it from there. ``memory`` has been made before.
    """

    def __init__(self, tree: Tree, memory: SharedObjects) -> None:
        self.memory = memory
        self.descriptors: Descriptors = tree.descriptors
        self.descriptions: dict[int, tuple[int, int]] = {}
        self.pipes: dict[int, tuple[int, int]] = {}
        for process in tree.processes:
            for slot in process.slots:
                where = process.pid, slot.fd
                self.descriptions.setdefault(slot.description, where)
                if end := self.descriptors.descriptions[slot.description].pipe:
                    self.pipes.setdefault(end.pipe, where)

    def made_by(self, process: Process) -> list[Description]:
        """The descriptions that a process makes itself."""
        mine = (slot for slot in process.slots if self.descriptions[slot.description] == (process.pid, slot.fd))
        return [self.descriptors.descriptions[slot.description] for slot in mine]

    def content_of_pipes(self, process: Process) -> int:
        """Bytes in the pipes that a process makes itself."""
        mine = (number for number, (pid, _) in self.pipes.items() if pid == process.pid)
        return sum(len(self.descriptors.pipes[number].content) for number in mine)


@dataclass
class Plan:
    """Where descriptors lie while the table is being built: ``parked`` are above all that the program has.

    The kernel gives the lowest free number, so the numbers are known before a call is made: everything goes
    into one batch. ``streams`` is where the three standard streams that ``restore`` lends are parked, ``lender`` where
    the directory of its descriptors is (`birth.lender_number`).
    """

    batch: Batch
    pid: int
    shared: Shared
    park: int
    used: set[int] = field(default_factory=set)
    lowest: int = 0
    streams: int = 0
    lender: int = 0
    parked_pipes: dict[int, tuple[int, int]] = field(default_factory=dict)
    _holders: dict[int, int] = field(default_factory=dict)

    def next_fd(self) -> int:
        """The number that the next opened descriptor gets; it counts as used."""
        while self.lowest in self.used:
            self.lowest += 1
        self.used.add(self.lowest)
        return self.lowest

    def release(self, number: int) -> None:
        """A number that was used is free again."""
        self.used.discard(number)
        self.lowest = min(self.lowest, number)

    def settle(self, opened: int, fd: int, close_on_exec: bool, purpose: str) -> None:
        """Move a freshly opened descriptor to its number."""
        if opened == fd:
            self.batch.add(call("fcntl", fd, 2, int(close_on_exec)), purpose)
            return
        self.duplicate(opened, fd, close_on_exec, purpose)
        self.batch.add(call("close", opened), purpose)
        self.release(opened)

    def duplicate(self, old: int, fd: int, close_on_exec: bool, purpose: str) -> None:
        """Make ``fd`` refer to what ``old`` refers to."""
        self.batch.add(call("dup3", old, fd, _O_CLOEXEC if close_on_exec else 0), purpose)
        self.used.add(fd)

    def parking(self) -> int:
        """A number above all others."""
        self.park += 1
        return self.park - 1

    def borrow(self, pid: int, fd: int, purpose: str) -> int:
        """What is open as ``fd`` in another process, which has been built already: the number it gets here."""
        if pid not in self._holders:
            opened, parked = self.next_fd(), self.parking()
            self.batch.add(call("pidfd_open", pid, 0), purpose)
            self.batch.add(call("dup3", opened, parked, _O_CLOEXEC), purpose)
            self.batch.add(call("close", opened), purpose)
            self.release(opened)
            self._holders[pid] = parked
        opened = self.next_fd()
        self.batch.add(call("pidfd_getfd", self._holders[pid], fd, 0), purpose)
        return opened


# The fields of `Description`, and who builds what they hold.
_KINDS: dict[str, Callable[[Plan, Slot, Any], None]] = {
    "file": files.rebuild,
    "pipe": pipes.rebuild,
    "stream": terminals.rebuild,
    "memory": memfds.rebuild,
}


def highest(slots: list[Slot], shared: Shared) -> int:
    """One more than the highest number that building the table uses."""
    holders = {shared.descriptions[slot.description][0] for slot in slots}
    return _park(slots) + 4 + 2 * len(shared.descriptors.pipes) + 2 * len(holders)


def _park(slots: list[Slot]) -> int:
    return max((slot.fd for slot in slots), default=-1) + 5


def rebuild(process: Process, shared: Shared, batch: Batch) -> None:
    """Add the calls; before them, descriptors 0 to 2 are the standard streams that ``restore`` lends, and 3 is the
    directory of its descriptors."""
    plan = Plan(batch, process.pid, shared, park=_park(process.slots))
    plan.streams = plan.park
    for stream in range(3):
        # Without a purpose: a stream that ``restore`` does not have is missed only by those who want it.
        batch.add(call("dup3", stream, plan.parking(), _O_CLOEXEC))
    plan.lender = plan.parking()
    batch.add(call("dup3", _LENDER_AT, plan.lender, _O_CLOEXEC), "keeping the directory of lent descriptors")
    batch.add(call("close_range", 0, plan.streams - 1, 0), "clearing the descriptor table")
    first: dict[int, int] = {}
    for slot in process.slots:
        if slot.description in first:
            purpose = f"duplicating descriptor {slot.fd}"
            plan.duplicate(first[slot.description], slot.fd, slot.close_on_exec, purpose)
            continue
        first[slot.description] = slot.fd
        holder, fd = shared.descriptions[slot.description]
        if holder != process.pid:
            purpose = f"taking descriptor {slot.fd} from process {holder}"
            plan.settle(plan.borrow(holder, fd, purpose), slot.fd, slot.close_on_exec, purpose)
            continue
        description = shared.descriptors.descriptions[slot.description]
        for name, build in _KINDS.items():
            if (state := getattr(description, name)) is not None:
                build(plan, slot, state)
    batch.add(call("close_range", plan.streams, _CLOSE_ALL, 0), "closing what the table was built from")
