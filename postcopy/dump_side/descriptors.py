"""The descriptor tables: what is open, under which numbers, and what of it cannot be moved."""

import contextlib
import os
from bisect import bisect_left

from msgspec import structs

from postcopy import in_flight
from postcopy.dump_side import (
    deliveries,
    epoll,
    eventfd,
    external,
    fanotify,
    files,
    ghosts,
    inotify,
    locks,
    memfds,
    mqueues,
    pidfd,
    pipes,
    ptys,
    signalfd,
    sockets,
    terminals,
    timerfd,
    unix_peers,
)
from postcopy.dump_side.opened import Opened, Refused, Remembered, Table
from postcopy.dump_side.socket_looks import Shown
from postcopy.kernel import kcmp, procfs
from postcopy.open_kinds import Lock
from postcopy.state import Description, FileIdentity, Slot

_LOOKS = 6
_KINDS = (
    external.collect,
    pipes.collect,
    ptys.collect,
    terminals.collect,
    memfds.collect,
    sockets.collect,
    mqueues.collect,
    ghosts.collect,
    files.collect,
    eventfd.collect,
    timerfd.collect,
    signalfd.collect,
    epoll.collect,
    inotify.collect,
    fanotify.collect,
    pidfd.collect,
)
# What a descriptor can be that is known to be a socket.
_SOCKETS = (external.collect, sockets.collect)


def collect(table: Table, pid: int, problems: list[str]) -> list[Slot]:
    """The descriptor table of a process of the tree, stopped or not; what its entries refer to is added to ``table``.

    What cannot be moved is added to ``problems`` and left out.
    """
    table.pid = pid
    slots: list[Slot] = []
    seen: set[int] = set()
    shown = table.shown_by_sockets()
    with contextlib.closing(procfs.Entries(pid)) as entries:
        for fd in procfs.descriptors(pid):
            # A running process may close it while we look, and open something else under its number.
            for looks_left in reversed(range(1 if table.frozen else _LOOKS)):
                try:
                    slots.append(_collect(table, entries, fd, shown(fd), seen))
                except (Refused, OSError) as reason:
                    if isinstance(reason, OSError) and not os.path.lexists(f"/proc/{pid}/fd/{fd}"):
                        break
                    if isinstance(reason, FileNotFoundError) and not looks_left and not table.frozen:
                        # It was closed at each look, and something else is open there now: that is looked at later.
                        break
                    if not looks_left:
                        problems.append(f"descriptor {fd}: {reason}")
                    continue
                break
    return slots


def collect_in_flight(table: Table, problems: list[str]) -> None:
    """Once all tables have been collected: add what is only on its way in Unix sockets (SCM_RIGHTS)."""
    # What is found may be a socket with others on their way.
    for inode in table.carrying:
        number = unix_peers.numbers(table)[inode]
        unix = table.descriptors.descriptions[number].unix
        assert unix is not None
        table.pid = table.sockets[inode]
        queue = []
        for message in unix.queue:
            try:
                rights = [_on_its_way(table, fd) for fd in message.rights]
            except (Refused, OSError) as reason:
                problems.append(f"socket:[{inode}]: a descriptor is on its way in it (SCM_RIGHTS): {reason}")
                rights = []
            queue.append(structs.replace(message, rights=rights))
        unix_peers.change(table, number, queue=queue)


def _on_its_way(table: Table, fd: int) -> int:
    """The number of the description behind a descriptor of ours."""
    opened = Opened.look(os.getpid(), fd)
    before = len(table.descriptors.descriptions)
    number = _entered(table, opened, set()).description
    found = table.descriptors
    if number >= before and not in_flight.can_be_made(found.descriptions[number]):
        raise Refused(f"{opened.link}: of what nobody has open, this kind cannot be moved yet")
    owned = {each.description for each in found.deliveries} | {each.description for each in found.locks}
    if number >= before and number in owned:
        raise Refused(f"{opened.link}: nobody has it open, and it has an owner (F_SETOWN), locks or a lease")
    return number


def _collect(table: Table, entries: procfs.Entries, fd: int, shown: Shown | None, seen: set[int]) -> Slot:
    """One entry of a table. ``seen``: the descriptions that this process is known to have."""
    if shown is not None:
        slot = _entered(table, Opened.of_socket(table.pid, fd, shown, entries.process), seen)
        if shown.foreseen:
            table.foreseen.setdefault(table.pid, []).append(fd)
        return slot
    info, known = entries.info(fd), table.remembered.get((table.pid, fd))
    if known is not None and known.still(info):
        number = _as_before(table, fd, known)
        seen.add(number)
        return Slot(fd, known.close_on_exec, number)
    return _entered(table, Opened.look(table.pid, fd, entries, info, known), seen)


def _as_before(table: Table, fd: int, known: Remembered) -> int:
    """The number of the description behind a descriptor that is as an earlier look has found it."""
    among = table.alike[known.likeness]
    place, number = _look_up(table, table.pid, fd, among)
    if number is not None:
        return number
    number, description = len(table.descriptors.descriptions), known.description
    if id(description) in table.reused:
        # What was one then are two now.
        description = structs.replace(description)
    table.reused.add(id(description))
    table.descriptors.descriptions.append(description)
    if known.needed is not None:
        table.needed.append(known.needed)
    among.insert(place, (table.pid, fd, number))
    return number


def _entered(table: Table, opened: Opened, seen: set[int]) -> Slot:
    """Its entry; it is closed."""
    try:
        return _entry(table, opened, seen)
    finally:
        opened.close()


def _entry(table: Table, opened: Opened, seen: set[int]) -> Slot:
    among = table.alike[opened.likeness]
    place, number = _look_up(table, opened.pid, opened.fd, among)
    if number is None:
        number, needed = len(table.descriptors.descriptions), len(table.needed)
        # First all that may be refused: what is refused now must be found anew at the next look.
        held = locks.collect(table, opened, number, new=True)
        description = _describe(table, opened, number)
        table.descriptors.descriptions.append(description)
        among.insert(place, (opened.pid, opened.fd, number))
        if description.file is not None and not table.frozen:
            table.identities[number] = next(iter(table.needed[needed:]), None)
    else:
        held = [] if number in seen else locks.collect(table, opened, number, new=False)
    if held:
        _lock(table, opened, number, held)
    if number in table.identities:
        known = opened.remembered(table.descriptors.descriptions[number], table.identities[number])
        if known is not None:
            table.found[table.pid, opened.fd] = known
    seen.add(number)
    return Slot(opened.fd, opened.close_on_exec, number)


def _describe(table: Table, opened: Opened, number: int) -> Description:
    for kind in _KINDS if opened.shown is None else _SOCKETS:
        description = kind(table, opened)
        if description is not None:
            break
    else:
        raise Refused(f"{opened.link}: descriptors of this kind cannot be moved yet")
    delivery = deliveries.collect(table, opened, number)
    if delivery is not None:
        if description.stream is not None or description.external is not None:
            raise Refused(f"{opened.link}: signal-driven I/O (F_SETOWN, O_ASYNC) of what restore lends cannot be moved")
        table.descriptors.deliveries.append(delivery)
    return description


def _lock(table: Table, opened: Opened, number: int, held: list[Lock]) -> None:
    """Add the locks."""
    table.descriptors.locks.extend(held)
    file = table.descriptors.descriptions[number].file
    if file is not None:
        table.needed.append(FileIdentity(file.path, opened.stat.st_size, b"", changing=True, locked=True))


def _look_up(table: Table, pid: int, fd: int, among: list[tuple[int, int, int]]) -> tuple[int, int | None]:
    """Where in ``among`` the descriptor belongs, and the number of the description if an earlier one shares it.

    By bisection: thousands of descriptors that look alike are nothing unusual.
    """
    if not among:
        return 0, None
    rank = table.ranks.get((pid, fd))
    if rank is not None:
        found = _check(pid, fd, among, bisect_left(among, rank, key=lambda each: table.ranks.get(each[:2], rank)))
        if found is not None:
            return found
    low, high = 0, len(among)
    while low < high:
        middle = (low + high) // 2
        other_pid, other_fd, number = among[middle]
        try:
            order = kcmp.order_of_descriptions(pid, fd, other_pid, other_fd)
        except OSError:
            if os.path.lexists(f"/proc/{other_pid}/fd/{other_fd}"):
                raise
            # That one has been closed while we looked.
            del among[middle]
            high -= 1
            continue
        if not order:
            return middle, number
        low, high = (low, middle) if order < 0 else (middle + 1, high)
    return low, None


def _check(pid: int, fd: int, among: list[tuple[int, int, int]], place: int) -> tuple[int, int | None] | None:
    """What `_look_up` says, where the descriptor is right between its neighbours at ``place``; None where it is not."""
    for neighbour, wanted in ((place, -1), (place - 1, 1)):
        if 0 <= neighbour < len(among):
            other_pid, other_fd, number = among[neighbour]
            order = kcmp.order_of_descriptions(pid, fd, other_pid, other_fd)
            if not order:
                return neighbour, number
            if order != wanted:
                return None
    return place, None
