"""The descriptor table: open everything again, in a table that is empty but for what `Plan` has put high up.

In three steps: batches that open everything (`rebuild`), contents that are written from outside (`fill`), and a batch
for what refers to all of it, or must not notice how it was made (`connect`).
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from msgspec import Struct

from postcopy.kernel.batch import Answers, Batch
from postcopy.kernel.calls import call
from postcopy.restore_side import (
    deliveries,
    ended,
    epoll,
    eventfd,
    external,
    fanotify,
    files,
    ghosts,
    inet_sockets,
    inotify,
    locks,
    memfds,
    mqueues,
    netlink_sockets,
    packet_sockets,
    pidfd,
    pipes,
    ptys,
    signalfd,
    sockets,
    terminals,
    timerfd,
    unix_sockets,
)
from postcopy.restore_side.groundwork import LENDER_AT
from postcopy.restore_side.shared_descriptors import Shared
from postcopy.state import Descriptors, Process, Slot

_O_CLOEXEC = 0o2000000
_F_SETFD, _F_SETFL = 2, 4
_STREAMS = 3
_LENT_FROM = LENDER_AT + 1
_PATH_ROOM = 8192


class Plan(Struct):
    """Where descriptors lie while a table is being built: what is parked lies where the program has nothing.

    The kernel gives the lowest free number, so the numbers are known before a call is made: no call has to wait for
    the result of another. ``streams``: where those are parked that ``restore`` lends; ``lender``: and the directory
    of its descriptors (`birth.lender_number`); ``inherited``: and what it was given for external resources;
    ``pipes`` and ``ghosts``: ends of pipes, and files without a name, by number; ``sockets``: by inode. ``seats``:
    the slots to which sockets (by inode) may be moved at once. ``taken``: parked ends that the program has got
    themselves. ``slots``: the table by number, once it is there. ``begin``: lets calls be made and gives the batch
    that follows.
    """

    batch: Batch
    pid: int
    shared: Shared
    spaces: Iterator[int]
    begin: Callable[[Batch], Batch] | None = None
    used: set[int] = set()
    lowest: int = 0
    parked: list[int] = []
    streams: list[int] = []
    lender: int = -1
    inherited: dict[str, int] = {}
    pipes: dict[int, tuple[int, int]] = {}
    taken: set[int] = set()
    ghosts: dict[int, int] = {}
    sockets: dict[int, int] = {}
    seats: dict[int, Slot] = {}
    slots: dict[int, Slot] = {}
    _passed: list[int] = []
    _places: dict[int, int] = {}
    _holders: dict[int, int] = {}

    @property
    def state(self) -> Descriptors:
        """What the tables of the tree refer to."""
        return self.shared.descriptors

    def go_ahead(self) -> None:
        """Let the calls be made that have been added so far, while more are added to another batch."""
        if self.begin is not None:
            self.batch = self.begin(self.batch)

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

    def unpark(self, place: int) -> None:
        """Close what is parked, and is not needed until the end."""
        if place in self.parked:
            self.parked.remove(place)
        self.close(place)

    def parking(self) -> int:
        """A number where nothing of the program's is."""
        # What has just been opened may lie here too, for a while: behind what is parked already.
        place = next((number for number in self._passed if number not in self.used), None)
        if place is not None:
            self._passed.remove(place)
        else:
            for place in self.spaces:
                if place not in self.used:
                    break
                self._passed.append(place)
            else:
                raise ValueError("it leaves no descriptor number free")
        self.used.add(place)
        self.parked.append(place)
        return place

    def borrow(self, pid: int, fd: int, purpose: str) -> int:
        """What is open as ``fd`` in another process, which has been built already: the number it gets here."""
        if pid not in self._holders:
            self.shared.await_table(pid)
            opened = self.next_fd()
            number = self.shared.nesting.seen(pid, self.pid)
            if number:
                self.batch.add(call("pidfd_open", number, 0), purpose)
            else:
                # It cannot be named from within a PID namespace, but ours can be opened anew (pidfs, Linux 6.9).
                path = self.batch.text(str(self.shared.newborns[pid].pidfd))
                self.batch.add(call("openat", self.lender, path, os.O_RDWR), purpose)
            self._holders[pid] = self.park(opened, purpose)
        opened = self.next_fd()
        self.batch.add(call("pidfd_getfd", self._holders[pid], fd, 0), purpose)
        return opened

    def place(self, description: int, purpose: str) -> int:
        """A descriptor of ``description`` in the finished table, parked where only another process has one."""
        if description not in self._places:
            holder, fd = self.shared.descriptions[description]
            self._places[description] = self.park(self.borrow(holder, fd, purpose), purpose)
        return self._places[description]

    def finished(self, slots: Iterable[Slot]) -> None:
        """Take note of the finished table."""
        for slot in slots:
            self.slots[slot.fd] = slot
            self._places.setdefault(slot.description, slot.fd)
        self.used |= set(self.slots)

    def end(self) -> None:
        """Close what is parked."""
        for place in self.parked:
            # Without a purpose: a stream that ``restore`` does not have is none here.
            self.batch.add(call("close", place))


Opener = Callable[[Plan, Slot, Any], None]

_KINDS: dict[str, Opener] = {
    "file": files.rebuild,
    "inet": sockets.place,
    "pipe": pipes.open_end,
    "stream": terminals.rebuild,
    "ghost": ghosts.open_ghost,
    "event_counter": eventfd.rebuild,
    "timer": timerfd.rebuild,
    "signals": signalfd.rebuild,
    "epoll": epoll.rebuild,
    "inotify": inotify.rebuild,
    "fanotify": fanotify.rebuild,
    "process": pidfd.rebuild,
    "ended": ended.rebuild,
    "memory": memfds.rebuild,
    "external": external.rebuild,
    "terminal": ptys.rebuild,
    "unix": sockets.place,
    "netlink": sockets.place,
    "packet": sockets.place,
    "queue": mqueues.rebuild,
}


def spaces(slots: Iterable[Slot], limit: int, lent: int = 0) -> Iterator[int]:
    """Numbers where the table has nothing, from just above the highest on, then in gaps; all below ``limit``.

    The first ``lent`` numbers are taken by what is lent.
    """
    taken = {*range(lent), *(slot.fd for slot in slots)}
    above = max(taken, default=-1) + 1
    yield from range(above, limit)
    yield from (number for number in range(min(above, limit) - 1, -1, -1) if number not in taken)


def needed(process: Process, shared: Shared) -> int:
    """How many numbers are used at once beside those of the table, at most."""
    lent = _LENT_FROM + len(shared.inherited)
    holders = {shared.descriptions[slot.description][0] for slot in process.slots}
    watched = sum(len(each.epoll.targets) for each in shared.made_by(process) if each.epoll is not None)
    foreign = min(watched, len(shared.descriptions)) if len(holders) > 1 else 0
    made = sockets.numbers([*shared.made_by(process), *shared.met_by(process)])
    foreign += shared.needed_late[0] + len(shared.in_flight.get(process.pid, ()))
    return lent + 2 * len(shared.pipes) + len(shared.ghosts) + 2 * len(holders) + foreign + made + 8


def highest(process: Process, shared: Shared) -> int:
    """One more than the highest number that building the table would like to use."""
    return max((slot.fd for slot in process.slots), default=-1) + 1 + needed(process, shared)


def fits(process: Process, shared: Shared, limit: int) -> bool:
    """Whether the table can be built with numbers below ``limit``, if need be in its gaps."""
    return all(slot.fd < limit for slot in process.slots) and len(process.slots) + needed(process, shared) <= limit


def room(process: Process, shared: Shared) -> int:
    """Bytes that the batches take."""
    state = shared.descriptors
    opened = len(process.slots) + len(shared.in_flight.get(process.pid, ()))
    each = 1024 * (opened + len(shared.inherited)) + 256 * (len(state.deliveries) + len(state.locks))
    pipes = shared.pipes_made_by(process)
    contents = sum(2 * len(pipe.content) + 128 * len(pipe.packets) + _PATH_ROOM for pipe in pipes)
    paths = _PATH_ROOM * len(shared.ghosts_made_by(process))
    mine = shared.made_by(process)
    for description in mine:
        if description.file is not None:
            paths += 4 * len(description.file.path)
        elif description.epoll is not None:
            each += 1024 * len(description.epoll.targets)
        elif description.inotify is not None:
            paths += sum(256 + 4 * len(watch.path) for watch in description.inotify.watches)
        elif description.fanotify is not None:
            paths += sum(256 + 4 * len(mark.path) for mark in description.fanotify.marks)
    made = sockets.room([*mine, *shared.met_by(process)])
    return each + contents + paths + made + shared.needed_late[1]


def rebuild(
    process: Process, shared: Shared, limit: int, batch: Batch, begin: Callable[[Batch], Batch] | None = None
) -> Batch:
    """Add the calls; the batch to which more can be added.

    Before them, descriptors 0 to 2 are the standard streams that ``restore`` lends, 3 is the directory of its
    descriptors, and those from 4 on are what it was given for external resources.

    ``limit``: no number may be higher. ``begin``: as of `Plan`.
    """
    lent = _LENT_FROM + len(shared.inherited)
    plan = Plan(batch, process.pid, shared, spaces(process.slots, limit, lent), begin)
    kept = shared.kept.get(process.pid, [])
    plan.used.update(kept)
    for stream in range(_STREAMS):
        # Without a purpose: a stream that ``restore`` does not have is missed only by those who want it.
        plan.streams.append(plan.parking())
        batch.add(call("dup3", stream, plan.streams[-1], _O_CLOEXEC))
    plan.lender = plan.parking()
    batch.add(call("dup3", LENDER_AT, plan.lender, _O_CLOEXEC), "keeping the directory of lent descriptors")
    for number, resource in enumerate(shared.inherited, start=_LENT_FROM):
        plan.inherited[resource] = plan.parking()
        batch.add(call("dup3", number, plan.inherited[resource], _O_CLOEXEC), f"lending what was given for {resource}")
    batch.add(call("close_range", 0, min(*plan.parked, *kept) - 1, 0), "clearing the descriptor table")
    mine = shared.made_by(process)
    plan.seats = _seats(process, shared)
    plan.sockets |= shared.sockets_met(process.pid)
    plan.sockets |= unix_sockets.rebuild(plan, [one.unix for one in mine if one.unix])
    plan.sockets |= inet_sockets.rebuild(plan, [one.inet for one in mine if one.inet])
    plan.sockets |= netlink_sockets.rebuild(plan, [one.netlink for one in mine if one.netlink])
    plan.sockets |= packet_sockets.rebuild(plan, [one.packet for one in mine if one.packet])
    kept = shared.kept.get(process.pid, [])
    plan.parked = [place for place in plan.parked if place not in kept]
    # Before the table: the numbers below it, which are opened for a moment, are free.
    for number in shared.in_flight.get(process.pid, ()):
        place = plan.parking()
        _open(plan, Slot(place, True, number))
        plan.parked.remove(place)
        shared.keep_in_flight(process, number, place)
    first: dict[int, int] = {}
    for slot in process.slots:
        if slot.description in first:
            plan.duplicate(first[slot.description], slot.fd, slot.close_on_exec, f"duplicating descriptor {slot.fd}")
            continue
        first[slot.description] = slot.fd
        holder, fd = shared.descriptions[slot.description]
        if holder != process.pid:
            purpose = f"taking descriptor {slot.fd} from process {holder}"
            plan.settle(plan.borrow(holder, fd, purpose), slot.fd, slot.close_on_exec, purpose)
            shared.taken(slot.description, process, slot.fd)
            continue
        _open(plan, slot)
    plan.end()
    return plan.batch


def _seats(process: Process, shared: Shared) -> dict[int, Slot]:
    """The first slots of the IP sockets that the process makes; connections are moved there at once."""
    found: dict[int, Slot] = {}
    for slot in process.slots:
        inet = shared.descriptors.descriptions[slot.description].inet
        if inet is not None and shared.descriptions[slot.description][0] == process.pid:
            found.setdefault(inet.socket.inode, slot)
    return found


def _open(plan: Plan, slot: Slot) -> None:
    """Add the calls that make a description, at its slot."""
    description = plan.state.descriptions[slot.description]
    for kind, opener in _KINDS.items():
        if (found := getattr(description, kind)) is not None:
            opener(plan, slot, found)
            return


def fill(process: Process, shared: Shared, pidfd: int) -> None:
    """Write the contents of the files without a name that the process has made, and set up its terminals.

    ``pidfd`` is its own.

    Raises OSError.
    """
    for ghost, fd in shared.ghosts_made_by(process):
        ghosts.fill(ghost, pidfd, fd)
    locked: set[int] = set()
    for slot in process.slots:
        end = shared.descriptors.descriptions[slot.description].terminal
        if end is not None and end.master and end.pty not in locked:
            ptys.lock(shared.descriptors.ptys[end.pty], pidfd, slot.fd)
            locked.add(end.pty)


def act(
    process: Process,
    shared: Shared,
    limit: int,
    run: Callable[[Batch], Answers],
    batch: Callable[[], Batch],
    do: Callable[[Plan], None],
    has_table: bool,
) -> None:
    """Make the calls that ``do`` adds to a plan, before the process has its table or (``has_table``) when it has."""
    # Before there is a table, the process's userfaultfd is still open, behind what is lent.
    lent = 0 if has_table else _LENT_FROM + len(shared.inherited) + 1
    plan = Plan(batch(), process.pid, shared, spaces(process.slots, limit, lent))
    plan.used.update(range(lent), shared.kept.get(process.pid, ()))
    if has_table:
        plan.finished(process.slots)
    else:
        plan.lender = LENDER_AT
    do(plan)
    kept = shared.kept.get(process.pid, ())
    plan.parked = [place for place in plan.parked if place not in kept]
    plan.end()
    run(plan.batch)


def connect(
    process: Process,
    shared: Shared,
    limit: int,
    run: Callable[[Batch], Answers],
    batch: Callable[[], Batch],
) -> None:
    """Make the calls for what refers to other descriptors, or must not notice how they were made.

    The tables of all processes are there. ``batch`` begins a list of calls, ``run`` makes them.
    """

    if process.pid not in shared.connecting() and not shared.kept.get(process.pid):
        return

    def plan() -> Plan:
        made = Plan(batch(), process.pid, shared, spaces(process.slots, limit))
        made.finished(process.slots)
        return made

    connecting = plan()
    kept = shared.kept.pop(process.pid, [])
    connecting.used.update(kept)
    for fd in dict.fromkeys(kept):
        connecting.batch.add(call("close", fd), "closing what others have got")
    clocks = timerfd.Clocks.ask(connecting)
    armed = epoll.connect(connecting)
    connecting.end()
    answers = run(connecting.batch)
    last = plan()
    epoll.disarm(last, armed, answers)
    timerfd.connect(last, clocks.answered(answers))
    ptys.connect(last)
    deliveries.rebuild(last)
    locks.rebuild(last)
    # Last: nothing that we do here is to be an event.
    inotify.connect(last)
    fanotify.connect(last)
    last.end()
    run(last.batch)
