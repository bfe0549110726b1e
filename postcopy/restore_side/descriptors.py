"""The descriptor table: open everything again, in a table that is empty but for what `Plan` has put high up.

In three steps: a batch that opens everything (`rebuild`), contents that are written from outside (`fill`), and a batch
for what refers to all of it, or must not notice how it was made (`connect`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from postcopy.kernel.calls import call
from postcopy.kernel.executor import Answers, Batch
from postcopy.restore_side import (
    deliveries,
    epoll,
    eventfd,
    external,
    files,
    ghosts,
    inotify,
    locks,
    pidfd,
    pipes,
    signalfd,
    terminals,
    timerfd,
)
from postcopy.state import Descriptors, Slot

_CLOSE_ALL = 0xFFFF_FFFF
_O_CLOEXEC = 0o2000000
_F_SETFD, _F_SETFL = 2, 4
_STREAMS = 3
_MOST_LENT = 16  # what is not known when the limit is set


@dataclass
class Plan:
    """Where descriptors lie while the table is being built: what is parked lies where the program has nothing.

    The kernel gives the lowest free number, so the numbers are known before a call is made: everything goes
    into one batch. ``streams``: where those are parked that ``restore`` lends; ``inherited``: and
    what it was given for external resources; ``pipes`` and ``ghosts``: the ends of
    each pipe, and each file without a name, by number. ``taken``: parked ends that the program has got themselves.
    ``places``: a descriptor of each description, and ``slots`` by their numbers, once they are there.
    """

    batch: Batch
    state: Descriptors
    spaces: Iterator[int]
    used: set[int] = field(default_factory=set)
    lowest: int = 0
    parked: list[int] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    inherited: dict[str, int] = field(default_factory=dict)
    pipes: list[tuple[int, int]] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    ghosts: list[int] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    slots: dict[int, Slot] = field(default_factory=dict)

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
            self.batch.add(call("fcntl", fd, _F_SETFD, int(close_on_exec)), purpose)
            return
        self.duplicate(opened, fd, close_on_exec, purpose)
        self.close(opened)

    def duplicate(self, old: int, fd: int, close_on_exec: bool, purpose: str) -> None:
        """Make ``fd`` refer to what ``old`` refers to."""
        self.batch.add(call("dup3", old, fd, _O_CLOEXEC if close_on_exec else 0), purpose)
        self.used.add(fd)

    def set_flags(self, fd: int, flags: int, purpose: str) -> None:
        """Set the status flags that can be set later."""
        self.batch.add(call("fcntl", fd, _F_SETFL, flags), purpose)

    def close(self, fd: int) -> None:
        """Close what was opened for a while."""
        self.batch.add(call("close", fd), "closing what is open for a while")
        self.release(fd)

    def park(self, opened: int, purpose: str) -> int:
        """Move a freshly opened descriptor out of the way until the table is built; its number there."""
        place = self.parking()
        self.duplicate(opened, place, True, purpose)
        self.close(opened)
        return place

    def parking(self) -> int:
        """A number where nothing of the program's is."""
        place = next(self.spaces, None)
        if place is None:
            raise ValueError("it leaves no descriptor number free")
        self.used.add(place)
        self.parked.append(place)
        return place


Opener = Callable[[Plan, Slot, Any], None]

_KINDS: dict[str, Opener] = {
    "file": files.rebuild,
    "pipe": pipes.open_end,
    "stream": terminals.rebuild,
    "ghost": ghosts.open_ghost,
    "event_counter": eventfd.rebuild,
    "timer": timerfd.rebuild,
    "signals": signalfd.rebuild,
    "epoll": epoll.rebuild,
    "inotify": inotify.rebuild,
    "process": pidfd.rebuild,
    "external": external.rebuild,
}


def spaces(state: Descriptors, limit: int, lent: int = 0) -> Iterator[int]:
    """Numbers where the table has nothing, from just above the highest on, then in gaps; all below ``limit``.

    The first ``lent`` numbers are taken by what is lent.
    """
    taken = {*range(lent), *(slot.fd for slot in state.slots)}
    above = max(taken, default=-1) + 1
    yield from range(above, limit)
    yield from (number for number in range(min(above, limit) - 1, -1, -1) if number not in taken)


def needed(state: Descriptors) -> int:
    """How many numbers are used beside those of the table."""
    return _STREAMS + _MOST_LENT + 2 * len(state.pipes) + len(state.ghosts) + 8


def highest(state: Descriptors) -> int:
    """One more than the highest number that building the table would like to use."""
    return max((slot.fd for slot in state.slots), default=-1) + 1 + needed(state)


def fits(state: Descriptors, limit: int) -> bool:
    """Whether the table can be built with numbers below ``limit``, if need be in its gaps."""
    return all(slot.fd < limit for slot in state.slots) and len(state.slots) + needed(state) <= limit


def room(state: Descriptors) -> int:
    """Bytes that the batches take."""
    each = 1024 * len(state.slots) + 256 * (len(state.deliveries) + len(state.locks))
    contents = sum(2 * len(pipe.content) + 128 * len(pipe.packets) + 8192 for pipe in state.pipes)
    paths = sum(8192 for _ in state.ghosts)
    for description in state.descriptions:
        if description.file is not None:
            paths += 4 * len(description.file.path)
        elif description.epoll is not None:
            each += 640 * len(description.epoll.targets)
        elif description.inotify is not None:
            paths += sum(256 + 4 * len(watch.path) for watch in description.inotify.watches)
    return each + contents + paths


def rebuild(state: Descriptors, limit: int, lent: Sequence[str], batch: Batch) -> None:
    """Add the calls; before them, descriptors 0 to 2 are the standard streams that ``restore`` lends.

    ``limit``: no number may be higher. ``lent``: the external resources for which those from 3 on were given.
    """
    plan = Plan(batch, state, spaces(state, limit, _STREAMS + len(lent)))
    for stream in range(_STREAMS):
        # Without a purpose: a stream that ``restore`` does not have is missed only by those who want it.
        plan.streams.append(plan.parking())
        batch.add(call("dup3", stream, plan.streams[-1], _O_CLOEXEC))
    for number, resource in enumerate(lent, start=_STREAMS):
        plan.inherited[resource] = plan.parking()
        batch.add(call("dup3", number, plan.inherited[resource], _O_CLOEXEC), f"lending what was given for {resource}")
    batch.add(call("close_range", 0, min(plan.parked) - 1, 0), "clearing the descriptor table")
    plan.pipes = [pipes.rebuild(plan, pipe) for pipe in state.pipes]
    plan.ghosts = [ghosts.rebuild(plan, ghost) for ghost in state.ghosts]
    first: dict[int, int] = {}
    for slot in state.slots:
        if slot.description in first:
            plan.duplicate(first[slot.description], slot.fd, slot.close_on_exec, f"duplicating descriptor {slot.fd}")
            continue
        first[slot.description] = slot.fd
        description = state.descriptions[slot.description]
        for kind, opener in _KINDS.items():
            if (found := getattr(description, kind)) is not None:
                opener(plan, slot, found)
    for place in plan.parked:
        # Without a purpose: see the streams.
        batch.add(call("close", place))


def fill(state: Descriptors, process: int) -> None:
    """Write the contents of files without a name. ``process``: a pidfd of the stopped process whose table it is.

    Raises OSError.
    """
    ghosts.fill(state, process)


def connect(state: Descriptors, limit: int, run: Callable[[Batch], Answers], batch: Callable[[], Batch]) -> None:
    """Make the calls for what refers to other descriptors, or must not notice how they were made.

    ``batch`` begins a list of calls, ``run`` makes them.
    """
    slots = {slot.fd: slot for slot in state.slots}
    places = {slot.description: slot.fd for slot in reversed(state.slots)}

    def plan() -> Plan:
        return Plan(batch(), state, spaces(state, limit), set(slots), places=places, slots=slots)

    connecting = plan()
    armed = epoll.connect(connecting)
    answers = run(connecting.batch)
    last = plan()
    epoll.disarm(last, armed, answers)
    deliveries.rebuild(last)
    locks.rebuild(last)
    # Last: nothing that we do here is to be an event.
    inotify.connect(last)
    run(last.batch)
