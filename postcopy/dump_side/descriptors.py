"""The descriptor table: what is open, under which numbers, and what of it cannot be moved."""

from collections.abc import Iterable

from postcopy.dump_side import files, pipes, terminals
from postcopy.dump_side.opened import Opened, Refused, Table
from postcopy.kernel import kcmp, procfs
from postcopy.state import Description, Descriptors, Slot

_KINDS = (pipes.collect, terminals.collect, files.collect)


def collect(pid: int, problems: list[str], trusted_pipes: frozenset[int] = frozenset()) -> tuple[Descriptors, Table]:
    """The descriptor table of a process, stopped or not, and what was found on the way.

    What cannot be moved is added to ``problems`` and left out. ``trusted_pipes``: see `Table`.
    """
    table = Table(pid, trusted_pipes)
    slots: list[Slot] = []
    seen: list[tuple[Opened, int]] = []
    for fd in procfs.descriptors(pid):
        try:
            opened = Opened.look(pid, fd)
            number = _shared(opened, seen)
            if number is None:
                number = len(table.descriptions)
                table.descriptions.append(_describe(table, opened))
                seen.append((opened, number))
        except (Refused, OSError) as reason:
            problems.append(f"descriptor {fd}: {reason}")
            continue
        slots.append(Slot(fd, opened.close_on_exec, number))
    return Descriptors(slots, table.descriptions, table.pipes), table


def _describe(table: Table, opened: Opened) -> Description:
    for kind in _KINDS:
        description = kind(table, opened)
        if description is not None:
            return description
    raise Refused(f"{opened.link}: descriptors of this kind cannot be moved yet")


def _shared(opened: Opened, seen: Iterable[tuple[Opened, int]]) -> int | None:
    """The number of the description that an earlier descriptor shares with this one."""
    for other, number in seen:
        if other.may_share_with(opened) and kcmp.same_description(opened.pid, other.fd, opened.fd):
            return number
    return None
