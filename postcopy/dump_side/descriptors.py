"""The descriptor tables: what is open, under which numbers, and what of it cannot be moved."""

import os

from postcopy.dump_side import files, memfds, pipes, terminals
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import kcmp, procfs
from postcopy.state import Description, Slot

_KINDS = (pipes.collect, terminals.collect, memfds.collect, files.collect)


def collect(table: Table, pid: int, problems: list[str]) -> list[Slot]:
    """The descriptor table of a process of the tree, stopped or not; what its entries refer to is added to ``table``.

    What cannot be moved is added to ``problems`` and left out.
    """
    table.pid = pid
    slots: list[Slot] = []
    for fd in procfs.descriptors(pid):
        try:
            opened = Opened.look(pid, fd)
            among = table.alike[opened.likeness]
            place, number = _look_up(opened, among)
            if number is None:
                number = len(table.descriptions)
                table.descriptions.append(_describe(table, opened))
                among.insert(place, (pid, fd, number))
        except (Refused, OSError) as reason:
            if isinstance(reason, OSError) and not os.path.lexists(f"/proc/{pid}/fd/{fd}"):
                continue  # a running process has closed it while we looked
            problems.append(f"descriptor {fd}: {reason}")
            continue
        slots.append(Slot(fd, opened.close_on_exec, number))
    return slots


def _describe(table: Table, opened: Opened) -> Description:
    for kind in _KINDS:
        description = kind(table, opened)
        if description is not None:
            return description
    raise Refused(f"{opened.link}: descriptors of this kind cannot be moved yet")


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
