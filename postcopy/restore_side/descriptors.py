"""The descriptor table: open everything again, in a table that is empty but for what `Plan` has put high up."""

from dataclasses import dataclass, field

from postcopy.kernel.calls import call
from postcopy.kernel.executor import Batch
from postcopy.restore_side import files, pipes, terminals
from postcopy.state import Descriptors

_CLOSE_ALL = 0xFFFF_FFFF
_O_CLOEXEC = 0o2000000


@dataclass
class Plan:
    """Where descriptors lie while the table is being built: ``parked`` are above all that the program has.

    The kernel gives the lowest free number, so the numbers are known before a call is made: everything goes
    into one batch.
    """

    batch: Batch
    state: Descriptors
    used: set[int] = field(default_factory=set)
    park: int = 0
    lowest: int = 0

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


def highest(state: Descriptors) -> int:
    """One more than the highest number that building the table uses."""
    return max((slot.fd for slot in state.slots), default=-1) + 1 + 3 + 2 * len(state.pipes) + 1


def rebuild(state: Descriptors, batch: Batch) -> None:
    """Add the calls; before them, descriptors 0 to 2 are the standard streams that ``restore`` lends."""
    plan = Plan(batch, state, park=max((slot.fd for slot in state.slots), default=-1) + 4)
    streams = plan.park
    for stream in range(3):
        # Without a purpose: a stream that ``restore`` does not have is missed only by those who want it.
        batch.add(call("dup3", stream, plan.parking(), _O_CLOEXEC))
    batch.add(call("close_range", 0, streams - 1, 0), "clearing the descriptor table")
    parked_pipes = [pipes.rebuild(plan, pipe) for pipe in state.pipes]
    first: dict[int, int] = {}
    for slot in state.slots:
        description = state.descriptions[slot.description]
        if slot.description in first:
            plan.duplicate(first[slot.description], slot.fd, slot.close_on_exec, f"duplicating descriptor {slot.fd}")
            continue
        first[slot.description] = slot.fd
        if description.file is not None:
            files.rebuild(plan, slot, description.file)
        elif description.pipe is not None:
            pipes.open_end(plan, slot, description.pipe, parked_pipes[description.pipe.pipe])
        elif description.stream is not None:
            terminals.rebuild(plan, slot, description.stream, streams)
    batch.add(call("close_range", streams, _CLOSE_ALL, 0), "closing what the table was built from")
