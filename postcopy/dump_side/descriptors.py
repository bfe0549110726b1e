"""The descriptor table: what is open, under which numbers, and what of it cannot be moved."""

import dataclasses
import os
from collections import defaultdict

from postcopy.dump_side import (
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
from postcopy.dump_side.choices import Choices
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import kcmp, procfs
from postcopy.state import Description, Descriptors, Slot

# Descriptors that may share a description, by what they show: (descriptor, number of its description), as kcmp orders.
Alike = dict[tuple[str, int, int], list[tuple[int, int]]]

_KINDS = (
    external.collect,
    pipes.collect,
    terminals.collect,
    ghosts.collect,
    files.collect,
    eventfd.collect,
    timerfd.collect,
    signalfd.collect,
    epoll.collect,
    inotify.collect,
    pidfd.collect,
)


def collect(
    pid: int,
    problems: list[str],
    trusted_pipes: frozenset[int] = frozenset(),
    choices: Choices | None = None,
    frozen: bool = False,
) -> tuple[Descriptors, Table]:
    """The descriptor table of a process, stopped or not, and what was found on the way.

    What cannot be moved is added to ``problems`` and left out. ``trusted_pipes``, ``choices``, ``frozen``: see `Table`.
    """
    table = Table(pid, trusted_pipes, choices or Choices(), frozen)
    alike: Alike = defaultdict(list)
    for fd in procfs.descriptors(pid):
        try:
            opened = Opened.look(pid, fd)
            among = alike[opened.likeness]
            place, number = _look_up(opened, among)
            if number is None:
                number = len(table.descriptions)
                table.descriptions.append(_describe(table, opened, number))
                among.insert(place, (fd, number))
        except (Refused, OSError) as reason:
            if isinstance(reason, OSError) and not os.path.lexists(f"/proc/{pid}/fd/{fd}"):
                continue  # a running process has closed it while we looked
            problems.append(f"descriptor {fd}: {reason}")
            continue
        table.slots.append(Slot(fd, opened.close_on_exec, number))
    epoll.complete(table, problems)
    found = Descriptors(table.slots, table.descriptions, table.pipes, table.ghosts, table.deliveries, table.locks)
    return found, table


def _describe(table: Table, opened: Opened, number: int) -> Description:
    for kind in _KINDS:
        description = kind(table, opened)
        if description is not None:
            break
    else:
        raise Refused(f"{opened.link}: descriptors of this kind cannot be moved yet")
    held = list(locks.collect(table, opened, number))
    delivery = deliveries.collect(table, opened, number)
    if delivery is not None and (description.stream is not None or description.external is not None):
        raise Refused(f"{opened.link}: signal-driven I/O (F_SETOWN, O_ASYNC) of what restore lends cannot be moved")
    if held and description.file is not None:
        last = table.needed[-1]
        table.needed[-1] = dataclasses.replace(last, locked=True)
    table.locks += held
    if delivery is not None:
        table.deliveries.append(delivery)
    return description


def _look_up(opened: Opened, among: list[tuple[int, int]]) -> tuple[int, int | None]:
    """Where in ``among`` the descriptor belongs, and the number of the description if an earlier one shares it.

    By bisection: thousands of descriptors that look alike are nothing unusual.
    """
    low, high = 0, len(among)
    while low < high:
        middle = (low + high) // 2
        other, number = among[middle]
        order = kcmp.order_of_descriptions(opened.pid, opened.fd, other)
        if not order:
            return middle, number
        low, high = (low, middle) if order < 0 else (middle + 1, high)
    return low, None
