"""The descriptor tables: what is open, under which numbers, and what of it cannot be moved."""

import os

from postcopy.dump_side import (
    deliveries,
    epoll,
    eventfd,
    external,
    files,
    ghosts,
    inotify,
    locks,
    memfds,
    pidfd,
    pipes,
    signalfd,
    sockets,
    terminals,
    timerfd,
)
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import kcmp, procfs
from postcopy.state import Description, FileIdentity, Slot

_KINDS = (
    external.collect,
    pipes.collect,
    terminals.collect,
    memfds.collect,
    sockets.collect,
    ghosts.collect,
    files.collect,
    eventfd.collect,
    timerfd.collect,
    signalfd.collect,
    epoll.collect,
    inotify.collect,
    pidfd.collect,
)


def collect(table: Table, pid: int, problems: list[str]) -> list[Slot]:
    """The descriptor table of a process of the tree, stopped or not; what its entries refer to is added to ``table``.

    What cannot be moved is added to ``problems`` and left out.
    """
    table.pid = pid
    slots: list[Slot] = []
    seen: set[int] = set()
    for fd in procfs.descriptors(pid):
        try:
            opened = Opened.look(pid, fd)
            among = table.alike[opened.likeness]
            place, number = _look_up(opened, among)
            new = number is None
            if number is None:
                number = len(table.descriptors.descriptions)
                table.descriptors.descriptions.append(_describe(table, opened, number))
                among.insert(place, (pid, fd, number))
            if number not in seen:
                _lock(table, opened, number, new)
            seen.add(number)
        except (Refused, OSError) as reason:
            if isinstance(reason, OSError) and not os.path.lexists(f"/proc/{pid}/fd/{fd}"):
                continue  # a running process has closed it while we looked
            problems.append(f"descriptor {fd}: {reason}")
            continue
        slots.append(Slot(fd, opened.close_on_exec, number))
    return slots


def _describe(table: Table, opened: Opened, number: int) -> Description:
    for kind in _KINDS:
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


def _lock(table: Table, opened: Opened, number: int, new: bool) -> None:
    """Add the locks."""
    held = locks.collect(table, opened, number, new)
    table.descriptors.locks.extend(held)
    file = table.descriptors.descriptions[number].file
    if held and file is not None:
        table.needed.append(FileIdentity(file.path, opened.stat.st_size, b"", changing=True, locked=True))


def _look_up(opened: Opened, among: list[tuple[int, int, int]]) -> tuple[int, int | None]:
    """Where in ``among`` the descriptor belongs, and the number of the description if an earlier one shares it.

    By bisection: thousands of descriptors that look alike are nothing unusual.
    """
    low, high = 0, len(among)
    while low < high:
        middle = (low + high) // 2
        other_pid, other_fd, number = among[middle]
        try:
            order = kcmp.order_of_descriptions(opened.pid, opened.fd, other_pid, other_fd)
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
